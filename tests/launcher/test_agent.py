"""The parts of an agent that need no process."""

import json
import signal
import time
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from datastore.errors import EXIT_DO_NOT_RETRY, EXIT_FAILED, EXIT_STOPPED, DoNotRetry
from launcher import agent
from launcher.agent import (
    JobEndedError,
    NodeAgent,
    StuckWorkerError,
    build_agent,
    cause_of,
    check_environment,
    have_saved,
    parser,
    run,
    start_folder,
)
from launcher.membership import Member, Order, Report
from launcher.nursery import Nursery

KILLED, TERMINATED = -signal.SIGKILL, -signal.SIGTERM


@pytest.mark.parametrize(
    ("code", "is_hung", "cause"),
    [
        (EXIT_STOPPED, False, "saved"),
        (TERMINATED, False, "saved"),  # told to stop before it listened: there was nothing to save
        (KILLED, False, "killed"),
        (KILLED, True, "hung"),
        (EXIT_FAILED, False, "failed"),
    ],
)
def test_what_became_of_a_worker_follows_from_its_exit_code(code: int, is_hung: bool, cause: str) -> None:
    assert cause_of(code, is_hung=is_hung) == cause


def test_workers_that_were_told_to_stop_have_saved_only_if_all_did() -> None:
    assert have_saved([EXIT_STOPPED, TERMINATED])
    assert not have_saved([EXIT_STOPPED, KILLED])


def test_every_start_of_the_workers_has_a_folder_of_its_own(tmp_path: Path) -> None:
    assert [start_folder(tmp_path).name for _ in range(3)] == ["start-000", "start-001", "start-002"]


@pytest.mark.parametrize("environment", [{}, {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0"}])
def test_without_the_mandatory_environment_an_agent_refuses_to_run(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(DoNotRetry, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE must be 1"):
        check_environment(environment)
    monkeypatch.delenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", raising=False)
    words = [
        "--endpoint",
        "127.0.0.1:1",
        "--job",
        "j",
        "--node",
        "0",
        "--logs",
        str(tmp_path),
        "--",
        "true",
    ]
    with pytest.raises(DoNotRetry) as refused:
        run(parser().parse_args(words))
    assert refused.value.exit_code == EXIT_DO_NOT_RETRY


class Unkillable:
    """A worker in a call of the kernel that does not return."""

    pid, exit_code = 4711, None

    def __init__(self) -> None:
        self.heard: list[int] = []

    def send(self, number: signal.Signals) -> None:
        self.heard.append(number)

    def has_ended_within(self, seconds: float) -> bool:
        time.sleep(max(0.0, seconds))
        return False


class OneWorker:
    """A nursery that has this one worker."""

    is_alive = True

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def start(self, *_: object) -> Any:
        return self._worker

    def __enter__(self) -> "OneWorker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return


def agent_of(tmp_path: Path, worker: Any) -> tuple[NodeAgent, list[Report]]:
    """An agent that nothing connects to others, and what it says."""
    words = ["--endpoint", "127.0.0.1:1", "--job", "j", "--node", "0", "--logs", str(tmp_path), "--", "true"]
    made = build_agent(parser().parse_args(words), OneWorker(worker))  # type: ignore[arg-type]
    said: list[Report] = []
    link = made._link
    link._agent = 0
    link._order = Order(1, (Member(0, 0, "127.0.0.1", 1),))

    def say(report: Report) -> None:
        said.append(report)
        link._heard_at = time.monotonic()

    link.say = say  # type: ignore[method-assign]
    link.deliver = lambda report, seconds: say(report) is None  # type: ignore[method-assign, func-returns-value]
    link.wait = lambda seconds: time.sleep(0.01)  # type: ignore[method-assign]
    return made, said


def events(tmp_path: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def test_an_agent_leaves_a_worker_that_does_not_end_when_killed_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "KILL_SECONDS", 0.3)
    worker = Unkillable()
    made, said = agent_of(tmp_path, worker)
    monkeypatch.setattr(agent, "build_agent", lambda *_: made)
    monkeypatch.setattr(Nursery, "forked", lambda stage: OneWorker(worker))
    monkeypatch.setattr(made, "listen", lambda: None)
    monkeypatch.setattr(made, "start_link", lambda: None)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    monkeypatch.setattr(made._link, "_order", Order(1, (Member(0, 0, "127.0.0.1", 1),)))
    started = time.monotonic()
    monkeypatch.setattr(made, "_monitor_workers", lambda group: made._kill_workers())
    arguments = parser().parse_args(
        ["--endpoint", "127.0.0.1:1", "--job", "j", "--node", "0", "--logs", str(tmp_path), "--", "true"]
    )
    with pytest.raises(StuckWorkerError, match=r"Process 4711 has not ended .* stuck in the kernel") as raised:
        run(arguments)
    assert time.monotonic() - started < 5.0
    assert raised.value.exit_code == EXIT_FAILED
    assert said[-1] == Report("leaving", 1, exit_code=EXIT_FAILED)
    assert worker.heard[0] == signal.SIGKILL
    assert events(tmp_path, "worker_stuck")[0]["pids"] == [4711]


class Done:
    """A worker that has done its work."""

    pid, exit_code = 4711, 0

    def send(self, number: signal.Signals) -> None:
        return

    def has_ended_within(self, seconds: float) -> bool:
        return True


def test_an_agent_that_is_told_to_stop_while_it_waits_for_others_leaves_and_promises_no_success(tmp_path: Path) -> None:
    made, said = agent_of(tmp_path, Done())
    wait = made._link.wait

    def stop_soon(seconds: float) -> None:
        if said[-1].phase == "done":
            made.stop()
        wait(seconds)

    made._link.wait = stop_soon  # type: ignore[method-assign]
    with pytest.raises(JobEndedError) as ended:
        made.run()
    assert ended.value.exit_code == EXIT_STOPPED
    assert [report.phase for report in said] == ["ready", "running", "done", "leaving"]
    assert said[-1].exit_code == EXIT_STOPPED
    assert len(events(tmp_path, "workers_done")) == 1


def test_an_agent_says_when_others_train_without_it(tmp_path: Path) -> None:
    made, _ = agent_of(tmp_path, Done())
    of_others = Order(1, (Member(7, 1, "127.0.0.1", 1),))
    orders = iter([Order(), of_others, of_others, replace(of_others, restart="now"), Order(2, of_others.members)])
    link = made._link
    link._order = next(orders)

    def wait(seconds: float) -> None:
        link._order = next(orders, Order(3, (Member(0, 0, "127.0.0.1", 1),)))

    link.wait = wait  # type: ignore[method-assign]
    made._handler.next_rendezvous()
    lines = [json.loads(line)["event"] for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert lines == ["node_spare", "node_waits", "node_spare"]


class Busy:
    """A worker that goes on until it is killed."""

    pid = 4711

    def __init__(self) -> None:
        self.heard: list[int] = []

    @property
    def exit_code(self) -> int | None:
        return KILLED if signal.SIGKILL in self.heard else None

    def send(self, number: signal.Signals) -> None:
        self.heard.append(number)

    def has_ended_within(self, seconds: float) -> bool:
        return self.exit_code is not None


def test_a_link_that_is_cut_while_workers_save_for_another_world_is_not_ignored(tmp_path: Path) -> None:
    worker = Busy()
    made, _ = agent_of(tmp_path, worker)
    made._workers = {0: worker}  # type: ignore[dict-item]
    made._silence_seconds = 0.3
    made._link._order = replace(made._link.order, restart="after_saving")
    made._link._heard_at = started = time.monotonic()
    made._stop_workers(made.get_worker_group())
    assert worker.heard[0] == signal.SIGTERM
    assert signal.SIGKILL in worker.heard
    assert 0.2 < time.monotonic() - started < 5.0
