"""When a worker counts as hung."""

import pytest

from launcher.watchdog import Deadlines, Watch
from trainer.heartbeat import Beat

DEADLINES = Deadlines(step_floor=10.0, step_factor=10.0, startup=100.0, checkpoint=200.0)


def stepping(watch: Watch, seconds: float, steps: int, start: float = 0.0) -> float:
    """Looks once a second while a worker takes its steps; the time of the last one."""
    now = start
    for step in range(1, steps + 1):
        until = start + step * seconds
        while now < until:
            assert watch.look(Beat("step", step - 1, start + (step - 1) * seconds), now) is None
            now += 1.0
        assert watch.look(Beat("step", step, until), now) is None
    return now


def silent_until(watch: Watch, beat: Beat, now: float, limit: float = 1000.0) -> float:
    """For how long a worker may say the same, in whole seconds."""
    watch.look(beat, now)
    for second in range(1, int(limit)):
        if watch.look(beat, now + second):
            return second - 1.0
    return limit


def test_each_phase_has_a_deadline_and_steps_one_that_follows_from_those_before() -> None:
    assert DEADLINES.allowed("startup", 0.0) == 100
    assert DEADLINES.allowed("checkpoint", 50.0) == 200
    assert DEADLINES.allowed("step", 0.1) == 10, "not below the floor"
    assert DEADLINES.allowed("step", 5.0) == 50


def test_slow_steps_allow_longer_silence() -> None:
    quick, slow = Watch(DEADLINES), Watch(DEADLINES)
    assert silent_until(quick, Beat("step", 9, 9.0), stepping(quick, 1.0, 8)) == 10
    assert silent_until(slow, Beat("step", 9, 36.0), stepping(slow, 4.0, 8)) == 40


def test_the_first_step_does_not_say_how_long_one_takes() -> None:
    assert silent_until(Watch(DEADLINES), Beat("step", 1, 0.0), 0.0) == 100
    watch = Watch(DEADLINES)
    watch.look(Beat("startup", 0, 0.0), 0.0)
    watch.look(Beat("step", 1, 50.0), 50.0)
    assert watch.look(Beat("step", 1, 50.0), 54.0) is None
    now = 54.0
    while now < 130.0:
        now += 1.0
        assert watch.look(Beat("step", 1, 50.0), now) is None, "steps of 90 s would otherwise never get on"
    watch.look(Beat("step", 2, 140.0), 140.0)
    assert silent_until(watch, Beat("step", 3, 230.0), 230.0) == 900


def test_one_slow_step_does_not_make_the_watchdog_patient() -> None:
    watch = Watch(DEADLINES)
    now = stepping(watch, 1.0, 20)
    assert watch.look(Beat("step", 21, 9.5), now + 1) is None, "nine seconds"
    assert silent_until(watch, Beat("step", 22, 10.5), now + 2) == 10


def test_start_and_checkpoint_take_longer_than_a_step() -> None:
    assert silent_until(Watch(DEADLINES), Beat("startup", 0, 0.0), 0.0) == 100
    watch = Watch(DEADLINES)
    assert silent_until(watch, Beat("checkpoint", 9, 9.0), stepping(watch, 1.0, 9)) == 200


@pytest.mark.parametrize(("phase", "longer"), [("checkpoint", 200), ("startup", 100), ("finishing", 900)])
def test_a_suspended_worker_has_no_longer_than_a_step_whatever_it_was_at(phase: str, longer: int) -> None:
    watch = Watch(DEADLINES)
    now = stepping(watch, 1.0, 9)
    beat = Beat(phase, 9, 9.0)
    assert watch.look(beat, now, lambda: True) is None
    assert [watch.look(beat, now + second, lambda: True) for second in range(1, 11)] == [None] * 10
    hang = watch.look(beat, now + 11, lambda: True)
    assert hang is not None and (hang.phase, hang.allowed_seconds) == (phase, 10.0)
    assert watch.look(beat, now + 12, lambda: False) is None, "one that runs may be slow"
    assert watch.look(Beat(phase, 9, 9.5), now + 13, lambda: True) is None
    slow = Watch(DEADLINES)
    assert silent_until(slow, beat, now) == longer


def test_a_hang_says_how_long_and_in_what() -> None:
    watch = Watch(DEADLINES)
    now = stepping(watch, 1.0, 8)
    for second in range(1, 12):
        hang = watch.look(Beat("step", 8, 8.0), now + second)
    assert hang is not None
    assert (hang.phase, hang.step, hang.silent_seconds, hang.allowed_seconds) == ("step", 8, 11.0, 10.0)


def test_a_worker_that_never_says_a_word_is_not_watched() -> None:
    watch = Watch(DEADLINES)
    assert all(watch.look(None, float(now)) is None for now in range(10_000))


def test_an_agent_that_was_stopped_itself_does_not_blame_its_worker() -> None:
    watch = Watch(DEADLINES)
    now = stepping(watch, 1.0, 8)
    assert watch.look(Beat("step", 8, 8.0), now + 500) is None
    assert silent_until(watch, Beat("step", 8, 8.0), now + 500) == 10


def test_waiting_for_data_is_no_hang_while_it_is_said_and_one_soon_after() -> None:
    watch = Watch(DEADLINES)
    now = stepping(watch, 1.0, 8)
    for second in range(1, 120):
        assert watch.look(Beat("data", 8, float(second)), now + second) is None, "two minutes of trouble with a read"
    assert silent_until(watch, Beat("data", 8, 120.0), now + 120) == 10, "of a suspended process, or one out of time"


def test_how_long_a_step_takes_is_known_though_each_ends_with_a_wait_for_data() -> None:
    watch = Watch(DEADLINES)
    for step in range(1, 8):
        watch.look(Beat("step", step, 3.0 * step), 3.0 * step)
        watch.look(Beat("data", step, 3.0 * step + 2), 3.0 * step + 2)
        watch.look(Beat("step", step, 3.0 * step), 3.0 * step + 2.9)  # the wait is over
    assert silent_until(watch, Beat("step", 8, 24.0), 24.0) == 30
