"""A site for tests: an object store that pods reach, the overlay that says where it is, and a namespace with its secret."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from tests.cluster.double import Double
from tests.cluster.refusals import Document
from tests.s3_server import KEY_ID, SECRET_KEY

ROOT: Final = Path(__file__).parent.parent.parent
NAMESPACE: Final = "viewpoint"
IMAGE: Final = "registry.local/viewpoint:0.1.0"
IMAGE_ENVIRONMENT: Final = {
    "HOME": "/tmp",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONUNBUFFERED": "1",
    # views are rounded in another way by another processor's kernels: a few bytes of a corpus, and then all losses
    **{name: value for name, value in os.environ.items() if name.startswith("OPENBLAS_")},
}
"""As k8s/image/Dockerfile has it, and what this machine's numpy is told, which is the image's here."""


@dataclass(frozen=True)
class Site:
    """A double with all that k8s/ asks of a site."""

    double: Double
    manifest: Path  # a folder that kustomize builds
    endpoint_url: str  # of the object store, as pods see it
    environment: Mapping[str, str]  # of processes that shall speak to it

    def kubectl(self, *words: str, given: str | None = None) -> str:
        """What kubectl prints."""
        done = subprocess.run(
            ["kubectl", *words], env=self.environment, input=given, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"`kubectl {' '.join(words)}` failed: {done.stderr.strip()}")
        return done.stdout

    def get(self, *words: str) -> Any:
        """Objects, as kubectl gets them."""
        return json.loads(self.kubectl("get", "--output=json", *words))

    def pods(self, job: str) -> list[Document]:
        """A Job's pods by their number, the newest last."""
        found: list[Document] = self.get("pods", "--selector", f"job-name={job}")["items"]
        return sorted(found, key=lambda pod: (pod["spec"]["hostname"], pod["metadata"]["creationTimestamp"]))

    def launch(self, *words: str, folder: Path) -> "subprocess.Popen[str]":
        """`viewpoint launch ... --on k8s` with this site's manifest, begun."""
        command = [
            sys.executable, "-m", "launcher", "launch", *words,
            "--on", "k8s", "--manifest", str(self.manifest), "--image", IMAGE,
        ]  # fmt: skip
        return subprocess.Popen(
            command, env=self.environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )


@contextmanager
def running_site(folder: Path, server_url: str) -> Iterator[Site]:
    """A site whose pods reach the S3 server, which listens on loopback."""
    with Double(folder / "cluster", image_environment=IMAGE_ENVIRONMENT, namespace=NAMESPACE) as double:
        port = int(server_url.rpartition(":")[2])
        double.network.open_door(port)
        endpoint_url = f"http://{double.network.gateway}:{port}"
        site = Site(double, folder / "site", endpoint_url, os.environ | double.api.environment)
        write_overlay(site.manifest, endpoint_url)
        site.kubectl("create", "namespace", NAMESPACE)
        keys = (f"--from-literal=AWS_ACCESS_KEY_ID={KEY_ID}", f"--from-literal=AWS_SECRET_ACCESS_KEY={SECRET_KEY}")
        site.kubectl("create", "secret", "generic", "viewpoint-storage", *keys)
        yield site


def write_overlay(folder: Path, endpoint_url: str) -> None:
    """k8s/overlays/s3 as this site has it: its endpoint, and one core a pod, as a machine has that four nodes share."""
    folder.mkdir()
    patches = [
        patch("ConfigMap", "viewpoint-storage", "add", "/data/AWS_ENDPOINT_URL", endpoint_url),
        patch("Job", "viewpoint-train", "replace", "/spec/template/spec/containers/0/resources/requests/cpu", "1"),
    ]
    overlay = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(ROOT / "k8s" / "overlays" / "s3", folder)],
        "patches": patches,
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(overlay))


def copy_checkout(folder: Path, endpoint_url: str, settings: Mapping[str, str]) -> Path:
    """The repository as somebody has it who has edited k8s/ as docs/cluster.md says, and for whom make has installed it."""
    for name in ("launcher", "trainer", "datastore", "models"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    copy_manifests(folder, endpoint_url, None, settings)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    (programs / "python").symlink_to(sys.executable)
    (programs / "viewpoint").write_text(f'#!/bin/sh\nexec {sys.executable} -m launcher "$@"\n')
    (programs / "viewpoint").chmod(0o755)
    (folder / ".venv" / ".installed").touch()
    return folder


def copy_manifests(folder: Path, endpoint_url: str, recipe: Document | None, settings: Mapping[str, str]) -> Path:
    """k8s/ as somebody has it who has edited it as docs/cluster.md says; the folder to apply for training."""
    own = folder / "k8s"
    shutil.copytree(ROOT / "k8s", own, dirs_exist_ok=True)
    edit(own / "settings" / "settings.yaml", lambda document: document["data"].update(settings))
    edit(
        own / "settings" / "kustomization.yaml",
        lambda document: document["images"][0].update(newName=IMAGE.partition(":")[0]),
    )
    edit(
        own / "components" / "s3" / "storage.yaml",
        lambda document: document["data"].update(AWS_ENDPOINT_URL=endpoint_url),
    )
    if recipe is not None:
        (own / "base" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    job = own / "base" / "train.yaml"
    job.write_text(job.read_text().replace('cpu: "2"', 'cpu: "1"'))
    return own / "stages" / "train"


def edit(path: Path, change: Callable[[Document], object]) -> None:
    """Changes a YAML file of one document."""
    document = yaml.safe_load(path.read_text())
    change(document)
    path.write_text(yaml.safe_dump(document))


def patch(kind: str, name: str, operation: str, path: str, value: object) -> Document:
    """One change of one object, as kustomize takes it."""
    return {
        "target": {"kind": kind, "name": name},
        "patch": yaml.safe_dump([{"op": operation, "path": path, "value": value}]),
    }
