"""The guide for clusters speaks of files and commands that exist."""

import re
import shlex
from argparse import ArgumentParser

from launcher import launch, scale
from launcher.pod import EXIT_CANCELLED
from tests.k8s.golden import ROOT, documents

PAGE = (ROOT / "docs" / "cluster.md").read_text()


def test_every_path_exists() -> None:
    paths = set(re.findall(r"`?((?:k8s|tests|launcher)/[\w./-]+[\w])", PAGE))
    assert len(paths) > 20
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []


def test_every_component_overlay_and_stage_is_named() -> None:
    for kind in ("components", "stages"):
        for folder in (ROOT / "k8s" / kind).iterdir():
            assert folder.name in PAGE


def test_every_job_that_is_waited_for_is_one_that_is_applied() -> None:
    for name in re.findall(r"job/viewpoint-(\w+)", PAGE):
        found = documents(ROOT / "tests" / "golden" / "k8s" / f"stages-{name}.yaml")
        assert f"viewpoint-{name}" in [each["metadata"]["name"] for each in found]


def test_every_command_of_ours_is_understood() -> None:
    text = PAGE.replace("...", "x")
    for module, name in ((launch, "launch"), (scale, "scale")):
        lines = re.findall(rf"^viewpoint {name} (.*)$|`viewpoint {name} (.*?)`", text, re.MULTILINE)
        found = [one or other for one, other in lines if "--nodes" in (one or other)]
        assert found
        for words in found:
            parser = ArgumentParser()
            module.add_arguments(parser)
            parser.parse_args(shlex.split(words))


def test_the_code_of_a_cancelled_pod_is_the_one_that_is_told() -> None:
    assert f"end with {EXIT_CANCELLED}" in PAGE
