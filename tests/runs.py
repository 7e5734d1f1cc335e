"""Tiny runs for tests: trained for a few steps, by the same stage as any other."""

import argparse
from pathlib import Path
from typing import Any

from datastore.layout import Store, create_teacher, open_store
from datastore.schema import INGEST_FIELDS
from datastore.write import BlockWriter, publish
from tests.stores import small_attributes, small_teacher, write_blocks, write_small_store
from trainer.config import RunConfig
from trainer.runfolder import RunFolder

STEPS = 4


def write_corpus(url: str, **attributes: Any) -> Store:
    """A small store whose views a teacher has described."""
    fields = [name for name in INGEST_FIELDS if name != "part_labels"]  # the store names no parts
    store = write_small_store(url, small_attributes(**attributes), fields)
    training = {"job": "tiny_teacher", "split": "train", "source_hash": store.attributes.source_hash}
    scope = create_teacher(store, small_teacher().model_copy(update={"training": training}))
    write_blocks(open_store(url), BlockWriter(open_store(url), scope).pending(), scope)
    publish(open_store(url))
    return open_store(url)


def tiny_config(store_url: str, **changes: Any) -> RunConfig:
    """PointMCD with a narrow PointNet, on 16 of the 20 points."""
    tree: dict[str, Any] = {
        "job": "tiny",
        "objective": {"kind": "pointmcd", "teacher": "teacher"},
        "student": {"kind": "pointnet", "width": 0.0625},
        "data": {"store_url": store_url, "num_points": 16},
        "engine": {"optimizer": {"kind": "adamw", "lr": 1e-3}, "max_micro_batch": 8},
        "checkpoint": {"every_steps": 2, "every_seconds": None},
        "steps": STEPS,
        "global_batch": 16,
        "seed": 3,
    }
    return RunConfig.model_validate(tree | changes)


def train(config: RunConfig, url: str) -> RunFolder:
    """The run in its folder, trained to its end."""
    from trainer.pretrain import run

    folder = RunFolder(url)
    folder.write_config(config)
    assert run(argparse.Namespace(config=str(Path(url) / "config.yaml"), run=url, resume=False)) == 0
    return folder
