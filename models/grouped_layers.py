"""Shared layers on every pair of a centre and one of its neighbours, then the maximum over the neighbours.

DGCNN's edge convolutions and PointNet++'s set abstractions are this. Written as papers do, [b, c, m, k] tensors hold the
pairs of every layer several times over. What is done here gives the same numbers and gradients, and keeps far less:

- The first layer is linear in the two ends of a pair, so callers apply it to points, and a pair is a sum of two rows.
- Batch statistics run over all pairs, as they must, but pairs are made and measured block by block, in cache.
- The maximum is taken before the last normalisation and activation: neither decreases once the sign of the
  normalisation's scale is folded into the layer before it. The gradient belongs to the winner; equals share it.
- Where a neighbour list is padded with its first entry, pairs that merely repeat another are counted, not computed.
- The backward pass makes the first and the last layer's pairs again. Only what lies between them is kept.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# How many numbers of the widest layer a block holds: what stays in a core's cache, or what fills a GPU
_CPU_BLOCK: Final = 2**18
_OTHER_BLOCK: Final = 2**25


def grouped_max(
    neighbour_terms: Float[Tensor, "b n c"],
    centre_terms: Float[Tensor, "b m c"],
    indices: Int64[Tensor, "b m k"],
    norms: Iterable[nn.Module],
    linears: Iterable[nn.Module] = (),
    *,
    negative_slope: float = 0.0,
    padded: bool = False,
) -> Float[Tensor, "b m d"]:
    """For each centre i, the maximum over its neighbours j of: norm, activation, then (linear, norm, activation)...

    What enters the first norm is neighbour_terms[j] + centre_terms[i]. `negative_slope` 0 makes the activation a ReLU.
    `padded` says that rows of `indices` may end in repetitions of their first entry, as `ball_query` pads them. Terms
    stay in their own precision; under autocast the linear layers compute in less.
    """
    norms, linears = cast(list[nn.BatchNorm1d], list(norms)), cast(list[nn.Linear], list(linears))
    assert len(norms) == len(linears) + 1, "a norm follows the terms and each linear layer"
    clouds = torch.arange(len(indices), device=indices.device)[:, None, None]
    members = (indices + clouds * neighbour_terms.shape[1]).flatten(0, 1)
    neighbours, centres = neighbour_terms.flatten(0, 1), centre_terms.flatten(0, 1)
    if torch.compiler.is_compiling():
        # Inductor fuses the plain form by itself
        plain = plain_grouped_max(neighbours, centres, members, norms, linears, negative_slope)
        return plain.view(*indices.shape[:2], -1)

    weights: list[Tensor] = [linear.weight for linear in linears]
    scales: list[Tensor] = [norm.weight for norm in norms]
    signs = torch.where(scales[-1].detach() < 0, -1.0, 1.0).to(scales[-1])
    scales[-1] = scales[-1] * signs
    if weights:
        weights[-1] = weights[-1] * signs[:, None]
    else:
        neighbours, centres = neighbours * signs.to(neighbours), centres * signs.to(centres)

    widest = max(norm.num_features for norm in norms)
    order, blocks = _blocks(members, widest, padded)
    if order is not None:
        members, centres = members[order], centres[order]
    device = neighbours.device.type
    plan = _Plan(
        blocks=blocks,
        slope=negative_slope,
        epsilons=[norm.eps for norm in norms],
        running=None if norms[0].training else [_running(norm, signs if norm is norms[-1] else None) for norm in norms],
        product_dtype=torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else neighbours.dtype,
        num_pairs=indices.numel(),
        num_layers=len(norms),
    )
    pooled, *statistics = _GroupedMax.apply(
        plan, members, neighbours, centres, *scales, *(norm.bias for norm in norms), *weights
    )
    if norms[0].training:
        statistics[2 * len(norms) - 2] = statistics[2 * len(norms) - 2] * signs
        for norm, mean, variance in zip(norms, statistics[::2], statistics[1::2], strict=True):
            _update_running(norm, mean, variance, plan.num_pairs)
    if order is not None:
        pooled = pooled[order.argsort()]
    return cast(Tensor, pooled).view(*indices.shape[:2], -1)


def plain_grouped_max(
    neighbours: Float[Tensor, "p c"],
    centres: Float[Tensor, "g c"],
    members: Int64[Tensor, "g k"],
    norms: Sequence[nn.BatchNorm1d],
    linears: Sequence[nn.Linear],
    negative_slope: float,
) -> Float[Tensor, "g d"]:
    """The same in so many words: every pair of every layer is written down."""
    rows = (neighbours[members] + centres[:, None]).flatten(0, 1)
    rows = F.leaky_relu(norms[0](rows), negative_slope)
    for linear, norm in zip(linears, norms[1:], strict=True):
        rows = F.leaky_relu(norm(linear(rows)), negative_slope)
    return rows.view(*members.shape, -1).amax(dim=1)


@dataclass(frozen=True)
class _Block:
    """Groups `start` to `stop` and their first `k` members; the first member stands for `repeats` more like it."""

    start: int
    stop: int
    k: int
    repeats: int


@dataclass(frozen=True)
class _Plan:
    """What the function below needs besides tensors."""

    blocks: list[_Block]
    slope: float
    epsilons: list[float]
    running: list[tuple[Tensor, Tensor]] | None  # mean and variance of each norm; None: take them from the batch
    product_dtype: torch.dtype
    num_pairs: int
    num_layers: int


def _blocks(members: Tensor, widest: int, padded: bool) -> tuple[Tensor | None, list[_Block]]:
    """The groups cut into blocks; if padding makes them unequal, an order in which like stands beside like."""
    num_groups, k = members.shape
    budget = max(1, (_CPU_BLOCK if members.device.type == "cpu" else _OTHER_BLOCK) // widest)
    if not padded:
        step = max(1, budget // k)
        return None, [_Block(start, min(start + step, num_groups), k, 0) for start in range(0, num_groups, step)]
    counts, order = ((members != members[:, :1]).sum(dim=1) + 1).sort(stable=True)
    sizes = counts.tolist()
    blocks = []
    stop = num_groups
    while stop > 0:  # from the largest groups down: the first block's size is its last group's
        start = max(0, stop - max(1, budget // sizes[stop - 1]))
        blocks.append(_Block(start, stop, sizes[stop - 1], k - sizes[stop - 1]))
        stop = start
    return order, blocks


def _running(norm: nn.BatchNorm1d, signs: Tensor | None) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None and norm.running_var is not None, "students keep running statistics"
    return norm.running_mean if signs is None else norm.running_mean * signs, norm.running_var


@torch.no_grad()
def _update_running(norm: nn.BatchNorm1d, mean: Tensor, variance: Tensor, count: int) -> None:
    """As BatchNorm does it; the running variance is the unbiased one."""
    assert norm.running_mean is not None and norm.running_var is not None and norm.num_batches_tracked is not None
    assert norm.momentum is not None, "students have a fixed momentum"
    norm.num_batches_tracked += 1
    norm.running_mean.lerp_(mean.to(norm.running_mean), norm.momentum)
    norm.running_var.lerp_((variance * (count / max(count - 1, 1))).to(norm.running_var), norm.momentum)


class _GroupedMax(torch.autograd.Function):
    """Maxima over groups, and the mean and the variance of what entered each norm."""

    @staticmethod
    def forward(
        ctx: Any, plan: _Plan, members: Tensor, neighbours: Tensor, centres: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        pairs = _Pairs(plan, members, neighbours, centres, parameters)
        with torch.autocast(neighbours.device.type, enabled=False):
            maxima = pairs.measure_and_pool(keep=any(ctx.needs_input_grad))
            last = pairs.norms[-1]
            pooled = F.leaky_relu(last(maxima), plan.slope)
        ctx.plan, ctx.norms, ctx.kept = plan, pairs.norms, pairs.kept
        ctx.save_for_backward(members, neighbours, centres, maxima, *parameters)
        statistics = [statistic for norm in pairs.norms for statistic in (norm.mean, norm.variance)]
        ctx.mark_non_differentiable(*statistics)
        return pooled, *statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        members, neighbours, centres, maxima, *parameters = ctx.saved_tensors
        pairs = _Pairs(ctx.plan, members, neighbours, centres, parameters)
        pairs.norms, pairs.kept = ctx.norms, ctx.kept
        with torch.autocast(gradient.device.type, enabled=False):
            return None, None, *pairs.differentiate(maxima, gradient)


class _Norm:
    """A normalisation whose mean and variance are known: over channels, of whatever precedes them."""

    def __init__(self, mean: Tensor, variance: Tensor, scale: Tensor, bias: Tensor, epsilon: float) -> None:
        self.mean, self.variance = mean, variance
        self.scale, self.bias = scale.to(mean), bias.to(mean)
        self.inverse = (variance + epsilon).rsqrt()
        self.factor = self.scale * self.inverse
        self._shift = self.bias - mean * self.factor
        self._whitened_shift = -mean * self.inverse

    def __call__(self, rows: Tensor) -> Tensor:
        return torch.addcmul(self._shift, rows, self.factor)

    def whitened(self, rows: Tensor) -> Tensor:
        """Before scale and bias."""
        return torch.addcmul(self._whitened_shift, rows, self.inverse)

    def of_whitened(self, rows: Tensor) -> Tensor:
        return torch.addcmul(self.bias, rows, self.scale)


class _Pairs:
    """All pairs, made block by block: rows [groups, members, channels].

    In what follows y is what enters a norm, z what leaves the activation after it, w how often a pair counts.
    """

    def __init__(
        self, plan: _Plan, members: Tensor, neighbours: Tensor, centres: Tensor, parameters: Sequence[Tensor]
    ) -> None:
        self.plan, self.members, self.neighbours, self.centres = plan, members, neighbours, centres
        self.last = last = plan.num_layers - 1
        self.scales, self.biases = parameters[: last + 1], parameters[last + 1 : 2 * (last + 1)]
        self.weights = [weight.to(plan.product_dtype) for weight in parameters[2 * (last + 1) :]]
        self.norms: list[_Norm] = []
        self.kept: dict[tuple[int, int], Tensor] = {}  # y by layer and block, of layers between the first and the last

    def measure_and_pool(self, keep: bool) -> Tensor:
        """The maxima of the last y. Fills `norms`, and `kept` if asked or for as long as it is needed."""
        plan, last = self.plan, self.last
        maxima = self.centres.new_empty(len(self.members), len(self.biases[last]))
        if plan.running is not None:
            for layer, (mean, variance) in enumerate(plan.running):
                self._add_norm(layer, mean.to(self.centres), variance.to(self.centres))
        for layer in range(last + 1) if plan.running is None else [last]:
            moments = _Moments()
            for number, block in enumerate(plan.blocks):
                y = self._entering(layer, number, keep=keep or plan.running is None)
                if layer == last:
                    torch.amax(y, dim=1, out=maxima[block.start : block.stop])
                if plan.running is None:
                    moments.add(y, block.repeats)
            if plan.running is None:
                self._add_norm(layer, *moments.mean_and_variance())
        if not keep:
            self.kept.clear()
        return maxima

    def differentiate(self, maxima: Tensor, gradient: Tensor) -> list[Tensor]:
        """Gradients of neighbour terms, centre terms, scales, biases and weights."""
        plan, last = self.plan, self.last
        for_neighbours, for_centres = torch.zeros_like(self.neighbours), torch.empty_like(self.centres)
        for_weights = [torch.zeros_like(weight, dtype=maxima.dtype) for weight in self.weights]
        whitened = self.norms[last].whitened(maxima)
        gradient = _activation_gradient(gradient.to(maxima), self.norms[last].of_whitened(whitened), plan.slope)
        for_biases, for_scales = [gradient.sum(dim=0)], [(gradient * whitened).sum(dim=0)]
        upper: list[Tensor] = []  # of the layer at hand, by block: the gradient of what its norm returned
        for layer in range(last, -1, -1):
            norm = self.norms[layer]
            shares = gradient * norm.factor if layer == last else None
            # What batch statistics add: dy = factor (dnormed - w (mean of dnormed + whitened * mean of their product))
            from_mean = norm.factor * for_biases[0] / plan.num_pairs
            from_variance = norm.factor * for_scales[0] / plan.num_pairs
            lower: list[Tensor] = []
            sums: list[Tensor] = []
            product_sums: list[Tensor] = []
            for number, block in enumerate(plan.blocks):
                if layer > 0:
                    below = self.norms[layer - 1]
                    whitened_below = below.whitened(self._entering(layer - 1, number))
                    normed_below = below.of_whitened(whitened_below)
                    z = F.leaky_relu(normed_below, plan.slope).to(plan.product_dtype)
                if shares is not None:
                    y = self._product(z, layer) if layer > 0 else self._entering(layer, number)
                    won = (y == y.amax(dim=1, keepdim=True)).to(y.dtype)
                    dy = won.mul_((shares[block.start : block.stop] / won.sum(dim=1))[:, None])
                else:
                    y = self._entering(layer, number)
                    dy = upper[number].to(y.dtype).mul_(norm.factor)
                    upper[number] = dy
                if plan.running is None:
                    correction = torch.addcmul(from_mean, norm.whitened(y), from_variance)
                    if block.repeats:
                        correction[:, 0] *= 1 + block.repeats
                    dy -= correction
                if layer == 0:
                    torch.sum(dy, dim=1, out=for_centres[block.start : block.stop])
                    _add_rows(for_neighbours, self.members[block.start : block.stop, : block.k], dy)
                    continue
                dy = dy.to(plan.product_dtype)
                for_weights[layer - 1] += dy.flatten(0, 1).t() @ z.flatten(0, 1)
                dz = (dy @ self.weights[layer - 1]).to(y.dtype)
                dnormed = _activation_gradient(dz, normed_below, plan.slope)
                sums.append(dnormed.sum(dim=(0, 1)))
                product_sums.append(whitened_below.mul_(dnormed).sum(dim=(0, 1)))
                lower.append(dnormed.to(plan.product_dtype))
            if layer > 0:
                for_biases.insert(0, torch.stack(sums).sum(dim=0))
                for_scales.insert(0, torch.stack(product_sums).sum(dim=0))
            upper = lower
        return [for_neighbours, for_centres, *for_scales, *for_biases, *for_weights]

    def _add_norm(self, layer: int, mean: Tensor, variance: Tensor) -> None:
        self.norms.append(_Norm(mean, variance, self.scales[layer], self.biases[layer], self.plan.epsilons[layer]))

    def _entering(self, layer: int, number: int, keep: bool = False) -> Tensor:
        """The y of one layer and block."""
        block = self.plan.blocks[number]
        if layer == 0:
            rows = F.embedding(self.members[block.start : block.stop, : block.k], self.neighbours)
            return rows.add_(self.centres[block.start : block.stop, None])
        if (layer, number) in self.kept:
            return self.kept[layer, number].to(self.centres.dtype)
        normed = self.norms[layer - 1](self._entering(layer - 1, number, keep))
        y = F.leaky_relu_(normed, self.plan.slope).to(self.plan.product_dtype) @ self.weights[layer - 1].t()
        if keep and layer < self.last:
            self.kept[layer, number] = y
        return y.to(self.centres.dtype)

    def _product(self, z: Tensor, layer: int) -> Tensor:
        return (z @ self.weights[layer - 1].t()).to(self.centres.dtype)


class _Moments:
    """Mean and variance of rows that come block by block."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.means: list[Tensor] = []
        self.squares: list[Tensor] = []  # of differences from the block's own mean, summed

    def add(self, rows: Tensor, repeats: int) -> None:
        """Rows [groups, members, channels], each group's first one `repeats` times more."""
        count = rows.shape[0] * (rows.shape[1] + repeats)
        total = rows.sum(dim=(0, 1))
        if repeats:
            total += repeats * rows[:, 0].sum(dim=0)
        mean = total / count
        squares = (rows - mean).square_()
        summed = squares.sum(dim=(0, 1))
        if repeats:
            summed += repeats * squares[:, 0].sum(dim=0)
        self.counts.append(count)
        self.means.append(mean)
        self.squares.append(summed)

    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        """Over all rows; the biased variance."""
        means = torch.stack(self.means)
        counts = torch.tensor(self.counts, dtype=means.dtype, device=means.device)
        shares = (counts / counts.sum())[:, None]
        mean = (shares * means).sum(dim=0)
        variance = torch.stack(self.squares).sum(dim=0) / counts.sum() + (shares * (means - mean).square()).sum(dim=0)
        return mean, variance


def _activation_gradient(gradient: Tensor, before: Tensor, slope: float) -> Tensor:
    """The gradient of what entered a leaky ReLU."""
    entering: Tensor = torch.ops.aten.leaky_relu_backward(gradient, before, slope, False)
    return entering


def _add_rows(total: Tensor, rows: Tensor, values: Tensor) -> None:
    """Adds values to the rows of `total` that they name, in one order each time."""
    if total.device.type == "cpu":
        total.index_add_(0, rows.flatten(), values.flatten(0, 1))
    else:  # index_add_ would add in any order there
        total += torch.ops.aten.embedding_dense_backward(values, rows, len(total), -1, False)
