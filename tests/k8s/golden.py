"""Renders every manifest that people apply, and renews the golden files: `python -m tests.k8s.golden`.

The golden files say what a change of the manifests changes for a cluster, so that it is reviewed; and they spare tests kubectl.
"""

import hashlib
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
GOLDEN = ROOT / "tests" / "golden" / "k8s"
FOLDERS = sorted(path for kind in ("overlays", "stages") for path in (ROOT / "k8s" / kind).iterdir() if path.is_dir())
SOURCES = GOLDEN / "sources.sha256"


def golden_of(folder: Path) -> Path:
    """The golden file of one folder that people apply."""
    return GOLDEN / f"{folder.parent.name}-{folder.name}.yaml"


def rendered(folder: Path) -> str:
    """What `kubectl kustomize` makes of a folder."""
    if shutil.which("kubectl") is None:
        raise FileNotFoundError(
            "kubectl is missing, which builds the manifests. Debian and Ubuntu: `apt-get install kubernetes-client`; "
            "elsewhere see https://kubernetes.io/docs/tasks/tools/."
        )
    return subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=True).stdout


@cache
def documents(path: Path) -> list[dict[str, Any]]:
    """The objects in a file; leave them as they are."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return [document for document in yaml.load_all(path.read_text(), loader) if document]


def digest_of_sources() -> str:
    """Changes with every file that manifests are built from."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "k8s").rglob("*.yaml")):
        digest.update(f"{path.relative_to(ROOT)}\n{path.read_text()}\n".encode())
    return digest.hexdigest()


def main() -> None:
    """Renews all golden files."""
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for path in GOLDEN.iterdir():
        path.unlink()
    for folder in FOLDERS:
        golden_of(folder).write_text(rendered(folder))
    SOURCES.write_text(f"{digest_of_sources()}\n")


if __name__ == "__main__":
    main()
