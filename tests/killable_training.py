"""`python -m trainer` that also writes down which samples each step reads: `python -m tests.killable_training FOLDER ...`.

Every start begins with an empty list in FOLDER/rank-R.jsonl; then comes a line of sample ids for each step.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer import pretrain
from trainer.__main__ import main

IDS_OF_STEP = "rank-{rank}.jsonl"


def _record(path: Path) -> None:
    train_step = pretrain.train_step

    def write(ids: Sequence[int]) -> None:
        with path.open("a") as file:
            file.write(json.dumps(ids) + "\n")

    def recording(engine: Any, micro_batches: Any, account: Any) -> Any:
        write([int(sample) for batch in micro_batches for sample in batch.ids])
        return train_step(engine, micro_batches, account)

    write([])
    pretrain.train_step = recording


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    _record(folder / IDS_OF_STEP.format(rank=os.environ["RANK"]))
    sys.exit(main(sys.argv[2:]))
