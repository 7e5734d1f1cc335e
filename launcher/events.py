"""What happened to a job's nodes and workers, in one line for people."""

import signal
from collections.abc import Mapping
from typing import Any, Final

from datastore.errors import EXIT_STOPPED
from datastore.progress import format_seconds

_WHY_RESTART: Final = {
    "node_joined": "a node came: all save, and go on with it",
    "node_left": "a node was told to leave: all save, and the others go on",
}


def describe_event(kind: str, facts: Mapping[str, Any]) -> str | None:
    """One line, or None for what is as expected."""
    if kind == "workers_ended" and set(facts["exit_codes"].values()) <= {EXIT_STOPPED, -signal.SIGTERM}:
        return None
    if kind == "workers_ended":
        how = ", ".join(f"rank {rank} {_ending(code)}" for rank, code in facts["exit_codes"].items())
        again = "" if facts["is_final"] else "; all start again from the last checkpoint"
        return f"node {facts['node']}: {how}{again}"
    if kind == "hang_detected":
        what = "is suspended" if facts["is_suspended"] else "hangs"
        return (
            f"node {facts['node']}: rank {facts['rank']} {what} after step {facts['step']}: silent for "
            f"{facts['silent_seconds']:.0f} s, {facts['allowed_seconds']:.0f} s are allowed. Its stacks: {facts['log']}"
        )
    if kind == "worker_stuck":
        return (
            f"node {facts['node']}: process {', '.join(map(str, facts['pids']))} did not end within "
            f"{facts['seconds']:.0f} s of being killed: the node leaves"
        )
    if kind == "node_lost":
        return f"node {facts['node']} is lost: {facts['why']}"
    if kind == "node_replaced":
        after = f" in {facts['after_seconds']:.0f} s" if facts["after_seconds"] else ""
        return f"{facts['name']}: its agent {facts['ended']}; it starts again{after}"
    if kind == "node_excluded":
        return (
            f"node {facts['node']} alone broke {facts['times']} worlds in a row ({facts['why']}): the others go on "
            f"without it for {format_seconds(facts['seconds'])}"
        )
    if kind == "restart" and facts["cause"] == "storage_away":
        return f"storage does not answer ({facts['why']}): all start again after a pause"
    if kind == "cut_off":
        return f"node {facts['node']} cannot reach the others, and killed its workers"
    if kind == "waiting_for_nodes":
        return f"waiting for nodes: {facts['there']} are there, {facts['least']} are needed"
    if kind == "restart":
        return _WHY_RESTART.get(facts["cause"])
    if kind == "world_formed" and facts["generation"] > 1:
        nodes = ", ".join(map(str, facts["nodes"]))
        return f"all start again, on node{'s' * (len(facts['nodes']) > 1)} {nodes}"
    if kind == "chaos_injected":
        return f"chaos: {facts['fault']}, after step {facts['step']}"
    if kind == "chaos_skipped":
        return f"CHAOS LEFT OUT: {facts['fault']}: {facts['why']}"
    if kind == "partition_healed":
        return f"chaos: node {facts['node']} is on the network again"
    if kind == "recovered":
        lost = f"{facts['lost_steps']} steps done again" if facts["lost_steps"] else "no step lost"
        return f"recovered after {facts['seconds']:.1f} s on {facts['world']} workers, {lost}"
    return None


def describe_recoveries(events: list[dict[str, Any]]) -> str | None:
    """`recovered from 3 faults, 41 s lost`; None where there was none."""
    recoveries = [event for event in events if event["event"] == "recovered"]
    if not recoveries:
        return None
    seconds = sum(event["seconds"] for event in recoveries)
    steps = sum(event["lost_steps"] for event in recoveries)
    faults = f"{len(recoveries)} disturbance{'s' * (len(recoveries) > 1)}"
    return f"recovered from {faults}, {format_seconds(seconds)} lost, {steps} steps done again"


def _ending(code: int) -> str:
    return f"was killed ({signal.Signals(-code).name})" if code < 0 else f"failed with exit code {code}"
