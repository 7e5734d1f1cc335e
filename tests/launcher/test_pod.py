"""What one pod runs, and how it ends: commands as pure functions, processes with commands of a few milliseconds."""

import json
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from datastore.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, AskedWrongly, DoNotRetry
from launcher import pod
from launcher.command import Command, worker_words
from launcher.link import Link
from launcher.membership import Failure, Membership, Report, Rules
from launcher.pod import (
    EXIT_CANCELLED,
    Keeper,
    Kept,
    Output,
    Pod,
    Sign,
    Told,
    agent_command,
    interface_of,
    part_command,
    pod_of,
    store_words,
    upload_logs,
    write_config,
)
from launcher.presence import holder_of
from launcher.stop import STOP_REQUESTED
from tests.runs import tiny_config, write_corpus
from trainer.runfolder import RunFolder

RUN = "s3://b/runs/a"
PRETRAIN = ("pretrain", f"--config={RUN}/config.yaml", f"--run={RUN}")
NODE = ("--nodes=4", "--rendezvous=a-0.viewpoint:29400", "--address=10.0.0.7", "--cores=8")


def made(*words: str, **changes: Any) -> Pod:
    found = pod_of(pod.parser().parse_args(words))
    return Pod(**{**vars(found), **changes})


def python(program: str) -> Command:
    return Command((sys.executable, "-I", "-S", "-c", program))


def test_a_node_is_an_agent_that_meets_the_others_by_name_and_is_found_by_address() -> None:
    node = made("--index=2", *NODE, "--procs-per-node=2", "--gpus=2", "--job=pretrain", "--", *PRETRAIN)
    command = agent_command(node, "eth0")
    assert " ".join(command.words) == (
        f"{sys.executable} -m launcher.agent --endpoint a-0.viewpoint:29400 --job pretrain --node 2 --procs-per-node 2 "
        f"--address 10.0.0.7 --node-timeout 10 --step-deadline 60 --logs /tmp/viewpoint/logs/node-2/pretrain -- "
        + " ".join(worker_words(PRETRAIN))
    )
    assert command.environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert command.environment["GLOO_SOCKET_IFNAME"] == "eth0"
    assert command.environment["OMP_NUM_THREADS"] == "4", "the pod's cores over its own processes"
    assert "DS_ACCELERATOR" not in command.environment
    assert agent_command(made(*NODE, "--", *PRETRAIN), "eth0").environment["DS_ACCELERATOR"] == "cpu"


def test_training_goes_on_with_the_nodes_that_the_manifest_says_a_number_or_all(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert made(*NODE, "--min-nodes=all", "--", *PRETRAIN).layout.least_nodes == 4
    assert made(*NODE, "--min-nodes=2", "--", *PRETRAIN).layout.least_nodes == 2
    with pytest.raises(SystemExit):
        made(*NODE, "--min-nodes=some", "--", *PRETRAIN)
    assert "must be a number or all, got 'some'" in capsys.readouterr().err


def test_a_part_of_ingest_says_which_and_a_part_of_cache_is_a_rank() -> None:
    ingest = part_command(made("--index=1", "--nodes=3", "--", "ingest", "a", "b"))
    assert ingest.words[-2:] == ("--part", "1/3")
    cache = part_command(made("--index=1", "--nodes=3", "--", "cache", "s"))
    assert (cache.environment["RANK"], cache.environment["WORLD_SIZE"], cache.environment["LOCAL_RANK"]) == (
        "1",
        "3",
        "0",
    )
    alone = part_command(made("--nodes=1", "--", "evaluate", "r"))
    assert alone.words == worker_words(("evaluate", "r"))
    assert "RANK" not in alone.environment
    assert "VIEWPOINT_PROGRESS_DIR" not in alone.environment


def test_the_index_is_the_job_s_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "3")
    assert made("--nodes=4", "--", "ingest", "a", "b").index == 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--index=4", *NODE, "--", *PRETRAIN), "NODES must be what spec.completions"),
        (("--nodes=2", "--", *PRETRAIN), "needs --rendezvous"),
        (("--nodes=2", "--", "evaluate", "r"), "is one process"),
        ((*NODE, "--min-nodes=5", "--", *PRETRAIN), "--min-nodes must be from 1 to"),
    ],
)
def test_what_does_not_fit_is_refused(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(AskedWrongly, match=said):
        made(*words)


def test_the_run_that_is_watched_is_the_one_that_is_trained_unless_told() -> None:
    assert made(*NODE, "--", *PRETRAIN).run_folder == RUN
    assert made(*NODE, "--run-folder=s3://b/other", "--", *PRETRAIN).run_folder == "s3://b/other"
    assert made("--nodes=1", "--", "evaluate", "r").run_folder is None


def test_options_of_the_stage_are_found_in_both_forms() -> None:
    assert made(*NODE, "--", "pretrain", "--run", "u", "--config=c").option("--run") == "u"
    assert made(*NODE, "--", "pretrain", "--run", "u", "--config=c").option("--config") == "c"
    assert made(*NODE, "--", "pretrain", "--run").option("--run") is None


def test_the_interface_is_the_one_with_the_pod_s_address() -> None:
    interfaces = {"lo": ["127.0.0.1"], "net1": ["10.0.0.7", "fe80::1"]}
    assert interface_of("10.0.0.7", interfaces) == "net1"
    with pytest.raises(AskedWrongly, match=r"status\.podIP"):
        interface_of("10.0.0.8", interfaces)


def test_the_store_has_the_words_of_its_pod_and_another_role() -> None:
    words = store_words(["--role=node", *NODE, "--recipe=a.yaml", "--", *PRETRAIN])
    assert words[:3] == (sys.executable, "-m", "launcher.pod")
    arguments = pod.parser().parse_args(words[3:])
    assert arguments.role == "store"
    assert arguments.recipe is None
    assert tuple(arguments.words) == PRETRAIN


def ended(kept: Kept, *, again: bool = True) -> int:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        code = kept.tick(again=again)
        if code is not None:
            return code
        time.sleep(0.01)
    raise AssertionError("it does not end")


def test_what_is_killed_starts_again_and_what_fails_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod, "_AGAIN_SECONDS", 0.0)
    mark = tmp_path / "mark"
    dies_once = python(
        f"import os, signal; first = not os.path.exists({str(mark)!r}); open({str(mark)!r}, 'w').close(); "
        f"os.kill(os.getpid(), signal.SIGKILL) if first else os._exit(7)"
    )
    kept = Kept(dies_once, max_deaths=2)
    kept.start()
    assert ended(kept) == 7
    assert kept.deaths == 1
    always = Kept(python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"), max_deaths=2)
    always.start()
    assert ended(always) == -signal.SIGKILL
    assert always.deaths == 2
    told = Kept(python("import os, signal; os.kill(os.getpid(), signal.SIGKILL)"), max_deaths=2)
    told.start()
    assert ended(told, again=False) == -signal.SIGKILL
    assert told.deaths == 0


def test_what_does_not_end_in_time_is_killed() -> None:
    kept = Kept(python("import time; time.sleep(60)"), max_deaths=0)
    kept.end(0.1)
    kept.start()
    kept.send(signal.SIGSTOP)
    kept.end(0.1)
    assert kept.tick(again=False) == -signal.SIGKILL


@pytest.fixture
def told() -> Any:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    yield Told()
    for number, handler in before.items():
        signal.signal(number, handler)


SAVES = (
    "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); print('there', flush=True); time.sleep(60)"
)


@pytest.mark.parametrize(
    ("program", "stop", "code"),
    [
        ("pass", None, EXIT_DONE),
        ("import os; os._exit(64)", None, 64),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", None, EXIT_FAILED),
        (SAVES, "signal", EXIT_STOPPED),
        ("import time; time.sleep(60)", "signal", EXIT_STOPPED),
        (SAVES, "cancel", EXIT_CANCELLED),
    ],
)
def test_a_part_ends_as_its_process_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Told, program: str, stop: str | None, code: int
) -> None:
    monkeypatch.setattr(pod, "part_command", lambda _: python(program))
    monkeypatch.setattr(pod, "_LOOK_SECONDS", 0.5)
    run = RunFolder(str(tmp_path / "run"))
    part = made("--nodes=1", "--", "cache", "s", scratch=tmp_path, run_folder=run.url)
    if stop == "signal":
        threading.Timer(0.7, lambda: setattr(told, "number", signal.SIGTERM)).start()
    elif stop == "cancel":
        run.write_text(STOP_REQUESTED, "now")
    assert pod.run_part(part, told) == code
    assert part.ready_file.exists()


def test_the_first_part_says_in_the_run_s_folder_that_it_is_worked_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Told
) -> None:
    monkeypatch.setattr(pod, "part_command", lambda _: python("import time; time.sleep(1.5)"))
    run = RunFolder(str(tmp_path / "run"))
    seen: set[str] = set()
    monkeypatch.setattr(
        time, "sleep", lambda seconds, sleep=time.sleep: (seen.add(str(holder_of(run))), sleep(seconds))
    )
    part = made("--nodes=2", "--job=ingest", "--", "ingest", "a", "b", scratch=tmp_path, run_folder=run.url)
    assert pod.run_part(part, told) == EXIT_DONE
    assert any(each.endswith("at step 'ingest on a cluster'") for each in seen)
    assert holder_of(run) is None


def test_lines_of_workers_are_shown_once_and_the_pod_is_ready_while_they_run(tmp_path: Path) -> None:
    node = made(*NODE, "--", *PRETRAIN, scratch=tmp_path)
    output, lines = Output(node), list[str]()
    output.pass_on(lines.append)
    assert output.is_waiting
    assert not node.ready_file.exists()
    start = node.logs / "start-000"
    start.mkdir(parents=True)
    (node.logs / "events.jsonl").write_text('{"event": "workers_started"}\n')
    (start / "worker-0.err.log").write_text("one\ntw")
    output.pass_on(lines.append)
    assert node.ready_file.exists()
    with (start / "worker-0.err.log").open("a") as file:
        file.write("o\n")
    with (node.logs / "events.jsonl").open("a") as file:
        file.write('{"event": "cut_off"}\n')
    output.pass_on(lines.append)
    assert lines == ["worker-0: one", "worker-0: two"]
    assert output.is_waiting
    assert not node.ready_file.exists()


def test_how_far_it_is_is_said_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    node = made(*NODE, "--", *PRETRAIN, scratch=tmp_path)
    output, lines = Output(node), list[str]()
    (tmp_path / "progress").mkdir()

    def at(done: int) -> None:
        record = {
            "time": done,
            "stage": "a",
            "total": 9,
            "unit": "steps",
            "rate": 0,
            "resumed": 0,
            "note": {"loss": 0.5},
        }
        with (tmp_path / "progress" / "a-0.jsonl").open("a") as file:
            file.write(json.dumps(record | {"done": done}) + "\n")
        output.pass_on(lines.append, is_last=done == 9)

    for done in (1, 2, 3, 9):
        at(done)
    assert lines == ["11%  1/9 steps  loss 0.5", "100%  9/9 steps  loss 0.5"]


def test_the_parts_of_a_stage_hold_the_run_one_after_the_other_and_all_hear_a_cancel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Told, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pod, "_LOOK_SECONDS", 0.1)
    run = RunFolder(str(tmp_path / "run"))
    first, second = Sign(run, "ingest"), Sign(run, "ingest")
    first.show()
    second.show()
    assert "could not" not in caplog.text, "that another part is there is as it should be"
    first.remove()
    assert holder_of(run) is None
    second.show()
    assert holder_of(run) is not None
    second.remove()
    monkeypatch.setattr(pod, "part_command", lambda _: python(SAVES))
    part = made("--index=1", "--nodes=2", "--", "ingest", "a", "b", scratch=tmp_path, run_folder=run.url)
    run.write_text(STOP_REQUESTED, "now")
    assert pod.run_part(part, told) == EXIT_CANCELLED
    assert run.read_text(STOP_REQUESTED) is not None, "another part may not have heard it yet"


def test_whoever_holds_the_store_and_is_told_to_stop_has_all_save_and_leaves_them_waiting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], told: Told
) -> None:
    run = RunFolder(str(tmp_path / "run"))
    run.write_config(tiny_config("unused", global_batch=2))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    node = made(
        "--nodes=3", "--min-nodes=1", f"--rendezvous=127.0.0.1:{port}", "--", "pretrain",
        f"--config={run.url}/config.yaml", f"--run={run.url}", scratch=tmp_path,
    )  # fmt: skip
    link = Link(f"127.0.0.1:{port}", "job", 0, "127.0.0.1", give_up_seconds=2.0)
    orders: list[str] = []

    def be_an_agent() -> None:
        link.start()
        link.say(Report("ready", 0, 1))
        while not link.order.members:
            time.sleep(0.02)
        link.say(Report("running", link.order.generation))
        time.sleep(0.3)
        told.number = signal.SIGTERM
        while not link.order.restart:
            time.sleep(0.02)
        orders.append(link.order.restart)
        time.sleep(0.3)
        link.say(Report("ready", link.order.generation, 1, (Failure(0, EXIT_STOPPED, "saved"),)))

    thread = threading.Thread(target=be_an_agent)
    thread.start()
    assert pod.hold_store(node, told) == EXIT_STOPPED
    thread.join()
    assert orders == ["after_saving"]
    assert "3 nodes cannot share the global batch of 2 evenly: 1 of them train" in capsys.readouterr().out
    assert (link.order.end, len(link.order.members)) == (None, 1), "it waits in place, and is in no other world"
    link.close()


def test_a_pod_that_comes_to_a_finished_run_has_nothing_to_do(
    tmp_path: Path, told: Told, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(str(tmp_path / "run"))
    run.append_event("finished", step=3)
    node = made(*NODE, "--", "pretrain", "--config=c", f"--run={run.url}", scratch=tmp_path)
    assert pod.run_node(node, told, holds_store=True) == EXIT_DONE
    assert "nothing to do" in capsys.readouterr().out


def run_with_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Told, said: str, meanwhile: Any = lambda: None
) -> int:
    """The exit code of a pod whose agent has said this much, and waits until it is told to stop.

    `meanwhile` is called twice the pod's patience after the agent has begun to listen.
    """
    monkeypatch.setattr(pod, "_LOOK_SECONDS", 0.05)
    node = made(
        "--index=1", "--patience=1", *NODE, "--", "pretrain", "--config=c", f"--run={tmp_path}/run", scratch=tmp_path
    )
    node = Pod(**{**vars(node), "address": "127.0.0.1"})
    node.logs.mkdir(parents=True)
    (node.logs / "events.jsonl").write_text(said)
    listens = tmp_path / "listens"
    program = (
        f"import signal, sys, time; signal.signal(15, lambda *_: sys.exit(75)); "
        f"open({str(listens)!r}, 'w').close(); time.sleep(60)"
    )
    monkeypatch.setattr(pod, "agent_command", lambda *_: python(program))

    def wait_and_act() -> None:
        deadline = time.monotonic() + 60
        while not listens.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(2 * node.patience)
        meanwhile()

    threading.Thread(target=wait_and_act, daemon=True).start()
    return pod.run_node(node, told, holds_store=False)


STARTED, DONE, SPARE = (f'{{"event": "{kind}"}}\n' for kind in ("workers_started", "workers_done", "node_spare"))


def test_a_pod_that_was_done_ends_with_the_run_though_its_store_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Told
) -> None:
    run = RunFolder(str(tmp_path / "run"))
    threading.Timer(0.5, lambda: run.append_event("finished", step=3)).start()
    assert run_with_agent(tmp_path, monkeypatch, told, STARTED + DONE) == EXIT_DONE


def test_a_pod_that_waits_in_vain_makes_room_but_a_spare_one_misses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: Told
) -> None:
    assert run_with_agent(tmp_path / "a", monkeypatch, told, "") == EXIT_FAILED
    stop = lambda: setattr(told, "number", signal.SIGTERM)  # noqa: E731
    assert run_with_agent(tmp_path / "b", monkeypatch, told, SPARE, stop) == EXIT_STOPPED


def test_whoever_holds_the_store_writes_events_holds_the_run_and_hears_a_cancel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pod, "_LOOK_SECONDS", 0.0)
    run = RunFolder(str(tmp_path / "run"))
    membership = Membership(Rules(most=1, least=1))
    keeper = Keeper(run, run)
    keeper.event("world_formed", generation=1, nodes=[0])
    keeper.look(membership)
    assert holder_of(run) is not None
    assert run.events()[-1]["event"] == "world_formed"
    assert "the world is formed: nodes [0]" in capsys.readouterr().out
    assert keeper.committed() == 0
    run.append_event("saved", step=7)
    assert keeper.committed() == 7
    run.write_text(STOP_REQUESTED, "now")
    keeper.look(membership)
    assert membership.tick(1.0).end == EXIT_CANCELLED
    keeper.close(membership.order.end)
    assert holder_of(run) is None
    assert run.read_text(STOP_REQUESTED) is None, "the next start is not stopped by it"


def test_pod_0_begins_a_run_from_a_recipe_and_refuses_another_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = write_corpus("shapes.zarr")
    recipe = Path(__file__).parent.parent.parent / "k8s" / "base" / "recipe.yaml"
    text = recipe.read_text().replace("pointmcd_teacher\n", f"{next(iter(store.teachers)).partition('@')[0]}\n")
    mine = tmp_path / "recipe.yaml"
    mine.write_text(text.replace("  port: 9400", "  every_steps: 1"))
    run = RunFolder(str(tmp_path / "runs" / "a"))
    node = made(*NODE, "--", "pretrain", f"--config={run.url}/config.yaml", f"--run={run.url}")
    write_config(node, str(mine), store.url)
    config = run.config()
    assert config.data.store_url == store.url
    assert config.objective.teacher == next(iter(store.teachers))  # type: ignore[union-attr]
    assert config.metrics.port == 9400
    write_config(node, str(mine), store.url)
    assert run.config() == config
    mine.write_text(mine.read_text().replace("global_batch: 32", "global_batch: 64"))
    with pytest.raises(DoNotRetry, match="global_batch: 32 there, 64 asked for"):
        write_config(node, str(mine), store.url)


def test_logs_go_to_the_run_s_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    node = made("--index=1", *NODE, "--", "pretrain", "--config=c", f"--run={run}", scratch=tmp_path / "scratch")
    upload_logs(node)
    node.logs.mkdir(parents=True)
    (node.logs / "agent.log").write_text("said")
    upload_logs(node)
    assert (run / "logs" / "node-1" / "job" / "agent.log").read_text() == "said"
