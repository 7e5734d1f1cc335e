"""What a worker needs imported, done once for all: processes that are forked afterwards start in milliseconds.

Torch, deepspeed and the training stage take five seconds of processor time to import, which every worker would pay at
every restart; a forked one needs a tenth of it to its first step. None of it starts a thread or touches a GPU, so that
forking afterwards is safe.
"""

import importlib
import os
import sys
from typing import Final

from launcher.command import TRAINER_WORDS

_OF_STAGE: Final = {
    "pretrain": (
        "trainer.pretrain",
        "trainer.checkpoint",
        "trainer.config",
        "trainer.distributed",
        "trainer.encoders",
        "trainer.engine",
        "trainer.export",
        "trainer.fragments",
        "trainer.metrics",
        "trainer.runfolder",
        "trainer.saving",
        "datastore.layout",
        "datastore.objects",
        "datastore.stream",
        "torch._inductor",  # what the switch to deterministic algorithms imports: three quarters of all
    ),
    "cache": ("trainer.cache",),
}


def stage_of(words: tuple[str, ...]) -> str | None:
    """The stage that a worker's command runs, or None where it is no stage of ours."""
    return words[len(TRAINER_WORDS)] if words[: len(TRAINER_WORDS)] == TRAINER_WORDS else None


def warm_up(stage: str | None) -> None:
    """Imports what the stage's workers will ask for. What is not installed is theirs to explain."""
    # else torch would ask the CUDA driver for devices, which no process survives being forked after
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    try:
        for name in _OF_STAGE.get(stage or "", ()):
            importlib.import_module(name)
        if stage == "pretrain":
            from trainer.engine import import_deepspeed

            import_deepspeed()
    except ModuleNotFoundError:
        return


def has_lost_its_gpus() -> bool:
    """Whether this process needs a GPU and was forked from one that had spoken to the CUDA driver: it gets none."""
    torch = sys.modules.get("torch")
    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch is not None and bool(torch.cuda._is_in_bad_fork())


def settle(threads: str | None) -> None:
    """Makes a forked process use as many threads as its environment says: torch looked when it was imported."""
    if threads is not None:
        import torch

        torch.set_num_threads(int(threads))
