"""How fast the stream reads, beside mosaicml-streaming, litdata, webdataset and plain GETs of the same bytes.

    python benchmarks/stream.py [--quick] [--cells 'points/*' ...] [--repeats 3] [--peers PYTHON] [--check] [--json FILE]

A cell is payload/source/workers. Payloads: points (8192 x 3 float32), views (4 rendered images of 224 x 224), features
(12 x 768 float16); every system gets the same samples in its own format, views both raw and by zstd where it has the
choice, and the faster of the two counts. Sources: a local disk, a server on loopback, and the same server 25 ms and
100 MB/s a connection away. A run is a process of its own that reads one shuffled epoch in batches of 64 and checks that
every sample came; runs of different systems take turns. The rate counts from a quarter of the epoch to its end, so that a
slow start does not weigh on it; the start is a figure of its own. Ours and plain GETs, which read an epoch in less than a
second, read three, and the second and third count. Ours reads with threads of the training process, so it
is the same run that stands against 0 and against 2 worker processes of the peers. The first repeat measures everything;
a peer that was then less than half as fast as the best of its cell, and took twice as much processor time as the
thriftiest, is not measured again. See `readers/` for the parts.

Plain GETs have as many requests under way as ours by default has, 8 near and 32 far away; beside the server far away both
are measured with 8 and 16, too, for points and features. With so few its network is what holds them up, and not the cores,
which serve both ends.

All of it takes about half an hour on two quiet cores, eighteen minutes with --repeats 2 and some eight with --quick; a few
more go to the files that the systems read: --folder keeps those for the next time (9 GB), and --repeats 0 only writes
them. --cells takes some cells by themselves.

The peers need older packages than the project's own, so they live in an environment of their own, which `make .venv-bench`
makes: the packages of the extra `bench`, and psutil.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
from readers.epochs import PART_BYTES, Run
from readers.object_server import running_server
from readers.payloads import BATCH, PAYLOADS, Payload, make_shapes, systems_of, write

from datastore.fetch import FetchConfig
from datastore.order import Lanes, Order
from datastore.stream import StreamConfig

REPOSITORY: Final = Path(__file__).parent.parent
PEER_PACKAGES: Final = ("mosaicml-streaming", "litdata", "webdataset")
LATENCY_SECONDS, BYTES_PER_SECOND = 0.025, 100e6  # of the slow server
STEP_SECONDS, STEP_BATCH = 0.025, 32
SOURCES: Final = ("local", "fast", "slow")
WORKERS: Final = (0, 2)
RUN_TIMEOUT_SECONDS: Final = 60  # without a first batch, or before its first quarter is read
EPOCHS: Final = 3  # of ours and plain GETs, which would be measured for less than a second otherwise
LIMIT_SECONDS: Final = {"full": 8.0, "quick": 3.0}  # of one run; its rate is of what came by then
CONTENDS: Final = 2.0

SETTINGS: Final[dict[str, dict[str, Any]]] = {
    # Less memory than the samples take, so that an epoch is read and not remembered.
    "points": {"memory_gib": 0.7},
    "views": {"memory_gib": 1.1},
    "features": {"memory_gib": 0.5},
}

SPEED_GEOMETRIC_MEAN = 2.0
SPEED_WORST_CELL = 0.9
SHARE_OF_PLAIN = {"fast": 0.75, "slow": 0.9}
CPU_GEOMETRIC_MEAN = 0.5
DATA_WAIT_SHARE = 0.02
FEW_REQUESTS: Final = (8, 16)  # to the slow server
FIRST_BATCH_SECONDS = 0.5 + 2 * LATENCY_SECONDS
OPENING_SECONDS, OPENING_MB = 0.05, 50.0
# data.memory_gib bounds what a process holds of samples. Beside it there are threads, their stacks, and the S3 client.
MIB_BEYOND_THE_BOUND = 100.0
MIXED_ROWS, MIXED_UNIT_SAMPLES = 2**17, 32  # units as of points


class Race:
    """Runs systems in processes of their own and keeps what they measured."""

    def __init__(
        self, folder: Path, peers: Path, payloads: dict[str, Payload], servers: dict[str, str], limit_seconds: float
    ) -> None:
        self.folder, self.peers, self.payloads, self.servers = folder, peers, payloads, servers
        self.limit_seconds = limit_seconds
        self.measured: dict[tuple[str, str, str, int], list[dict[str, float] | None]] = {}
        self.waits: dict[str, list[dict[str, float] | None]] = {}
        self.failures: list[str] = []
        self._runners: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> "Race":
        return self

    def __exit__(self, *_: object) -> None:
        for runner in self._runners.values():
            assert runner.stdin is not None and runner.stdout is not None
            runner.stdin.close()
            runner.wait(10)
            runner.stdout.close()

    def epoch(self, payload: str, source: str, system: str, workers: int) -> None:
        """One epoch, as fast as it goes."""
        key = payload, source, system, workers
        self.measured.setdefault(key, []).append(self._run(payload, source, system, workers))

    def few_requests(self, payload: str, source: str, requests: int) -> None:
        """The same by plain GETs and by ours, with no more requests under way than this."""
        for system in ("plain", "ours"):
            key = payload, source, _with_requests(system, requests), 0
            self.measured.setdefault(key, []).append(self._run(payload, source, system, 0, requests))

    def steps(self, system: str, workers: int) -> None:
        """An epoch of points from the slow server, a batch each 25 ms."""
        found = self._run("points", "slow", system, workers, step_seconds=STEP_SECONDS, batch=STEP_BATCH)
        self.waits.setdefault(system, []).append(found)

    def contends(self, payload: str, source: str, system: str, workers: int) -> bool:
        """Whether a peer may still be the best of its cell in something."""
        for figure, better in (("samples_per_second", max), ("cpu_microseconds_a_sample", min)):
            found = {
                peer: value
                for peer in peers_of(payload, source)
                if (value := self.median(payload, source, peer, workers, figure))
            }
            if system in found and CONTENDS > found[system] / better(found.values()) > 1 / CONTENDS:
                return True
        return False

    def _run(
        self, payload: str, source: str, system: str, workers: int, requests: int | None = None, **changes: Any
    ) -> dict[str, float] | None:
        """Figures of one run; None where it failed, which the list of failures explains."""
        usual = FetchConfig().requests_far if source == "slow" else FetchConfig().requests_near
        fetch = {} if requests is None else {"fetch": {"requests_far": requests}}
        with tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True) as scratch:
            run = Run(
                folder=str(self.folder),
                payload=payload,
                num_samples=self.payloads[payload].num_samples,
                system=system,
                workers=workers,
                scratch=scratch,
                server_url=self.servers[source],
                connections=requests or usual,
                settings=json.dumps(SETTINGS[payload] | fetch),
                limit_seconds=self.limit_seconds,
                epochs=EPOCHS if system in ("ours", "plain") and not changes else 1,
                **changes,
            )
            where = f"{payload}/{source}/{workers} by {_with_requests(system, requests)}"
            print(where, end=" ", file=sys.stderr, flush=True)
            figures = self._answer(run)
        if "error" in figures:
            self.failures.append(f"{where}: {figures['error']}")
            print(figures["error"], file=sys.stderr)
            return None
        print(f"{figures['samples_per_second']:,.0f}/s", file=sys.stderr)
        return figures

    def _answer(self, run: Run) -> dict[str, Any]:
        """What the process that has the run's system says of it."""
        whose = "ours" if run.system in ("ours", "plain") else "peers"
        if whose not in self._runners:
            systems = ("ours", "plain") if whose == "ours" else ("mosaicml", "litdata", "webdataset")
            self._runners[whose] = subprocess.Popen(
                [self._python(whose), "-m", "readers.epochs", *systems], env=self._environment(), text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        runner = self._runners[whose]
        assert runner.stdin is not None and runner.stdout is not None
        where = {"AWS_ENDPOINT_URL": run.server_url, "S3_ENDPOINT_URL": run.server_url} if run.server_url else {}
        asked = {"run": asdict(run), "environment": where, "timeout_seconds": RUN_TIMEOUT_SECONDS}
        runner.stdin.write(json.dumps(asked) + "\n")
        runner.stdin.flush()
        answer = runner.stdout.readline()
        if not answer:
            raise SystemExit(f"{self._python(whose)} -m readers.epochs ended; run it by hand to see why")
        found: dict[str, Any] = json.loads(answer)
        return found

    def call(self, system: str, module: str, *words: str) -> str:
        """What a module prints, run by the interpreter that has the system."""
        command = [self._python("ours" if system == "ours" else "peers"), "-m", module, *words]
        done = subprocess.run(command, env=self._environment(), capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise SystemExit(f"{' '.join(command)}: {last}")
        return done.stdout

    def _python(self, whose: str) -> str:
        return sys.executable if whose == "ours" else str(self.peers)

    def _environment(self) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | {
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "benchmarks")]),
            "OMP_NUM_THREADS": "1",  # as torchrun sets it
            "NO_PROXY": "127.0.0.1",
            "AWS_ACCESS_KEY_ID": "benchmark",
            "AWS_SECRET_ACCESS_KEY": "loopback-only",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": str(self.folder / "absent"),
            "AWS_SHARED_CREDENTIALS_FILE": str(self.folder / "absent"),
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def median(self, payload: str, source: str, system: str, workers: int, figure: str) -> float | None:
        """Of all repeats that succeeded."""
        runs = [run[figure] for run in self.measured.get((payload, source, system, workers), []) if run]
        return statistics.median(runs) if runs else None


def _takes_few_requests(payload: str, source: str) -> bool:
    """Views take longer to unpack than to fetch, however few requests are under way."""
    return source == "slow" and payload != "views"


def _with_requests(system: str, requests: int | None) -> str:
    return system if requests is None else f"{system}, {requests} requests"


def readers_of(payload: str, source: str) -> list[str]:
    """Systems that take part, ours first."""
    # read from a disk, mosaicml-streaming unpacks its shards beside themselves once, and reads those from then on
    return [each for each in systems_of(payload) if not (source == "local" and each == "mosaicml zstd")]


def peers_of(payload: str, source: str) -> list[str]:
    """The others."""
    return readers_of(payload, source)[1:]


@contextmanager
def prepared(folder: Path, peers: Path, payloads: dict[str, Payload], limit_seconds: float) -> Iterator[Race]:
    """Every format of every payload written and in the page cache, and the servers up."""
    make_shapes(folder)
    with ExitStack() as stack:
        fast = stack.enter_context(running_server(folder))
        slow = stack.enter_context(running_server(folder, LATENCY_SECONDS, BYTES_PER_SECOND))
        servers = {"local": "", "fast": fast, "slow": slow}
        race = stack.enter_context(Race(folder, peers, payloads, servers, limit_seconds))
        for payload in payloads.values():
            for system in systems_of(payload.name):
                print(f"writing {payload.name} for {system}", file=sys.stderr)
                if system == "ours":
                    write(folder, payload, system)
                else:
                    words = [str(folder), payload.name, str(payload.num_samples), system]
                    race.call(system, "readers.payloads", *words)
        for path in folder.joinpath("bucket").rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    while file.read(PART_BYTES):
                        pass
        yield race


def run_all(race: Race, cells: list[tuple[str, str, int]], repeats: int) -> None:
    """Every cell, again and again; systems take turns inside it."""
    for repeat in range(repeats):
        print(f"repeat {repeat + 1} of {repeats}", file=sys.stderr)
        for payload, source in dict.fromkeys((payload, source) for payload, source, _ in cells):
            workers = [each for *where, each in cells if where == [payload, source]]
            race.epoch(payload, source, "plain", 0)
            race.epoch(payload, source, "ours", 0)
            if _takes_few_requests(payload, source):
                for requests in FEW_REQUESTS:
                    race.few_requests(payload, source, requests)
            for system in peers_of(payload, source):
                for number in workers:
                    if not repeat or race.contends(payload, source, system, number):
                        race.epoch(payload, source, system, number)
        if any(cell[:2] == ("points", "slow") for cell in cells):
            race.steps("ours", 0)
            for system in peers_of("points", "slow") if not repeat else ():
                race.steps(system, 2)


def compare(race: Race, cells: list[tuple[str, str, int]]) -> dict[str, dict[str, Any]]:
    """By cell: ours, the best peer, and the ratios."""
    table = {}
    for payload, source, workers in cells:
        ours = {
            figure: race.median(payload, source, "ours", 0, figure)
            for figure in ("samples_per_second", "cpu_microseconds_a_sample", "first_batch_seconds", "peak_mib")
        }
        peers = {
            system: {figure: race.median(payload, source, system, workers, figure) for figure in ours}
            for system in peers_of(payload, source)
        }
        fastest = max(peers, key=lambda system: peers[system]["samples_per_second"] or 0.0)
        thriftiest = min(peers, key=lambda system: peers[system]["cpu_microseconds_a_sample"] or math.inf)
        # by bytes that came: a little of an epoch may still be in memory from the one before
        shares, plain = {}, race.median(payload, source, "plain", 0, "bytes_per_second")
        for requests in (None, *FEW_REQUESTS):
            rates = [
                race.median(payload, source, _with_requests(system, requests), 0, "bytes_per_second")
                for system in ("ours", "plain")
            ]
            shares[requests] = ratio(rates[0] or 1e-9, rates[1])
        table[f"{payload}/{source}/{workers}"] = {
            "ours": ours,
            "peers": peers,
            "plain_bytes_per_second": plain,
            "fastest_peer": fastest,
            # where ours failed it is no faster than anything
            "speed_ratio": ratio(ours["samples_per_second"] or 1e-9, peers[fastest]["samples_per_second"]),
            "thriftiest_peer": thriftiest,
            "cpu_ratio": ratio(ours["cpu_microseconds_a_sample"], peers[thriftiest]["cpu_microseconds_a_sample"]),
            "share_of_plain": shares[None],
            "share_of_plain_by_requests": {
                str(requests): shares[requests] for requests in FEW_REQUESTS if shares[requests]
            },
        }
    return table


def ratio(value: float | None, other: float | None) -> float | None:
    """None where one of them could not be measured."""
    return value / other if value and other else None


def geometric_mean(values: list[float]) -> float | None:
    """None where there is none."""
    return statistics.geometric_mean(values) if values else None


def mixture() -> dict[str, dict[str, float]]:
    """How well the default lanes and windows mix a corpus sorted by class, beside a permutation of all its rows."""
    config = StreamConfig()
    order = Order(MIXED_ROWS, MIXED_UNIT_SAMPLES, config.window_units, seed=0)
    lanes = Lanes(MIXED_ROWS, BATCH, config.lanes)
    batch, offset = np.divmod(np.arange(lanes.num_batches * BATCH, dtype=np.int64), BATCH)
    random = np.random.default_rng(0)
    sequences = {
        "ours": order.samples(0, lanes.positions(batch, offset)),
        "full permutation": random.permutation(MIXED_ROWS),
    }
    # forty classes of unequal size, one after the other
    shares = random.dirichlet(np.full(40, 2.0))
    class_of_row = np.searchsorted(np.cumsum(shares), (np.arange(MIXED_ROWS) + 0.5) / MIXED_ROWS)
    found = {}
    for name, rows in sequences.items():
        in_batches = rows.reshape(-1, BATCH)
        counts = np.stack([np.bincount(classes, minlength=41) for classes in class_of_row[in_batches]])[:, :40]
        expected = BATCH * np.bincount(class_of_row, minlength=41)[:40] / MIXED_ROWS
        close = np.abs(in_batches[:, :, None] - in_batches[:, None, :]) < MIXED_UNIT_SAMPLES
        found[name] = {
            "neighbour_distance": float(np.abs(np.diff(rows)).mean() / MIXED_ROWS),  # 1/3 when nothing is left of order
            "close_pairs": float((close.sum() - rows.size) / (in_batches.size * (BATCH - 1))),
            "classes_in_a_batch": float((counts > 0).sum(axis=1).mean()),
            "class_imbalance": float((((counts - expected) ** 2) / expected).sum(axis=1).mean() / 39),  # chi-square, 1
        }
    return found


def print_tables(race: Race, table: dict[str, dict[str, Any]], result: dict[str, Any]) -> None:
    """For people."""
    names = ["ours", *dict.fromkeys(system for row in table.values() for system in row["peers"])]
    figures = {
        "samples_per_second": "samples a second",
        "cpu_microseconds_a_sample": "processor microseconds a sample",
        "first_batch_seconds": "seconds to the first batch",
        "peak_mib": "peak memory, MiB above that of the imports",
    }
    for figure, title in figures.items():
        print(f"\n{title}\n{'cell':<18}" + "".join(f"{name:>17}" for name in ["plain GETs", *names]))
        for cell, row in table.items():
            payload, source, _ = cell.split("/")
            values = [race.median(payload, source, "plain", 0, figure), row["ours"][figure]]
            values += [row["peers"].get(name, {}).get(figure) for name in names[1:]]
            digits = 2 if figure == "first_batch_seconds" else 0
            words = [f"{'-' if value is None else format(value, f',.{digits}f'):>17}" for value in values]
            print(f"{cell:<18}" + "".join(words))
    print(f"\n{'cell':<18}{'speed':>8}{'beside':>17}{'processor':>11}{'beside':>17}{'of plain GETs':>15}")
    for cell, row in table.items():
        shown = {
            name: "-" if row[name] is None else f"{row[name]:.2f}" for name in row if name[-5:] in ("ratio", "plain")
        }
        print(
            f"{cell:<18}{shown['speed_ratio']:>8}{row['fastest_peer']:>17}{shown['cpu_ratio']:>11}"
            f"{row['thriftiest_peer']:>17}{shown['share_of_plain']:>15}"
        )
    for cell, row in table.items():
        shares = {requests: share for requests, share in row["share_of_plain_by_requests"].items() if share is not None}
        if shares and cell.endswith("/0"):
            words = [f"{share:.2f} with {requests}" for requests, share in shares.items()]
            print(f"{cell}: of plain GETs, {', '.join(words)} requests under way")
    if result["data_wait"]:
        print(
            f"\nshare of wall time waited for data, {STEP_BATCH} points a step of 25 ms, slow server (peers: 2 workers)"
        )
        print("  ".join(f"{system} {share:.1%}" for system, share in result["data_wait"].items() if share is not None))
    print(f"\norder of {MIXED_ROWS:,} rows sorted by class, batches of {BATCH}")
    for name, found in result["mixture"].items():
        print(f"{name:<18}" + "  ".join(f"{key.replace('_', ' ')} {value:.3g}" for key, value in found.items()))
    opening = result["opening"]
    print("\n10^9 samples, from the list of rows to the first batch: " + ", ".join(
        f"{1e3 * seconds:.0f} ms at {int(position):,}" for position, seconds in opening["seconds_by_position"].items()
    ))  # fmt: skip
    print(
        f"{opening['peak_mb']:.0f} MB; the manifest of so many shards is {opening['manifest_mb']:.0f} MB and parsed in "
        f"{opening['manifest_seconds']:.1f} s (not in these figures)"
    )
    for failure in race.failures:
        print(f"failed: {failure}")


def judge(race: Race, table: dict[str, dict[str, Any]], result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The targets."""

    def target(value: float | None, wanted: float, better: str, reason: str = "not measured") -> dict[str, Any]:
        if value is None:
            return {"value": None, "target": wanted, "better": better, "ok": None, "reason": reason}
        return {
            "value": value,
            "target": wanted,
            "better": better,
            "ok": value >= wanted if better == "higher" else value <= wanted,
        }

    speeds = [row["speed_ratio"] for row in table.values() if row["speed_ratio"]]
    thrifts = [row["cpu_ratio"] for row in table.values() if row["cpu_ratio"]]
    shares = {}
    for cell, row in table.items():
        payload, source, _ = cell.split("/")
        if source in SHARE_OF_PLAIN:
            entry = target(row["share_of_plain"], SHARE_OF_PLAIN[source], "higher")
            if payload == "views":
                compressed = result["views_compressed_times"]
                entry["ok"] = None
                entry["reason"] = f"zstd made them {compressed:.0f} times smaller: unpacking takes longer than any GET"
            shares[f"share_of_plain_gets_{payload}_{source}"] = entry
            for requests, share in (
                row["share_of_plain_by_requests"].items() if _takes_few_requests(payload, source) else ()
            ):
                name = f"share_of_plain_gets_{payload}_{source}_{requests}_requests"
                shares[name] = target(share, SHARE_OF_PLAIN[source], "higher")
    firsts = [row["ours"]["first_batch_seconds"] for cell, row in table.items() if "/slow/" in cell]
    excess = [
        row["ours"]["peak_mib"] - 1024 * SETTINGS[cell.split("/")[0]]["memory_gib"]
        for cell, row in table.items()
        if row["ours"]["peak_mib"]
    ]
    opening = result["opening"]
    return {
        "speed_beside_best_peer_geometric_mean": target(geometric_mean(speeds), SPEED_GEOMETRIC_MEAN, "higher"),
        "speed_beside_best_peer_worst_cell": target(min(speeds, default=None), SPEED_WORST_CELL, "higher"),
        "processor_beside_best_peer_geometric_mean": target(geometric_mean(thrifts), CPU_GEOMETRIC_MEAN, "lower"),
        **shares,
        "data_wait_share": target(result["data_wait"].get("ours"), DATA_WAIT_SHARE, "lower"),
        "first_batch_seconds_worst_payload": target(
            max(filter(None, firsts), default=None), FIRST_BATCH_SECONDS, "lower"
        ),
        "peak_mib_beyond_the_bound_worst_cell": target(max(excess, default=None), MIB_BEYOND_THE_BOUND, "lower"),
        "opening_seconds_worst_position": target(
            max(opening["seconds_by_position"].values()), OPENING_SECONDS, "lower"
        ),
        "opening_mb": target(opening["peak_mb"], OPENING_MB, "lower"),
    }


def peer_versions(peers: Path) -> dict[str, str]:
    """Of the peers' packages; an error that says how to install them."""
    program = (
        "import json; from importlib.metadata import version; "
        f"print(json.dumps({{name: version(name) for name in {PEER_PACKAGES}}}))"
    )
    try:
        answer = subprocess.run([peers, "-c", program], check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(
            f"{peers} does not have {', '.join(PEER_PACKAGES)}. `make .venv-bench` makes an environment that has; or name "
            f"another with --peers."
        ) from error
    found: dict[str, str] = json.loads(answer)
    return found


def main() -> int:
    """Measures, prints the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one repeat of short runs: rough figures")
    parser.add_argument("--cells", nargs="+", default=["*"], metavar="PATTERN", help="as in 'points/*' or '*/slow/2'")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the samples here for the next run (9 GB)")
    default_peers = REPOSITORY / ".venv-bench" / "bin" / "python"
    parser.add_argument(
        "--peers", type=Path, metavar="PYTHON", default=default_peers if default_peers.exists() else Path(sys.executable),
        help="interpreter of the environment with the peers (default: .venv-bench, else this one)",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="exit with 1 unless every target holds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the last line to a file")
    arguments = parser.parse_args()
    cells = [
        (payload, source, workers)
        for payload in PAYLOADS
        for source in SOURCES
        for workers in WORKERS
        if any(fnmatch(f"{payload}/{source}/{workers}", pattern) for pattern in arguments.cells)
    ]
    if not cells:
        parser.error(f"no cell is called {' or '.join(arguments.cells)}; points/local/0 is one")

    versions = {package: version(package) for package in ("torch", "numpy", "zarr", "s3fs")}
    versions |= peer_versions(arguments.peers)
    payloads = {name: PAYLOADS[name] for name in dict.fromkeys(payload for payload, *_ in cells)}
    load_before = os.getloadavg()[0]
    with ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        limit_seconds = LIMIT_SECONDS["quick" if arguments.quick else "full"]
        race = stack.enter_context(prepared(folder.resolve(), arguments.peers, payloads, limit_seconds))
        run_all(race, cells, 1 if arguments.quick else arguments.repeats)
        opening = json.loads(race.call("ours", "readers.giant"))
        compressed = compressed_times(race.folder, payloads["views"]) if "views" in payloads else None

    table = compare(race, cells)
    waits = {system: [run["data_wait_share"] for run in runs if run] for system, runs in race.waits.items()}
    result: dict[str, Any] = {
        "benchmark": "stream",
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": versions,
        "samples": {name: payload.num_samples for name, payload in payloads.items()},
        "repeats": 1 if arguments.quick else arguments.repeats,
        "load_average": [load_before, os.getloadavg()[0]],
        "cells": table,
        "data_wait": {system: statistics.median(shares) if shares else None for system, shares in waits.items()},
        "mixture": mixture(),
        "opening": opening,
        "views_compressed_times": compressed,
        "failures": race.failures,
    }
    result["targets"] = judge(race, table, result)
    print_tables(race, table, result)
    print()
    for name, entry in result["targets"].items():
        value = "not measured" if entry["value"] is None else f"{entry['value']:.3g}"
        sign = ">=" if entry["better"] == "higher" else "<="
        word = {True: "ok", False: "MISSED", None: f"- {entry.get('reason')}"}[entry["ok"]]
        print(f"{name:<46}{value:>8} {sign} {entry['target']:<6.3g}{word}")
    line = json.dumps(result)
    print(line)
    if arguments.json:
        arguments.json.write_text(line + "\n")
    return 1 if arguments.check and any(entry["ok"] is False for entry in result["targets"].values()) else 0


def compressed_times(folder: Path, payload: Payload) -> float:
    """How many times smaller our views lie than they are delivered."""
    stored = sum(path.stat().st_size for path in (folder / "bucket" / "views" / "ours" / "views").rglob("*"))
    return payload.num_samples * payload.sample_bytes / stored


if __name__ == "__main__":
    sys.exit(main())
