"""A small objective, with what makes checkpoints hard: BatchNorm, a frozen weight, odd sizes; and its training loop."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from datastore.batch import Batch
from trainer.distributed import World
from trainer.engine import Engine, EngineConfig, OptimizerConfig, Terms, build_engine, split_batch

GLOBAL_BATCH = 16


@dataclass(frozen=True)
class ToyBatch(Batch):
    points: Float[Tensor, "b d"]


class Toy(nn.Module):
    """Two layers whose parameters no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 37)
        self.norm = nn.BatchNorm1d(37)
        self.frozen = nn.Parameter(torch.randn(37), requires_grad=False)
        self.second = nn.Linear(37, 5)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, batch: ToyBatch) -> Terms:
        hidden = torch.relu(self.norm(self.first(batch.points)) + self.frozen)
        out = self.second(hidden) * self.scale
        return {"square": out.square().mean(), "sum": 0.1 * (out.sum(dim=1) - 1).abs().mean()}


def toy_engine(
    config: EngineConfig,
    *,
    micro_batch: int = 4,
    norm: bool = True,
    world: World | None = None,
    global_batch: int = GLOBAL_BATCH,
) -> Engine:
    """An engine around the toy, with the same weights on each call."""
    torch.manual_seed(0)
    toy = Toy()
    if not norm:  # BatchNorm sees micro-batches, which a change of world cuts otherwise
        toy.norm.eval()
        toy.norm.train = lambda mode=True: toy.norm  # type: ignore[method-assign]
    world = world or World.from_env()
    return build_engine(toy, config, world, split_batch(global_batch, world.size, micro_batch))


def config_of(stage: int, kind: str = "adam", **settings: object) -> EngineConfig:
    """An engine's config of one ZeRO stage and optimizer."""
    return EngineConfig.model_validate(
        {"zero_stage": stage, "optimizer": {"kind": kind, "lr": 0.05, "weight_decay": 1e-3}} | settings
    )


def micro_batches(step: int, world: World, *, micro_batch: int = 4, global_batch: int = GLOBAL_BATCH) -> list[ToyBatch]:
    """This rank's share of global batch `step`, which is the same however many ranks share it."""
    samples = torch.randn(global_batch, 3, generator=torch.Generator().manual_seed(step))
    ids = torch.arange(global_batch) + step * global_batch
    parts = zip(ids.split(micro_batch), samples.split(micro_batch), strict=True)
    batches = [ToyBatch(ids=ids, seeds=ids, points=points) for ids, points in parts]
    return batches[world.rank :: world.size]


def train(
    engine: Engine, steps: Iterable[int], *, micro_batch: int = 4, global_batch: int = GLOBAL_BATCH
) -> list[float]:
    """The loss of each step, as this rank sees it."""
    losses = []
    for step in steps:
        total = 0.0
        for batch in micro_batches(step, engine.world, micro_batch=micro_batch, global_batch=global_batch):
            terms = engine(batch)
            engine.backward(terms)
            engine.step()
            total += float(torch.stack(list(terms.values())).sum().detach())
        losses.append(total)
    return losses


def plain_losses(optimizer: OptimizerConfig, steps: int) -> list[float]:
    """The same training in plain torch, with the whole global batch accumulated in one process."""
    torch.manual_seed(0)
    toy = Toy()
    torch_optimizer = optimizer.build({name: each for name, each in toy.named_parameters() if each.requires_grad})
    losses = []
    for step in range(steps):
        batches = micro_batches(step, World())
        step_losses = [torch.stack(list(toy(batch).values())).sum() for batch in batches]
        (torch.stack(step_losses).sum() / len(batches)).backward()
        torch_optimizer.step()
        torch_optimizer.zero_grad()
        losses.append(float(torch.stack(step_losses).sum().detach()))
    return losses
