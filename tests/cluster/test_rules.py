"""The double refuses every manifest with one wrong field: the hundreds of cases of tests/k8s, through what stores objects."""

import re
from pathlib import Path

import pytest

from tests.cluster.api import Api
from tests.cluster.client import Client
from tests.cluster.refusals import Refused
from tests.cluster.rules import quantity
from tests.cluster.state import State
from tests.k8s.golden import FOLDERS, GOLDEN, documents, golden_of
from tests.k8s.schemas import VERSIONS, Mutation, mutations

FILES = [golden_of(folder) for folder in FOLDERS]
NAMES = [path.stem for path in FILES]


def wrong_manifests(path: Path, version: str) -> list[Mutation]:
    return [mutation for document in documents(path) for mutation in mutations(document, version)]


def accepted(path: Path, version: str) -> list[str]:
    """The wrong manifests that a state would store."""
    state = State(version)
    state.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "viewpoint"}})
    found = []
    for mutation in wrong_manifests(path, version):
        try:
            state.create(mutation.document, dry_run=True)
        except Refused as refusal:
            assert refusal.code in (400, 422)
        else:
            found.append(mutation.what)
    return found


@pytest.mark.parametrize("name", ["overlays-plain", "overlays-trainjob", "stages-ingest"])
def test_no_wrong_manifest_is_stored(name: str) -> None:
    assert accepted(GOLDEN / f"{name}.yaml", VERSIONS[-1]) == []


@pytest.mark.slow
@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-1]])
@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_wrong_manifest_is_stored_by_the_oldest_and_the_newest_kubernetes(path: Path, version: str) -> None:
    assert accepted(path, version) == []


def test_kubectl_says_of_each_wrong_manifest_where_it_is_wrong(api: Api) -> None:
    check_what_kubectl_says(api, GOLDEN / "overlays-plain.yaml", every=6, at_least=50)


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_kubectl_says_where_every_manifest_is_wrong(api: Api, path: Path) -> None:
    check_what_kubectl_says(api, path, every=1, at_least=200)


def check_what_kubectl_says(api: Api, path: Path, *, every: int, at_least: int) -> None:
    """One line for each, with the path; not of what kubectl cannot read as an object and refuses by itself."""
    client = Client(api.environment, "viewpoint")
    if client.try_("get", "namespace", "viewpoint").code != 0:
        client("create", "namespace", "viewpoint")
    cases = [each for each in wrong_manifests(path, VERSIONS[-1]) if each.what.startswith(("spec", "data"))]
    cases = cases[::every]
    assert len(cases) >= at_least
    done = client.try_("create", "--dry-run=server", "-f", "-", given=[each.document for each in cases])
    assert done.out == ""
    lines = done.err.splitlines()
    assert len(lines) == len(cases)
    for case, line in zip(cases, lines, strict=True):
        where, _, what = case.what.rpartition(": ")
        field = {"unknown field": ".unknownField", "wrong type": ""}.get(what, what.replace("without ", "."))
        assert re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", where) + field in line


@pytest.mark.parametrize(
    ("text", "number"), [("2", 2), ("500m", 0.5), ("4Gi", 4 * 2**30), ("1k", 1000), ("1e3", 1000), (8, 8), ("2M", 2e6)]
)
def test_quantities_mean_what_kubernetes_means_by_them(text: str | int, number: float) -> None:
    assert quantity(text) == number


@pytest.mark.parametrize("text", ["many", "4 Gi", "1.2.3.x", ""])
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(Refused, match="quantities must match"):
        quantity(text)
