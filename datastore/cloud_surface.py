"""A surface through the points of a cloud, as triangles that can be drawn.

Around every point, in its tangent plane, lies a fan of triangles to those neighbours with which it shares a circle that
holds no other: its part of a Delaunay triangulation. The fans of all points together go through the points and end where
they end. Where the fans of neighbours differ, they overlap; what they make can be looked at, not walked on. Light
changes smoothly over it, between the points' normals.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Bool, Float, Float32, Int64

from datastore.mesh import Mesh
from datastore.shape import PointCloud

_SPACING_NEIGHBOUR: Final = 5
"""The distance to this nearest neighbour is called spacing here: 1.3 times the side of the square that a point has to
itself, of points spread by chance."""

_LONGEST: Final = 2.5  # median spacings: a stray point is tied to nothing
_LARGEST_HOLE: Final = 2.0
"""Spacings: radius of the largest circle without a point that still counts as surface. Of 10,000 points spread by chance
the largest is smaller."""

_PLANE_NEIGHBOURS: Final = 12  # whose plane is taken for a point's tangent plane
_FLAT: Final = 0.25
"""Of the two smaller variances, above which the plane is that of all neighbours: a plate no thicker than its points'
spacing is then not taken for the gap between its two sides."""

_FAN_NEIGHBOURS: Final = 16  # enough for seven fans in ten
_MOST_NEIGHBOURS: Final = 32  # for the others, at edges and beside holes
_LEAST_LEVEL: Final = 0.1  # share of the way to a neighbour that lies in the tangent plane, if they are of one surface

_SMALLEST: Final = 1.25  # pixels from a spindle's middle to a corner: it never falls between rays
_ROD: Final = 0.1  # of the largest variance, below which both others are
_ROD_HALF_LENGTH: Final = 0.75  # spacings
_ROD_LONGEST: Final = 0.1  # ball radii
_SHEET_HALF_WIDTH: Final = 0.5  # spacings
_DOT: Final = 0.6  # of the way to the nearest point: dots in a row touch
_DOT_LARGEST: Final = 0.04  # ball radii

_AT_ONCE: Final = 512  # points: bounds memory, and stays in a core's cache


@dataclass(frozen=True)
class CloudSurface:
    """Triangles, and the normals at the three corners of each, which point to one side of it."""

    mesh: Mesh
    corner_normals: Float32[np.ndarray, "m 3 3"]


def surface_through(cloud: PointCloud, pixel: float) -> CloudSurface:
    """Fans around all points, and around those for which fans are not enough something that is no smaller than a pixel.

    The order of the points changes nothing.
    """
    from scipy.spatial import cKDTree

    cloud = _distinct(cloud)
    points, colours = cloud.points, cloud.colours
    count = min(1 + _MOST_NEIGHBOURS, len(points))
    distances, nearest = cKDTree(points).query(points, k=np.arange(1, count + 1))  # each point is its own nearest
    spread = _spread(points, nearest[:, :_PLANE_NEIGHBOURS])
    spacing = _spacing(distances, nearest)
    estimated = _plane_normals(points, nearest, spread)
    normals = estimated if cloud.normals is None else _unit(cloud.normals, otherwise=estimated)

    fans = _fans(points, estimated, nearest[:, 1:], _LARGEST_HOLE * spacing)
    of_point, centres, half_axes = _spindles(points, fans, spread, spacing, distances[:, min(1, count - 1)], pixel)
    corners = centres[:, None] + np.concatenate([half_axes, -half_axes], axis=1)
    # the gradient of the ellipsoid around a spindle: between corners it is as linear as their mean, so light is smooth
    gradients = half_axes / np.square(half_axes).sum(axis=2, keepdims=True)
    first = len(points) + 6 * np.arange(len(of_point))[:, None, None]

    vertices = np.concatenate([points, corners.reshape(-1, 3)])
    normals = np.concatenate([normals, np.concatenate([gradients, -gradients], axis=1).reshape(-1, 3)])
    faces = np.concatenate([fans, (first + _OCTAHEDRON_FACES).reshape(-1, 3)])
    if colours is not None:
        colours = np.concatenate([colours, colours[np.repeat(of_point, 6)]])
    mesh = Mesh(vertices, faces.astype(np.int32), vertex_colours=colours)
    return CloudSurface(mesh, _to_one_side(normals[faces]))


def _spindles(
    points: Float32[np.ndarray, "n 3"],
    fans: Int64[np.ndarray, "m 3"],
    spread: "_Spread",
    spacing: Float32[np.ndarray, " n"],
    to_next: Float[np.ndarray, " n"],
    pixel: float,
) -> tuple[Int64[np.ndarray, " k"], Float32[np.ndarray, "k 3"], Float32[np.ndarray, "k 3 3"]]:
    """Octahedra where rays would pass through or beside fans: of which points, and their middles and half axes.

    Rods thinner than their points' spacing have long ones on their axis, flat clouds have flat ones, since a sheet
    vanishes where a camera sees its edge, and points that are part of no fan have small round ones.
    """
    is_alone = np.ones(len(points), dtype=bool)
    is_alone[fans] = False
    is_rod = spread.variances[:, 1] < _ROD * spread.variances[:, 2]
    is_sheet = np.full(len(points), _is_flat(points, pixel)) & ~is_alone & ~is_rod
    lengths = np.repeat(np.minimum(_DOT * to_next, _DOT_LARGEST)[:, None], 3, axis=1)
    lengths[is_sheet] = spacing[is_sheet, None] * np.array([0, _SHEET_HALF_WIDTH, _SHEET_HALF_WIDTH])
    lengths[is_rod, :2] = np.sqrt(np.maximum(spread.variances[is_rod, :2].sum(axis=1, keepdims=True), 0))
    lengths[is_rod, 2] = np.minimum(_ROD_HALF_LENGTH * spacing[is_rod], _ROD_LONGEST)
    lengths = np.maximum(lengths, _SMALLEST * pixel).astype(np.float32)

    centres = points.copy()
    axis = spread.axes[is_rod, :, 2]
    offset = points[is_rod] - spread.middles[is_rod]
    centres[is_rod] = spread.middles[is_rod] + (offset * axis).sum(axis=1, keepdims=True) * axis
    needed = np.flatnonzero(is_alone | is_rod | is_sheet)
    half_axes = lengths[needed, :, None] * spread.axes[needed].transpose(0, 2, 1)
    return needed, centres[needed], half_axes


_OCTAHEDRON_FACES: Final = np.array([[x, y, z] for x in (0, 3) for y in (1, 4) for z in (2, 5)])


def _distinct(cloud: PointCloud) -> PointCloud:
    """The first point in each place, in an order of their own, so that the order of the points changes nothing."""
    points, first = np.unique(cloud.points.astype(np.float32), axis=0, return_index=True)
    normals = None if cloud.normals is None else cloud.normals[first]
    return PointCloud(points, normals, None if cloud.colours is None else cloud.colours[first])


def _spacing(distances: Float[np.ndarray, "n k"], nearest: Int64[np.ndarray, "n k"]) -> Float32[np.ndarray, " n"]:
    """How far apart points are around each point."""
    own = distances[:, min(_SPACING_NEIGHBOUR, distances.shape[1] - 1)]
    own = np.minimum(own, _LONGEST * np.median(own))
    # the mean over neighbours: a crowd beside a hole says little about how large the hole may be
    spacing: Float32[np.ndarray, " n"] = own[nearest[:, :_PLANE_NEIGHBOURS]].mean(axis=1).astype(np.float32)
    return spacing


def _is_flat(points: Float32[np.ndarray, "n 3"], thickness: float) -> bool:
    centred = points - points.mean(axis=0)
    across = np.linalg.eigh(centred.T @ centred)[1][:, 0]
    return float(np.ptp(centred @ across)) < thickness


@dataclass(frozen=True)
class _Spread:
    """How groups of points lie: where, how far in each direction, and those directions as columns, the least first."""

    middles: Float32[np.ndarray, "m 3"]
    variances: Float32[np.ndarray, "m 3"]
    axes: Float32[np.ndarray, "m 3 3"]


def _spread(points: Float32[np.ndarray, "n 3"], groups: Int64[np.ndarray, "m k"]) -> _Spread:
    middles = np.empty((len(groups), 3), dtype=np.float32)
    moments = np.empty((len(groups), 3, 3), dtype=np.float32)
    for start in range(0, len(groups), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        around = points[groups[some]]
        middles[some] = around.mean(axis=1)
        around -= middles[some, None]
        moments[some] = around.transpose(0, 2, 1) @ around / groups.shape[1]
    return _Spread(middles, *np.linalg.eigh(moments))


def _plane_normals(
    points: Float32[np.ndarray, "n 3"], nearest: Int64[np.ndarray, "n k"], spread: _Spread
) -> Float32[np.ndarray, "n 3"]:
    """Normals of the planes that fit the points' neighbourhoods best, to either side."""
    normals = spread.axes[..., 0].copy()
    unclear = np.flatnonzero(spread.variances[:, 0] > _FLAT * spread.variances[:, 1])
    normals[unclear] = _spread(points, nearest[unclear]).axes[..., 0]
    # the mean over neighbours, of lines rather than directions: those have no two sides
    lines = np.zeros((len(points), 3, 3), dtype=np.float32)
    for neighbour in nearest[:, :_PLANE_NEIGHBOURS].T:
        towards = normals[neighbour]
        lines += towards[:, :, None] * towards[:, None, :]
    smooth: Float32[np.ndarray, "n 3"] = np.linalg.eigh(lines)[1][..., 2]
    return smooth


def _unit(normals: Float32[np.ndarray, "n 3"], otherwise: Float32[np.ndarray, "n 3"]) -> Float32[np.ndarray, "n 3"]:
    """Normals of length one; the others where they have no length."""
    lengths = np.linalg.norm(normals, axis=1, keepdims=True)
    return np.where(lengths > 0, normals / np.where(lengths > 0, lengths, 1), otherwise).astype(np.float32)


def _to_one_side(corner_normals: Float32[np.ndarray, "m 3 3"]) -> Float32[np.ndarray, "m 3 3"]:
    first = corner_normals[:, :1]
    opposed = (corner_normals * first).sum(axis=2, keepdims=True) < 0
    return np.where(opposed, -corner_normals, corner_normals)


def _fans(
    points: Float32[np.ndarray, "n 3"],
    normals: Float32[np.ndarray, "n 3"],
    neighbours: Int64[np.ndarray, "n k"],
    largest_hole: Float32[np.ndarray, " n"],
) -> Int64[np.ndarray, "m 3"]:
    """The triangles of all fans, each once."""
    count = len(points)
    found = [np.empty((0, 3), dtype=np.int64)]
    is_done = np.full(count, neighbours.shape[1] < 2)
    for num_neighbours in (_FAN_NEIGHBOURS, _MOST_NEIGHBOURS):
        middles = np.flatnonzero(~is_done)
        for start in range(0, len(middles), _AT_ONCE):
            some = middles[start : start + _AT_ONCE]
            around = neighbours[some, :num_neighbours]
            x, y, on_surface = _in_tangent_plane(points[some], normals[some], points[around])
            following, has_triangle, is_certain = _fan(x, y, on_surface, largest_hole[some])
            is_done[some] = is_certain | (num_neighbours >= neighbours.shape[1])
            fan, first = np.nonzero(has_triangle & is_done[some, None])
            found.append(np.stack([some[fan], around[fan, first], around[fan, following[fan, first]]], axis=1))
    triangles = np.sort(np.concatenate(found), axis=1)
    keys = np.unique((triangles[:, 0] * count + triangles[:, 1]) * count + triangles[:, 2])
    return np.stack([keys // count**2, keys // count % count, keys % count], axis=1)


def _in_tangent_plane(
    middles: Float32[np.ndarray, "n 3"], normals: Float32[np.ndarray, "n 3"], around: Float32[np.ndarray, "n k 3"]
) -> tuple[Float32[np.ndarray, "n k"], Float32[np.ndarray, "n k"], Bool[np.ndarray, "n k"]]:
    """Where each neighbour lies in the tangent plane, at its true distance; and whether it lies on the surface there.

    What lies straight above or below is of another surface, the far side of a thin plate for example.
    """
    offsets = around - middles[:, None]
    axis = np.eye(3, dtype=np.float32)[np.abs(normals).argmin(axis=1)]
    right = np.cross(normals, axis)
    right /= np.linalg.norm(right, axis=1, keepdims=True)
    plane = np.stack([right, np.cross(normals, right)], axis=2)
    x, y = np.moveaxis(offsets @ plane, 2, 0)
    distance, level = np.sqrt((offsets * offsets).sum(axis=2)), np.hypot(x, y)
    on_surface = level > _LEAST_LEVEL * distance
    longer = distance / np.where(on_surface, level, 1)
    return x * longer, y * longer, on_surface


def _fan(
    x: Float32[np.ndarray, "n k"],
    y: Float32[np.ndarray, "n k"],
    on_surface: Bool[np.ndarray, "n k"],
    largest_hole: Float32[np.ndarray, " n"],
) -> tuple[Int64[np.ndarray, "n k"], Bool[np.ndarray, "n k"], Bool[np.ndarray, " n"]]:
    """For each neighbour the one that follows it around the origin; whether the two make a triangle of the origin's fan;
    and of which fans it is certain that more neighbours would not change them.

    The places that are nearer to the origin than to any neighbour form a cell, whose sides lie on the bisectors towards
    neighbours. On that towards q, of the places q / 2 + t q', with q' being q turned by a right angle, those are not
    nearer to another neighbour r which have t (q' · r) <= r · (r - q) / 2. Where the side of q ends, that of the one
    that follows begins. That corner is the middle of a circle through both and the origin, with no neighbour inside.
    """
    squared = x * x + y * y
    turn = x[:, :, None] * y[:, None, :] - y[:, :, None] * x[:, None, :]
    room = squared[:, None, :] - x[:, :, None] * x[:, None, :] - y[:, :, None] * y[:, None, :]
    tiny = _ROUNDING * squared[:, :, None]
    others = on_surface[:, None, :]
    before, after = (turn < -tiny) & others, (turn > tiny) & others
    behind = ((room < -tiny) & others & ~before & ~after).any(axis=2)  # in line with a nearer one
    with np.errstate(divide="ignore", invalid="ignore"):  # what is in line is left out below
        crossings = room / (2 * turn)
    start = np.where(before, crossings, -np.inf).max(axis=2)
    crossings[~after] = np.inf
    following = crossings.argmin(axis=2)
    end = np.take_along_axis(crossings, following[..., None], axis=2)[..., 0]
    is_side = on_surface & ~behind & (start <= end)
    radius = np.sqrt(squared * (np.float32(0.25) + np.square(np.minimum(end, _FAR))))
    # a side that has almost a length counts: of four points that lie almost on one circle, as on every grid, the fans of
    # all must not leave out the same triangle
    has_triangle = on_surface & ~behind & (start <= end + _ALMOST) & (radius < largest_hole[:, None])
    farthest = np.sqrt(squared.max(axis=1, keepdims=True))  # which the circles must not reach beyond
    is_certain = is_side.any(axis=1) & ~(is_side & (2 * radius > farthest)).any(axis=1)
    return following, has_triangle, is_certain


_ROUNDING: Final = np.float32(1e-5)
_ALMOST: Final = np.float32(0.3)  # of the way to the neighbour
_FAR: Final = np.float32(1e6)
