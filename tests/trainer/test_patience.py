"""Trouble with storage that may pass is waited out."""

import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from datastore.errors import EXIT_UNAVAILABLE, StoreError, Unavailable, ViewpointError
from datastore.objects import ObjectFolder
from trainer import patience
from trainer.commits import claim_generation, committed_steps
from trainer.patience import Patience, PatientFolder


class Clock:
    """One that only sleeping moves."""

    def __init__(self) -> None:
        self._now = 1000.0

    def monotonic(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "time", Clock())


def failing(times: int, error: Exception) -> Callable[[], str]:
    left = [error] * times

    def action() -> str:
        if left:
            raise left.pop()
        return "done"

    return action


@pytest.mark.parametrize("error", [ViewpointError("no answer"), ConnectionResetError("reset"), TimeoutError("slow")])
def test_what_may_pass_is_tried_again_and_said(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert Patience(60.0).persist(failing(5, error), "read a") == "done"
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "cannot read a, which is tried for 60 s",
        "it was possible to read a after 6.2 s",
    ]


@pytest.mark.parametrize(
    "error", [StoreError("refused"), FileNotFoundError(errno.ENOENT, "gone"), OSError(errno.ENOSPC, "full")]
)
def test_what_will_not_pass_is_raised_at_once(error: Exception) -> None:
    with pytest.raises(type(error)):
        Patience(60.0).persist(failing(1, error), "read a")


def test_the_budget_is_one_for_all_and_its_end_has_an_exit_code_of_its_own() -> None:
    one = Patience(10.0)
    one.persist(failing(5, TimeoutError()), "read a")
    with pytest.raises(Unavailable, match="not possible to read b within 4 s: TimeoutError: no answer") as raised:
        one.persist(failing(100, TimeoutError("no answer")), "read b")
    assert raised.value.exit_code == EXIT_UNAVAILABLE


def test_a_start_claims_its_number_and_finds_checkpoints_through_a_short_outage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsteady(action: Any) -> Any:
        calls = iter(range(1000))

        def attempt(*arguments: Any) -> Any:
            if next(calls) % 3 != 2:
                raise ConnectionResetError("try again")
            return action(*arguments)

        return attempt

    for name in ("names", "create", "read", "read_all"):
        monkeypatch.setattr(ObjectFolder, name, unsteady(getattr(ObjectFolder, name)))
    folder = PatientFolder(str(tmp_path), Patience(60.0))
    assert claim_generation(folder, world_size=1) == 1
    assert committed_steps(folder) == []
    with pytest.raises(ConnectionResetError):
        claim_generation(ObjectFolder(str(tmp_path)), world_size=1)
