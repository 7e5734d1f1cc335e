"""Surface samples, uniform by area, in an order whose every beginning is itself a good sample."""

import hashlib
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float, Float32, Float64, Int64

OVERSAMPLING: Final = 4
"""Candidates drawn for each point kept: farthest-point order then covers the surface evenly, for a few milliseconds."""


@dataclass(frozen=True)
class SurfaceSamples:
    """Points on a mesh, and where on it each one lies."""

    points: Float32[np.ndarray, "p 3"]
    normals: Float32[np.ndarray, "p 3"]
    faces: Int64[np.ndarray, " p"]
    barycentric: Float32[np.ndarray, "p 3"]  # weights of the face's three vertices

    def __getitem__(self, order: Int64[np.ndarray, " n"]) -> "SurfaceSamples":
        """The same samples in another order, or a part of them."""
        return SurfaceSamples(self.points[order], self.normals[order], self.faces[order], self.barycentric[order])


def sample_surface(vertices: Float[np.ndarray, "n 3"], faces: np.ndarray, num_points: int, seed: int) -> SurfaceSamples:
    """Samples in farthest-point order. The same arguments give the same samples, on any machine that rounds alike."""
    candidates = uniform_by_area(vertices, faces, OVERSAMPLING * num_points, seed)
    return candidates[farthest_point_order(candidates.points, num_points)]


def uniform_by_area(
    vertices: Float[np.ndarray, "n 3"], faces: np.ndarray, num_points: int, seed: int
) -> SurfaceSamples:
    """Independent samples, each equally likely anywhere on the surface. ValueError for a mesh without area."""
    if len(faces) == 0:
        raise ValueError("the mesh has no area")
    reached = np.empty(len(faces))
    for start in range(0, len(faces), _FACES_AT_ONCE):
        _, normals = _corners_and_normals(vertices, faces[start : start + _FACES_AT_ONCE])
        reached[start : start + _FACES_AT_ONCE] = _lengths(normals)
    np.cumsum(reached, out=reached)
    if not 0 < reached[-1] < np.inf:
        raise ValueError("the mesh has no area")
    random = np.random.default_rng(seed)
    # side="right" steps over faces without area, whose sum equals their predecessor's
    chosen = np.searchsorted(reached, random.random(num_points) * reached[-1], side="right")
    chosen = np.minimum(chosen, np.searchsorted(reached, reached[-1]))  # a product that rounded up to the whole
    along = random.random((num_points, 2))
    # the half of the unit square beyond the diagonal folds back onto the triangle
    along = np.where(along.sum(axis=1, keepdims=True) > 1, 1 - along, along)
    barycentric = np.column_stack([1 - along.sum(axis=1), along])
    corners, normals = _corners_and_normals(vertices, faces[chosen])
    points = sum(barycentric[:, corner, None] * corners[corner].T for corner in range(3))
    return SurfaceSamples(
        np.asarray(points, np.float32),
        (normals / _lengths(normals)).T.astype(np.float32, order="C"),
        chosen,
        barycentric.astype(np.float32),
    )


_FACES_AT_ONCE: Final = 65_536
"""Bounds the memory beside the mesh itself, of whatever size, to some megabytes and eight bytes a face."""


def _corners_and_normals(
    vertices: Float[np.ndarray, "n 3"], faces: np.ndarray
) -> tuple[list[Float64[np.ndarray, "3 f"]], Float64[np.ndarray, "3 f"]]:
    """First, second and third corners, and normals as long as twice the face's area; one axis at a time, for speed."""
    # float64: cross products of a small part's edges vanish in float32 while the part is plainly there
    corners = [vertices.take(faces[:, corner], axis=0).astype(np.float64).T for corner in range(3)]
    (ax, ay, az), (bx, by, bz) = corners[1] - corners[0], corners[2] - corners[0]
    return corners, np.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx])


def _lengths(vectors: Float64[np.ndarray, "3 n"]) -> Float64[np.ndarray, " n"]:
    x, y, z = vectors
    lengths: Float64[np.ndarray, " n"] = np.sqrt(x * x + y * y + z * z)
    return lengths


def farthest_point_order(points: Float32[np.ndarray, "n 3"], num_points: int) -> Int64[np.ndarray, " p"]:
    """Indices of `num_points` of the points, each next one far from all before it."""
    import fpsample

    # The bucket sampler ignores its start index but is deterministic and as good a cover as the exact order.
    # Never fpsample's NPDU samplers: on unordered points they cover worse than a random choice.
    # Tree heights from timing 8,192 to 100,000 points; 2 ** height must stay below their number.
    height = int(np.clip(np.log2(max(len(points), 2)) - 8, 1, 7))
    order = fpsample.bucket_fps_kdline_sampling(np.ascontiguousarray(points), num_points, height, start_idx=0)
    return np.asarray(order, dtype=np.int64)


def seed_of(shape_id: str) -> int:
    """A seed that belongs to the shape wherever it stands in whichever list."""
    return int.from_bytes(hashlib.sha256(shape_id.encode()).digest()[:8], "little")
