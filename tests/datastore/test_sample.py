"""Surface samples against what can be said of them exactly, and farthest-point order against the slow original."""

import numpy as np
import pytest

from datastore.sample import farthest_point_order, sample_surface, seed_of, uniform_by_area

SQUARES = np.array(
    # a unit square at z = 0, one of side 3 at z = 1
    [[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 1], [3, 0, 1], [3, 3, 1], [0, 3, 1]],
    dtype=np.float32,
)
SQUARE_FACES = np.array([[0, 1, 2], [0, 2, 3], [4, 5, 6], [4, 6, 7]], dtype=np.int32)


def covering_radius(points: np.ndarray, chosen: np.ndarray) -> float:
    """The farthest that any point is from the nearest chosen one."""
    return float(np.linalg.norm(points[:, None] - points[chosen][None], axis=2).min(axis=1).max())


def exact_farthest_point_order(points: np.ndarray, count: int) -> np.ndarray:
    chosen = [0]
    distances = np.linalg.norm(points - points[0], axis=1)
    while len(chosen) < count:
        chosen.append(int(distances.argmax()))
        distances = np.minimum(distances, np.linalg.norm(points - points[chosen[-1]], axis=1))
    return np.array(chosen)


def test_a_sample_lies_where_its_face_and_weights_say() -> None:
    samples = sample_surface(SQUARES, SQUARE_FACES, 200, seed=1)
    corners = SQUARES[SQUARE_FACES[samples.faces]]
    assert np.allclose(np.einsum("pk,pkc->pc", samples.barycentric, corners), samples.points, atol=1e-6)
    assert np.allclose(samples.barycentric.sum(axis=1), 1, atol=1e-6)
    assert samples.barycentric.min() >= 0
    assert np.allclose(samples.normals, [0, 0, 1])


def test_samples_spread_over_the_surface_by_its_area() -> None:
    samples = uniform_by_area(SQUARES, SQUARE_FACES, 100_000, seed=2)
    shares = np.bincount(samples.faces, minlength=4) / 100_000
    assert np.allclose(shares, [0.05, 0.05, 0.45, 0.45], atol=0.006)  # four standard deviations
    on_large = samples.points[samples.points[:, 2] == 1]
    cells = np.histogram2d(on_large[:, 0], on_large[:, 1], bins=6, range=((0, 3), (0, 3)))[0]
    expected = len(on_large) / 36
    assert ((cells - expected) ** 2 / expected).sum() < 78  # chi-square, 35 degrees of freedom, p = 4e-5


def test_faces_without_area_get_no_samples() -> None:
    faces = np.array([[0, 0, 1], [0, 1, 2], [3, 3, 3], [2, 2, 1]], dtype=np.int32)
    assert set(uniform_by_area(SQUARES, faces, 1000, seed=3).faces.tolist()) == {1}


@pytest.mark.parametrize("faces", [np.zeros((0, 3), np.int32), np.array([[0, 0, 1], [2, 2, 2]], np.int32)])
def test_a_mesh_without_area_is_refused(faces: np.ndarray) -> None:
    with pytest.raises(ValueError, match="no area"):
        sample_surface(SQUARES, faces, 10, seed=0)


@pytest.mark.parametrize("count", [1, 2, 7, 64, 500])
def test_no_sample_comes_twice_and_all_are_there(count: int) -> None:
    points = np.random.default_rng(4).random((4 * count, 3), dtype=np.float32)
    order = farthest_point_order(points, count)
    assert len(set(order.tolist())) == count
    assert 0 <= order.min() <= order.max() < len(points)


@pytest.mark.parametrize("count", [8, 32, 128, 512])
def test_every_beginning_of_the_order_covers_like_the_exact_one(count: int) -> None:
    random = np.random.default_rng(5)
    points = random.standard_normal((2048, 3)).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    beginning = farthest_point_order(points, 512)[:count]
    exact = covering_radius(points, exact_farthest_point_order(points, count))
    by_chance = covering_radius(points, random.choice(2048, count, replace=False))
    assert covering_radius(points, beginning) < min(1.25 * exact, 0.8 * by_chance)


def test_a_shape_keeps_its_samples_wherever_it_stands() -> None:
    first, again = (sample_surface(SQUARES, SQUARE_FACES, 64, seed_of("chair/1")) for _ in range(2))
    other = sample_surface(SQUARES, SQUARE_FACES, 64, seed_of("chair/2"))
    assert np.array_equal(first.points, again.points)
    assert not np.array_equal(first.points, other.points)


def test_seeds_are_the_same_on_every_machine() -> None:
    assert seed_of("chair/1") == 0x926CA3DD8AECC807
