"""Camera rigs: where the views of a shape are taken from, and where a point of the shape falls in them.

World: right-handed, +Y up, the shape inside the unit ball around the origin. A camera at azimuth 0 and elevation 0
stands on +Z; azimuth turns it towards +X, elevation lifts it towards +Y. Every camera looks at the origin. Camera axes:
x right, y down, z forward. Whole pixel coordinates are pixel centres, so rounding (column, row) names the pixel; (0, 0)
is the top left one.

A point that lies at (x, y, z) in camera axes falls, in an image of s pixels a side with focal length
f = s / (2 tan(field_of_view / 2)) pixels, at

    perspective:   (column, row) = f (x, y) / z + (s - 1) / 2
    orthographic:  (column, row) = f (x, y) / distance + (s - 1) / 2

and its depth is z in both: an orthographic camera shows everything in the size that a perspective one at the same
place, with the same field of view, shows in the plane through the origin.

On the command line a rig is one word: a name, and after a question mark what shall differ from its defaults, as in
`azimuth12?distance=2.5&fov=50`, `ring?views=8&elevations=30,-30` or `angles?at=0/30,45/-10`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from jaxtyping import Float, Float32
from pydantic import BaseModel, Field, PositiveInt, ValidationError, model_validator

from datastore.errors import AskedWrongly

MIN_DISTANCE: Final = 2.0
"""In ball radii; the hidden-point test needs cameras at least this far away (Katz et al. 2007, as PointMCD uses it)."""

_DEFAULT_DISTANCE: Final = 3.0
_DEFAULT_FIELD_OF_VIEW: Final = (
    40.5  # the ball subtends 38.9 degrees at distance 3; the rest is a margin of 4 % on each side
)


Projection = Literal["perspective", "orthographic"]
_PROJECTIONS: Final[dict[str, Projection]] = {"perspective": "perspective", "orthographic": "orthographic"}


class CameraRig(BaseModel, extra="forbid", frozen=True):
    """The cameras of all views, the same for every shape."""

    name: str
    azimuths: tuple[float, ...] = Field(min_length=1)  # degrees, one per view
    elevations: tuple[float, ...]  # degrees, one per view
    distance: float = Field(default=_DEFAULT_DISTANCE, ge=MIN_DISTANCE)  # from the origin, in ball radii
    field_of_view: float = Field(default=_DEFAULT_FIELD_OF_VIEW, gt=0, lt=180)  # degrees, both ways: images are square
    projection: Projection = "perspective"
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
        needed = 2 * math.degrees(math.atan(_half_width_of_ball(self.distance, self.projection)))
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
    pixels = np.empty((len(points), rig.num_views, 2), dtype=np.float32)
    depth = np.empty((len(points), rig.num_views), dtype=np.float32)
    # float64 inside: at float32 the rounding of (point - position) is visible in the last digit of a pixel coordinate
    columns_of_points = points.T.astype(np.float64)
    for view, (position, rotation) in enumerate(zip(positions, rotations, strict=True)):
        in_camera = rotation @ (columns_of_points - position[:, None])
        shrinks_with = in_camera[2] if rig.projection == "perspective" else rig.distance
        pixels[:, view] = (rig.focal_length * in_camera[:2] / shrinks_with + (rig.image_size - 1) / 2).T
        depth[:, view] = in_camera[2]
    return pixels, depth


def pixel_rays(rig: CameraRig, view: int) -> tuple[Float[np.ndarray, "h w 3"], Float32[np.ndarray, "h w 3"]]:
    """Where the ray through the centre of each pixel of one view starts, and its unit direction.

    All start in the plane at depth 0: a perspective camera's in one point, an orthographic one's side by side.
    """
    positions, rotations = camera_frames(rig)
    offsets = (np.arange(rig.image_size) - (rig.image_size - 1) / 2) / rig.focal_length
    columns, rows = np.meshgrid(offsets, offsets)
    across = np.stack([columns, rows], axis=-1) @ rotations[view, :2]
    forward = np.broadcast_to(rotations[view, 2], across.shape)
    if rig.projection == "orthographic":
        return positions[view] + rig.distance * across, forward.astype(np.float32)
    directions = across + forward
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    return np.broadcast_to(positions[view], directions.shape), directions.astype(np.float32)


def _half_width_of_ball(distance: float, projection: Projection) -> float:
    """Tangent of the angle between the middle of the unit ball and its rim, as an image shows it."""
    return 1 / math.sqrt(distance**2 - 1) if projection == "perspective" else 1 / distance


def _default_field_of_view(distance: float, projection: Projection) -> float:
    """The whole ball, and around it the same margin whatever the distance."""
    if (distance, projection) == (_DEFAULT_DISTANCE, "perspective"):
        return _DEFAULT_FIELD_OF_VIEW  # to the last digit
    margin = math.tan(math.radians(_DEFAULT_FIELD_OF_VIEW / 2)) / _half_width_of_ball(_DEFAULT_DISTANCE, "perspective")
    return 2 * math.degrees(math.atan(margin * _half_width_of_ball(distance, projection)))


Angles = list[tuple[float, float]]  # azimuth, elevation
Parameters = dict[str, str]  # as written in a rig's word


def rig_by_name(name: str, image_size: int) -> CameraRig:
    """The rig that a word names (the module's docstring shows some), which is also its name in a store."""
    base, _, rest = name.partition("?")
    if base not in _KINDS:
        raise AskedWrongly(
            f"There is no camera rig {base!r}. Known rigs: {', '.join(sorted(_KINDS))}; each takes parameters, as in "
            f"'ring?views=8&elevations=30,-30' or 'azimuth12?distance=2.5&fov=50'."
        )
    kind = _KINDS[base]
    given = _parameters(name, rest, (*kind.required, *kind.optional, *_COMMON_KEYS))
    if missing := [key for key in kind.required if key not in given]:
        raise AskedWrongly(f"Camera rig {name!r} lacks {missing[0]!r}. Write it like {kind.example!r}.")
    asked = given.get("projection", kind.projection)
    if asked not in _PROJECTIONS:
        raise AskedWrongly(f"Camera rig {name!r}: projection is {' or '.join(_PROJECTIONS)}, not {asked!r}.")
    projection = _PROJECTIONS[asked]
    distance = _number(name, given, "distance", _DEFAULT_DISTANCE)
    if distance < MIN_DISTANCE:
        raise AskedWrongly(
            f"Camera rig {name!r}: distance {distance:g} is too close; it is counted in radii of the unit ball around "
            f"the shape, and must be {MIN_DISTANCE:g} or more."
        )
    angles = kind.angles(name, given)
    try:
        return CameraRig(
            name=name,
            azimuths=tuple(azimuth for azimuth, _ in angles),
            elevations=tuple(elevation for _, elevation in angles),
            distance=distance,
            field_of_view=_number(name, given, "fov", _default_field_of_view(distance, projection)),
            projection=projection,
            image_size=image_size,
        )
    except ValidationError as error:
        problems = [
            ": ".join([*map(str, problem["loc"]), problem["msg"].removeprefix("Value error, ")])
            for problem in error.errors()
        ]
        raise AskedWrongly(f"Camera rig {name!r}: {'; '.join(problems)}.") from error


_COMMON_KEYS: Final = ("distance", "fov", "projection")


def _parameters(name: str, text: str, known: tuple[str, ...]) -> Parameters:
    """What stands after the question mark."""
    given: Parameters = {}
    for item in text.split("&") if text or name.endswith("?") else []:
        key, equals, value = item.partition("=")
        if key not in known:
            raise AskedWrongly(f"Camera rig {name!r} has no parameter {key!r}. It takes {', '.join(known)}.")
        if not equals or not value:
            raise AskedWrongly(f"Camera rig {name!r}: {key!r} has no value; write {key}=...")
        if key in given:
            raise AskedWrongly(f"Camera rig {name!r} gives {key!r} twice.")
        given[key] = value
    return given


def _number(name: str, given: Parameters, key: str, default: float) -> float:
    return default if key not in given else _finite(name, key, given[key])


def _finite(name: str, key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise AskedWrongly(f"Camera rig {name!r}: {key} takes numbers, and {text!r} is none.")
    return value


def _ring(name: str, given: Parameters) -> Angles:
    """Evenly around, once at each elevation; elevation outside, azimuth inside."""
    if not (given["views"].isdecimal() and int(given["views"]) > 0):
        raise AskedWrongly(f"Camera rig {name!r}: views is a whole number above zero, not {given['views']!r}.")
    around = int(given["views"])
    elevations = [_finite(name, "elevations", text) for text in given.get("elevations", "30").split(",")]
    return [(360.0 / around * index, elevation) for elevation in elevations for index in range(around)]


def _angles(name: str, given: Parameters) -> Angles:
    """Each camera for itself."""
    angles = []
    for camera in given["at"].split(","):
        azimuth, slash, elevation = camera.partition("/")
        if not slash:
            raise AskedWrongly(f"Camera rig {name!r}: {camera!r} is no azimuth/elevation in degrees, as in 45/-10.")
        angles.append((_finite(name, "at", azimuth), _finite(name, "at", elevation)))
    return angles


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


def _axes3() -> Angles:
    """From +X, from +Y, from +Z: the directions of I2P-MAE's three depth images."""
    return [(90.0, 0.0), (0.0, 90.0), (0.0, 0.0)]


@dataclass(frozen=True)
class _Kind:
    """What a rig's word may say."""

    angles: Callable[[str, Parameters], Angles]
    example: str
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    projection: Projection = "perspective"


def _fixed(angles: Callable[[], Angles], projection: Projection = "perspective") -> _Kind:
    """A rig whose cameras stand where its name says."""
    name = angles.__name__.removeprefix("_")
    return _Kind(lambda *_: angles(), f"{name}?distance=2.5&fov=50", projection=projection)


_KINDS: Final = {
    "azimuth12": _fixed(_azimuth12),
    "ring16": _fixed(_ring16),
    "dodecahedron20": _fixed(_dodecahedron20),
    "simple6": _fixed(_simple6),
    "axes3": _fixed(_axes3, "orthographic"),
    "ring": _Kind(_ring, "ring?views=8&elevations=30,-30", required=("views",), optional=("elevations",)),
    "angles": _Kind(_angles, "angles?at=0/30,45/-10", required=("at",)),
}
RIG_NAMES: Final = tuple(name for name, kind in _KINDS.items() if not kind.required)
"""Rigs that are whole by their name."""
