"""Command lines and environments as pure functions: golden."""

import json
import subprocess
import sys
from pathlib import Path

from launcher.command import (
    METRICS_OFFSET_VARIABLE,
    Command,
    Layout,
    Machine,
    Place,
    devices_of_node,
    node_command,
    process_command,
    worker_words,
)
from trainer.metrics import PORT_OFFSET_VARIABLE

PROGRESS = Path("runs/a/logs/progress/pretrain")


def test_the_command_of_a_node_is_its_agent_with_the_worker_behind_it() -> None:
    command = node_command(
        worker_words(("pretrain", "--config", "runs/a/config.yaml", "--run", "runs/a")),
        node=1,
        layout=Layout(nodes=4, procs_per_node=2, step_deadline=90),
        job="pretrain",
        endpoint="127.0.0.1:29400",
        logs=Path("runs/a/logs/node-1/pretrain"),
        machine=Machine(cores=16),
        progress=PROGRESS,
    )
    assert " ".join(command.words) == (
        f"{sys.executable} -m launcher.agent --endpoint 127.0.0.1:29400 --job pretrain --node 1 "
        f"--procs-per-node 2 --address 127.0.0.1 --node-timeout 6 --step-deadline 90 "
        f"--logs runs/a/logs/node-1/pretrain -- "
        f"{sys.executable} -m trainer pretrain --config runs/a/config.yaml --run runs/a"
    )
    assert command.environment == {
        "VIEWPOINT_PROGRESS_DIR": str(PROGRESS),
        "OMP_NUM_THREADS": "2",
        "PYTHONUNBUFFERED": "1",
        "DS_ACCELERATOR": "cpu",
        "MALLOC_MMAP_THRESHOLD_": "1073741824",
        "MALLOC_TRIM_THRESHOLD_": "4294967296",
        "MALLOC_ARENA_MAX": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        "VIEWPOINT_METRICS_PORT_OFFSET": "2",
    }


def test_nodes_on_one_machine_have_metrics_ports_of_their_own() -> None:
    assert METRICS_OFFSET_VARIABLE == PORT_OFFSET_VARIABLE

    def offset(node: int, place: Place) -> str | None:
        command = node_command(
            ["w"], node=node, layout=Layout(4, procs_per_node=2), job="j", endpoint="e:1", logs=Path("l"),
            machine=Machine(cores=2), progress=PROGRESS, place=place,
        )  # fmt: skip
        return command.environment.get(METRICS_OFFSET_VARIABLE)

    assert [offset(node, Place()) for node in range(4)] == [None, "2", "4", "6"]
    assert offset(3, Place("10.77.1.13", "eth0", "vp1n3")) is None


def test_a_process_by_itself_has_all_cores() -> None:
    command = process_command(worker_words(("report", "runs/a")), Machine(cores=6), PROGRESS)
    assert command.words == (sys.executable, "-m", "trainer", "report", "runs/a")
    assert command.environment["OMP_NUM_THREADS"] == "6"


def test_more_processes_than_cores_get_one_thread_each() -> None:
    command = node_command(
        ["w"],
        node=0,
        layout=Layout(4),
        job="j",
        endpoint="e:1",
        logs=Path("l"),
        machine=Machine(cores=2),
        progress=PROGRESS,
    )
    assert command.environment["OMP_NUM_THREADS"] == "1"


def test_the_shell_line_can_be_pasted() -> None:
    command = process_command(
        ("python", "-m", "trainer", "ingest", "demo://shapes?count=8&seed=0"), Machine(2), Path("p q")
    )
    assert command.as_shell() == (
        "VIEWPOINT_PROGRESS_DIR='p q' OMP_NUM_THREADS=2 PYTHONUNBUFFERED=1 DS_ACCELERATOR=cpu "
        "MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_ARENA_MAX=1 "
        "python -m trainer ingest 'demo://shapes?count=8&seed=0'"
    )


def test_folded_lines_can_be_pasted_too() -> None:
    show = 'import json, os, sys; print(json.dumps([os.environ["A_VARIABLE"], sys.argv[1:]]))'
    arguments = ["--source", "a b'c&d", "--flag", "--path", "p" * 120, "--", "python", "-m", "trainer", "x" * 30]
    command = Command((sys.executable, "-c", show, *arguments), {"A_VARIABLE": "1 2", "B_VARIABLE": "s" * 60})
    folded = command.as_shell(width=80, indent=3)
    assert json.loads(subprocess.check_output(["bash", "-c", folded])) == ["1 2", arguments]
    lines = folded.splitlines()
    assert lines[0] == "   A_VARIABLE='1 2' \\"
    assert lines[-1] == f"       python -m trainer {'x' * 30}"
    assert all(len(line) <= 80 or show in line or "p" * 120 in line for line in lines)


def test_each_node_has_gpus_of_its_own_or_nobody_has_any() -> None:
    two_by_two = Layout(nodes=2, procs_per_node=2)
    assert [devices_of_node(node, two_by_two, gpus=4) for node in (0, 1)] == ["0,1", "2,3"]
    assert [devices_of_node(node, two_by_two, gpus=3) for node in (0, 1)] == ["", ""]
    assert devices_of_node(0, two_by_two, gpus=0) is None


def test_processes_that_share_too_few_gpus_compute_on_the_cpu() -> None:
    command = node_command(
        ["w"],
        node=0,
        layout=Layout(4),
        job="j",
        endpoint="e:1",
        logs=Path("l"),
        machine=Machine(cores=8, gpus=1),
        progress=PROGRESS,
    )
    assert command.environment["CUDA_VISIBLE_DEVICES"] == ""
    assert command.environment["DS_ACCELERATOR"] == "cpu"
