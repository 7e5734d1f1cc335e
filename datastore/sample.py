"""Surface samples, uniform by area, in an order whose every beginning is itself a good sample."""

import hashlib
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float, Float32, Int64

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
    # float64: cross products of a small part's edges vanish in float32 while the part is plainly there
    corners = vertices[faces].astype(np.float64)
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    double_areas = np.linalg.norm(normals, axis=1)
    reached = np.cumsum(double_areas)
    if len(faces) == 0 or not 0 < reached[-1] < np.inf:
        raise ValueError("the mesh has no area")
    random = np.random.default_rng(seed)
    # side="right" steps over faces without area, whose sum equals their predecessor's
    chosen = np.searchsorted(reached, random.random(num_points) * reached[-1], side="right")
    chosen = np.minimum(chosen, np.searchsorted(reached, reached[-1]))  # a product that rounded up to the whole
    along = random.random((num_points, 2))
    # the half of the unit square beyond the diagonal folds back onto the triangle
    along = np.where(along.sum(axis=1, keepdims=True) > 1, 1 - along, along)
    barycentric = np.column_stack([1 - along.sum(axis=1), along])
    points = np.einsum("pk,pkc->pc", barycentric, corners[chosen])
    unit_normals = normals[chosen] / double_areas[chosen, None]
    return SurfaceSamples(
        points.astype(np.float32), unit_normals.astype(np.float32), chosen, barycentric.astype(np.float32)
    )


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
