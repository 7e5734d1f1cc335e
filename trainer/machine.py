"""What this machine and its libraries are, for records and reports."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

_LIBRARIES: Final = ("viewpoint", "torch", "deepspeed", "timm", "scikit-learn", "numpy", "zarr")


def describe_machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, and accelerators."""
    import psutil
    import torch

    accelerators = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "accelerators": accelerators,
        "system": f"{platform.system()} {platform.machine()}",
    }


def processor_name() -> str:
    """The processor's name as its maker writes it, where the system tells."""
    table = Path("/proc/cpuinfo")
    if table.is_file():
        for line in table.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def library_versions() -> dict[str, str]:
    """Versions of Python and of what a number may depend on."""
    versions = {"python": platform.python_version()}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:  # run from a source tree that is not installed
            continue
    return versions
