"""Which checkpoints there are: manifests, the fence that keeps an older start of the run out, and what is kept.

    checkpoints/generation-00000003.json     one for each start of the run: who may commit, and where it went on
                step-00000120/manifest.json  written last, by create-if-absent: without it there is no checkpoint
                              rank-00000-of-00004.generation-3.safetensors  pieces of weights and optimizer state
                              rank-00000-of-00004.generation-3.json         what lies where in it, with checksums

There is no pointer to the newest checkpoint: the newest whose checksums hold is it.

The fence: each start takes the next number. A commit is refused where a newer number exists, and a manifest that slips
in between that look and its creation is not believed by anybody: the newer start has written down from which step it
went on, and what an older one commits after that step never counts. So half of a run that was cut off, and went on
without knowing it, changes nothing; and its files have names of their own.
A start that another launch fenced out ends for good, or two launches of one run would take it from each other for ever.

Nothing here needs torch: the process that uploads imports it.
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Final

from pydantic import BaseModel, Field, PositiveFloat, PositiveInt, ValidationError

from datastore.errors import DoNotRetry, StoreError, ViewpointError
from datastore.objects import ObjectFolder

FORMAT: Final = 2
MANIFEST: Final = "manifest.json"
LAUNCH_VARIABLE: Final = "VIEWPOINT_LAUNCH"
"""Names the launch that a process works for; without it nobody starts the process again."""

_LARGEST_STALL_SHARE: Final = 0.01
_STEP_FOLDER: Final = re.compile(r"step-(\d{8,})")
_GENERATION_FILE: Final = re.compile(r"generation-(\d{8,})\.json")
_RANK_FILE: Final = re.compile(r"(rank-\d+-of-\d+\.generation-(\d+))\.(?:safetensors|json)")


class CheckpointConfig(BaseModel, extra="forbid", frozen=True):
    """When to save and what to keep. A stopped or finished run is saved in any case."""

    every_steps: PositiveInt | None = None
    every_seconds: PositiveFloat | None = 60.0
    # Never one alone: a newest one that is damaged needs a predecessor, and so does a start that found it as the newest
    # while an older start, cut off in the middle of a commit, made another and retained only that
    keep_last: int = Field(default=2, ge=2)
    keep_every: PositiveInt | None = None  # checkpoints at multiples of so many steps are never deleted
    # "loss" or the name of one of its terms: the checkpoint where it was lowest is kept, too. What counts is the mean over
    # the steps since the checkpoint before. None: no checkpoint is kept for being good
    keep_best: str | None = None
    background: bool = True  # False: training waits for each upload, and no process is started for them
    # From the first trouble with an upload, or with what the run writes down on object storage, until it stops for that
    retry_seconds: PositiveFloat = 300.0


def due(
    config: CheckpointConfig,
    step: int,
    seconds_since_last: float,
    *,
    stall_seconds: float = 0.0,
    in_flight: bool = False,
) -> bool:
    """Whether to save after this step, when the last save stalled training for so long, or is still in flight.

    A save that is due by steps is never left out: it waits for the one in flight. One that is due by time is put off
    until that is committed, and saves that stall training for long are made less often: they cost 1 % of it at most.
    """
    if config.every_steps is not None and step % config.every_steps == 0:
        return True
    if config.every_seconds is None or in_flight:
        return False
    return seconds_since_last >= max(config.every_seconds, stall_seconds / _LARGEST_STALL_SHARE)


def superseded(
    steps: Iterable[int], config: CheckpointConfig, figures: Mapping[int, Mapping[str, float]] | None = None
) -> list[int]:
    """Which of the committed steps need not be kept; `figures` of a step are the loss and its terms."""
    oldest_first = sorted(steps)
    kept = set(oldest_first[-config.keep_last :])
    if config.keep_every is not None:
        kept |= {step for step in oldest_first if step % config.keep_every == 0}
    if config.keep_best is not None and figures is not None:
        ranked = [(figures[step][config.keep_best], step) for step in figures if config.keep_best in figures[step]]
        kept |= {step for _, step in sorted(ranked)[:1]}
    return [step for step in oldest_first if step not in kept]


class Entry(BaseModel, frozen=True):
    """One tensor of a rank's file: `length` elements of a flattened parameter from `start`, or a whole buffer."""

    name: str
    kind: str  # "weight", a tensor of the optimizer such as exp_avg, or "buffer"
    start: int
    length: int
    shape: tuple[int, ...] = ()  # of a buffer
    dtype: str
    offset: int  # in the file
    num_bytes: int
    crc32c: int = 0


class RankIndex(BaseModel, frozen=True):
    """What lies where in a rank's file."""

    header_bytes: int
    header_crc32c: int
    num_bytes: int  # of the whole file
    entries: tuple[Entry, ...]


class RankFiles(BaseModel, frozen=True):
    """The two files of one rank."""

    name: str  # without the suffixes .safetensors and .json
    num_bytes: int
    index_crc32c: int


class Manifest(BaseModel, frozen=True):
    """A whole checkpoint."""

    format: int = FORMAT
    generation: int
    step: int
    samples_seen: int
    store_manifest: int | None = None  # of the store that it is trained on
    rows_digest: str | None = None  # of the samples of that store
    totals: dict[str, float]
    figures: dict[str, float] = {}  # the loss and its terms, means over the steps since the checkpoint before
    config_hash: str
    config: str  # YAML
    zero_stage: int
    shapes: dict[str, tuple[int, ...]]  # of the parameters
    optimizer_tensors: tuple[str, ...]
    optimizer_scalars: dict[str, float]
    ranks: tuple[RankFiles, ...] = ()
    committed_at: float = 0.0  # seconds since 1970


class Generation(BaseModel, frozen=True):
    """One start of the run."""

    started_at: float
    world_size: int
    launch: str = ""  # that it belongs to; one launch starts a run again and again
    resumed_from: int | None = None  # None until its checkpoint is loaded


class DamagedCheckpointError(StoreError):
    """A committed checkpoint that lacks something or whose checksums do not hold."""


class SupersededError(ViewpointError):
    """The run was started again elsewhere meanwhile; what this start does counts no more."""


class TakenOverError(DoNotRetry):
    """Another launch goes on with the run. Started again, this one would only take it back, and so on."""


def step_name(step: int) -> str:
    """The folder of a step."""
    return f"step-{step:08d}"


def step_named(name: str) -> int | None:
    """The step of a folder's name; None where it is no such folder."""
    match = _STEP_FOLDER.fullmatch(name)
    return int(match[1]) if match else None


def rank_name(rank: int, world_size: int, generation: int) -> str:
    """The files of one rank, without suffix."""
    return f"rank-{rank:05d}-of-{world_size:05d}.generation-{generation}"


def claim_generation(folder: ObjectFolder, world_size: int) -> int:
    """The number of this start: from now on, older ones cannot commit. One rank calls it for all."""
    number = max(_generations(folder), default=0) + 1
    facts = Generation(started_at=time.time(), world_size=world_size, launch=_own_launch())
    content = facts.model_dump_json().encode()
    while not folder.create(_generation_name(number), content):
        number += 1
    return number


def record_resumed(folder: ObjectFolder, generation: int, world_size: int, step: int) -> None:
    """Writes down from which step a start goes on: what older ones commit beyond it does not count."""
    facts = Generation(started_at=time.time(), world_size=world_size, launch=_own_launch(), resumed_from=step)
    folder.put(_generation_name(generation), facts.model_dump_json().encode())


def check_fence(folder: ObjectFolder, generation: int) -> None:
    """Raises SupersededError where a newer start of the run exists, TakenOverError where that is another launch's."""
    newest = max(_generations(folder), default=0)
    if newest > generation:
        theirs, ours = _launch_of(folder, newest), _own_launch()
        if theirs and ours and theirs != ours:
            raise TakenOverError(
                f"{folder.url} belongs to start {newest} of this run, which another launch ({theirs}) began after start "
                f"{generation} of this one ({ours}): the run goes on there, and this launch ends. To have it back, stop "
                f"that one with `viewpoint cancel`, and repeat this command."
            )
        raise SupersededError(
            f"{folder.url} belongs to start {newest} of this run, and this is start {generation}: it was cut off or "
            f"replaced meanwhile, and commits nothing any more. The run goes on there."
        )


def commit(folder: ObjectFolder, manifest: Manifest) -> None:
    """Makes what all ranks have written a checkpoint, unless a newer start of the run exists."""
    check_fence(folder, manifest.generation)
    name = f"{step_name(manifest.step)}/{MANIFEST}"
    content = manifest.model_dump_json(indent=1).encode()
    for _ in range(2):
        if folder.create(name, content) or folder.read(name) == content:  # the answer to our own creation may be lost
            return
        if manifest.step in committed_steps(folder):
            break
        folder.remove(name)  # an older start committed it after this one had gone on from an earlier step
    check_fence(folder, manifest.generation)  # a newer start may have come, and committed it, in this moment
    raise DoNotRetry(
        f"{folder.url}/{step_name(manifest.step)} was committed by another process in the meantime: two runs write to "
        f"one folder. Stop one of them, or give it another --run name."
    )


def committed_steps(folder: ObjectFolder) -> list[int]:
    """The steps of all checkpoints that have a manifest which counts, oldest first."""
    return sorted(_committed(folder))


def read_manifest(folder: ObjectFolder, step: int) -> Manifest:
    """The manifest of one checkpoint."""
    name = f"{step_name(step)}/{MANIFEST}"
    try:
        return Manifest.model_validate_json(folder.read(name))
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{folder.url}/{name} is missing") from error
    except ValidationError as error:
        raise DamagedCheckpointError(f"{folder.url}/{name} is damaged: {error.errors()[0]['msg']}") from error


def forget(folder: ObjectFolder, step: int) -> None:
    """Makes a step committable again whose checkpoint is of no use."""
    folder.remove(f"{step_name(step)}/{MANIFEST}")


def retain(folder: ObjectFolder, config: CheckpointConfig, generation: int) -> list[int]:
    """Deletes superseded checkpoints and what killed or cut-off starts left behind; returns the steps that are gone.

    Called by the start of that number after a commit: of its own files, only those of newer steps are under way. Where
    a newer start exists, which may be reading what would go, SupersededError is raised and nothing deleted.
    """
    check_fence(folder, generation)
    committed = _committed(folder)
    newest = max(committed, default=-1)
    figures = {step: manifest.figures for step, manifest in committed.items() if manifest is not None}
    gone = superseded(committed, config, figures)
    kept = {step: manifest for step, manifest in committed.items() if step not in gone}

    def is_garbage(step: int, file: str) -> bool:
        if step in kept:
            manifest = kept[step]
            if manifest is None or file == MANIFEST:  # of a damaged one nothing is known: it is left as it is
                return False
            match = _RANK_FILE.fullmatch(file)
            named = {rank.name for rank in manifest.ranks}
            return match is None or (match[1] not in named and int(match[2]) <= generation)
        match = _RANK_FILE.fullmatch(file)
        return match is None or int(match[2]) < generation or (int(match[2]) == generation and step <= newest)

    for step in _step_folders(folder):
        name = step_name(step)
        if step in gone:
            forget(folder, step)  # first: from now on nobody takes it for a checkpoint
        files = folder.names(name)
        garbage = [file for file in files if is_garbage(step, file)]
        for file in garbage:
            folder.remove(f"{name}/{file}")
        if folder.is_local and len(garbage) == len(files):
            shutil.rmtree(folder.local_path / name, ignore_errors=True)
    folder.remove_abandoned_drafts()
    folder.remove_unfinished_uploads(lambda name: _is_file_garbage(name, is_garbage))
    oldest = min([generation, *(manifest.generation for manifest in kept.values() if manifest is not None)])
    for number in _generations(folder):
        if number < oldest:
            folder.remove(_generation_name(number))
    return gone


def _is_file_garbage(name: str, is_garbage: Callable[[int, str], bool]) -> bool:
    parent, _, file = name.rpartition("/")
    step = step_named(parent)
    return step is not None and is_garbage(step, file)


def _committed(folder: ObjectFolder) -> dict[int, Manifest | None]:
    """The manifests that count by step; None where one cannot be read."""
    names = {f"{step_name(step)}/{MANIFEST}": step for step in _step_folders(folder)}
    manifests: dict[int, Manifest | None] = {}
    for name, content in folder.read_all(list(names)).items():
        try:
            manifests[names[name]] = Manifest.model_validate_json(content)
        except ValidationError:
            manifests[names[name]] = None
    starts = _starts(folder, min((each.generation for each in manifests.values() if each is not None), default=0))
    return {step: each for step, each in manifests.items() if each is None or not _is_fenced_out(each, starts)}


def _is_fenced_out(manifest: Manifest, starts: Mapping[int, Generation]) -> bool:
    """Whether a newer start went on from an earlier step, so that it cannot know of this manifest."""
    return any(
        number > manifest.generation and start.resumed_from is not None and start.resumed_from < manifest.step
        for number, start in starts.items()
    )


def _starts(folder: ObjectFolder, newer_than: int) -> dict[int, Generation]:
    names = {_generation_name(number): number for number in _generations(folder) if number > newer_than}
    starts: dict[int, Generation] = {}
    for name, content in folder.read_all(list(names)).items():
        with suppress(ValidationError):  # a damaged one keeps nobody out, and loses nothing
            starts[names[name]] = Generation.model_validate_json(content)
    return starts


def _own_launch() -> str:
    return os.environ.get(LAUNCH_VARIABLE, "")


def _launch_of(folder: ObjectFolder, number: int) -> str:
    try:
        return Generation.model_validate_json(folder.read(_generation_name(number))).launch
    except (FileNotFoundError, ValidationError):
        return ""


def _generation_name(number: int) -> str:
    return f"generation-{number:08d}.json"


def _generations(folder: ObjectFolder) -> list[int]:
    matches = (_GENERATION_FILE.fullmatch(name) for name in folder.names())
    return [int(match[1]) for match in matches if match]


def _step_folders(folder: ObjectFolder) -> list[int]:
    steps = (step_named(name) for name in folder.names())
    return sorted(step for step in steps if step is not None)
