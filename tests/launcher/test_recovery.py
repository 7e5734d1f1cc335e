"""How long a job takes to get over a fault, told by its events."""

from launcher.recovery import Recoveries, Recovery
from trainer.heartbeat import Beat


def step(number: int) -> Beat:
    return Beat("step", number, 0.0)


def running() -> Recoveries:
    recoveries = Recoveries()
    recoveries.heard("workers_started", {"generation": 1}, 0.0)
    assert recoveries.beat(step(20), 1, 10.0) is None
    return recoveries


def test_a_recovery_lasts_from_the_fault_to_the_first_step_of_the_next_world() -> None:
    recoveries = running()
    recoveries.heard("chaos_injected", {"fault": "kill-worker=1@20"}, 11.0)
    assert recoveries.beat(step(21), 1, 11.1) is None, "the broken world's last words"
    recoveries.heard("restart", {"cause": "worker_killed", "generation": 1}, 12.0)
    recoveries.heard("workers_started", {"generation": 2}, 13.0)
    assert recoveries.newest_step == 0
    assert recoveries.beat(Beat("startup", 0, 0.0), 2, 14.0) is None
    found = recoveries.beat(step(16), 2, 18.0)
    assert found == Recovery(("kill-worker=1@20", "worker_killed"), 7.0, lost_steps=6, generation=2)
    assert recoveries.beat(step(17), 2, 18.2) is None
    assert recoveries.newest_step == 17


def test_a_fault_during_a_recovery_prolongs_it() -> None:
    recoveries = running()
    recoveries.heard("restart", {"cause": "worker_killed", "generation": 1}, 12.0)
    recoveries.heard("workers_started", {"generation": 2}, 13.0)
    recoveries.heard("restart", {"cause": "node_lost", "generation": 2}, 14.0)
    assert recoveries.beat(step(16), 2, 14.1) is None
    recoveries.heard("workers_started", {"generation": 3}, 15.0)
    found = recoveries.beat(step(16), 3, 20.0)
    assert found is not None
    assert (found.seconds, found.causes) == (8.0, ("worker_killed", "node_lost"))


def test_a_world_that_saved_before_it_ended_loses_no_step() -> None:
    recoveries = running()
    recoveries.heard("restart", {"cause": "node_joined", "generation": 1}, 12.0)
    recoveries.beat(step(21), 1, 12.1)
    recoveries.heard("workers_started", {"generation": 2}, 13.0)
    found = recoveries.beat(step(22), 2, 15.0)
    assert found is not None
    assert found.lost_steps == 0


def test_a_lost_step_is_counted_once() -> None:
    recoveries = running()
    recoveries.heard("restart", {"cause": "node_lost", "generation": 1}, 12.0)
    recoveries.heard("workers_started", {"generation": 2}, 13.0)
    recoveries.beat(step(16), 2, 15.0)
    recoveries.heard("restart", {"cause": "node_joined", "generation": 2}, 16.0)
    recoveries.heard("workers_started", {"generation": 3}, 17.0)
    found = recoveries.beat(step(17), 3, 18.0)
    assert found is not None
    assert found.lost_steps == 0, "steps 17 to 20 were lost the first time"


def test_waiting_for_the_first_data_is_no_step() -> None:
    recoveries = running()
    recoveries.heard("restart", {"cause": "worker_killed", "generation": 1}, 12.0)
    recoveries.heard("workers_started", {"generation": 2}, 13.0)
    assert recoveries.beat(Beat("data", 0, 0.0), 2, 14.0) is None
    assert recoveries.beat(step(21), 2, 15.0) == Recovery(("worker_killed",), 3.0, lost_steps=0, generation=2)
