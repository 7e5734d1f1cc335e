"""`python -m trainer STAGE ...`: what one process of one stage runs."""

import argparse
import errno
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Final, Protocol

from datastore.errors import EXIT_ASKED_WRONGLY, EXIT_DO_NOT_RETRY, EXIT_FAILED, EXIT_STOPPED, ViewpointError

STAGES: Final = {
    "ingest": "datastore.ingest",
    "inspect": "datastore.inspect",
    "pretrain": "trainer.pretrain",
    "cache": "trainer.cache",
    "evaluate": "trainer.evaluate",
    "report": "trainer.report",
    "export": "trainer.export",
}


_WRONG_PATH: Final = (errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG)
"""What is wrong with a path that somebody gave, and stays wrong when it is tried again."""


class Stage(Protocol):
    """What each module in STAGES offers. Heavy imports wait until `run`, so that help comes at once."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> int: ...


def load_stage(name: str) -> Stage:
    """The module of a stage."""
    module: Stage = importlib.import_module(STAGES[name])
    return module


def main(words: Sequence[str] | None = None) -> int:
    """Runs one stage and returns its exit code."""
    words = sys.argv[1:] if words is None else words
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    # a worker imports its own stage alone; all of them only to list them
    for name in words[:1] if words and words[0] in STAGES else STAGES:
        stage = load_stage(name)
        stage.add_arguments(stages.add_parser(name, help=stage.HELP, description=stage.HELP))
    arguments = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("aiobotocore").setLevel(logging.WARNING)  # where keys and endpoint come from, for every client
    logging.getLogger("botocore").setLevel(logging.WARNING)
    return run_guarded(load_stage(arguments.stage), arguments)


def run_guarded(stage: Stage, arguments: argparse.Namespace) -> int:
    """The stage's exit code; errors meant for people become one message, the others a traceback for the log."""
    try:
        return stage.run(arguments)
    except ViewpointError as error:
        print(f"viewpoint: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("viewpoint: interrupted; what was finished is saved, the same command goes on.", file=sys.stderr)
        return EXIT_STOPPED
    except BrokenPipeError:
        # the reader of our output went away (`| head`): what is left to say has no listener
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except ModuleNotFoundError as error:
        print(
            f"viewpoint: the Python package {error.name!r} is missing in {sys.prefix}. Install Viewpoint's packages with "
            f"`make install`, or `python -m pip install -c constraints.txt -e .`.",
            file=sys.stderr,
        )
        return EXIT_DO_NOT_RETRY
    except OSError as error:
        if error.errno in _WRONG_PATH and error.filename:
            print(
                f"viewpoint: {error.filename}: {error.strerror}. Give another path, or mend what lies there.",
                file=sys.stderr,
            )
            return EXIT_DO_NOT_RETRY
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            traceback.print_exc()
            return EXIT_FAILED
        where = f" while writing {error.filename}" if error.filename else ""
        print(
            f"viewpoint: the disk is full{where}: {error.strerror}. What was committed is safe; make room and run the same command again.",
            file=sys.stderr,
        )
        return EXIT_DO_NOT_RETRY


assert EXIT_ASKED_WRONGLY == 2, "argparse exits with 2 by itself, and both must agree"

if __name__ == "__main__":
    sys.exit(main())
