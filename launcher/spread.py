"""A stage by itself on several nodes of this machine: `viewpoint cache ... --nodes 4`."""

import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from datastore.errors import EXIT_DONE, EXIT_STOPPED
from launcher.command import Layout, nursery_environment, worker_words
from launcher.events import describe_event
from launcher.local import run_nodes, this_machine
from launcher.nursery import Nursery
from launcher.readings import ProgressReader
from launcher.rendezvous import RendezvousStore
from launcher.stop import StopRequest
from launcher.tail import last_lines
from launcher.terminal import describe_end, open_screen


def run_stage_on_nodes(stage: str, words: Sequence[str], nodes: int, procs_per_node: int, logs: str) -> int:
    """The stage's exit code. What its first process prints goes to stdout, as it would without nodes."""
    folder = Path(logs) / f"{stage}-{time.strftime('%Y%m%d-%H%M%S')}"
    progress = folder / "progress"
    reader = ProgressReader(progress)
    layout, machine = Layout(nodes, procs_per_node), this_machine()
    with ExitStack() as held:
        screen = held.enter_context(open_screen())
        stop = held.enter_context(StopRequest())
        store = held.enter_context(RendezvousStore())
        nursery = held.enter_context(Nursery(nursery_environment(layout, machine), stage=stage))
        screen.say(f"viewpoint: {stage} on {nodes} nodes; logs in {folder}")
        screen.begin(stage)
        started = time.monotonic()

        def on_event(kind: str, **facts: Any) -> None:
            line = describe_event(kind, facts)
            if line is not None:
                screen.say(f"  {line}")

        outcome = run_nodes(
            worker_words([stage, *words]),
            layout=layout,
            job=stage,
            store=store,
            logs=folder,
            progress=progress,
            machine=machine,
            stop=stop,
            watch=lambda: screen.show(reader.read()),
            on_event=on_event,
            start_agent=nursery.start,
            committed=lambda: float(reading.done) if (reading := reader.read()) is not None else 0.0,
        )
        if outcome.exit_code == EXIT_DONE:
            screen.end(stage, describe_end(reader.read(), time.monotonic() - started))
        elif outcome.exit_code == EXIT_STOPPED:
            screen.end(stage, "stopped; the same command goes on")
        else:
            screen.end(stage, f"failed with exit code {outcome.exit_code} on {outcome.culprit}")
            if outcome.reason:
                screen.say(f"  {outcome.reason}")
            for line in last_lines(outcome.log, 15) if outcome.log is not None else ():
                screen.say(f"    {line}")
            screen.say(f"  whole log: {outcome.log}")
    if outcome.exit_code == EXIT_DONE and outcome.output is not None:
        print(outcome.output.read_text(), end="")
    shutil.rmtree(progress, ignore_errors=True)
    return outcome.exit_code
