"""What leaves the project gives the features of the run it came from, and says what it is."""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch

import models
from datastore.errors import AskedWrongly, DoNotRetry
from datastore.layout import Store
from models.exported import ExportedEncoder
from models.image_models.multi_view import MultiViewClassifier
from models.point_generator import PointGenerator
from tests.runs import STEPS, tiny_config, train
from trainer.encoders import find_encoder
from trainer.export import add_arguments, export_run, run
from trainer.fetched import fetched
from trainer.runfolder import RunFolder


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def encode(folder: Path | str, points: torch.Tensor) -> torch.Tensor:
    encoder = models.load(folder)
    assert isinstance(encoder, ExportedEncoder)
    return encoder.encode(points)


def unit_balls(count: int = 3) -> torch.Tensor:
    """Clouds that need no normalising: corners of a cube around the origin, and points inside."""
    corners = torch.tensor([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) / 3**0.5
    inside = torch.rand(count, 24, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    return torch.cat([corners.expand(count, -1, -1), inside], dim=1)


def test_the_exported_encoder_gives_the_run_s_features(tiny_run: RunFolder, tmp_path: Path) -> None:
    assert run(arguments(tiny_run.url, str(tmp_path / "out"))) == 0
    points = unit_balls()
    encoder = find_encoder(tiny_run.url).encoder
    np.testing.assert_allclose(encode(tmp_path / "out", points), encoder(points).pooled, rtol=1e-4, atol=1e-5)


def test_a_finished_run_has_exported_the_same(tiny_run: RunFolder, tmp_path: Path) -> None:
    export_run(tiny_run, None, str(tmp_path / "out"))
    points = unit_balls()
    assert torch.equal(encode(tmp_path / "out", points), encode(tiny_run.export_url, points))


def test_another_step_can_be_asked_for(tiny_run: RunFolder, tmp_path: Path) -> None:
    assert run(arguments(tiny_run.url, str(tmp_path / "out"), "--step", "2")) == 0
    points = unit_balls()
    encoder = find_encoder(f"{tiny_run.checkpoints_url}/step-00000002").encoder
    np.testing.assert_allclose(encode(tmp_path / "out", points), encoder(points).pooled, rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "out" / "model.json").read_text())["training"]["step"] == 2


def test_a_step_that_is_not_there_is_refused_with_those_that_are(tiny_run: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(AskedWrongly, match=rf"no checkpoint of step 3\. It has those of steps 2, {STEPS}"):
        run(arguments(tiny_run.url, str(tmp_path / "out"), "--step", "3"))
    with pytest.raises(DoNotRetry, match="is no run folder"):
        run(arguments(str(tmp_path), str(tmp_path / "out")))


def test_a_run_is_named_as_status_names_it(
    tiny_run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(tiny_run.url)
    monkeypatch.chdir(tmp_path)
    assert run(arguments("mine", "out")) == 0
    assert (tmp_path / "out" / "model.json").is_file()


def test_the_folder_says_what_it_is(tiny_run: RunFolder, tiny_corpus: Store, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(arguments(tiny_run.url, str(out)))
    description = json.loads((out / "model.json").read_text())
    assert description["kind"] == "student" and description["student"]["width"] == 0.0625
    training = description["training"]
    assert training["config_hash"] == tiny_run.config().hash()
    assert (training["job"], training["split"], training["seed"]) == ("tiny", "train", 3)
    assert (training["num_points"], training["store_url"]) == (16, tiny_corpus.url)
    assert description["store"]["source_hash"] == tiny_corpus.attributes.source_hash
    assert description["versions"]["torch"]


def test_the_card_names_recipe_data_licence_and_scores(tiny_run: RunFolder, tmp_path: Path) -> None:
    record = {"protocol": "svm@heldout", "accuracy": 0.734, "num_test": 64, "c": 0.01}
    run_copy = RunFolder(str(tmp_path / "run"))
    for name in ("config.yaml", "checkpoints"):
        Path(run_copy.url).mkdir(exist_ok=True)
        (Path(run_copy.url) / name).symlink_to(Path(tiny_run.url) / name)
    run_copy.write_record("svm@heldout", record | {"checkpoint": {"is_random": False, "step": STEPS}})
    run_copy.write_record("svm@heldout.random_weights", record | {"checkpoint": {"is_random": True, "step": None}})
    export_run(run_copy, None, str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# run\n" in card and "pointnet, width 0.0625" in card and "Teacher: `teacher`" in card
    assert f"`{tiny_run.config().hash()}`" in card and "Licence of the data: unknown" in card
    assert f"| svm@heldout | step {STEPS} | 73.4 % | 64 | 0.01 |" in card
    assert "| svm@heldout | random | 73.4 % | 64 | 0.01 |" in card
    assert "global_batch: 16" in card
    assert "None was recorded" in (Path(tiny_run.export_url) / "README.md").read_text()


def test_the_four_lines_of_the_card_run(tiny_run: RunFolder, tmp_path: Path) -> None:
    run(arguments(tiny_run.url, str(tmp_path / "out")))
    code = re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.DOTALL)
    assert code is not None and code[1].count("\n") == 4
    check = "\nassert features.shape == (8, 64)\nimport sys; assert 'deepspeed' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", code[1] + check], check=True, timeout=120)


def test_an_export_can_go_to_object_storage(tiny_run: RunFolder) -> None:
    url = "memory://export-test/out"
    export_run(tiny_run, None, url)
    with fetched(url) as path:
        assert torch.equal(encode(path, unit_balls()), encode(tiny_run.export_url, unit_balls()))
    fsspec.filesystem("memory").rm("/export-test", recursive=True)


def test_a_run_whose_store_is_gone_exports_without_its_facts(tiny_run: RunFolder, tmp_path: Path) -> None:
    config = tiny_config(str(tmp_path / "gone.zarr"))
    moved = RunFolder(str(tmp_path / "run"))
    moved.write_config(config)
    (tmp_path / "run" / "checkpoints").symlink_to(Path(tiny_run.url) / "checkpoints")
    export_run(moved, None, str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "model.json").read_text())["store"] == {}
    assert "was not within reach" in (tmp_path / "out" / "README.md").read_text()


def test_a_teacher_exports_as_an_image_network(tiny_corpus: Store, tmp_path: Path) -> None:
    config = tiny_config(
        tiny_corpus.url,
        objective={"kind": "view_classifier", "image_model": {"trunk": {"name": "test_resnet", "image_size": 16}}},
        student=None,
        data={"store_url": tiny_corpus.url},
        steps=1,
    )
    trained = train(config, str(tmp_path / "run"))
    teacher = models.load(trained.export_url)
    assert isinstance(teacher, MultiViewClassifier) and not teacher.training
    views = torch.zeros(2, 12, 8, 8, 3, dtype=torch.uint8)
    assert teacher.describe(views).shape == (2, 12, 512)
    assert torch.equal(teacher.describe(views), find_encoder(trained.url).encoder.describe(views))  # type: ignore[operator]
    card = (Path(trained.export_url) / "README.md").read_text()
    assert "test_resnet, 16 px, 3 classes" in card and "a teacher is judged by what its students learn" in card
    weights = json.loads((Path(trained.export_url) / "model.json").read_text())["image_model"]["trunk"]["weights"]
    assert weights is None


def test_a_generator_exports_and_a_student_learns_with_it(tiny_corpus: Store, tmp_path: Path) -> None:
    generator_config = tiny_config(
        tiny_corpus.url,
        objective={"kind": "image_to_points", "teacher": "teacher", "generator": {"num_points": 16}},
        student=None,
        steps=1,
    )
    trained = train(generator_config, str(tmp_path / "generator"))
    generator = models.load(trained.export_url)
    assert isinstance(generator, PointGenerator) and not generator.training
    features = torch.rand(2, generator.in_features)
    assert generator(features).shape == (2, 16, 3)
    assert torch.equal(generator(features), find_encoder(trained.url).encoder(features))
    card = (Path(trained.export_url) / "README.md").read_text()
    assert f"point generator, {generator.in_features} features to 16 points" in card
    assert f"torch.rand(8, {generator.in_features})" in card
    objective = {
        "kind": "pointcmt",
        "teacher": "teacher",
        "generator": trained.export_url,
        "feature_width": generator.in_features,
    }
    student = train(tiny_config(tiny_corpus.url, objective=objective, steps=1), str(tmp_path / "student"))
    line = json.loads((Path(student.url) / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["terms"].keys() == {"task", "feature_enhancement", "classifier_enhancement"}
    assert encode(student.export_url, unit_balls()).shape == (3, 64)
