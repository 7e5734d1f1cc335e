"""Checkpoints of the toy, saved and loaded as a run does it, without a process for uploads."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from datastore.objects import ObjectFolder
from tests.trainer.toy import GLOBAL_BATCH
from trainer.checkpoint import Identity, Position, Restored, restore, start
from trainer.commits import CheckpointConfig
from trainer.engine import Engine
from trainer.saving import Saver

IDENTITY = Identity("abc", "job: toy\n")
TOTALS = {"forward": 1.5}
AT_ONCE = CheckpointConfig(background=False, keep_last=1000, retry_seconds=1)


def position_at(step: int) -> Position:
    """Where a run is after so many steps."""
    return Position(step, step * GLOBAL_BATCH, TOTALS)


@contextmanager
def saver_of(engine: Engine, folder: ObjectFolder, config: CheckpointConfig = AT_ONCE) -> Iterator[Saver]:
    """A saver of a new start of the run, which goes on where it is."""
    with Saver(engine, folder, start(engine, folder), config, IDENTITY) as saver:
        yield saver


def save(
    engine: Engine,
    folder: ObjectFolder,
    step: int,
    config: CheckpointConfig = AT_ONCE,
    figures: Mapping[str, float] | None = None,
) -> None:
    """One checkpoint, committed when this returns."""
    with saver_of(engine, folder, config) as saver:
        saver.begin(position_at(step), figures or {})
        saver.finish()


def load(engine: Engine, folder: ObjectFolder, identity: Identity = IDENTITY) -> Restored:
    """The newest checkpoint, in a new start of the run."""
    return restore(engine, folder, identity, start(engine, folder))
