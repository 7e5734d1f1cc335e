"""Views, depth, and which points each camera sees: rays cast at a mesh inside the unit ball. Pure, on one core.

Rays are exact where a depth buffer is not: at 224 pixels a depth test loses 6 to 17 % of the truly visible points of a
curved surface. There is one ray caster, Embree, and no slower one behind it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
from jaxtyping import Bool, Float, Float32, Int16, Integer, UInt8, UInt16

from datastore.cameras import CameraRig, camera_frames, pixel_rays, project
from datastore.errors import DoNotRetry
from datastore.mesh import Mesh

BACKGROUND: Final = 255
NEUTRAL_GREY: Final = 215
"""Surface colour of a source without colours: light enough that shading has room below it."""

# Two-sided Lambert under three lights that travel with the camera, so that no view of a shape lies in its own shadow:
# light from everywhere, from the camera, and from over its left shoulder, which is what gives edges their contrast.
_AMBIENT: Final = 0.38
_HEAD_LIGHT: Final = 0.28
_KEY_LIGHT: Final = 0.40  # the three together stay below 1 in every direction
_TOWARDS_KEY_LIGHT: Final = (-0.45, -0.75, -0.48)  # camera axes: right, down, forward

SURFACE_OFFSET: Final = 1e-5
"""How far above its surface a point looks for the camera, in ball radii; some 50 times the rounding of float32."""

_EDGE_ON: Final = 1e-6
"""Cosine below which a face shows the camera no side at all, and is not seen: an orthographic camera's view of a box."""

_DEPTH_STEPS: Final = 65534  # uint16 less the value 0, which says that nothing was hit


@dataclass(frozen=True)
class Rendering:
    """What the cameras of a rig see of one shape, and of the points on it."""

    views: UInt8[np.ndarray, "v h w 3"]
    depth: UInt16[np.ndarray, "v h w"]
    visibility: Bool[np.ndarray, "p v"]
    pixels: Int16[np.ndarray, "p v 2"]


def render(
    mesh: Mesh, points: Float32[np.ndarray, "p 3"], normals: Float32[np.ndarray, "p 3"], rig: CameraRig
) -> Rendering:
    """All that is rendered of a shape. The points lie on the mesh; normals may point to either side of it."""
    cast = _ray_caster(mesh)
    views, depth = _images(mesh, cast, rig)
    return Rendering(views, depth, _visibility(cast, points, normals, rig), pixels_of(points, rig))


def pixels_of(points: Float32[np.ndarray, "p 3"], rig: CameraRig) -> Int16[np.ndarray, "p v 2"]:
    """Column and row of the pixel that each point falls in, in each view."""
    pixels, _ = project(points, rig)
    whole: Int16[np.ndarray, "p v 2"] = np.rint(pixels).astype(np.int16)
    return whole


def encode_depth(depth: Float32[np.ndarray, "*shape"], rig: CameraRig) -> UInt16[np.ndarray, "*shape"]:
    """Distances from the camera plane as the store keeps them; what was not hit is infinitely far and becomes 0."""
    near, far = rig.depth_range
    hit = np.isfinite(depth)
    share = np.clip((np.where(hit, depth, near) - near) / (far - near), 0, 1)
    return np.where(hit, 1 + np.rint(_DEPTH_STEPS * share), 0).astype(np.uint16)


def decode_depth(depth: UInt16[np.ndarray, "*shape"], rig: CameraRig) -> Float32[np.ndarray, "*shape"]:
    """Distances from the camera plane; infinity where nothing was hit."""
    near, far = rig.depth_range
    distance = near + (depth.astype(np.float32) - 1) * ((far - near) / _DEPTH_STEPS)
    return np.where(depth == 0, np.float32(np.inf), distance).astype(np.float32)


def face_normals(mesh: Mesh) -> Float32[np.ndarray, "f 3"]:
    """Unit normals; zero for a face without area."""
    # one axis at a time: half the time of np.cross, which copies
    corners = [mesh.vertices[mesh.faces[:, corner]].T for corner in range(3)]
    (ax, ay, az), (bx, by, bz) = corners[1] - corners[0], corners[2] - corners[0]
    normals = np.stack([ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx], axis=1)
    lengths = np.sqrt(_dot(normals, normals))
    normals /= np.where(lengths > 0, lengths, 1)[:, None]
    return normals.astype(np.float32)


RayCaster = Callable[..., Any]
"""Embree's own call: (origins, directions, distances=None, query="INTERSECT", output=None)."""


def _ray_caster(mesh: Mesh) -> RayCaster:
    """Casts rays at the mesh."""
    try:
        from embreex.mesh_construction import TriangleMesh
        from embreex.rtcore_scene import EmbreeScene
    except ImportError as error:
        raise DoNotRetry(
            f"Rendering needs the ray caster Embree, which did not import ({error}). Install it with `pip install "
            "embreex`; it has wheels for Linux on x86-64, macOS on arm64 and Windows. For other machines, ingest on "
            "one of these and copy the store: only ingest casts rays."
        ) from error
    # robust: rays aimed at an edge or a corner hit one of its faces instead of slipping through
    scene = EmbreeScene(robust=True)
    TriangleMesh(scene, np.ascontiguousarray(mesh.vertices, np.float32), np.ascontiguousarray(mesh.faces, np.int32))
    run: RayCaster = scene.run
    return run


@lru_cache(maxsize=2)
def _view_rays(rig: CameraRig) -> list[tuple[Float32[np.ndarray, "h w 3"], Float32[np.ndarray, "h w 3"]]]:
    """Starts and directions of each view's rays, scaled so that the length travelled is the depth."""
    rays = []
    for view, rotation in enumerate(camera_frames(rig)[1]):
        origins, directions = pixel_rays(rig, view)
        scaled = directions / (directions @ rotation[2])[..., None]
        rays.append((origins.astype(np.float32), scaled.astype(np.float32)))
    return rays


def _images(
    mesh: Mesh, cast: RayCaster, rig: CameraRig
) -> tuple[UInt8[np.ndarray, "v h w 3"], UInt16[np.ndarray, "v h w"]]:
    """Shaded images and depth."""
    size = rig.image_size
    views = np.full((rig.num_views, size, size, 3), BACKGROUND, dtype=np.uint8)
    depth = np.full((rig.num_views, size, size), np.inf, dtype=np.float32)
    normals, windows = face_normals(mesh), _windows(mesh, rig)
    _, rotations = camera_frames(rig)
    for view, (origins, directions) in enumerate(_view_rays(rig)):
        left, top, right, bottom = windows[view]
        inside = directions[top:bottom, left:right].reshape(-1, 3)
        hits = cast(origins[top:bottom, left:right].reshape(-1, 3), inside, output=True)
        hit = np.flatnonzero(hits["primID"] >= 0)
        faces = hits["primID"][hit]
        weights = np.stack([1 - hits["u"][hit] - hits["v"][hit], hits["u"][hit], hits["v"][hit]], axis=1)
        colours = colours_at(mesh, faces, weights)
        # `take` on rows is four times as fast as indexing
        colours *= shade(normals.take(faces, axis=0), inside.take(hit, axis=0), rotations[view])[:, None]

        rows, columns = np.divmod(hit, right - left)
        views[view, top + rows, left + columns] = (colours + 0.5).astype(np.uint8)
        depth[view, top + rows, left + columns] = hits["tfar"][hit]
    return views, encode_depth(depth, rig)


def _windows(mesh: Mesh, rig: CameraRig) -> list[tuple[int, int, int, int]]:
    """Left, top, right, bottom of each view's part that the mesh's bounding box falls in; no ray beyond it can hit."""
    low, high = mesh.vertices.min(axis=0), mesh.vertices.max(axis=0)
    corners = np.stack(np.meshgrid(*zip(low, high, strict=True)), axis=-1).reshape(-1, 3)
    pixels, _ = project(corners, rig)
    first = np.clip(np.floor(pixels.min(axis=0)), 0, rig.image_size).astype(int)
    last = np.clip(np.ceil(pixels.max(axis=0)) + 1, 0, rig.image_size).astype(int)
    return [(left, top, right, bottom) for (left, top), (right, bottom) in zip(first, last, strict=True)]


def colours_at(
    mesh: Mesh, faces: Integer[np.ndarray, " n"], barycentric: Float32[np.ndarray, "n 3"]
) -> Float32[np.ndarray, "n 3"]:
    """Unlit surface colour, 0 to 255: the face's, or interpolated between its corners, or grey."""
    if mesh.face_colours is not None:
        return mesh.face_colours.take(faces, axis=0).astype(np.float32)
    if mesh.vertex_colours is not None:
        corners = mesh.vertex_colours[mesh.faces.take(faces, axis=0)].astype(np.float32)
        between: Float32[np.ndarray, "n 3"] = np.einsum("nk,nkc->nc", barycentric, corners)
        return between
    return np.full((len(faces), 3), NEUTRAL_GREY, dtype=np.float32)


def shade(
    normals: Float32[np.ndarray, "n 3"], directions: Float32[np.ndarray, "n 3"], rotation: Float[np.ndarray, "3 3"]
) -> Float32[np.ndarray, " n"]:
    """Share of the surface's colour that reaches the camera."""
    towards_key_light = (np.array(_TOWARDS_KEY_LIGHT) @ rotation / np.linalg.norm(_TOWARDS_KEY_LIGHT)).astype(
        np.float32
    )
    away = _dot(normals, directions)
    lengths = np.sqrt(_dot(directions, directions))
    # winding is not to be trusted: the side that faces the camera is lit
    key = np.where(away > 0, -1, 1) * (normals @ towards_key_light)
    light: Float32[np.ndarray, " n"] = _AMBIENT + _HEAD_LIGHT * np.abs(away) / lengths + _KEY_LIGHT * np.maximum(key, 0)
    return light


def _visibility(
    cast: RayCaster, points: Float32[np.ndarray, "p 3"], normals: Float32[np.ndarray, "p 3"], rig: CameraRig
) -> Bool[np.ndarray, "p v"]:
    """Whether nothing lies between a point and the camera.

    A point looks from just above the side of its surface that faces the camera: rounding cannot then put it behind its
    own face, a sheet is seen from both sides, and a second face in the same place does not hide the first.
    """
    visibility = np.empty((len(points), rig.num_views), dtype=bool)
    for view, position in enumerate(camera_frames(rig)[0].astype(np.float32)):
        towards = position - points if rig.projection == "perspective" else np.broadcast_to(position, points.shape)
        facing = _dot(normals, towards)
        edge_on = np.abs(facing) < _EDGE_ON * rig.distance
        above = points + np.where(facing < 0, -SURFACE_OFFSET, SURFACE_OFFSET).astype(np.float32)[:, None] * normals
        # directions end at the camera: a distance of 1 is there, and what lies behind the camera hides nothing
        towards = position - above if rig.projection == "perspective" else towards
        visibility[:, view] = (cast(above, towards, 1.0, query="OCCLUDED") < 0) & ~edge_on
    return visibility


def _dot(a: Float32[np.ndarray, "n 3"], b: Float32[np.ndarray, "n 3"]) -> Float32[np.ndarray, " n"]:
    """Row by row; three times as fast as einsum on rows this short."""
    product: Float32[np.ndarray, " n"] = a[:, 0] * b[:, 0] + a[:, 1] * b[:, 1] + a[:, 2] * b[:, 2]
    return product
