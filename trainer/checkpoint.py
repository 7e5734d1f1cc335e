"""Checkpoints that any ZeRO stage and any number of processes can load: when to save, what to keep, how to restore.

    checkpoints/step-00000120/rank-00000-of-00004.safetensors   pieces of weights and optimizer state; rank 0 buffers
                              rank-00000-of-00004.json          what lies where in it, with checksums
                              manifest.json                     written last, by create-if-absent

Without a manifest there is no checkpoint, whatever lies in the folder. There is no pointer to the newest one either:
the newest whose checksums hold is it. Random states are not kept: the stream's is the number of samples seen, and the
model's a function of (seed, step, rank). Buffers, which are BatchNorm's running statistics, are those of rank 0; in
training no output depends on them, so that a resumed run repeats the undisturbed one to the last bit.
"""

import json
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

import google_crc32c
import numpy as np
import torch
from pydantic import BaseModel, PositiveFloat, PositiveInt, ValidationError
from torch import Tensor

from datastore.errors import DoNotRetry, StoreError, ViewpointError
from datastore.objects import ObjectFolder
from trainer.distributed import gather_reports
from trainer.engine import Engine
from trainer.fragments import WEIGHT, create_optimizer_state, masters, publish, scalars, tensors

FORMAT: Final = 1
BUFFER: Final = "buffer"

_MANIFEST: Final = "manifest.json"
_STEP_FOLDER: Final = re.compile(r"step-(\d{8,})")
_LARGEST_GAP: Final = 1 << 20  # bytes read and dropped rather than asked for in two requests
_DTYPES: Final = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CheckpointConfig(BaseModel, extra="forbid", frozen=True):
    """When to save and what to keep. A stopped or finished run is saved in any case."""

    every_steps: PositiveInt | None = None
    every_seconds: PositiveFloat | None = 60.0
    keep_last: PositiveInt = 2  # two, so that a damaged newest one has a predecessor
    keep_every: PositiveInt | None = None  # checkpoints at multiples of so many steps are never deleted


def due(config: CheckpointConfig, step: int, seconds_since_last: float) -> bool:
    """Whether to save after this step."""
    by_steps = config.every_steps is not None and step % config.every_steps == 0
    by_time = config.every_seconds is not None and seconds_since_last >= config.every_seconds
    return by_steps or by_time


def superseded(steps: Iterable[int], config: CheckpointConfig) -> list[int]:
    """Which of the committed steps need not be kept."""
    oldest_first = sorted(steps)
    return [
        step for step in oldest_first[: -config.keep_last] if config.keep_every is None or step % config.keep_every != 0
    ]


@dataclass(frozen=True)
class Position:
    """How far a run is. The samples still to come and all randomness follow from it."""

    step: int = 0
    samples_seen: int = 0
    totals: Mapping[str, float] = field(default_factory=dict)  # metrics that go on counting, as seconds by bucket

    def advanced(self, global_batch: int) -> "Position":
        """One step on."""
        return replace(self, step=self.step + 1, samples_seen=self.samples_seen + global_batch)

    def with_totals(self, totals: Mapping[str, float]) -> "Position":
        """The same place, with what was counted on the way."""
        return replace(self, totals=totals)


class Restored(NamedTuple):
    """Where a run goes on, and what was wrong with newer checkpoints that had to be passed over."""

    position: Position
    damaged: tuple[str, ...] = ()


class Entry(BaseModel, frozen=True):
    """One tensor of a rank's file: `length` elements of a flattened parameter from `start`, or a whole buffer."""

    name: str
    kind: str  # WEIGHT, a tensor of the optimizer such as exp_avg, or BUFFER
    start: int
    length: int
    shape: tuple[int, ...] = ()  # of a buffer
    dtype: str
    offset: int  # in the file
    num_bytes: int
    crc32c: int


class RankIndex(BaseModel, frozen=True):
    """What lies where in a rank's file."""

    header_bytes: int
    header_crc32c: int
    entries: tuple[Entry, ...]


class RankFiles(BaseModel, frozen=True):
    """The two files of one rank."""

    name: str  # without the suffixes .safetensors and .json
    num_bytes: int
    index_crc32c: int


class Manifest(BaseModel, frozen=True):
    """A whole checkpoint."""

    format: int = FORMAT
    step: int
    samples_seen: int
    totals: dict[str, float]
    config_hash: str
    config: str  # YAML
    zero_stage: int
    shapes: dict[str, tuple[int, ...]]  # of the parameters
    optimizer_tensors: tuple[str, ...]
    optimizer_scalars: dict[str, float]
    ranks: tuple[RankFiles, ...]
    committed_at: float  # seconds since 1970


class DamagedCheckpointError(StoreError):
    """A committed checkpoint that lacks something or whose checksums do not hold."""


@dataclass(frozen=True)
class Snapshot:
    """What one rank contributes to a checkpoint, copied out of the engine: training may go on while it is written."""

    content: bytes  # a safetensors file
    index: RankIndex
    shapes: dict[str, tuple[int, ...]]
    optimizer_tensors: tuple[str, ...]
    optimizer_scalars: dict[str, float]


def save(engine: Engine, position: Position, folder: ObjectFolder, *, config_hash: str, config: str) -> int:
    """Commits a checkpoint and returns its bytes on this rank; all ranks call it at the same step."""
    return commit(snapshot(engine), engine, position, folder, config_hash=config_hash, config=config)


def restore(engine: Engine, folder: ObjectFolder, *, config_hash: str) -> Restored:
    """Loads the newest checkpoint whose checksums hold; without any, a run starts at step 0. All ranks call it."""
    damaged: list[str] = []
    unusable: list[int] = []
    steps = gather_reports(committed_steps(folder))[0]  # what rank 0 sees: listings of a busy folder may differ
    for step in reversed(steps):
        problem = ""
        try:
            manifest = read_manifest(folder, step)
            _check_same_run(manifest, config_hash, engine, folder)
            _load(engine, manifest, folder)
        except DamagedCheckpointError as error:
            problem = str(error)
        problems = [each for each in gather_reports(problem) if each]
        if not problems:
            if engine.world.is_first:
                for later in unusable:  # so that these steps can be committed anew
                    folder.remove(f"{_step_name(later)}/{_MANIFEST}")
            publish(engine)
            return Restored(Position(manifest.step, manifest.samples_seen, manifest.totals), tuple(damaged))
        damaged += problems
        unusable.append(step)
    if damaged:
        raise DoNotRetry(
            f"No checkpoint in {folder.url} can be loaded: {'; '.join(damaged)}. Restore that folder from a copy, or "
            f"start again from step 0 with another --run name."
        )
    return Restored(Position())


def retain(folder: ObjectFolder, config: CheckpointConfig) -> list[int]:
    """Deletes superseded checkpoints and what killed runs left half written; returns the steps that are gone."""
    committed = committed_steps(folder)
    unfinished = [
        step for step in _step_folders(folder) if step not in committed and committed and step < committed[-1]
    ]
    gone = superseded(committed, config)
    for step in [*gone, *unfinished]:
        name = _step_name(step)
        folder.remove(f"{name}/{_MANIFEST}")  # first: from now on nobody takes it for a checkpoint
        for file in folder.names(name):
            folder.remove(f"{name}/{file}")
        if folder.is_local:
            shutil.rmtree(folder.local_path / name)
    folder.remove_abandoned_drafts()
    return gone


def load_weights(checkpoint_url: str) -> dict[str, Tensor]:
    """The float32 state of the whole objective, parameters and buffers; no process group and no deepspeed needed.

    The URL is that of one checkpoint, or of a run's folder of checkpoints, of which the newest is taken.
    """
    folder, manifest = open_checkpoint(checkpoint_url)
    whole = {name: torch.empty(shape).view(-1) for name, shape in manifest.shapes.items()}
    missing = {name: weight.numel() for name, weight in whole.items()}
    buffers: dict[str, Tensor] = {}
    for rank in manifest.ranks:
        index = _read_index(folder, manifest.step, rank)
        wanted = [entry for entry in index.entries if entry.kind in (WEIGHT, BUFFER)]
        for entry, values in _read_entries(folder, manifest.step, rank, index, wanted):
            if entry.kind == BUFFER:
                buffers[entry.name] = values.view(entry.shape)
            else:
                whole[entry.name][entry.start : entry.start + entry.length] = values
                missing[entry.name] -= entry.length
    _check_complete(folder, manifest.step, {name: count for name, count in missing.items() if count})
    return {name: weight.view(manifest.shapes[name]) for name, weight in whole.items()} | buffers


def open_checkpoint(checkpoint_url: str) -> tuple[ObjectFolder, Manifest]:
    """The folder of checkpoints and the manifest of the one that a URL names; the newest where it names the folder."""
    url, _, name = checkpoint_url.rstrip("/").rpartition("/")
    if match := _STEP_FOLDER.fullmatch(name):
        folder = ObjectFolder(url or ".")
        return folder, read_manifest(folder, int(match[1]))
    folder = ObjectFolder(checkpoint_url)
    steps = committed_steps(folder)
    if not steps:
        raise StoreError(f"{checkpoint_url} holds no committed checkpoint: wait for the first, or check the path.")
    return folder, read_manifest(folder, steps[-1])


def committed_steps(folder: ObjectFolder) -> list[int]:
    """The steps of all checkpoints that have a manifest, oldest first."""
    return [step for step in _step_folders(folder) if folder.exists(f"{_step_name(step)}/{_MANIFEST}")]


def read_manifest(folder: ObjectFolder, step: int) -> Manifest:
    """The manifest of one checkpoint."""
    name = f"{_step_name(step)}/{_MANIFEST}"
    try:
        return Manifest.model_validate_json(folder.read(name))
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{folder.url}/{name} is missing") from error
    except ValidationError as error:
        raise DamagedCheckpointError(f"{folder.url}/{name} is damaged: {error.errors()[0]['msg']}") from error


@torch.no_grad()
def snapshot(engine: Engine) -> Snapshot:
    """This rank's share of the state, copied at a step boundary."""
    named: list[tuple[str, str, int, Tensor]] = []
    kinds: set[str] = set()
    for master in masters(engine):
        for kind, flat in tensors(engine, master).items():
            kinds.add(kind)
            for piece in master.pieces:
                values = flat[piece.offset : piece.offset + piece.length]
                start = 0
                if master.replicated:  # each rank saves its part of what all have
                    cuts = [
                        piece.length * rank // engine.world.size for rank in (engine.world.rank, engine.world.rank + 1)
                    ]
                    start, values = cuts[0], values[cuts[0] : cuts[1]]
                if values.numel():
                    named.append((piece.name, kind, piece.start + start, values))
    if engine.world.is_first:
        named += [(name, BUFFER, 0, buffer) for name, buffer in _buffers(engine).items()]
    content, index = _pack(named)
    shapes = {name: tuple(getattr(each, "ds_shape", each.shape)) for name, each in engine.module.named_parameters()}
    return Snapshot(content, index, shapes, tuple(sorted(kinds - {WEIGHT})), scalars(engine))


def commit(
    taken: Snapshot, engine: Engine, position: Position, folder: ObjectFolder, *, config_hash: str, config: str
) -> int:
    """Writes what all ranks took, then the manifest; returns this rank's bytes. A failure on one rank is one on all."""
    step = _step_name(position.step)
    what = f"checkpoint {folder.url}/{step}"
    name = f"rank-{engine.world.rank:05d}-of-{engine.world.size:05d}"
    index = taken.index.model_dump_json().encode()

    def write_rank() -> None:
        folder.put(f"{step}/{name}.safetensors", taken.content)
        folder.put(f"{step}/{name}.json", index)

    def write_manifest() -> None:
        manifest = Manifest(
            step=position.step,
            samples_seen=position.samples_seen,
            totals=dict(position.totals),
            config_hash=config_hash,
            config=config,
            zero_stage=engine.zero_stage,
            shapes=taken.shapes,
            optimizer_tensors=taken.optimizer_tensors,
            optimizer_scalars=taken.optimizer_scalars,
            ranks=tuple(ranks),
            committed_at=time.time(),
        )
        if not folder.create(f"{step}/{_MANIFEST}", manifest.model_dump_json(indent=1).encode()):
            raise DoNotRetry(
                f"{folder.url}/{step} was committed by another process in the meantime: two runs write to one "
                f"folder. Stop one of them, or give it another --run name."
            )

    _or_fail_together(write_rank, what)
    ranks = gather_reports(RankFiles(name=name, num_bytes=len(taken.content), index_crc32c=_crc32c(index)))
    _or_fail_together(write_manifest if engine.world.is_first else lambda: None, what)
    return len(taken.content) + len(index)


def _or_fail_together(action: Callable[[], None], what: str) -> None:
    """Runs the action. What fails on one rank fails on all, so that no rank waits for another in vain."""
    error: ViewpointError | OSError | None = None
    try:
        action()
    except (ViewpointError, OSError) as caught:
        error = caught
    failures = gather_reports(None if error is None else (str(error), isinstance(error, DoNotRetry)))
    if error is not None:
        raise error
    for rank, failure in enumerate(failures):
        if failure is not None:
            message, is_hopeless = failure
            raise (DoNotRetry if is_hopeless else ViewpointError)(f"Rank {rank} could not write {what}: {message}")


def _pack(named: Sequence[tuple[str, str, int, Tensor]]) -> tuple[bytes, RankIndex]:
    """A safetensors file of these tensors, made with one copy, and its index."""
    named = sorted(named, key=lambda each: -each[3].element_size())  # so that each tensor is aligned
    arrays = [values.contiguous().view(-1).view(torch.uint8).cpu().numpy() for *_, values in named]
    header: dict[str, Any] = {}
    end = 0
    for (name, kind, start, values), array in zip(named, arrays, strict=True):
        shape = list(values.shape)
        header[f"{kind}/{name}/{start}"] = {
            "dtype": _DTYPES[values.dtype],
            "shape": shape,
            "data_offsets": [end, end + array.nbytes],
        }
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    entries = []
    offset = len(head)
    for (name, kind, start, values), array in zip(named, arrays, strict=True):
        entries.append(
            Entry(
                name=name,
                kind=kind,
                start=start,
                length=values.numel(),
                shape=tuple(values.shape) if kind == BUFFER else (),
                dtype=_DTYPES[values.dtype],
                offset=offset,
                num_bytes=array.nbytes,
                crc32c=_crc32c(array),
            )
        )
        offset += array.nbytes
    index = RankIndex(header_bytes=len(head), header_crc32c=_crc32c(head), entries=tuple(entries))
    return b"".join([head, *(array.data for array in arrays)]), index


@torch.no_grad()
def _load(engine: Engine, manifest: Manifest, folder: ObjectFolder) -> None:
    """Copies what this rank needs into its masters, optimizer state and buffers, reading only those bytes."""
    create_optimizer_state(engine, list(manifest.optimizer_tensors), manifest.optimizer_scalars)
    targets: dict[tuple[str, str], list[tuple[int, Tensor]]] = defaultdict(list)
    for master in masters(engine):
        for kind, flat in tensors(engine, master).items():
            for piece in master.pieces:
                targets[piece.name, kind].append((piece.start, flat[piece.offset : piece.offset + piece.length]))
    buffers = _buffers(engine)
    missing = {f"{name} ({kind})": sum(len(view) for _, view in views) for (name, kind), views in targets.items()}
    missing |= {f"{name} (buffer)": buffer.numel() for name, buffer in buffers.items()}
    for rank in manifest.ranks:
        index = _read_index(folder, manifest.step, rank)
        wanted = [
            entry
            for entry in index.entries
            if (entry.kind == BUFFER and entry.name in buffers)
            or any(_overlap(entry, start, view) for start, view in targets.get((entry.name, entry.kind), ()))
        ]
        for entry, values in _read_entries(folder, manifest.step, rank, index, wanted):
            if entry.kind == BUFFER:
                buffers[entry.name].copy_(values.view(entry.shape))
                missing[f"{entry.name} (buffer)"] -= values.numel()
                continue
            for start, view in targets[entry.name, entry.kind]:
                first, last = _overlap(entry, start, view) or (0, 0)
                view[first - start : last - start] = values[first - entry.start : last - entry.start].to(view.device)
                missing[f"{entry.name} ({entry.kind})"] -= last - first
    _check_complete(folder, manifest.step, {name: count for name, count in missing.items() if count})


def _overlap(entry: Entry, start: int, view: Tensor) -> tuple[int, int] | None:
    first, last = max(entry.start, start), min(entry.start + entry.length, start + len(view))
    return (first, last) if first < last else None


def _buffers(engine: Engine) -> dict[str, Tensor]:
    """Everything in the module's state that is no parameter."""
    parameters = {name for name, _ in engine.module.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in engine.module.state_dict(keep_vars=True).items() if name not in parameters}


def _check_same_run(manifest: Manifest, config_hash: str, engine: Engine, folder: ObjectFolder) -> None:
    if manifest.format != FORMAT:
        raise DoNotRetry(
            f"{folder.url} was written in checkpoint format {manifest.format}; this release reads {FORMAT}. Use the "
            f"release that wrote it, or start a new run with another --run name."
        )
    if manifest.config_hash != config_hash:
        raise DoNotRetry(
            f"{folder.url} belongs to another training: its config has hash {manifest.config_hash}, this one "
            f"{config_hash}. Go on with the config in the run folder, or start a new run with another --run name."
        )
    shapes = {name: tuple(getattr(each, "ds_shape", each.shape)) for name, each in engine.module.named_parameters()}
    if manifest.shapes != shapes:
        differing = sorted(
            name for name in shapes.keys() | manifest.shapes.keys() if shapes.get(name) != manifest.shapes.get(name)
        )
        raise DoNotRetry(
            f"{folder.url} holds another model than this release builds from the same config: "
            f"{', '.join(differing[:5])} differ. Use the release that wrote it, or start a new run."
        )


def _check_complete(folder: ObjectFolder, step: int, missing: Mapping[str, int]) -> None:
    if missing:
        names = ", ".join(f"{count} elements of {name}" for name, count in list(missing.items())[:3])
        raise DamagedCheckpointError(f"{folder.url}/{_step_name(step)} lacks {names}")


def _read_index(folder: ObjectFolder, step: int, rank: RankFiles) -> RankIndex:
    name = f"{_step_name(step)}/{rank.name}.json"
    try:
        content = folder.read(name)
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{folder.url}/{name} is missing") from error
    if _crc32c(content) != rank.index_crc32c:
        raise DamagedCheckpointError(f"{folder.url}/{name} is damaged: its checksum differs from the manifest's")
    return RankIndex.model_validate_json(content)


def _read_entries(
    folder: ObjectFolder, step: int, rank: RankFiles, index: RankIndex, entries: Sequence[Entry]
) -> Iterator[tuple[Entry, Tensor]]:
    """The tensors of some entries, verified; neighbours in the file are read together."""
    if not entries:
        return
    name = f"{_step_name(step)}/{rank.name}.safetensors"
    dtypes = {text: dtype for dtype, text in _DTYPES.items()}
    if _crc32c(_read_range(folder, name, 0, index.header_bytes)) != index.header_crc32c:
        raise DamagedCheckpointError(f"{folder.url}/{name} is damaged: the checksum of its header differs")
    for run in _neighbours(entries):
        start, end = run[0].offset, run[-1].offset + run[-1].num_bytes
        content = np.frombuffer(_read_range(folder, name, start, end), np.uint8)
        for entry in run:
            values = content[entry.offset - start :][: entry.num_bytes]
            if len(values) != entry.num_bytes or _crc32c(values) != entry.crc32c:
                raise DamagedCheckpointError(f"{folder.url}/{name} is damaged: the checksum of {entry.name} differs")
            yield entry, torch.from_numpy(values.copy()).view(dtypes[entry.dtype])


def _read_range(folder: ObjectFolder, name: str, start: int, end: int) -> bytes:
    try:
        return folder.read_range(name, start, end)
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{folder.url}/{name} is missing") from error


def _neighbours(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """The entries in the order of the file, in runs that are worth one request each."""
    run: list[Entry] = []
    for entry in sorted(entries, key=lambda entry: entry.offset):
        if run and entry.offset - (run[-1].offset + run[-1].num_bytes) > _LARGEST_GAP:
            yield run
            run = []
        run.append(entry)
    yield run


def _step_folders(folder: ObjectFolder) -> list[int]:
    matches = (_STEP_FOLDER.fullmatch(name) for name in folder.names())
    return sorted(int(match[1]) for match in matches if match)


def _step_name(step: int) -> str:
    return f"step-{step:08d}"


def _crc32c(content: bytes | np.ndarray) -> int:
    return int(google_crc32c.value(content))
