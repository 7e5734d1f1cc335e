"""The command line as a person meets it: help at once, and one message for each mistake."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datastore.errors import EXIT_ASKED_WRONGLY, EXIT_DO_NOT_RETRY, EXIT_DONE
from launcher.__main__ import COMMANDS, main
from trainer.__main__ import STAGES
from trainer.recipes import known_jobs


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int) -> str:
    """What the command prints to people, after checking its exit code."""
    try:
        found = main(words)
    except SystemExit as exited:  # argparse
        found = int(exited.code or 0)
    captured = capsys.readouterr()
    assert found == code, captured.err
    return captured.err + captured.out


def test_help_comes_at_once_and_names_every_command() -> None:
    started = time.monotonic()
    shown = subprocess.run([sys.executable, "-m", "launcher", "--help"], capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 5, "half a second on a quiet machine; nothing heavy is imported"
    assert all(f"\n  {name} " in shown.stdout for name in COMMANDS)
    assert "viewpoint launch pointmcd --nodes 4" in shown.stdout


def test_every_stage_for_people_is_a_command() -> None:
    assert set(STAGES) - set(COMMANDS) == {"pretrain"}, "training goes through launch"


def test_help_and_usage_errors_of_launch_import_no_torch() -> None:
    script = (
        "import sys\nfrom launcher.__main__ import main\n"
        "asked = ['--help'], ['launch', '--help'], ['launch', 'pointmcd', '--nodes', '0'], ['status', '--help']\n"
        "for words in asked:\n"
        "    try: main(words)\n"
        "    except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(capsys, command, "--help", code=EXIT_DONE)
    assert f"usage: viewpoint {command}" in shown
    assert "examples:" in shown
    assert "exit codes: 0 done; 2 asked wrongly; 64 wrong configuration or data" in shown


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean `viewpoint launch`?" in said(capsys, "lanch", "pointmcd", code=EXIT_ASKED_WRONGLY)


def test_no_command_shows_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert "First run" in said(capsys, code=EXIT_ASKED_WRONGLY)


def test_an_unknown_job_lists_the_known_and_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    message = said(capsys, "launch", "pointmdc", code=EXIT_ASKED_WRONGLY)
    known = ", ".join(known_jobs(demo=True))
    assert f"Unknown job 'pointmdc'. Did you mean 'pointmcd'? Known jobs: {known}." in message


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("--nodes", "0"), "argument --nodes: must be 1 or more, got 0"),
        (("--nodes", "many"), "argument --nodes: 'many' is not a whole number"),
        (("--nodes", ""), "argument --nodes: '' is not a whole number"),
        (("--procs-per-node", "-1"), "argument --procs-per-node: must be 1 or more, got -1"),
        (("--rendezvous-port", "70000"), "argument --rendezvous-port: must be from 0 to 65535, got 70000"),
        (("--on", "mars"), "argument --on: invalid choice: 'mars'"),
        (("--node", "4"), "unrecognized arguments: --node 4"),
        (("--prepare",), "--prepare goes with --data URL"),
        (("--nodes", "3"), "3 processes cannot share the global batch, two samples each or more: 32 of job 'pointmcd'"),
        (("--set", "engine.optimizer.lr"), "--set takes key=value"),
        (("--set", "engine.optimizer.lr=fast"), "engine.optimizer.lr"),
        (("--set", "engine.optimiser.lr=1"), "Did you mean 'optimizer'?"),
        (("--run", "a/b"), "--run 'a/b' is not a name"),
    ],
)
def test_a_launch_asked_wrongly_says_what_where_and_how_to_mend_it(
    words: tuple[str, ...],
    reason: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert reason in said(capsys, "launch", "pointmcd", *words, code=EXIT_ASKED_WRONGLY)
    assert not list(tmp_path.iterdir()), "nothing was started"


def test_nodes_that_fit_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    message = said(capsys, "launch", "pointmcd", "--nodes", "3", "--dry-run", code=EXIT_ASKED_WRONGLY)
    assert "Choose --nodes from 1, 2, 4, 8, 16, or" in message
    message = said(capsys, "launch", "pointmcd", "--nodes", "3", "--procs-per-node", "2", code=EXIT_ASKED_WRONGLY)
    assert "Choose --nodes from 1, 2, 4, 8 (with --procs-per-node 2)" in message


def test_a_recipe_with_a_misspelt_key_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("objectve: {kind: pointmcd}\nglobal_batch: 32\nepochs: 1\n")
    message = said(capsys, "launch", str(recipe), code=EXIT_ASKED_WRONGLY)
    assert "unknown key 'objectve'. Did you mean 'objective'?" in message


def test_data_that_are_no_store_are_refused_with_the_command_that_writes_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    message = said(capsys, "launch", "pointmcd", "--data", str(tmp_path), code=EXIT_DO_NOT_RETRY)
    assert f"{tmp_path} is no store" in message
    assert "viewpoint ingest" in message


def test_a_store_to_inspect_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for url in (str(tmp_path / "missing.zarr"), "memory://missing/shapes.zarr"):
        message = said(capsys, "inspect", url, code=EXIT_DO_NOT_RETRY)
        assert message == (
            f"viewpoint: {url} is no store: it has no zarr.json. Nothing is there. Write a store with "
            f"`viewpoint ingest SOURCE {url}`.\n"
        )


def test_a_run_that_is_not_there_is_named_with_those_that_are(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("status", "cancel"):
        assert "no config.yaml" in said(capsys, command, "pointmcd-1", code=EXIT_DO_NOT_RETRY)


def test_a_missing_package_is_one_message(tmp_path: Path) -> None:
    hidden = tmp_path / "yaml.py"
    hidden.write_text("raise ModuleNotFoundError(\"No module named 'yaml'\", name='yaml')\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "launcher", "launch", "pointmcd"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == EXIT_DO_NOT_RETRY
    assert "the Python package 'yaml' is missing" in done.stderr
    assert "Traceback" not in done.stderr
