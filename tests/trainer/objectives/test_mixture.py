"""Tests of trainer/objectives/mixture.py."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from datastore.errors import AskedWrongly
from datastore.layout import Store
from launcher.runs import is_same_training, pinned
from models.students import build_student
from tests.runs import tiny_config, train
from tests.trainer.objectives.cases.case import CORPUS
from tests.trainer.objectives.cases.mixture import PARTS, hard_batch
from trainer.config import RunConfig, read_config
from trainer.encoders import find_encoder
from trainer.objectives.mixture import Mixture, MixtureConfig

STUDENT = {"kind": "pointnet", "width": 0.125}


def make_objective(parts: dict[str, Any], seed: int = 0) -> Mixture:
    torch.manual_seed(seed)
    student = build_student(STUDENT)
    return MixtureConfig.model_validate({"parts": parts}).build(student, CORPUS)


def read(objective: Any) -> Any:
    whole, names = hard_batch(), ("ids", "seeds", *objective.batch_type.store_fields())
    return objective.batch_type(**{name: getattr(whole, name) for name in names})


def config_with(parts: dict[str, Any], **changes: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "job": "mixed",
            "objective": {"kind": "mixture", "parts": parts, **changes},
            "student": STUDENT,
            "steps": 1,
            "global_batch": 8,
        }
    )


def test_terms_are_those_of_the_parts_times_their_weights() -> None:
    objective = make_objective(PARTS).eval()
    terms = objective(read(objective))
    assert set(objective.batch_type.store_fields()) == {"points", "views", "visibility", "label", "view_features"}
    assert list(terms) == [
        "contrast/intra_modal", "contrast/cross_modal", "distil/task", "distil/alignment", "distil/transform_penalty",
    ]  # fmt: skip
    for name, part in objective.parts.items():
        for term, value in part(read(part)).items():
            torch.testing.assert_close(terms[f"{name}/{term}"], objective.weights[name] * value)


def test_the_parts_share_one_student_whose_weights_are_there_once() -> None:
    objective = make_objective(PARTS)
    assert all(part.encoder is objective.encoder for part in objective.parts.values())  # type: ignore[union-attr]
    names = [name for name, _ in objective.named_parameters()]
    assert sum("stem.0.weight" in name for name in names) == 1
    assert "student.stem.0.weight" in names
    alone = build_student(STUDENT)
    torch.manual_seed(0)
    alone = build_student(STUDENT)
    for name, parameter in alone.named_parameters():
        assert torch.equal(parameter, objective.get_parameter(f"student.{name}")), f"{name} starts elsewhere"


def test_the_gradient_is_the_sum_of_the_parts() -> None:
    objective = make_objective(PARTS).eval()

    def gradient(prefix: str) -> torch.Tensor:
        objective.zero_grad()
        terms = [value for name, value in objective(read(objective)).items() if name.startswith(prefix)]
        torch.stack(terms).sum().backward()  # type: ignore[no-untyped-call]
        found = next(iter(objective.student.parameters())).grad
        assert found is not None
        return found.clone()

    torch.testing.assert_close(gradient(""), gradient("contrast") + gradient("distil"))


def test_a_part_without_weight_is_not_built_and_reads_nothing() -> None:
    objective = make_objective(PARTS | {"contrast": PARTS["contrast"] | {"weight": 0}})
    assert list(objective.parts) == ["distil"]
    assert "views" not in objective.batch_type.store_fields()
    assert not objective.compares_samples and make_objective(PARTS).compares_samples


def test_views_are_drawn_where_no_part_needs_all() -> None:
    labels = {"objective": {"kind": "supervised"}}
    assert make_objective({"contrast": PARTS["contrast"], "labels": labels}).batch_type.views_drawn == 1
    assert make_objective(PARTS).batch_type.views_drawn is None  # visibility and teacher features of all views
    assert make_objective({"labels": labels}).batch_type.views_drawn is None


def test_the_teacher_is_the_parts_and_a_run_is_bound_to_its_weights() -> None:
    config = config_with(PARTS)
    assert isinstance(config.objective, MixtureConfig)
    assert config.objective.teacher == "teacher" and config.objective.teacher_fields == ("view_features",)
    bound = pinned(config, "teacher@feedc0de0001")
    assert is_same_training(bound, config)
    again = read_config(bound.to_yaml(), name="copy")
    assert again == bound and getattr(again.objective, "teacher", None) == "teacher@feedc0de0001"
    alone = config_with({"contrast": PARTS["contrast"]}).objective
    assert isinstance(alone, MixtureConfig) and alone.teacher is None and alone.teacher_fields == ()


def test_a_part_that_needs_a_certain_student_says_so_for_the_mixture() -> None:
    masked = {"kind": "i2p_mae", "teacher_mode": "cached", "teacher": "teacher"}
    mixture = MixtureConfig.model_validate({"parts": PARTS | {"masked": {"objective": masked}}})
    assert mixture.student_kinds == ("masked_transformer",)
    assert set(mixture.teacher_fields) == {"view_features", "view_tokens", "view_saliency", "view_pixels"}
    assert MixtureConfig.model_validate({"parts": PARTS}).student_kinds is None


def test_a_mixture_trains_and_its_encoder_is_found_again(tiny_corpus: Store, tmp_path: Path) -> None:
    tiny = {"kind": "crosspoint", "image_trunk": {"name": "test_resnet", "image_size": 48}}
    parts = {"contrast": {"objective": tiny}, "distil": PARTS["distil"]}
    config = tiny_config(tiny_corpus.url, objective={"kind": "mixture", "parts": parts}, steps=1)
    run = train(config, str(tmp_path / "run"))
    assert {name.partition("/")[0] for name in run.metrics()[0]["terms"]} == {"contrast", "distil"}
    found, exported = find_encoder(run.url), find_encoder(run.export_url)
    points = torch.randn(2, 16, 3)
    assert torch.equal(found.encoder(points).pooled, exported.encoder(points).pooled)


def test_parts_that_do_not_go_together_are_refused() -> None:
    other = {"objective": {"kind": "pointmcd", "teacher": "other"}}
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, "at least 1 item"),
        ({"a": PARTS["distil"] | {"weight": 0}}, "all parts weigh 0"),
        ({"a": PARTS["distil"], "b": other}, "'a' reads teacher, 'b' reads other"),
        (
            {"a": {"objective": {"kind": "mixture", "parts": PARTS}}},
            "'mixture' found using 'kind' does not match any",
        ),
        ({"a/b": PARTS["distil"]}, "should match pattern"),
        (
            {"a": {"objective": {"kind": "view_classifier", "image_model": {"trunk": {"name": "x", "image_size": 8}}}}},
            "'a' is a view_classifier, which trains a network of its own",
        ),
    ]
    for parts, message in wrong:
        with pytest.raises(ValidationError, match=message):
            MixtureConfig.model_validate({"parts": parts})
    with pytest.raises(ValidationError, match="teacher is other, but the parts read teacher"):
        MixtureConfig.model_validate({"parts": PARTS, "teacher": "other"})


def test_a_misspelt_key_of_a_part_is_answered_with_its_place_and_the_nearest_one() -> None:
    text = config_with(PARTS).to_yaml()
    with pytest.raises(
        AskedWrongly, match=r"'objective.parts.contrast.objective.temprature'. Did you mean 'temperature'"
    ) as caught:
        read_config(text, name="x", assignments=["objective.parts.contrast.objective.temprature=1"])
    assert "default" not in str(caught.value)
    with pytest.raises(AskedWrongly, match=r"'objective.parts.contrast.wieght'. Did you mean 'weight'"):
        read_config(text, name="x", assignments=["objective.parts.contrast.wieght=1"])
    halved = read_config(text, name="x", assignments=["objective.parts.contrast.weight=0.25"])
    assert isinstance(halved.objective, MixtureConfig) and halved.objective.parts["contrast"].weight == 0.25
