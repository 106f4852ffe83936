r"""The band of normal training losses of a preset, from the metrics logs of unchanged
runs over seeds.

    python benchmarks/expected_loss.py --preset digits                        # trains
    what is missing: 3 x 2.5 minutes python benchmarks/expected_loss.py --preset
    cifar10-tiny --from runs/cifar10/crate-epochs-6-seed-*

Writes ``results/expected-loss.json`` (bands and where they come from) and
``crate_core/training/expected_loss.json`` (the bands alone, which the package carries
so that a run can say whether its loss is normal).  Other presets' bands stay.
"""

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from crate_core.records import RUN_FILE, device_name, provenance, write_json
from crate_core.training.expected import EXPECTED_FILE, loss_band
from crate_core.training.pretrain import pretrain
from crate_core.training.recipe import Plan, PretrainConfig
from crate_core.training.run_directory import RunDirectory

RESULTS = Path("results/expected-loss.json")


def finished(
    run: Path, preset: str
) -> tuple[PretrainConfig, int, list[dict[str, Any]]]:
    """Configuration, training pictures and log of a finished run of the preset; exits
    with a message otherwise.
    """
    record = json.loads((run / RUN_FILE).read_text())
    config = PretrainConfig.from_dict(record["config"])
    pictures = record["identity"]["training pictures"]
    summary = RunDirectory(run).summary()
    whole = PretrainConfig.from_preset(preset)
    if config.preset != preset or Plan(config, pictures).differing():
        sys.exit(f"{run} is not an unchanged run of {preset}")
    if summary is None or summary["steps"] != Plan(whole, pictures).steps:
        sys.exit(f"{run} is not finished")
    return config, pictures, RunDirectory(run).logged()


def without_folders(command: str) -> str:
    """A recorded command with absolute paths cut down to their last name."""
    return re.sub(r"(?<![^\s:'])/[^\s:']*/([^/\s']+)", r"\1", command)


def bands_in(path: Path) -> dict[str, Any]:
    """Bands that a file holds already."""
    return json.loads(path.read_text())["presets"] if path.is_file() else {}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Normal training losses of a preset, from logs over seeds."
    )
    parser.add_argument("--preset", default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/expected-loss"))
    parser.add_argument(
        "--from",
        dest="directories",
        type=Path,
        nargs="+",
        help="finished runs; nothing is trained",
    )
    options = parser.parse_args()

    command = without_folders(
        shlex.join(["python", "benchmarks/expected_loss.py", *sys.argv[1:]])
    )
    origin = provenance(command, device_name(torch.device("cpu")))
    directories = options.directories
    if directories is None:
        directories = [
            options.runs / f"{options.preset}-seed-{seed}" for seed in options.seeds
        ]
        for seed, directory in zip(options.seeds, directories, strict=True):
            config = PretrainConfig.from_preset(
                options.preset, seed=seed, device="cpu", output_dir=str(directory)
            )
            pretrain(config, progress=sys.stderr.isatty())
    runs = [finished(directory, options.preset) for directory in directories]
    counts = {pictures for _, pictures, _ in runs}
    if len(counts) != 1:
        sys.exit(f"the runs have different numbers of pictures: {sorted(counts)}")
    logs = [log for _, _, log in runs]
    band = {
        "pictures": counts.pop(),
        "seeds": [config.seed for config, _, _ in runs],
        "steps": logs[0][-1]["step"],
        "points": loss_band(logs),
    }
    starts = [json.loads((d / RUN_FILE).read_text())["starts"][0] for d in directories]
    for start in starts:
        start["command"] = without_folders(start["command"])
    evidence = {
        **band,
        "last_line": [log[-1]["loss"] for log in logs],
        "runs": [
            {name: start[name] for name in ("command", "commit", "device", "versions")}
            for start in starts
        ],
        **origin,
    }
    write_json(RESULTS, {"presets": {**bands_in(RESULTS), options.preset: evidence}})
    write_json(
        EXPECTED_FILE, {"presets": {**bands_in(EXPECTED_FILE), options.preset: band}}
    )
    for point in band["points"]:
        print(
            f"epoch {point['epoch']:9.3f}   {point['low']:.3f} to {point['high']:.3f}"
        )
    print(f"written to {RESULTS} and {EXPECTED_FILE.name} in the package")


if __name__ == "__main__":
    main()
