"""One shape as a source delivers it: its geometry, and the images that the source has of it."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int16, UInt8

from datastore.mesh import Mesh

NUM_CAMERA_VALUES = 8
"""Of a camera as a source states it: azimuth, elevation, in-plane rotation (degrees, as in `cameras.py`), distance,
field of view (degrees), and the object's shift along x, y, z. Not a number where the source does not say."""


@dataclass(frozen=True)
class PointCloud:
    """Points of a surface in the source's own units, without the surface."""

    points: Float32[np.ndarray, "n 3"]
    normals: Float32[np.ndarray, "n 3"] | None = None  # of any length but zero
    colours: UInt8[np.ndarray, "n 3"] | None = None  # RGB
    part_labels: Int16[np.ndarray, " n"] | None = None  # index into the corpus' part names; -1 unknown


@dataclass(frozen=True)
class Images:
    """What a source has of views of a shape: all of them of one size."""

    views: UInt8[np.ndarray, "v h w 3"]  # RGB on white
    visibility: Bool[np.ndarray, "n v"] | None = None  # of the points of the shape's cloud
    cameras: Float32[np.ndarray, "v 8"] | None = None


@dataclass(frozen=True)
class Shape:
    """What `Source.load` gives."""

    geometry: Mesh | PointCloud
    images: Images | None = None  # take the place of rendered views; there where the listing promises them
    extra_views: UInt8[np.ndarray, "e h w 3"] | None = None  # more images, of no known camera; fewer or none is fine
