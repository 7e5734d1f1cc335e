"""A launch as a whole: what it decides, prints and leaves behind."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from datastore.errors import (
    EXIT_ASKED_WRONGLY,
    EXIT_DO_NOT_RETRY,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_STOPPED,
    MissingField,
)
from datastore.layout import open_store
from launcher.__main__ import main
from launcher.command import Layout
from launcher.driver import begin_run, hold, logs_folder, resolve
from launcher.events import describe_event
from launcher.facts import FEATURES_CACHED, find_features, observe
from launcher.plan import Facts, Goal, Prerequisite
from launcher.presence import Holder
from launcher.spec import LaunchSpec
from tests.runs import tiny_config, write_corpus
from tests.stores import write_small_store
from trainer.config import load_recipe
from trainer.runfolder import RunFolder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe_file(here: Path, store_url: str, **changes: Any) -> str:
    tree = tiny_config(store_url, **changes).model_dump(mode="json", exclude={"job": True, "data": {"store_url"}})
    (here / "mine.yaml").write_text(yaml.safe_dump(tree))
    return "./mine.yaml"


def test_a_dry_run_prints_every_command_and_creates_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "pointmcd", "--nodes", "2", "--rendezvous-port", "29400", "--dry-run"]) == EXIT_DONE
    printed = capsys.readouterr().out
    too_long = [line.removesuffix(" \\") for line in printed.splitlines() if len(line) > 100]
    assert not [line for line in too_long if " " in line.strip().removeprefix("--logs ")], "nothing could be folded"
    lines = re.sub(r" \\\n +", " ", printed).splitlines()
    assert "demo profile: no --data given" in lines[0]
    assert "Worlds that divide the global batch: 1, 2, 4, 8, 16. This one: 2." in lines
    (common,) = (line for line in lines if line.startswith("   export "))
    assert "PYTHONUNBUFFERED=1" in common and printed.count("PYTHONUNBUFFERED") == 1
    assert [line for line in lines if line[:1].isdecimal()] == [
        "1. corpus: runs in one process",
        "2. teacher: runs on 2 nodes",
        "3. teacher features: runs on 2 nodes",
        "4. pretrain: runs on 2 nodes",
        "5. pretrain, distillation off: runs on 2 nodes",
        "6. evaluate, trained: runs in one process",
        "7. evaluate, distillation off: runs in one process",
        "8. evaluate, random weights: runs in one process",
        "9. report: runs in one process",
    ]
    agents = [line for line in lines if "launcher.agent" in line]
    assert len(agents) == 4 * 2
    assert all("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in line for line in agents)
    assert all("--endpoint 127.0.0.1:29400" in line for line in agents)
    assert "--node 1 " in agents[1]
    assert "-m trainer pretrain --config runs/pointmcd-1/config.yaml --run runs/pointmcd-1" in agents[5]
    assert not list(here.iterdir())


def test_a_dry_run_speaks_json(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["launch", "pointmcd", "--nodes", "2", "--dry-run", "--json"]) == EXIT_DONE
    steps = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(step["step"], len(step["commands"])) for step in steps[:3]] == [
        ("ingest", 1),
        ("teacher", 2),
        ("cache", 2),
    ]


def test_data_without_the_teachers_features_are_refused_with_both_ways_out(here: Path) -> None:
    write_small_store("shapes.zarr")
    with pytest.raises(MissingField, match=r"viewpoint cache shapes\.zarr --teacher pointmcd_teacher") as refused:
        resolve(LaunchSpec("pointmcd", Layout(1), data_url="shapes.zarr"))
    assert "Or add --prepare to this command: it trains 'pointmcd_teacher' on this store" in str(refused.value)
    assert refused.value.exit_code == EXIT_DO_NOT_RETRY
    goal, _ = resolve(LaunchSpec("pointmcd", Layout(1), data_url="shapes.zarr", prepare=True))
    assert [each.run_url.rpartition("-")[0] for each in goal.prerequisites] == ["runs/pointmcd_teacher"]


def test_two_launches_begun_in_the_same_moment_take_two_numbers(here: Path) -> None:
    from contextlib import ExitStack

    first, second = (LaunchSpec("pointmcd", Layout(1), assignments=(f"seed={seed}",)) for seed in (0, 1))
    resolved = [resolve(spec) for spec in (first, second)]  # both before either has begun
    with ExitStack() as held:
        taken = [hold(*found, spec, held)[1].folder.name for found, spec in zip(resolved, (first, second), strict=True)]
        assert taken == ["pointmcd-1", "pointmcd-2"]
        assert (here / "runs/pointmcd-1/config.yaml").exists()


def test_a_second_launch_of_a_live_run_says_so_before_it_starts_anything(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_corpus("shapes.zarr")
    words = ["launch", recipe_file(here, store.url), "--data", store.url, "--run", "live"]
    holder = Holder(1, 0.0, "elsewhere", time.time(), "pretrain", machine="another one")
    RunFolder("runs/live").write_text("launcher.json", json.dumps(asdict(holder)))
    assert main(words) == EXIT_FAILED
    said = capsys.readouterr().err
    assert "is being worked on by another launcher (process 1 on elsewhere, at step 'pretrain')" in said
    assert "To take it over, stop it with `viewpoint cancel runs/live`" in said
    begun = {"config.yaml", "events.jsonl", "logs"} & {path.name for path in Path("runs/live").iterdir()}
    assert not begun


def test_what_is_complete_is_seen_where_it_lies(here: Path) -> None:
    spec = LaunchSpec("pointmcd", Layout(1))
    goal, _ = resolve(spec)
    assert observe(goal) == Facts()
    (teacher,) = goal.prerequisites
    RunFolder(teacher.run_url).append_event("finished", step=1)
    RunFolder(goal.run_url).append_event("finished", step=1)
    arm = RunFolder(goal.arm_url("distillation_off"))
    arm.append_event("finished", step=9)
    arm.write_record("svm@heldout", scored(goal.store_url, step=9))
    facts = observe(goal)
    assert facts.trained == {goal.run_url, arm.url, teacher.run_url}
    assert facts.evaluated == {(arm.url, "svm@heldout")}


def scored(store_url: str, *, step: int, is_random: bool = False) -> dict[str, Any]:
    return {"accuracy": 0.5, "store": {"url": store_url}, "checkpoint": {"step": step, "is_random": is_random}}


def test_a_score_of_other_weights_or_another_store_is_not_the_runs_score(here: Path) -> None:
    goal, _ = resolve(LaunchSpec("pointmcd", Layout(1)))
    run = RunFolder(goal.run_url)
    run.append_event("finished", step=9)
    run.write_record("svm@heldout", scored(goal.store_url, step=4))
    assert observe(goal).evaluated == frozenset()
    run.write_record("svm@heldout", scored("elsewhere.zarr", step=9))
    assert observe(goal).evaluated == frozenset()
    run.write_record("svm@heldout.random_weights", scored(goal.store_url, step=0, is_random=True))
    assert observe(goal).evaluated == {(run.url, "svm@heldout.random_weights")}


def test_the_demo_reads_the_features_of_its_own_teacher_alone(here: Path) -> None:
    store = write_corpus("corpus.zarr")
    (key,) = store.teachers
    config = load_recipe("pointmcd", demo=True, assignments=["objective.teacher=teacher"], store_url=store.url)
    teacher = Prerequisite(config, "runs/t", teacher="teacher", fields=("view_features",))
    goal = Goal(config, "runs/a", store.url, makes_corpus=True, prerequisites=(teacher,))
    assert find_features(goal, store, "teacher") is None, "they come from a teacher of another recipe"
    RunFolder("runs/t").append_event(FEATURES_CACHED, store=store.url, teacher=key)
    assert find_features(goal, store, "teacher") == key
    assert find_features(goal, None, "teacher") is None


def test_a_run_and_its_arms_keep_the_configs_that_they_began_with(here: Path) -> None:
    store = write_corpus("corpus.zarr")
    config = load_recipe("pointmcd", demo=True, assignments=["objective.teacher=teacher"], store_url=store.url)
    begun = Goal(config, "runs/a", store.url, makes_corpus=False)
    run, arm = RunFolder(begun.run_url), RunFolder(begun.arm_url("distillation_off"))
    begin_run(begun, run, config)
    begin_run(begun, arm, begun.arms["distillation_off"])
    began = run.config(), arm.config()
    assert [began[0].teacher] == list(store.teachers) and began[1].teacher is None
    again = replace(begun, config=run.config())  # as the launcher goes on with it: bound to its teacher's weights
    begin_run(again, run, again.config)
    begin_run(again, arm, again.arms["distillation_off"])
    assert (run.config().hash(), arm.config().hash()) == tuple(each.hash() for each in began)


def test_on_data_of_ones_own_features_that_are_there_are_used(here: Path) -> None:
    store = write_corpus("corpus.zarr")
    (key,) = store.teachers
    config = load_recipe("pointmcd", demo=False, assignments=["objective.teacher=teacher"], store_url=store.url)
    goal = Goal(config, "runs/a", store.url, makes_corpus=False)
    assert find_features(goal, store, "teacher") == key
    assert find_features(goal, store, "teacher@00000000") is None


def test_a_run_on_object_storage_writes_its_logs_to_a_local_folder_of_its_own() -> None:
    assert logs_folder(RunFolder("/data/runs/a")) == Path("/data/runs/a/logs")
    assert logs_folder(RunFolder("memory://bucket/runs/a/arms/b")) == Path("logs/bucket/runs/a/arms/b")


def test_events_are_said_in_one_line_and_what_is_as_expected_not_at_all() -> None:
    died = {"node": 1, "exit_codes": {"1": -9}, "is_final": False}
    assert describe_event("workers_ended", died) == (
        "node 1: rank 1 was killed (SIGKILL); all start again from the last checkpoint"
    )
    failed = {"node": 0, "exit_codes": {"0": 64}, "is_final": True}
    assert describe_event("workers_ended", failed) == "node 0: rank 0 failed with exit code 64"
    assert describe_event("workers_ended", {"node": 0, "exit_codes": {"0": 75}, "is_final": True}) is None
    assert describe_event("world_formed", {"generation": 1, "nodes": [0, 1]}) is None
    assert describe_event("world_formed", {"generation": 2, "nodes": [0, 1]}) == "all start again, on nodes 0, 1"


def test_a_launch_on_two_nodes_trains_and_reports_and_says_so_again_when_repeated(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = write_corpus("shapes.zarr")
    recipe = recipe_file(here, store.url, evaluation={"protocols": []})
    words = ["launch", recipe, "--data", store.url, "--nodes", "2", "--run", "first", "--json"]
    assert main(words) == EXIT_DONE
    said = capsys.readouterr()
    run = RunFolder("runs/first")
    assert run.is_finished()
    assert json.loads(said.out.splitlines()[-1])["report"] == "runs/first/report.html"
    assert Path("runs/first/report.html").exists()
    assert Path("runs/first/logs/node-1/pretrain/agent.log").exists()
    assert run.config().objective.teacher == next(iter(open_store(store.url).teachers))  # type: ignore[union-attr]
    assert "\x1b" not in said.err
    events = len(run.events())
    assert main(words) == EXIT_DONE
    again = capsys.readouterr()
    assert "complete: nothing to do" in again.err
    assert again.out == said.out
    assert len(RunFolder("runs/first").events()) == events


def test_a_failure_shows_the_end_of_the_log_that_says_why(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = write_corpus("shapes.zarr")
    recipe = recipe_file(here, store.url, data={"num_points": 4000, "store_url": store.url})
    assert main(["launch", recipe, "--data", store.url, "--run", "bad"]) == EXIT_ASKED_WRONGLY
    said = capsys.readouterr().err
    assert "pretrain: failed with exit code 2 on node 0" in said
    assert "worker-0.err.log:\n    viewpoint: data.num_points is 4000" in said
    assert "the same command goes on:\n  viewpoint launch ./mine.yaml" in said
    assert main(["status", "bad"]) == EXIT_DONE
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("  failed at step 'pretrain' with exit code 2: data.num_points is 4000")
    assert lines[2].startswith("  its log: runs/bad/logs/node-0/pretrain/")
    assert Path(lines[2].removeprefix("  its log: ")).exists()


def test_a_port_in_use_ends_a_launch_before_it_starts_anything(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = write_corpus("shapes.zarr")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        words = ["launch", recipe_file(here, store.url), "--data", store.url, "--rendezvous-port", port]
        assert main(words) == EXIT_DO_NOT_RETRY
    assert f"Port {port} on 127.0.0.1 is in use" in capsys.readouterr().err
    assert RunFolder("runs/mine-1").events() == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_goes_on_wherever_it_is_interrupted_and_is_reused_by_the_next_run(here: Path) -> None:
    corpus = "prepare.corpus.source=demo://shapes?count=96&seed=0"
    command = [
        sys.executable,
        "-m",
        "launcher",
        "launch",
        "pointmcd",
        "--nodes",
        "2",
        "--set",
        corpus,
        "--set",
        "epochs=4",
    ]
    stopped_at: list[str] = []
    for pause in (6, 14, 22, 30, 38, 46, 400):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            out, _ = process.communicate(timeout=pause)
            assert process.returncode == EXIT_DONE
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=120)
            assert process.returncode == EXIT_STOPPED, err
            stopped_at += [line for line in err.splitlines() if line.endswith(": stopped")]
    assert len(stopped_at) >= 2
    assert "distillation off" in out
    assert [path.name for path in sorted(Path("runs").iterdir())] == ["demo", "pointmcd-1"]
    again = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280)
    assert again.stderr.count("reused: complete already") == 3, "corpus, teacher and its features"
    assert RunFolder("runs/pointmcd-2").is_finished()
