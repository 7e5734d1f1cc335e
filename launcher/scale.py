"""`viewpoint scale`: what a run on so many nodes asks of a cluster, on paper, and where each limit of the design is reached.

Nothing is run and nothing is contacted. Each figure is a formula that is printed beside it; constants are named below with
where they come from. It is for choosing nodes, intervals and bandwidths before asking for machines, and for knowing which
limit comes first.
"""

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from datastore.errors import EXIT_DONE, AskedWrongly

HELP = "what a run on many nodes asks of a cluster, on paper, and which limit comes first"

EXAMPLES = """\
examples:
  viewpoint scale --nodes 4
  viewpoint scale --nodes 128 --procs-per-node 8 --params 1e9 --samples-per-second 400 --global-batch 16384
  viewpoint scale --nodes 64 --failures-per-node-day 0.02 --checkpoint-seconds 300 --json
"""

SECONDS_A_DAY: Final = 86_400.0

# Measured with this code, on two cores of an AMD EPYC over loopback.
ADD_SECONDS: Final = 29e-6  # one `add` at the rendezvous store, one client
GET_SECONDS: Final = 40e-6  # one `get`
ORDER_BYTES_A_NODE: Final = 73  # of the order that every agent reads, in JSON
STALL_SECONDS_A_BYTE: Final = 0.13 / 600e6  # training stands still while a rank's fragments are copied
CHECKPOINT_BYTES_A_PARAMETER: Final = 12.0  # weights and both moments in float32

# This code's own periods and sizes.
EXCHANGE_SECONDS: Final = 0.1  # launcher/link.py: an agent's report and order
TICK_SECONDS: Final = 0.1  # launcher/pod.py
PART_BYTES: Final = 8 * 2**20  # of one request to object storage
POLL_SECONDS: Final = 2.0  # launcher/cluster.py: two requests each
FOLLOWED_PODS: Final = 64

# Published by the projects named.
CONTROLLER_REQUESTS_A_SECOND: Final = 20.0  # kube-controller-manager --kube-api-qps, its default
CONTROLLER_BURST: Final = 30
SCHEDULER_REQUESTS_A_SECOND: Final = 50.0  # kube-scheduler's default
LARGEST_JOB: Final = 100_000  # completions of an Indexed Job
OBJECT_READS_A_SECOND: Final = 5_500.0  # Amazon S3, one prefix
OBJECT_WRITES_A_SECOND: Final = 3_500.0

# Counted in the objects' life, not measured: create, bind, four states by the kubelet, the Job's finalizer, six events.
WRITES_A_POD: Final = 13
POD_OBJECT_BYTES: Final = 10_000.0


@dataclass(frozen=True)
class Run:
    """What is asked about."""

    nodes: int
    procs_per_node: int = 1
    global_batch: int = 64
    params: float = 1e7
    samples_per_second: float = 100.0  # of one process
    sample_bytes: float = 208_000.0  # PointMCD: 8,192 points, their visibility from 12 views, 12 features of 512
    checkpoint_seconds: float = 60.0
    node_bytes_per_second: float = 1.25e9  # 10 Gbit/s
    storage_bytes_per_second: float = 12.5e9  # of the store as a whole
    failures_per_node_day: float = 0.005  # 466 in 54 days on 2,048 nodes of 8 GPUs: 0.0042 (Llama 3 report)
    recovery_seconds: float = 30.0
    node_timeout: float = 10.0
    days: float = 7.0

    @property
    def world(self) -> int:
        """Worker processes."""
        return self.nodes * self.procs_per_node

    def on(self, nodes: int) -> "Run":
        """The same on another number of nodes."""
        return Run(**{**vars(self), "nodes": nodes})


@dataclass(frozen=True)
class Figure:
    """One answer with its formula."""

    name: str
    value: float
    unit: str
    formula: str


@dataclass(frozen=True)
class Limit:
    """A quantity that grows with nodes, the most it may be, and the fewest nodes that exceed it (None: none does)."""

    name: str
    value: float
    most: float
    unit: str
    reached_at: int | None
    remedy: str


def pod_start_seconds(run: Run) -> float:
    """Until the controller has created and the scheduler has bound all pods, by their requests alone."""
    created = max(0.0, run.nodes - CONTROLLER_BURST) / CONTROLLER_REQUESTS_A_SECOND
    bound = run.nodes / SCHEDULER_REQUESTS_A_SECOND
    return max(created, bound)


def tick_seconds(run: Run) -> float:
    """One round of whoever decides on the membership: two requests an agent, one after the other."""
    return run.nodes * (GET_SECONDS + ADD_SECONDS)


def rendezvous_seconds(run: Run) -> float:
    """From the last agent's arrival until all know the world: an exchange, a round with its pause, an exchange."""
    return 2 * EXCHANGE_SECONDS + TICK_SECONDS + tick_seconds(run)


def store_requests_per_second(run: Run) -> float:
    """At the rendezvous store: of each agent a beat and an order, and the host's two for each."""
    return run.nodes * (2 / EXCHANGE_SECONDS + 2 / (TICK_SECONDS + tick_seconds(run)))


def store_capacity() -> float:
    """Requests a second that one thread answers."""
    return 2 / (ADD_SECONDS + GET_SECONDS)


def order_bytes_per_second(run: Run) -> float:
    """That leave the pod which holds the store: each agent reads all members, ten times a second."""
    return run.nodes * run.nodes * ORDER_BYTES_A_NODE / EXCHANGE_SECONDS


def read_bytes_per_second(run: Run) -> float:
    """From the store of shapes, by all workers, without a local cache."""
    return run.world * run.samples_per_second * run.sample_bytes


def reads_per_second(run: Run) -> float:
    """Requests for that, in parts of 8 MiB."""
    return read_bytes_per_second(run) / PART_BYTES


def checkpoint_bytes(run: Run) -> float:
    """Of one checkpoint."""
    return run.params * CHECKPOINT_BYTES_A_PARAMETER


def checkpoint_objects(run: Run) -> int:
    """Objects of one checkpoint: two a rank, and the manifest."""
    return 2 * run.world + 1


def stall_seconds(run: Run) -> float:
    """Training stands still for each checkpoint."""
    return checkpoint_bytes(run) / run.world * STALL_SECONDS_A_BYTE


def upload_seconds(run: Run) -> float:
    """Of one checkpoint, behind training: each node's share over its link, all of it into the store."""
    return max(
        checkpoint_bytes(run) / run.nodes / run.node_bytes_per_second,
        checkpoint_bytes(run) / run.storage_bytes_per_second,
    )


def interval_seconds(run: Run) -> float:
    """Between checkpoints: as asked, no shorter than an upload, and no stall above one hundredth (trainer/commits.py)."""
    return max(run.checkpoint_seconds, upload_seconds(run), stall_seconds(run) / 0.01)


def mean_seconds_between_failures(run: Run) -> float:
    """Of the job: any node's failure is one."""
    failures_a_day = run.nodes * run.failures_per_node_day
    return SECONDS_A_DAY / failures_a_day if failures_a_day > 0 else math.inf


def goodput(run: Run) -> float:
    """The share of wall time in steps that count, with failures at random (Daly's complete model)."""
    interval, stall, between = interval_seconds(run), stall_seconds(run), mean_seconds_between_failures(run)
    if math.isinf(between):
        return interval / (interval + stall)
    exponent = (interval + stall) / between
    if exponent > 700 or run.recovery_seconds / between > 700:  # not one interval is ever finished
        return 0.0
    return interval / (between * math.exp(run.recovery_seconds / between) * math.expm1(exponent))


def best_interval_seconds(run: Run) -> float:
    """Between checkpoints for the most goodput, by Young's formula; no shorter than an upload."""
    between = mean_seconds_between_failures(run)
    return math.inf if math.isinf(between) else max(math.sqrt(2 * stall_seconds(run) * between), upload_seconds(run))


def lost_pods(run: Run) -> float:
    """Expected over the days of the run."""
    return run.nodes * run.failures_per_node_day * run.days


def figures(run: Run) -> list[Figure]:
    """Everything that is asked of a cluster."""
    return [
        Figure("pods", run.nodes, "", "nodes (a JobSet has one more)"),
        Figure("worker processes", run.world, "", "nodes x processes"),
        Figure("API writes to start and end", run.nodes * WRITES_A_POD, "", f"{WRITES_A_POD} a pod"),
        Figure(
            "API reads while followed", 2 / POLL_SECONDS, "/s", f"2 every {POLL_SECONDS:g} s, of the launcher alone"
        ),
        Figure("bytes of those", run.nodes * POD_OBJECT_BYTES / POLL_SECONDS, "B/s", "nodes x 10 kB a pod, every 2 s"),
        Figure("pods created and bound", pod_start_seconds(run), "s", "max((nodes - 30) / 20 a s, nodes / 50 a s)"),
        Figure("rendezvous", rendezvous_seconds(run), "s", "0.3 s + nodes x 69 us, after the last pod's start"),
        Figure("rendezvous store", store_requests_per_second(run), "requests/s", "20 a node + 2 a node and round"),
        Figure("orders leaving pod 0", order_bytes_per_second(run), "B/s", "10/s x nodes^2 x 73 B"),
        Figure("shapes read", run.world * run.samples_per_second, "samples/s", "processes x samples a process"),
        Figure("bytes read", read_bytes_per_second(run), "B/s", "samples/s x bytes a sample, no local cache"),
        Figure("reads of the store", reads_per_second(run), "requests/s", "bytes / 8 MiB"),
        Figure("checkpoint", checkpoint_bytes(run), "B", "12 B a parameter"),
        Figure("objects of it", checkpoint_objects(run), "", "2 a process + 1"),
        Figure("stall for it", stall_seconds(run), "s", "bytes a process x 0.13 s / 600 MB"),
        Figure("upload of it", upload_seconds(run), "s", "max(bytes / nodes / node's link, bytes / store's)"),
        Figure("checkpoint bandwidth", checkpoint_bytes(run) / interval_seconds(run), "B/s", "bytes / interval"),
        Figure("interval", interval_seconds(run), "s", "max(asked, upload, 100 x stall)"),
        Figure("best interval", best_interval_seconds(run), "s", "max(sqrt(2 x stall x MTBF), upload)"),
        Figure(
            "between failures", mean_seconds_between_failures(run), "s", "1 day / (nodes x failures a node and day)"
        ),
        Figure("pods lost", lost_pods(run), "", f"nodes x failures x {run.days:g} days; backoffLimit is 10 x nodes"),
        Figure("goodput", goodput(run), "", "I / (M exp(R/M) (exp((I + S)/M) - 1))"),
    ]


@dataclass(frozen=True)
class _Bound:
    name: str
    quantity: Callable[[Run], float]  # does not fall when nodes are added
    most: Callable[[Run], float]
    unit: str
    remedy: str


_BOUNDS: Final = (
    _Bound(
        "two samples a process and step",
        lambda run: 2.0 * run.world,
        lambda run: float(run.global_batch),
        "samples",
        "a larger global batch",
    ),
    _Bound(
        "a round of the membership, against half of --node-timeout",
        tick_seconds,
        lambda run: run.node_timeout / 2,
        "s",
        "a longer --node-timeout, or one request for all reports",
    ),
    _Bound(
        "requests at the rendezvous store",
        store_requests_per_second,
        lambda run: store_capacity(),
        "requests/s",
        "a longer exchange period in launcher/link.py",
    ),
    _Bound(
        "orders over the link of pod 0",
        order_bytes_per_second,
        lambda run: run.node_bytes_per_second,
        "B/s",
        "agents that read the order's number first, and the order when that has changed",
    ),
    _Bound(
        "reads of the store, one prefix",
        reads_per_second,
        lambda run: OBJECT_READS_A_SECOND,
        "requests/s",
        "data.cache_gib: shards on the nodes' disks; fields under several prefixes",
    ),
    _Bound(
        "bytes from the store",
        read_bytes_per_second,
        lambda run: run.storage_bytes_per_second,
        "B/s",
        "data.cache_gib: shards on the nodes' disks",
    ),
    _Bound(
        "objects of a checkpoint, put within a second",
        lambda run: float(checkpoint_objects(run)),
        lambda run: OBJECT_WRITES_A_SECOND,
        "objects",
        "retries spread them; fewer and larger files a node",
    ),
    _Bound(
        "pods whose logs the launcher shows",
        lambda run: float(run.nodes),
        lambda run: float(FOLLOWED_PODS),
        "pods",
        "the cluster's log collection; the run's folder has all logs in the end",
    ),
    _Bound(
        "seconds to create and bind all pods, against ten minutes",
        pod_start_seconds,
        lambda run: 600.0,
        "s",
        "a higher --kube-api-qps of the controller; a JobSet has the same limit",
    ),
    _Bound("completions of one Job", lambda run: float(run.nodes), lambda run: float(LARGEST_JOB), "pods", "none"),
    _Bound(
        "time that does not count, against one tenth",
        lambda run: 1 - goodput(run),
        lambda run: 0.1,
        "",
        "shorter intervals, quicker recovery, or spare nodes (--nodes MIN:MAX)",
    ),
)


def limits(run: Run) -> list[Limit]:
    """Every limit of the design, the one that fewest nodes reach first."""
    found = [
        Limit(bound.name, bound.quantity(run), bound.most(run), bound.unit, _reached_at(bound, run), bound.remedy)
        for bound in _BOUNDS
    ]
    return sorted(found, key=lambda limit: math.inf if limit.reached_at is None else limit.reached_at)


def _reached_at(bound: _Bound, run: Run, most: int = 10_000_000) -> int | None:
    """The fewest nodes that exceed it."""

    def exceeds(nodes: int) -> bool:
        return bound.quantity(run.on(nodes)) > bound.most(run.on(nodes))

    if not exceeds(most):
        return None
    low, high = 0, most  # low does not exceed it, high does
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if exceeds(middle) else (middle, high)
    return high


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `viewpoint scale`."""
    defaults = Run(1)
    parser.add_argument("--nodes", type=int, required=True, metavar="N", help="nodes, one pod each")
    for name, kind, words in (
        ("procs_per_node", int, "worker processes a node"),
        ("global_batch", int, "of the recipe"),
        ("params", float, "parameters of what is trained"),
        ("samples_per_second", float, "of one process; benchmarks/students.py measures it"),
        ("sample_bytes", float, "that one sample reads from the store"),
        ("checkpoint_seconds", float, "between checkpoints"),
        ("node_bytes_per_second", float, "of a node's link"),
        ("storage_bytes_per_second", float, "of the object store as a whole"),
        ("failures_per_node_day", float, "of a node, and whatever ends its pod"),
        ("recovery_seconds", float, "from a failure to the first new step"),
        ("node_timeout", float, "as the manifests have it"),
        ("days", float, "that the run takes"),
    ):
        default = getattr(defaults, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            default=default,
            metavar="X",
            help=f"{words} (default: {default:g})",
        )
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Prints figures and limits."""
    asked = run_of(arguments)
    if arguments.json:
        print(
            json.dumps(
                {
                    "run": vars(asked),
                    "figures": [_finite(vars(figure)) for figure in figures(asked)],
                    "limits": [vars(limit) for limit in limits(asked)],
                }
            )
        )
    else:
        print(describe(asked))
    return EXIT_DONE


def run_of(arguments: argparse.Namespace) -> Run:
    """What is asked about; an error where a number makes no sense."""
    asked = Run(**{name: getattr(arguments, name) for name in vars(Run(1))})
    for name, value in vars(asked).items():
        least = 0.0 if name in ("failures_per_node_day", "recovery_seconds", "days") else None
        if not math.isfinite(value) or (value < least if least is not None else value <= 0):
            raise AskedWrongly(
                f"--{name.replace('_', '-')} must be {'0 or more' if least is not None else 'above 0'}, got {value}."
            )
    return asked


def describe(asked: Run) -> str:
    """Both tables, for people."""
    lines = [f"On paper, nothing was run: {asked.nodes:,} nodes x {asked.procs_per_node} processes", ""]
    lines += [
        f"  {figure.name:<28}{_number(figure.value, figure.unit):>16}   {figure.formula}" for figure in figures(asked)
    ]
    lines += ["", "Limits of the design, the first one first:", ""]
    for limit in limits(asked):
        at = "never" if limit.reached_at is None else f"{limit.reached_at:,} nodes"
        over = "  REACHED" if limit.value > limit.most else ""
        lines.append(f"  {limit.name:<60}{at:>18}{over}")
        lines.append(
            f"      {_number(limit.value, limit.unit)} of {_number(limit.most, limit.unit)}; then: {limit.remedy}"
        )
    return "\n".join(lines)


def _number(value: float, unit: str) -> str:
    if math.isinf(value):
        return "never"
    if unit in ("B", "B/s"):
        for factor, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
            if value >= factor:
                return f"{value / factor:.3g} {name}{unit}"
    text = f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:.4g}"
    return f"{text} {unit}".rstrip()


def _finite(facts: dict[str, float | str]) -> dict[str, float | str | None]:
    """JSON knows no infinity."""
    return {name: None if isinstance(value, float) and math.isinf(value) else value for name, value in facts.items()}
