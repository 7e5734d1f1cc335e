"""The image: hadolint's rules that matter, written out, as no Docker engine is at hand; its steps are run as a script."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.k8s.golden import ROOT

IMAGE = ROOT / "k8s" / "image"
TEXT = (IMAGE / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    """Instructions with their arguments, continued lines joined."""
    lines = [line for line in TEXT.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined.splitlines() if line.strip()]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions by stage."""
    found: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for kind, words in instructions():
        if kind == "FROM":
            name = words.rpartition(" AS ")[2]
            found[name] = []
        found.setdefault(name, []).append((kind, words))
    return found


def of(kind: str, stage: str | None = None) -> list[str]:
    return [words for each, words in (instructions() if stage is None else stages()[stage]) if each == kind]


def test_bases_are_pinned_and_all_stages_share_one() -> None:
    external = {words.partition(" ")[0] for words in of("FROM")} - set(stages()) - {"runtime-${VARIANT}"}
    assert external == {"python:${PYTHON}"}
    (version,) = [words for words in of("ARG") if words.startswith("PYTHON=")]
    assert re.fullmatch(r"PYTHON=3\.\d+\.\d+-slim-\w+", version), "a patch release and a Debian release, never latest"
    assert {f"runtime-{variant}" for variant in ("cuda", "cpu")} <= set(stages())


def test_the_last_stage_runs_as_a_numbered_user_that_exists() -> None:
    assert list(stages())[-1] == "runtime"
    assert of("USER", "runtime") == ["10001:10001"], "kubelets can check a number, not a name"
    kinds = [kind for kind, _ in stages()["runtime"]]
    assert kinds.index("USER") > max(index for index, kind in enumerate(kinds) if kind in ("COPY", "RUN", "WORKDIR"))
    assert "--uid 10001" in TEXT
    assert "--gid 10001" in TEXT


def test_nothing_is_added_from_anywhere_and_no_shell_form_is_left() -> None:
    assert of("ADD") == []
    assert of("MAINTAINER") == []
    (command,) = of("CMD")
    assert command.startswith("["), "PID 1 must get the signals"
    assert of("ENTRYPOINT") == []
    assert not re.search(r"\b(sudo|curl|wget|apt (install|update)|ssh|chmod 777)\b", "\n".join(of("RUN")))


def test_packages_leave_no_cache_and_no_recommendations() -> None:
    for run in of("RUN"):
        if "apt-get install" in run:
            assert "apt-get update &&" in run, "in one layer: a cached list would be of another day"
            assert "--yes" in run
            assert "--no-install-recommends" in run
            assert "rm -rf /var/lib/apt/lists/*" in run
        assert "upgrade" not in run
    script = (IMAGE / "install.sh").read_text()
    assert "--no-cache-dir" in script
    assert script.count("-c constraints.txt") == 2, "versions are pinned there"


def test_build_tools_stay_out_but_for_the_one_that_triton_needs() -> None:
    tools = re.compile(r"\b(gcc|g\+\+|clang|make|cmake|ninja|build-essential|git|pip)\b")
    assert not tools.search("\n".join(of("RUN", "base") + of("RUN", "runtime") + of("RUN", "runtime-cpu")))
    assert tools.findall("\n".join(of("RUN", "runtime-cuda"))) == ["gcc"]
    assert of("COPY", "runtime") == ["--from=build /opt/viewpoint /opt/viewpoint"]


def test_packages_are_a_layer_that_code_does_not_touch() -> None:
    build = stages()["build"]
    packages = next(index for index, (_, words) in enumerate(build) if "packages" in words)
    copied_before = " ".join(words for kind, words in build[:packages] if kind == "COPY")
    assert copied_before == "k8s/image/install.sh pyproject.toml constraints.txt ./"
    copied_after = {words.split()[0] for kind, words in build[packages:] if kind == "COPY"}
    assert {"launcher", "trainer", "datastore", "models", "k8s"} <= copied_after


def test_what_is_copied_exists_and_is_in_the_build_s_context() -> None:
    allowed = {
        line[1:] for line in (IMAGE / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")
    }
    for words in of("COPY", "build"):
        *sources, _ = words.split()
        for source in sources:
            assert (ROOT / source).exists(), source
            assert source.partition("/")[0] in allowed, source


def test_no_secret_is_in_the_image() -> None:
    assert not re.search(r"(KEY|SECRET|TOKEN|PASSWORD)\s*=", TEXT, re.IGNORECASE)


def test_the_step_for_packages_asks_for_those_of_the_project() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        wanted = tomllib.load(file)["project"]["dependencies"]
    said = subprocess.run(
        [IMAGE / "install.sh", "requirements"],
        cwd=ROOT,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.splitlines() == wanted
    unknown = subprocess.run([IMAGE / "install.sh", "clean"], capture_output=True, text=True, check=False)
    assert unknown.returncode == 2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_steps_of_the_build_make_an_environment_in_a_fresh_folder_that_works(tmp_path: Path) -> None:
    build, venv = tmp_path / "build", tmp_path / "venv"
    build.mkdir()
    done = []
    for kind, words in stages()["build"]:
        if kind == "COPY":
            *sources, target = words.split()
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, build / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, build / target)
        if kind == "RUN":
            step = words.replace("/opt/viewpoint", str(venv)).replace('"$VARIANT"', "cuda")
            subprocess.run(["sh", "-c", step], cwd=build, env=environment_of_build(), check=True, capture_output=True)
            done.append(step.split()[:2])
    assert done == [["./install.sh", "packages"], ["./install.sh", "project"]]
    helped = subprocess.run(
        [venv / "bin" / "viewpoint", "--help"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "viewpoint launch pointmcd --nodes 4" in helped.stdout
    (site,) = (venv / "lib").glob("python*/site-packages")
    for name in (
        "k8s/overlays/plain/kustomization.yaml",
        "k8s/settings/settings.yaml",
        "trainer/recipes/pointmcd.yaml",
    ):
        assert (site / name).is_file(), f"{name} is not installed"
    shrunk = ["--set=prepare.corpus.source=demo://shapes?count=48&seed=0", "--set=global_batch=8", "--set=epochs=1"]
    launch = [venv / "bin" / "viewpoint", "launch", "supervised", *shrunk]
    launched = subprocess.run(launch, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert launched.returncode == 0, launched.stderr


def environment_of_build() -> dict[str, str]:
    """As in the base image: this Python is the first on the path."""
    return os.environ | {"PATH": f"{Path(sys.base_prefix) / 'bin'}:{os.environ['PATH']}"}
