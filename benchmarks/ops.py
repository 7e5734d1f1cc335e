"""Time and memory of each point operation beside a straightforward torch version of the same thing.

    python benchmarks/ops.py [--device cpu] [--repeats 5] [--only knn fps ...] [--check] [--json FILE]

Straightforward means what one writes first: a loop with broadcasting for farthest points, a full distance matrix for
neighbours and chamfer, a sort for the ball query, masks spread out in memory for pooling per view. Both run in turns;
medians count. Memory is what a fresh process needs beyond its operands. On a busy machine `--threads 1 --cpu-time`
counts processor time instead.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from models.ops.distances import chamfer_distance, exact_assignment, match_by_auction
from models.ops.image_lookup import look_up_bicubic
from models.ops.interpolation import interpolate_from_three
from models.ops.neighbours import ball_query, gather, nearest_neighbours
from models.ops.sampling import farthest_points
from models.ops.view_pooling import masked_view_max

ROOT = Path(__file__).parents[1]
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Case:
    """One operation in both forms, on the same operands."""

    title: str
    operands: Callable[[], tuple[Any, ...]]
    straightforward: Callable[..., Any]
    ours: Callable[..., Any]
    cpu_target: float | None = None  # how many times faster
    cuda_target: float | None = None
    memory_target: float | None = None  # our memory as a part of theirs


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def fps_loop(points: Tensor, num_samples: int) -> Tensor:
    clouds = torch.arange(len(points), device=points.device)
    nearest = torch.full(points.shape[:2], 1e10, device=points.device)
    chosen = torch.zeros(len(points), num_samples, dtype=torch.long, device=points.device)
    last = chosen[:, 0]
    for step in range(1, num_samples):
        squared = ((points - points[clouds, last][:, None]) ** 2).sum(-1)
        nearest = torch.minimum(nearest, squared)
        chosen[:, step] = last = nearest.argmax(-1)
    return chosen


def knn_matrix(points: Tensor, k: int) -> Tensor:
    return torch.cdist(points, points).topk(k, largest=False).indices


def ball_sort(centres: Tensor, points: Tensor, radius: float, k: int) -> Tensor:
    num_points = points.shape[1]
    indices = torch.arange(num_points, device=points.device).repeat(*centres.shape[:2], 1)
    indices[torch.cdist(centres, points) >= radius] = num_points
    indices = indices.sort(dim=-1).values[:, :, :k]
    return torch.where(indices == num_points, indices[:, :, :1], indices)


def chamfer_matrix(a: Tensor, b: Tensor) -> Tensor:
    squared = torch.cdist(a, b) ** 2
    (squared.min(2).values.mean() + squared.min(1).values.mean()).backward()
    return a.grad


def chamfer_ours(a: Tensor, b: Tensor) -> Tensor:
    there, back = chamfer_distance(a, b)
    (there.mean() + back.mean()).backward()
    return a.grad


def view_max_spread(per_point: Tensor, visibility: Tensor) -> Tensor:
    hidden = ~visibility.transpose(1, 2)[..., None]
    pooled = per_point[:, None].masked_fill(hidden, -torch.inf).amax(dim=2)
    pooled.sum().backward()
    return pooled


def view_max_ours(per_point: Tensor, visibility: Tensor) -> Tensor:
    pooled, _ = masked_view_max(per_point, visibility)
    pooled.sum().backward()
    return pooled


def interpolate_matrix(features: Tensor, known: Tensor, targets: Tensor) -> Tensor:
    distances, indices = (torch.cdist(targets, known) ** 2).sort(dim=-1)
    weights = 1 / (distances[..., :3] + 1e-8)
    weights = weights / weights.sum(-1, keepdim=True)
    clouds = torch.arange(len(features), device=features.device)[:, None, None]
    result = (features[clouds, indices[..., :3]] * weights[..., None]).sum(2)
    result.sum().backward()
    return result


def interpolate_ours(features: Tensor, known: Tensor, targets: Tensor) -> Tensor:
    result = interpolate_from_three(features, known, targets)
    result.sum().backward()
    return result


def group_expanded(features: Tensor, indices: Tensor) -> Tensor:
    spread = indices.flatten(1)[..., None].expand(-1, -1, features.shape[-1])
    result = features.gather(1, spread).view(*indices.shape, -1)
    result.square().sum().backward()
    return result


def group_ours(features: Tensor, indices: Tensor) -> Tensor:
    result = gather(features, indices)
    result.square().sum().backward()
    return result


def look_up_enlarged(maps: Tensor, pixels: Tensor, image_size: int) -> Tensor:
    whole = functional.interpolate(maps.permute(0, 3, 1, 2), size=(image_size, image_size), mode="bicubic")
    flat = (pixels[..., 1] * image_size + pixels[..., 0])[:, None].expand(-1, maps.shape[-1], -1)
    return whole.flatten(2).gather(2, flat).transpose(1, 2)


def cases_on(device: str) -> dict[str, Case]:
    """All cases, by name."""

    def cloud(*shape: int, seed: int = 0, gradient: bool = False) -> Tensor:
        return random(*shape, seed=seed).to(device).requires_grad_(gradient)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(0)).to(device)

    return {
        "fps": Case("farthest points [32, 2048] -> 512", lambda: (cloud(32, 2048, 3), 512), fps_loop, farthest_points, 3, 8),
        "knn": Case(
            "k nearest, k = 20 [32, 1024, 3]", lambda: (cloud(32, 1024, 3), 20), knn_matrix,
            lambda points, k: nearest_neighbours(points, points, k).indices, 5, 3,
        ),
        "knn_features": Case(
            "k nearest, k = 20 [32, 1024, 64]", lambda: (cloud(32, 1024, 64), 20), knn_matrix,
            lambda points, k: nearest_neighbours(points, points, k).indices,
        ),
        "ball_query": Case(
            "ball query, r = 0.2, k = 32, 512 of [32, 1024]",
            lambda: ((points := cloud(32, 1024, 3))[:, :512], points, 0.2, 32), ball_sort, ball_query, None, 3,
        ),
        "chamfer": Case(
            "chamfer [32, 1024, 3], forward and backward",
            lambda: (cloud(32, 1024, 3, gradient=True), cloud(32, 1024, 3, seed=1, gradient=True)),
            chamfer_matrix, chamfer_ours, 2.5, 3,
        ),
        "vafp": Case(
            "pooling per view [32 x 12 views, 1024 x 1024], forward and backward",
            lambda: (cloud(32, 1024, 1024, gradient=True), random(32, 1024, 12, seed=1).to(device) < 0.4),
            view_max_spread, view_max_ours, 2, None, 0.1,
        ),
        "interpolate": Case(
            "three-point interpolation [32, 1024 <- 256], 256 features, forward and backward",
            lambda: (cloud(32, 256, 256, gradient=True), cloud(32, 256, 3, seed=1), cloud(32, 1024, 3, seed=2)),
            interpolate_matrix, interpolate_ours,
        ),
        "gather": Case(
            "grouping [16, 1024, 20] x 64 features, forward and backward",
            lambda: (cloud(16, 1024, 64, gradient=True), integers(1024, 16, 1024, 20)), group_expanded, group_ours,
        ),
        "look_up": Case(
            "bicubic look-up [24 maps, 14 x 14 x 512], 512 points",
            lambda: (cloud(24, 14, 14, 512), integers(224, 24, 512, 2), 224), look_up_enlarged, look_up_bicubic,
        ),
        "emd": Case(
            "matching [4, 1024] (against the exact one)",
            lambda: (cloud(4, 1024, 3), cloud(4, 1024, 3, seed=1)), exact_assignment, match_by_auction,
        ),
    }  # fmt: skip


def seconds(function: Callable[..., Any], operands: tuple[Any, ...], cpu_time: bool) -> float:
    """How long one call takes, to the end of what it started on a device."""
    clock = time.process_time if cpu_time else time.perf_counter
    for operand in operands:
        if isinstance(operand, Tensor):
            operand.grad = None
    finish(operands)
    begin = clock()
    function(*operands)
    finish(operands)
    return clock() - begin


def finish(operands: tuple[Any, ...]) -> None:
    if operands[0].is_cuda:
        torch.cuda.synchronize()


def print_memory(case: Case, form: str) -> None:
    """Prints the bytes that one call takes beyond its operands; in a process of its own."""
    operands = case.operands()
    function = case.ours if form == "ours" else case.straightforward
    if operands[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(*operands)
        print(torch.cuda.max_memory_allocated() - before)
        return
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    function(*operands)
    print(max(1, resident("VmHWM") - before))


def resident(field: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def memory(name: str, form: str, device: str) -> int:
    """Bytes that one call takes, measured in a fresh process."""
    command = [sys.executable, __file__, "--device", device, "--memory-of", name, form]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return int(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


def main() -> int:
    """Measures every case, prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these cases alone")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="count processor time, for busy machines")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless every target holds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the last line to a file")
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    cases = cases_on(arguments.device)
    if arguments.memory_of:
        print_memory(cases[arguments.memory_of[0]], arguments.memory_of[1])
        return 0
    if arguments.only:
        cases = {name: cases[name] for name in arguments.only}

    print(
        f"{'milliseconds and MB':>80}  {'theirs':>8} {'ours':>8} {'faster':>7}  {'theirs':>8} {'ours':>7} {'part':>6}"
    )
    targets: dict[str, Any] = {}
    for name, case in cases.items():
        operands = case.operands()
        times: dict[str, list[float]] = {"straightforward": [], "ours": []}
        for repeat in range(arguments.repeats + 1):
            for form, function in (("straightforward", case.straightforward), ("ours", case.ours)):
                elapsed = seconds(function, operands, arguments.cpu_time)
                if repeat:  # the first one warms up
                    times[form].append(elapsed)
        theirs, ours = (statistics.median(each) for each in times.values())
        theirs_bytes, ours_bytes = (memory(name, form, arguments.device) for form in times)
        part = ours_bytes / theirs_bytes
        print(
            f"{case.title:>80}  {1000 * theirs:>8.1f} {1000 * ours:>8.1f} {theirs / ours:>6.1f}x  "
            f"{theirs_bytes / MEGABYTE:>8.1f} {ours_bytes / MEGABYTE:>7.1f} {part:>6.3f}",
            flush=True,
        )
        for device, target in (("cpu", case.cpu_target), ("cuda", case.cuda_target)):
            if target is not None:
                measured = device == arguments.device
                targets[f"{device}_{name}_times_faster"] = {
                    "value": theirs / ours if measured else None,
                    "target": target,
                    "better": "higher",
                    "ok": theirs / ours >= target if measured else None,
                    **({} if measured else {"reason": f"this run was on {arguments.device}"}),
                }
        if case.memory_target is not None:
            targets[f"{arguments.device}_{name}_memory"] = {
                "value": part, "target": case.memory_target, "better": "lower", "ok": part <= case.memory_target,
            }  # fmt: skip

    result = {
        "benchmark": "ops",
        "device": torch.cuda.get_device_name()
        if arguments.device == "cuda"
        else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "versions": {package: version(package) for package in ("torch", "numpy")},
        "targets": targets,
    }
    line = json.dumps(result)
    print(line)
    if arguments.json:
        arguments.json.write_text(line + "\n")
    missed = [name for name, target in targets.items() if target["ok"] is False]
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
