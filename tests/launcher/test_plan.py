"""What a launch decides to do, from facts alone."""

from dataclasses import replace

import pytest

from launcher.plan import Facts, Goal, Prerequisite, Step, corpus_folder, plan, teacher_folder
from trainer.config import load_recipe

STORE = "runs/demo/corpus.zarr"
TEACHER_RUN = "runs/demo/pointmcd_teacher-1"
RUN = "runs/pointmcd-1"
ARM = f"{RUN}/arms/distillation_off"
EVERYTHING = Facts(
    corpus_ready=True,
    cached=frozenset({"pointmcd_teacher"}),
    trained=frozenset({RUN, ARM, TEACHER_RUN}),
    evaluated=frozenset({(RUN, "svm@heldout"), (ARM, "svm@heldout"), (RUN, "svm@heldout.random_weights")}),
    reported=True,
)


@pytest.fixture(scope="module")
def goal() -> Goal:
    return Goal(
        config=load_recipe("pointmcd", demo=True, store_url=STORE),
        run_url=RUN,
        store_url=STORE,
        makes_corpus=True,
        prerequisites=(
            Prerequisite(
                load_recipe("pointmcd_teacher", demo=True, store_url=STORE),
                TEACHER_RUN,
                teacher="pointmcd_teacher",
                fields=("view_features",),
            ),
        ),
    )


def undone(steps: tuple[Step, ...]) -> list[str]:
    return [step.name for step in steps if not step.done]


def test_a_first_run_does_everything_in_the_order_in_which_things_depend_on_each_other(goal: Goal) -> None:
    assert [" ".join(step.words) for step in plan(goal, Facts())] == [
        f"ingest demo://shapes?count=640&seed=0 {STORE} --rig azimuth12 --image-size 64 --points 1024",
        f"pretrain --config {TEACHER_RUN}/config.yaml --run {TEACHER_RUN}",
        f"cache {STORE} --teacher pointmcd_teacher --weights {TEACHER_RUN}/export --json",
        f"pretrain --config {RUN}/config.yaml --run {RUN}",
        f"pretrain --config {ARM}/config.yaml --run {ARM}",
        f"evaluate {RUN} --protocol svm@heldout --data {STORE}",
        f"evaluate {ARM} --protocol svm@heldout --data {STORE}",
        f"evaluate {RUN} --protocol svm@heldout --data {STORE} --random-weights",
        f"report {RUN}",
    ]
    assert all(not step.done for step in plan(goal, Facts()))


def test_training_and_caching_run_on_nodes_the_rest_in_one_process(goal: Goal) -> None:
    assert [step.kind for step in plan(goal, Facts()) if step.on_nodes] == [
        "prerequisite",
        "cache",
        "pretrain",
        "pretrain",
    ]


def test_names_of_steps_are_unique_and_fit_a_folder(goal: Goal) -> None:
    names = [step.name for step in plan(goal, Facts())]
    assert len(set(names)) == len(names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_") for name in names)


def test_what_is_complete_is_reused(goal: Goal) -> None:
    assert undone(plan(goal, EVERYTHING)) == []
    second_run = replace(EVERYTHING, trained=frozenset({TEACHER_RUN}), evaluated=frozenset(), reported=False)
    assert [step.name for step in plan(goal, second_run) if step.done] == ["ingest", "teacher", "cache"]


def test_a_teacher_whose_features_are_there_is_not_trained_again(goal: Goal) -> None:
    steps = {step.name: step for step in plan(goal, replace(EVERYTHING, trained=frozenset({RUN, ARM})))}
    assert steps["teacher"].done
    assert steps["cache"].done


def test_a_report_is_written_again_when_something_that_it_shows_is_new(goal: Goal) -> None:
    lacks_one = replace(EVERYTHING, evaluated=EVERYTHING.evaluated - {(ARM, "svm@heldout")})
    assert undone(plan(goal, lacks_one)) == ["evaluate-svm-heldout-distillation_off", "report"]


def test_the_arm_trains_the_same_run_with_one_thing_changed(goal: Goal) -> None:
    configs = {step.name: step.config for step in plan(goal, Facts())}
    main, arm = configs["pretrain"], configs["pretrain-distillation_off"]
    assert main is not None
    assert arm is not None
    assert (main.objective.alignment_weight, arm.objective.alignment_weight) == (1.0, 0.0)  # type: ignore[union-attr]
    assert main.seed == arm.seed


def test_data_of_ones_own_are_neither_ingested_nor_given_a_teacher_unasked(goal: Goal) -> None:
    own = replace(goal, makes_corpus=False, prerequisites=())
    assert [step.kind for step in plan(own, Facts())] == [
        "pretrain",
        "pretrain",
        "evaluate",
        "evaluate",
        "evaluate",
        "report",
    ]


def test_a_job_that_trains_an_image_network_is_not_judged_by_protocols_for_points(goal: Goal) -> None:
    teacher_job = Goal(config=goal.prerequisites[0].config, run_url="runs/t-1", store_url=STORE, makes_corpus=True)
    assert [step.kind for step in plan(teacher_job, Facts())] == ["ingest", "pretrain", "report"]


def test_corpora_and_teachers_are_found_again_by_their_settings_alone(goal: Goal) -> None:
    corpus = goal.config.prepare.corpus
    assert corpus is not None
    teacher = goal.prerequisites[0].config
    assert corpus_folder(corpus) == corpus_folder(corpus.model_copy())
    assert corpus_folder(corpus) != corpus_folder(corpus.model_copy(update={"points": 2048}))
    assert teacher_folder(teacher, STORE) != teacher_folder(teacher.with_overrides({"seed": 1}), STORE)
    assert teacher_folder(teacher, STORE) != teacher_folder(teacher, "elsewhere.zarr")
