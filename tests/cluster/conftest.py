"""One double for all tests of a file, and a namespace for each test.

Tests that use the fixture `cluster` ask for nothing that only the double has. `make test-cluster KUBECONFIG=FILE` runs them, and
no others, against the cluster of that file, in namespaces of their own.
"""

import os
import time
import uuid
from collections.abc import Iterator

import pytest

from tests.cluster.api import Api, running_api
from tests.cluster.client import Client
from tests.cluster.state import State

REAL = "VIEWPOINT_TEST_KUBECONFIG"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "cluster: runs against a real cluster, too; `make test-cluster KUBECONFIG=FILE` does"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="module")
def state() -> State:
    """The objects of the double."""
    return State()


@pytest.fixture(scope="module")
def api(state: State) -> Iterator[Api]:
    """The double's server; no kubelet works on its state."""
    with running_api(state) as api:
        yield api


@pytest.fixture
def double(api: Api, state: State) -> Client:
    """kubectl in a new namespace of the double."""
    return in_new_namespace(api, state)


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Client]:
    """kubectl in a new namespace: of the double, or of a real cluster where one is given."""
    real = os.environ.get(REAL)
    if real is None:
        yield request.getfixturevalue("double")
        return
    client = Client({"KUBECONFIG": real}, _new_name())
    client("create", "namespace", client.namespace)
    deadline = time.monotonic() + 30
    while client.try_("get", "serviceaccount", "default").code != 0 and time.monotonic() < deadline:
        time.sleep(0.2)  # a controller makes it, without which there are no pods
    yield client
    client("delete", "namespace", client.namespace, "--wait=false")


def in_new_namespace(api: Api, state: State) -> Client:
    """kubectl in a namespace of the double that nobody else uses."""
    client = Client(api.environment, _new_name())
    state.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": client.namespace}})
    return client


def _new_name() -> str:
    return f"viewpoint-test-{uuid.uuid4().hex[:8]}"
