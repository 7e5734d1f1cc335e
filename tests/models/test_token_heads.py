"""Tests of models/token_heads.py."""

import pytest
import torch
from torch import Tensor, nn

from models.students.masked_transformer import MaskedTransformer, MaskedTransformerConfig
from models.token_heads import TokenPartHead, token_classifier

SMALL = MaskedTransformerConfig(
    num_groups=(24, 12, 8),
    group_sizes=(6, 4, 4),
    widths=(8, 12, 16),
    embedding_widths=(6, 10),
    depths=(1, 1, 1),
    num_heads=2,
)


def cloud(b: int = 2, n: int = 60) -> Tensor:
    return torch.randn(b, n, 3, generator=torch.Generator().manual_seed(0))


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def small_segmentation() -> tuple[MaskedTransformer, TokenPartHead]:
    torch.manual_seed(0)
    encoder = SMALL.build()
    head = TokenPartHead(encoder.level_dims, 3, 7, point_widths=(20, 10), category_width=5, widths=(12, 10, 8))
    return encoder, head


@pytest.mark.parametrize(
    ("pooling", "num_classes", "total"), [("mean_and_max", 15, 12_921_935), ("mean_plus_max", 40, 12_830_056)]
)
def test_the_fine_tuned_classifier_has_as_many_parameters_as_the_paper_s(
    pooling: str, num_classes: int, total: int
) -> None:
    config = MaskedTransformerConfig.model_validate({"pooling": pooling, "stage_norms": "last"})
    encoder = config.build()
    assert num_parameters(encoder) + num_parameters(token_classifier(encoder.pooled_dim, num_classes)) == total


def test_part_segmentation_has_the_paper_s_widths() -> None:
    with torch.device("meta"):
        head = TokenPartHead(MaskedTransformerConfig().build().level_dims)
    shapes = {name: tuple(parameter.shape) for name, parameter in head.named_parameters()}
    assert [shapes[f"interpolated.{scale}.0.weight"] for scale in range(3)] == [(1536, 99), (1536, 195), (1536, 387)]
    assert shapes["interpolated.0.3.weight"] == (1024, 1536)
    assert shapes["first.weight"] == (1024, 6208)
    assert [shapes[f"layers.{index}.weight"] for index in (3, 6, 9)] == [(512, 1024), (256, 512), (50, 256)]


def test_part_logits_are_the_paper_s_formula() -> None:
    encoder, head = small_segmentation()
    encoder.double().eval(), head.double().eval()
    encoding = encoder(cloud().double())
    category = torch.tensor([2, 0])
    points = encoding.levels[0].points
    per_scale = []
    for level, layers in zip(encoding.levels[1:], head.interpolated, strict=True):
        squared = torch.cdist(points, level.points).square()
        nearest = squared.topk(3, largest=False)
        weights = 1 / (nearest.values + 1e-8)
        weights = weights / weights.sum(dim=2, keepdim=True)
        members = level.features[torch.arange(2)[:, None, None], nearest.indices]
        between = (weights[..., None] * members).sum(dim=2)
        per_scale.append(layers(torch.cat([between, points], dim=2)))
    of_points = torch.cat(per_scale, dim=2)
    of_cloud = of_points.amax(dim=1) + of_points.mean(dim=1)
    of_category = head.category(torch.eye(3, dtype=torch.float64)[category])
    side_by_side = torch.cat([of_points, torch.cat([of_cloud, of_category], dim=1)[:, None].expand(-1, 60, -1)], dim=2)
    # Interpolation weights are float32, as all geometry
    torch.testing.assert_close(head(encoding, category), head.layers(head.first(side_by_side)), rtol=1e-4, atol=1e-5)


def test_permuting_all_points_but_the_first_permutes_the_labels() -> None:
    encoder, head = small_segmentation()
    encoder.eval(), head.eval()
    points, category = cloud(), torch.tensor([1, 1])
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(59)])
    logits = head(encoder(points), category)
    assert logits.shape == (2, 60, 7)
    torch.testing.assert_close(head(encoder(points[:, order]), category), logits[:, order])


def test_the_gradient_reaches_every_parameter_of_encoder_and_head() -> None:
    encoder, head = small_segmentation()
    logits = head(encoder(cloud(3)), torch.tensor([0, 1, 2]))
    (logits * torch.randn_like(logits)).sum().backward()
    for network in (encoder, head):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
