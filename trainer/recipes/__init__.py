"""Complete runs as YAML, and where they lie: `recipes/JOB.yaml` has the paper's settings, `recipes/demo/JOB.yaml` runs in minutes."""

import difflib
from pathlib import Path
from typing import Final

from datastore.errors import AskedWrongly

_FOLDER: Final = Path(__file__).parent
_SUFFIXES: Final = (".yaml", ".yml")


def known_jobs(*, demo: bool) -> tuple[str, ...]:
    """Names of the recipes that come with Viewpoint."""
    folder = _FOLDER / "demo" if demo else _FOLDER
    return tuple(sorted(path.stem for path in folder.glob("*.yaml")))


def recipe_path(job: str, *, demo: bool) -> Path:
    """The file of a job: a known name, or the path of a recipe of one's own."""
    if job.endswith(_SUFFIXES) or "/" in job:
        path = Path(job).expanduser()
        if not path.is_file():
            raise AskedWrongly(
                f"There is no recipe file {job!r}. Give the path of a YAML file, or one of the names: {_listing(demo)}."
            )
        return path
    known = known_jobs(demo=demo)
    if job in known:
        return (_FOLDER / "demo" if demo else _FOLDER) / f"{job}.yaml"
    if demo and job in known_jobs(demo=False):
        raise AskedWrongly(
            f"Job {job!r} has the paper's settings alone, and no small variant for the demo corpus: name a store with --data. "
            f"Jobs that go without: {_listing(demo)}."
        )
    nearest = difflib.get_close_matches(job, known, n=1)
    meant = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise AskedWrongly(
        f"Unknown job {job!r}.{meant} Known jobs: {_listing(demo)}. A path to a recipe of your own (*.yaml) works too."
    )


def _listing(demo: bool) -> str:
    return ", ".join(known_jobs(demo=demo))
