"""Camera rigs: where the views of a shape are taken from, and where a point of the shape falls in them.

World: right-handed, +Y up, the shape inside the unit ball around the origin. A camera at azimuth 0 and elevation 0
stands on +Z; azimuth turns it towards +X, elevation lifts it towards +Y. Every camera looks at the origin. Camera axes:
x right, y down, z forward. Whole pixel coordinates are pixel centres, so rounding (column, row) names the pixel; (0, 0)
is the top left one.
"""

import math
from collections.abc import Callable
from typing import Final

import numpy as np
from jaxtyping import Float, Float32
from pydantic import BaseModel, Field, PositiveInt, model_validator

from datastore.errors import AskedWrongly

MIN_DISTANCE: Final = 2.0
"""In ball radii; the hidden-point test needs cameras at least this far away (Katz et al. 2007, as PointMCD uses it)."""

_DEFAULT_DISTANCE: Final = 3.0
_DEFAULT_FIELD_OF_VIEW: Final = (
    40.5  # the ball subtends 38.9 degrees at distance 3; the rest is a margin of 4 % on each side
)


class CameraRig(BaseModel, extra="forbid", frozen=True):
    """The cameras of all views, the same for every shape."""

    name: str
    azimuths: tuple[float, ...] = Field(min_length=1)  # degrees, one per view
    elevations: tuple[float, ...]  # degrees, one per view
    distance: float = Field(default=_DEFAULT_DISTANCE, ge=MIN_DISTANCE)  # from the origin, in ball radii
    field_of_view: float = Field(default=_DEFAULT_FIELD_OF_VIEW, gt=0, lt=180)  # degrees, both ways: images are square
    image_size: PositiveInt

    @model_validator(mode="after")
    def _is_consistent(self) -> "CameraRig":
        if len(self.azimuths) != len(self.elevations):
            raise ValueError(
                f"{len(self.azimuths)} azimuths but {len(self.elevations)} elevations: give one of each per view"
            )
        if not all(math.isfinite(azimuth) for azimuth in self.azimuths):
            raise ValueError("azimuths must be finite")
        if not all(-90 <= elevation <= 90 for elevation in self.elevations):
            raise ValueError("elevations must lie between -90 and 90 degrees")
        needed = 2 * math.degrees(math.asin(1 / self.distance))
        if self.field_of_view < needed:
            raise ValueError(
                f"a field of view of {self.field_of_view} degrees at distance {self.distance} cuts the unit ball off: "
                f"{needed:.1f} degrees or more show all of it"
            )
        return self

    @property
    def num_views(self) -> int:
        """How many images of a shape there are."""
        return len(self.azimuths)

    @property
    def focal_length(self) -> float:
        """In pixels."""
        return self.image_size / 2 / math.tan(math.radians(self.field_of_view) / 2)

    @property
    def depth_range(self) -> tuple[float, float]:
        """Nearest and farthest depth that a point of the unit ball can have."""
        return self.distance - 1, self.distance + 1


def camera_frames(rig: CameraRig) -> tuple[Float[np.ndarray, "v 3"], Float[np.ndarray, "v 3 3"]]:
    """Positions, and rotations whose rows are the camera's right, down and forward axes.

    A world point in camera axes is `rotation @ (point - position)`.
    """
    azimuth, elevation = np.radians(rig.azimuths), np.radians(rig.elevations)
    zero = np.zeros_like(azimuth)
    towards_camera = np.stack(
        [np.cos(elevation) * np.sin(azimuth), np.sin(elevation), np.cos(elevation) * np.cos(azimuth)], axis=-1
    )
    forward = -towards_camera
    # the right axis follows from the azimuth alone, so it exists at the poles too, where "up" and "forward" coincide
    right = np.stack([np.cos(azimuth), zero, -np.sin(azimuth)], axis=-1)
    down = np.cross(forward, right)
    return rig.distance * towards_camera, np.stack([right, down, forward], axis=1)


def project(
    points: Float[np.ndarray, "p 3"], rig: CameraRig
) -> tuple[Float32[np.ndarray, "p v 2"], Float32[np.ndarray, "p v"]]:
    """The pixel (column, row) of every point in every view, and its depth along the camera's forward axis."""
    positions, rotations = camera_frames(rig)
    # float64 inside: at float32 the rounding of (point - position) is visible in the last digit of a pixel coordinate
    in_camera = np.einsum("vij,pvj->pvi", rotations, points.astype(np.float64)[:, None] - positions)
    depth = in_camera[..., 2]
    centre = (rig.image_size - 1) / 2
    pixels = rig.focal_length * in_camera[..., :2] / depth[..., None] + centre
    return pixels.astype(np.float32), depth.astype(np.float32)


def pixel_rays(rig: CameraRig, view: int) -> tuple[Float[np.ndarray, " 3"], Float32[np.ndarray, "h w 3"]]:
    """Where the rays of one view start, and the unit direction through the centre of each pixel."""
    positions, rotations = camera_frames(rig)
    offsets = (np.arange(rig.image_size) - (rig.image_size - 1) / 2) / rig.focal_length
    columns, rows = np.meshgrid(offsets, offsets)
    in_camera = np.stack([columns, rows, np.ones_like(columns)], axis=-1)
    directions = in_camera @ rotations[view]
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    return positions[view], directions.astype(np.float32)


def rig_by_name(name: str, image_size: int) -> CameraRig:
    """A known rig at the given image size."""
    if name not in _VIEW_ANGLES:
        raise AskedWrongly(f"There is no camera rig {name!r}. Known rigs: {', '.join(sorted(_VIEW_ANGLES))}.")
    angles = _VIEW_ANGLES[name]()
    return CameraRig(
        name=name,
        azimuths=tuple(azimuth for azimuth, _ in angles),
        elevations=tuple(elevation for _, elevation in angles),
        image_size=image_size,
    )


Angles = list[tuple[float, float]]  # azimuth, elevation


def _azimuth12() -> Angles:
    """PointMCD's classification views: 12 around, from above."""
    return [(30.0 * index, 30.0) for index in range(12)]


def _ring16() -> Angles:
    """PointMCD's segmentation views: elevation outside, azimuth inside, as its files are numbered."""
    return [(45.0 * index, elevation) for elevation in (30.0, -30.0) for index in range(8)]


def _dodecahedron20() -> Angles:
    """The corners of a dodecahedron, as PointCMT's 20 views, from the top down and around."""
    golden = (1 + math.sqrt(5)) / 2
    signs = (-1.0, 1.0)
    corners = [(x, y, z) for x in signs for y in signs for z in signs]
    for a in (-1 / golden, 1 / golden):
        for b in (-golden, golden):
            corners += [(0.0, a, b), (a, b, 0.0), (b, 0.0, a)]
    angles = [
        # rounded, so that corners of one height sort by azimuth alone and no angle reads -0.0
        (round(math.degrees(math.atan2(x, z)), 9) % 360.0, round(math.degrees(math.asin(y / math.sqrt(3))), 9) + 0.0)
        for x, y, z in corners
    ]
    return sorted(angles, key=lambda angle: (-angle[1], angle[0]))


def _simple6() -> Angles:
    """SimpleView's six: four sides, top, bottom."""
    return [(0.0, 0.0), (90.0, 0.0), (180.0, 0.0), (270.0, 0.0), (0.0, 90.0), (0.0, -90.0)]


_VIEW_ANGLES: Final[dict[str, Callable[[], Angles]]] = {
    "azimuth12": _azimuth12,
    "ring16": _ring16,
    "dodecahedron20": _dodecahedron20,
    "simple6": _simple6,
}
RIG_NAMES: Final = tuple(_VIEW_ANGLES)
