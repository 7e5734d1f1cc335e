"""Every metric's name, the account of where time goes, and the Prometheus exporter.

Rank 0 also writes the figures of a step as a line of the run folder's metrics.jsonl, with or without an exporter.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, get_args

from pydantic import BaseModel, Field, PositiveInt

from datastore.errors import DoNotRetry
from trainer.distributed import World
from trainer.history import goodput

PORT_OFFSET_VARIABLE: Final = "VIEWPOINT_METRICS_PORT_OFFSET"
"""How many processes of other nodes on this machine have a port before this node's first."""

Bucket = Literal[
    "startup", "data_wait", "forward", "backward", "optimizer", "checkpoint", "other", "redone", "down", "paused"
]
"""Where time goes. The last three are of earlier starts of the run: trainer/history.py."""


class MetricsConfig(BaseModel, extra="forbid", frozen=True):
    """What is written down and exported."""

    # Prometheus port of local rank 0; local rank i takes port + i, and where several nodes are on one machine, those of
    # node n the ports after the n nodes before: with one process a node, node n takes port + n. None: no exporter
    port: int | None = Field(default=None, ge=1, le=65_000)
    every_steps: PositiveInt = 1  # between lines of metrics.jsonl


class TimeAccount:
    """Seconds by what they were spent on. At every moment one bucket runs, so their sum is wall time."""

    def __init__(
        self, earlier: Mapping[str, float] | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._clock = clock
        self._seconds = dict.fromkeys(get_args(Bucket), 0.0) | dict(earlier or {})
        self._asked: dict[str, float] = {}
        self._bucket: Bucket = "startup"
        self._since = clock()

    def enter(self, bucket: Bucket) -> None:
        """From now on, time is spent on this."""
        now = self._clock()
        self._seconds[self._bucket] += now - self._since
        self._bucket, self._since = bucket, now

    def phases(self) -> dict[str, float]:
        """Seconds by bucket since this was last asked: what the steps in between spent."""
        now = self.seconds
        spent = {bucket: seconds - self._asked.get(bucket, 0.0) for bucket, seconds in now.items()}
        self._asked = now
        return {bucket: seconds for bucket, seconds in spent.items() if seconds > 0}

    def add_earlier(self, seconds: Mapping[str, float]) -> None:
        """Adds what the same run had spent before it was stopped."""
        for bucket, spent in seconds.items():
            self._seconds[bucket] = self._seconds.get(bucket, 0.0) + spent
            self._asked[bucket] = self._asked.get(bucket, 0.0) + spent

    @property
    def seconds(self) -> dict[str, float]:
        """All buckets, up to now."""
        running = self._clock() - self._since
        return self._seconds | {self._bucket: self._seconds[self._bucket] + running}


class Means:
    """Means of figures over the steps since they were last taken."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._count = 0

    def add(self, figures: Mapping[str, float]) -> None:
        """One more step."""
        self._sums = {name: self._sums.get(name, 0.0) + value for name, value in figures.items()}
        self._count += 1

    def take(self) -> dict[str, float]:
        """The means so far; counting begins anew."""
        means = {name: total / self._count for name, total in self._sums.items()}
        self._sums, self._count = {}, 0
        return means


@dataclass(frozen=True)
class StepFigures:
    """What is known after a step; a line of metrics.jsonl."""

    step: int = 0
    epoch: float = 0.0
    loss: float = 0.0
    terms: Mapping[str, float] = field(default_factory=dict)  # mean over ranks and micro-batches
    figures: Mapping[str, float] = field(default_factory=dict)  # of the objective: rank 0's last micro-batch
    lr: float = 0.0
    grad_norm: float = 0.0
    samples_per_second: float = 0.0
    data_wait_share: float = 0.0  # of wall time since the line before
    phases: Mapping[str, float] = field(default_factory=dict)  # seconds since the line before, by bucket

    def record(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Reads:
    """What this rank's stream counted."""

    bytes_read: int = 0
    batches_ready: int = 0
    retries: int = 0
    cache_hits: int = 0
    memory_bytes: int = 0


class Exporter:
    """This rank's figures for Prometheus, computed when they are asked for, so that a step pays for nothing."""

    def __init__(self, config: MetricsConfig, world: World, run: str, account: TimeAccount) -> None:
        self.figures = StepFigures()
        self.samples_seen = 0
        self.generation = 0
        self.restarts: Mapping[str, int] = {}  # by cause, earlier launches included
        self.committed_step = 0
        self.committed_at = 0.0  # seconds since 1970
        self.checkpoint_seconds: Mapping[str, float] = {}  # of the last save: stall, and until it was committed
        self.uploaded_bytes: Callable[[], int] = lambda: 0
        self.reads: Callable[[], Reads] = Reads
        self._last_step_at = 0.0
        self._world, self._run, self._account = world, run, account
        self._server: Any = None
        if config.port is not None:
            self._serve(config.port + int(os.environ.get(PORT_OFFSET_VARIABLE, "0")) + world.local_rank)

    def observe(self, figures: StepFigures, samples_seen: int) -> None:
        """Takes the figures of a finished step."""
        self.figures, self.samples_seen, self._last_step_at = figures, samples_seen, time.time()

    def saved(self, step: int, stall_seconds: float, seconds: float) -> None:
        """Takes note of a committed checkpoint."""
        self.committed_step, self.committed_at = step, time.time()
        self.checkpoint_seconds = {"stall": stall_seconds, "upload": seconds}

    def close(self) -> None:
        """Ends the server."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()

    def collect(self) -> Iterator[Any]:
        """Every metric. Loss, rate and progress come from rank 0 alone, as they are the same everywhere."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        labels = {"run": self._run, "rank": str(self._world.rank)}

        def family(kind: Any, name: str, meaning: str, values: Mapping[str, float], label: str | None = None) -> Any:
            names = [*labels, label] if label else list(labels)
            metric = kind(f"viewpoint_{name}", meaning, labels=names)
            for value_label, value in values.items():
                metric.add_metric([*labels.values(), value_label] if label else list(labels.values()), value)
            return metric

        def counter(name: str, meaning: str, value: float) -> Any:
            return family(CounterMetricFamily, name, meaning, {"": value})

        def gauge(name: str, meaning: str, value: float) -> Any:
            return family(GaugeMetricFamily, name, meaning, {"": value})

        figures, seconds, reads = self.figures, self._account.seconds, self.reads()
        yield family(CounterMetricFamily, "time_seconds", "Wall time by what it was spent on", seconds, "bucket")
        yield family(GaugeMetricFamily, "step_phase_seconds", "Of the steps logged last", figures.phases, "phase")
        yield counter("data_read_bytes", "Read from the store", reads.bytes_read)
        yield counter("data_retries", "Requests to the store that had to be repeated", reads.retries)
        yield counter("data_cache_hits", "Ranges that the local cache had", reads.cache_hits)
        yield gauge("data_queue_depth", "Micro-batches ready", reads.batches_ready)
        yield gauge("data_memory_bytes", "Memory for samples, which data.memory_gib bounds", reads.memory_bytes)
        yield gauge("step", "Optimizer steps finished", figures.step)
        yield gauge("last_step_timestamp_seconds", "When the last step ended", self._last_step_at)
        yield counter("checkpoint_bytes", "Uploaded by this rank", self.uploaded_bytes())
        if not self._world.is_first:
            return
        yield gauge("world_size", "Processes that train", self._world.size)
        yield gauge("generation", "Number of this start of the run", self.generation)
        yield family(CounterMetricFamily, "restarts", "Starts after the first, by cause", self.restarts, "cause")
        yield gauge("goodput_ratio", "Share of wall time in steps that count", goodput(seconds))
        yield family(GaugeMetricFamily, "loss", "Weighted terms of the loss", figures.terms, "term")
        yield gauge("learning_rate", "Of the last step", figures.lr)
        yield gauge("grad_norm", "Before clipping", figures.grad_norm)
        yield gauge("epoch", "Passes over the data", figures.epoch)
        yield gauge("samples_per_second", "Of all processes", figures.samples_per_second)
        yield counter("samples", "Trained on, earlier starts included", self.samples_seen)
        yield gauge("checkpoint_committed_step", "Of the newest checkpoint", self.committed_step)
        yield gauge("checkpoint_committed_timestamp_seconds", "When it was committed", self.committed_at)
        yield family(
            GaugeMetricFamily,
            "checkpoint_seconds",
            "Of the last save, by what took it",
            self.checkpoint_seconds,
            "part",
        )

    def _serve(self, port: int) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        try:
            self._server, _ = start_http_server(port, registry=registry)
        except OSError as error:
            raise DoNotRetry(
                f"Port {port}, on which rank {self._world.rank} would export its metrics, cannot be used: {error}. "
                f"Choose another with --set metrics.port=PORT (the machine's i-th process takes PORT + i), or none with "
                f"--set metrics.port=null."
            ) from error
