"""How far a stage is, over all its processes: from the files that `datastore.progress.Progress` writes."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from launcher.tail import Record, Tail

SHARED_STAGES: Final = ("ingest", "cache")
"""Stages whose processes share the work out; in the others every process counts the same steps."""


@dataclass(frozen=True)
class Reading:
    """One stage, all processes together."""

    stage: str
    done: int
    total: int
    unit: str
    rate: float  # units a second, without what earlier runs had done
    resumed: int
    note: dict[str, float | int | str] = field(default_factory=dict)

    @property
    def seconds_left(self) -> float | None:
        """None while nothing is known."""
        return (self.total - self.done) / self.rate if self.rate > 0 else None


class ProgressReader:
    """Follows the progress files of one step."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tails: dict[Path, Tail] = {}
        self._latest: dict[Path, Record] = {}

    def read(self) -> Reading | None:
        """The newest stage's state, or None before the first line."""
        for path in sorted(self._folder.glob("*.jsonl")):
            lines = self._tails.setdefault(path, Tail(path)).read()
            if lines:
                self._latest[path] = lines[-1]
        return combine(list(self._latest.values()))


def combine(records: list[Record]) -> Reading | None:
    """The stage that was heard of last: summed over the processes that share it, the first process' word otherwise."""
    if not records:
        return None
    stage = max(records, key=lambda record: record["time"])["stage"]
    of_stage = [record for record in records if record["stage"] == stage]
    first = of_stage[0]
    summed = of_stage if stage in SHARED_STAGES else of_stage[:1]
    return Reading(
        stage=stage,
        done=sum(record["done"] for record in summed),
        total=sum(record["total"] for record in summed),
        unit=first["unit"],
        rate=sum(record["rate"] for record in summed),
        resumed=sum(record["resumed"] for record in summed),
        note={
            name: _sum_of_rates(name, summed) if name.endswith("/s") else value for name, value in first["note"].items()
        },
    )


def _sum_of_rates(name: str, records: list[Record]) -> float:
    return sum(float(record["note"].get(name, 0)) for record in records)
