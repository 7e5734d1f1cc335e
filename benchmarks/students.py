"""One training step of each student beside a straightforward torch version of the same network: time and peak memory.

    python benchmarks/students.py [--students pointnet2 dgcnn ...] [--batch 16] [--repeats 3] [--compile] [--check]
                                  [--json FILE]

The straightforward version is what papers' code does in plain torch: 1x1 convolutions over [b, c, n, k], features of every
edge written down, neighbours from `cdist` and `topk`, ball queries by sorting, farthest points with a broadcast difference.
Both get the same weights and have to return the same before they are timed, in turns. Clouds are surfaces of ellipsoids in
the unit ball. Memory is the peak above what was in use before the step; on a CPU each is measured in a process of its own.
CurveNet's differs from ours in how neighbours and centres are found alone. `--compile` also times each student's step under
torch.compile, which takes minutes. On a busy machine `--threads 1 --cpu-time` counts processor time instead.
To add a student, add a line to STUDENTS.
"""

import argparse
import gc
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoding import PointEncoder
from models.ops.neighbours import Neighbours
from models.students import curvenet
from models.students.curvenet import CurveNetConfig
from models.students.dgcnn import SEGMENTATION, DGCNNConfig
from models.students.masked_transformer import MaskedTransformerConfig
from models.students.pointmlp import PointMLPConfig
from models.students.pointnet import PointNetConfig
from models.students.pointnet2 import SINGLE_SCALE, PointNet2Config

NUM_CLASSES = 40
CPU_TARGET = 1.7


def cdist_neighbours(queries: Tensor, points: Tensor, k: int) -> Tensor:
    """[b, m, k]."""
    return torch.cdist(queries, points).topk(k, dim=-1, largest=False).indices


def broadcast_farthest(points: Tensor, count: int) -> Tensor:
    """[b, count], from the first point on."""
    batch = torch.arange(len(points), device=points.device)
    chosen = torch.zeros(len(points), count, dtype=torch.long, device=points.device)
    nearest = torch.full(points.shape[:2], torch.inf, device=points.device)
    for number in range(1, count):
        last = points[batch, chosen[:, number - 1]][:, None]
        nearest = torch.minimum(nearest, ((points - last) ** 2).sum(dim=2))
        chosen[:, number] = nearest.argmax(dim=1)
    return chosen


def sorting_ball_query(centres: Tensor, points: Tensor, radius: float, k: int) -> Tensor:
    """[b, m, k], padded with the first."""
    squared = ((centres[:, :, None] - points[:, None]) ** 2).sum(dim=3)
    members = torch.arange(points.shape[1], device=points.device).repeat(*squared.shape[:2], 1)
    members[squared >= radius**2] = points.shape[1]
    members = members.sort(dim=2).values[..., :k]
    return torch.where(members == points.shape[1], members[..., :1], members)


def rows(features: Tensor, indices: Tensor) -> Tensor:
    """Features [b, n, c] by index [b, ...]."""
    batch = torch.arange(len(features), device=features.device).view(-1, *[1] * (indices.ndim - 1))
    return features[batch, indices]


def convolutions(in_features: int, widths: Sequence[int], slope: float = 0.0, *, bias: bool = False) -> nn.Sequential:
    """On [b, c, m, k]."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(in_features, width, 1, bias=bias), nn.BatchNorm2d(width), nn.LeakyReLU(slope)]
        in_features = width
    return nn.Sequential(*layers)


class Grouped(nn.Module):
    """Convolutions on groups, then their maximum. Parameters in the order of the students' own."""

    def __init__(self, in_features: int, widths: Sequence[int], slope: float) -> None:
        super().__init__()
        sizes = [in_features, *widths]
        self.convolutions = nn.ModuleList(nn.Conv2d(a, b, 1, bias=False) for a, b in zip(sizes, widths, strict=False))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.slope = slope

    def forward(self, groups: Tensor) -> Tensor:
        features = groups.permute(0, 3, 1, 2).contiguous()
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            features = F.leaky_relu(norm(convolution(features)), self.slope)
        return features.max(dim=3).values.transpose(1, 2)


class StraightPointNet2(nn.Module):
    def __init__(self, config: PointNet2Config) -> None:
        super().__init__()
        self.config = config
        steps, num_features = [], 0
        for step in config.steps:
            steps.append(
                nn.ModuleList(Grouped(3 + num_features, config.scaled(ball.widths), 0.0) for ball in step.balls)
            )
            num_features = sum(config.scaled(ball.widths)[-1] for ball in step.balls)
        self.steps = nn.ModuleList(steps)
        self.layers = convolutions(3 + num_features, config.scaled(config.widths))

    def forward(self, points: Tensor) -> Tensor:
        features = points[..., :0]
        for step, balls in zip(self.config.steps, self.steps, strict=True):
            centres = rows(points, broadcast_farthest(points, step.num_points))
            scales = []
            for ball, layers in zip(step.balls, balls, strict=True):
                members = sorting_ball_query(centres, points, ball.radius, ball.num_neighbours)
                relative = rows(points, members) - centres[:, :, None]
                scales.append(layers(torch.cat([relative, rows(features, members)], dim=3)))
            points, features = centres, torch.cat(scales, dim=2)
        everything = torch.cat([points, features], dim=2).transpose(1, 2)[..., None]
        return self.layers(everything).flatten(2).max(dim=2).values


class StraightDGCNN(nn.Module):
    def __init__(self, config: DGCNNConfig) -> None:
        super().__init__()
        self.k = config.num_neighbours
        edges, num_features, num_local = [], 3, 0
        for widths in config.edge_widths:
            edges.append(Grouped(2 * num_features, config.scaled(*widths), 0.2))
            num_features = config.scaled(*widths)[-1]
            num_local += num_features
        self.edges = nn.ModuleList(edges)
        self.embedding = convolutions(num_local, config.scaled(config.embedding_width))

    def forward(self, points: Tensor) -> Tensor:
        features, of_graphs = points, []
        for layers in self.edges:
            ends = rows(features, cdist_neighbours(features, features, self.k))
            starts = features[:, :, None].expand_as(ends)
            features = layers(torch.cat([ends - starts, starts], dim=3))
            of_graphs.append(features)
        local = torch.cat(of_graphs, dim=2).transpose(1, 2)[..., None]
        return self.embedding(local).flatten(2).max(dim=2).values


class StraightResidual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        second = [nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)]
        self.layers = nn.Sequential(*convolutions(channels, (channels,)), *second)

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(self.layers(features) + features)


class StraightStage(nn.Module):
    def __init__(self, in_channels: int, channels: int, config: PointMLPConfig) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(in_channels)), nn.Parameter(torch.zeros(in_channels))
        self.transfer = convolutions(2 * in_channels, (channels,))
        self.before = nn.Sequential(*(StraightResidual(channels) for _ in range(config.blocks_before_pooling)))
        self.after = nn.Sequential(*(StraightResidual(channels) for _ in range(config.blocks_after_pooling)))

    def forward(self, features: Tensor, chosen: Tensor, members: Tensor) -> Tensor:
        centres = rows(features, chosen)[:, :, None]
        differences = rows(features, members) - centres
        spread = differences.flatten(1).std(dim=1)[:, None, None, None]
        normalised = self.scale * (differences / (spread + 1e-5)) + self.shift
        pairs = torch.cat([normalised, centres.expand_as(differences)], dim=3).permute(0, 3, 1, 2).contiguous()
        pooled = self.before(self.transfer(pairs)).max(dim=3, keepdim=True).values
        return self.after(pooled).squeeze(3).transpose(1, 2)


class StraightPointMLP(nn.Module):
    def __init__(self, config: PointMLPConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.scaled(config.embedding_channels)
        self.embedding = convolutions(3, (channels,))
        stages = []
        for stage in config.stages:
            stages.append(StraightStage(channels, config.scaled(stage.channels), config))
            channels = config.scaled(stage.channels)
        self.stages = nn.ModuleList(stages)

    def forward(self, points: Tensor) -> Tensor:
        features = self.embedding(points.transpose(1, 2)[..., None]).squeeze(3).transpose(1, 2)
        for config, stage in zip(self.config.stages, self.stages, strict=True):
            chosen = broadcast_farthest(points, config.num_points)
            centres = rows(points, chosen)
            features = stage(features, chosen, cdist_neighbours(centres, points, self.config.num_neighbours))
            points = centres
        return features.max(dim=1).values


class StraightTransform(nn.Module):
    def __init__(self, num_features: int, config: PointNetConfig) -> None:
        super().__init__()
        point_widths, widths = config.scaled(config.transform_point_widths), config.scaled(config.transform_widths)
        self.num_features = num_features
        self.point_layers = convolutions(num_features, point_widths, bias=True)
        self.layers = convolutions(point_widths[-1], widths, bias=True)
        self.matrix = nn.Linear(widths[-1], num_features**2)

    def forward(self, features: Tensor) -> Tensor:
        pooled = self.point_layers(features).max(dim=2, keepdim=True).values
        matrices = self.matrix(self.layers(pooled).flatten(1)).view(-1, self.num_features, self.num_features)
        return matrices + torch.eye(self.num_features, device=features.device)


class StraightPointNet(nn.Module):
    def __init__(self, config: PointNetConfig) -> None:
        super().__init__()
        stem, widths = config.scaled(config.stem_widths), config.scaled(config.widths)
        self.input_transform = StraightTransform(3, config)
        self.stem = convolutions(3, stem, bias=True)
        self.feature_transform = StraightTransform(stem[-1], config)
        self.layers = convolutions(stem[-1], widths, bias=True)

    def forward(self, points: Tensor) -> Tensor:
        features = points.transpose(1, 2)[..., None]
        features = self.stem((points @ self.input_transform(features)).transpose(1, 2)[..., None])
        matrices = self.feature_transform(features)
        features = (features.squeeze(3).transpose(1, 2) @ matrices).transpose(1, 2)[..., None]
        return self.layers(features).flatten(2).max(dim=2).values


class StraightTokens(nn.Module):
    def __init__(self, in_features: int, inner: int, outer: int, width: int) -> None:
        super().__init__()
        norms = nn.BatchNorm1d(inner), nn.BatchNorm1d(2 * outer)
        self.local = nn.Sequential(nn.Conv1d(in_features, inner, 1), norms[0], nn.ReLU(), nn.Conv1d(inner, outer, 1))
        self.pair = nn.Sequential(
            nn.Conv1d(2 * outer, 2 * outer, 1), norms[1], nn.ReLU(), nn.Conv1d(2 * outer, width, 1)
        )

    def forward(self, groups: Tensor) -> Tensor:
        local = self.local(groups.flatten(0, 1).transpose(1, 2))
        highest = local.max(dim=2, keepdim=True).values.expand_as(local)
        return self.pair(torch.cat([highest, local], dim=1)).max(dim=2).values.unflatten(0, groups.shape[:2])


class StraightBlock(nn.Module):
    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        hidden = round(mlp_ratio * width)
        self.attention_norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, tokens: Tensor) -> Tensor:
        heads = self.queries_keys_values(self.attention_norm(tokens)).unflatten(2, (3, self.num_heads, -1))
        queries, keys, values = heads.permute(2, 0, 3, 1, 4)
        weights = (queries @ keys.transpose(2, 3) / queries.shape[3] ** 0.5).softmax(dim=3)
        tokens = tokens + self.output((weights @ values).transpose(1, 2).flatten(2))
        return tokens + self.mlp(tokens)


class StraightMaskedTransformer(nn.Module):
    def __init__(self, config: MaskedTransformerConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.scaled(config.widths)
        sizes = [(3, *config.scaled(config.embedding_widths)), *((width,) * 3 for width in widths)]
        self.embeddings = nn.ModuleList(
            StraightTokens(*size, width) for size, width in zip(sizes, widths, strict=False)
        )
        self.stages = nn.ModuleList(
            nn.ModuleList(
                [
                    nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, width)),
                    *(StraightBlock(width, config.num_heads, config.mlp_ratio) for _ in range(depth)),
                ]
            )
            for width, depth in zip(widths, config.depths, strict=True)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in widths)

    def forward(self, points: Tensor) -> Tensor:
        tokens = None
        for embedding, (places, *blocks), num_groups, size in zip(
            self.embeddings, self.stages, self.config.num_groups, self.config.group_sizes, strict=True
        ):
            centres = rows(points, broadcast_farthest(points, num_groups))
            members = cdist_neighbours(centres, points, size)
            groups = rows(points, members) - centres[:, :, None] if tokens is None else rows(tokens, members)
            tokens, position = embedding(groups), places(centres)
            for block in blocks:
                tokens = block(tokens + position)
            points = centres
        return self.norms[-1](tokens).max(dim=1).values


class StraightCurveNet(nn.Module):
    """The same layers; neighbours, balls and centres are found the straightforward way."""

    def __init__(self, config: CurveNetConfig) -> None:
        super().__init__()
        self.network = config.build()

    def forward(self, points: Tensor) -> Tensor:
        def nearest(queries: Tensor, points: Tensor, k: int) -> Neighbours:
            squared = torch.cdist(queries, points).square()
            found = squared.topk(k, dim=-1, largest=False)
            return Neighbours(found.indices, found.values)

        with patch.multiple(
            curvenet, nearest_neighbours=nearest, ball_query=sorting_ball_query, farthest_points=broadcast_farthest
        ):
            pooled: Tensor = self.network(points).pooled
        return pooled


@dataclass(frozen=True)
class Student:
    """A student and its straightforward version, which returns the pooled embedding; what it should gain on a CPU."""

    build: Callable[[], PointEncoder]
    build_straightforward: Callable[[], nn.Module] | None
    num_points: int = 1024
    cpu_target: float | None = None

    @property
    def variants(self) -> tuple[str, ...]:
        return ("ours",) if self.build_straightforward is None else ("ours", "straightforward")


# Random draws would drop other paths in each version
TRANSFORMER = MaskedTransformerConfig(drop_path=0.0)

STUDENTS = {
    "pointnet": Student(PointNetConfig().build, lambda: StraightPointNet(PointNetConfig())),
    "pointnet2": Student(PointNet2Config().build, lambda: StraightPointNet2(PointNet2Config()), cpu_target=CPU_TARGET),
    "pointnet2_single_scale": Student(SINGLE_SCALE.build, lambda: StraightPointNet2(SINGLE_SCALE)),
    "dgcnn": Student(DGCNNConfig().build, lambda: StraightDGCNN(DGCNNConfig()), cpu_target=CPU_TARGET),
    "dgcnn_segmentation": Student(SEGMENTATION.build, lambda: StraightDGCNN(SEGMENTATION), num_points=2048),
    "pointmlp": Student(PointMLPConfig().build, lambda: StraightPointMLP(PointMLPConfig())),
    "curvenet": Student(CurveNetConfig().build, lambda: StraightCurveNet(CurveNetConfig())),
    "masked_transformer": Student(TRANSFORMER.build, lambda: StraightMaskedTransformer(TRANSFORMER), num_points=2048),
}


class Step:
    """Forward, cross-entropy of a linear classifier, backward, and an update."""

    def __init__(self, name: str, variant: str, batch: int, device: str) -> None:
        student = STUDENTS[name]
        torch.manual_seed(0)
        ours = student.build()
        self.network: nn.Module = ours
        if variant == "straightforward":
            assert student.build_straightforward is not None, f"{name} has no straightforward version"
            self.network = student.build_straightforward()
            with torch.no_grad():
                for parameter, source in zip(self.network.parameters(), ours.parameters(), strict=True):
                    parameter.copy_(source.view_as(parameter))
        self.network.to(device)
        self.classifier = nn.Linear(ours.pooled_dim, NUM_CLASSES).to(device)
        parameters = [*self.network.parameters(), *self.classifier.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
        self.points = ellipsoids(batch, student.num_points).to(device)
        self.labels = (torch.arange(batch) % NUM_CLASSES).to(device)

    def pooled(self) -> Tensor:
        encoded = self.network(self.points)
        return encoded if isinstance(encoded, Tensor) else encoded.pooled

    def __call__(self) -> float:
        loss = F.cross_entropy(self.classifier(self.pooled()), self.labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def ellipsoids(batch: int, num_points: int) -> Tensor:
    """Points on surfaces with half-axes from 0.3 to 1."""
    generator = torch.Generator().manual_seed(1)
    directions = F.normalize(torch.randn(batch, num_points, 3, generator=generator), dim=2)
    return directions * (0.3 + 0.7 * torch.rand(batch, 1, 3, generator=generator))


def milliseconds(step: Step, device: str, clock: Callable[[], float]) -> float:
    """Of one step, to its end."""
    started = clock()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (clock() - started)


def medians(steps: dict[str, Step], repeats: int, device: str, clock: Callable[[], float]) -> dict[str, float]:
    """Milliseconds of each, measured in turns."""
    times: dict[str, list[float]] = {variant: [] for variant in steps}
    for turn in range(repeats + 1):
        for variant, step in steps.items():
            elapsed = milliseconds(step, device, clock)
            if turn > 0:  # the first one warms up
                times[variant].append(elapsed)
    return {variant: statistics.median(each) for variant, each in times.items()}


def peak_mebibytes(name: str, variant: str, batch: int, device: str) -> float:
    """The most that one step holds at a time, above what was there before it."""
    if device == "cuda":
        step = Step(name, variant, batch, device)
        step()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    command = [sys.executable, __file__, "--memory-of", name, variant, "--batch", str(batch)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_own_peak(name: str, variant: str, batch: int) -> None:
    """The resident memory's growth over one step in this process."""
    step = Step(name, variant, batch, "cpu")
    before = own_kibibytes("VmRSS")
    step()
    print((own_kibibytes("VmHWM") - before) / 1024)


def own_kibibytes(field: str) -> int:
    """A figure of this process. The kernel's ru_maxrss would be the parent's where that is larger."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def compare(name: str, batch: int, repeats: int, device: str, clock: Callable[[], float]) -> dict[str, Any]:
    """Each version's time and memory."""
    steps = {variant: Step(name, variant, batch, device) for variant in STUDENTS[name].variants}
    if "straightforward" in steps:
        with torch.no_grad():
            ours, straightforward = (step.pooled() for step in steps.values())
        gap = (torch.linalg.vector_norm(ours - straightforward) / torch.linalg.vector_norm(straightforward)).item()
        if not gap < 0.02:  # a neighbour at equal distance may be another one; a wrong layer is off by far more
            raise SystemExit(
                f"{name}: the two versions differ by {gap:.1%}: what would be timed is not the same network."
            )
    times = medians(steps, repeats, device, clock)
    del steps
    return {
        variant: {"milliseconds": time, "peak_mebibytes": peak_mebibytes(name, variant, batch, device)}
        for variant, time in times.items()
    }


def compare_compiled(name: str, batch: int, repeats: int, device: str, clock: Callable[[], float]) -> dict[str, Any]:
    """Our step's time as it is and under torch.compile, and how long that compiles; None where it cannot."""
    compilers = (os.environ.get("CXX", "g++"), "clang++")
    if device == "cpu" and not any(shutil.which(compiler) for compiler in compilers):
        return {
            "times_faster": None,
            "reason": f"torch.compile needs a C++ compiler on a CPU: {' or '.join(compilers)}",
        }
    torch.compiler.reset()
    steps = {"eager": Step(name, "ours", batch, device), "compiled": Step(name, "ours", batch, device)}
    steps["compiled"].network.compile()
    started = time.perf_counter()
    steps["compiled"]()
    seconds = time.perf_counter() - started
    times = medians(steps, repeats, device, clock)
    return {"times_faster": times["eager"] / times["compiled"], "milliseconds": times, "compile_seconds": seconds}


def main() -> int:
    """Compares every student, prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", choices=list(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=None, help="clouds a step (default: 4 on a CPU, 32 on CUDA)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="count processor time, for busy machines")
    parser.add_argument("--compile", action="store_true", help="also compare with torch.compile, which takes minutes")
    parser.add_argument("--check", action="store_true", help="exit with 1 unless every target holds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the last line to a file")
    parser.add_argument("--memory-of", nargs=2, metavar=("STUDENT", "VARIANT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = arguments.device
    batch = arguments.batch or (4 if device == "cpu" else 32)
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    if arguments.memory_of:
        print_own_peak(*arguments.memory_of, batch)
        return 0

    print(f"One training step, {batch} clouds, {device}, {torch.get_num_threads()} threads, float32\n")
    print(
        f"{'student':<24}{'ours':>10}{'straight':>12}{'faster':>9}{'ours':>13}{'straight':>12}{'leaner':>9}{'compiled':>11}"
    )
    results, targets = {}, {}
    for name in arguments.students:
        result = compare(name, batch, arguments.repeats, device, clock)
        ours, straightforward = result["ours"], result.get("straightforward")
        faster = leaner = None
        row = f"{name:<24}{ours['milliseconds']:>7.0f} ms"
        if straightforward is None:
            row += f"{'':>21}{ours['peak_mebibytes']:>9.0f} MiB{'':>21}"
        else:
            faster = straightforward["milliseconds"] / ours["milliseconds"]
            leaner = straightforward["peak_mebibytes"] / ours["peak_mebibytes"]
            row += (
                f"{straightforward['milliseconds']:>9.0f} ms{faster:>8.1f}x{ours['peak_mebibytes']:>9.0f} MiB"
                f"{straightforward['peak_mebibytes']:>8.0f} MiB{leaner:>8.1f}x"
            )
        compiled: dict[str, Any] = {"times_faster": None, "reason": "asked for by --compile"}
        if arguments.compile:
            compiled = compare_compiled(name, batch, arguments.repeats, device, clock)
        if compiled["times_faster"] is not None:
            row += f"{compiled['times_faster']:>10.2f}x"
        print(row, flush=True)
        results[name] = {**result, "times_faster": faster, "times_leaner": leaner, "compiled": compiled}
        target = STUDENTS[name].cpu_target
        if target is not None:
            on_cpu = device == "cpu"
            targets[f"{name}_step_times_faster"] = {
                "value": faster,
                "target": target,
                "better": "higher",
                "ok": faster >= target if on_cpu else None,
                **({} if on_cpu else {"reason": "the target is for a CPU"}),
            }

    line = json.dumps(
        {
            "benchmark": "students",
            "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "versions": {"torch": version("torch"), "python": platform.python_version()},
            "batch": batch,
            "students": results,
            "targets": targets,
        }
    )
    print(line)
    if arguments.json:
        arguments.json.write_text(line + "\n")
    return 1 if arguments.check and any(target["ok"] is False for target in targets.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
