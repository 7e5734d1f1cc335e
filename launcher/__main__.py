"""`viewpoint COMMAND ...`: the one command for people. Each command's module is imported when it is asked for."""

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import Final, NamedTuple

from datastore.errors import EXIT_ASKED_WRONGLY, EXIT_DONE
from trainer.__main__ import STAGES, Stage, load_stage, run_guarded


class CommandInfo(NamedTuple):
    """What the list of commands says of one; its own help says more."""

    synopsis: str
    summary: str
    examples: str = ""


COMMANDS: Final[dict[str, CommandInfo]] = {
    "launch": CommandInfo(
        "JOB --nodes N", "run a job to its report: prepare what is missing, train, compare, evaluate"
    ),
    "status": CommandInfo("[RUN]", "what a run is doing now, or did; without RUN, which runs there are"),
    "cancel": CommandInfo("RUN", "stop a run after a checkpoint; the same launch goes on later"),
    "report": CommandInfo(
        "RUN...",
        "one page of HTML on one run, or several side by side",
        "  viewpoint report runs/pointmcd-1\n  viewpoint report runs/pointmcd-1 runs/pointmcd-2",
    ),
    "ingest": CommandInfo(
        "SOURCE STORE",
        "turn shapes into a store: points, rendered views, visibility",
        "  viewpoint ingest meshes/ shapes.zarr\n"
        "  viewpoint ingest 'demo://shapes?count=640&seed=0' demo.zarr --image-size 64 --points 1024\n"
        "  viewpoint ingest meshes/ s3://bucket/shapes.zarr --part 0/4     one of four machines",
    ),
    "cache": CommandInfo(
        "STORE --teacher NAME",
        "run a frozen teacher over a store and keep its features there",
        "  viewpoint cache shapes.zarr --teacher pointmcd_teacher --weights runs/pointmcd_teacher-1/export --nodes 4",
    ),
    "evaluate": CommandInfo(
        "CHECKPOINT --protocol NAME --data STORE",
        "judge an encoder by one protocol",
        "  viewpoint evaluate runs/pointmcd-1 --protocol svm@heldout --data shapes.zarr\n"
        "  viewpoint evaluate runs/pointmcd-1 --protocol svm@heldout --data shapes.zarr --random-weights",
    ),
    "inspect": CommandInfo(
        "STORE",
        "what is in a store, is it whole, how does it look",
        "  viewpoint inspect shapes.zarr --verify\n  viewpoint inspect shapes.zarr --contact-sheet shapes.png\n\n"
        "Exit code 64 where no store is, or where --verify finds something wrong.",
    ),
    "export": CommandInfo(
        "RUN DIR",
        "write a trained encoder as safetensors with a model card",
        "  viewpoint export runs/pointmcd-1 encoder/",
    ),
    "scale": CommandInfo("--nodes N", "what a run on many nodes asks of a cluster, on paper"),
    "doctor": CommandInfo("", "check this machine, and a store or a recipe if you name one"),
}

_EXIT_CODES: Final = """\
exit codes: 0 done; 2 asked wrongly; 64 wrong configuration or data, do not retry; 69 storage does not answer;
            75 stopped after saving, the same command goes on; else failed, a retry makes sense"""

_OWN: Final = {name: f"launcher.{name}" for name in ("launch", "status", "cancel", "scale", "doctor")}
_ON_NODES: Final = ("cache", "evaluate")


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] in ("-h", "--help", "help"):
        print(overview())
        return EXIT_DONE if words else EXIT_ASKED_WRONGLY
    name, *rest = words
    if name == "--version":
        from importlib.metadata import version

        print(f"viewpoint {version('viewpoint')}")
        return EXIT_DONE
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        meant = f" Did you mean `viewpoint {nearest[0]}`?" if nearest else ""
        print(f"viewpoint: there is no command {name!r}.{meant} Commands: {', '.join(COMMANDS)}.", file=sys.stderr)
        return EXIT_ASKED_WRONGLY
    return run_guarded(_Command(name, rest), argparse.Namespace())


def overview() -> str:
    """What `viewpoint --help` prints."""
    width = max(len(f"{name} {info.synopsis}") for name, info in COMMANDS.items() if len(info.synopsis) < 25)
    lines = [f"  {f'{name} {info.synopsis}':<{width}}  {info.summary}" for name, info in COMMANDS.items()]
    return "\n".join(
        [
            "Viewpoint: pre-train 3D point encoders by distilling 2D image networks.",
            "",
            "First run, no data and no GPU needed:",
            "",
            "  viewpoint launch pointmcd --nodes 4",
            "",
            "commands (`viewpoint COMMAND --help` says more, with examples):",
            "",
            *lines,
            "",
            _EXIT_CODES,
        ]
    )


class _Command:
    """One command with its words, as `run_guarded` wants it: errors while importing it are explained, too."""

    def __init__(self, name: str, words: Sequence[str]) -> None:
        self._name, self._words = name, list(words)
        self.HELP = COMMANDS[name].summary

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Nothing: the command's own module says what it takes."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Parses the words and runs the command."""
        stage = load_stage(self._name) if self._name in STAGES else _load_own(self._name)
        parser = self._parser(stage)
        if self._name not in _ON_NODES:
            parsed = parser.parse_args(self._words)
            parsed.words = [self._name, *self._words]
            return stage.run(parsed)
        spread = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        self._add_nodes(spread)
        where, words = spread.parse_known_args(self._words)
        parsed = parser.parse_args(self._words)
        if where.nodes * where.procs_per_node == 1:
            return stage.run(parsed)
        from launcher.spread import run_stage_on_nodes

        return run_stage_on_nodes(self._name, words, where.nodes, where.procs_per_node, where.logs)

    def _parser(self, stage: Stage) -> argparse.ArgumentParser:
        examples = getattr(stage, "EXAMPLES", "") or (
            f"examples:\n{COMMANDS[self._name].examples}" * bool(COMMANDS[self._name].examples)
        )
        parser = argparse.ArgumentParser(
            prog=f"viewpoint {self._name}",
            description=stage.HELP[:1].upper() + stage.HELP[1:] + ".",
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        stage.add_arguments(parser)
        if "exit codes:" not in (epilog := parser.epilog or ""):
            parser.epilog = f"{epilog.rstrip()}\n\n{_EXIT_CODES}"
        if self._name in _ON_NODES:
            self._add_nodes(parser)
        return parser

    def _add_nodes(self, parser: argparse.ArgumentParser) -> None:
        from launcher.launch import whole_number

        group = parser.add_argument_group("on several nodes of this machine")
        group.add_argument(
            "--nodes",
            type=whole_number,
            default=1,
            metavar="N",
            help="nodes, each with an agent of its own (default: 1)",
        )
        group.add_argument(
            "--procs-per-node",
            type=whole_number,
            default=1,
            metavar="P",
            help="worker processes on each node (default: 1)",
        )
        group.add_argument(
            "--logs", default="runs/logs", metavar="FOLDER", help="where nodes write their logs (default: ./runs/logs)"
        )


def _load_own(name: str) -> Stage:
    module: Stage = importlib.import_module(_OWN[name])
    return module


if __name__ == "__main__":
    sys.exit(main())
