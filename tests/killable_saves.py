"""Saves checkpoints of two ranks, one after another, until it is killed: `python -m tests.killable_saves URL`.

It does what the upload processes of a run do, in one process and without torch, so that a test can afford to kill many.
"""

import json
import sys

import numpy as np

from datastore.objects import ObjectFolder
from trainer.commits import (
    CheckpointConfig,
    Entry,
    Manifest,
    claim_generation,
    committed_steps,
    record_resumed,
)
from trainer.uploader import Share, commit_all, put_share

NUM_VALUES = 100_000  # of each rank
WORLD_SIZE = 2


def values_of(step: int) -> np.ndarray:
    """The weights of both ranks after a step."""
    return np.random.default_rng(step).random(WORLD_SIZE * NUM_VALUES, dtype=np.float32)


def save(url: str, generation: int, step: int, keep_last: int = 2) -> None:
    """One checkpoint."""
    config = CheckpointConfig(keep_last=keep_last, retry_seconds=60)
    shares = []
    for rank in range(WORLD_SIZE):
        start = rank * NUM_VALUES
        values = values_of(step)[start : start + NUM_VALUES]
        header = {f"weight/w/{start}": {"dtype": "F32", "shape": [NUM_VALUES], "data_offsets": [0, values.nbytes]}}
        text = json.dumps(header).encode()
        head = len(text).to_bytes(8, "little") + text
        entry = Entry(
            name="w",
            kind="weight",
            start=start,
            length=NUM_VALUES,
            dtype="F32",
            offset=len(head),
            num_bytes=values.nbytes,
        )
        share = Share(
            url=url,
            rank=rank,
            world_size=WORLD_SIZE,
            generation=generation,
            config=config,
            num_bytes=len(head) + values.nbytes,
            header_bytes=len(head),
            entries=(entry,),
        )
        put_share(share, step, head + values.tobytes())
        shares.append(share)
    manifest = Manifest(
        generation=generation,
        step=step,
        samples_seen=step,
        totals={},
        config_hash="abc",
        config="",
        zero_stage=1,
        shapes={"w": (WORLD_SIZE * NUM_VALUES,)},
        optimizer_tensors=(),
        optimizer_scalars={},
    )
    commit_all(shares[0], manifest)


def begin(url: str) -> tuple[int, int]:
    """A new start of the run: its number, and the step from which it goes on."""
    folder = ObjectFolder(url)
    generation = claim_generation(folder, WORLD_SIZE)
    step = max(committed_steps(folder), default=0)
    record_resumed(folder, generation, WORLD_SIZE, step)
    return generation, step


def main() -> None:
    url = sys.argv[1]
    generation, step = begin(url)
    print("ready", flush=True)
    while True:
        step += 1
        save(url, generation, step)


if __name__ == "__main__":
    main()
