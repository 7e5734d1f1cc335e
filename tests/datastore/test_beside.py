"""Waits beside each other take as long as the longest, and an interrupt ends them."""

import signal
import subprocess
import sys
import threading
import time

import pytest

from datastore.beside import beside_each_other


def test_results_come_in_the_order_of_the_functions_which_wait_at_the_same_time() -> None:
    meeting = threading.Barrier(3, timeout=10)

    def met(number: int) -> int:
        meeting.wait()
        time.sleep(0.01 * (3 - number))
        return number

    assert beside_each_other([lambda: met(0), lambda: met(1), lambda: met(2)]) == [0, 1, 2]
    assert beside_each_other([]) == []


def test_the_first_functions_error_is_the_one_that_is_raised() -> None:
    def wrong(number: int) -> None:
        raise ValueError(str(number))

    with pytest.raises(ValueError, match="1"):
        beside_each_other([lambda: 0, lambda: wrong(1), lambda: wrong(2)])


def test_a_server_that_never_answers_does_not_hold_up_an_interrupt() -> None:
    program = (
        "import time; from datastore.beside import beside_each_other; print('waits', flush=True); "
        "beside_each_other([lambda: time.sleep(60), lambda: time.sleep(60)])"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == b"waits\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    assert b"KeyboardInterrupt" in errors
