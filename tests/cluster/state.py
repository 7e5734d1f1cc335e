"""The objects of a cluster's API, in memory: created, changed, watched and deleted by the rules of Kubernetes as we read them.

It is no cluster and no API server: the storage of the double that tests use (tests/cluster/api.py lets kubectl at it). What
writes through it is defaulted and strictly checked, whoever it is: clients over HTTP, and the double's own controllers. Not
covered: admission webhooks, CEL rules, RBAC, quotas, several versions of a kind, and validation beyond `rules.py`.

Objects that come back are copies. All of it may be called from any thread.
"""

import copy
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from tests.cluster.defaults import fill_defaults, fill_of_new
from tests.cluster.kinds import Kind, all_kinds
from tests.cluster.refusals import Refused, already_exists, bad_request, forbidden, invalid, modified, not_found
from tests.cluster.refusals import cause as broken
from tests.cluster.rules import check_change, check_rules, check_schema
from tests.cluster.selectors import Test, fields_test, labels_test
from tests.k8s.schemas import NEWEST, Document

NAMESPACES = ("default", "kube-system")
FOREGROUND = "foregroundDeletion"
_LETTERS = "bcdfghjklmnpqrstvwxz2456789"  # of generated names: no word comes of them
_ENDED = ("Succeeded", "Failed")

Documents = list[Document]  # `list` is a method below
Signature = Callable[[Document | None, Document], None]
Key = tuple[str, str | None, str]


@dataclass(frozen=True)
class Event:
    """One change: ADDED, MODIFIED or DELETED, and the object after it."""

    type: str
    object: Document
    before: Document | None = None


class State:
    """All objects, and what happened to them."""

    def __init__(self, version: str = NEWEST, *, custom: bool = True, seed: int = 0) -> None:
        """`version` is of Kubernetes; without `custom` there are no kinds but Kubernetes' own, as on a bare cluster."""
        self.version = version
        self.kinds: dict[str, Kind] = {kind.name: kind for kind in all_kinds(custom=custom)}
        self._random = random.Random(seed)
        self._changed = threading.Condition(threading.RLock())
        self._objects: dict[Key, Document] = {}
        self._history: list[Event] = []  # the number of an event is its resourceVersion
        for name in NAMESPACES:
            self.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})

    @property
    def resource_version(self) -> int:
        """Grows with every change."""
        with self._changed:
            return len(self._history)

    def kind(self, name: str) -> Kind:
        """A kind by its name, as in `kind: Job`."""
        if name not in self.kinds:
            raise bad_request(f'no kind "{name}" is served')
        return self.kinds[name]

    def create(self, document: Document, *, dry_run: bool = False, sign: Signature | None = None) -> Document:
        """Stores a new object, and returns it as stored: named, defaulted, checked. `dry_run`: as it would be.

        `sign`, here and below, notes who changed which fields: it is given the object before and after, and may edit the latter.
        """
        kind = self._kind_of(document)
        made = _without_nulls(document)
        metadata = made.setdefault("metadata", {})
        check_schema(made, kind, self.version)
        with self._changed:
            if not metadata.get("name") and metadata.get("generateName"):
                metadata["name"] = metadata["generateName"] + "".join(self._random.choices(_LETTERS, k=5))
            self._place(made, kind)
            made.pop("status", None)
            fill_defaults(made, kind, self.version)
            check_rules(made, kind)
            if kind.name == "Pod":
                self._check_account(made)
            key = _key(kind, made)
            if key in self._objects:
                raise already_exists(kind.resource, metadata["name"])
            for given in ("resourceVersion", "deletionTimestamp", "deletionGracePeriodSeconds", "selfLink"):
                metadata.pop(given, None)
            metadata |= {
                "uid": str(uuid.UUID(int=self._random.getrandbits(128), version=4)),
                "creationTimestamp": now(),
            }
            if kind.has_status:
                metadata["generation"] = 1
            if sign is not None:
                sign(None, made)
            fill_of_new(made, kind)  # which nobody has set, so that server-side apply leaves it alone
            check_schema(made, kind, self.version)
            if dry_run:
                return copy.deepcopy(made)
            stored = self._put("ADDED", kind, made)
            if kind.name == "Namespace":
                self.create(_object("v1", "ServiceAccount", metadata["name"], "default"))
            return stored

    def get(self, kind: str, namespace: str | None, name: str) -> Document:
        """One object; Refused (404) where it is not there. Of kinds without namespace, `namespace` is not looked at."""
        with self._changed:
            return copy.deepcopy(self._there(kind, namespace, name))

    def find(self, kind: str, namespace: str | None, name: str) -> Document | None:
        """One object, or None."""
        with self._changed:
            found = self._objects.get((kind, namespace if self.kind(kind).namespaced else None, name))
            return copy.deepcopy(found)

    def list(
        self,
        kind: str,
        namespace: str | None = None,
        selector: str | Mapping[str, str] | None = None,
        fields: str | None = None,
    ) -> Documents:
        """Objects by namespace (None: of all), labels and fields, by name."""
        matches = _matching(self.kind(kind), namespace, selector, fields)
        with self._changed:
            found = [self._objects[key] for key in sorted(self._of_kind(kind), key=lambda key: (key[1] or "", key[2]))]
            return [copy.deepcopy(each) for each in found if matches(each)]

    def update(self, document: Document, *, dry_run: bool = False, sign: Signature | None = None) -> Document:
        """Replaces an object, but for its status; Refused (409) where the resourceVersion in it is not the newest."""
        return self._replace(document, status=False, dry_run=dry_run, sign=sign)

    def update_status(self, document: Document, *, dry_run: bool = False, sign: Signature | None = None) -> Document:
        """Replaces an object's status, and nothing else."""
        return self._replace(document, status=True, dry_run=dry_run, sign=sign)

    def change(
        self,
        kind: str,
        namespace: str | None,
        name: str,
        edit: Callable[[Document], Document | None],
        *,
        status: bool = False,
        dry_run: bool = False,
        sign: Signature | None = None,
    ) -> Document:
        """Reads, edits and writes in one go, so that nobody's change comes between; `status`: writes that alone.

        `edit` edits in place, or returns another object.
        """
        with self._changed:
            document = self.get(kind, namespace, name)
            edited = edit(document)
            return self._replace(document if edited is None else edited, status=status, dry_run=dry_run, sign=sign)

    def delete(
        self,
        kind: str,
        namespace: str | None,
        name: str,
        grace_seconds: int | None = None,
        *,
        propagation: str = "Background",
        uid: str | None = None,
        dry_run: bool = False,
    ) -> Document:
        """Begins to end an object, and returns it as it is then.

        A pod that has been given to a node gets deletionTimestamp and deletionGracePeriodSeconds, and stays until the
        kubelet calls `remove`; other objects are gone at once unless something holds them: finalizers, or, with
        propagation Foreground, what they own. With Background what they own is deleted after them; with Orphan it stays.
        """
        with self._changed:
            found = self._there(kind, namespace, name)
            served = self.kind(kind)
            if uid is not None and uid != found["metadata"]["uid"]:
                raise modified(served.resource, name)
            document = copy.deepcopy(found)
            if dry_run:
                return document
            metadata = document["metadata"]
            if propagation == "Orphan":
                self._disown(metadata["uid"])
            if propagation == "Foreground" and FOREGROUND not in metadata.get("finalizers", ()):
                metadata.setdefault("finalizers", []).append(FOREGROUND)
            grace = self._grace(document, grace_seconds)
            if grace > 0 and not ("deletionTimestamp" in metadata and metadata["deletionGracePeriodSeconds"] <= grace):
                metadata |= {"deletionTimestamp": now(grace), "deletionGracePeriodSeconds": grace}
            elif grace == 0 and (metadata.get("finalizers") or kind == "Namespace"):
                metadata.setdefault("deletionTimestamp", now())
                metadata["deletionGracePeriodSeconds"] = 0
            if kind == "Namespace":
                document["status"]["phase"] = "Terminating"
            if document != found:
                document = self._put("MODIFIED", served, document)
            if FOREGROUND in metadata.get("finalizers", ()):
                for owned in self._owned(metadata["uid"]):
                    if "deletionTimestamp" not in owned["metadata"]:
                        self.delete(
                            owned["kind"], _namespace(owned), owned["metadata"]["name"], propagation="Foreground"
                        )
                self._release(metadata["uid"])
            elif kind == "Namespace":
                self._empty(name)
            elif grace == 0 and not metadata.get("finalizers"):
                self._drop(document)
            return document

    def remove(self, kind: str, namespace: str | None, name: str, *, uid: str | None = None) -> None:
        """Ends an object that `delete` has begun to end: a kubelet calls it when a pod's processes are gone."""
        with self._changed:
            found = self.find(kind, namespace, name)
            if found is not None and uid in (None, found["metadata"]["uid"]):
                self.delete(kind, namespace, name, 0)

    def watch(
        self,
        kind: str | None = None,
        namespace: str | None = None,
        selector: str | Mapping[str, str] | None = None,
        fields: str | None = None,
        *,
        since: int | None = None,
    ) -> "Watch":
        """Changes of one kind (None: of all) after `since`, a resourceVersion; None: those that are there, then changes."""
        served = None if kind is None else self.kind(kind)
        matches = _matching(served, namespace, selector, fields)
        with self._changed:
            first = []
            if since is None:
                there = [each for key, each in self._objects.items() if kind in (None, key[0]) and matches(each)]
                first = [Event("ADDED", copy.deepcopy(each)) for each in there]
            return Watch(
                self._changed, self._history, kind, matches, first, len(self._history) if since is None else since
            )

    def record(
        self, about: Document, reason: str, message: str, *, type: str = "Normal", component: str = "double"
    ) -> None:
        """Writes an event about an object, as `kubectl describe` and `kubectl get events` show it; repetitions are counted.

        Where the namespace goes away, nobody is left to read it, and none is written.
        """
        metadata = about["metadata"]
        involved = {"apiVersion": about["apiVersion"], "kind": about["kind"], "name": metadata["name"]}
        involved |= {"uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]}
        involved |= {"namespace": metadata["namespace"]} if "namespace" in metadata else {}
        namespace = metadata.get("namespace", "default")
        with self._changed:
            if ("Namespace", None, namespace) not in self._objects or self._is_ending(namespace):
                return
            for event in self.list("Event", namespace, fields=f"involvedObject.uid={metadata['uid']},reason={reason}"):
                if event["message"] == message:
                    self.update(event | {"count": event["count"] + 1, "lastTimestamp": now()})
                    return
            event = _object("v1", "Event", namespace, f"{metadata['name']}.{self._random.getrandbits(64):016x}")
            event |= {"involvedObject": involved, "reason": reason, "message": message, "type": type, "count": 1}
            event |= {"firstTimestamp": now(), "lastTimestamp": now(), "source": {"component": component}}
            self.create(event)

    def _kind_of(self, document: Document) -> Kind:
        kind = self.kind(str(document.get("kind")))
        if document.get("apiVersion") != kind.api_version:
            raise bad_request(f'{kind.name} is served as "{kind.api_version}", not "{document.get("apiVersion")}"')
        return kind

    def _place(self, document: Document, kind: Kind) -> None:
        """Puts an object into its namespace, which must be there."""
        metadata = document["metadata"]
        if not kind.namespaced:
            metadata.pop("namespace", None)
            return
        namespace = metadata.setdefault("namespace", "default")
        if ("Namespace", None, namespace) not in self._objects:
            raise not_found("namespaces", namespace)
        if self._is_ending(namespace):
            raise forbidden(
                kind.resource,
                metadata.get("name", ""),
                f"unable to create new content in namespace {namespace} because it is being terminated",
            )

    def _check_account(self, pod: Document) -> None:
        namespace, account = pod["metadata"]["namespace"], pod["spec"]["serviceAccountName"]
        if ("ServiceAccount", namespace, account) not in self._objects:
            raise forbidden(
                "pods",
                pod["metadata"]["name"],
                f'error looking up service account {namespace}/{account}: serviceaccount "{account}" not found',
            )

    def _there(self, kind: str, namespace: str | None, name: str) -> Document:
        served = self.kind(kind)
        found = self._objects.get((kind, namespace if served.namespaced else None, name))
        if found is None:
            raise not_found(served.resource, name)
        return found

    def _of_kind(self, kind: str) -> Iterator[Key]:
        return (key for key in self._objects if key[0] == kind)

    def _replace(
        self, document: Document, *, status: bool, dry_run: bool = False, sign: Signature | None = None
    ) -> Document:
        kind = self._kind_of(document)
        given = _without_nulls(document)
        check_schema(given, kind, self.version)
        metadata = given["metadata"]
        with self._changed:
            before = self._there(kind.name, metadata.get("namespace"), metadata["name"])
            seen = metadata.get("resourceVersion")
            if seen and seen != before["metadata"]["resourceVersion"]:
                raise modified(kind.resource, metadata["name"])
            if metadata.get("uid", before["metadata"]["uid"]) != before["metadata"]["uid"]:
                raise modified(kind.resource, metadata["name"])
            if status:
                after = copy.deepcopy(before) | {"status": given.get("status", {})}
                if "managedFields" in metadata:
                    after["metadata"]["managedFields"] = metadata["managedFields"]
            else:
                after = self._changed_to(before, given, kind)
            if sign is not None:
                sign(before, after)
            check_schema(after, kind, self.version)
            if after == before or dry_run:
                return copy.deepcopy(after)
            stored = self._put("MODIFIED", kind, after)
            if (
                "deletionTimestamp" in stored["metadata"]
                and not stored["metadata"].get("finalizers")
                and kind.name != "Pod"
            ):
                self._drop(stored)
            return stored

    def _changed_to(self, before: Document, given: Document, kind: Kind) -> Document:
        """The object with all that a client may change of it changed."""
        metadata = given["metadata"]
        if kind.has_status:
            given.pop("status", None)
        if "status" in before and kind.has_status:
            given["status"] = copy.deepcopy(before["status"])
        kept = (
            "uid",
            "creationTimestamp",
            "generation",
            "deletionTimestamp",
            "deletionGracePeriodSeconds",
            "resourceVersion",
        )
        for name in kept:
            metadata.pop(name, None)
            if name in before["metadata"]:
                metadata[name] = before["metadata"][name]
        if kind.namespaced:
            metadata["namespace"] = before["metadata"]["namespace"]
        if kind.name == "Service":  # a client that leaves its address out does not mean to give it up
            for name in ("clusterIP", "clusterIPs"):
                if name in before["spec"]:
                    given.get("spec", {}).setdefault(name, before["spec"][name])
        fill_defaults(given, kind, self.version)
        if kind.name == "Job" and "manualSelector" not in before["spec"]:
            given["spec"].pop("manualSelector", None)
            given["spec"].setdefault("selector", copy.deepcopy(before["spec"]["selector"]))
        check_rules(given, kind)
        check_change(before, given, kind)
        if kind.has_status and _content(given) != _content(before):
            metadata["generation"] = before["metadata"].get("generation", 1) + 1
        return given

    def _put(self, type: str, kind: Kind, document: Document) -> Document:
        """Stores an object and tells those who watch."""
        key = _key(kind, document)
        before = self._objects.get(key)
        stored = copy.deepcopy(document)
        stored["metadata"]["resourceVersion"] = str(len(self._history) + 1)
        self._objects[key] = stored
        self._history.append(Event(type, stored, before))
        self._changed.notify_all()
        return copy.deepcopy(stored)

    def _drop(self, document: Document) -> None:
        """Removes an object, and what belongs to it."""
        kind = self.kind(document["kind"])
        last = copy.deepcopy(self._objects.pop(_key(kind, document)))
        last["metadata"]["resourceVersion"] = str(len(self._history) + 1)
        self._history.append(Event("DELETED", last, last))
        self._changed.notify_all()
        uid = document["metadata"]["uid"]
        for owned in self._owned(uid):
            if not any(self._has_uid(each["uid"]) for each in owned["metadata"]["ownerReferences"]):
                self.delete(owned["kind"], _namespace(owned), owned["metadata"]["name"])
        for owner in document["metadata"].get("ownerReferences", ()):
            self._release(owner["uid"])
        if self._is_ending(_namespace(document)):
            self._empty(_namespace(document))

    def _is_ending(self, namespace: str | None) -> bool:
        """Whether that namespace is being deleted."""
        there = self._objects.get(("Namespace", None, namespace or ""))
        return there is not None and "deletionTimestamp" in there["metadata"]

    def _empty(self, namespace: str | None) -> None:
        """Deletes what is in a namespace, and then the namespace."""
        for key in [key for key in self._objects if key[1] == namespace]:
            if key in self._objects and "deletionTimestamp" not in self._objects[key]["metadata"]:
                self.delete(*key)
        there = self._objects.get(("Namespace", None, namespace or ""))
        if there is not None and not any(key[1] == namespace for key in self._objects):
            self._drop(there)

    def _release(self, uid: str) -> None:
        """Lets an owner go that waited for what it owns."""
        owner = next((each for each in self._objects.values() if each["metadata"]["uid"] == uid), None)
        if owner is None or FOREGROUND not in owner["metadata"].get("finalizers", ()) or self._owned(uid):
            return
        if owner["metadata"]["deletionGracePeriodSeconds"] > 0:  # a pod that still runs
            return
        owner = copy.deepcopy(owner)
        owner["metadata"]["finalizers"].remove(FOREGROUND)
        if not owner["metadata"]["finalizers"]:
            self._drop(owner)
        else:
            self._put("MODIFIED", self.kind(owner["kind"]), owner)

    def _owned(self, uid: str) -> Documents:
        return [
            each
            for each in list(self._objects.values())
            if any(owner["uid"] == uid for owner in each["metadata"].get("ownerReferences", ()))
        ]

    def _has_uid(self, uid: str) -> bool:
        return any(each["metadata"]["uid"] == uid for each in self._objects.values())

    def _disown(self, uid: str) -> None:
        for owned in self._owned(uid):
            changed = copy.deepcopy(owned)
            owners = [each for each in owned["metadata"]["ownerReferences"] if each["uid"] != uid]
            changed["metadata"]["ownerReferences"] = owners
            self._put("MODIFIED", self.kind(owned["kind"]), changed)

    def _grace(self, document: Document, asked: int | None) -> int:
        """Seconds that a pod has to end; none for one that never began, or has ended."""
        if document["kind"] != "Pod":
            return 0
        spec = document["spec"]
        if not spec.get("nodeName") or document.get("status", {}).get("phase") in _ENDED:
            return 0
        grace = spec["terminationGracePeriodSeconds"] if asked is None else asked
        if asked is not None and asked < 0:
            raise invalid(
                "Pod",
                "",
                document["metadata"]["name"],
                [broken("gracePeriodSeconds", f"Invalid value: {asked}: must not be negative")],
            )
        return int(grace)


class Watch:
    """Changes as they come; to be read by one thread."""

    def __init__(
        self,
        changed: threading.Condition,
        history: list[Event],
        kind: str | None,
        matches: Test,
        first: list[Event],
        position: int,
    ) -> None:
        self._changed, self._history, self._kind, self._matches = changed, history, kind, matches
        self._first, self._position, self._closed = first, position, False

    def next(self, timeout: float | None = None) -> Event | None:
        """The next change; None after `timeout` seconds without one, or when the watch was closed."""
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            if self._first:
                return self._first.pop(0)
            while not self._closed:
                while self._position < len(self._history):
                    event = self._seen(self._history[self._position])
                    self._position += 1
                    if event is not None:
                        return event
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._changed.wait(left)
        return None

    def close(self) -> None:
        """Ends it, also for a thread that waits in `next`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Event]:
        while (event := self.next()) is not None:
            yield event

    def _seen(self, event: Event) -> Event | None:
        """The change as this watch has it: what stops matching is deleted for it, what begins to is added."""
        if self._kind not in (None, event.object["kind"]):
            return None
        is_there = event.type != "DELETED" and self._matches(event.object)
        was_there = event.before is not None and self._matches(event.before)
        if not is_there and not was_there:
            return None
        type = "DELETED" if not is_there else "MODIFIED" if was_there else "ADDED"
        return Event(type, copy.deepcopy(event.object))


def now(later: float = 0.0) -> str:
    """This moment, or one some seconds later, as timestamps have it."""
    return datetime.fromtimestamp(time.time() + later, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def owner_reference(owner: Document) -> Document:
    """What an object that `owner` controls has in metadata.ownerReferences."""
    return {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def is_refusal(error: Exception, code: int) -> bool:
    """Whether an error is an answer with that code: 404 not there, 409 somebody was faster."""
    return isinstance(error, Refused) and error.code == code


def _object(api_version: str, kind: str, namespace: str, name: str) -> Document:
    return {"apiVersion": api_version, "kind": kind, "metadata": {"namespace": namespace, "name": name}}


def _key(kind: Kind, document: Document) -> Key:
    metadata = document["metadata"]
    return kind.name, metadata.get("namespace") if kind.namespaced else None, metadata["name"]


def _namespace(document: Document) -> str | None:
    namespace: str | None = document["metadata"].get("namespace")
    return namespace


def _content(document: Document) -> Document:
    return {name: value for name, value in document.items() if name not in ("metadata", "status")}


def _matching(
    kind: Kind | None, namespace: str | None, selector: str | Mapping[str, str] | None, fields: str | None
) -> Test:
    tests = [labels_test(selector), fields_test(fields)]
    if namespace is not None and (kind is None or kind.namespaced):
        tests.append(lambda document: _namespace(document) == namespace)
    return lambda document: all(test(document) for test in tests)


def _without_nulls(value: Any) -> Any:
    """A copy without the fields that are null, which mean the same as none."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
