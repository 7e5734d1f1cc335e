"""Tests of models/exported.py and of the names that the package offers."""

import json
from pathlib import Path

import pytest
import torch

import models
from models.exported import ExportedEncoder, load, save_exported, to_unit_ball
from models.image_models.multi_view import MultiViewClassifier, MultiViewClassifierConfig

STUDENT = {"kind": "student", "student": {"kind": "pointnet", "width": 0.125}}


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    student = models.build_student(STUDENT["student"])  # type: ignore[arg-type]
    student(torch.randn(8, 32, 3))  # statistics that are not those of a new network
    save_exported(tmp_path / "model", STUDENT, student, "# A card\n", {"job": "pointmcd", "versions": {"torch": "2"}})
    return tmp_path / "model"


def test_a_student_comes_back_with_its_weights_in_eval_mode(exported: Path) -> None:
    encoder = models.load(exported)
    assert isinstance(encoder, ExportedEncoder)
    assert encoder.description["job"] == "pointmcd" and (exported / "README.md").read_text() == "# A card\n"
    assert not encoder.network.training
    points = torch.randn(5, 40, 3)
    features = encoder.encode(points)
    assert features.shape == (5, 128) and not features.requires_grad
    torch.testing.assert_close(features, encoder.network(to_unit_ball(points)).pooled)
    torch.testing.assert_close(encoder.encode(points, batch_size=2), features)


def test_clouds_may_lie_anywhere_and_have_any_size_and_number_of_points(exported: Path) -> None:
    encoder = load(exported)
    assert isinstance(encoder, ExportedEncoder)
    points = torch.randn(3, 20, 3)
    torch.testing.assert_close(encoder.encode(7 * points + 3), encoder.encode(points), rtol=1e-3, atol=1e-4)
    assert encoder.encode(points[:, :1]).shape == (3, 128)
    assert encoder.encode(points.double()[:0]).shape == (0, 128)


def test_the_unit_ball_touches_the_farthest_point() -> None:
    ball = to_unit_ball(torch.randn(4, 30, 3) * 5 + 2)
    torch.testing.assert_close(ball.norm(dim=2).amax(dim=1), torch.ones(4))
    torch.testing.assert_close(ball.amax(dim=1), -ball.amin(dim=1))
    assert torch.isfinite(to_unit_ball(torch.ones(1, 5, 3))).all()


def test_a_classifier_comes_back_without_the_file_it_once_started_from(tmp_path: Path) -> None:
    trunk = {"name": "test_resnet", "image_size": 32}
    torch.manual_seed(0)
    network = MultiViewClassifierConfig.model_validate({"trunk": trunk, "num_classes": 3}).build().eval()
    described = {
        "kind": "image_model",
        "image_model": {"kind": "multi_view_classifier", "trunk": trunk | {"weights": "gone.pth"}, "num_classes": 3},
    }
    save_exported(tmp_path, described, network, "", {})
    loaded = load(tmp_path)
    assert isinstance(loaded, MultiViewClassifier) and not loaded.training
    images = torch.randint(0, 256, (2, 2, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(loaded.describe(images), network.describe(images))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"not an exported model: it has no model\.json"):
        load(tmp_path)


def test_a_model_of_an_unknown_kind_is_refused(exported: Path) -> None:
    (exported / "model.json").write_text(json.dumps({"kind": "mesh"}))
    with pytest.raises(ValueError, match="does not understand"):
        load(exported)


def test_weights_that_do_not_fit_are_refused(exported: Path) -> None:
    (exported / "model.json").write_text(json.dumps({"kind": "student", "student": {"kind": "pointnet"}}))
    with pytest.raises(ValueError, match="does not understand"):
        load(exported)


def test_a_config_that_could_not_be_loaded_again_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="student"):
        save_exported(tmp_path / "model", {"kind": "student"}, torch.nn.Linear(1, 1), "", {})
    assert not (tmp_path / "model").exists()


def test_the_package_offers_two_names_and_no_others() -> None:
    assert models.load is load
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        models.train  # noqa: B018
