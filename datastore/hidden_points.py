"""Which points of a cloud a camera sees, from the points alone: hidden-point removal (Katz, Tal, Basri 2007).

A point in front of its surroundings becomes a corner when the cloud is turned inside out around the camera: with
q = point - camera, r = |q| and R = kappa * max r, q moves to q + 2 (R - r) q / r, and is seen exactly if it is a corner
of the convex hull of all moved points and the camera. It is an estimate: of evenly covered surfaces it finds all that is
seen of convex parts and a few points past their rim, and loses points inside narrow concave ones.

An orthographic camera stands infinitely far away, where the moved points have a limit of their own: with z the depth
along the view and (x, y) the place across it, they lie at (x, y, -(z + c (x² + y²))), seen from infinitely far below.
c = R / distance² gives them the curvature that they have around the origin for the perspective camera that stands where
the orthographic one does. (Only to move a camera away with kappa fixed would flatten them, and hide every hollow.)
"""

from typing import Final

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from datastore.cameras import CameraRig, camera_frames

KAPPA: Final = 10.0
"""R in multiples of the farthest point's distance, as PointMCD's masks are made; larger ones see through surfaces."""

_FAR_BELOW: Final = 1e4  # in ball radii: rays that are parallel to the fourth digit


def visibility_of_points(
    points: Float[np.ndarray, "p 3"], rig: CameraRig, kappa: float = KAPPA
) -> Bool[np.ndarray, "p v"]:
    """Whether each camera sees each point past all others. Points in one place are seen together."""
    # in an order of their own, so that neither the order of the points nor how often they come changes the result
    places, place_of = np.unique(points.astype(np.float64), axis=0, return_inverse=True)
    seen = [
        _corners(_turned_inside_out(places, position, rotation, rig, kappa))
        for position, rotation in zip(*camera_frames(rig), strict=True)
    ]
    return np.stack(seen, axis=1)[place_of.reshape(-1)]


def _turned_inside_out(
    points: Float64[np.ndarray, "p 3"],
    position: Float[np.ndarray, " 3"],
    rotation: Float[np.ndarray, "3 3"],
    rig: CameraRig,
    kappa: float,
) -> Float64[np.ndarray, "p+1 3"]:
    """The moved points, and last the camera."""
    if rig.projection == "perspective":
        from_camera = points - position
        distances = np.linalg.norm(from_camera, axis=1, keepdims=True)
        radius = kappa * distances.max()
        return np.vstack([from_camera * (2 * radius / distances - 1), np.zeros(3)])
    x, y, z = rotation @ points.T
    curvature = kappa * (rig.distance + 1) / rig.distance**2
    return np.vstack([np.stack([x, y, -(z + curvature * (x**2 + y**2))], axis=1), [0, 0, -_FAR_BELOW]])


def _corners(points_and_camera: Float64[np.ndarray, "n 3"]) -> Bool[np.ndarray, " n-1"]:
    """Which of the points are corners of the hull. Flat sets have a flat hull: a polygon, or the ends of a line."""
    from scipy.spatial import ConvexHull, QhullError

    is_corner = np.zeros(len(points_and_camera), dtype=bool)
    centred = points_and_camera - points_and_camera.mean(axis=0)
    for dimension in (3, 2):
        try:
            is_corner[ConvexHull(centred[:, :dimension]).vertices] = True
            return is_corner[:-1]
        except QhullError:  # fewer points than a solid needs, or all in one plane
            if dimension == 3:
                centred = centred @ _principal_axes(centred).T
    is_corner[_ends(centred[:, 0])] = True
    return is_corner[:-1]


def _principal_axes(centred: Float64[np.ndarray, "n 3"]) -> Float64[np.ndarray, "3 3"]:
    """Directions in which the points reach, the farthest first."""
    axes: Float64[np.ndarray, "3 3"] = np.linalg.svd(np.linalg.qr(centred, mode="r"))[2]
    return axes


def _ends(along: Float64[np.ndarray, " n"]) -> Int64[np.ndarray, " 2"]:
    return np.array([along.argmin(), along.argmax()])
