"""Tests of models/point_generator.py."""

from pathlib import Path

import pytest
import torch
from torch import nn

from models.exported import load, save_exported
from models.point_generator import PointGenerator, PointGeneratorConfig

SMALL = PointGeneratorConfig(in_features=8, num_points=5)


def build(config: PointGeneratorConfig = SMALL) -> PointGenerator:
    torch.manual_seed(0)
    return config.build()


def test_the_published_generator_has_as_many_parameters_as_the_paper_s_code() -> None:
    generator = PointGeneratorConfig(in_features=512).build()
    assert sum(parameter.numel() for parameter in generator.parameters()) == 1_572_864
    assert generator(torch.rand(2, 512)).shape == (2, 1024, 3)


def test_in_eval_mode_it_is_a_linear_map() -> None:
    generator, features = build().eval(), torch.rand(3, 8)
    (weight,) = generator.parameters()
    points = generator(features)
    torch.testing.assert_close(points, (features @ weight.T).view(3, 5, 3))
    torch.testing.assert_close(generator(3 * features), 3 * points)


def test_features_are_dropped_in_training_alone() -> None:
    generator, features = build(), torch.rand(3, 8)
    assert not torch.equal(generator(features), generator(features))
    assert torch.equal(generator.eval()(features), generator(features))


def test_hidden_layers_can_be_added() -> None:
    generator = build(SMALL.model_copy(update={"hidden_widths": (16, 12), "dropout": 0.0}))
    linears = [layer for layer in generator.layers if isinstance(layer, nn.Linear)]
    assert [(each.in_features, each.out_features) for each in linears] == [(8, 16), (16, 12), (12, 15)]
    assert [each.bias is not None for each in linears] == [True, True, False]
    assert generator(torch.rand(2, 8)).shape == (2, 5, 3)


def test_it_comes_back_from_an_exported_folder_frozen(tmp_path: Path) -> None:
    generator, features = build().eval(), torch.rand(3, 8)
    described = {"kind": "point_generator", "point_generator": SMALL.model_dump(mode="json")}
    save_exported(tmp_path, described, generator, "", {})
    loaded = load(tmp_path)
    assert isinstance(loaded, PointGenerator) and not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(loaded(features), generator(features))


def test_without_a_teacher_s_width_it_cannot_be_built() -> None:
    with pytest.raises(ValueError, match="in_features is not set"):
        PointGeneratorConfig().build()
