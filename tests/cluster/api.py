"""The API server of the cluster double: over a State, on loopback, enough of Kubernetes' HTTP for genuine kubectl.

It is a double for tests, and no cluster: what it knows of Kubernetes is our reading of it, the schemas of one Kubernetes version
and the genuine definitions in tests/crds. It covers discovery, strict checking of fields with the path of what is wrong, the
defaults that our manifests rely on, apply of both kinds, diff, dry runs, tables, watches, logs, labels, patches, events, deletion
with grace periods and ownership, eviction. It does not cover admission webhooks, CEL rules, RBAC (everybody may do everything),
quotas, disruption budgets, paging, exec and port-forward, other versions of a kind than one, and what Kubernetes checks beyond
schemas and `rules.py`. Nothing runs: for that a kubelet and a Job controller work on the same State.
"""

import json
import select
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Protocol
from urllib.parse import parse_qsl, urlsplit

import yaml

from tests.cluster.discovery import groups_of, openapi_of, openapi_paths, resources_of, version_of
from tests.cluster.refusals import Document, Refused, bad_request
from tests.cluster.state import State
from tests.cluster.verbs import Answer, Request, Target, Verbs

_LOOK_SECONDS = 0.5  # between looks whether whoever watches is still there
_NO_SUCH_THING = "the server could not find the requested resource"


class Logs(Protocol):
    """What a kubelet has of a container's output, in pieces; with `follow` until the container ends."""

    def __call__(
        self,
        namespace: str,
        pod: str,
        *,
        follow: bool,
        tail: int | None,
        container: str | None,
        previous: bool,
        timestamps: bool,
    ) -> Iterable[bytes]:
        """Refused where there is none yet."""


@dataclass(frozen=True)
class Api:
    """A server that runs."""

    url: str
    kubeconfig: Path
    cache: Path
    requests: list[str] = field(default_factory=list)
    """Method and path of everything that was asked."""

    @property
    def environment(self) -> Mapping[str, str]:
        """With these variables kubectl speaks to this server, and keeps what it learns of it to itself."""
        return {"KUBECONFIG": str(self.kubeconfig), "KUBECACHEDIR": str(self.cache)}


def no_logs(
    namespace: str,
    pod: str,
    *,
    follow: bool,
    tail: int | None,
    container: str | None,
    previous: bool,
    timestamps: bool,
) -> Iterable[bytes]:
    """Where no kubelet is."""
    raise bad_request(
        f'container "{container or "?"}" in pod "{pod}" is waiting to start: no kubelet works on this state'
    )


@contextmanager
def running_api(state: State, *, logs: Logs = no_logs, namespace: str = "default") -> Iterator[Api]:
    """A server on a free port of loopback; `namespace` is the one that its kubeconfig names."""
    with tempfile.TemporaryDirectory(prefix="viewpoint-double-") as folder:
        server = _Server(state, logs)
        url = f"http://127.0.0.1:{server.server_address[1]}"
        api = Api(url, Path(folder) / "kubeconfig", Path(folder) / "cache", server.requests)
        api.kubeconfig.write_text(yaml.safe_dump(kubeconfig(url, namespace)))
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="double", daemon=True)
        thread.start()
        try:
            yield api
        finally:
            server.is_closing.set()
            server.shutdown()
            server.server_close()
            thread.join()


def kubeconfig(url: str, namespace: str) -> Document:
    """What kubectl needs to know of a server."""
    context = {"cluster": "double", "user": "nobody", "namespace": namespace}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "double", "cluster": {"server": url}}],
        "users": [{"name": "nobody", "user": {}}],
        "contexts": [{"name": "double", "context": context}],
        "current-context": "double",
    }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, state: State, logs: Logs) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.state, self.logs, self.verbs = state, logs, Verbs(state)
        self.is_closing = threading.Event()
        self.requests: list[str] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news; anything else is a fault of ours and goes to stderr."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: `Api.requests` has them."""

    def do_GET(self) -> None:
        """One request."""
        self._answer()

    do_POST = do_PUT = do_PATCH = do_DELETE = do_GET  # noqa: N815

    def _answer(self) -> None:
        url = urlsplit(self.path)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        self.server.requests.append(f"{self.command} {self.path}")
        try:
            fixed = self._fixed(url.path)
            if fixed is not None:
                self._send(fixed)
                return
            if url.path.endswith("/selfsubjectaccessreviews"):
                review = {"kind": "SelfSubjectAccessReview", "apiVersion": "authorization.k8s.io/v1", "spec": {}}
                self._send(Answer(201, review | {"status": {"allowed": True, "reason": "the double has no RBAC"}}))
                return
            request = Request(
                target=self._target(url.path),
                query=query,
                body=body,
                content_type=self.headers.get("Content-Type", "application/json").partition(";")[0],
                accept=self.headers.get("Accept", ""),
                user_agent=self.headers.get("User-Agent", ""),
            )
            if request.target.subresource == "log" and request.target.kind.name == "Pod":
                self._send_logs(request)
            elif self.command == "GET" and query.get("watch") in ("true", "1"):
                self._send_changes(request)
            else:
                self._send(self.server.verbs.answer(self.command, request))
        except Refused as refusal:
            self._send(Answer(refusal.code, refusal.status()))

    def _fixed(self, path: str) -> Answer | None:
        """What is the same whatever happens."""
        kinds = list(self.server.state.kinds.values())
        parts = path.strip("/").split("/")
        found: Document | None = None
        if path == "/version":
            found = version_of(self.server.state.version)
        elif path == "/api":
            found = {"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}
        elif path == "/apis":
            found = groups_of(kinds)
        elif path == "/openapi/v3":
            found = openapi_paths(kinds)
        elif path.startswith("/openapi/v3/"):
            group = parts[3] if parts[2] == "apis" else ""
            found = openapi_of(kinds, group, parts[-1])
        elif path in ("/healthz", "/livez", "/readyz"):
            found = {}
        elif len(parts) == 2 and parts[0] == "api":
            found = resources_of(kinds, "", parts[1])
        elif len(parts) == 3 and parts[0] == "apis":
            found = resources_of(kinds, parts[1], parts[2])
        return None if found is None else Answer(200, found)

    def _target(self, path: str) -> Target:
        """What a path names."""
        root, *parts = path.strip("/").split("/")
        group, parts = ("", parts) if root == "api" else (parts[0], parts[1:]) if parts else ("", [])
        version, *parts = parts or [""]
        namespace = None
        if parts[:1] == ["namespaces"] and len(parts) > 2 and parts[2] != "status":
            namespace, parts = parts[1], parts[2:]
        for kind in self.server.state.kinds.values():
            if parts and (kind.group, kind.version, kind.plural) == (group, version, parts[0]) and len(parts) <= 3:
                name, subresource = (*parts[1:], None, None)[:2]
                return Target(kind, namespace, name, subresource)
        raise Refused(404, "NotFound", _NO_SUCH_THING)

    def _send(self, answer: Answer) -> None:
        text = json.dumps(answer.body).encode()
        self.send_response(answer.code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        for warning in answer.warnings:
            self.send_header("Warning", f"299 - {json.dumps(warning)}")
        self.end_headers()
        self.wfile.write(text)

    def _send_changes(self, request: Request) -> None:
        """Changes as they come, until the client has gone or its time is up."""
        target, query = request.target, request.query
        since = query.get("resourceVersion", "")
        fields = query.get("fieldSelector", "")
        if target.name is not None:
            fields = ",".join(filter(None, (fields, f"metadata.name={target.name}")))
        watch = self.server.state.watch(
            target.kind.name,
            target.namespace,
            query.get("labelSelector"),
            fields,
            since=None if since in ("", "0") else int(since),
        )
        deadline = time.monotonic() + float(query.get("timeoutSeconds", "86400"))
        self._begin_stream("application/json")
        while time.monotonic() < deadline and not self.server.is_closing.is_set():
            event = watch.next(_LOOK_SECONDS)
            if event is None:
                if self._has_gone():
                    return
                continue
            shown = self.server.verbs.shown([event.object], request) if request.wants_table else event.object
            self._send_piece(json.dumps({"type": event.type, "object": shown}).encode() + b"\n")
        self._end_stream()

    def _send_logs(self, request: Request) -> None:
        query, target = request.query, request.target
        unknown = query.keys() & {"sinceSeconds", "sinceTime", "limitBytes", "stream"}
        if unknown:
            raise bad_request(f"the double has logs by their last lines only, not by {', '.join(sorted(unknown))}")
        assert target.name is not None
        pod = self.server.state.get("Pod", target.namespace, target.name)
        container = query.get("container") or None
        names = [each["name"] for each in pod["spec"]["containers"]]
        if container is None and len(names) > 1:
            listed = " ".join(names)
            raise bad_request(f"a container name must be specified for pod {target.name}, choose one of: [{listed}]")
        if container not in (None, *names):
            raise bad_request(f"container {container} is not valid for pod {target.name}")
        pieces = iter(
            self.server.logs(
                pod["metadata"]["namespace"],
                target.name,
                follow=query.get("follow") == "true",
                tail=int(query["tailLines"]) if "tailLines" in query else None,
                container=container,
                previous=query.get("previous") == "true",
                timestamps=query.get("timestamps") == "true",
            )
        )
        first = next(pieces, b"")  # before anything is sent, as it may be refused
        self._begin_stream("text/plain")
        self._send_piece(first)
        for piece in pieces:
            self._send_piece(piece)
        self._end_stream()

    def _begin_stream(self, content_type: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", content_type)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _send_piece(self, piece: bytes) -> None:
        if piece:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))

    def _end_stream(self) -> None:
        self.wfile.write(b"0\r\n\r\n")

    def _has_gone(self) -> bool:
        """Whether the client has closed its end."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        with suppress(OSError):
            return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""
        return True
