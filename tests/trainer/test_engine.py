"""Tests of trainer/engine.py."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import trainer.engine
from datastore.errors import AskedWrongly
from datastore.objects import ObjectFolder
from tests.ranks import run_ranks
from tests.trainer.savers import load, save
from tests.trainer.toy import GLOBAL_BATCH, ToyBatch, config_of, plain_losses, toy_engine, train
from trainer.distributed import World, joined
from trainer.engine import EngineConfig, OptimizerConfig, build_engine, split_batch
from trainer.fragments import check_layout, masters

_SHAPES = {"student.block.weight": (4, 4), "student.block.bias": (4,), "student.mask_token": (1, 1, 4), "scale": (1,)}


def _training(stage: int, kind: str) -> tuple[list[float], float, float]:
    engine = toy_engine(config_of(stage, kind))
    check_layout(engine)
    losses = train(engine, range(4))
    norm = engine.grad_norm
    check_layout(engine)
    clipped = toy_engine(config_of(stage, "sgd", clip_grad_norm=0.01))
    before = clipped.module.state_dict()["scale"].clone()
    train(clipped, range(1))
    moved = float((clipped.module.state_dict()["scale"] - before).abs().sum()) if stage < 3 else 0.0
    engine.close()
    return losses, norm, moved


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_every_zero_stage_follows_plain_torch(kind: str) -> None:
    plain = plain_losses(OptimizerConfig(kind=kind, lr=0.05, weight_decay=1e-3), 4)  # type: ignore[arg-type]
    norms = []
    for stage in range(4):
        (first, norm, moved), (second, norm_again, _) = run_ranks(_training, stage, kind)
        torch.testing.assert_close([a + b for a, b in zip(first, second, strict=True)], plain, rtol=2e-6, atol=0)
        assert norm == norm_again > 0
        assert moved <= 0.05 * 0.011, "clipping bounds the update"
        norms.append(norm)
    torch.testing.assert_close(norms, [norms[0]] * 4, rtol=1e-5, atol=0)


def _training_in_groups(config: EngineConfig, url: str, bucket: int) -> list[float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.engine, "_LARGEST_BUCKET", bucket)
        engine = toy_engine(config)
    check_layout(engine)
    assert len(engine.optimizer.param_groups) == 2
    losses = train(engine, range(2))
    save(engine, ObjectFolder(url), 2)
    straight = train(engine, range(2, 4))
    check_layout(engine)
    losses += straight
    assert load(engine, ObjectFolder(url)).position.step == 2
    resumed = train(engine, range(2, 4))
    engine.close()
    assert resumed == straight
    return losses


@pytest.mark.parametrize(("stage", "offload"), [(0, "none"), (1, "none"), (2, "optimizer"), (3, "none"), (3, "all")])
def test_parameters_without_weight_decay_and_offloaded_ones_follow_plain_torch_and_resume(
    stage: int, offload: str, tmp_path: Path
) -> None:
    optimizer = {"kind": "adamw", "lr": 0.05, "weight_decay": 0.5, "no_decay": ("vectors", "second")}
    config = config_of(stage, optimizer=optimizer, offload=offload)
    plain = plain_losses(config.optimizer, 4)
    assert plain != plain_losses(config.optimizer.model_copy(update={"no_decay": ()}), 4)
    bucket = 200 if offload == "none" else 10**7  # at stage 3, parameters are updated in several steps then
    first, second = run_ranks(_training_in_groups, config, str(tmp_path), bucket)
    torch.testing.assert_close([a + b for a, b in zip(first, second, strict=True)], plain, rtol=2e-6, atol=0)


def test_what_decays_follows_from_axes_and_names() -> None:
    config = OptimizerConfig(weight_decay=0.05, no_decay=("vectors", "token"))
    parameters = {name: torch.nn.Parameter(torch.zeros(*shape)) for name, shape in _SHAPES.items()}
    decaying, others = config.groups(parameters)
    assert [decaying["weight_decay"], others["weight_decay"]] == [0.05, 0.0]
    assert [len(decaying["params"]), len(others["params"])] == [1, 3]
    assert decaying["params"][0] is parameters["student.block.weight"]
    assert [len(group["params"]) for group in OptimizerConfig().groups(parameters)] == [4]


def test_a_stage_that_cannot_offload_is_refused() -> None:
    with pytest.raises(ValueError, match="offload 'all' needs zero_stage 3 or more, not 1"):
        EngineConfig(offload="all")


def test_one_process_needs_no_launcher() -> None:
    with joined(timeout_seconds=20) as world:
        engine = toy_engine(config_of(1, "sgd"), world=world)
        check_layout(engine)
        losses = train(engine, range(3))
        engine.close()
    torch.testing.assert_close(losses, plain_losses(config_of(1, "sgd").optimizer, 3), rtol=2e-6, atol=0)


def test_an_engine_that_is_closed_leaves_torch_as_it_was() -> None:
    """Else a run at another stage in the same process would follow another path, in its last bits."""
    linear = torch.nn.functional.linear
    with joined(timeout_seconds=20) as world:
        engine = toy_engine(config_of(3), world=world)
        assert torch.nn.functional.linear is not linear, (
            "deepspeed does not replace it any more: nor need it be put back"
        )
        engine.close()
    assert torch.nn.functional.linear is linear


def test_bf16_keeps_weights_and_terms_near_float32() -> None:
    with joined(timeout_seconds=20) as world:
        engine = toy_engine(config_of(0, precision="bf16"), world=world)
        losses = train(engine, range(4))
        assert {master.tensor.dtype for master in masters(engine)} == {torch.float32}
        engine.close()
    plain = plain_losses(config_of(0).optimizer, 4)
    assert losses != plain
    torch.testing.assert_close(losses, plain, rtol=0.1, atol=0)


def test_the_learning_rate_takes_effect_at_the_next_update() -> None:
    with joined(timeout_seconds=20) as world:
        engine = toy_engine(config_of(1, "sgd"), world=world)
        before = {name: value.clone() for name, value in engine.module.state_dict().items() if "norm" not in name}
        engine.set_lr(0.0)
        train(engine, range(1))
        after = engine.module.state_dict()
        engine.close()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_parameter_without_axes_is_refused_by_name() -> None:
    module = torch.nn.Module()
    module.temperature = torch.nn.Parameter(torch.tensor(1.0))
    with joined(timeout_seconds=20) as world, pytest.raises(ValueError, match="temperature"):
        build_engine(module, EngineConfig(), world, split_batch(2, 1, 2))


class _Deep(torch.nn.Module):
    """Layers that are each too large to stay whole at stage 3."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(320, 320, bias=False) for _ in range(16)))

    def forward(self, batch: ToyBatch) -> dict[str, torch.Tensor]:
        return {"square": self.layers(batch.points).square().mean()}


def _weights_gathered_between_passes() -> float:
    torch.manual_seed(0)
    engine = build_engine(_Deep(), config_of(3), World.from_env(), split_batch(4, 2, 2))
    batch = ToyBatch(ids=torch.arange(2), seeds=torch.arange(2), points=torch.rand(2, 320))
    for _ in range(2):  # the first is watched to learn in which order weights are used
        terms = engine(batch)
        gathered = sum(weight.numel() for weight in engine.module.parameters())
        engine.backward(terms)
        engine.step()
    engine.close()
    return gathered / (16 * 320**2)


def test_stage_3_does_not_keep_the_whole_model_once_it_was_used() -> None:
    assert all(share <= 0.3 for share in run_ranks(_weights_gathered_between_passes))


@pytest.mark.parametrize(
    ("global_batch", "world", "limit", "expected"),
    [(64, 4, 32, (16, 1)), (64, 1, 32, (32, 2)), (48, 2, 10, (8, 3)), (9, 1, 4, (3, 3)), (6, 3, 32, (2, 1))],
)
def test_the_global_batch_stays_whatever_the_world(
    global_batch: int, world: int, limit: int, expected: tuple[int, int]
) -> None:
    split = split_batch(global_batch, world, limit)
    assert (split.micro_batch, split.accumulation) == expected
    assert split.micro_batch * split.accumulation * world == global_batch


def test_a_world_that_does_not_divide_the_batch_is_refused_with_those_that_do() -> None:
    with pytest.raises(AskedWrongly, match=r"1, 2, 4"):
        split_batch(GLOBAL_BATCH, 3, 32)


def test_the_configs_are_read_without_deepspeed() -> None:
    code = "import sys, trainer.engine, trainer.checkpoint, trainer.metrics; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
