"""What a pod's processes live in: namespaces of its own, and the image's file system with the pod's volumes in it.

The image stands for this machine's root file system with the Python that runs the tests, whatever the manifest calls it: the
layer that a container writes to is a memory file system above it, gone with the container. People's homes are not in it.
A container is process 1 of its own PID namespace, as anywhere: signals without a handler do nothing, and it dies with
all its children.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

from tests.cluster.network import run

ROOT: Final = Path(__file__).parent.parent.parent
IMAGE_PATH: Final = (
    f"{Path(sysconfig.get_path('scripts'))}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)
"""PATH in the image: `python` is the tests' own."""

_AROUND: Final = 'exec 3>&2 2>/dev/null; (exec /bin/sh -c "$1" 2>&3 3>&-); exit $?'
"""Waits for the container's process 1, its first child, and ends as it does; of its own it says nothing."""

_DEVICES: Final = ("null", "zero", "full", "random", "urandom", "tty")
_SHARED_MEMORY: Final = "64m"  # of a container without a volume there, as runtimes have it


@dataclass(frozen=True)
class Mount:
    """Something of this machine at a place of a container's."""

    source: Path
    target: str
    read_only: bool = False


@dataclass(frozen=True)
class Identity:
    """Who a container's processes are, and what they may do."""

    user: int = 0
    group: int = 0
    groups: tuple[int, ...] = ()
    may_gain_privileges: bool = True
    has_capabilities: bool = True

    @property
    def words(self) -> tuple[str, ...]:
        """The command that becomes it."""
        groups = f"--groups={','.join(map(str, self.groups))}" if self.groups else "--clear-groups"
        return (
            "setpriv", f"--reuid={self.user}", f"--regid={self.group}", groups,
            *(() if self.may_gain_privileges else ("--no-new-privs",)),
            *(() if self.has_capabilities else ("--bounding-set=-all", "--inh-caps=-all")),
        )  # fmt: skip


@dataclass(frozen=True)
class Program:
    """What a container runs."""

    words: tuple[str, ...]
    environment: Mapping[str, str]
    folder: str
    mounts: tuple[Mount, ...]
    identity: Identity
    read_only_root: bool


class Sandbox:
    """A pod's network, names and volumes, held by a process that does nothing."""

    def __init__(self, hostname: str) -> None:
        words = ["sh", "-c", 'hostname "$1" && echo ready && exec sleep infinity', "sh", hostname]
        # it ends with the thread that starts it, which is the pod's
        self._process = subprocess.Popen(
            ["setpriv", "--pdeathsig=KILL", "unshare", "--net", "--uts", "--ipc", "--mount", *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._process.stdout is not None
        with self._process.stdout as said:
            if said.readline() != b"ready\n":
                raise RuntimeError("A pod got no namespaces of its own: the cluster double needs Linux and root.")
        self.process = self._process.pid

    def mount_memory(self, folder: Path, size: int | None) -> None:
        """Puts a memory file system at a folder, for this pod alone."""
        options = ["-o", f"size={size}"] if size is not None else []
        run("nsenter", f"--target={self.process}", "--mount", "mount", "-t", "tmpfs", *options, "tmpfs", str(folder))

    def set_owner(self, folder: Path, group: int) -> None:
        """Lets a group write in a folder, and what it makes there belong to the group."""
        inside = ("nsenter", f"--target={self.process}", "--mount")
        run(*inside, "chgrp", str(group), str(folder))
        run(*inside, "chmod", "2777", str(folder))

    def start(self, program: Program, folder: Path, log: Path) -> "Container":
        """Starts a container, whose output goes to the log; `folder` is where its root lies, outside."""
        folder.mkdir(parents=True)
        with log.open("ab") as written:
            process = subprocess.Popen(
                [
                    _path("setpriv"), "--pdeathsig=KILL",
                    _path("nsenter"), f"--target={self.process}", "--net", "--uts", "--ipc", "--mount",
                    _path("unshare"), "--mount", "--pid", "/bin/sh", "-c", _AROUND, "sh", script(program, folder),
                ],
                stdin=subprocess.DEVNULL,
                stdout=written,
                stderr=written,
                env=dict(program.environment),
            )  # fmt: skip
        return Container(process, program)

    def end(self) -> None:
        """Gives everything back."""
        self._process.kill()
        self._process.wait()


class Container:
    """One run of a container's program."""

    def __init__(self, process: "subprocess.Popen[bytes]", program: Program) -> None:
        self._process, self._program = process, program

    def poll(self) -> int | None:
        """The exit code once it has ended; 128 and the signal's number where one killed it."""
        return self._process.poll()

    def wait(self, seconds: float) -> int | None:
        """The exit code, if it ends in time."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        return self.poll()

    @property
    def first_process(self) -> int | None:
        """The number outside of its process 1, while it lives."""
        try:
            return next((each.pid for each in psutil.Process(self._process.pid).children()), None)
        except psutil.NoSuchProcess:
            return None

    def send(self, number: signal.Signals) -> None:
        """Sends its process 1 a signal, unless it has ended."""
        first = self.first_process
        if first is not None and self.poll() is None:
            os.kill(first, number)

    def execute(self, words: Sequence[str], seconds: float) -> tuple[int, str]:
        """Runs a command in it; its exit code, and what it said. 124 where it needed too long."""
        first = self.first_process
        if first is None:
            return 126, "the container does not run"
        command = [
            _path("nsenter"), f"--target={first}", "--net", "--uts", "--ipc", "--mount", "--pid", "--root", "--wd",
            *self._program.identity.words, "--", *words,
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                env=dict(self._program.environment),
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return 124, f"command timed out after {seconds:g} s"
        return done.returncode, (done.stdout + done.stderr).strip()


def script(program: Program, folder: Path) -> str:
    """What process 1 does before it becomes the program: it makes the container's root."""
    root = folder / "root"
    lines = [
        ["mount", "-t", "tmpfs", "tmpfs", str(folder)],
        ["mkdir", *(str(folder / each) for each in ("root", "written", "work"))],
        [
            "mount",
            "-t",
            "overlay",
            "-o",
            f"lowerdir=/,upperdir={folder}/written,workdir={folder}/work",
            "overlay",
            str(root),
        ],
        ["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", f"{root}/dev"],
        ["mkdir", "-p", f"{root}/dev/shm", f"{root}/dev/pts"],
        ["mount", "-t", "tmpfs", "-o", f"size={_SHARED_MEMORY}", "tmpfs", f"{root}/dev/shm"],
        ["touch", *(f"{root}/dev/{name}" for name in _DEVICES)],
        *(["mount", "--bind", f"/dev/{name}", f"{root}/dev/{name}"] for name in _DEVICES),
        ["ln", "-s", "/proc/self/fd", f"{root}/dev/fd"],
        *(
            ["ln", "-s", f"/proc/self/fd/{n}", f"{root}/dev/{name}"]
            for n, name in enumerate(("stdin", "stdout", "stderr"))
        ),
        ["mount", "-t", "proc", "proc", f"{root}/proc"],
        ["mount", "--rbind", "/sys", f"{root}/sys"],
    ]
    covered = [str(path) for path in closed_folders()]
    lines += [["mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", f"{root}{each}"] for each in covered]
    for mount in sorted(program.mounts, key=lambda each: each.target):
        target = f"{root}{mount.target}"
        if mount.source.is_dir():
            lines += [["mkdir", "-p", target]]
        else:
            lines += [["mkdir", "-p", str(Path(target).parent)], ["touch", target]]
        lines += [["mount", "--bind", str(mount.source), target]]
        if mount.read_only:
            lines += [["mount", "-o", "remount,bind,ro", target]]
    hidden = [*covered, *(mount.target for mount in program.mounts)]
    for path in image_folders():  # what makes it our image is seen through whatever lies above
        if any(path.is_relative_to(each) for each in hidden) or os.path.ismount(path) or _is_mounted_above(path):
            lines += [["mkdir", "-p", f"{root}{path}"], ["mount", "--bind", str(path), f"{root}{path}"]]
            lines += [["mount", "-o", "remount,bind,ro", f"{root}{path}"]]
    if program.read_only_root:
        lines += [["mount", "-o", "remount,ro", str(root)]]
    last = [
        "exec",
        "chroot",
        str(root),
        *program.identity.words,
        "--pdeathsig=KILL",  # said again: a change of user makes the kernel forget it
        "--",
        "env",
        f"--chdir={program.folder}",
        "--",
        *program.words,
    ]
    return "\n".join(["set -e", *(shlex.join(line) for line in lines), shlex.join(last)])


def image_folders() -> tuple[Path, ...]:
    """What of this machine the image must have beside its root file system: Python, its packages, and this project."""
    folders = sorted({Path(sys.prefix), Path(sys.base_prefix), ROOT})
    return tuple(each for each in folders if not any(each != other and each.is_relative_to(other) for other in folders))


def closed_folders() -> tuple[Path, ...]:
    """Folders that are empty in the image: our home, and what keeps others from the image's own folders."""
    found = {Path.home()}
    for folder in image_folders():
        closed = [each for each in reversed(folder.parents) if not each.stat().st_mode & 0o001]
        found |= set(closed[:1])
    return tuple(sorted(each for each in found if each != Path("/")))


def _is_mounted_above(path: Path) -> bool:
    return any(each != Path("/") and os.path.ismount(each) for each in path.parents)


def _path(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        raise RuntimeError(
            f"`{program}` is missing, which the cluster double starts pods with: Debian's util-linux has it."
        )
    return found
