"""Closed solids in plain numpy: every one is a single watertight piece whose faces look outward.

One idea makes them all: a loft, a stack of rings with equally many points, closed by a fan of triangles at either end.
Boxes, tubes and turned profiles differ only in where their rings lie. Solids stand on y = 0 around the y axis.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from jaxtyping import Float, Int

Points2 = Float[np.ndarray, "m 2"]
Points3 = Float[np.ndarray, "k 3"]
Place = tuple[float, float, float]
AXES: Final = {"x": 0, "y": 1, "z": 2}


@dataclass(frozen=True)
class Solid:
    """A closed surface; its methods return changed copies."""

    vertices: Float[np.ndarray, "n 3"]
    faces: Int[np.ndarray, "m 3"]

    def moved(self, x: float = 0.0, y: float = 0.0, z: float = 0.0) -> "Solid":
        """The same solid elsewhere."""
        return Solid(self.vertices + np.array([x, y, z]), self.faces)

    def turned(self, axis: str, degrees: float) -> "Solid":
        """The same solid, rotated about an axis through the origin, counter-clockwise seen from the axis' tip."""
        first, second = (AXES[axis] + 1) % 3, (AXES[axis] + 2) % 3
        cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        vertices = self.vertices.copy()
        vertices[:, first] = cosine * self.vertices[:, first] - sine * self.vertices[:, second]
        vertices[:, second] = sine * self.vertices[:, first] + cosine * self.vertices[:, second]
        return Solid(vertices, self.faces)

    def scaled(self, x: float = 1.0, y: float = 1.0, z: float = 1.0) -> "Solid":
        """The same solid, stretched; factors are positive, since a mirror would turn its faces inward."""
        return Solid(self.vertices * (x, y, z), self.faces)

    def mirrored(self, axis: str) -> "Solid":
        """The solid's image behind a mirror at the origin, its faces still outward."""
        vertices = self.vertices.copy()
        vertices[:, AXES[axis]] *= -1
        return Solid(vertices, self.faces[:, ::-1])

    def tapered(self, x: float = 1.0, z: float = 1.0) -> "Solid":
        """The solid with its top `x` and `z` times as wide as its foot."""
        low, high = self.vertices[:, 1].min(), self.vertices[:, 1].max()
        height = ((self.vertices[:, 1] - low) / (high - low))[:, None]
        return Solid(self.vertices * (1 + height * (np.array([x, 1.0, z]) - 1)), self.faces)

    def leaning(self, x: float = 0.0, z: float = 0.0) -> "Solid":
        """The solid sheared: it goes `x` and `z` sideways for each unit of height."""
        return Solid(self.vertices + self.vertices[:, 1:2] * (x, 0.0, z), self.faces)


def loft(
    rings: Float[np.ndarray, "k m 3"], *, start: Place | None = None, end: Place | None = None, joined: bool = False
) -> Solid:
    """The solid through these rings. The end fans meet in `start` and `end`, by default the end rings' middles;
    a joined loft has no ends, its last ring continues in the first."""
    num_rings, ring_size, _ = rings.shape
    vertices = rings.reshape(-1, 3)
    if not joined:
        first = rings[0].mean(axis=0) if start is None else start
        last = rings[-1].mean(axis=0) if end is None else end
        vertices = np.concatenate([vertices, [first, last]])
    faces = _lattice(num_rings, ring_size, joined)
    # sum of the signed volumes under the faces: callers need not care which way round they list a ring
    inside_out = np.linalg.det(vertices[faces]).sum() < 0
    return Solid(vertices, faces[:, ::-1] if inside_out else faces)


@lru_cache(maxsize=512)
def _lattice(num_rings: int, ring_size: int, joined: bool) -> Int[np.ndarray, "m 3"]:
    corner = np.arange(ring_size)
    following = (corner + 1) % ring_size
    spans = np.arange(num_rings if joined else num_rings - 1)[:, None]
    below, above = spans * ring_size, (spans + 1) % num_rings * ring_size
    quads = np.stack([below + corner, below + following, above + following, above + corner], axis=-1).reshape(-1, 4)
    faces = [quads[:, [0, 1, 2]], quads[:, [0, 2, 3]]]
    if not joined:
        last, start = (num_rings - 1) * ring_size, num_rings * ring_size
        faces.append(np.stack([np.full(ring_size, start), following, corner], axis=-1))
        faces.append(np.stack([np.full(ring_size, start + 1), last + corner, last + following], axis=-1))
    lattice = np.concatenate(faces)
    lattice.setflags(write=False)
    return lattice


def circle(radius: float, sides: int, aspect: float = 1.0) -> Points2:
    """A regular polygon, `aspect` times as long in its second axis. With four sides its edges face the axes."""
    angles = (np.arange(sides) + 0.5) * (2 * np.pi / sides)
    return radius * np.stack([np.cos(angles), aspect * np.sin(angles)], axis=-1)


def rectangle(width: float, depth: float, corner: float = 0.0, steps: int = 1) -> Points2:
    """A rectangle around the origin whose corners are rounded in so many steps; one step is a bevel."""
    if corner <= 0:
        return np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]) * (width / 2, depth / 2)
    quarter = np.linspace(0, np.pi / 2, steps + 1)
    angles = (quarter + np.arange(4)[:, None] * (np.pi / 2)).reshape(-1)
    signs = np.repeat(np.array([[1, 1], [-1, 1], [-1, -1], [1, -1]]), steps + 1, axis=0)
    middles = signs * (width / 2 - corner, depth / 2 - corner)
    return middles + corner * np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def box(width: float, height: float, depth: float, bevel: float | None = None, steps: int = 1) -> Solid:
    """A box standing on y = 0, along x, y, z. All its edges are broken by `bevel`, by default a sixth of the thinnest
    side; more steps round them, as on a cushion."""
    thinnest = min(width, height, depth)
    bevel = thinnest / 6 if bevel is None else min(bevel, 0.48 * thinnest)
    if bevel <= 0:
        return _CUBE.scaled(width, height, depth)
    slope = np.linspace(np.pi / 8, np.pi / 2, steps + 1)  # from nearly flat to upright
    insets = bevel * (1 - np.sin(slope))
    rises = bevel * (np.cos(slope[0]) - np.cos(slope))
    outlines = [rectangle(width - 2 * inset, depth - 2 * inset, bevel - inset, steps) for inset in insets]
    lower = [level(outline, rise) for outline, rise in zip(outlines, rises, strict=True)]
    upper = [level(outline, height - rise) for outline, rise in zip(outlines[::-1], rises[::-1], strict=True)]
    return loft(np.stack(lower + upper))


def level(outline: Points2, height: float) -> Points3:
    """An outline drawn on the horizontal plane at this height: its axes become x and z."""
    return np.stack([outline[:, 0], np.full(len(outline), height), outline[:, 1]], axis=-1)


_CUBE: Final = loft(np.stack([level(rectangle(1.0, 1.0), height) for height in (0.0, 1.0)]))


def prism(outline: Points2, height: float, bevel: float) -> Solid:
    """An outline in x and z, raised by `height`, whose rims draw in. Its middle sees all of the outline."""
    middle = outline.mean(axis=0)
    span = np.abs(outline - middle).max()
    inner = middle + (outline - middle) * (1 - bevel / span)
    return loft(
        np.stack([level(inner, 0.0), level(outline, bevel), level(outline, height - bevel), level(inner, height)])
    )


def lathe(profile: Points2 | Sequence[tuple[float, float]], sides: int = 24, *, joined: bool = False) -> Solid:
    """A profile of (radius, height) pairs turned about the y axis. Radii are positive except at either end, where zero
    makes a tip; a joined profile is a closed line that never touches the axis, and makes a ring."""
    profile = np.asarray(profile, dtype=float)
    start: Place = (0.0, float(profile[0, 1]), 0.0)
    end: Place = (0.0, float(profile[-1, 1]), 0.0)
    walls = profile[profile[:, 0] > 0]
    round_ = circle(1.0, sides)
    rings = np.stack(
        [
            walls[:, :1] * round_[:, 0],
            np.broadcast_to(walls[:, 1:], (len(walls), sides)),
            walls[:, :1] * round_[:, 1],
        ],
        axis=-1,
    )
    return loft(rings, joined=joined) if joined else loft(rings, start=start, end=end)


def cylinder(radius: float, height: float, sides: int = 16) -> Solid:
    """An upright cylinder standing on y = 0."""
    return lathe([(0, 0), (radius, 0), (radius, height), (0, height)], sides)


def ellipsoid(x: float, y: float, z: float, sides: int = 14) -> Solid:
    """An ellipsoid around the origin with these half axes."""
    slope = np.linspace(-np.pi / 2, np.pi / 2, max(5, sides // 2 + 1))
    profile = np.stack([np.cos(slope), np.sin(slope)], axis=-1)
    profile[[0, -1], 0] = 0
    return lathe(profile, sides).scaled(x, y, z)


def sweep(
    path: Points3 | Sequence[Place],
    section: Points2,
    scale: Float[np.ndarray, "..."] | Sequence[float] | float = 1.0,
    *,
    across: Place | None = None,
    joined: bool = False,
) -> Solid:
    """A section carried along a path, `scale` times as large at each of its points (one factor, or one an axis).

    The section's first axis keeps to the direction `across`, by default the normal of the plane that the path lies in;
    a path that leaves its plane far enough to run along that direction needs another."""
    path = np.asarray(path, dtype=float)
    if joined:
        tangents = np.roll(path, -1, axis=0) - np.roll(path, 1, axis=0)
    else:
        steps = np.diff(path, axis=0)
        steps /= np.linalg.norm(steps, axis=1, keepdims=True)
        tangents = np.concatenate([steps[:1], steps[:-1] + steps[1:], steps[-1:]])
    tangents /= np.linalg.norm(tangents, axis=1, keepdims=True)
    sideways = np.asarray(_plane_normal(path) if across is None else across, dtype=float)
    inward = np.cross(tangents, sideways)
    inward /= np.linalg.norm(inward, axis=1, keepdims=True)
    outward = np.cross(inward, tangents)
    factors = np.broadcast_to(np.asarray(scale, dtype=float), (len(path),)) if np.ndim(scale) < 2 else np.asarray(scale)
    factors = np.stack([factors, factors], axis=-1) if factors.ndim == 1 else factors
    shaped = section * factors[:, None]
    rings = path[:, None] + shaped[..., :1] * outward[:, None] + shaped[..., 1:] * inward[:, None]
    return loft(rings, joined=joined)


def _plane_normal(path: Points3) -> Points3:
    """The direction at right angles to a flat path; for a straight one, a level direction beside it."""
    third = len(path) // 3
    normal = np.cross(path[third] - path[0], path[-1 - third] - path[0]) if third else np.zeros(3)
    chord = path[-1] - path[0]
    if np.linalg.norm(normal) > 1e-6 * max(float(chord @ chord), 1e-6):
        return normal
    beside = np.array([-chord[2], 0.0, chord[0]])
    return beside if np.linalg.norm(beside) > 1e-3 * np.linalg.norm(chord) else np.array([1.0, 0.0, 0.0])


def tube(
    path: Points3 | Sequence[Place],
    radius: float,
    sides: int = 10,
    scale: Float[np.ndarray, "..."] | Sequence[float] | float = 1.0,
    *,
    joined: bool = False,
) -> Solid:
    """A round bar along a path, `scale` times as thick at each of its points."""
    return sweep(path, circle(radius, sides), scale, joined=joined)


def post(start: Place, end: Place, radius: float, end_radius: float | None = None, sides: int = 10) -> Solid:
    """A straight bar from one point to another; with four sides it is square."""
    return tube([start, end], radius, sides, (1.0, 1.0 if end_radius is None else end_radius / radius))


def smooth(points: Sequence[Sequence[float]] | Float[np.ndarray, "k d"], steps: int = 4) -> Float[np.ndarray, "n d"]:
    """A smooth curve through the points, with so many steps between two of them (Catmull-Rom)."""
    through = np.asarray(points, dtype=float)
    ends = np.concatenate([2 * through[:1] - through[1:2], through, 2 * through[-1:] - through[-2:-1]])
    before, here, there, after = ends[:-3, None], ends[1:-2, None], ends[2:-1, None], ends[3:, None]
    t = (np.arange(steps) / steps)[:, None]
    curve = here + 0.5 * t * (
        there - before + t * (2 * before - 5 * here + 4 * there - after + t * (3 * (here - there) + after - before))
    )
    return np.concatenate([curve.reshape(-1, through.shape[1]), through[-1:]])


def upright(curve: Points2, z: float = 0.0) -> Points3:
    """A curve in x and y as a path in space, at this depth."""
    return np.column_stack([curve, np.full(len(curve), z)])


def sideways(curve: Points2, x: float) -> Points3:
    """A curve in z and y as a path in space, at this x: `upright` seen from the right."""
    return np.column_stack([np.full(len(curve), x), curve[:, 1], curve[:, 0]])


def arc(radius: float, start_degrees: float, end_degrees: float, steps: int = 12) -> Points2:
    """Points on a circle around the origin, from one angle to another."""
    angles = np.radians(np.linspace(start_degrees, end_degrees, steps + 1))
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=-1)
