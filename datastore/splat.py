"""Views, depth and visibility of a shape that is known by points alone: an estimate, where `render.py` is exact.

Every point becomes a small disc in its tangent plane, large enough to touch its neighbours. In each pixel the nearest
disc wins; discs that lie on it there are averaged with it by their distance from the ray, which makes one surface of
them. Images are drawn twice as fine and reduced, so that edges are smooth; a pixel's depth is the mean over its hit
quarters. Pixels are exact, and visibility is that of the stored points among themselves (`hidden_points.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64, UInt8, UInt16

from datastore.cameras import CameraRig, camera_frames
from datastore.hidden_points import visibility_of_points
from datastore.render import BACKGROUND, NEUTRAL_GREY, Rendering, encode_depth, pixels_of, shade
from datastore.shape import PointCloud

_FINER: Final = 2
_NEIGHBOURS: Final = 10  # whose plane is taken for a point's tangent plane
_SPACING_NEIGHBOUR: Final = 5
"""A disc reaches to this nearest neighbour: of points spread by chance, fewer than one place in a hundred stays open."""

_LARGEST_DISC: Final = 2.5  # times the median radius: a stray point is no wall
_MIDDLE: Final = 0.6  # of a disc's radius
_SMALLEST_DISC: Final = 0.75  # fine pixels: smaller ones would fall between
_SAME_SURFACE: Final = 0.5  # radii behind the nearest disc, within which discs are averaged
_FRAGMENTS_AT_ONCE: Final = 100_000  # what stays in a core's cache; bounds memory, whatever the cloud


def render_cloud(cloud: PointCloud, chosen: Int64[np.ndarray, " p"], rig: CameraRig) -> Rendering:
    """All that is rendered of a cloud inside the unit ball. Visibility and pixels are of the chosen points.

    Any cloud with a point in it is drawn, be it a single one, or all in a line or in one place.
    """
    points = cloud.points[chosen]
    views, depth = _images(cloud, rig)
    return Rendering(views, depth, visibility_of_points(points, rig), pixels_of(points, rig))


@dataclass(frozen=True)
class _Discs:
    """A disc for each point: where, how it lies, how large, and its colour."""

    centres: Float32[np.ndarray, "n 3"]
    normals: Float32[np.ndarray, "n 3"]
    radii: Float32[np.ndarray, " n"]
    colours: Float32[np.ndarray, "n 3"] | None

    def __getitem__(self, chosen: np.ndarray) -> "_Discs":
        colours = None if self.colours is None else self.colours[chosen]
        return _Discs(self.centres[chosen], self.normals[chosen], self.radii[chosen], colours)


def _images(cloud: PointCloud, rig: CameraRig) -> tuple[UInt8[np.ndarray, "v h w 3"], UInt16[np.ndarray, "v h w"]]:
    """Shaded images and depth."""
    discs = _discs(cloud)
    fine = rig.model_copy(update={"image_size": _FINER * rig.image_size})
    positions, rotations = camera_frames(rig)
    views, depths = [], []
    for position, rotation in zip(positions, rotations, strict=True):
        turned = _Discs(
            ((discs.centres - position) @ rotation.T).astype(np.float32),
            (discs.normals @ rotation.T).astype(np.float32),
            discs.radii,
            discs.colours,
        )
        colours, depth = _draw(turned, fine)
        views.append(_reduced(colours).astype(np.uint8))
        depths.append(_reduced_depth(depth))
    return np.stack(views), encode_depth(np.stack(depths), rig)


def _discs(cloud: PointCloud) -> _Discs:
    """Normals from the cloud or from the planes through neighbours, and radii from how far those are."""
    from scipy.spatial import cKDTree

    points = cloud.points.astype(np.float32)
    places = np.unique(points, axis=0)  # points in one place would make each other's discs vanish
    count = min(_NEIGHBOURS, len(places))
    tree = cKDTree(places)
    distances, neighbours = tree.query(points, k=np.arange(1, count + 1))
    radii = distances[:, min(_SPACING_NEIGHBOUR, count - 1)].astype(np.float32)
    radii = np.minimum(radii, _LARGEST_DISC * np.median(radii))
    normals = _plane_normals(places, neighbours) if cloud.normals is None else cloud.normals
    lengths = np.linalg.norm(normals, axis=1, keepdims=True)
    return _Discs(
        points,
        (normals / np.where(lengths > 0, lengths, 1)).astype(np.float32),
        radii,
        None if cloud.colours is None else cloud.colours.astype(np.float32),
    )


def _plane_normals(points: Float32[np.ndarray, "n 3"], groups: Int64[np.ndarray, "m k"]) -> Float32[np.ndarray, "m 3"]:
    """Normal of the plane that fits each group of points best, to either side."""
    normals = np.empty((len(groups), 3), dtype=np.float32)
    step = 65_536  # bounds memory, whatever the cloud
    for start in range(0, len(groups), step):
        around = points[groups[start : start + step]]
        around -= around.mean(axis=1, keepdims=True)
        _, axes = np.linalg.eigh(np.einsum("mki,mkj->mij", around, around))
        normals[start : start + step] = axes[..., 0]
    return normals


def _draw(discs: _Discs, rig: CameraRig) -> tuple[Float32[np.ndarray, "h w 3"], Float32[np.ndarray, "h w"]]:
    """Colours and depth of one view at the fine size; the discs are in camera axes."""
    size = rig.image_size
    nearest = _nearest(discs, rig)
    of_disc, pixels, weight = _in_front(discs, rig, nearest)
    weights = np.bincount(pixels, weight, size * size)
    # normals point to either side; before they can be averaged they must all face the camera
    looking = discs.centres if rig.projection == "perspective" else np.array([[0, 0, 1]], dtype=np.float32)
    away = (discs.normals * looking).sum(axis=1) > 0
    facing = np.where(away[:, None], -discs.normals, discs.normals)
    normals = _sums(facing, of_disc, pixels, weight, size * size)

    hit = np.flatnonzero(weights)
    if discs.colours is None:
        base = np.full((1, 3), NEUTRAL_GREY)
    else:
        base = (_sums(discs.colours, of_disc, pixels, weight, size * size)[:, hit] / weights[hit]).T
    across = ((np.stack([hit % size, hit // size]) - (size - 1) / 2) / rig.focal_length).astype(np.float32)
    if rig.projection == "orthographic":
        across[:] = 0
    image = np.full((size * size, 3), BACKGROUND, dtype=np.float32)
    image[hit] = base * shade(normals[:, hit].astype(np.float32), *across)[:, None]
    return image.reshape(size, size, 3), nearest.reshape(size, size)


def _in_front(
    discs: _Discs, rig: CameraRig, nearest: Float32[np.ndarray, " hw"]
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"], Float32[np.ndarray, " n"]]:
    """Discs and pixels that belong together: where the disc lies on the surface that is seen there; and the weight."""
    found = []
    for of_disc, pixels, depth, weight, _ in _fragments(discs, rig):
        behind = np.abs(depth - nearest.take(pixels))
        front = np.flatnonzero(behind <= _SAME_SURFACE * discs.radii.take(of_disc) + np.float32(1e-6))
        found.append((of_disc.take(front), pixels.take(front), weight.take(front)))
    of_disc, pixels, weight = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return of_disc, pixels, weight


def _sums(
    values: Float32[np.ndarray, "m 3"],
    of_disc: Int64[np.ndarray, " n"],
    pixels: Int64[np.ndarray, " n"],
    weight: Float32[np.ndarray, " n"],
    num_pixels: int,
) -> Float64[np.ndarray, "3 p"]:
    """In each pixel, the discs' values times their weights."""
    return np.stack([np.bincount(pixels, weight * column.take(of_disc), num_pixels) for column in values.T])


def _nearest(discs: _Discs, rig: CameraRig) -> Float32[np.ndarray, " hw"]:
    """Depth of the surface in each pixel of one view, infinity where there is none.

    It is where discs have their middles and in gaps between those, which whole discs close: where they reach farther,
    they would stand out beyond every edge of the shape.
    """
    from scipy.ndimage import maximum_filter, minimum_filter

    size = rig.image_size
    of_middles, of_all = np.full((2, size * size), np.inf, dtype=np.float32)
    for _, pixels, depth, _, is_middle in _fragments(discs, rig):
        np.minimum.at(of_all, pixels, depth)
        np.minimum.at(of_middles, pixels[is_middle], depth[is_middle])
    radius = float(np.median(discs.radii))
    gap = {
        "size": 1 + 2 * int(np.ceil(1.5 * radius * rig.focal_length / rig.distance)),
        "mode": "constant",
        "cval": np.inf,
    }
    without_gaps = maximum_filter(minimum_filter(of_middles.reshape(size, size), **gap), **gap).reshape(-1)
    nearest: Float32[np.ndarray, " hw"] = np.where(of_all >= without_gaps - radius, of_all, of_middles)
    return nearest


Fragments = tuple[
    Int64[np.ndarray, " n"],
    Int64[np.ndarray, " n"],
    Float32[np.ndarray, " n"],
    Float32[np.ndarray, " n"],
    Bool[np.ndarray, " n"],
]
"""Disc, pixel, depth there, weight (1 in a disc's middle and towards 0 at its rim), and whether it is of the middle."""


def _fragments(discs: _Discs, rig: CameraRig) -> Iterator[Fragments]:
    """What each disc covers, some discs at a time."""
    size, centre = rig.image_size, np.float32((rig.image_size - 1) / 2)
    focal_length, is_perspective = np.float32(rig.focal_length), rig.projection == "perspective"
    parallel = np.zeros((1, 1), dtype=np.float32)
    x, y, z = discs.centres.T
    scale = focal_length / (z if is_perspective else np.full_like(z, rig.distance))  # fine pixels per ball radius
    columns, rows = scale * x + centre, scale * y + centre
    middle_columns, middle_rows = np.rint(columns).astype(np.int64), np.rint(rows).astype(np.int64)
    radii = np.maximum(discs.radii, np.float32(_SMALLEST_DISC) / scale)
    reach = np.ceil(radii * scale * 1.1).astype(np.int64)  # the near half of a disc looks larger, by perspective
    for reached in np.unique(reach):
        of_this_size = np.flatnonzero(reach == reached)
        steps = np.arange(-reached, reached + 1)
        down, right = (offsets.reshape(-1) for offsets in np.meshgrid(steps, steps, indexing="ij"))
        at_once = max(1, _FRAGMENTS_AT_ONCE // len(down))
        for start in range(0, len(of_this_size), at_once):
            chosen = of_this_size[start : start + at_once]
            column, row = middle_columns[chosen, None] + right, middle_rows[chosen, None] + down
            across = (column - columns[chosen, None]).astype(np.float32)
            along = (row - rows[chosen, None]).astype(np.float32)
            step_x = (column - centre).astype(np.float32) / focal_length if is_perspective else parallel
            step_y = (row - centre).astype(np.float32) / focal_length if is_perspective else parallel
            ahead, squared = _where_rays_meet(
                discs.normals[chosen],
                radii[chosen],
                across / scale[chosen, None],
                along / scale[chosen, None],
                step_x,
                step_y,
            )
            squared /= np.square(radii[chosen, None])
            # a disc seen edge-on is a dot at least: it would otherwise vanish between the rays
            dot = across * across + along * along < _SMALLEST_DISC**2
            inside = (squared < 1) | dot
            inside &= (column >= 0) & (column < size) & (row >= 0) & (row < size)
            found = np.flatnonzero(inside)
            share = squared.take(found)
            disc = chosen.take(found // len(down))
            yield (
                disc,
                (row * size + column).take(found),
                z.take(disc) + ahead.take(found),
                np.square(np.maximum(1 - share, 0)) + np.float32(1e-4),
                dot.take(found) | (share < _MIDDLE**2),
            )


def _where_rays_meet(
    normals: Float32[np.ndarray, "n 3"],
    radii: Float32[np.ndarray, " n"],
    across: Float32[np.ndarray, "n k"],
    along: Float32[np.ndarray, "n k"],
    step_x: Float32[np.ndarray, "#n #k"],
    step_y: Float32[np.ndarray, "#n #k"],
) -> tuple[Float32[np.ndarray, "n k"], Float32[np.ndarray, "n k"]]:
    """How far behind each disc's centre rays cross its plane, and the squared distance from the centre there.

    At the depth of the centre a ray lies (across, along) from it, and moves on by (step_x, step_y) for each step ahead.
    """
    nx, ny, nz = (normals[:, axis, None] for axis in range(3))
    slope = nx * step_x + ny * step_y + nz
    slope = np.where(np.abs(slope) < _LEAST_SLOPE, _LEAST_SLOPE, slope)  # of a disc seen edge-on
    ahead = np.clip(-(nx * across + ny * along) / slope, -radii[:, None], radii[:, None])
    squared = np.square(across + ahead * step_x) + np.square(along + ahead * step_y) + np.square(ahead)
    return ahead, squared


_LEAST_SLOPE: Final = np.float32(1e-3)


def _reduced(fine: Float32[np.ndarray, "fh fw 3"]) -> Float32[np.ndarray, "h w 3"]:
    height, width = (side // _FINER for side in fine.shape[:2])
    means: Float32[np.ndarray, "h w 3"] = fine.reshape(height, _FINER, width, _FINER, 3).mean(axis=(1, 3)) + 0.5
    return means


def _reduced_depth(fine: Float32[np.ndarray, "fh fw"]) -> Float32[np.ndarray, "h w"]:
    """Mean over what was hit, infinity where nothing was: a pixel has depth exactly if it shows something."""
    quarters = fine.reshape(fine.shape[0] // _FINER, _FINER, fine.shape[1] // _FINER, _FINER)
    hit: Bool[np.ndarray, "h 2 w 2"] = np.isfinite(quarters)
    count = hit.sum(axis=(1, 3))
    total = np.where(hit, quarters, 0).sum(axis=(1, 3))
    return np.where(count > 0, total / np.maximum(count, 1), np.inf).astype(np.float32)
