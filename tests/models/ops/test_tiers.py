"""Tests of models/ops/tiers.py and models/ops/checks.py."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models.ops import distances, image_lookup, interpolation, neighbours, sampling, tiers


def test_cpus_take_the_fast_path_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIEWPOINT_OPS", raising=False)
    points = torch.zeros(1, 1, 3)
    assert tiers.choose(points) == "cpu"
    with tiers.use("reference"):
        assert tiers.choose(points) == "reference"
        with tiers.use("auto"):
            assert tiers.choose(points) == "cpu"
        assert tiers.choose(points) == "reference"
    monkeypatch.setenv("VIEWPOINT_OPS", "reference")
    assert tiers.choose(points) == "reference"
    with tiers.use("cpu"):
        assert tiers.choose(points) == "cpu"


def test_other_devices_take_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIEWPOINT_OPS", raising=False)
    assert tiers.choose(torch.zeros(1, 1, 3, device="meta")) == "reference"


def test_cuda_takes_triton_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIEWPOINT_OPS", raising=False)

    class OnCuda:
        device = torch.device("cuda", 0)

    for installed, tier in ((True, "triton"), (False, "reference")):
        monkeypatch.setattr(tiers, "triton_is_installed", lambda installed=installed: installed)
        assert inspect.unwrap(tiers.choose)(OnCuda()) == tier


def test_a_tier_that_cannot_serve_the_device_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with (
        tiers.use("triton"),
        pytest.raises(ValueError, match=r"use\('triton'\)\) was asked for, and a tensor is on cpu"),
    ):
        neighbours.nearest_neighbours(torch.zeros(1, 1, 3), torch.zeros(1, 1, 3), 1)
    with tiers.use("cpu"), pytest.raises(ValueError, match=r"a tensor is on meta. Leave it at auto"):
        tiers.choose(torch.zeros(1, 1, 3, device="meta"))
    monkeypatch.setenv("VIEWPOINT_OPS", "gpu")
    with pytest.raises(ValueError, match="VIEWPOINT_OPS is 'gpu'; it may be one of auto, reference, cpu, triton"):
        tiers.choose(torch.zeros(1, 1, 3))
    with pytest.raises(ValueError, match="no tier 'fast'"):
        next(inspect.unwrap(tiers.use)("fast"))


def cloud(n: int = 5, d: int = 3) -> Tensor:
    return torch.arange(2.0 * n * d).view(2, n, d)


WRONG: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
    (sampling.farthest_points, (cloud(d=4), 2), r"points is \(2, 5, 4\); expected \[clouds, points, 3\]"),
    (sampling.farthest_points, (cloud().long(), 2), r"points is torch.int64; expected a floating type"),
    (sampling.farthest_points, (cloud(0), 1), r"points is \(2, 0, 3\): no points"),
    (sampling.farthest_points, (cloud(), 6), "num_samples is 6; expected 1 to 5, the number of points of points"),
    (sampling.farthest_points, (cloud(), 2, 5), "start is 5; expected 0 to 4"),
    (sampling.farthest_points, (cloud(), 2, torch.zeros(3).long()), r"start is \(3,\); expected one index for each of 2"),
    (neighbours.nearest_neighbours, (cloud(), cloud(), 6), "k is 6; expected 1 to 5, the number of points of points"),
    (neighbours.nearest_neighbours, (cloud(), cloud(), 0), "k is 0; expected 1 to 5"),
    (neighbours.nearest_neighbours, (cloud(), cloud()[:1], 1), r"queries is \(2, 5, 3\) and points is \(1, 5, 3\)"),
    (neighbours.nearest_neighbours, (cloud(), cloud(d=4), 1), "the last axis, features, must agree"),
    (neighbours.nearest_neighbours, (cloud()[0], cloud(), 1), r"queries is \(5, 3\); expected \[clouds, points, features\]"),
    (neighbours.nearest_neighbours, (cloud(), cloud().to("meta"), 1), "queries is on cpu and points on meta"),
    (neighbours.ball_query, (cloud(), cloud(), 0.0, 4), "radius is 0.0; expected more than 0"),
    (neighbours.ball_query, (cloud(), cloud(), 0.1, 0), "k is 0; expected at least 1"),
    (neighbours.gather, (cloud(), torch.zeros(3, 1).long()), r"features is \(2, 5, 3\) and indices is \(3, 1\)"),
    (neighbours.weighted_sum, (cloud(), torch.zeros(2, 1, 3).long(), cloud(1, 2)), r"weights is \(2, 1, 2\); expected \(2, 1, 3\)"),
    (interpolation.interpolate_from_three, (cloud(4), cloud(), cloud()), r"features is \(2, 4, 3\) and known is \(2, 5, 3\)"),
    (distances.chamfer_distance, (cloud(), cloud()[:1]), r"a is \(2, 5, 3\) and b is \(1, 5, 3\)"),
    (distances.match_by_auction, (cloud(), cloud(4)), r"predicted is \(2, 5, 3\) and target is \(2, 4, 3\)"),
    (image_lookup.look_up_bicubic, (cloud(), cloud().long(), 8), r"maps is \(2, 5, 3\) and pixels is \(2, 5, 3\)"),
    (image_lookup.look_up_bicubic, (cloud()[..., None], cloud(d=2).long(), 0), "image_size is 0"),
]  # fmt: skip


@pytest.mark.parametrize(("operation", "arguments", "message"), WRONG, ids=lambda value: getattr(value, "__name__", ""))
def test_wrong_operands_are_refused_by_name(
    operation: Callable[..., Any], arguments: tuple[Any, ...], message: str
) -> None:
    unchecked = inspect.unwrap(operation)  # outside tests nothing checks shapes before the function does
    with pytest.raises(ValueError, match=message):
        unchecked(*arguments)


def test_an_auction_needs_bids_that_rise() -> None:
    with pytest.raises(ValueError, match=r"epsilon is 0\.0; expected more than 0"):
        distances.match_by_auction(cloud(), cloud(), epsilon=0.0)


def test_nan_is_refused_where_checks_are_on(monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = cloud(), cloud()
    bad[1, 3, 2] = torch.nan
    message = r" \(2, 5, 3\) holds 1 NaN, the first at \[1, 3, 2\]"
    neighbours.nearest_neighbours(good, bad, 2)  # off: whatever comes out
    with tiers.checking():
        for call, name in (
            (lambda: sampling.farthest_points(bad, 2), "points"),
            (lambda: neighbours.nearest_neighbours(bad, good, 2), "queries"),
            (lambda: neighbours.ball_query(good, bad, 0.5, 2), "points"),
            (lambda: distances.chamfer_distance(bad, good), "a"),
            (lambda: distances.earth_movers_distance(good, bad), "target"),
        ):
            with pytest.raises(ValueError, match=name + message):
                call()
    monkeypatch.setenv("VIEWPOINT_OPS_CHECK", "1")
    with pytest.raises(ValueError, match="points" + message):
        sampling.farthest_points(bad, 2)
    with tiers.checking(False):
        sampling.farthest_points(bad, 2)


def test_indices_out_of_range_are_refused_where_checks_are_on() -> None:
    with tiers.checking():
        neighbours.gather(cloud(), torch.tensor([[0, 4], [4, 0]]))
        with pytest.raises(ValueError, match=r"indices \(2, 1\) runs from -1 to 4; expected 0 to 4"):
            neighbours.gather(cloud(), torch.tensor([[4], [-1]]))


def test_importing_an_operation_imports_neither_scipy_nor_triton() -> None:
    """They cost a second, and most runs need at most one of them."""
    program = (
        "import sys; import models, models.ops.distances, models.ops.interpolation, models.ops.image_lookup, "
        "models.ops.sampling, models.ops.cpu; "
        "assert not {'scipy', 'triton', 'sklearn'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_importing_models_takes_less_than_three_seconds() -> None:
    """Of a processor, and the shortest of a few: other work on the machine does not count. Nearly all of it is torch's."""
    program = "import time, models; models.build_student; print(time.process_time())"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    shortest = float("inf")
    for _ in range(3):
        said = subprocess.run(
            [sys.executable, "-c", program], check=True, env=environment, capture_output=True, text=True
        )
        shortest = min(shortest, float(said.stdout))
        if shortest < 3:
            return
    raise AssertionError(f"importing models takes {shortest:.1f} s")
