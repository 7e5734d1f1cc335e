"""A store that is too small for the recipe, or cannot judge it, is refused before anything is trained, with what mends it."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from datastore.errors import EXIT_DO_NOT_RETRY, EXIT_DONE, DoNotRetry
from datastore.layout import create_store
from datastore.schema import INGEST_FIELDS
from datastore.write import publish
from launcher import doctor
from launcher.__main__ import main
from launcher.command import Layout
from launcher.driver import resolve
from launcher.facts import observe
from launcher.plan import plan
from launcher.spec import LaunchSpec
from launcher.suitable_store import largest_batch, refuse_unsuitable_corpus, refuse_unsuitable_store
from tests.stores import small_attributes, write_blocks, write_small_store
from trainer.recipes import recipe_path
from trainer.runfolder import RunFolder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a store of 24 training shapes."""
    monkeypatch.chdir(tmp_path)
    write_small_store("shapes.zarr", small_attributes(num_rows=36))
    return tmp_path


def check(spec: LaunchSpec) -> None:
    goal, _ = resolve(spec)
    refuse_unsuitable_store(goal, spec.layout, plan(goal, observe(goal)))


def asked(job: str, *assignments: str, nodes: int = 2) -> LaunchSpec:
    return LaunchSpec(job, Layout(nodes), data_url="shapes.zarr", assignments=assignments, prepare=True)


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_launch_on_a_store_that_is_too_small_ends_before_it_begins(
    here: Path, more: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["launch", "pointmcd", "--data", "shapes.zarr", "--prepare", "--nodes", "2", *more]) == EXIT_DO_NOT_RETRY
    )
    assert capsys.readouterr().err.splitlines() == [
        "viewpoint: shapes.zarr has too few shapes:",
        "  - job 'pointmcd_teacher' takes 48 shapes a step, split 'train' has 24",
        "  - job 'pointmcd' takes 64 shapes a step, split 'train' has 24",
        "Ingest more shapes, or let a step take fewer:",
        f"  - pointmcd_teacher: copy {recipe_path('pointmcd_teacher', demo=False)}, write `global_batch: 24` into the copy, "
        f"and add --set prepare.teacher_job=./pointmcd_teacher.yaml",
        "  - pointmcd: add --set global_batch=24",
    ]
    assert not (here / "runs").exists()


def test_what_it_says_mends_it(here: Path) -> None:
    recipe = recipe_path("pointmcd_teacher", demo=False).read_text()
    (here / "pointmcd_teacher.yaml").write_text(recipe.replace("global_batch: 48", "global_batch: 24"))
    check(asked("pointmcd", "global_batch=24", "prepare.teacher_job=./pointmcd_teacher.yaml"))
    with pytest.raises(DoNotRetry, match=r"into \./pointmcd_teacher\.yaml$"):
        (here / "pointmcd_teacher.yaml").write_text(recipe)
        check(asked("pointmcd", "global_batch=24", "prepare.teacher_job=./pointmcd_teacher.yaml"))


def test_every_job_that_comes_before_is_named_with_its_own_way_out(here: Path) -> None:
    with pytest.raises(DoNotRetry) as refused:
        check(asked("pointcmt", "data.every=2"))
    said = str(refused.value)
    assert "job 'pointcmt_teacher' takes 128 shapes a step, split 'train' has 24" in said
    assert "job 'pointcmt' takes 32 shapes a step, split 'train' has 12" in said
    assert (
        "--set prepare.teacher_job=./pointcmt_teacher.yaml, and name it (./pointcmt_teacher.yaml) under 'prepare'"
        in said
    )
    assert """--set 'prepare.networks={"objective.generator": "./pointcmt_generator.yaml"}'""" in said


def test_what_is_trained_already_needs_no_shapes(here: Path) -> None:
    goal, _ = resolve(asked("pointmcd_teacher"))
    RunFolder(goal.run_url).append_event("finished", step=1)
    refuse_unsuitable_store(goal, Layout(2), plan(goal, observe(goal)))


def test_a_store_whose_ingest_goes_on_may_grow_enough(here: Path) -> None:
    shutil.rmtree("shapes.zarr")
    store = create_store("shapes.zarr", small_attributes(num_rows=70), INGEST_FIELDS)
    write_blocks(store, [0])
    publish(store)
    with pytest.raises(DoNotRetry, match="too few shapes so far") as refused:
        check(asked("supervised"))
    assert "Let its ingest finish, or let a step take fewer:" in str(refused.value)


def test_a_corpus_of_the_launchs_own_is_looked_at_when_it_is_made(here: Path) -> None:
    spec = LaunchSpec("pointmcd", Layout(1))
    goal, _ = resolve(spec)
    steps = plan(goal, observe(goal))
    refuse_unsuitable_store(goal, spec.layout, steps)
    write_small_store(goal.store_url, small_attributes(num_rows=36))
    with pytest.raises(DoNotRetry, match=r"Ask for a larger corpus \(--set prepare\.corpus\.source=\.\.\.\)"):
        refuse_unsuitable_corpus(RunFolder(goal.run_url), goal, spec.layout, steps)
    event = RunFolder(goal.run_url).last_event("launch_failed")
    assert event is not None
    assert (event["step"], event["exit_code"]) == ("ingest", EXIT_DO_NOT_RETRY)


@pytest.mark.parametrize(("available", "world", "batch"), [(24, 1, 24), (24, 5, 20), (24, 16, None), (3, 1, 3)])
def test_a_batch_is_offered_that_the_processes_can_share(available: int, world: int, batch: int | None) -> None:
    assert largest_batch(available, Layout(world)) == batch


def test_doctor_says_it_of_a_recipe_and_a_store(here: Path) -> None:
    with pytest.raises(DoNotRetry, match=r"takes 64 shapes a step, split 'train' has 24.*--set global_batch=24"):
        doctor._recipe_on_store("supervised", "shapes.zarr")
    write_small_store("larger.zarr", small_attributes(num_rows=200))
    assert doctor._recipe_on_store("supervised", "larger.zarr") == "split 'train' has 134, 2 steps an epoch"


def test_a_store_that_cannot_judge_the_run_ends_the_launch_before_it_begins(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_small_store("train_only.zarr", small_attributes(num_rows=70, splits=("train",)))
    words = ["launch", "supervised", "--data", "train_only.zarr", "--dry-run"]
    assert main(words) == EXIT_DO_NOT_RETRY
    assert capsys.readouterr().err.splitlines() == [
        "viewpoint: train_only.zarr cannot judge what this launch trains, by svm@heldout:",
        "  - it has no split 'test'; it has 'train' 70",
        "Make the store of shapes whose folders, or the columns of whose index, say class and split (train, test), or "
        "train without an evaluation:",
        "  - supervised: add --set 'evaluation.protocols=[]'; afterwards `viewpoint evaluate RUN --protocol svm@heldout "
        "--data STORE` judges it on another store",
    ]
    assert main([*words, "--set", "evaluation.protocols=[]"]) == EXIT_DONE
    assert "evaluate" not in capsys.readouterr().out


def test_size_and_labels_are_said_together(here: Path) -> None:
    write_small_store("train_only.zarr", small_attributes(num_rows=24, splits=("train",)))
    with pytest.raises(DoNotRetry, match=r"(?s)too few shapes:.*no split 'test'"):
        check(LaunchSpec("supervised", Layout(2), data_url="train_only.zarr"))


def test_what_is_evaluated_already_needs_no_labels(here: Path) -> None:
    write_small_store("train_only.zarr", small_attributes(num_rows=70, splits=("train",)))
    goal, _ = resolve(LaunchSpec("supervised", Layout(2), data_url="train_only.zarr"))
    steps = [replace(step, done=step.kind == "evaluate") for step in plan(goal, observe(goal))]
    refuse_unsuitable_store(goal, Layout(2), steps)


def test_doctor_says_that_a_store_cannot_judge_a_recipe(here: Path) -> None:
    write_small_store("train_only.zarr", small_attributes(num_rows=70, splits=("train",)))
    with pytest.raises(DoNotRetry, match=r"no split 'test'.*svm@heldout cannot judge.*evaluation\.protocols"):
        doctor._recipe_on_store("supervised", "train_only.zarr")
