"""A run's folder, on local disk or object storage: config, events, metrics, records, and the arms it is compared with.

    RUNS/NAME/config.yaml  network.json  events.jsonl  metrics.jsonl  logs/  checkpoints/  evaluation/  export/  report.html  arms/ARM/...

Local files are appended to. On a disk that machines share each process appends to files of its own, as two machines'
appends can overwrite each other. Object stores cannot append, so there each process puts numbered parts of its own
(trainer/journal.py). Readers merge them by time, and leave damaged lines out.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Final

import fsspec
from fsspec.implementations.local import LocalFileSystem

from datastore.errors import DoNotRetry
from datastore.objects import ObjectFolder
from trainer.config import RunConfig, read_config
from trainer.journal import Journal
from trainer.lines import append_line, is_shared, records_of

Record = dict[str, Any]

RUNS_URL: Final = "runs"
"""Where runs lie unless somebody says otherwise."""


class RunFolder:
    """Reads and writes one run. `writer` tells processes apart that write to the same folder on object storage."""

    def __init__(self, url: str, *, writer: str = "main") -> None:
        self.url = url.rstrip("/")
        self._writer = writer

    @cached_property
    def _filesystem(self) -> fsspec.AbstractFileSystem:
        return fsspec.core.url_to_fs(self.url, use_listings_cache=False)[0]

    @cached_property
    def _root(self) -> PurePosixPath:
        return PurePosixPath(fsspec.core.url_to_fs(self.url, use_listings_cache=False)[1])

    @cached_property
    def _journal(self) -> Journal:
        return Journal(lambda name, text: self.write_text(name, text), self._writer)

    @property
    def is_local(self) -> bool:
        """Whether the folder lies on this machine's disk."""
        return isinstance(self._filesystem, LocalFileSystem)

    @property
    def local_path(self) -> str | None:
        """The folder as a local path, or None on object storage."""
        return str(self._root) if self.is_local else None

    @property
    def name(self) -> str:
        """The last part of the URL."""
        return self._root.name

    @property
    def checkpoints_url(self) -> str:
        """Where checkpoints lie."""
        return f"{self.url}/checkpoints"

    @property
    def export_url(self) -> str:
        """Where the trained encoder lies once the run is finished."""
        return f"{self.url}/export"

    def exists(self) -> bool:
        """Whether a run was started here."""
        return bool(self._filesystem.exists(str(self._root / "config.yaml")))

    def write_config(self, config: RunConfig) -> None:
        """Records what this run trains."""
        self.write_text("config.yaml", config.to_yaml())

    def config(self) -> RunConfig:
        """What this run trains; an error that says what to do where there is no run."""
        text = self.read_text("config.yaml")
        if text is None:
            raise DoNotRetry(
                f"{self.url} is no run folder: it has no config.yaml. Start one with `viewpoint launch JOB --run {self.name}`."
            )
        return read_config(text, name=f"{self.url}/config.yaml")

    def write_network(self, description: Mapping[str, Any]) -> None:
        """Records what `models.load` would build the trained network from: sizes that come from the corpus included."""
        self.write_text("network.json", json.dumps(description, indent=1))

    def network(self) -> Record:
        """The description of the trained network; an error that says what to do where the run has not begun."""
        text = self.read_text("network.json")
        if text is None:
            raise DoNotRetry(f"{self.url} has no network.json: its training has not begun. Wait for its first step.")
        description: Record = json.loads(text)
        return description

    def append_event(self, kind: str, **facts: Any) -> None:
        """Adds a line to the run's history: started, saved, stopped, finished, restarted and so on."""
        self._append("events", {"time": time.time(), "event": kind, **facts}, at_once=True)

    def append_metrics(self, record: Record) -> None:
        """Adds the figures of one step."""
        self._append("metrics", {"time": time.time(), **record}, at_once=False)

    def written_behind(self, retry_seconds: float) -> AbstractContextManager[None]:
        """Within the block no line waits for object storage, nor does trouble with it end the process before so long."""
        return nullcontext() if self.is_local else self._journal.behind(retry_seconds)

    def flush(self) -> None:
        """Puts what object storage has not yet seen."""
        if not self.is_local:
            self._journal.flush()

    def events(self) -> list[Record]:
        """The run's history, oldest first."""
        return list(self._read_lines("events"))

    def metrics(self) -> list[Record]:
        """The figures of every step that was logged, oldest first."""
        return list(self._read_lines("metrics"))

    def last_event(self, *kinds: str) -> Record | None:
        """The newest event of the given kinds, or of any."""
        return next((event for event in reversed(self.events()) if not kinds or event["event"] in kinds), None)

    def is_finished(self) -> bool:
        """Whether training reached its last step."""
        return self.last_event("finished") is not None

    def write_record(self, name: str, record: Record) -> None:
        """Keeps one evaluation's result, whole."""
        self.write_text(f"evaluation/{name}.json", json.dumps(record, indent=1))

    def records(self) -> dict[str, Record]:
        """Every evaluation's result, by name."""
        found: dict[str, Record] = {}
        for path in sorted(self._filesystem.glob(str(self._root / "evaluation" / "*.json"))):
            found[PurePosixPath(path).stem] = json.loads(self._filesystem.cat_file(path))
        return found

    def arms(self) -> dict[str, "RunFolder"]:
        """The runs that this one is compared with, by arm."""
        paths = sorted(self._filesystem.glob(str(self._root / "arms" / "*" / "config.yaml")))
        return {name: self.arm(name) for name in (PurePosixPath(path).parent.name for path in paths)}

    def arm(self, name: str) -> "RunFolder":
        """The folder of one arm."""
        return RunFolder(f"{self.url}/arms/{name}", writer=self._writer)

    def write_text(self, name: str, text: str) -> None:
        """Writes one file whole: a reader sees the old one or the new one."""
        path = self._root / name
        if self.is_local:
            self._filesystem.makedirs(str(path.parent), exist_ok=True)
            draft = f"{path}.{os.getpid()}.draft"
            self._filesystem.pipe_file(draft, text.encode())
            Path(draft).replace(path)
        else:
            self._filesystem.pipe_file(str(path), text.encode())

    def read_text(self, name: str) -> str | None:
        """One file's text, or None where there is none."""
        try:
            content: bytes = self._filesystem.cat_file(str(self._root / name))
        except FileNotFoundError:
            return None
        return content.decode()

    def remove(self, name: str) -> None:
        """Removes one file if it is there."""
        path = str(self._root / name)
        if self._filesystem.exists(path):
            self._filesystem.rm_file(path)

    def _append(self, stem: str, record: Record, *, at_once: bool) -> None:
        if self.is_local:
            folder = Path(self._root)
            folder.mkdir(parents=True, exist_ok=True)
            own = f"-{self._journal.origin}" if is_shared(folder) else ""
            append_line(folder / f"{stem}{own}.jsonl", record)
            return
        self._journal.add(stem, json.dumps(record) + "\n", at_once=at_once)

    def _read_lines(self, stem: str) -> Iterator[Record]:
        objects = ObjectFolder(self.url)
        records: list[Record] = []
        names = [name for name in objects.names() if name.startswith(stem) and name.endswith(".jsonl")]
        for name, content in sorted(objects.read_all(names).items()):
            records += records_of(content, f"{self.url}/{name}")
        return iter(sorted(records, key=lambda record: float(record.get("time", 0.0))))


def find_run(run: str, runs_url: str = RUNS_URL) -> RunFolder:
    """The run at a URL or path, or of that name in a folder; an error that lists what is there where there is none."""
    folder = run_named(run, runs_url)
    if folder is None:
        raise DoNotRetry(f"{run} is no run folder: it has no config.yaml. {say_known_runs(run, runs_url)}")
    return folder


def run_named(run: str, runs_url: str = RUNS_URL) -> RunFolder | None:
    """The run at a URL or path, or of that name in a folder; None where there is none."""
    folders = (RunFolder(url) for url in ((run,) if "://" in run else (run, f"{runs_url}/{run}")))
    return next((folder for folder in folders if folder.exists()), None)


def say_known_runs(run: str, runs_url: str = RUNS_URL) -> str:
    """Which runs there are where one was looked for, or how to start one."""
    parent, _, _ = run.rstrip("/").rpartition("/")
    names = run_names(parent or runs_url)
    if not names:
        return "Start one with `viewpoint launch JOB`."
    return f"Runs in {parent or shown_folder(runs_url)}: {', '.join(names)}."


def shown_folder(url: str) -> str:
    """A folder's URL for people: what lies in the working directory can be seen to."""
    return url if "/" in url else f"./{url}"


def run_names(runs_url: str) -> list[str]:
    """Names of the runs in a folder; none where there is no folder."""
    filesystem, root = fsspec.core.url_to_fs(runs_url, use_listings_cache=False)
    if not filesystem.isdir(root):
        return []
    names = (Path(path).name for path in filesystem.ls(root, detail=False))
    return sorted(name for name in names if RunFolder(f"{runs_url}/{name}").exists())
