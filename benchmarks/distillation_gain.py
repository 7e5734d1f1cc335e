"""What distillation adds on the demo corpus: the PointMCD demo over several seeds, through the launcher as a user runs it.

    python benchmarks/distillation_gain.py [--seeds 0 1 2] [--nodes 4] [--check] [--json FILE]

Each seed trains two students from the same weights and over the same batches, with and without the distillation term, and
scores both and the untrained network with a linear SVM on the test split. The corpus and the teacher are made once. A run
that was interrupted goes on where it stopped.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

TARGET_POINTS_ABOVE_RANDOM = 5.0
PROTOCOL = "svm@heldout"


def accuracies(runs: Path, seed: int, nodes: int, assignments: list[str]) -> dict[str, float]:
    """Percent right on the test split, by arm, of one seed's run."""
    name = f"distillation-gain-{seed}"
    command = [
        str(Path(sys.executable).parent / "viewpoint"), "launch", "pointmcd", "--nodes", str(nodes), "--runs", str(runs), "--run", name,
        "--set", f"seed={seed}", *(word for assignment in assignments for word in ("--set", assignment)),
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=sys.stderr)
    run = runs / name
    records = {
        "distilled": run / "evaluation" / f"{PROTOCOL}.json",
        "distillation off": run / "arms" / "distillation_off" / "evaluation" / f"{PROTOCOL}.json",
        "random weights": run / "evaluation" / f"{PROTOCOL}.random_weights.json",
    }
    return {arm: 100 * json.loads(path.read_text())["accuracy"] for arm, path in records.items()}


def main() -> int:
    """Runs every seed, prints the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where runs lie (default: runs)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe, as `viewpoint launch --set`"
    )
    parser.add_argument("--check", action="store_true", help="exit with 1 unless every target holds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the last line to a file")
    arguments = parser.parse_args()

    table = {seed: accuracies(arguments.runs, seed, arguments.nodes, arguments.set) for seed in arguments.seeds}
    arms = list(next(iter(table.values())))
    print(f"Linear SVM ({PROTOCOL}) on the demo corpus' test split, percent right\n")
    print(f"{'seed':>6}  " + "  ".join(f"{arm:>16}" for arm in arms))
    for seed, row in table.items():
        print(f"{seed:>6}  " + "  ".join(f"{row[arm]:>16.1f}" for arm in arms))
    means = {arm: statistics.mean(row[arm] for row in table.values()) for arm in arms}
    print(f"{'mean':>6}  " + "  ".join(f"{means[arm]:>16.1f}" for arm in arms))

    above_random = means["distilled"] - means["random weights"]
    above_off = [row["distilled"] - row["distillation off"] for row in table.values()]
    print(
        f"\ndistilled above random weights: {above_random:+.1f} points (target: at least {TARGET_POINTS_ABOVE_RANDOM:.0f})"
    )
    spread = f" +- {statistics.stdev(above_off):.1f}" if len(above_off) > 1 else ""
    print(
        f"distilled above distillation off, paired: {statistics.mean(above_off):+.1f}{spread} points (no target: whatever its sign)"
    )

    ok = above_random >= TARGET_POINTS_ABOVE_RANDOM
    result: dict[str, Any] = {
        "benchmark": "distillation_gain",
        "device": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "versions": {package: version(package) for package in ("torch", "deepspeed", "timm", "scikit-learn")},
        "seeds": {str(seed): row for seed, row in table.items()},
        "targets": {
            "points_above_random_weights": {
                "value": above_random,
                "target": TARGET_POINTS_ABOVE_RANDOM,
                "better": "higher",
                "ok": ok,
            }
        },
    }
    line = json.dumps(result)
    print(line)
    if arguments.json:
        arguments.json.write_text(line + "\n")
    return 0 if ok or not arguments.check else 1


if __name__ == "__main__":
    sys.exit(main())
