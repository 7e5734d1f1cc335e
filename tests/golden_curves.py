"""The first steps of every demo recipe, as they are now and as they were when they were last written down.

    python -m tests.golden_curves [JOB ...]

writes tests/golden/curves.json anew, or those jobs' curves in it, on one thread; say in a commit why.

Teachers and networks that a recipe needs are trained for as many steps, on the same small corpus.
"""

import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch

from datastore.cameras import rig_by_name
from datastore.ingest import ingest
from datastore.layout import open_store
from datastore.sources import open_source
from launcher.plan import Prerequisite
from launcher.prerequisites import prerequisites_of
from launcher.runs import pinned
from tests.runs import train
from trainer.cache import cache
from trainer.config import RunConfig, load_recipe
from trainer.recipes import known_jobs
from trainer.teachers import TimmOptions, load_teacher

STEPS: Final = 20
FILE: Final = Path(__file__).parent / "golden" / "curves.json"
SOURCE: Final = "demo://shapes?count=96&seed=0"


def machine() -> dict[str, str]:
    """What decides on the last bits of a sum."""
    processor = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return {
        "torch": torch.__version__,
        "processor": processor,
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def make_corpus(folder: Path) -> str:
    """A small corpus with all that the demo recipes read."""
    url = str(folder / "corpus.zarr")
    ingest(open_source(SOURCE), url, rig=rig_by_name("azimuth12", image_size=64), num_points=1024, num_workers=1)
    return url


def curves(job: str, store_url: str, folder: Path) -> list[dict[str, float]]:
    """The terms of each of the first steps of a demo recipe."""
    prepared = prerequisites_of(_recipe(job, store_url), lambda name: _recipe(name, store_url), str(folder), store_url)
    for needed in prepared.prerequisites:
        _make(needed, store_url)
    return _train(prepared.config, f"{folder}/{job}", store_url)


def _recipe(job: str, store_url: str) -> RunConfig:
    short = (
        f"steps={STEPS}",
        "epochs=null",
        "comparisons={}",
        "metrics.every_steps=1",
        "checkpoint.every_seconds=null",
    )
    return load_recipe(job, demo=True, assignments=short, store_url=store_url)


def _make(needed: Prerequisite, store_url: str) -> None:
    if not Path(needed.run_url, "export").exists():
        _train(needed.config, needed.run_url, store_url)
    if needed.teacher is not None and needed.teacher not in {
        key.partition("@")[0] for key in open_store(store_url).teachers
    }:
        teacher, training = load_teacher(f"{needed.run_url}/export", TimmOptions(needed.teacher))
        cache(open_store(store_url), teacher, needed.teacher, training=training, fields=needed.fields)


def _train(config: RunConfig, url: str, store_url: str) -> list[dict[str, float]]:
    teacher = getattr(config.objective, "teacher", None)
    if teacher is not None:
        config = pinned(config, open_store(store_url).resolve_teacher(teacher))
    return [record["terms"] for record in train(config, url).metrics()]


def main(jobs: Sequence[str]) -> int:
    """Writes the file, all of it or these jobs' curves."""
    written = json.loads(FILE.read_text()) if jobs else {"machine": machine(), "curves": {}}
    if written["machine"] != machine():
        print(
            f"The other curves are of {written['machine']}: write all of them anew, without naming jobs.",
            file=sys.stderr,
        )
        return 2
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="viewpoint-golden-") as name:
        folder = Path(name)
        store_url = make_corpus(folder)
        found: dict[str, Any] = written["curves"]
        for job in jobs or known_jobs(demo=True):
            found[job] = curves(job, store_url, folder)
            print(f"{job}: {sum(found[job][0].values()):.4f} -> {sum(found[job][-1].values()):.4f}", file=sys.stderr)
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(written, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
