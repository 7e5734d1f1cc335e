"""The evaluate stage: what it fits on, what it writes down, and where."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from sklearn.svm import SVC

from datastore.errors import AskedWrongly
from datastore.layout import Store, open_store
from tests.runs import STEPS, tiny_config, train, write_corpus
from trainer import evaluate
from trainer.distributed import World
from trainer.encoders import find_encoder
from trainer.evaluate import EvaluationConfig, add_arguments, describe, judge, run
from trainer.evaluate.features import ShapeFeatures, extract_features
from trainer.evaluate.linear_svm import PROTOCOLS
from trainer.runfolder import RunFolder


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def evaluated(run_url: str, store: Store, *words: str, protocol: str = "svm@crosspoint") -> int:
    return run(arguments(run_url, "--protocol", protocol, "--data", store.url, *words))


@pytest.fixture
def own_run(tiny_run: RunFolder, tmp_path: Path) -> RunFolder:
    """The tiny run with an evaluation folder of its own."""
    for name in ("config.yaml", "checkpoints", "export"):
        (tmp_path / name).symlink_to(Path(tiny_run.url) / name)
    return RunFolder(str(tmp_path))


def test_a_record_says_everything_that_made_the_number(
    own_run: RunFolder, tiny_corpus: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluated(own_run.url, tiny_corpus, "--json", protocol="svm@heldout") == 0
    printed = json.loads(capsys.readouterr().out)
    record = own_run.records()["svm@heldout"]
    assert printed == record
    assert record["protocol"] == "svm@heldout"
    assert record["num_train"] == sum(tiny_corpus.read("label", tiny_corpus.rows("train")) >= 0)
    assert record["num_test"] == sum(tiny_corpus.read("label", tiny_corpus.rows("test")) >= 0)
    assert np.array(record["confusion"]).sum() == record["num_test"]
    hits = sum(record["confusion"][label][label] for label in range(3))
    assert record["accuracy"] == pytest.approx(hits / record["num_test"])
    assert set(record["per_class_accuracy"]) == {"chair", "table", "lamp"} == set(record["class_names"])
    assert record["c"] in [entry["c"] for entry in record["grid"]] and len(record["grid"]) == 13
    assert record["settings"]["solver_parameters"]["kernel"] == "linear"
    assert record["feature_dim"] == 64 and record["num_points"] == 16 and record["seed"] == 3
    assert record["checkpoint"]["step"] == STEPS and not record["checkpoint"]["is_random"]
    assert record["checkpoint"]["config_hash"] == own_run.config().hash()
    assert record["store"]["source_hash"] == "0123456789abcdef" and record["store"]["manifest"] == 2
    assert record["store"]["teacher"]["key"] == "teacher@feedc0de"
    assert record["versions"]["torch"] and record["machine"]["cores"] >= 1
    assert record["seconds"]["features"] > 0 and record["time"] > 1.7e9


def test_splits_are_counted_and_not_declared(own_run: RunFolder, tiny_corpus: Store) -> None:
    evaluated(own_run.url, tiny_corpus)
    splits = own_run.records()["svm@crosspoint"]["splits"]
    assert splits["shared_rows"] == splits["shared_names"] == splits["equal_clouds"] == 0
    assert (splits["trained_on"], splits["seen_in_training"]) == ("train", 0)
    assert (splits["teacher_trained_on"], splits["seen_by_teacher"]) == ("train", 0)
    assert splits["unlabelled_test_rows"] > 0


def test_training_on_test_shapes_is_found_out(tmp_path: Path) -> None:
    store = write_corpus(str(tmp_path / "store.zarr"))
    cheating = train(tiny_config(store.url, data={"store_url": store.url, "split": "test"}), str(tmp_path / "run"))
    evaluated(cheating.url, store)
    record = cheating.records()["svm@crosspoint"]
    assert record["splits"]["trained_on"] == "test"
    assert record["splits"]["seen_in_training"] == record["num_test"] > 0


def test_what_another_store_saw_is_not_guessed(own_run: RunFolder, tmp_path: Path) -> None:
    other = write_corpus(str(tmp_path / "other.zarr"), source_hash="ffff")
    evaluated(own_run.url, other)
    splits = own_run.records()["svm@crosspoint"]["splits"]
    assert splits["seen_in_training"] is None
    assert splits["seen_by_teacher"] == 0, "the other store's teacher says itself what it was trained on"


def test_random_weights_have_a_record_of_their_own(own_run: RunFolder, tiny_corpus: Store) -> None:
    evaluated(own_run.url, tiny_corpus)
    evaluated(own_run.url, tiny_corpus, "--random-weights")
    records = own_run.records()
    assert set(records) == {"svm@crosspoint", "svm@crosspoint.random_weights"}
    random = records["svm@crosspoint.random_weights"]
    assert random["checkpoint"]["is_random"] and random["checkpoint"]["step"] is None
    assert random["splits"]["seen_in_training"] == 0
    assert random["num_test"] == records["svm@crosspoint"]["num_test"]


def test_other_checkpoints_and_labels_do_not_replace_the_run_s_record(own_run: RunFolder, tiny_corpus: Store) -> None:
    evaluated(f"{own_run.checkpoints_url}/step-00000002", tiny_corpus)
    evaluated(own_run.url, tiny_corpus, "--record", "again")
    assert set(own_run.records()) == {"svm@crosspoint.step-2", "svm@crosspoint.again"}


def test_an_exported_folder_scores_as_its_run_does(own_run: RunFolder, tiny_corpus: Store, tmp_path: Path) -> None:
    import shutil

    evaluated(own_run.url, tiny_corpus)
    shutil.copytree(own_run.export_url, tmp_path / "exported")
    evaluated(str(tmp_path / "exported"), tiny_corpus)
    record = json.loads((tmp_path / "exported" / "evaluation" / "svm@crosspoint.json").read_text())
    of_run = own_run.records()["svm@crosspoint"]
    for key in ("accuracy", "confusion", "seed", "num_points", "splits"):
        assert record[key] == of_run[key]


def test_repeating_an_evaluation_repeats_it(own_run: RunFolder, tiny_corpus: Store) -> None:
    evaluated(own_run.url, tiny_corpus, protocol="svm@heldout")
    first = own_run.records()["svm@heldout"]
    evaluated(own_run.url, tiny_corpus, protocol="svm@heldout")
    second = own_run.records()["svm@heldout"]
    assert {key for key in first if first[key] != second[key]} <= {"time", "seconds"}


def test_the_score_is_that_of_scikit_learn_used_directly(own_run: RunFolder, tiny_corpus: Store) -> None:
    evaluated(own_run.url, tiny_corpus)
    encoder: Any = find_encoder(own_run.url).encoder
    shapes = extract_features(
        encoder, tiny_corpus, ("train", "test"), num_points=16, device=torch.device("cpu"), world=World()
    )
    reference = SVC(kernel="linear", C=0.01).fit(shapes["train"].values, shapes["train"].labels)
    expected = reference.score(shapes["test"].values, shapes["test"].labels)
    assert own_run.records()["svm@crosspoint"]["accuracy"] == pytest.approx(expected)


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_no_test_row_touches_the_fit_or_the_choice_of_c(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)

    def shapes(count: int, fill: float | None = None) -> ShapeFeatures:
        labels = np.arange(count) % 3
        values = (labels[:, None] + generator.normal(size=(count, 4))).astype(np.float32)
        values = values if fill is None else np.full_like(values, fill)
        return ShapeFeatures(np.arange(count), labels, values, ("",) * count)

    train_shapes = shapes(60)
    fitted: list[Any] = []
    fit = evaluate.fit

    def watched(*given: Any) -> Any:
        assert not any(isinstance(each, np.ndarray) and len(each) == 15 for each in given)
        fitted.append(fit(*given))
        return fitted[-1]

    monkeypatch.setattr(evaluate, "fit", watched)
    for fill in (0.0, 1e6):  # whatever the test rows hold, the classifier and the choice are the same
        judge(name, PROTOCOLS[name], train_shapes, shapes(15, fill), ("a", "b", "c"), seed=0)
    one, other = fitted
    assert (one.c, one.grid) == (other.c, other.grid)
    np.testing.assert_array_equal(one.classifier.coef_, other.classifier.coef_)


def test_a_record_reads_well(own_run: RunFolder, tiny_corpus: Store, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated(own_run.url, tiny_corpus)
    text = capsys.readouterr().out
    record = own_run.records()["svm@crosspoint"]
    assert text == describe(record) + "\n"
    assert f"{100 * record['accuracy']:.1f} % of {record['num_test']} test shapes" in text and "C = 0.01" in text
    assert math.isclose(record["c"], 0.01)


def test_an_unknown_protocol_lists_the_known_ones_a_line_each(tmp_path: Path) -> None:
    with pytest.raises(AskedWrongly) as caught:
        run(arguments(str(tmp_path), "--protocol", "svm@mine", "--data", str(tmp_path)))
    lines = str(caught.value).splitlines()
    assert "Unknown protocol 'svm@mine'" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == list(PROTOCOLS)


def test_an_unknown_protocol_in_a_recipe_is_refused_at_once() -> None:
    with pytest.raises(ValidationError, match=r"unknown protocol 'svm@mine'; known: svm@heldout, svm@crosspoint"):
        EvaluationConfig(protocols=("svm@mine",))


def test_an_image_network_is_refused(tmp_path: Path, tiny_corpus: Store) -> None:
    from models.exported import save_exported
    from models.image_models import build_image_model

    config = {"kind": "pooled", "trunk": {"name": "test_resnet", "image_size": 32}}
    described = {"kind": "image_model", "image_model": config}
    save_exported(tmp_path / "teacher", described, build_image_model(config), "card", {})
    with pytest.raises(AskedWrongly, match="is no encoder of points"):
        evaluated(str(tmp_path / "teacher"), open_store(tiny_corpus.url))
