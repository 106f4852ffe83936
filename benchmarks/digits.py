r"""Digits, pretrained and probed over seeds: the figures of the book's first training
chapter.

    python benchmarks/digits.py                      # results/digits-pretrain.json
    python benchmarks/digits.py --seeds 0 1 2 3 --mask-ratio 0.5 --output
    results/digits-ratio-0.5.json

Pretrains the ``digits`` preset once for each seed (minutes each on two CPU cores),
evaluates each run as ``crate evaluate`` does, and writes the losses and accuracies of
every seed with their means, standard deviations over pretraining seeds, and provenance.
Runs go to ``--runs`` and are continued or reused when they are there.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from crate_core.evaluation.evaluate import evaluate
from crate_core.records import RUN_FILE, device_name, provenance, write_json
from crate_core.training.pretrain import pretrain
from crate_core.training.recipe import PretrainConfig


def spread(values: list[float]) -> dict[str, Any]:
    """Mean, sample standard deviation and all values."""
    return {
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "values": values,
    }


def started_from(run: Path) -> str:
    """The commit that a run was first started from."""
    return json.loads((run / RUN_FILE).read_text())["starts"][0]["commit"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Pretrain and probe the digits preset over seeds."
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--mask-ratio", type=float, default=0.75)
    parser.add_argument("--probe-seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-digits"))
    parser.add_argument(
        "--output", type=Path, default=Path("results/digits-pretrain.json")
    )
    options = parser.parse_args()

    # Taken now: a checkout can move on while the runs go on.
    origin = provenance(
        shlex.join(["python", "benchmarks/digits.py", *sys.argv[1:]]),
        device_name(torch.device("cpu")),
    )
    runs = []
    for seed in options.seeds:
        config = PretrainConfig.from_preset(
            "digits",
            seed=seed,
            mask_ratio=options.mask_ratio,
            device="cpu",
            output_dir=str(options.runs / f"ratio-{options.mask_ratio:g}-seed-{seed}"),
        )
        wall, processor = time.perf_counter(), time.process_time()
        result = pretrain(config, progress=sys.stderr.isatty())
        seconds = {
            "wall": round(time.perf_counter() - wall, 1),
            "processor": round(time.process_time() - processor, 1),
        }
        record = evaluate(result.output_dir, seeds=options.probe_seeds)
        runs.append((result, record, seconds))

    first = runs[0][1]
    probes = {
        row: {
            column: spread(
                [record["linear_probe"][row][column]["mean"] for _, record, _ in runs]
            )
            for column in columns
        }
        for row, columns in first["linear_probe"].items()
    }
    content = {
        "preset": "digits",
        "config": {**config.identity(), "seed": "see seeds"},
        "description": first["description"],
        "seeds": options.seeds,
        "probe_seeds": first["seeds"],
        "spread": "over pretraining seeds, of means over probe seeds",
        "steps": [result.steps for result, _, _ in runs],
        "pretraining_seconds": [seconds for _, _, seconds in runs],
        "commits": [started_from(result.output_dir) for result, _, _ in runs],
        "train_loss": spread([result.train_loss for result, _, _ in runs]),
        "held_out_loss": spread([result.held_out_loss for result, _, _ in runs]),
        "trivial_loss": {
            "mean_patch": runs[0][0].trivial.mean_patch,
            "mean_picture": runs[0][0].trivial.mean_picture,
        },
        "linear_probe": probes,
        "linear_probe_by_run": [record["linear_probe"] for _, record, _ in runs],
        "reconstruction_by_run": [record["reconstruction"] for _, record, _ in runs],
        **origin,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, content)
    for row, columns in probes.items():
        print(
            f"{row:28}"
            + "".join(
                f"{100 * s['mean']:8.1f} ± {100 * s['std']:.1f}"
                for s in columns.values()
            )
        )
    print(
        f"train loss {content['train_loss']}, held out "
        f"{content['held_out_loss']}; written to {options.output}"
    )


if __name__ == "__main__":
    main()
