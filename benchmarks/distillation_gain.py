"""What each method adds on the demo corpus: its demo over several seeds, through the launcher as a user runs it.

    python benchmarks/distillation_gain.py [--jobs pointmcd pointcmt i2p_mae crosspoint] [--seeds 0 1 2] [--nodes 4]
        [--check] [--json FILE]

Each seed trains students from the same weights and over the same batches, with the method's term and, where the recipe
compares them, without it; a linear SVM scores both and the untrained network on the test split. Corpus, teachers and what
else a job needs are made once. A run that was interrupted goes on where it stopped.
"""

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from trainer.config import load_recipe

JOBS = ("pointmcd", "pointcmt", "i2p_mae", "crosspoint")
TARGET_POINTS_ABOVE_RANDOM = 5.0
PROTOCOL = "svm@heldout"
TRAINED, RANDOM = "trained", "random weights"
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t at 97.5 %, by degrees of freedom: half the width of a 95 % interval in standard errors."""


def accuracies(job: str, runs: Path, seed: int, nodes: int, assignments: list[str]) -> dict[str, float]:
    """Percent right on the test split, by arm, of one seed's run."""
    name = f"gain-{job}-{seed}"
    command = [
        str(Path(sys.executable).parent / "viewpoint"), "launch", job, "--nodes", str(nodes), "--runs", str(runs), "--run", name,
        "--set", f"seed={seed}", *(word for assignment in assignments for word in ("--set", assignment)),
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=sys.stderr)
    run = runs / name
    arms = load_recipe(job, demo=True).comparisons
    records = {
        TRAINED: run / "evaluation" / f"{PROTOCOL}.json",
        **{arm.replace("_", " "): run / "arms" / arm / "evaluation" / f"{PROTOCOL}.json" for arm in arms},
        RANDOM: run / "evaluation" / f"{PROTOCOL}.random_weights.json",
    }
    return {arm: 100 * json.loads(path.read_text())["accuracy"] for arm, path in records.items()}


def interval(differences: list[float]) -> str:
    """The mean with its 95 % interval, or the one value that there is."""
    mean = statistics.mean(differences)
    if len(differences) < 2 or len(differences) - 1 not in T_95:
        return f"{mean:+.1f}"
    half = T_95[len(differences) - 1] * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.1f} (95 % interval {mean - half:+.1f} to {mean + half:+.1f})"


def table_of(job: str, rows: dict[int, dict[str, float]]) -> str:
    """A job's scores for people, with what the method adds."""
    arms = list(next(iter(rows.values())))
    lines = [f"{job}: linear SVM ({PROTOCOL}) on the demo corpus' test split, percent right", ""]
    lines.append(f"{'seed':>6}  " + "  ".join(f"{arm:>18}" for arm in arms))
    lines += [f"{seed:>6}  " + "  ".join(f"{row[arm]:>18.1f}" for arm in arms) for seed, row in rows.items()]
    lines.append(
        f"{'mean':>6}  " + "  ".join(f"{statistics.mean(row[arm] for row in rows.values()):>18.1f}" for arm in arms)
    )
    lines.append("")
    for arm in arms[1:]:
        paired = interval([row[TRAINED] - row[arm] for row in rows.values()])
        target = (
            f"target: at least {TARGET_POINTS_ABOVE_RANDOM:.0f}" if arm == RANDOM else "no target: whatever its sign"
        )
        lines.append(f"trained above {arm}, paired: {paired} points ({target})")
    return "\n".join(lines)


def main() -> int:
    """Runs every job and seed, prints the tables and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), metavar="JOB", help=", ".join(JOBS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs lie (default: runs)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe, as `viewpoint launch --set`"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 unless every target holds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the last line to a file")
    arguments = parser.parse_args()

    tables: dict[str, dict[int, dict[str, float]]] = {}
    for job in arguments.jobs:
        tables[job] = {
            seed: accuracies(job, arguments.runs, seed, arguments.nodes, arguments.set) for seed in arguments.seeds
        }
        print(table_of(job, tables[job]) + "\n", flush=True)

    targets = {}
    for job, rows in tables.items():
        gain = statistics.mean(row[TRAINED] - row[RANDOM] for row in rows.values())
        targets[f"{job}_points_above_random_weights"] = {
            "value": gain,
            "target": TARGET_POINTS_ABOVE_RANDOM,
            "better": "higher",
            "ok": gain >= TARGET_POINTS_ABOVE_RANDOM,
        }
    result: dict[str, Any] = {
        "benchmark": "distillation_gain",
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {package: version(package) for package in ("torch", "deepspeed", "timm", "scikit-learn")},
        "jobs": {job: {str(seed): row for seed, row in rows.items()} for job, rows in tables.items()},
        "targets": targets,
    }
    line = json.dumps(result)
    print(line)
    if arguments.json:
        arguments.json.write_text(line + "\n")
    return 0 if all(target["ok"] for target in targets.values()) or not arguments.check else 1


if __name__ == "__main__":
    sys.exit(main())
