"""Loading checkpoints, which any ZeRO stage and any number of processes can do, whatever wrote them.

What lies where is told in trainer/commits.py, how it gets there in trainer/saving.py. Random states are not kept: the
stream's is the number of samples seen, and the model's a function of (seed, step, rank). Buffers, which are BatchNorm's
running statistics, are those of rank 0; in training no output depends on them, so that a resumed run repeats the
undisturbed one to the last bit where its kernels do (all on CPUs; trainer/numerics.py asks for such on GPUs).
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from datastore.errors import DoNotRetry, StoreError
from datastore.objects import ObjectFolder
from trainer.commits import (
    FORMAT,
    DamagedCheckpointError,
    Entry,
    Manifest,
    RankFiles,
    RankIndex,
    claim_generation,
    committed_steps,
    forget,
    read_manifest,
    record_resumed,
    step_name,
    step_named,
)
from trainer.config import differences
from trainer.distributed import gather_reports
from trainer.engine import Engine
from trainer.fragments import WEIGHT, create_optimizer_state, masters, publish, tensors
from trainer.uploader import checksum

BUFFER: Final = "buffer"
"""The kind of what is in the module's state and no parameter."""

DTYPES: Final = {
    torch.float32: "F32",
    torch.float64: "F64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""As safetensors files name them."""

_READ_ATTEMPTS: Final = 3
_LARGEST_GAP: Final = 1 << 20  # bytes read and dropped rather than asked for in two requests


class Identity(NamedTuple):
    """Which training a checkpoint belongs to."""

    config_hash: str
    config: str  # YAML


@dataclass(frozen=True)
class Position:
    """How far a run is. The samples still to come and all randomness follow from it."""

    step: int = 0
    samples_seen: int = 0
    totals: Mapping[str, float] = field(default_factory=dict)  # metrics that go on counting, as seconds by bucket
    store_manifest: int | None = None  # what all starts of the run see of a store that grows
    rows_digest: str | None = None  # of the samples that all starts of the run read

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


def refuse_another_training(engine: Engine, folder: ObjectFolder, identity: Identity) -> None:
    """DoNotRetry where the newest checkpoint is of another one; all ranks call it, before they `start`.

    A start keeps older ones from committing: who is in the wrong folder must not do that to the run that goes on there.
    """
    refusal = ""
    for step in reversed(committed_steps(folder) if engine.world.is_first else []):
        try:
            _check_same_run(read_manifest(folder, step), identity, engine, folder)
        except DamagedCheckpointError:
            continue
        except DoNotRetry as error:
            refusal = str(error)
        break
    refusal = gather_reports(refusal)[0]
    if refusal:
        raise DoNotRetry(refusal)


def start(engine: Engine, folder: ObjectFolder) -> int:
    """The number of this start of the run, which its commits carry: older starts commit nothing any more."""
    world = engine.world
    return gather_reports(claim_generation(folder, world.size) if world.is_first else 0)[0]


def restore(
    engine: Engine, folder: ObjectFolder, identity: Identity, generation: int, *, must_exist: bool = False
) -> Restored:
    """Loads the newest checkpoint whose checksums hold; all ranks call it.

    Without any, a run starts at step 0, unless one `must_exist`.
    """
    damaged: list[str] = []
    unusable: list[int] = []
    is_first = engine.world.is_first
    # what rank 0 sees: listings of a busy folder may differ
    steps = gather_reports(committed_steps(folder) if is_first else [])[0]
    for step in reversed(steps):
        problem = ""
        try:
            manifest = read_manifest(folder, step)
            _check_same_run(manifest, identity, engine, folder)
            _load(engine, manifest, folder)
        except DamagedCheckpointError as error:
            problem = str(error)
        problems = [each for each in gather_reports(problem) if each]
        if not problems:
            if is_first:
                for later in unusable:  # so that these steps can be committed anew
                    forget(folder, later)
                record_resumed(folder, generation, engine.world.size, step)
            publish(engine)
            position = Position(
                manifest.step, manifest.samples_seen, manifest.totals, manifest.store_manifest, manifest.rows_digest
            )
            return Restored(position, tuple(damaged))
        damaged += problems
        unusable.append(step)
    if damaged:
        raise DoNotRetry(
            f"No checkpoint in {folder.url} can be loaded: {'; '.join(damaged)}. Restore that folder from a copy, or "
            f"start again from step 0 with another --run name."
        )
    if must_exist:
        raise DoNotRetry(
            f"There is nothing to resume: {folder.url} holds no committed checkpoint. Check the name of the run, or "
            f"start it without --resume."
        )
    if is_first:
        record_resumed(folder, generation, engine.world.size, 0)
    return Restored(Position())


def load_weights(checkpoint_url: str) -> dict[str, Tensor]:
    """The float32 state of the whole objective, parameters and buffers; no process group and no deepspeed needed.

    The URL is that of one checkpoint, or of a run's folder of checkpoints, of which the newest is taken.
    """
    folder, manifest = open_checkpoint(checkpoint_url)
    whole = {name: torch.empty(shape).view(-1) for name, shape in manifest.shapes.items()}
    missing = {name: weight.numel() for name, weight in whole.items()}
    found_buffers: dict[str, Tensor] = {}
    for rank in manifest.ranks:
        index = _read_index(folder, manifest.step, rank)
        wanted = [entry for entry in index.entries if entry.kind in (WEIGHT, BUFFER)]
        for entry, values in _read_entries(folder, manifest.step, rank, index, wanted):
            if entry.kind == BUFFER:
                found_buffers[entry.name] = values.view(entry.shape)
            else:
                whole[entry.name][entry.start : entry.start + entry.length] = values
                missing[entry.name] -= entry.length
    _check_complete(folder, manifest.step, {name: count for name, count in missing.items() if count})
    return {name: weight.view(manifest.shapes[name]) for name, weight in whole.items()} | found_buffers


def open_checkpoint(checkpoint_url: str) -> tuple[ObjectFolder, Manifest]:
    """The folder of checkpoints and the manifest of the one that a URL names; the newest where it names the folder."""
    url, _, name = checkpoint_url.rstrip("/").rpartition("/")
    if (step := step_named(name)) is not None:
        folder = ObjectFolder(url or ".")
        return folder, read_manifest(folder, step)
    folder = ObjectFolder(checkpoint_url)
    steps = committed_steps(folder)
    if not steps:
        raise StoreError(f"{checkpoint_url} holds no committed checkpoint: wait for the first, or check the path.")
    return folder, read_manifest(folder, steps[-1])


@torch.no_grad()
def _load(engine: Engine, manifest: Manifest, folder: ObjectFolder) -> None:
    """Copies what this rank needs into its masters, optimizer state and buffers, reading only those bytes."""
    create_optimizer_state(engine, list(manifest.optimizer_tensors), manifest.optimizer_scalars)
    targets: dict[tuple[str, str], list[tuple[int, Tensor]]] = defaultdict(list)
    for master in masters(engine):
        for kind, flat in tensors(engine, master).items():
            for piece in master.pieces:
                targets[piece.name, kind].append((piece.start, flat[piece.offset : piece.offset + piece.length]))
    own_buffers = buffers(engine)
    missing = {f"{name} ({kind})": sum(len(view) for _, view in views) for (name, kind), views in targets.items()}
    missing |= {f"{name} (buffer)": buffer.numel() for name, buffer in own_buffers.items()}
    for rank in manifest.ranks:
        index = _read_index(folder, manifest.step, rank)
        wanted = [
            entry
            for entry in index.entries
            if (entry.kind == BUFFER and entry.name in own_buffers)
            or any(_overlap(entry, start, view) for start, view in targets.get((entry.name, entry.kind), ()))
        ]
        for entry, values in _read_entries(folder, manifest.step, rank, index, wanted):
            if entry.kind == BUFFER:
                own_buffers[entry.name].copy_(values.view(entry.shape))
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


def buffers(engine: Engine) -> dict[str, Tensor]:
    """Everything in the module's state that is no parameter."""
    parameters = {name for name, _ in engine.module.named_parameters(remove_duplicate=False)}
    return {name: value for name, value in engine.module.state_dict(keep_vars=True).items() if name not in parameters}


def shapes_of(engine: Engine) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters, which ZeRO 3 hides."""
    return {name: tuple(getattr(each, "ds_shape", each.shape)) for name, each in engine.module.named_parameters()}


def _check_same_run(manifest: Manifest, identity: Identity, engine: Engine, folder: ObjectFolder) -> None:
    if manifest.format != FORMAT:
        raise DoNotRetry(
            f"{folder.url} was written in checkpoint format {manifest.format}; this release reads {FORMAT}. Use the "
            f"release that wrote it, or start a new run with another --run name."
        )
    if manifest.config_hash != identity.config_hash:
        lines = [f"\n  - {line}" for line in differences(manifest.config, identity.config)]
        raise DoNotRetry(
            f"{folder.url} belongs to another training: its config has hash {manifest.config_hash}, this one "
            f"{identity.config_hash}.{''.join(lines)}\nGo on with the config in the run folder, start a new run with "
            f"another --run name, or begin a new run with these weights: --set start_from={folder.url}"
        )
    shapes = shapes_of(engine)
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
        raise DamagedCheckpointError(f"{folder.url}/{step_name(step)} lacks {names}")


def _read_index(folder: ObjectFolder, step: int, rank: RankFiles) -> RankIndex:
    name = f"{step_name(step)}/{rank.name}.json"

    def problem_of(content: bytes) -> str | None:
        return None if checksum(content) == rank.index_crc32c else "its checksum differs from the manifest's"

    return RankIndex.model_validate_json(_read_verified(folder, name, lambda: folder.read(name), problem_of))


def _read_entries(
    folder: ObjectFolder, step: int, rank: RankFiles, index: RankIndex, entries: Sequence[Entry]
) -> Iterator[tuple[Entry, Tensor]]:
    """The tensors of some entries, verified; neighbours in the file are read together."""
    if not entries:
        return
    name = f"{step_name(step)}/{rank.name}.safetensors"
    dtypes = {text: dtype for dtype, text in DTYPES.items()}

    def header_problem(content: bytes) -> str | None:
        return None if checksum(content) == index.header_crc32c else "the checksum of its header differs"

    _read_verified(folder, name, lambda: folder.read_range(name, 0, index.header_bytes), header_problem)
    for run in _neighbours(entries):
        start, end = run[0].offset, run[-1].offset + run[-1].num_bytes

        def problem_of(content: bytes, run: list[Entry] = run, start: int = start) -> str | None:
            for entry in run:
                values = memoryview(content)[entry.offset - start :][: entry.num_bytes]
                if len(values) != entry.num_bytes or checksum(np.frombuffer(values, np.uint8)) != entry.crc32c:
                    return f"the checksum of {entry.name} differs"
            return None

        content = np.frombuffer(
            _read_verified(folder, name, partial(folder.read_range, name, start, end), problem_of), np.uint8
        )
        for entry in run:
            values = content[entry.offset - start :][: entry.num_bytes]
            yield entry, torch.from_numpy(values.copy()).view(dtypes[entry.dtype])


def _read_verified(
    folder: ObjectFolder, name: str, read: Callable[[], bytes], problem_of: Callable[[bytes], str | None]
) -> bytes:
    """Bytes that are right; read again where they are not, as they may have been damaged on their way."""
    problem: str | None = None
    for _ in range(_READ_ATTEMPTS):
        try:
            content = read()
        except FileNotFoundError as error:
            raise DamagedCheckpointError(f"{folder.url}/{name} is missing") from error
        problem = problem_of(content)
        if problem is None:
            return content
    raise DamagedCheckpointError(f"{folder.url}/{name} is damaged: {problem}")


def _neighbours(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    """The entries in the order of the file, in runs that are worth one request each."""
    run: list[Entry] = []
    for entry in sorted(entries, key=lambda entry: entry.offset):
        if run and entry.offset - (run[-1].offset + run[-1].num_bytes) > _LARGEST_GAP:
            yield run
            run = []
        run.append(entry)
    yield run
