"""How a launch is asked to stop."""

import logging
import os
import signal

import pytest

from launcher import stop
from launcher.stop import StopRequest, Urgency


def test_the_first_signal_asks_to_save_and_the_second_to_kill() -> None:
    with StopRequest() as request:
        assert request.urgency is Urgency.GO_ON
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.urgency is Urgency.SAVE_AND_STOP
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.urgency is Urgency.KILL


def test_a_bad_moment_of_the_object_storage_that_is_asked_ends_no_job(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stop, "_ASK_EVERY_SECONDS", 0.0)
    answers = [ConnectionResetError("try again"), True]

    def asked_elsewhere() -> bool:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    request = StopRequest(asked_elsewhere)
    with caplog.at_level(logging.WARNING):
        assert request.urgency is Urgency.GO_ON
    assert "try again" in caplog.text
    assert request.urgency is Urgency.SAVE_AND_STOP
