"""Views, depth and visibility of a shape that is known by points alone: an estimate, where `render.py` is exact.

What is drawn is a surface through the points (`cloud_surface.py`), as meshes are drawn. Pixels are exact, and visibility
is that of the stored points among themselves (`hidden_points.py`).
"""

from typing import Final

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64

from datastore.cameras import CameraRig
from datastore.cloud_surface import surface_through
from datastore.hidden_points import visibility_of_points
from datastore.render import Rendering, pixels_of, smooth_images
from datastore.shape import PointCloud

_MOST_POINTS: Final = 100_000
"""Of a cloud that is drawn: two pixels apart on an image of 224, in four seconds instead of a fifth of one."""

_FINEST_GRID: Final = 256  # cells along the ball's diameter: about as many as an image has pixels


def render_cloud(cloud: PointCloud, chosen: Int64[np.ndarray, " p"], rig: CameraRig) -> Rendering:
    """All that is rendered of a cloud inside the unit ball. Visibility and pixels are of the chosen points.

    Any cloud with a point in it is drawn, be it a single one, or all in a line or in one place.
    """
    points = cloud.points[chosen]
    # pixels are largest where the cloud may be farthest away
    surface = surface_through(_thinned(cloud), pixel=(rig.distance + 1) / rig.focal_length)
    views, depth = smooth_images(surface.mesh, surface.corner_normals, rig)
    return Rendering(views, depth, visibility_of_points(points, rig), pixels_of(points, rig))


def _thinned(cloud: PointCloud) -> PointCloud:
    """The cloud; of a scan with more points than images can show, the means over the cells of a regular grid."""
    if len(cloud.points) <= _MOST_POINTS:
        return cloud
    side = _FINEST_GRID
    while (cells := _cells(cloud.points, side)).max() >= _MOST_POINTS:
        side //= 2
    # normals to either side have no mean, and those that are estimated from so many points are good
    colours = None if cloud.colours is None else (_means(cloud.colours, cells) + 0.5).astype(np.uint8)
    return PointCloud(_means(cloud.points, cells).astype(np.float32), colours=colours)


def _cells(points: Float32[np.ndarray, "n 3"], side: int) -> Int32[np.ndarray, " n"]:
    """Which cell of the grid each point lies in, counted over those cells that hold a point."""
    cells = np.zeros(len(points), dtype=np.int32)
    for coordinate in points.T:  # one at a time: the cloud may be most of the memory
        cells *= side
        cells += np.clip((coordinate + 1) * np.float32(side / 2), 0, side - 1).astype(np.int32)
    is_occupied = np.zeros(side**3, dtype=bool)
    is_occupied[cells] = True
    return (np.cumsum(is_occupied, dtype=np.int32) - 1)[cells]


def _means(values: np.ndarray, cells: Int32[np.ndarray, " n"]) -> Float64[np.ndarray, "m 3"]:
    counts = np.bincount(cells)
    return np.stack([np.bincount(cells, column) / counts for column in values.T], axis=1)
