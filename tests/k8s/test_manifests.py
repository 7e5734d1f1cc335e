"""Manifests are valid as they lie, against the strict schemas of Kubernetes, and run commands that exist."""

import copy
import re
import shlex
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from datastore import ingest

ROOT = Path(__file__).parent.parent.parent
DOCUMENTS = [
    pytest.param(document, id=f"{path.name}:{document['kind']}")
    for path in sorted((ROOT / "k8s").rglob("*.yaml"))
    for document in yaml.safe_load_all(path.read_text())
]
VERSIONS = ("1.29", "1.37")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("document", DOCUMENTS)
def test_a_manifest_passes_strict_validation(document: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(document, version, strict=True)


def test_an_unknown_field_is_refused() -> None:
    document = copy.deepcopy(DOCUMENTS[0].values[0])
    document["spec"]["paralelism"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, VERSIONS[0], strict=True)


def test_ingest_pods_run_a_command_that_exists_with_as_many_parts_as_pods() -> None:
    job = yaml.safe_load((ROOT / "k8s" / "ingest.yaml").read_text())
    container = job["spec"]["template"]["spec"]["containers"][0]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert int(environment["PARTS"]) == job["spec"]["completions"] == job["spec"]["parallelism"]
    words = shlex.split(container["args"][0])
    assert words[:3] == ["exec", "viewpoint", "ingest"]

    parser = ArgumentParser()
    ingest.add_arguments(parser)
    environment |= {"JOB_COMPLETION_INDEX": "3"}
    filled = [re.sub(r"\$(\w+)", lambda match: environment[match.group(1)], word) for word in words[3:]]
    arguments = parser.parse_args(filled)
    assert arguments.store == "s3://viewpoint/demo.zarr"
