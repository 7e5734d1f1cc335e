"""The cluster double, whole: an API that kubectl speaks to, a Job controller, and one node that really runs pods.

It is no cluster. It is our reading of Kubernetes' documentation, made so that manifests, the launcher and pods meet what they
would meet there: names that appear and vanish, back-off, signals, grace periods, exit codes. What each part leaves out is at
the top of its file: state.py and api.py for the API, job_controller.py, kubelet.py and sandbox.py for what runs. It needs root
on Linux.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.cluster.api import running_api
from tests.cluster.job_controller import FIRST_BACK_OFF, JobController
from tests.cluster.kubelet import Kubelet
from tests.cluster.network import PodNetwork
from tests.cluster.state import State


class Double:
    """All of it while it is entered."""

    def __init__(
        self,
        folder: Path,
        *,
        first_back_off: float = FIRST_BACK_OFF,
        image_environment: Mapping[str, str] | None = None,
        namespace: str = "default",
    ) -> None:
        """`folder`: for what pods leave; `namespace`: kubectl's, where it is not told another."""
        self.state = State()
        self.network = PodNetwork()
        self._folder, self._first_back_off, self._image_environment = folder, first_back_off, image_environment
        self._namespace = namespace
        self._held = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as held:
            held.enter_context(self.network)
            self.kubelet = held.enter_context(
                Kubelet(self.state, self.network, self._folder / "pods", image_environment=self._image_environment)
            )
            held.enter_context(JobController(self.state, first_back_off=self._first_back_off))
            self.api = held.enter_context(running_api(self.state, logs=self.kubelet.logs, namespace=self._namespace))
            self._held = held.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.__exit__(kind, error, trace)
