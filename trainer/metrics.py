"""Every metric's name, the account of where time goes, and the Prometheus exporter.

Rank 0 also writes the figures of a step as a line of the run folder's metrics.jsonl, with or without an exporter.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, PositiveInt

from datastore.errors import DoNotRetry
from trainer.distributed import World

Bucket = Literal["startup", "data_wait", "forward", "backward", "optimizer", "checkpoint", "other"]


class MetricsConfig(BaseModel, extra="forbid", frozen=True):
    """What is written down and exported."""

    # Prometheus port of local rank 0; local rank i takes port + i. None: no exporter
    port: int | None = Field(default=None, ge=1, le=65_000)
    every_steps: PositiveInt = 1  # between lines of metrics.jsonl


class TimeAccount:
    """Seconds by what they were spent on. At every moment one bucket runs, so their sum is wall time."""

    def __init__(
        self, earlier: Mapping[str, float] | None = None, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._clock = clock
        self._seconds = dict.fromkeys(get_args(Bucket), 0.0) | dict(earlier or {})
        self._bucket: Bucket = "startup"
        self._since = clock()

    def enter(self, bucket: Bucket) -> None:
        """From now on, time is spent on this."""
        now = self._clock()
        self._seconds[self._bucket] += now - self._since
        self._bucket, self._since = bucket, now

    def add_earlier(self, seconds: Mapping[str, float]) -> None:
        """Adds what the same run had spent before it was stopped."""
        for bucket, spent in seconds.items():
            self._seconds[bucket] = self._seconds.get(bucket, 0.0) + spent

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
    lr: float = 0.0
    grad_norm: float = 0.0
    samples_per_second: float = 0.0
    data_wait_share: float = 0.0  # of wall time since the line before

    def record(self) -> dict[str, Any]:
        """As a JSON object."""
        return asdict(self)


class Exporter:
    """This rank's figures for Prometheus, computed when they are asked for, so that a step pays for nothing."""

    def __init__(self, config: MetricsConfig, world: World, run: str, account: TimeAccount) -> None:
        self.figures = StepFigures()
        self.samples_seen = 0
        self.committed_step = 0
        self.committed_at = 0.0  # seconds since 1970
        self.checkpoint_bytes = 0
        self.reads: Callable[[], tuple[int, int]] = lambda: (0, 0)  # bytes read from the store, batches ready
        self._last_step_at = 0.0
        self._world, self._run, self._account = world, run, account
        self._server: Any = None
        if config.port is not None:
            self._serve(config.port + world.local_rank)

    def observe(self, figures: StepFigures, samples_seen: int) -> None:
        """Takes the figures of a finished step."""
        self.figures, self.samples_seen, self._last_step_at = figures, samples_seen, time.time()

    def saved(self, step: int, num_bytes: int) -> None:
        """Takes note of a committed checkpoint."""
        self.committed_step, self.committed_at = step, time.time()
        self.checkpoint_bytes += num_bytes

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

        seconds = self._account.seconds
        bytes_read, batches_ready = self.reads()
        yield family(CounterMetricFamily, "time_seconds", "wall time by what it was spent on", seconds, "bucket")
        yield family(CounterMetricFamily, "data_read_bytes", "read from the store", {"": bytes_read})
        yield family(GaugeMetricFamily, "data_queue_depth", "micro-batches ready", {"": batches_ready})
        yield family(GaugeMetricFamily, "step", "optimizer steps finished", {"": self.figures.step})
        last_step = {"": self._last_step_at}
        yield family(GaugeMetricFamily, "last_step_timestamp_seconds", "when the last step ended", last_step)
        written = {"": self.checkpoint_bytes}
        yield family(CounterMetricFamily, "checkpoint_bytes", "written by this rank", written)
        if not self._world.is_first:
            return
        yield family(GaugeMetricFamily, "world_size", "processes that train", {"": self._world.size})
        yield family(GaugeMetricFamily, "loss", "weighted terms of the loss", self.figures.terms, "term")
        yield family(GaugeMetricFamily, "learning_rate", "of the last step", {"": self.figures.lr})
        yield family(GaugeMetricFamily, "grad_norm", "before clipping", {"": self.figures.grad_norm})
        yield family(GaugeMetricFamily, "epoch", "passes over the data", {"": self.figures.epoch})
        rate = {"": self.figures.samples_per_second}
        yield family(GaugeMetricFamily, "samples_per_second", "of all processes", rate)
        yield family(CounterMetricFamily, "samples", "trained on, earlier starts included", {"": self.samples_seen})
        yield family(GaugeMetricFamily, "checkpoint_committed_step", "newest", {"": self.committed_step})
        committed = {"": self.committed_at}
        yield family(GaugeMetricFamily, "checkpoint_committed_timestamp_seconds", "when", committed)

    def _serve(self, port: int) -> None:
        from prometheus_client import CollectorRegistry, start_http_server

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        try:
            self._server, _ = start_http_server(port, registry=registry)
        except OSError as error:
            raise DoNotRetry(
                f"Port {port}, on which rank {self._world.rank} would export its metrics, cannot be used: {error}. "
                f"Choose another with --set metrics.port=PORT (local rank i takes PORT + i), or none with "
                f"--set metrics.port=null."
            ) from error
