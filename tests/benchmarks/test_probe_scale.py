"""The demonstration at ImageNet's width, in miniature."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="memory is read from /proc"
)
def test_miniature_is_judged_between_chance_and_the_best(tmp_path: Path) -> None:
    output = tmp_path / "scale.json"
    subprocess.run(
        [
            sys.executable,
            "benchmarks/probe_scale.py",
            *("--rows", "2000", "--dim", "32", "--classes", "20"),
            *("--held-out", "400", "--separation", "0.5", "--output", str(output)),
        ],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    record = json.loads(output.read_text())
    best, chance = record["accuracy_of_nearest_mean"], record["chance"]
    sampling = 3 * (0.25 / record["held_out"]) ** 0.5
    for judged in ("probe", "neighbours"):
        assert chance + sampling < record[judged]["accuracy"] < best + sampling
    assert record["extrapolated_to_imagenet"]["rows"] == 1_281_167
