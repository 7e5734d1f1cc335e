import numpy as np
import pytest

from datastore.demo.solids import (
    Solid,
    arc,
    box,
    circle,
    cylinder,
    ellipsoid,
    lathe,
    level,
    post,
    prism,
    rectangle,
    sideways,
    smooth,
    sweep,
    tube,
    upright,
)


def volume(solid: Solid) -> float:
    """Positive when the faces look outward."""
    first, second, third = np.moveaxis(solid.vertices[solid.faces], 1, 0)
    return float((first * np.cross(second, third)).sum() / 6)


def polygon_area(sides: int) -> float:
    return sides / 2 * float(np.sin(2 * np.pi / sides))


SOLIDS = {
    "box": box(2.0, 3.0, 4.0, bevel=0.0),
    "bevelled box": box(2.0, 3.0, 4.0),
    "cushion": box(2.0, 0.5, 4.0, bevel=0.2, steps=3),
    "cylinder": cylinder(1.5, 2.0),
    "cone": lathe([(0, 0), (1, 0), (0, 2)]),
    "ring": lathe([(1, 0), (2, 0), (2, 1), (1, 1)], joined=True),
    "ellipsoid": ellipsoid(1.0, 2.0, 3.0),
    "prism": prism(circle(1.0, 7), 2.0, 0.2),
    "post down": post((0, 2, 0), (1, -1, 3), 0.2, 0.1),
    "bent tube": tube(upright(smooth([(0, 0), (1, 1), (2, 0), (3, 4)])), 0.1),
    "hoop": tube(level(arc(2.0, 0, 345, 23), 1.0), 0.1, joined=True),
    "tapered sweep": sweep(sideways(arc(2.0, 0, 90), 1.0), rectangle(0.5, 0.2, 0.05, 2), np.linspace(1, 0.2, 13)),
}


@pytest.mark.parametrize("name", SOLIDS)
def test_a_solid_is_closed_and_looks_outward(name: str) -> None:
    solid = SOLIDS[name]
    edges = solid.faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2)
    assert len(np.unique(edges, axis=0)) == len(edges), "two faces run along an edge in the same direction"
    assert {tuple(edge) for edge in edges} == {tuple(edge) for edge in edges[:, ::-1]}, "an edge has one face only"
    assert set(solid.faces.flat) == set(range(len(solid.vertices)))
    assert volume(solid) > 0


@pytest.mark.parametrize("name", SOLIDS)
def test_a_moved_turned_or_mirrored_solid_keeps_its_volume(name: str) -> None:
    solid = SOLIDS[name]
    for changed in (solid.moved(1, 2, 3), solid.turned("y", 33), solid.mirrored("z"), solid.leaning(x=0.4, z=-0.2)):
        assert volume(changed) == pytest.approx(volume(solid))
    assert volume(solid.scaled(2, 3, 0.5)) == pytest.approx(3 * volume(solid))


def test_volumes_are_those_of_the_textbook() -> None:
    assert volume(box(2.0, 3.0, 4.0, bevel=0.0)) == pytest.approx(24)
    assert volume(cylinder(1.5, 2.0, sides=9)) == pytest.approx(polygon_area(9) * 1.5**2 * 2)
    assert volume(lathe([(0, 0), (1, 0), (0, 3)], 12)) == pytest.approx(polygon_area(12))
    ring = lathe([(1, 0), (2, 0), (2, 1), (1, 1)], 12, joined=True)
    assert volume(ring) == pytest.approx(polygon_area(12) * (2**2 - 1**2))
    assert volume(post((0, 0, 0), (2, 1, 2), 0.5, sides=6)) == pytest.approx(polygon_area(6) * 0.5**2 * 3)


def test_a_bevel_takes_a_little_off_and_keeps_the_size() -> None:
    plain, bevelled = box(2.0, 3.0, 4.0, bevel=0.0), box(2.0, 3.0, 4.0, bevel=0.2, steps=3)
    assert 0.95 * volume(plain) < volume(bevelled) < volume(plain)
    np.testing.assert_allclose(np.ptp(bevelled.vertices, axis=0), (2, 3, 4))


def test_turns_are_counter_clockwise_seen_from_the_tip_of_the_axis() -> None:
    tip = Solid(np.array([[1.0, 2.0, 3.0]]), np.zeros((0, 3), dtype=int))
    np.testing.assert_allclose(tip.turned("z", 90).vertices, [[-2, 1, 3]])
    np.testing.assert_allclose(tip.turned("x", 90).vertices, [[1, -3, 2]])
    np.testing.assert_allclose(tip.turned("y", 90).vertices, [[3, 2, -1]])


def test_a_sweep_keeps_its_thickness_around_a_bend() -> None:
    path = upright(arc(2.0, 0, 180, 48))
    bar = tube(path, 0.1, sides=12)
    middle = bar.vertices[:-2].reshape(len(path), 12, 3)
    np.testing.assert_allclose(np.linalg.norm(middle - path[:, None], axis=-1), 0.1)
    # by Pappus: the section's area times the way of its middle
    assert volume(bar) == pytest.approx(polygon_area(12) * 0.1**2 * 2 * np.pi, rel=2e-3)


def test_a_smooth_curve_passes_through_its_points() -> None:
    through = [(0.0, 0.0), (1.0, 2.0), (3.0, 1.0), (4.0, 4.0)]
    np.testing.assert_allclose(smooth(through, 5)[::5], through)
    straight = smooth([(0.0, 0.0), (1.0, 1.0), (2.0, 2.0)], 4)
    np.testing.assert_allclose(straight[:, 0], straight[:, 1])
