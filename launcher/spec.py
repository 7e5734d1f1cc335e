"""What a person asks for when launching a job, checked for what needs no file and no machine."""

from dataclasses import dataclass

from datastore.errors import AskedWrongly
from launcher.chaos import Fault
from launcher.command import Layout


@dataclass(frozen=True)
class LaunchSpec:
    """One `viewpoint launch`, as asked."""

    job: str
    layout: Layout
    data_url: str | None = None
    runs_url: str | None = None  # ./runs, or on a cluster where the manifest's runs lie
    run_name: str | None = None
    assignments: tuple[str, ...] = ()
    prepare: bool = False
    rendezvous_port: int = 0
    chaos: tuple[Fault, ...] = ()

    @property
    def is_demo(self) -> bool:
        """Whether the job makes its own corpus."""
        return self.data_url is None


def worlds_for(*global_batches: int) -> tuple[int, ...]:
    """Numbers of processes that share every one of these global batches evenly, two samples each or more.

    One sample has no batch statistics.
    """
    return tuple(
        world
        for world in range(1, max(2, min(global_batches) // 2 + 1))
        if all(batch % world == 0 for batch in global_batches)
    )


def node_counts_for(layout: Layout, *global_batches: int) -> tuple[int, ...]:
    """Numbers of nodes, up to the layout's, whose processes share every one of these global batches evenly."""
    processes = layout.procs_per_node
    worlds = [world for world in worlds_for(*global_batches) if world % processes == 0 and world <= layout.world]
    return tuple(world // processes for world in worlds)


def check_world(layout: Layout, global_batches: dict[str, int]) -> None:
    """Refuses a number of processes that cannot share each job's global batch, which the recipe fixes."""
    fitting = worlds_for(*global_batches.values())
    if layout.world in fitting:
        return
    uneven = [
        f"{batch} of job {job!r}" for job, batch in global_batches.items() if layout.world not in worlds_for(batch)
    ]
    nodes = [world // layout.procs_per_node for world in fitting if world % layout.procs_per_node == 0]
    if nodes:
        with_processes = f" (with --procs-per-node {layout.procs_per_node})" if layout.procs_per_node > 1 else ""
        choice = f"Choose --nodes from {', '.join(map(str, nodes))}{with_processes}"
    else:
        choice = f"Choose nodes times processes from {', '.join(map(str, fitting))}"
    raise AskedWrongly(
        f"{layout.world} processes cannot share the global batch, two samples each or more: {' and '.join(uneven)}. "
        f"{choice}, or change the batch with --set global_batch=N."
    )
