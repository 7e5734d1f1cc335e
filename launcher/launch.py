"""`viewpoint launch`: its command line. What it does is in `driver.py`, imported when it is sure to be needed."""

import argparse
import shlex

from datastore.errors import AskedWrongly
from launcher.chaos import GRAMMAR

HELP = "run a job to its report: prepare what is missing, train, compare, evaluate"

EXAMPLES = f"""\
examples:
  viewpoint launch pointmcd --nodes 4
      the demo: no data, no GPU; corpus, teacher, training, evaluation and report in minutes
  viewpoint launch pointmcd --nodes 2 --data s3://bucket/shapes.zarr --prepare
      the paper's recipe on a store of yours; trains the teacher and caches its features where they are missing
  viewpoint launch pointmcd --run first-try --set engine.optimizer.lr=0.01 --set epochs=50
      a named run with two settings changed; the same command continues it after a stop
  viewpoint launch pointmcd --nodes 4 --dry-run
      what would run: every command and its environment
  viewpoint launch pointmcd --nodes 4 --on k8s
      the same on a cluster, in pods that kubectl applies, with the image and the bucket that k8s/settings names;
      with --dry-run, exactly what it would apply
  viewpoint launch pointmcd --nodes 2:4 --chaos kill-worker@20,kill-node=2@60:15s
      how the job gets over a killed worker and a killed node; it goes on with two nodes until the lost one is back

{GRAMMAR}
Ctrl-C saves a checkpoint and stops; the same command goes on. A second Ctrl-C kills.
exit codes: 0 done; 2 asked wrongly; 64 wrong configuration or data, do not retry; 69 storage does not answer;
            75 stopped, the same command goes on; else failed, a retry makes sense
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `viewpoint launch`."""
    parser.add_argument(
        "job", metavar="JOB", help="a recipe's name (pointmcd, pointmcd_teacher) or a recipe file of your own (*.yaml)"
    )
    parser.add_argument(
        "--nodes",
        type=node_range,
        default=(1, 1),
        metavar="N|MIN:MAX",
        help="nodes, each with an agent of its own (default: 1). 2:4: four, and the job goes on while two are left",
    )
    parser.add_argument(
        "--procs-per-node", type=whole_number, default=1, metavar="P", help="worker processes on each node (default: 1)"
    )
    parser.add_argument(
        "--on",
        choices=["local", "k8s"],
        default="local",
        help="where the nodes are: processes on this machine (default), or pods of a Kubernetes cluster",
    )
    cluster = parser.add_argument_group(
        "with --on k8s", "Of --nodes 2:4, training goes on with two pods. docs/cluster.md."
    )
    cluster.add_argument(
        "--manifest",
        metavar="FOLDER|FILE",
        help="what kubectl builds, or has built (default: Viewpoint's k8s/stages/train, with what k8s/settings and k8s/site say)",
    )
    cluster.add_argument("--image", metavar="NAME:TAG", help="the image that pods run (default: the manifest's)")
    cluster.add_argument("--namespace", metavar="NAME", help="of all objects (default: the manifest's)")
    cluster.add_argument(
        "--queue", metavar="NAME", help="Kueue's queue that the jobs wait in (default: the manifest's)"
    )
    cluster.add_argument("--context", metavar="NAME", help="of kubectl's configuration (default: its current one)")
    parser.add_argument(
        "--data", metavar="URL", help="a store that `viewpoint ingest` wrote; without it the job makes a demo corpus"
    )
    parser.add_argument(
        "--runs",
        metavar="URL",
        help="folder of all runs, local or on object storage (default: ./runs; with --on k8s, where the manifest's run lies)",
    )
    parser.add_argument(
        "--run", metavar="NAME", help="this run's name; default: the newest unfinished equal run, else JOB-<number>"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="assignments",
        metavar="KEY=VALUE",
        help="change one value of the recipe; repeatable",
    )
    parser.add_argument(
        "--prepare", action="store_true", help="with --data: also train the teacher and cache its features if missing"
    )
    parser.add_argument(
        "--max-restarts",
        type=natural_number,
        default=3,
        metavar="R",
        help="restarts in a row without a new checkpoint, after which the job is given up (default: 3)",
    )
    parser.add_argument(
        "--step-deadline",
        type=seconds,
        default=60.0,
        metavar="SECONDS",
        help="a worker hangs that needs longer for a step, and ten times as long as for those before; 0: none does "
        "(default: 60)",
    )
    parser.add_argument(
        "--node-timeout",
        type=seconds,
        default=6.0,
        metavar="SECONDS",
        help="silence after which a node counts as lost (default: 6)",
    )
    parser.add_argument("--chaos", metavar="PLAN", help="faults on purpose, on local nodes; see below")
    parser.add_argument(
        "--rendezvous-port", type=port_number, default=0, metavar="PORT", help="where nodes meet (default: a free port)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would run, node by node, and start nothing")
    parser.add_argument("--json", action="store_true", help="results on stdout as JSON, one object a line")


def run(arguments: argparse.Namespace) -> int:
    """The exit code of `viewpoint launch`."""
    if arguments.prepare and arguments.data is None:
        raise AskedWrongly("--prepare goes with --data URL: without data, the demo prepares everything anyway.")
    from launcher.chaos import parse_chaos
    from launcher.command import Layout
    from launcher.driver import launch
    from launcher.spec import LaunchSpec

    least, most = arguments.nodes
    layout = Layout(
        most,
        arguments.procs_per_node,
        arguments.max_restarts,
        min_nodes=least,
        node_timeout=arguments.node_timeout,
        step_deadline=arguments.step_deadline,
    )
    spec = LaunchSpec(
        job=arguments.job,
        layout=layout,
        data_url=arguments.data,
        runs_url=arguments.runs,
        run_name=arguments.run,
        assignments=tuple(arguments.assignments),
        prepare=arguments.prepare,
        rendezvous_port=arguments.rendezvous_port,
        chaos=parse_chaos(arguments.chaos, layout) if arguments.chaos is not None else (),
    )
    asked = {name: getattr(arguments, name) for name in ("manifest", "image", "namespace", "queue", "context")}
    if arguments.on == "k8s":
        from launcher.cluster import SITE_MANIFEST, launch_on_cluster
        from launcher.jobset import Cluster

        return launch_on_cluster(
            spec,
            Cluster(**asked | {"manifest": arguments.manifest or SITE_MANIFEST}),
            command=shlex.join(["viewpoint", *arguments.words]),
            dry_run=arguments.dry_run,
            as_json=arguments.json,
        )
    useless = [f"--{name}" for name, value in asked.items() if value is not None]
    if useless:
        raise AskedWrongly(f"{' and '.join(useless)} goes with --on k8s.")
    return launch(
        spec, command=shlex.join(["viewpoint", *arguments.words]), dry_run=arguments.dry_run, as_json=arguments.json
    )


def node_range(text: str) -> tuple[int, int]:
    """An option's value that says how many nodes, or how few and how many: `3` or `2:4`."""
    least, colon, most = text.partition(":")
    if not colon:
        return whole_number(text), whole_number(text)
    if whole_number(least) > whole_number(most):
        raise argparse.ArgumentTypeError(f"{text!r} has its numbers in the wrong order: MIN:MAX, for example 2:4")
    return whole_number(least), whole_number(most)


def seconds(text: str) -> float:
    """An option's value that is a time."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds") from None
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be 0 or more seconds, got {value}")
    return value


def whole_number(text: str) -> int:
    """An option's value that counts something there must be at least one of."""
    return _number(text, least=1)


def natural_number(text: str) -> int:
    """An option's value that may be zero."""
    return _number(text, least=0)


def port_number(text: str) -> int:
    """An option's value that names a TCP port; 0 for any."""
    return _number(text, least=0, most=65_535)


def _number(text: str, *, least: int, most: int | None = None) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < least or (most is not None and value > most):
        bounds = f"{least} or more" if most is None else f"from {least} to {most}"
        raise argparse.ArgumentTypeError(f"must be {bounds}, got {value}")
    return value
