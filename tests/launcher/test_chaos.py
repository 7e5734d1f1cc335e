"""What --chaos may say, when each fault is due, and a launch that gets over them."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from datastore.errors import EXIT_DONE, AskedWrongly
from launcher.chaos import Chaos, Fault, needs_networks, parse_chaos
from launcher.command import Layout
from tests.accounts import check_time_adds_up
from tests.runs import tiny_config, write_corpus
from trainer.runfolder import RunFolder

THREE = Layout(3, procs_per_node=2)


def test_a_plan_reads_as_its_help_says() -> None:
    plan = "partition=2@80:30s, kill-worker@step=20,kill-node=1@40,hang=1@60,preempt=0@90:2.5s"
    assert parse_chaos(plan, THREE) == (
        Fault("kill-worker", 5, 20),
        Fault("kill-node", 1, 40, 15.0),
        Fault("hang", 1, 60),
        Fault("partition", 2, 80, 30.0),
        Fault("preempt", 0, 90, 2.5),
    )


def test_a_fault_is_written_as_it_is_read() -> None:
    faults = parse_chaos("kill-worker=0@20,partition=2@80:30s", THREE)
    assert parse_chaos(",".join(map(str, faults)), THREE) == faults


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [
        ("", "names no fault"),
        ("kill-worker", "'kill-worker' is no fault. One reads FAULT"),
        ("kill-worker@soon", "'kill-worker@soon' is no fault"),
        ("kill-nodes=1@4", "'kill-nodes' in 'kill-nodes=1@4' is not one of kill-worker, kill-node"),
        ("kill-node=3@4", "means node 3, but there are 3: 0 to 2"),
        ("hang=6@4", "means rank 6, but there are 6: 0 to 5"),
        ("hang=1@4:3s", "has a time, which hang does not take"),
        ("partition=1@4:30", "is no fault"),
    ],
)
def test_a_bad_plan_is_refused_with_what_is_wrong(plan: str, complaint: str) -> None:
    with pytest.raises(AskedWrongly, match=complaint):
        parse_chaos(plan, THREE)


def test_each_fault_is_due_once_even_if_its_step_is_done_again() -> None:
    chaos = Chaos(parse_chaos("kill-worker@20,hang@22", THREE))
    assert chaos.due(19) == []
    assert [fault.kind for fault in chaos.due(21)] == ["kill-worker"]
    assert chaos.due(20) == []
    assert [fault.kind for fault in chaos.due(30)] == ["hang"]


def test_only_partitions_need_networks() -> None:
    assert needs_networks(parse_chaos("kill-node@1,partition@2", THREE))
    assert not needs_networks(parse_chaos("kill-node@1", THREE))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_launch_gets_over_three_faults_that_it_was_asked_for_and_its_time_adds_up(tmp_path: Path) -> None:
    store = write_corpus(f"{tmp_path}/shapes.zarr")
    checkpoint = {"every_steps": 10, "every_seconds": None, "background": False}
    config = tiny_config(store.url, steps=800, global_batch=12, checkpoint=checkpoint, evaluation={"protocols": []})
    tree = config.model_dump(mode="json", exclude={"job": True, "data": {"store_url"}})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(tree))
    words = ["launch", "./mine.yaml", "--data", store.url, "--run", "mine", "--nodes", "2:3", "--step-deadline", "5"]
    words += ["--chaos", "kill-worker=1@50,hang=1@150,kill-node=2@250:3s"]
    done = subprocess.run(
        [sys.executable, "-m", "launcher", *words], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == EXIT_DONE, done.stderr
    run = RunFolder(f"{tmp_path}/runs/mine")
    events = run.events()
    assert [event["fault"] for event in events if event["event"] == "chaos_injected"] == [
        "kill-worker=1@50", "hang=1@150", "kill-node=2@250:3s"
    ]  # fmt: skip
    causes = [event["cause"] for event in events if event["event"] == "restart"]
    assert causes == ["worker_killed", "worker_hung", "node_lost", "node_joined"]
    account = check_time_adds_up(run)
    assert account["down"] > 5 and account["redone"] > 0
    assert "recovered from 4 disturbances" in done.stdout
