"""Pure: command line and environment of each process that a launch starts, so that they can be printed and tested."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from datastore.progress import PROGRESS_DIR_VARIABLE

STORE_SHARING_VARIABLE: Final = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
METRICS_OFFSET_VARIABLE: Final = "VIEWPOINT_METRICS_PORT_OFFSET"  # as trainer/metrics.py reads it, which imports torch
LOOPBACK: Final = "127.0.0.1"
AGENT_WORDS: Final = (sys.executable, "-m", "launcher.agent")
_FOLD: Final = " \\"
_FOLDED_INDENT: Final = 4
TRAINER_WORDS: Final = (sys.executable, "-m", "trainer")


@dataclass(frozen=True)
class Command:
    """One process: its words, and what its environment has beyond the launcher's own."""

    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)

    def as_shell(self, width: int | None = None, indent: int = 0) -> str:
        """What does the same in a shell: one line, or lines of so many columns unless a single word is longer.

        Of several lines, the environment has its own, and so has what a node's agent runs.
        """
        settings, words = shell_settings(self.environment), _with_their_values(self.words)
        if width is None:
            return " ".join([*settings, *words])
        end = words.index("--") + 1 if "--" in words else len(words)
        return fold([settings, words[:end], words[end:]], width, indent)


def shell_settings(environment: Mapping[str, str]) -> list[str]:
    """Each variable as a shell sets it."""
    return [f"{name}={shlex.quote(value)}" for name, value in environment.items()]


def fold(groups: Sequence[Sequence[str]], width: int, indent: int = 0) -> str:
    """Pieces of one command line, a line or more for each group of them, folded as a shell understands it."""
    lines: list[str] = []
    for group in groups:
        for place, piece in enumerate(group):
            if place > 0 and len(lines[-1]) + 1 + len(piece) + len(_FOLD) <= width:
                lines[-1] += f" {piece}"
            else:
                lines.append(" " * (indent + _FOLDED_INDENT * bool(lines)) + piece)
    return f"{_FOLD}\n".join(lines)


def _with_their_values(words: Sequence[str]) -> list[str]:
    """Words for a shell, options in one piece with what follows them."""
    pieces: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        if before.startswith("-") and before != "--" and not word.startswith("-"):
            pieces[-1] += f" {shlex.quote(word)}"
        else:
            pieces.append(shlex.quote(word))
    return pieces


@dataclass(frozen=True)
class Machine:
    """What processes on this machine share."""

    cores: int
    gpus: int = 0


@dataclass(frozen=True)
class Layout:
    """How many processes a job has, and when a node or a worker counts as lost."""

    nodes: int
    procs_per_node: int = 1
    max_restarts: int = 3  # in a row, without a new checkpoint
    min_nodes: int | None = None  # with which the job goes on; None: with all
    node_timeout: float = 6.0  # seconds of silence
    step_deadline: float = 60.0  # seconds, at least; 0: no worker counts as hung

    @property
    def least_nodes(self) -> int:
        """Nodes without which the job waits."""
        return self.nodes if self.min_nodes is None else self.min_nodes

    @property
    def world(self) -> int:
        """Worker processes in all, when all nodes are there."""
        return self.nodes * self.procs_per_node


@dataclass(frozen=True)
class Place:
    """Where a node is."""

    address: str = LOOPBACK
    interface: str | None = None  # None: the loopback interface
    network: str | None = None  # the network namespace


def worker_words(stage: Sequence[str]) -> tuple[str, ...]:
    """The command of one process of a stage, from the stage's name and its arguments."""
    return (*TRAINER_WORDS, *stage)


def process_command(worker: Sequence[str], machine: Machine, progress: Path) -> Command:
    """A stage that is one process."""
    return Command(tuple(worker), worker_environment(machine, processes=1, devices=None, progress=progress))


def node_command(
    worker: Sequence[str],
    *,
    node: int,
    layout: Layout,
    job: str,
    endpoint: str,
    logs: Path,
    machine: Machine,
    progress: Path,
    place: Place = Place(),
) -> Command:
    """The agent of one node of a stage that runs on several; its workers inherit the environment."""
    agent = (
        *AGENT_WORDS, "--endpoint", endpoint, "--job", job, "--node", str(node),
        "--procs-per-node", str(layout.procs_per_node), "--address", place.address,
        *(("--network", place.network) if place.network else ()),
        "--node-timeout", f"{layout.node_timeout:g}", "--step-deadline", f"{layout.step_deadline:g}", "--logs", str(logs),
    )  # fmt: skip
    devices = devices_of_node(node, layout, machine.gpus)
    environment = worker_environment(machine, processes=layout.world, devices=devices, progress=progress)
    environment |= {STORE_SHARING_VARIABLE: "1", "GLOO_SOCKET_IFNAME": place.interface or loopback_interface()}
    if node > 0 and place.network is None:  # nodes without networks of their own share this machine's ports
        environment[METRICS_OFFSET_VARIABLE] = str(node * layout.procs_per_node)
    return Command((*agent, "--", *worker), environment)


def nursery_environment(layout: Layout, machine: Machine) -> dict[str, str]:
    """What must be said to the process that workers are forked from, as they cannot hear it any more."""
    needed = {"DS_ACCELERATOR", *_KEEP_FREED_MEMORY}
    devices = devices_of_node(0, layout, machine.gpus)
    environment = worker_environment(machine, processes=layout.world, devices=devices, progress=Path())
    return {name: value for name, value in environment.items() if name in needed}


# On the CPU every step frees and asks for the same large blocks. glibc would hand them back to the kernel and fault them in
# again, zeroed: a third of a small student's step. The first two values are a GiB and four; with one arena, what one thread
# frees serves the others.
_KEEP_FREED_MEMORY: Final = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_ARENA_MAX": "1",
}


def worker_environment(machine: Machine, *, processes: int, devices: str | None, progress: Path) -> dict[str, str]:
    """What every worker needs to know that no config says."""
    environment = {
        PROGRESS_DIR_VARIABLE: str(progress),
        "OMP_NUM_THREADS": str(
            max(1, machine.cores // processes)
        ),  # torchrun's own default of 1 would leave cores idle
        "PYTHONUNBUFFERED": "1",  # the last words of a killed process are the interesting ones
    }
    if devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = devices
    if machine.gpus == 0 or devices == "":
        environment["DS_ACCELERATOR"] = "cpu"
        environment |= _KEEP_FREED_MEMORY
    return environment


def devices_of_node(node: int, layout: Layout, gpus: int) -> str | None:
    """CUDA_VISIBLE_DEVICES of a node: GPUs of its own, or "" for all nodes where they do not go round; None without."""
    if gpus == 0:
        return None
    if layout.world > gpus:
        return ""  # nccl refuses two ranks on one GPU
    first = node * layout.procs_per_node
    return ",".join(str(device) for device in range(first, first + layout.procs_per_node))


def loopback_interface() -> str:
    """The interface that nodes on one machine talk over."""
    return "lo0" if sys.platform == "darwin" else "lo"
