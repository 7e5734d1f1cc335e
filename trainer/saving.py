"""Saves without holding training up: a copy into memory set aside once, and a process that uploads it meanwhile.

A save stalls training for the copy alone. One is in flight at most: where the next comes due before the last is
committed, it waits for the first step after that; only a stop and the end of a run wait for the commit itself. An upload
that fails is learnt of at a step boundary, and ends the run on all ranks.
"""

import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import torch
from torch import Tensor

from datastore.errors import DoNotRetry, ViewpointError
from datastore.objects import ObjectFolder
from trainer.checkpoint import BUFFER, DTYPES, Identity, Position, buffers, shapes_of
from trainer.commits import CheckpointConfig, Entry, Manifest, step_name
from trainer.distributed import all_reduce_sum, communication_device, gather_reports
from trainer.engine import Engine
from trainer.fragments import WEIGHT, masters, scalars, tensors
from trainer.uploader import SaveOrder, SaveReport, Share, commit_all, put_share

_LOOK_SECONDS: Final = 0.2
_PROGRAM: Final = """\
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM):  # before the imports: the trainer hears them, too, and needs its last save
    signal.signal(number, signal.SIG_IGN)
from trainer.uploader import main
main(sys.argv[1:])
"""


class Saved(NamedTuple):
    """A checkpoint that is committed, as rank 0 learns of it."""

    step: int
    num_bytes: int  # of this rank
    stall_seconds: float  # for which training stood still
    seconds: float  # from the copy to the commit
    removed: tuple[int, ...]  # steps that it superseded


class Saver:
    """This rank's part in saving. All ranks call `begin` and `finish` at the same steps."""

    def __init__(
        self,
        engine: Engine,
        folder: ObjectFolder,
        generation: int,
        config: CheckpointConfig,
        identity: Identity,
    ) -> None:
        self.bytes_written = 0
        self.stall_seconds = 0.0  # of the last save
        self.in_flight: int | None = None  # a step that is not committed yet, as far as this rank knows
        self._engine, self._folder, self._generation = engine, folder, generation
        self._config, self._identity = config, identity
        self._failure: SaveReport | None = None
        self._memory: mmap.mmap | None = None
        self._share: Share | None = None
        self._views: list[Tensor] = []
        self._pinned = False
        # started now, so that its imports are over at the first save
        self._worker = _Worker() if config.background else None

    def prepare(self) -> None:
        """Sets the memory aside that saves are copied to: once the optimizer has its state, so after a step."""
        if self._share is None:
            named = _shared(self._engine)
            header, entries, num_bytes = _layout(named)
            self._share = Share(
                url=self._folder.url,
                rank=self._engine.world.rank,
                world_size=self._engine.world.size,
                generation=self._generation,
                config=self._config,
                num_bytes=num_bytes,
                header_bytes=len(header),
                entries=entries,
            )
            self._memory = _map(self._worker.memory if self._worker else -1, num_bytes)
            self._memory[: len(header)] = header
            whole = torch.frombuffer(self._memory, dtype=torch.uint8)
            self._pin(whole)
            self._views = [
                whole[entry.offset : entry.offset + entry.num_bytes].view(values.dtype)
                for entry, (*_, values) in zip(entries, named, strict=True)
            ]
            if self._worker is not None:
                self._worker.tell(self._share.model_dump_json())

    @property
    def has_failed(self) -> bool:
        """Whether an upload of this rank failed; what its process said last is read first."""
        return self._failure is not None

    def begin(self, position: Position, figures: Mapping[str, float]) -> list[Saved]:
        """Copies this rank's share of the state, and sees to it that it is uploaded; returns what became committed."""
        saved = self.finish() if self._config.background else []
        started = time.perf_counter()
        self.prepare()
        assert self._share is not None
        self._copy()
        is_first = self._engine.world.is_first
        order = SaveOrder(step=position.step, manifest=self._manifest(position, figures) if is_first else None)
        if self._worker is not None:
            self._worker.tell(order.model_dump_json())
            self.in_flight = position.step
            self.stall_seconds = time.perf_counter() - started
            return saved
        return saved + self._save_at_once(self._share, order, started)

    def poll(self, wait_seconds: float = 0.0) -> list[Saved]:
        """What became committed since the last look; only rank 0 learns of it. Does not talk to other ranks."""
        saved = []
        while self._worker is not None and self.in_flight is not None and self._failure is None:
            report = self._worker.heard(wait_seconds, self.in_flight)
            if report is None:
                break
            if report.outcome == "failed":
                self._failure = report
            elif report.outcome == "uploaded":
                self.bytes_written += report.num_bytes
                if not self._engine.world.is_first:
                    self.in_flight = None
            else:
                self.in_flight = None
                saved.append(Saved(report.step, report.num_bytes, self.stall_seconds, report.seconds, report.removed))
        return saved

    def finish(self) -> list[Saved]:
        """Waits for the commit of what is in flight; all ranks call it, and all raise where an upload failed."""
        saved: list[Saved] = []
        while True:
            saved += self.poll(_LOOK_SECONDS if self.in_flight is not None else 0.0)
            state = torch.tensor([self.in_flight is not None, self.has_failed], dtype=torch.float32)
            waiting, failed = all_reduce_sum(state.to(communication_device())).tolist()
            if failed:
                self.raise_failure()
            if not waiting:
                return saved

    def raise_failure(self) -> None:
        """Raises on all ranks what some rank's upload failed of; all ranks call it."""
        failures = gather_reports(self._failure)
        for rank, failure in enumerate(failures):
            if failure is not None:
                what = f"checkpoint {self._folder.url}/{step_name(failure.step)}"
                kind = DoNotRetry if failure.is_hopeless else ViewpointError
                raise kind(
                    f"Rank {rank} could not write {what}: {failure.problem} The run stopped for it, and goes on from "
                    f"the checkpoint before once that is mended."
                )
        raise AssertionError("asked to raise a failure that no rank had")

    def close(self) -> None:
        """Ends the process; what it has not committed is given up."""
        if self._worker is not None:
            self._worker.close()
        self._views.clear()
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._address)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pin(self, whole: Tensor) -> None:
        """Lets a GPU write to the memory directly."""
        if self._engine.device.type == "cuda":
            self._address = whole.data_ptr()
            self._pinned = int(torch.cuda.cudart().cudaHostRegister(self._address, whole.numel(), 0)) == 0

    @torch.no_grad()
    def _copy(self) -> None:
        named = _shared(self._engine)
        assert self._share is not None
        assert [(name, kind, start) for name, kind, start, _ in named] == [
            (entry.name, entry.kind, entry.start) for entry in self._share.entries
        ], "what a rank holds does not change while it lives"
        for view, (*_, values) in zip(self._views, named, strict=True):
            view.copy_(values.reshape(-1), non_blocking=True)
        if self._engine.device.type == "cuda":
            torch.cuda.synchronize()

    def _manifest(self, position: Position, figures: Mapping[str, float]) -> Manifest:
        kinds = {entry.kind for entry in self._share.entries} if self._share else set()
        return Manifest(
            generation=self._generation,
            step=position.step,
            samples_seen=position.samples_seen,
            store_manifest=position.store_manifest,
            rows_digest=position.rows_digest,
            totals=dict(position.totals),
            figures=dict(figures),
            config_hash=self._identity.config_hash,
            config=self._identity.config,
            zero_stage=self._engine.zero_stage,
            shapes=shapes_of(self._engine),
            optimizer_tensors=tuple(sorted(kinds - {WEIGHT, BUFFER})),
            optimizer_scalars=scalars(self._engine),
        )

    def _save_at_once(self, share: Share, order: SaveOrder, started: float) -> list[Saved]:
        """The same in this process. A failure on one rank is one on all, so that no rank waits for another in vain."""
        content = self._memory
        assert content is not None

        def attempt(action: Callable[[], Any]) -> Any:
            try:
                return action()
            except (ViewpointError, OSError) as error:
                self._failure = SaveReport(
                    step=order.step, outcome="failed", problem=str(error), is_hopeless=isinstance(error, DoNotRetry)
                )
            return None

        num_bytes = attempt(lambda: put_share(share, order.step, content))
        self.finish()
        manifest = order.manifest
        removed = attempt(lambda: commit_all(share, manifest)) if manifest is not None else None
        self.finish()
        self.bytes_written += num_bytes
        self.stall_seconds = seconds = time.perf_counter() - started
        return [] if removed is None else [Saved(order.step, num_bytes, seconds, seconds, tuple(removed))]


class _Worker:
    """The process that uploads, the memory that it shares with this one, and the pipe to it."""

    def __init__(self) -> None:
        self.memory = os.memfd_create("viewpoint") if hasattr(os, "memfd_create") else _unnamed_file()
        here, there = Pipe()
        assert isinstance(here, Connection) and isinstance(there, Connection)
        self._pipe = here
        words = [sys.executable, "-c", _PROGRAM, str(self.memory), str(there.fileno()), str(os.getpid())]
        self._process = subprocess.Popen(words, pass_fds=(self.memory, there.fileno()), stdin=subprocess.DEVNULL)
        there.close()

    def tell(self, message: str) -> None:
        """Sends one message. That the process is gone is learnt when it is listened to."""
        try:
            self._pipe.send_bytes(message.encode())
        except (BrokenPipeError, ConnectionResetError):
            return

    def heard(self, wait_seconds: float, step: int) -> SaveReport | None:
        """The next report, or None where there is none in that time."""
        try:
            if self._pipe.poll(wait_seconds):
                return SaveReport.model_validate_json(self._pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            code = self._process.wait()
            problem = f"the process that uploads ended with {code}; its last words are in this rank's log."
            return SaveReport(step=step, outcome="failed", problem=problem)
        return None

    def close(self) -> None:
        """Ends the process."""
        self._pipe.close()
        self._process.kill()
        self._process.wait()
        os.close(self.memory)


def _unnamed_file() -> int:
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _map(descriptor: int, num_bytes: int) -> mmap.mmap:
    """Memory, all of it there: pages that appear one by one would double the time of the first save."""
    populate = getattr(mmap, "MAP_POPULATE", 0)
    if descriptor < 0:
        return mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | populate)
    os.ftruncate(descriptor, num_bytes)
    return mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED | populate)


def _shared(engine: Engine) -> list[tuple[str, str, int, Tensor]]:
    """This rank's share of the state: name, kind, place in the flattened parameter, values where they lie now."""
    named: list[tuple[str, str, int, Tensor]] = []
    world = engine.world
    for master in masters(engine):
        for kind, flat in tensors(engine, master).items():
            for piece in master.pieces:
                start, end = 0, piece.length
                if master.replicated:  # each rank saves its part of what all have
                    start, end = (piece.length * rank // world.size for rank in (world.rank, world.rank + 1))
                if start < end:
                    values = flat[piece.offset + start : piece.offset + end]
                    named.append((piece.name, kind, piece.start + start, values))
    if world.is_first:
        named += [(name, BUFFER, 0, buffer) for name, buffer in buffers(engine).items()]
    return sorted(named, key=lambda each: -each[3].element_size())  # so that each tensor is aligned


def _layout(named: list[tuple[str, str, int, Tensor]]) -> tuple[bytes, tuple[Entry, ...], int]:
    """The header of a safetensors file of these tensors, where they lie in it, and its bytes."""
    header: dict[str, Any] = {}
    end = 0
    for name, kind, start, values in named:
        header[f"{kind}/{name}/{start}"] = {
            "dtype": DTYPES[values.dtype],
            "shape": list(values.shape),
            "data_offsets": [end, end + values.nbytes],
        }
        end += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    entries = []
    offset = len(head)
    for name, kind, start, values in named:
        entries.append(
            Entry(
                name=name,
                kind=kind,
                start=start,
                length=values.numel(),
                shape=tuple(values.shape) if kind == BUFFER else (),
                dtype=DTYPES[values.dtype],
                offset=offset,
                num_bytes=values.nbytes,
            )
        )
        offset += values.nbytes
    return head, tuple(entries), offset
