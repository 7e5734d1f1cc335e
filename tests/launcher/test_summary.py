"""What a finished launch says last."""

from dataclasses import replace
from pathlib import Path

import pytest

from launcher.command import Layout
from launcher.plan import Goal, Prerequisite
from launcher.spec import LaunchSpec, check_world, worlds_for
from launcher.summary import STEP_FINISHED, results_of, summarise, table
from trainer.config import load_recipe
from trainer.runfolder import RunFolder

SPEC = LaunchSpec("pointmcd", Layout(4))


UNSEEN = {
    "shared_rows": 0,
    "equal_clouds": 0,
    "seen_in_training": 0,
    "teacher_trained_on": "train",
    "seen_by_teacher": 0,
}


def record(accuracy: float) -> dict[str, object]:
    counts = {"num_train": 512, "num_test": 128, "c": 0.1, "seed": 0, "splits": UNSEEN}
    return {"protocol": "svm@heldout", "accuracy": accuracy, "class_mean_accuracy": accuracy - 0.01, **counts}


@pytest.mark.parametrize(
    ("splits", "words"),
    [
        (UNSEEN, "128 test shapes that no training saw"),
        (UNSEEN | {"seen_in_training": 12}, "128 test shapes; 12 of them were seen in training"),
        (UNSEEN | {"seen_by_teacher": None}, "128 test shapes; nothing tells whether training saw them"),
        (UNSEEN | {"teacher_trained_on": None, "seen_by_teacher": None}, "128 test shapes that no training saw"),
    ],
)
def test_the_table_promises_only_what_the_record_counted(splits: dict[str, object], words: str) -> None:
    assert words in table("svm@heldout", [("distilled", record(0.5) | {"splits": splits})]).splitlines()[0]


@pytest.fixture
def goal(tmp_path: Path) -> Goal:
    """A finished demo run."""
    config = load_recipe("pointmcd", demo=True, store_url="runs/demo/corpus.zarr")
    run = RunFolder(str(tmp_path / "pointmcd-1"))
    run.write_config(config)
    run.write_record("svm@heldout", record(0.7656))
    run.write_record("svm@heldout.random_weights", record(0.5))
    arm = run.arm("distillation_off")
    arm.write_config(config)
    arm.write_record("svm@heldout", record(0.78))
    run.append_event(STEP_FINISHED, title="corpus", seconds=61.0)
    run.append_event(STEP_FINISHED, title="pretrain", seconds=9.0)
    return Goal(config, run.url, "runs/demo/corpus.zarr", makes_corpus=True, prerequisites=(Prerequisite(config, "t"),))


def test_scores_stand_beside_each_other_then_places_times_and_what_to_do_next(goal: Goal) -> None:
    said = summarise(RunFolder(goal.run_url), goal, SPEC).splitlines()
    assert said[1:5] == [
        "Linear SVM on frozen features, svm@heldout: 128 test shapes that no training saw",
        "  distilled          76.6 %",
        "  distillation off   78.0 %   distilled is 1.4 points below",
        "  random weights     50.0 %   distilled is 26.6 points above",
    ]
    assert f"report   {goal.run_url}/report.html" in said
    assert "time     1 min 10 s: corpus 1 min 01 s, pretrain 9 s" in said
    assert "  is it chance?    viewpoint launch pointmcd --nodes 4 --set seed=1" in said


def test_a_run_that_no_protocol_judged_has_no_table(goal: Goal) -> None:
    config = goal.config.model_copy(update={"evaluation": goal.config.evaluation.model_copy(update={"protocols": ()})})
    assert "Linear SVM" not in summarise(RunFolder(goal.run_url), replace(goal, config=config), SPEC)


def test_results_are_one_object_a_score_and_one_for_the_run(goal: Goal) -> None:
    *scores, run = results_of(RunFolder(goal.run_url))
    assert [(score["arm"], score["accuracy"]) for score in scores] == [
        ("distilled", 0.7656),
        ("distillation_off", 0.78),
        ("random_weights", 0.5),
    ]
    assert run["seconds"] == {"corpus": 61.0, "pretrain": 9.0}


def test_worlds_share_every_batch_evenly() -> None:
    assert worlds_for(32) == (1, 2, 4, 8, 16)
    assert worlds_for(32, 24) == (1, 2, 4, 8)
    check_world(Layout(2, 4), {"a": 32, "b": 24})
