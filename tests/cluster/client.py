"""kubectl, as tests call it: against the double, or against the cluster that VIEWPOINT_TEST_KUBECONFIG names."""

import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

Document = dict[str, Any]
_PATIENCE_SECONDS = 60
_OLDEST_MINOR = 29  # older ones check fields by themselves, against what the double does not serve


@cache
def program() -> str:
    """Where kubectl is; an error where it is missing, or too old to leave the checking of fields to the server."""
    found = shutil.which("kubectl")
    if found is None:
        raise FileNotFoundError(
            "kubectl is missing, with which the double is tested. Debian and Ubuntu: `apt-get install kubernetes-client`; "
            "elsewhere see https://kubernetes.io/docs/tasks/tools/."
        )
    said = subprocess.run([found, "version", "--client"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"v1\.(\d+)", said) or re.search(r'Minor:"(\d+)', said)
    if version is None or int(version[1]) < _OLDEST_MINOR:
        raise RuntimeError(
            f"{found} is {said.strip()}; tests of the double need kubectl 1.{_OLDEST_MINOR} or newer: "
            f"https://kubernetes.io/docs/tasks/tools/."
        )
    return found


@dataclass(frozen=True)
class Done:
    """A command that ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Client:
    """kubectl in one namespace of one cluster."""

    environment: Mapping[str, str]
    namespace: str

    def words(self, *words: str) -> list[str]:
        """A command line."""
        return [program(), "--namespace", self.namespace, *words]

    def try_(self, *words: str, given: Sequence[Document] | str | None = None) -> Done:
        """Runs kubectl, with objects or text on its standard input."""
        text = given if given is None or isinstance(given, str) else "\n".join(map(json.dumps, given))
        done = subprocess.run(
            self.words(*words),
            input=text,
            stdin=subprocess.DEVNULL if text is None else None,
            capture_output=True,
            text=True,
            env=os.environ | dict(self.environment),
            timeout=_PATIENCE_SECONDS,
            check=False,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def __call__(self, *words: str, given: Sequence[Document] | str | None = None) -> str:
        """What kubectl prints; it must succeed."""
        done = self.try_(*words, given=given)
        assert done.code == 0, f"kubectl {' '.join(words)} ended with {done.code}:\n{done.err}{done.out}"
        return done.out

    def refused(self, *words: str, given: Sequence[Document] | str | None = None) -> str:
        """What kubectl says when it fails; it must fail."""
        done = self.try_(*words, given=given)
        assert done.code != 0, f"kubectl {' '.join(words)} succeeded:\n{done.out}"
        return done.err

    @contextmanager
    def running(self, *words: str) -> Iterator[subprocess.Popen[str]]:
        """kubectl while it runs on; it is killed at the end, and after a minute."""
        process = subprocess.Popen(
            self.words(*words),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | dict(self.environment),
        )
        late = threading.Timer(_PATIENCE_SECONDS, process.kill)
        late.start()
        with process:
            try:
                yield process
            finally:
                late.cancel()
                process.kill()
