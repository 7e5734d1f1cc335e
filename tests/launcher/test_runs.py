"""Which folder a launch continues."""

from pathlib import Path

import pytest

from datastore.errors import AskedWrongly, DoNotRetry
from launcher.runs import COMPLETE, choose_run, is_same_training, pinned
from trainer.config import RunConfig, load_recipe
from trainer.runfolder import RunFolder


def recipe(*assignments: str, store_url: str = "store.zarr") -> RunConfig:
    return load_recipe("pointmcd", demo=True, assignments=assignments, store_url=store_url)


def start(runs: Path, name: str, config: RunConfig, *, complete: bool = False) -> RunFolder:
    folder = RunFolder(f"{runs}/{name}")
    folder.write_config(config)
    if complete:
        folder.append_event(COMPLETE)
    return folder


def chosen(runs: Path, config: RunConfig, name: str | None = None, *, same_store: bool = True) -> str:
    return choose_run(str(runs), name, config, same_store=same_store).folder.name


def test_runs_are_numbered_by_job(tmp_path: Path) -> None:
    assert chosen(tmp_path / "nothing here", recipe()) == "pointmcd-1"
    start(tmp_path, "pointmcd-1", recipe(), complete=True)
    start(tmp_path, "pointmcd-9", recipe(), complete=True)
    start(tmp_path, "another-12", recipe(), complete=True)
    assert chosen(tmp_path, recipe()) == "pointmcd-10"


def test_the_newest_unfinished_run_of_the_same_training_goes_on(tmp_path: Path) -> None:
    for number in (1, 2):
        start(tmp_path, f"pointmcd-{number}", recipe())
    start(tmp_path, "pointmcd-3", recipe(), complete=True)
    start(tmp_path, "pointmcd-4", recipe("seed=1"))
    start(tmp_path, "pointmcd-5", recipe(store_url="another.zarr"))
    assert chosen(tmp_path, recipe()) == "pointmcd-2"
    assert chosen(tmp_path, recipe("seed=2")) == "pointmcd-6"


def test_how_the_work_is_spread_may_change_within_a_run(tmp_path: Path) -> None:
    start(tmp_path, "mine", recipe())
    asked = recipe("engine.max_micro_batch=4", "evaluation.protocols=[svm@crosspoint]")
    run = choose_run(str(tmp_path), "mine", asked, same_store=True)
    assert run.config == asked


def test_another_recipe_under_the_same_name_is_refused_with_what_differs(tmp_path: Path) -> None:
    start(tmp_path, "mine", recipe())
    with pytest.raises(DoNotRetry) as refused:
        chosen(tmp_path, recipe("engine.optimizer.lr=0.5"), "mine")
    assert f"engine.optimizer.lr: {recipe().engine.optimizer.lr} there, 0.5 asked for" in str(refused.value)
    assert "another --run name" in str(refused.value)


def test_a_named_run_may_read_a_store_that_moved_but_not_another_demo_corpus(tmp_path: Path) -> None:
    start(tmp_path, "mine", recipe())
    moved = recipe(store_url="elsewhere.zarr")
    assert chosen(tmp_path, moved, "mine", same_store=False) == "mine"
    with pytest.raises(DoNotRetry, match=r"data\.store_url"):
        chosen(tmp_path, moved, "mine", same_store=True)


def test_a_complete_run_is_known_as_such(tmp_path: Path) -> None:
    start(tmp_path, "mine", recipe(), complete=True)
    assert choose_run(str(tmp_path), "mine", recipe(), same_store=True).is_complete


def test_a_run_stays_with_the_teacher_that_it_began_with(tmp_path: Path) -> None:
    start(tmp_path, "mine", pinned(recipe(), "pointmcd_teacher@0123abcd"))
    run = choose_run(str(tmp_path), "mine", recipe(), same_store=True)
    assert run.config.objective.teacher == "pointmcd_teacher@0123abcd"  # type: ignore[union-attr]
    assert not is_same_training(recipe(), recipe("objective.teacher=another"))


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "", ".hidden"])
def test_a_name_that_is_a_path_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(AskedWrongly, match="--runs"):
        chosen(tmp_path, recipe(), name)
