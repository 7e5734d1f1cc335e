"""The kinds of object that the double serves: some of Kubernetes' own, and those of the genuine definitions in tests/crds."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from tests.k8s.schemas import Document, custom_definitions


@dataclass(frozen=True)
class Kind:
    """One kind, and how it is called."""

    group: str
    version: str
    name: str  # as `kind` says it
    plural: str
    namespaced: bool = True
    short: tuple[str, ...] = ()
    has_status: bool = True  # its status is written at an address of its own
    categories: tuple[str, ...] = ()
    custom: bool = False

    @property
    def api_version(self) -> str:
        """Group and version."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def resource(self) -> str:
        """As messages and kubectl name it: `pods`, `jobs.batch`."""
        return f"{self.plural}.{self.group}" if self.group else self.plural


BUILT_IN = (
    Kind("", "v1", "Namespace", "namespaces", namespaced=False, short=("ns",)),
    Kind("", "v1", "Node", "nodes", namespaced=False, short=("no",)),
    Kind("", "v1", "Pod", "pods", short=("po",), categories=("all",)),
    Kind("", "v1", "Service", "services", short=("svc",), categories=("all",)),
    Kind("", "v1", "ServiceAccount", "serviceaccounts", short=("sa",), has_status=False),
    Kind("", "v1", "ConfigMap", "configmaps", short=("cm",), has_status=False),
    Kind("", "v1", "Secret", "secrets", has_status=False),
    Kind("", "v1", "Event", "events", short=("ev",), has_status=False),
    Kind("", "v1", "PersistentVolumeClaim", "persistentvolumeclaims", short=("pvc",)),
    Kind("batch", "v1", "Job", "jobs", categories=("all",)),
    Kind("policy", "v1", "PodDisruptionBudget", "poddisruptionbudgets", short=("pdb",)),  # kept, and not heeded
    Kind("networking.k8s.io", "v1", "NetworkPolicy", "networkpolicies", short=("netpol",), has_status=False),
)


@cache
def custom_kinds() -> tuple[Kind, ...]:
    """The kinds of tests/crds, in the version that is stored."""
    return tuple(map(_custom_kind, custom_definitions().values()))


def all_kinds(*, custom: bool = True) -> Iterator[Kind]:
    """Every kind that is served."""
    yield from BUILT_IN
    if custom:
        yield from custom_kinds()


def _custom_kind(definition: Document) -> Kind:
    spec = definition["spec"]
    (stored,) = (each for each in spec["versions"] if each["storage"])
    return Kind(
        spec["group"],
        stored["name"],
        spec["names"]["kind"],
        spec["names"]["plural"],
        namespaced=spec["scope"] == "Namespaced",
        short=tuple(spec["names"].get("shortNames", ())),
        has_status="status" in stored.get("subresources", {}),
        categories=tuple(spec["names"].get("categories", ())),
        custom=True,
    )
