"""Records name the machine and the libraries that made them."""

import json
import platform
from importlib.metadata import version

from trainer.machine import describe_machine, library_versions, processor_name


def test_the_machine_is_described_in_json() -> None:
    machine = json.loads(json.dumps(describe_machine()))
    assert machine["cores"] >= 1 and machine["memory_bytes"] > 2**28
    assert machine["processor"] == processor_name() != ""
    assert isinstance(machine["accelerators"], list)


def test_versions_are_those_installed() -> None:
    versions = library_versions()
    assert versions["python"] == platform.python_version()
    assert versions["torch"] == version("torch") and versions["scikit-learn"] == version("scikit-learn")
