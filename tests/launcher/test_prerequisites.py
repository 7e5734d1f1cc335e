"""Which networks a launch trains first, and in which order."""

from typing import Any

import pytest

from datastore.errors import AskedWrongly
from launcher.plan import Facts, Goal, plan
from launcher.prerequisites import missing_networks, prerequisites_of
from trainer.config import RunConfig

STORE, RUNS = "runs/demo/corpus.zarr", "runs/demo"
TEACHER = {"kind": "view_classifier", "image_model": {"trunk": {"name": "test_resnet", "image_size": 32}}}


def recipe(job: str, objective: dict[str, Any], **sections: Any) -> RunConfig:
    student = {"kind": "pointnet"} if objective["kind"] == "pointmcd" else None
    return RunConfig.model_validate(
        {"job": job, "objective": objective, "student": student, "steps": 2, "global_batch": 4} | sections
    )


def student(**prepare: Any) -> RunConfig:
    return recipe("student", {"kind": "pointmcd", "teacher": "looker"}, prepare=prepare)


def jobs(**recipes: RunConfig) -> Any:
    return recipes.__getitem__


def test_a_teacher_comes_before_its_student_and_is_cached() -> None:
    looker = recipe("looker", TEACHER)
    prepared = prerequisites_of(student(teacher_job="looker"), jobs(looker=looker), RUNS, STORE)
    (needed,) = prepared.prerequisites
    assert (needed.config, needed.teacher, needed.fields) == (looker, "looker", ("view_features",))
    assert needed.run_url.startswith("runs/demo/looker-")
    goal = Goal(prepared.config, "runs/student-1", STORE, makes_corpus=False, prerequisites=prepared.prerequisites)
    assert [step.name for step in plan(goal, Facts())][:3] == ["teacher", "cache", "pretrain"]


def test_a_network_of_another_job_is_trained_first_and_its_url_filled_in() -> None:
    key = "objective.image_model.trunk.weights"
    base = recipe("base", TEACHER)
    looker = recipe("looker", TEACHER, prepare={"networks": {key: "base"}})
    prepared = prerequisites_of(student(teacher_job="looker"), jobs(looker=looker, base=base), RUNS, STORE)
    first, second = prepared.prerequisites
    assert (first.config.job, first.teacher, second.config.job) == ("base", None, "looker")
    assert second.config.objective.image_model.trunk.weights == f"{first.run_url}/export"  # type: ignore[union-attr]
    goal = Goal(prepared.config, "runs/student-1", STORE, makes_corpus=False, prerequisites=prepared.prerequisites)
    names = [step.name for step in plan(goal, Facts())]
    assert names[:4] == ["base", "teacher", "cache", "pretrain"]
    done = [step.name for step in plan(goal, Facts(cached=frozenset({"looker"}))) if step.done]
    assert done == ["teacher", "cache"], "the teacher is not trained where its features are there"


def test_a_network_that_somebody_named_is_not_trained() -> None:
    key = "objective.image_model.trunk.weights"
    looker = recipe("looker", TEACHER, prepare={"networks": {key: "base"}})
    assert missing_networks(looker) == {key: "base"}
    named = looker.with_overrides({key: "resnet.safetensors"})
    assert missing_networks(named) == {}
    assert prerequisites_of(named, jobs(), RUNS, STORE).prerequisites == ()


def test_arms_of_a_comparison_get_the_same_network() -> None:
    key = "objective.image_model.trunk.weights"
    arms = {"smooth": {"objective.label_smoothing": 0.4}}
    looker = recipe("looker", TEACHER, prepare={"networks": {key: "base"}}, comparisons=arms)
    config = prerequisites_of(looker, jobs(base=recipe("base", TEACHER)), RUNS, STORE).config
    goal = Goal(config, "runs/looker-1", STORE, makes_corpus=False)
    weights = {arm.objective.image_model.trunk.weights for arm in (config, *goal.arms.values())}  # type: ignore[union-attr]
    assert len(goal.arms) == 1 and len(weights) == 1 and None not in weights


def test_a_teacher_whose_features_are_not_read_is_not_trained() -> None:
    off = student(teacher_job="looker").with_overrides({"objective.alignment_weight": 0.0})
    assert off.teacher is None
    assert prerequisites_of(off, jobs(), RUNS, STORE).prerequisites == ()


def test_the_same_job_asked_for_twice_is_trained_once() -> None:
    key = "objective.image_model.trunk.weights"
    base, looker = recipe("base", TEACHER), recipe("looker", TEACHER, prepare={"networks": {key: "base"}})
    both = student(teacher_job="looker", networks={"data.cache_path": "base"})
    found = prerequisites_of(both, jobs(looker=looker, base=base), RUNS, STORE).prerequisites
    assert [each.config.job for each in found] == ["base", "looker"]


def test_jobs_that_need_each_other_are_refused() -> None:
    key = "objective.image_model.trunk.weights"
    one, two = (
        recipe(name, TEACHER, prepare={"networks": {key: other}}) for name, other in (("one", "two"), ("two", "one"))
    )
    with pytest.raises(AskedWrongly, match="circle: one -> two -> one"):
        prerequisites_of(one, jobs(one=one, two=two), RUNS, STORE)
