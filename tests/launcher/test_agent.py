"""The parts of an agent that need no process."""

import signal
from pathlib import Path

import pytest

from datastore.errors import EXIT_DO_NOT_RETRY, EXIT_FAILED, EXIT_STOPPED, DoNotRetry
from launcher.agent import cause_of, check_environment, have_saved, parser, run, start_folder

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
