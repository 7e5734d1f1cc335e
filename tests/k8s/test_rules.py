"""Alerts fire when they should and not before, by Prometheus' own tool."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.k8s.golden import GOLDEN, documents

RUN = 'run="a",rank="0"'

# alert -> series as promtool writes them (value x repeats, a minute each), when it is silent, when it fires
CASES: dict[str, tuple[dict[str, str], int, int]] = {
    "ViewpointNoStep": ({f"viewpoint_last_step_timestamp_seconds{{{RUN}}}": "60+60x9 600x20"}, 9, 20),
    "ViewpointRestartsOften": ({f'viewpoint_restarts_total{{{RUN},cause="node_lost"}}': "0x9 4x40"}, 9, 20),
    "ViewpointCheckpointOld": (
        {f"viewpoint_checkpoint_committed_timestamp_seconds{{{RUN}}}": "60+60x9 600x30"},
        15,
        30,
    ),
    "ViewpointDataWait": (
        {
            f'viewpoint_time_seconds_total{{{RUN},bucket="data_wait"}}': "0+20x60",
            f'viewpoint_time_seconds_total{{{RUN},bucket="forward"}}': "0+40x60",
        },
        5,
        40,
    ),
    "ViewpointGoodputLow": ({f"viewpoint_goodput_ratio{{{RUN}}}": "0.5x60"}, 20, 40),
    "ViewpointLossNotFinite": ({f'viewpoint_loss{{{RUN},term="a"}}': f"1x9 {'NaN ' * 20}"}, 9, 15),
    "ViewpointStraggler": (
        {
            f'viewpoint_step_phase_seconds{{run="a",rank="{rank}",phase="forward"}}': f"{seconds}x60"
            for rank, seconds in enumerate((1, 1, 1.5))
        },
        5,
        20,
    ),
    "ViewpointWorldSmall": ({f"viewpoint_world_size{{{RUN}}}": "4x9 3x40"}, 9, 30),
}


def groups() -> dict[str, Any]:
    (rules,) = (each for each in documents(GOLDEN / "overlays-monitoring.yaml") if each["kind"] == "PrometheusRule")
    spec: dict[str, Any] = rules["spec"]
    return spec


def test_every_alert_has_a_case() -> None:
    alerts = {rule["alert"] for group in groups()["groups"] for rule in group["rules"] if "alert" in rule}
    assert alerts == set(CASES)


def fires(alert: str, minutes: int, folder: Path) -> bool:
    """Whether promtool finds the alert firing: its test expects none."""
    if shutil.which("promtool") is None:
        raise FileNotFoundError("promtool is missing. Debian and Ubuntu: `apt-get install prometheus`.")
    series, _, _ = CASES[alert]
    (folder / "rules.yaml").write_text(yaml.safe_dump(groups()))
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "alert_rule_test": [{"eval_time": f"{minutes}m", "alertname": alert, "exp_alerts": []}],
        }
    ]
    (folder / "test.yaml").write_text(
        yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests})
    )
    done = subprocess.run(
        ["promtool", "test", "rules", str(folder / "test.yaml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 or "exp:[" in done.stdout + done.stderr, done.stdout + done.stderr
    return done.returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("alert", CASES)
def test_an_alert_is_silent_first_and_fires_then(alert: str, tmp_path: Path) -> None:
    _, silent, firing = CASES[alert]
    assert not fires(alert, silent, tmp_path)
    assert fires(alert, firing, tmp_path)
