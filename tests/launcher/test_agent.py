"""The parts of an agent that need no process."""

import signal
from pathlib import Path

import pytest

from datastore.errors import EXIT_DO_NOT_RETRY, DoNotRetry
from launcher.agent import NodeLogs, check_environment, final_exit_code, parser, run

KILLED, TERMINATED = -signal.SIGKILL, -signal.SIGTERM


@pytest.mark.parametrize(
    ("codes", "final"),
    [
        ([64], 64),
        ([1, 64], 64),
        ([2], 2),
        ([75], 75),
        ([75, TERMINATED], 75),  # the neighbour was in its last lines when the agent's signal met it
        ([75, KILLED], None),  # the neighbour of a killed worker saves when it is told to end: that is no wish to stop
        ([1], None),
        ([KILLED], None),
        ([], None),
    ],
)
def test_only_some_exit_codes_end_a_job(codes: list[int], final: int | None) -> None:
    assert final_exit_code(codes) == final


def test_every_start_of_the_workers_has_logs_of_its_own(tmp_path: Path) -> None:
    logs = NodeLogs(tmp_path)
    first, second = (logs.reify({0: {}, 1: {}}).stderrs for _ in range(2))
    assert first == {rank: str(tmp_path / f"start-000/worker-{rank}.err.log") for rank in (0, 1)}
    assert second[0] == str(tmp_path / "start-001/worker-0.err.log")
    assert NodeLogs(tmp_path).reify({0: {}}).stdouts[0] == str(tmp_path / "start-002/worker-0.out.log")


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
        "--nodes",
        "1",
        "--logs",
        str(tmp_path),
        "--",
        "true",
    ]
    with pytest.raises(DoNotRetry) as refused:
        run(parser().parse_args(words))
    assert refused.value.exit_code == EXIT_DO_NOT_RETRY
