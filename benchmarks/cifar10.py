r"""CIFAR-10: CRATE-MAE beside a ViT-MAE of as many parameters, and one change at a time.

    python benchmarks/cifar10.py --data hf:PATH/cifar10-train.parquet
    python benchmarks/cifar10.py --data hf:PATH/cifar10-train.parquet --group ablations
    python benchmarks/cifar10.py --data hf:PATH/cifar10-train.parquet --variants crate vit --epochs 200 --device cuda

Pretrains every variant once for each seed with the same budget, evaluates each run as ``crate evaluate`` does,
beside an untrained network and pixels, and writes losses and accuracies of every seed with provenance.  Runs go to ``--runs``;
finished ones are reused, others continued.  The figures in ``results/`` come from two CPU cores: six epochs for the
comparison (about ten minutes of one core a run), two for each ablation.
"""

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from crate_core.evaluate import evaluate
from crate_core.recipes import PretrainConfig
from crate_core.runs import RUN_FILE, device_name, provenance, write_json
from crate_core.train import pretrain

COMPARISON: Mapping[str, Mapping[str, Any]] = {
    "crate": {},
    "vit": {"preset": "cifar10-tiny-vit"},
}
"""Same budget, seeds and data; as many parameters within 3 %."""

ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "crate": {},
    "vit": {"preset": "cifar10-tiny-vit"},
    "separate values": {"model.separate_values": True},
    "visible tokens only": {"model.encode_visible_only": True},
    "masking ratio 0.5": {"mask_ratio": 0.5},
    "masking ratio 0.9": {"mask_ratio": 0.9},
    "lambda 0": {"model.lambd": 0.0},
    "lambda 2": {"model.lambd": 2.0},
    "eta 0.02": {"model.eta": 0.02},
    "eta 0.5": {"model.eta": 0.5},
    "2 layers": {"model.depth": 2},
    "6 layers": {"model.depth": 6},
    "RMSNorm": {"model.norm": "rms"},
    "no norm": {"model.norm": "none"},
    "over-complete, residual": {"model.expansion": 4},
    "decoder of 1 layer": {"model.decoder_depth": 1},
}
"""CRATE-MAE changed in one field at a time, and the ViT-MAE at the ablations' budget."""

GROUPS = {"comparison": (COMPARISON, 6.0), "ablations": (ABLATIONS, 2.0)}
"""Variants and epochs."""


def configure(changes: Mapping[str, Any], seed: int, output_dir: Path, options: argparse.Namespace) -> PretrainConfig:
    """The run of one variant; ``model.NAME`` changes a field of the model."""
    own = {name: value for name, value in changes.items() if name != "preset" and not name.startswith("model.")}
    inner = {name.removeprefix("model."): value for name, value in changes.items() if name.startswith("model.")}
    config = PretrainConfig.from_preset(
        changes.get("preset", "cifar10-tiny"),
        data=options.data,
        epochs=options.epochs,
        warmup_epochs=min(1.0, options.epochs / 6),
        seed=seed,
        device=options.device,
        precision="bf16",
        compile=True,
        output_dir=str(output_dir),
        **own,
    )
    return replace(config, model=replace(config.model, **inner))


def started_from(run: Path) -> str:
    """The commit that a run was first started from."""
    return json.loads((run / RUN_FILE).read_text())["starts"][0]["commit"]


def record_of(name: str, changes: Mapping[str, Any], seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train (or reuse) and evaluate one run."""
    directory = options.runs / f"{name.replace(' ', '-')}-epochs-{options.epochs:g}-seed-{seed}"
    result = pretrain(configure(changes, seed, directory, options), progress=False)
    record = {
        "seed": seed,
        "steps": result.steps,
        "train_loss": result.train_loss,
        "held_out_loss": result.held_out_loss,
        "commit": started_from(directory),
    }
    if options.train_only:
        return record
    return {**record, "evaluation": evaluate(directory, seeds=options.probe_seeds, device=options.device)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="as crate pretrain takes; torchvision:CIFAR10 downloads it")
    parser.add_argument("--group", choices=GROUPS, default="comparison")
    parser.add_argument("--variants", nargs="+", help="some of the group's; all unless given")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--probe-seeds", type=int, default=1)
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--train-only", action="store_true", help="write no results, only finish the runs")
    options = parser.parse_args()
    variants, epochs = GROUPS[options.group]
    options.epochs = options.epochs or epochs
    names = options.variants or list(variants)
    unknown = [name for name in names if name not in variants]
    if unknown:
        parser.error(f"unknown variants {unknown}; accepted are {list(variants)}")

    # Taken now: a checkout can move on while the runs go on.
    command = shlex.join(["python", "benchmarks/cifar10.py", *sys.argv[1:]])
    origin = provenance(command, device_name(torch.device(options.device)))
    models: dict[str, Any] = {}
    for name in names:
        runs = [record_of(name, variants[name], seed, options) for seed in options.seeds]
        models[name] = {"changes": dict(variants[name]), "runs": runs}
    if options.train_only:
        return
    output = options.output or Path("results") / (
        "cifar10.json" if options.group == "comparison" else "cifar10-ablations.json"
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    write_json(output, {"epochs": options.epochs, "seeds": options.seeds, "models": models, **origin})
    print(f"written to {output}")


if __name__ == "__main__":
    main()
