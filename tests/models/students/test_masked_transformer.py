"""Tests of models/students/masked_transformer.py."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from models.students.masked_transformer import (
    MaskedTransformer,
    MaskedTransformerConfig,
    Scale,
    TokenEmbedding,
    padded_lengths,
    propagate_visibility,
)
from models.transformer import Block

SMALL = MaskedTransformerConfig(
    num_groups=(24, 12, 8),
    group_sizes=(6, 4, 4),
    widths=(8, 12, 16),
    embedding_widths=(6, 10),
    depths=(2, 1, 2),
    num_heads=2,
)


def cloud(b: int = 3, n: int = 60, seed: int = 0) -> Tensor:
    return torch.randn(b, n, 3, generator=torch.Generator().manual_seed(seed))


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def small(config: MaskedTransformerConfig = SMALL, seed: int = 0) -> MaskedTransformer:
    torch.manual_seed(seed)
    return config.build()


def coarse_mask(*counts: int, seed: int = 0) -> Tensor:
    """As many visible coarsest tokens in each cloud."""
    ranks = torch.rand(len(counts), 8, generator=torch.Generator().manual_seed(seed)).argsort(dim=1).argsort(dim=1)
    return ranks < torch.tensor(counts)[:, None]


def embedding_by_convolutions(embedding: TokenEmbedding, groups: Tensor) -> Tensor:
    """1x1 convolutions over [b * g, c, k], with the maximum repeated and concatenated before each member."""

    def convolution(layer: nn.Linear, features: Tensor) -> Tensor:
        return F.conv1d(features, layer.weight[..., None], layer.bias)

    def norm(layer: nn.BatchNorm1d, features: Tensor) -> Tensor:
        mean, variance = layer.running_mean, layer.running_var
        if embedding.training:
            mean, variance = features.mean(dim=(0, 2)), features.var(dim=(0, 2), unbiased=False)
        assert mean is not None and variance is not None
        features = (features - mean[:, None]) / (variance[:, None] + layer.eps).sqrt()
        return features * layer.weight[:, None] + layer.bias[:, None]

    features = groups.flatten(0, 1).transpose(1, 2)
    first, first_norm, _, second = embedding.local
    features = convolution(second, norm(first_norm, convolution(first, features)).relu())
    highest = features.amax(dim=2, keepdim=True).expand_as(features)
    features = norm(embedding.pair_norm, convolution(embedding.pair, torch.cat([highest, features], dim=1))).relu()
    return convolution(embedding.output, features).amax(dim=2).unflatten(0, groups.shape[:2])


def cut(scales: Sequence[Scale], cloud: int) -> list[Scale]:
    each = slice(cloud, cloud + 1)
    return [Scale(scale.centres[each], scale.indices[each], scale.neighbours[each]) for scale in scales]


def encoded_without_padding(
    network: MaskedTransformer, points: Tensor, scales: Sequence[Scale], visible: Sequence[Tensor]
) -> list[Tensor]:
    """One cloud in eval mode: visible tokens alone are a sequence, and blocks see nothing else."""
    before = points[0]
    results = []
    for index, scale in enumerate(scales):
        groups = before[scale.neighbours[0]]
        if index == 0:
            groups = groups - scale.centres[0][:, None]
        tokens = embedding_by_convolutions(network.token_embeddings[index], groups[None])[0]  # type: ignore[arg-type]
        mask = visible[index][0]
        kept = network.stages[index](tokens[mask][None], scale.centres[:, mask])[0]
        before = torch.zeros_like(tokens)
        before[mask] = kept
        normalised = torch.zeros_like(tokens)
        normalised[mask] = network.norms[index](kept)
        results.append(normalised)
    return results


def test_the_encoder_has_as_many_parameters_as_the_paper_s() -> None:
    network = MaskedTransformerConfig().build()
    assert num_parameters(network.norms) == 1_344
    assert num_parameters(network) == 12_653_632 + 1_344
    fine_tuned = MaskedTransformerConfig(stage_norms="last").build()
    assert num_parameters(fine_tuned) == 12_653_632 + 2 * 384


def test_three_hundred_million_parameters_are_one_line() -> None:
    with torch.device("meta"):
        network = MaskedTransformerConfig.model_validate({"width": 5, "num_heads": 12}).build()
    assert 300e6 < num_parameters(network) < 320e6
    assert (network.widths, network.pooled_dim) == ([480, 960, 1920], 1920)


def test_names_with_token_in_them_are_those_of_the_token_embeddings() -> None:
    network = small()
    named = {name for name, _ in network.named_parameters() if "token" in name}
    assert named == {f"token_embeddings.{name}" for name, _ in network.token_embeddings.named_parameters()}


def test_the_encoder_starts_as_the_paper_s() -> None:
    network = MaskedTransformerConfig(depths=(1, 1, 1)).build()
    for module in network.modules():
        if isinstance(module, nn.Linear):
            assert abs(module.weight.std().item() - 0.02) < 0.003
            assert module.bias is None or (module.bias == 0).all()


def test_paths_are_dropped_more_often_from_block_to_block_over_all_scales() -> None:
    network = MaskedTransformerConfig().build()
    rates = [module.drop_path.rate for module in network.modules() if isinstance(module, Block)]
    assert len(rates) == 15
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.1, 15))


@pytest.mark.parametrize("training", [True, False])
def test_token_embeddings_are_the_paper_s_convolutions(training: bool) -> None:
    torch.manual_seed(0)
    embedding = TokenEmbedding(3, 6, 10, 8).double().train(training)
    groups = torch.randn(2, 5, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(embedding(groups), embedding_by_convolutions(embedding, groups))


def test_scales_are_made_of_one_another() -> None:
    points = cloud()
    scales = small().group(points)
    before = points
    for scale, num_groups, group_size in zip(scales, SMALL.num_groups, SMALL.group_sizes, strict=True):
        assert scale.neighbours.shape == (3, num_groups, group_size)
        for b in range(3):
            assert len(scale.indices[b].unique()) == num_groups
            assert torch.equal(points[b, scale.indices[b]], scale.centres[b])
            members = before[b, scale.neighbours[b]]
            assert torch.equal(members[:, 0], scale.centres[b])  # a centre is its own first neighbour
            distances = torch.cdist(scale.centres[b], before[b])
            farthest = (members - scale.centres[b][:, None]).norm(dim=2).amax(dim=1)
            torch.testing.assert_close(farthest, distances.sort(dim=1).values[:, group_size - 1])
        before = scale.centres


def test_visibility_goes_to_the_neighbours_of_visible_tokens_and_to_no_others() -> None:
    scales = small().group(cloud())
    visible = propagate_visibility(scales, coarse_mask(2, 0, 8))
    assert visible[-1].sum(dim=1).tolist() == [2, 0, 8]
    for finer, coarser, scale in zip(visible, visible[1:], scales[1:], strict=False):
        for b in range(3):
            children = {child for parent in coarser[b].nonzero() for child in scale.neighbours[b, parent[0]].tolist()}
            assert set(finer[b].nonzero().flatten().tolist()) == children
    assert not any(mask[1].any() for mask in visible)


@pytest.mark.parametrize("local_radii", [None, (0.8, 1.2, 1.6)])
def test_visible_tokens_are_encoded_alike_alone_and_beside_longer_clouds(
    local_radii: tuple[float, float, float] | None,
) -> None:
    network = small(SMALL.model_copy(update={"local_radii": local_radii})).double().eval()
    points = cloud().double()
    scales = network.group(points)
    visible = propagate_visibility(scales, coarse_mask(2, 5, 1))
    assert len({mask.sum().item() for mask in visible[0]}) > 1
    together = network.encode_visible(points, scales, visible)
    for b in range(3):
        mine = [mask[b : b + 1] for mask in visible]
        alone = network.encode_visible(points[b : b + 1], cut(scales, b), mine)
        for one, all_of_them, mask in zip(alone, together, mine, strict=True):
            torch.testing.assert_close(one, all_of_them[b : b + 1])
            assert (one[~mask] == 0).all() and one.isfinite().all()
        if local_radii is None:
            literal = encoded_without_padding(network, points[b : b + 1], cut(scales, b), mine)
            for one, expected in zip(alone, literal, strict=True):
                torch.testing.assert_close(one[0], expected)


def test_what_is_masked_makes_no_difference_in_eval_mode() -> None:
    network = small().eval()
    points = cloud(1)
    scales = network.group(points)
    visible = propagate_visibility(scales, coarse_mask(2))
    seen = scales[0].neighbours[visible[0]].unique()
    hidden = torch.ones(60, dtype=torch.bool).index_fill(0, seen, False)
    assert hidden.any()
    moved = torch.where(hidden[:, None], points + 7, points)
    for before, after in zip(
        network.encode_visible(points, scales, visible), network.encode_visible(moved, scales, visible), strict=True
    ):
        torch.testing.assert_close(before, after)


def test_batch_statistics_are_those_of_all_groups_masked_ones_included() -> None:
    points = cloud()
    statistics = []
    for counts in ((8, 8, 8), (1, 2, 3)):
        network = small()
        scales = network.group(points)
        network.encode_visible(points, scales, propagate_visibility(scales, coarse_mask(*counts)))
        embedding = network.token_embeddings[0]
        assert isinstance(embedding, TokenEmbedding)
        statistics.append(embedding.pair_norm.running_mean)
    torch.testing.assert_close(*statistics)


def test_a_cloud_that_is_wholly_masked_is_all_zeros_and_harms_no_other() -> None:
    network = small()
    points = cloud()
    scales = network.group(points)
    tokens = network.encode_visible(points, scales, propagate_visibility(scales, coarse_mask(0, 3, 0)))
    sum(each.square().sum() for each in tokens).backward()  # type: ignore[union-attr]
    assert all((each[0] == 0).all() and each.isfinite().all() for each in tokens)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())


def test_as_a_student_it_sees_every_token() -> None:
    network = small().eval()
    points = cloud()
    scales = network.group(points)
    everything = [torch.ones(3, num_groups, dtype=torch.bool) for num_groups in SMALL.num_groups]
    encoding = network(points)
    tokens = network.encode_visible(points, scales, everything)[-1]
    torch.testing.assert_close(encoding.per_point, tokens)
    torch.testing.assert_close(encoding.pooled, tokens.amax(dim=1))
    assert encoding.indices is not None
    assert torch.equal(points[torch.arange(3)[:, None], encoding.indices], scales[-1].centres)


def test_fine_tuning_pools_mean_and_maximum() -> None:
    points = cloud()
    summed = small(SMALL.model_copy(update={"pooling": "mean_plus_max"})).eval()(points)
    concatenated = small(SMALL.model_copy(update={"pooling": "mean_and_max"})).eval()(points)
    tokens = summed.per_point
    mean, highest = tokens.mean(dim=1), tokens.amax(dim=1)
    torch.testing.assert_close(summed.pooled, mean + highest)
    torch.testing.assert_close(concatenated.pooled, torch.cat([mean, highest], dim=1))
    assert small(SMALL.model_copy(update={"pooling": "mean_and_max"})).pooled_dim == 32


def test_permuting_all_points_but_the_first_changes_nothing() -> None:
    network = small().eval()
    points = cloud()
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(59)])
    encoding, permuted = network(points), network(points[:, order])
    assert encoding.indices is not None and permuted.indices is not None
    torch.testing.assert_close(order[permuted.indices], encoding.indices)
    torch.testing.assert_close(permuted.per_point, encoding.per_point)


def test_a_cloud_is_encoded_alike_each_time_and_in_any_batch_in_eval_mode() -> None:
    network = small().eval()
    points = cloud()
    together = network(points).pooled
    assert torch.equal(network(points).pooled, together)
    torch.testing.assert_close(network(points[1:2]).pooled, together[1:2])
    assert network.train()(points[:1]).pooled.isfinite().all()


def test_without_any_reach_each_token_is_encoded_as_if_it_were_alone() -> None:
    network = small(SMALL.model_copy(update={"local_radii": (1e-6, 1e-6, 1e-6)})).eval()
    points = cloud(1)
    scales = network.group(points)
    centres = scales[0].centres
    groups = points[0, scales[0].neighbours[0]][None] - centres[:, :, None]
    tokens = network.token_embeddings[0](groups)
    alone = [network.stages[0](tokens[:, [token]], centres[:, [token]]) for token in range(24)]
    encoded = network.encode_visible(points, scales)[0]
    torch.testing.assert_close(encoded, network.norms[0](torch.cat(alone, dim=1)))


@pytest.mark.parametrize("stage_norms", ["every", "last"])
def test_the_gradient_reaches_every_parameter(stage_norms: str) -> None:
    network = small(SMALL.model_copy(update={"stage_norms": stage_norms}))
    encoding = network(cloud())
    (encoding.pooled * torch.randn_like(encoding.pooled)).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        unread = name.startswith(("norms.0", "norms.1"))
        assert (parameter.grad.abs().sum() > 0) is not unread, name  # what is not read has a gradient, of zero


def test_the_gradient_of_visible_tokens_reaches_every_parameter() -> None:
    network = small()
    points = cloud()
    scales = network.group(points)
    tokens = network.encode_visible(points, scales, propagate_visibility(scales, coarse_mask(2, 3, 4)))
    torch.stack([(each * torch.randn_like(each)).sum() for each in tokens]).sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_checkpointed_activations_give_equal_values_and_gradients() -> None:
    points, results = cloud(), []
    for checkpointed in (False, True):
        network = small(SMALL.model_copy(update={"checkpoint_activations": checkpointed, "drop_path": 0.5}))
        scales = network.group(points)
        tokens = network.encode_visible(points, scales, propagate_visibility(scales, coarse_mask(2, 3, 4)))
        torch.cat([each.flatten() for each in tokens]).square().sum().backward()
        results.append([*tokens, *(parameter.grad for parameter in network.parameters()), *network.buffers()])
    for plain, checkpointed_one in zip(*results, strict=True):
        assert torch.equal(plain, checkpointed_one)


def test_autocast_changes_no_place_and_stays_near() -> None:
    network = small().eval()
    points = cloud()
    scales = network.group(points)
    visible = propagate_visibility(scales, coarse_mask(2, 3, 4))
    exact = network.encode_visible(points, scales, visible)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for ours, theirs in zip(network.group(points), scales, strict=True):
            assert torch.equal(ours.neighbours, theirs.neighbours) and ours.centres.dtype == torch.float32
        rounded = network.encode_visible(points, scales, visible)
        sum(each.float().square().sum() for each in rounded).backward()  # type: ignore[union-attr]
    for one, other in zip(exact, rounded, strict=True):
        assert (one - other.float()).abs().mean() < 0.05


def test_coincident_points_have_finite_embeddings_and_gradients() -> None:
    network = small()
    network(torch.ones(2, 60, 3)).pooled.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in network.parameters())


def test_room_is_made_in_steps_of_eight_and_never_for_more_than_there_are() -> None:
    masks = [torch.arange(20).expand(2, 20) < limit for limit in (0, 8, 9, 20)]
    assert padded_lengths(masks) == [8, 8, 16, 20]


def test_a_cloud_too_small_is_refused_with_what_to_change() -> None:
    with pytest.raises(ValueError, match=r"24 groups of 6 .* points is \(1, 20, 3\): give it at least 24 points"):
        small()(cloud(1, 20))


@pytest.mark.parametrize(
    "values",
    [
        {"num_heads": 5},
        {"num_groups": (64, 256, 64)},
        {"group_sizes": (16, 8, 257)},
        {"drop_path": 1.0},
        {"widths": (96, 192)},
        {"depth": 5},
    ],
)
def test_a_config_that_makes_no_sense_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        MaskedTransformerConfig.model_validate(values)
