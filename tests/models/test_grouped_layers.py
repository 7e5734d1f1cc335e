"""Tests of models/grouped_layers.py against the same layers written as papers write them."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import grouped_layers
from models.grouped_layers import grouped_max, plain_grouped_max

Layers = tuple[nn.ModuleList, nn.ModuleList]  # norms, and the linear layers between them


def layers(*widths: int, dtype: torch.dtype = torch.float64) -> Layers:
    """Random ones, with scales of both signs."""
    norms = nn.ModuleList(nn.BatchNorm1d(width) for width in widths)
    for norm in norms:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    linears = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(widths))
    return norms.to(dtype), linears.to(dtype)


def terms(width: int, b: int = 2, n: int = 9, m: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(b, each, width, dtype=dtype, requires_grad=True) for each in (n, m))


def as_convolutions(
    neighbours: Tensor, centres: Tensor, indices: Tensor, norms: nn.ModuleList, linears: nn.ModuleList, slope: float
) -> Tensor:
    """[b, c, m, k] tensors, 1x1 convolutions, the maximum at the end."""
    gathered = torch.stack([cloud[index] for cloud, index in zip(neighbours, indices, strict=True)])
    features = (gathered + centres[:, :, None]).permute(0, 3, 1, 2)
    for number, norm in enumerate(norms):
        if number > 0:
            features = F.conv2d(features, linears[number - 1].weight[:, :, None, None])
        features = F.batch_norm(
            features, norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.training, norm.momentum
        )
        features = F.leaky_relu(features, slope)
    return features.amax(dim=3).transpose(1, 2)


def outcome(pooled: Tensor, inputs: tuple[Tensor, ...], modules: Layers) -> dict[str, Tensor]:
    """The result, running statistics, and every gradient of an arbitrary function of the result."""
    weights = torch.randn(pooled.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(
        pooled.dtype
    )
    parameters = [*inputs, *(parameter for module in modules for parameter in module.parameters())]
    gradients = torch.autograd.grad((pooled * weights).sum(), parameters)
    found = {"pooled": pooled, **{f"gradient {number}": gradient for number, gradient in enumerate(gradients)}}
    return found | {name: buffer for name, buffer in modules[0].named_buffers() if "num_batches" not in name}


def padded_indices(b: int, n: int, m: int, k: int) -> Tensor:
    """As ball_query returns them: some distinct points, then the first of them again."""
    indices = torch.stack([torch.randperm(n)[:k].sort().values for _ in range(b * m)]).view(b, m, k)
    counts = torch.randint(1, k + 1, (b, m, 1))
    return torch.where(torch.arange(k) < counts, indices, indices[..., :1])


@pytest.fixture(autouse=True)
def _seeded_and_in_small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(grouped_layers, "_CPU_BLOCK", 60)  # so that clouds are cut into several blocks


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("widths", "slope", "padded"),
    [((5,), 0.2, False), ((5,), 0.2, True), ((5, 6), 0.2, False), ((3, 4, 5), 0.0, True), ((3, 4, 4, 6), 0.2, True)],
)
def test_it_equals_the_convolutions(training: bool, widths: tuple[int, ...], slope: float, padded: bool) -> None:
    fast = layers(*widths)
    slow = copy.deepcopy(fast)
    for norms, _ in (fast, slow):
        norms.train(training)
    inputs = terms(widths[0])
    indices = padded_indices(2, 9, 7, 4) if padded else torch.rand(2, 7, 9).argsort(dim=-1)[..., :4]

    pooled = grouped_max(*inputs, indices, *fast, negative_slope=slope, padded=padded)
    expected = outcome(as_convolutions(*inputs, indices, *slow, slope), inputs, slow)
    for name, value in outcome(pooled, inputs, fast).items():
        torch.testing.assert_close(value, expected[name], msg=lambda text, name=name: f"{name}: {text}")
    assert all(norm.num_batches_tracked == int(training) for norm in fast[0])


def test_what_torch_compile_gets_is_the_same() -> None:
    fast = layers(4, 5, 3)
    slow = copy.deepcopy(fast)
    inputs, indices = terms(4), padded_indices(2, 9, 7, 4)
    found = outcome(grouped_max(*inputs, indices, *fast, padded=True), inputs, fast)
    members = (indices + 9 * torch.arange(2)[:, None, None]).flatten(0, 1)
    plain = plain_grouped_max(
        inputs[0].flatten(0, 1), inputs[1].flatten(0, 1), members, list(slow[0]), list(slow[1]), 0.0
    )
    for name, value in outcome(plain.view(2, 7, 3), inputs, slow).items():
        torch.testing.assert_close(found[name], value)


def test_neighbours_with_equal_terms_share_the_gradient() -> None:
    norms, linears = layers(4, 5)
    neighbours, centres = terms(4)
    equal = neighbours.detach()[:, :1].repeat(1, 9, 1).requires_grad_()
    indices = torch.arange(3).expand(2, 7, 3)
    grouped_max(equal, centres, indices, norms, linears).square().sum().backward()
    assert equal.grad is not None and (equal.grad[:, :3] != 0).any() and (equal.grad[:, 3:] == 0).all()
    torch.testing.assert_close(equal.grad[:, :3], equal.grad[:, :1].expand(-1, 3, -1))


def test_statistics_are_exact_where_the_mean_is_large() -> None:
    norm = nn.BatchNorm1d(3, momentum=1.0)
    neighbours, centres = terms(3, dtype=torch.float32)
    indices = torch.arange(9).expand(2, 7, 9)
    grouped_max(neighbours + 1000, centres, indices, [norm])
    pairs = (neighbours + 1000).double()[:, None] + centres.double()[:, :, None]
    variance, mean = torch.var_mean(pairs, dim=(0, 1, 2))
    torch.testing.assert_close(norm.running_mean, mean.float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(norm.running_var, variance.float(), rtol=1e-4, atol=0)


def test_under_autocast_products_are_bfloat16_and_terms_are_not() -> None:
    modules = layers(8, 8, 8, dtype=torch.float32)
    inputs, indices = terms(8, dtype=torch.float32), padded_indices(2, 9, 7, 4)
    exact = outcome(grouped_max(*inputs, indices, *modules, padded=True), inputs, modules)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = grouped_max(*inputs, indices, *modules, padded=True)
    assert pooled.dtype == torch.float32
    rounded = outcome(pooled, inputs, modules)
    assert not torch.equal(rounded["pooled"], exact["pooled"])
    for name in ("pooled", "gradient 0", "gradient 1"):
        assert F.cosine_similarity(rounded[name].flatten(), exact[name].flatten(), dim=0) > 0.97, name

    one, _ = layers(8, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with_autocast = grouped_max(*inputs, indices, one.eval())
    assert torch.equal(with_autocast, grouped_max(*inputs, indices, one))


def test_repeated_runs_agree_to_the_bit() -> None:
    modules = layers(8, 8, dtype=torch.float32)
    inputs, indices = terms(8, dtype=torch.float32), padded_indices(2, 9, 7, 4)
    modules[0].eval()
    first, second = (outcome(grouped_max(*inputs, indices, *modules, padded=True), inputs, modules) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_frozen_layers_pass_gradients_on() -> None:
    norms, linears = layers(4, 5)
    norms.requires_grad_(False)
    linears.requires_grad_(False)
    inputs = terms(4)
    grouped_max(*inputs, padded_indices(2, 9, 7, 4), norms, linears, padded=True).sum().backward()
    assert all(each.grad is not None and each.grad.any() for each in inputs)
    assert all(parameter.grad is None for module in (norms, linears) for parameter in module.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("padded", [False, True])
def test_cuda_gives_the_same(padded: bool) -> None:
    modules = layers(4, 5, 6)
    on_cuda = tuple(copy.deepcopy(module).cuda() for module in modules)
    inputs, indices = terms(4), padded_indices(2, 9, 7, 4)
    moved = tuple(each.detach().cuda().requires_grad_() for each in inputs)
    expected = grouped_max(*inputs, indices, *modules, padded=padded)
    found = grouped_max(*moved, indices.cuda(), *on_cuda, padded=padded)
    torch.testing.assert_close(found.cpu(), expected)
    expected.square().sum().backward()
    found.square().sum().backward()
    for each, other in zip(inputs, moved, strict=True):
        assert other.grad is not None
        torch.testing.assert_close(other.grad.cpu(), each.grad)
