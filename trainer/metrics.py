"""Every metric's name, and the Prometheus exporter."""

from pydantic import BaseModel, Field


class MetricsConfig(BaseModel, extra="forbid", frozen=True):
    """What is exported to Prometheus. The run folder's metrics.jsonl is written in any case."""

    port: int | None = Field(
        None, ge=1, le=65_000
    )  # of local rank 0; local rank i exports on port + i. None: no exporter
    every_steps: int = Field(1, ge=1)  # lines of metrics.jsonl
