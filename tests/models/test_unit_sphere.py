"""Tests of models/unit_sphere.py."""

import torch

from models.unit_sphere import to_unit_sphere


def test_the_unit_sphere_is_that_of_the_points_that_are_measured() -> None:
    points = torch.randn(2, 50, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 2.0, 1.0]) + 5
    moved = to_unit_sphere(points)
    torch.testing.assert_close(moved.mean(dim=1), torch.zeros(2, 3), rtol=0, atol=1e-6)
    torch.testing.assert_close(moved.norm(dim=2).amax(dim=1), torch.ones(2))
    torch.testing.assert_close(to_unit_sphere(points, 20)[:, :20], to_unit_sphere(points[:, :20]))


def test_a_cloud_of_one_place_comes_to_the_origin() -> None:
    assert torch.equal(to_unit_sphere(torch.full((2, 4, 3), 7.0)), torch.zeros(2, 4, 3))
