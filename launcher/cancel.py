"""`viewpoint cancel`: asks the launcher of a run, wherever it is, to save and stop, and waits until it has."""

import argparse
import sys
import time
from typing import TYPE_CHECKING, Final

from datastore.errors import EXIT_DONE, AskedWrongly, ViewpointError

if TYPE_CHECKING:
    from trainer.runfolder import RunFolder

HELP = "stop a run after a checkpoint; the same launch goes on later"

EXAMPLES = """\
examples:
  viewpoint cancel runs/pointmcd-1
  viewpoint cancel s3://bucket/runs/pointmcd-1

It is what Ctrl-C in the launch's terminal does, from anywhere that reaches the run folder.
"""

_POLL_SECONDS: Final = 0.5
_ALL_HEARD_SECONDS: Final = 12.0  # pods that share a stage out look for a request every five seconds, each for itself


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `viewpoint cancel`."""
    parser.add_argument("run", metavar="RUN", help="the run's folder, or its name in ./runs")
    parser.add_argument(
        "--timeout", type=float, default=300.0, metavar="SECONDS", help="how long to wait for it to stop (default: 300)"
    )


def run(arguments: argparse.Namespace) -> int:
    """0 when the run has stopped."""
    from launcher.presence import holder_of
    from launcher.runs import COMPLETE
    from launcher.stop import STOP_REQUESTED
    from trainer.runfolder import find_run

    folder = find_run(arguments.run)
    holder = holder_of(folder)
    if holder is None:
        how = (
            "it is complete"
            if folder.last_event(COMPLETE)
            else "its launch goes on with the command it was started with"
        )
        raise AskedWrongly(f"Nothing works on {folder.url} right now, so there is nothing to cancel: {how}.")
    folder.write_text(STOP_REQUESTED, f"{time.time()}\n")
    print(f"viewpoint: asked {holder} to save and stop", file=sys.stderr)
    deadline = time.monotonic() + arguments.timeout
    gone_since: float | None = None
    while not _has_stopped(folder, gone_since):
        if holder_of(folder) is not None:
            gone_since = None
        elif gone_since is None:
            gone_since = time.monotonic()
        if time.monotonic() > deadline:
            raise ViewpointError(
                f"{folder.url} has not stopped within {arguments.timeout:.0f} s. It was asked and may still do it: "
                f"look with `viewpoint status {folder.url}`. `kill -KILL {holder.pid}` on {holder.host} ends it at "
                f"once, without a checkpoint."
            )
        time.sleep(_POLL_SECONDS)
    folder.remove(STOP_REQUESTED)  # or it would stop the next start
    print(f"viewpoint: {folder.url} has stopped; the command that launched it goes on from there", file=sys.stderr)
    return EXIT_DONE


def _has_stopped(folder: "RunFolder", gone_since: float | None) -> bool:
    """Whether nobody works on the run any more: whoever is the last to stop takes the request back.

    Parts of a stage cannot know who is the last: they count as stopped when nobody has been there for a while.
    """
    if gone_since is None:
        return False
    from launcher.stop import STOP_REQUESTED

    return folder.read_text(STOP_REQUESTED) is None or time.monotonic() - gone_since > _ALL_HEARD_SECONDS
