"""Tests of models/heads.py."""

import copy

import pytest
import torch
from torch import Tensor, nn

from models.encoding import Encoding, Level, PointEncoder
from models.heads import (
    PartHead,
    Projection,
    PropagationHead,
    classification_head,
    contrastive_head,
    part_segmentation_head,
)
from models.students.dgcnn import DGCNNConfig
from models.students.pointnet import PointNetConfig
from models.students.pointnet2 import PointNet2Config


def num_parameters(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_the_whole_model_has_as_many_parameters_as_the_paper_s() -> None:
    student = PointNetConfig().build()
    head, projection = classification_head(student.pooled_dim, 40), Projection(student.per_point_dim, 512)
    assert num_parameters(student, head) == 1_045_001
    assert num_parameters(student, head, projection) == 1_570_313


def test_a_projection_is_nowhere_negative_and_normalises_over_rows() -> None:
    torch.manual_seed(0)
    projection = Projection(6, 4)
    rows = torch.randn(50, 6)
    projected = projection(rows)
    linear = rows @ projection.linear.weight.T
    expected = (linear - linear.mean(dim=0)) / (linear.var(dim=0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(projected, expected.relu())


def test_without_rows_statistics_stay_and_gradients_are_zero() -> None:
    projection = Projection(6, 4)
    assert projection.norm.running_mean is not None and projection.norm.num_batches_tracked is not None
    projection(torch.empty(0, 6)).sum().backward()
    assert projection.norm.num_batches_tracked.item() == 0 and not projection.norm.running_mean.any()
    for name, parameter in projection.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_a_single_row_is_projected_by_the_running_statistics() -> None:
    torch.manual_seed(0)
    projection, row = Projection(6, 4), torch.randn(1, 6)
    projection(torch.randn(20, 6) + 1)
    assert projection.norm.running_mean is not None
    before = projection.norm.running_mean.clone()
    projected = projection(row)
    assert torch.equal(projection.norm.running_mean, before)
    torch.testing.assert_close(projected, projection.eval()(row))


def test_part_segmentation_has_as_many_parameters_as_the_paper_s() -> None:
    student = PointNetConfig().build()
    head = part_segmentation_head(student, 16, 50)
    assert num_parameters(student, head) == 1_728_009
    assert num_parameters(student, head, Projection(student.per_point_dim, 512)) == 2_253_321


def test_crosspoint_s_image_head_has_as_many_parameters_as_the_paper_s() -> None:
    assert num_parameters(contrastive_head(2048, 512, bias=False)) == 1_180_672


def test_a_head_with_a_bias_classifies_image_features_too() -> None:
    aligned, classifier = classification_head(32, 5, 16, bias=True)
    pooled, of_images = torch.randn(4, 32), torch.randn(4, 16)
    assert (aligned(pooled) >= 0).all() and classifier(aligned(pooled)).shape == classifier(of_images).shape == (4, 5)
    assert classifier.bias is not None


def test_part_logits_are_those_of_layers_on_everything_concatenated() -> None:
    torch.manual_seed(0)
    head = PartHead(6, 8, 3, 5, widths=(7, 6, 4), category_width=2).double().eval()
    local, pooled = torch.randn(2, 9, 6).double(), torch.randn(2, 8).double()
    category = torch.tensor([2, 0])
    encoding = Encoding(torch.randn(2, 9, 4), pooled, levels=(Level(torch.randn(2, 9, 3), local),))
    assert head.category is not None
    of_cloud = torch.cat([pooled, head.category(torch.eye(3).double()[category])], dim=1)
    everything = torch.cat([local, of_cloud[:, None].expand(-1, 9, -1)], dim=2)
    torch.testing.assert_close(head(encoding, category), head.layers(head.first(everything)))


def interpolated(features: Tensor, known: Tensor, targets: Tensor) -> Tensor:
    """Weighted by inverse squared distances over the three nearest, one cloud after the other."""
    found = []
    for rows, places, wanted in zip(features, known, targets, strict=True):
        nearest = (wanted[:, None] - places[None]).square().sum(dim=2).sort(dim=1)
        weights = 1 / (nearest.values[:, :3] + 1e-8)
        weights = weights / weights.sum(dim=1, keepdim=True)
        found.append((rows[nearest.indices[:, :3]] * weights[..., None]).sum(dim=1))
    return torch.stack(found)


def test_propagation_interpolates_concatenates_and_then_applies_its_layers() -> None:
    torch.manual_seed(0)
    head = PropagationHead((3, 5, 6), 8, 4, 7, widths=((6, 5), (7, 6), (9, 8))).double()
    reference = copy.deepcopy(head)
    points = torch.randn(2, 20, 3).double()
    fine = torch.randn(2, 20, 3).double()
    middle, coarse = torch.randn(2, 9, 5).double(), torch.randn(2, 4, 6).double()
    pooled, category = torch.randn(2, 8).double(), torch.tensor([1, 3])
    levels = (Level(points, fine), Level(points[:, :9], middle), Level(points[:, :4], coarse))
    for each in (head, reference):
        each.classifier[0].p = 0.0

    first, second, third = reference.steps
    features = torch.cat([pooled[:, None].expand(-1, 4, -1), coarse], dim=2)
    features = first.layers(first.first(features))
    features = torch.cat([interpolated(features, points[:, :4], points[:, :9]), middle], dim=2)
    features = second.layers(second.first(features))
    one_hot = torch.eye(4).double()[category][:, None].expand(-1, 20, -1)
    features = torch.cat([interpolated(features, points[:, :9], points), fine, one_hot], dim=2)
    expected = reference.classifier(third.layers(third.first(features)))

    logits = head(Encoding(coarse, pooled, levels=levels), category)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)  # the distances are float32


def test_every_kind_of_encoder_gets_part_logits_for_every_point() -> None:
    torch.manual_seed(0)
    points, category = torch.randn(2, 600, 3), torch.tensor([1, 0])
    encoders: list[PointEncoder] = [
        PointNetConfig(width=0.05).build(),
        DGCNNConfig(width=0.05).build(),
        PointNet2Config(width=0.05).build(),
    ]
    for encoder in encoders:
        head = part_segmentation_head(encoder, 3, 10)
        logits = head(encoder(points), category)
        assert logits.shape == (2, 600, 10)
        logits.square().sum().backward()
        for name, parameter in [*encoder.named_parameters(), *head.named_parameters()]:
            assert parameter.grad is not None, (type(encoder).__name__, name)


def test_survivors_alone_cannot_give_every_point_a_part() -> None:
    survivors = Encoding(torch.randn(2, 4, 6), torch.randn(2, 8), indices=torch.arange(4).expand(2, 4))
    with pytest.raises(ValueError, match="level_dims"):
        PartHead(6, 8, 3, 5)(survivors, torch.tensor([0, 1]))
