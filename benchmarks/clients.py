"""How fast a client fetches ranges of objects, and at what cost: ours beside plain HTTP, obstore and s3fs.

    python benchmarks/clients.py [--repeats 3] [--peers PYTHON] [--check] [--json FILE]

Each client fetches the same 256 MiB in ranges of 4 MiB, 8 at a time from a server on loopback and 32 at a time from the
same server 25 ms and 100 MB/s a connection away, in a process of its own, in turns. Then ours with other numbers of ranges
at a time and other sizes of parts: the defaults of `data.fetch` come from there. About two minutes.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).parent.parent
MIB: Final = 2**20
OBJECT_MIB, NUM_OBJECTS = 64, 4
RANGE_MIB: Final = 4
LATENCY_SECONDS, BYTES_PER_SECOND = 0.025, 100e6  # of the slow server
AT_ONCE: Final = {"fast": 8, "slow": 32}
CLIENTS: Final = ("ours", "plain HTTP", "obstore", "s3fs")
OF_THE_PEERS: Final = ("obstore",)
SWEPT_AT_ONCE: Final = (1, 2, 4, 8, 16, 32, 64)
SWEPT_PART_MIB: Final = (1, 2, 4, 8, 16, 32)
CPU_BESIDE_BEST: Final = 1.0

Range = tuple[str, int, int]


def _ours(url: str, at_once: int, part_mib: float) -> Callable[[Range], int]:
    sys.path.insert(0, str(REPOSITORY))
    from datastore.fetch import FetchConfig, Fetcher
    from datastore.objects import ObjectFolder

    config = FetchConfig(part_mib=part_mib, requests_near=at_once, requests_far=at_once)
    fetcher = Fetcher(ObjectFolder("s3://bucket"), config)
    return lambda one: len(fetcher.fetch(*one, lambda _: None))


def _plain(url: str, at_once: int, part_mib: float) -> Callable[[Range], int]:
    import http.client
    import threading
    from urllib.parse import urlsplit

    own = threading.local()

    def fetch(one: Range) -> int:
        name, start, end = one
        if not hasattr(own, "connection"):
            own.connection = http.client.HTTPConnection(urlsplit(url).netloc)
        own.connection.request("GET", f"/bucket/{name}", headers={"Range": f"bytes={start}-{end - 1}"})
        return len(own.connection.getresponse().read())

    return fetch


def _obstore(url: str, at_once: int, part_mib: float) -> Callable[[Range], int]:
    from obstore.store import S3Store

    store = S3Store(
        "bucket", endpoint=url, region="us-east-1", access_key_id="any", secret_access_key="any",
        virtual_hosted_style_request=False, client_options={"allow_http": True},
    )  # fmt: skip
    return lambda one: len(store.get_range(one[0], start=one[1], end=one[2]))


def _s3fs(url: str, at_once: int, part_mib: float) -> Callable[[Range], int]:
    import s3fs

    store = s3fs.S3FileSystem(endpoint_url=url, key="any", secret="any")
    return lambda one: len(store.cat_file(f"bucket/{one[0]}", start=one[1], end=one[2]))


def fetch_all(asked: dict[str, Any]) -> dict[str, float]:
    """In a process of its own: bytes a second, and processor seconds a GB."""
    url, at_once, range_mib = asked["url"], asked["at_once"], asked["range_mib"]
    os.environ |= {
        "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any", "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    makers = {"ours": _ours, "plain HTTP": _plain, "obstore": _obstore, "s3fs": _s3fs}
    fetch = makers[asked["client"]](url, at_once, asked["part_mib"])
    ranges = [
        (f"object-{number}", first * MIB, (first + range_mib) * MIB)
        for number in range(NUM_OBJECTS)
        for first in range(0, OBJECT_MIB, range_mib)
    ]
    with ThreadPoolExecutor(max(1, at_once * asked["part_mib"] // range_mib)) as pool:
        list(pool.map(fetch, ranges[: len(ranges) // 4]))  # connections are made, memory is there
        began, cpu = time.perf_counter(), time.process_time()
        came = sum(pool.map(fetch, ranges))
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    assert came == NUM_OBJECTS * OBJECT_MIB * MIB, f"{came:,} bytes came"
    return {"mb_per_second": came / seconds / 1e6, "cpu_seconds_a_gb": cpu / came * 1e9}


def run(peers: Path, client: str, url: str, at_once: int, part_mib: int = RANGE_MIB, range_mib: int = RANGE_MIB) -> Any:
    """What a process of its own measured."""
    asked = {"client": client, "url": url, "at_once": at_once, "part_mib": part_mib, "range_mib": range_mib}
    python = str(peers) if client in OF_THE_PEERS else sys.executable
    command = [python, __file__, "--fetch", json.dumps(asked)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def medians(found: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure."""
    return {name: statistics.median(each[name] for each in found) for name in found[0]}


def servers(folder: Path) -> Iterator[tuple[str, float, float]]:
    """Name, latency and rate of each."""
    yield "fast", 0.0, 0.0
    yield "slow", LATENCY_SECONDS, BYTES_PER_SECOND


def main() -> int:
    """Measures, prints tables and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    default_peers = REPOSITORY / ".venv-bench" / "bin" / "python"
    parser.add_argument(
        "--peers", type=Path, metavar="PYTHON", default=default_peers if default_peers.exists() else Path(sys.executable),
        help="interpreter of the environment with obstore (default: .venv-bench, else this one)",
    )  # fmt: skip
    parser.add_argument("--check", action="store_true", help="exit with 1 unless every target holds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the last line to a file")
    parser.add_argument("--fetch", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fetch:
        print(json.dumps(fetch_all(json.loads(arguments.fetch))))
        return 0
    from readers.object_server import running_server

    clients: dict[str, dict[str, dict[str, float]]] = {}
    at_once: dict[str, dict[str, float]] = {}
    parts: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "bucket").mkdir()
        for number in range(NUM_OBJECTS):
            (folder / "bucket" / f"object-{number}").write_bytes(os.urandom(OBJECT_MIB * MIB))
        for server, latency, rate in servers(folder):
            with running_server(folder, latency, rate) as url:
                found = defaultdict(list)
                for _ in range(arguments.repeats):
                    for client in CLIENTS:
                        found[client].append(run(arguments.peers, client, url, AT_ONCE[server]))
                clients[server] = {client: medians(each) for client, each in found.items()}
                sweeps = defaultdict(list)
                for _ in range(arguments.repeats):
                    for number in SWEPT_AT_ONCE:
                        sweeps[f"{number} at once"].append(run(arguments.peers, "ours", url, number))
                    for part in SWEPT_PART_MIB:
                        sweeps[f"parts of {part} MiB"].append(
                            run(arguments.peers, "ours", url, AT_ONCE[server], part, range_mib=32)
                        )
                swept = {name: medians(each)["mb_per_second"] for name, each in sweeps.items()}
                at_once[server] = {name: rate for name, rate in swept.items() if "at once" in name}
                parts[server] = {name: rate for name, rate in swept.items() if "parts" in name}
    print(f"{'server':<8}{'client':<14}{'MB/s':>8}{'processor s/GB':>16}")
    for server, table in clients.items():
        for client, row in table.items():
            print(f"{server:<8}{client:<14}{row['mb_per_second']:>8,.0f}{row['cpu_seconds_a_gb']:>16.2f}")
    for server in clients:
        for sweep in (at_once[server], parts[server]):
            print(f"{server}, ours, MB/s: " + "  ".join(f"{name} {value:,.0f}" for name, value in sweep.items()))
    targets = {}
    for server, table in clients.items():
        best = min(table[client]["cpu_seconds_a_gb"] for client in ("obstore", "s3fs"))
        value = table["ours"]["cpu_seconds_a_gb"] / best
        targets[f"processor_beside_best_s3_client_{server}"] = {
            "value": value, "target": CPU_BESIDE_BEST, "better": "lower", "ok": value <= CPU_BESIDE_BEST,
        }  # fmt: skip
    versions = subprocess.run(
        [arguments.peers, "-c", "import obstore; print(obstore.__version__)"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    import s3fs

    result = {
        "benchmark": "clients", "date": time.strftime("%Y-%m-%d"), "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(), "versions": {"obstore": versions, "s3fs": s3fs.__version__}, "clients": clients,
        "at_once": at_once, "parts": parts, "targets": targets,
    }  # fmt: skip
    line = json.dumps(result)
    if arguments.json:
        arguments.json.write_text(line + "\n")
    print(line)
    return int(arguments.check and not all(each["ok"] for each in targets.values()))


if __name__ == "__main__":
    sys.exit(main())
