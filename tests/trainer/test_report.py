"""The report shows what lies in a run's folder and no more: missing pieces are left out, and leaks are called so."""

import argparse
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from datastore.errors import DoNotRetry
from datastore.layout import Store
from tests.runs import tiny_config
from trainer import evaluate
from trainer.page import Check, render
from trainer.report import add_arguments, read_run, run
from trainer.runfolder import RunFolder

CLASSES = ("aeroplane", "bench", "bottle", "bowl")


def record(
    correct: int, *, protocol: str = "svm@heldout", is_random: bool = False, **splits: int | None
) -> dict[str, Any]:
    """What an evaluation of 40 test shapes writes down."""
    confusion = [[10 if row == column else 0 for column in range(4)] for row in range(4)]
    for wrong in range(40 - correct):
        row = wrong % 4
        confusion[row][row] -= 1
        confusion[row][(row + 1) % 4] += 1
    return {
        "protocol": protocol,
        "accuracy": correct / 40,
        "class_mean_accuracy": correct / 40,
        "per_class_accuracy": {name: confusion[row][row] / 10 for row, name in enumerate(CLASSES)},
        "confusion": confusion,
        "class_names": list(CLASSES),
        "c": 0.01,
        "grid": [{"c": 0.01, "holdout_accuracy": 0.7}],
        "num_train": 160,
        "num_holdout": 32,
        "num_test": 40,
        "num_points": 16,
        "checkpoint": {"url": "runs/a", "step": 4, "is_random": is_random, "config_hash": "abc"},
        "store": {
            "url": "corpus.zarr", "manifest": 2, "source_url": "demo://shapes", "source_hash": "beef",
            "licence": "CC0-1.0", "num_rows": 200, "points_per_shape": 20, "rig": "azimuth12", "num_views": 12,
            "image_size": 64, "rows": {"train": 160, "test": 40}, "quarantined": 0,
            "teacher": {"key": "teacher@feedc0de", "dim": 512, "training": {"job": "pointmcd_teacher"}},
        },
        "splits": {
            "shared_rows": 0, "shared_names": 0, "equal_clouds": 0, "trained_on": "train", "seen_in_training": 0,
            "teacher_trained_on": "train", "seen_by_teacher": 0,
        } | splits,
        "machine": {"processor": "A Processor", "cores": 2, "memory_bytes": 24 * 2**30, "accelerators": []},
        "versions": {"python": "3.12.1", "torch": "2.15.0"},
    }  # fmt: skip


def metrics(folder: RunFolder, steps: int = 30, terms: tuple[str, ...] = ("task", "alignment")) -> None:
    for step in range(1, steps + 1):
        values = {term: (index + 1) / step for index, term in enumerate(terms)}
        folder.append_metrics(
            {"step": step, "epoch": step / 10, "loss": sum(values.values()), "terms": values, "lr": 0.1,
             "grad_norm": 1.0, "samples_per_second": 200.0 + step, "data_wait_share": 0.01}
        )  # fmt: skip


def make_run(url: Path, *, seed: int = 0, correct: int = 34) -> RunFolder:
    """A whole run as a launch leaves it, from records that no training wrote."""
    folder = RunFolder(str(url))
    config = tiny_config(
        "corpus.zarr", seed=seed, comparisons={"distillation_off": {"objective.alignment_weight": 0.0}}
    )
    folder.write_config(config)
    folder.append_event("launch_started", nodes=4, world=4)
    folder.append_event("step_finished", step="ingest", stage="ingest", title="corpus", seconds=41.0)
    folder.append_event("started", world=4, resumed_from=0, total_steps=30, zero_stage=1)
    folder.append_event("finished", step=30, seconds={"forward": 40.0, "backward": 20.0})
    folder.append_event("step_finished", step="pretrain", stage="pretrain", title="pretrain", seconds=71.0)
    folder.append_event("launch_complete", seconds=115.0)
    metrics(folder)
    folder.write_record("svm@heldout", record(correct))
    folder.write_record("svm@heldout.random_weights", record(24, is_random=True))
    folder.write_record("svm@crosspoint", record(33, protocol="svm@crosspoint"))
    arm = folder.arm("distillation_off")
    arm.write_config(config.with_overrides({"objective.alignment_weight": 0.0}))
    metrics(arm, terms=("task",))
    arm.write_record("svm@heldout", record(29))
    return folder


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(words)


def page_of(*folders: RunFolder) -> str:
    return render([read_run(folder) for folder in folders], made="now")


def words_of(page: str) -> str:
    """The page's text, without marks and style."""
    body = page.partition("<body>")[2]
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)).replace("\u202f", " ")


class _Checker(HTMLParser):
    """Every tag is closed in order, and nothing points outside of the page."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object"), f"<{tag}> needs another file or runs code"
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} {name} runs code"
            if name in ("src", "href", "xlink:href"):
                assert (value or "").startswith("data:"), f"{tag} {name}={value} needs another file"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def check_page(page: str) -> None:
    checker = _Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert "http" not in page.replace("http-equiv", ""), "a page by itself asks no server"
    assert "@import" not in page and "url(" not in page


def test_the_headline_compares_with_random_weights_and_with_distillation_off(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "a"))
    check_page(page)
    text = words_of(page)
    assert "Distilled features classify 85.0 % of unseen shapes" in text
    assert "12.5 points more than the same recipe with distillation off" in text
    assert "25.0 points more than the same network with random weights" in text
    assert "40 test shapes of 4 classes" in text
    assert re.findall(r'class="fill c\d" style="width:([\d.]+)%', page)[:3] == ["85.00", "72.50", "60.00"]


def test_a_loss_is_called_one(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", correct=20)
    assert "10.0 points less than the same network with random weights" in words_of(page_of(folder))


def test_every_part_of_a_run_is_shown(tmp_path: Path) -> None:
    text = words_of(page_of(make_run(tmp_path / "a")))
    for part in (
        "Loss, term by term", "alignment", "task",
        "Accuracy by class", "aeroplane 10",
        "What distilled features confuse", "Most often: aeroplane for bench (2), bench for bottle (2)",
        "svm@crosspoint distilled 82.5 %",
        "CC0-1.0", "train 160, test 40", "teacher@feedc0de", "12 of 64 px, rig azimuth12", "the first 16 are used",
        "Honest splits", "0 are the same row, 0 have the same name, and 0 are equal point for point",
        "C was chosen on 32 shapes held out of train",
        "4 (4 processes)", "30 of 30, 3 epochs", "A Processor, 2 cores, 24 GiB", "torch 2.15.0", "finished",
        "Where the time went", "1 min 52 s in all", "corpus 41 s", "pretrain 1 min 11 s",
        "config.yaml of a", "global_batch: 16",
    ):  # fmt: skip
        assert part in text, part


def test_a_split_that_leaks_is_marked(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    folder.write_record("svm@heldout", record(34, equal_clouds=3, seen_in_training=40, seen_by_teacher=None))
    checks = read_run(folder).checks
    assert [check.holds for check in checks] == [False, False, None, True]
    assert "3 are equal point for point" in checks[0].statement
    assert "holds 40 of the 40 test shapes" in checks[1].statement
    assert page_of(folder).count('class="fails"') == 2


def test_a_preset_s_choice_of_c_is_not_called_honest(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path / "a"))
    folder.write_config(tiny_config("corpus.zarr", evaluation={"protocols": ["svm@crosspoint"]}))
    folder.write_record("svm@crosspoint", record(30, protocol="svm@crosspoint") | {"grid": []})
    facts = read_run(folder)
    assert facts.protocol == "svm@crosspoint"
    assert facts.checks[-1] == Check(False, "C = 0.01 is a published preset, which its authors chose on a test split.")


def fresh(folder: RunFolder) -> None:
    folder.write_config(tiny_config("corpus.zarr"))


def without_arms(folder: RunFolder) -> None:
    fresh(folder)
    metrics(folder)
    folder.write_record("svm@heldout", record(30))


def without_evaluation(folder: RunFolder) -> None:
    fresh(folder)
    folder.append_event("started", world=1, resumed_from=0, total_steps=30, zero_stage=1)
    metrics(folder, steps=1)


def without_training(folder: RunFolder) -> None:
    fresh(folder)
    folder.write_record("svm@heldout.random_weights", record(24, is_random=True))


def teacher(folder: RunFolder) -> None:
    image_model = {"trunk": {"name": "test_resnet", "image_size": 16}}
    folder.write_config(
        tiny_config("corpus.zarr", objective={"kind": "view_classifier", "image_model": image_model}, student=None)
    )
    folder.append_event("finished", step=30, seconds={"forward": 1.0})
    metrics(folder, terms=("global", "views"))


def broken_off(folder: RunFolder) -> None:
    without_evaluation(folder)
    folder.append_event("not_finite", step=2, problem="term 'task' is nan")


@pytest.mark.parametrize(
    ("prepare", "expected"),
    [
        (fresh, "not evaluated yet No evaluation is recorded for this run. Score it with viewpoint evaluate"),
        (without_arms, "Distilled features classify 75.0 % of unseen shapes Linear SVM"),
        (without_evaluation, "running, or ended without a word"),
        (without_training, "tiny: not evaluated yet"),
        (teacher, "tiny: trained An image network is not evaluated by itself, but by its students. Loss"),
        (broken_off, "broken off at step 2: the loss was not finite"),
    ],
)
def test_missing_pieces_are_left_out(tmp_path: Path, prepare: Callable[[RunFolder], None], expected: str) -> None:
    folder = RunFolder(str(tmp_path / "a"))
    prepare(folder)
    page = page_of(folder)
    check_page(page)
    assert expected in words_of(page)


def test_repeated_steps_count_as_done_last(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a")
    folder.append_metrics(
        {"step": 30, "epoch": 3.0, "loss": 9.0, "terms": {"task": 4.0, "alignment": 5.0}, "lr": 0.1, "grad_norm": 1.0,
         "samples_per_second": 1.0, "data_wait_share": 0.0}
    )  # fmt: skip
    steps, values = read_run(folder).curves["distilled"]["alignment"]
    assert list(steps) == list(range(1, 31)) and values[-1] == 5.0


def test_names_and_settings_are_escaped(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    folder = make_run(tmp_path / "a")
    bad = record(30)
    bad["class_names"] = [hostile, *CLASSES[1:]]
    bad["per_class_accuracy"] = {hostile: 0.5, "bench": 1.0, "bottle": 1.0, "bowl": 1.0}
    bad["store"]["source_url"] = bad["store"]["licence"] = bad["machine"]["processor"] = hostile
    folder.write_record("svm@heldout", bad)
    folder.write_record(f"svm@crosspoint.{hostile.replace('/', '')}", record(3, protocol="svm@crosspoint"))
    folder.append_event("step_finished", step="x", stage="x", title=hostile, seconds=1.0)
    (tmp_path / "a" / "config.yaml").write_text(f"job: '{hostile}'\nstudent: {{kind: '{hostile}'}}\n")
    page = page_of(folder, folder)
    check_page(page)
    check_page(page_of(folder))
    assert "<script" not in page


def test_seeds_are_summed_up(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"seed-{seed}", seed=seed, correct=33 + seed) for seed in range(3)]
    page = page_of(*runs)
    check_page(page)
    text = words_of(page)
    assert "Distilled: 85.0 % ± 2.5 over 3 seeds" in text
    assert "25.0 points more on average than the same network with random weights (+22.5, +25.0, +27.5)" in text
    assert "seed 0 1 2" in text, "what differs stands in a table"


def test_runs_of_different_recipes_are_not_averaged(tmp_path: Path) -> None:
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other", correct=30)
    other.write_config(tiny_config("corpus.zarr", global_batch=32))
    text = words_of(page_of(one, other))
    assert "2 runs: 75.0 % to 85.0 %" in text and "±" not in text
    assert "global_batch 16 32" in text


# The stage


def test_the_stage_writes_into_the_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "a")
    assert run(arguments(folder.url)) == 0
    output = capsys.readouterr()
    assert output.out.strip() == f"{folder.url}/report.html"
    assert "no picture of the corpus" in output.err
    page = (tmp_path / "a" / "report.html").read_text()
    check_page(page)
    assert f"viewpoint report {folder.url}" in page


def test_several_runs_make_a_page_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    urls = [make_run(tmp_path / name).url for name in ("a", "b")]
    assert run(arguments(*urls)) == 0
    assert "2 runs" in (tmp_path / "comparison.html").read_text()
    assert run(arguments(*urls, "--out", "pages/two.html", "--json")) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"report": "pages/two.html", "runs": urls}
    assert (tmp_path / "pages" / "two.html").is_file()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DoNotRetry, match=r"is no run folder: it has no config\.yaml"):
        run(arguments(str(tmp_path)))


def test_a_run_is_named_as_status_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    assert run(arguments("mine")) == 0
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    with pytest.raises(DoNotRetry, match=r"Runs in \./runs: mine"):
        run(arguments("yours"))


def test_a_real_run_is_reported_with_a_picture_of_its_corpus(
    tiny_run: RunFolder, tiny_corpus: Store, tmp_path: Path
) -> None:
    for name in ("config.yaml", "checkpoints", "events.jsonl", "metrics.jsonl"):
        (tmp_path / name).symlink_to(Path(tiny_run.url) / name)
    folder = RunFolder(str(tmp_path))
    parser = argparse.ArgumentParser()
    evaluate.add_arguments(parser)
    for words in ((), ("--random-weights",)):
        evaluate.run(parser.parse_args([folder.url, "--protocol", "svm@heldout", "--data", tiny_corpus.url, *words]))
    assert run(arguments(folder.url)) == 0
    page = (tmp_path / "report.html").read_text()
    check_page(page)
    text = words_of(page)
    assert 'src="data:image/png;base64,' in page
    assert "random weights" in text and "4 of 4" in text
    assert all(check.holds for check in read_run(folder).checks)
