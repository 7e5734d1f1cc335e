"""Tests of models/transformer.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.transformer import (
    Attention,
    Block,
    DropPath,
    PositionEmbedding,
    TransformerStage,
    attention_mask,
    drop_path_rates,
)


def tokens_and_places(b: int = 2, t: int = 7, d: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(b, t, d, generator=generator).double(), torch.randn(b, t, 3, generator=generator).double()


def attention_by_loops(layer: Attention, tokens: Tensor, allowed: Tensor) -> Tensor:
    """Head by head and query by query; `allowed` is [b, t, t]."""
    b, t, d = tokens.shape
    head = d // layer.num_heads
    queries, keys, values = (tokens @ weight.T for weight in layer.queries_keys_values.weight.chunk(3))
    mixed = torch.zeros_like(tokens)
    for cloud in range(b):
        for start in range(0, d, head):
            part = slice(start, start + head)
            for i in range(t):
                seen = allowed[cloud, i]
                weights = (keys[cloud, seen, part] @ queries[cloud, i, part] / head**0.5).softmax(0)
                mixed[cloud, i, part] = weights @ values[cloud, seen, part]
    return mixed @ layer.output.weight.T + layer.output.bias


def block_by_loops(block: Block, tokens: Tensor, allowed: Tensor) -> Tensor:
    tokens = tokens + attention_by_loops(block.attention, block.attention_norm(tokens), allowed)
    first, _, second = block.mlp
    hidden = block.mlp_norm(tokens) @ first.weight.T + first.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return tokens + hidden @ second.weight.T + second.bias


@pytest.mark.parametrize("radius", [None, 1.5])
def test_a_stage_is_the_paper_s_formula_and_adds_places_before_every_block(radius: float | None) -> None:
    torch.manual_seed(0)
    stage = TransformerStage(12, 3, [0.0, 0.0]).double()
    tokens, places = tokens_and_places()
    allowed = torch.ones(2, 7, 7, dtype=torch.bool)
    if radius is not None:
        allowed = (places[:, :, None] - places[:, None]).norm(dim=3) < radius
    expected = tokens
    for block in stage.blocks:
        assert isinstance(block, Block)
        expected = block_by_loops(block, expected + stage.position(places), allowed)
    torch.testing.assert_close(stage(tokens, places, attention_mask(places, radius=radius)), expected)


def test_padding_is_not_seen_and_no_row_of_the_mask_is_empty() -> None:
    places = torch.tensor([[[0.0, 0, 0], [1, 0, 0], [5, 0, 0], [0, 0, 0]]] * 2)
    real = torch.tensor([[True, True, True, False], [False] * 4])
    for radius in (None, 1.0, 2.0):
        allowed = attention_mask(places, real, radius)
        assert allowed is not None
        allowed = allowed.expand(2, 1, 4, 4)
        assert allowed.any(dim=3).all()
        assert not allowed[0, 0, :3, 3].any()
    assert attention_mask(places) is None
    near = attention_mask(places, radius=1.0)
    assert near is not None and near[0, 0].tolist()[0] == [True, False, False, True]  # 1.0 is as far as the radius


def test_attention_over_padding_alone_is_finite() -> None:
    tokens, places = tokens_and_places()
    stage = TransformerStage(12, 3, [0.0]).double()
    real = torch.tensor([[True] * 7, [False] * 7])
    tokens = (tokens * real[..., None]).requires_grad_()
    encoded = stage(tokens, places, attention_mask(places, real))
    encoded.sum().backward()
    assert encoded.isfinite().all() and tokens.grad is not None and tokens.grad.isfinite().all()


def test_rates_rise_evenly_from_none_to_the_highest() -> None:
    assert drop_path_rates(0.1, 3) == [0.0, 0.05, 0.1]
    assert drop_path_rates(0.1, 1) == [0.0]
    assert drop_path_rates(0.1, 15)[-1] == 0.1


def test_dropped_paths_are_whole_samples_and_others_make_up_for_them() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25)
    dropped = drop(torch.ones(4000, 2, 3, dtype=torch.float64)).flatten(1)
    assert set(dropped.unique().tolist()) == {0.0, 1 / 0.75}
    assert (dropped == dropped[:, :1]).all() and abs(dropped.mean() - 1) < 0.05
    assert torch.equal(drop.eval()(torch.ones(3, 2, 3)), torch.ones(3, 2, 3))


@pytest.mark.parametrize("training", [True, False])
def test_checkpointed_activations_give_equal_values_and_gradients(training: bool) -> None:
    results = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        stage = TransformerStage(12, 3, [0.3, 0.5], checkpoint_activations=checkpointed).double().train(training)
        tokens, places = tokens_and_places(8)
        encoded = stage(tokens.requires_grad_(), places)
        encoded.square().sum().backward()
        results.append([encoded, tokens.grad, *(parameter.grad for parameter in stage.parameters())])
    for plain, checkpointed_one in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed_one)


def test_checkpointed_activations_keep_little_for_the_backward_pass() -> None:
    kept = {}
    for checkpointed in (False, True):
        stage = TransformerStage(12, 3, [0.0] * 4, checkpoint_activations=checkpointed).double()
        tokens, places = tokens_and_places(8, 32)
        own = {parameter.data_ptr() for parameter in stage.parameters()}
        sizes: dict[int, int] = {}

        def keep(tensor: Tensor, own: set[int] = own, sizes: dict[int, int] = sizes) -> Tensor:
            if tensor.data_ptr() not in own:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            encoded = stage(tokens.requires_grad_(), places)
        assert encoded.requires_grad
        kept[checkpointed] = sum(sizes.values())
    assert kept[True] < kept[False] / 5


def test_places_are_read_in_full_precision_under_autocast() -> None:
    torch.manual_seed(0)
    position = PositionEmbedding(16)
    places = torch.randn(1, 5, 3)
    nudged = places + 1e-3  # less than bf16 can tell apart at 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert position(places).dtype == torch.bfloat16
        hidden: list[Tensor] = []
        position.inner.register_forward_hook(lambda _, inputs, output: hidden.append(output))
        position(places), position(nudged)
    assert all(each.dtype == torch.float32 for each in hidden)
    torch.testing.assert_close(hidden[0], F.linear(places, position.inner.weight, position.inner.bias))
    assert (hidden[0] != hidden[1]).all()


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match="10 wide cannot be shared out among 3 heads"):
        Attention(10, 3)
