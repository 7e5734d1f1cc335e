"""Tests of trainer/commits.py: the fence and what is kept."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.errors import EXIT_DO_NOT_RETRY, DoNotRetry
from datastore.objects import ObjectFolder
from trainer import commits
from trainer.commits import (
    LAUNCH_VARIABLE,
    CheckpointConfig,
    Manifest,
    RankFiles,
    SupersededError,
    TakenOverError,
    check_fence,
    claim_generation,
    commit,
    committed_steps,
    due,
    rank_name,
    read_manifest,
    record_resumed,
    retain,
    superseded,
)


def _manifest(step: int, generation: int, **facts: object) -> Manifest:
    return Manifest.model_validate(
        {
            "generation": generation,
            "step": step,
            "samples_seen": 0,
            "totals": {},
            "config_hash": "abc",
            "config": "",
            "zero_stage": 1,
            "shapes": {},
            "optimizer_tensors": (),
            "optimizer_scalars": {},
            "ranks": (RankFiles(name=rank_name(0, 1, generation), num_bytes=1, index_crc32c=0),),
        }
        | facts
    )


def _write_share(folder: ObjectFolder, step: int, generation: int) -> None:
    for suffix in ("safetensors", "json"):
        folder.put(f"step-{step:08d}/{rank_name(0, 1, generation)}.{suffix}", b"x")


def _save(folder: ObjectFolder, step: int, generation: int, **facts: object) -> None:
    _write_share(folder, step, generation)
    commit(folder, _manifest(step, generation, **facts))


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectFolder:
    return ObjectFolder(str(tmp_path) if request.param == "disk" else f"memory://{tmp_path}")


def test_each_start_has_a_number_of_its_own(folder: ObjectFolder) -> None:
    assert [claim_generation(folder, 2) for _ in range(3)] == [1, 2, 3]


def test_an_older_start_commits_nothing_once_a_newer_one_exists(folder: ObjectFolder) -> None:
    first = claim_generation(folder, 2)
    _save(folder, 10, first)
    second = claim_generation(folder, 1)
    with pytest.raises(SupersededError, match="start 2 of this run, and this is start 1"):
        _save(folder, 20, first)
    _save(folder, 20, second)
    assert committed_steps(folder) == [10, 20] and read_manifest(folder, 20).generation == second


def test_a_start_that_another_launch_fenced_out_ends_for_good(
    folder: ObjectFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAUNCH_VARIABLE, "process 1 on here")
    first = claim_generation(folder, 1)
    second = claim_generation(folder, 1)
    record_resumed(folder, second, 1, 0)
    with pytest.raises(SupersededError):  # the same launch: its other half goes on
        check_fence(folder, first)
    monkeypatch.setenv(LAUNCH_VARIABLE, "process 2 on there")
    third = claim_generation(folder, 1)
    record_resumed(folder, third, 1, 0)
    monkeypatch.setenv(LAUNCH_VARIABLE, "process 1 on here")
    with pytest.raises(TakenOverError, match=r"another launch \(process 2 on there\).*viewpoint cancel") as refused:
        check_fence(folder, second)
    assert refused.value.exit_code == EXIT_DO_NOT_RETRY, "or the two would take the run from each other for ever"
    monkeypatch.setenv(LAUNCH_VARIABLE, "process 2 on there")
    check_fence(folder, third)


def test_a_start_that_is_fenced_out_while_it_commits_is_told_so(
    folder: ObjectFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = claim_generation(folder, 1)
    checked: list[int] = []

    def restarted_meanwhile(folder: ObjectFolder, generation: int) -> None:
        check_fence(folder, generation)
        if not checked:
            checked.append(generation)
            second = claim_generation(folder, 1)
            record_resumed(folder, second, 1, 0)
            assert folder.create("step-00000010/manifest.json", _manifest(10, second).model_dump_json().encode())

    monkeypatch.setattr(commits, "check_fence", restarted_meanwhile)
    with pytest.raises(SupersededError):  # and not an error that would end the job of both
        commit(folder, _manifest(10, first))


def test_without_the_fence_the_older_start_would_commit(folder: ObjectFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = claim_generation(folder, 2), claim_generation(folder, 1)
    monkeypatch.setattr(commits, "check_fence", lambda folder, generation: None)
    _save(folder, 20, first)
    assert committed_steps(folder) == [20]


def test_a_commit_that_slips_past_the_fence_counts_for_nobody_and_gives_way(
    folder: ObjectFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The older start looks, is held up, and creates its manifest when the newer one has gone on already."""
    first = claim_generation(folder, 1)
    _save(folder, 10, first)
    second = claim_generation(folder, 1)
    record_resumed(folder, second, 1, 10)
    with monkeypatch.context() as late:
        late.setattr(commits, "check_fence", lambda folder, generation: None)
        _save(folder, 20, first)
        _save(folder, 30, first)
    assert committed_steps(folder) == [10]
    _save(folder, 20, second)
    assert committed_steps(folder) == [10, 20] and read_manifest(folder, 20).generation == second
    retain(folder, CheckpointConfig(), second)
    assert folder.names("step-00000030") == []
    assert folder.names("step-00000020") == sorted(
        ["manifest.json", *(f"{rank_name(0, 1, second)}.{suffix}" for suffix in ("json", "safetensors"))]
    )


def test_what_was_committed_before_a_newer_start_looked_stays_its_base(folder: ObjectFolder) -> None:
    first = claim_generation(folder, 1)
    _save(folder, 10, first)
    second = claim_generation(folder, 1)
    record_resumed(folder, second, 1, 10)
    assert committed_steps(folder) == [10]


def test_two_starts_never_commit_the_same_step(folder: ObjectFolder) -> None:
    generation = claim_generation(folder, 1)
    _save(folder, 10, generation)
    with pytest.raises(DoNotRetry, match="two runs write to one folder"):
        commit(folder, _manifest(10, generation, samples_seen=7))
    commit(folder, _manifest(10, generation))  # its own, whose answer was lost
    assert read_manifest(folder, 10).samples_seen == 0


def test_a_damaged_manifest_still_stands_for_a_checkpoint_and_a_damaged_start_loses_nothing(
    folder: ObjectFolder,
) -> None:
    generation = claim_generation(folder, 1)
    _save(folder, 10, generation)
    folder.put("step-00000010/manifest.json", b"{")
    folder.put("generation-00000009.json", b"{")
    assert committed_steps(folder) == [10]
    assert claim_generation(folder, 1) == 10


def test_retention_takes_garbage_along_and_leaves_what_is_under_way(folder: ObjectFolder) -> None:
    killed = claim_generation(folder, 1)
    for step in (10, 20):
        _save(folder, step, killed)
    _write_share(folder, 30, killed)
    now = claim_generation(folder, 1)
    record_resumed(folder, now, 1, 20)
    _write_share(folder, 25, now)
    _write_share(folder, 10, now)
    _save(folder, 30, now)
    _write_share(folder, 40, now)
    assert retain(folder, CheckpointConfig(keep_last=2), now) == [10]
    assert committed_steps(folder) == [20, 30]
    names = {step: folder.names(f"step-{step:08d}") for step in (10, 20, 25, 30, 40)}
    assert not names[10] and not names[25]
    assert all("generation-2" in name for name in names[30] if name != "manifest.json") and len(names[30]) == 3
    assert len(names[40]) == 2, "it is newer than what is committed: it may be under way"
    _save(folder, 50, now)
    assert retain(folder, CheckpointConfig(), now) == [20]
    assert [name for name in folder.names() if not name.startswith("_")] == [
        "generation-00000002.json",
        "step-00000030",
        "step-00000050",
    ]


def test_a_start_that_was_cut_off_deletes_nothing_that_its_successor_may_be_reading(
    folder: ObjectFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held up between looks at the fence, it commits when the newer start has found step 10 to be the newest already."""
    first = claim_generation(folder, 1)
    _save(folder, 5, first)
    _save(folder, 10, first)
    second = claim_generation(folder, 1)
    with monkeypatch.context() as late:
        late.setattr(commits, "check_fence", lambda folder, generation: None)
        _save(folder, 20, first)
        _save(folder, 30, first)
    with pytest.raises(SupersededError, match="start 2 of this run"):
        retain(folder, CheckpointConfig(), first)
    record_resumed(folder, second, 1, 10)
    assert committed_steps(folder) == [5, 10], "the newer start goes on from there, and what slipped in does not count"


def test_the_newest_checkpoint_is_never_kept_alone() -> None:
    with pytest.raises(ValueError, match=r"(?s)keep_last.*greater than or equal to 2"):
        CheckpointConfig(keep_last=1)


def test_the_best_checkpoint_is_kept_by_the_figure_that_is_named(folder: ObjectFolder) -> None:
    generation = claim_generation(folder, 1)
    config = CheckpointConfig(keep_best="task")
    for step, loss in ((10, 0.5), (20, 0.2), (30, 0.4), (40, 0.3), (50, 0.6)):
        _save(folder, step, generation, figures={"loss": -loss, "task": loss})
        retain(folder, config, generation)
    assert committed_steps(folder) == [20, 40, 50]


def test_saving_is_due_by_steps_or_by_time_and_costs_one_per_cent_at_most() -> None:
    config = CheckpointConfig(every_steps=5, every_seconds=60)
    assert due(config, 10, 1.0) and due(config, 11, 60.0) and not due(config, 11, 59.0)
    never = CheckpointConfig(every_steps=None, every_seconds=None)
    assert not due(never, 10, 1e9)
    assert not due(config, 11, 60.0, stall_seconds=2.0) and due(config, 11, 200.0, stall_seconds=2.0)
    assert not due(config, 11, 60.0, in_flight=True), "what is due by time is put off"
    assert due(config, 10, 60.0, in_flight=True), "what is due by steps waits"


@given(
    steps=st.sets(st.integers(0, 50), min_size=1),
    keep_last=st.integers(2, 4),
    keep_every=st.none() | st.integers(1, 7),
    best=st.integers(0, 50),
)
def test_retention_never_deletes_the_newest_nor_the_best(
    steps: set[int], keep_last: int, keep_every: int | None, best: int
) -> None:
    config = CheckpointConfig(keep_last=keep_last, keep_every=keep_every, keep_best="loss")
    gone = superseded(steps, config, {step: {"loss": abs(step - best)} for step in steps})
    kept = steps - set(gone)
    assert set(sorted(steps)[-keep_last:]) <= kept
    assert min(steps, key=lambda step: (abs(step - best), step)) in kept
    assert keep_every is None or all(step in kept for step in steps if step % keep_every == 0)
    assert set(gone) <= steps and len(kept) >= min(keep_last, len(steps))
