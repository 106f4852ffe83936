r"""CIFAR-10: the bundled CRATE-MAE beside a ViT-MAE of as many parameters.

    python benchmarks/cifar10.py --data hf:PATH/cifar10-train.parquet
    python benchmarks/cifar10.py --data hf:PATH/cifar10-train.parquet --group rates
        --seeds 0
    python benchmarks/cifar10.py --data hf:PATH/cifar10-train.parquet
        --epochs 200 --device cuda

Pretrains both once for each seed with the same budget, scores each run by completion,
linear probes, neighbours and fine-tuning, beside an untrained network and pixels, and
writes every seed's figures. Runs go to ``--runs``; finished ones are reused, others
continued.  The figures in ``results/`` come from two CPU cores: six epochs, eight to
thirteen minutes of one core a run.  The group ``rates`` is how their learning rates
were found: the first 300 steps, by their losses alone.

What layers are worth, all else equal, is for ``benchmarks/study.py``.
"""

import argparse
import json
import math
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crate_core.data.batches import some_pictures
from crate_core.data.named import open_data
from crate_core.data.sources import ImageData, SelectedImages
from crate_core.evaluation.features import encode, small_pixels
from crate_core.evaluation.finetune import finetune
from crate_core.evaluation.finetune_recipe import FinetuneConfig
from crate_core.evaluation.neighbours import neighbour_accuracy
from crate_core.evaluation.probe import probe_accuracy
from crate_core.model.autoencoder import MaskedAutoencoder
from crate_core.model.build import build_model, fresh_model, load_model
from crate_core.model.config import FrameConfig
from crate_core.model.cost import operation_counter
from crate_core.model.files import save_model
from crate_core.records import RUN_FILE, device_name, provenance, write_json
from crate_core.training.pretrain import pretrain
from crate_core.training.recipe import OPERATIONAL, PretrainConfig
from crate_core.training.run_directory import PretrainResult, RunDirectory, result_of
from crate_core.training.yardsticks import reconstruction_by_ratio

COMPARISON: Mapping[str, Mapping[str, Any]] = {
    "crate": {},
    "vit": {"preset": "cifar10-tiny-vit"},
}
"""Same budget, seeds and data; as many parameters within 3 %."""

LABELLED = 10_000
"""Labelled pictures that probes, neighbours and fine-tuning may see, of 50,000."""

FINETUNE: Mapping[str, Any] = {
    "epochs": 4.0,
    "warmup_ratio": 1 / 8,
    "precision": "bf16",
    "batch_size": 256,
    "lr": 1e-3,
}
"""Fine-tuning beside its preset: 156 steps, too few to reach a probe of the same
features; ``benchmarks/finetune.py`` has more.
"""

RATES: Mapping[str, Mapping[str, Any]] = {
    f"{name}, rate {lr:g}": {**changes, "lr": lr}
    for name, changes in COMPARISON.items()
    for lr in (1e-3, 2e-3, 6e-3)
}
"""The comparison's two models at other learning rates (for 256 pictures)."""


@dataclass(frozen=True)
class Group:
    """Variants with one budget."""

    variants: Mapping[str, Mapping[str, Any]]
    output: str
    epochs: float
    batch_size: int
    max_steps: int | None = None
    """Stop there, and score nothing but the loss."""


GROUPS = {
    "comparison": Group(COMPARISON, "cifar10.json", 6.0, 256),
    "rates": Group(RATES, "cifar10-rates.json", 6.0, 256, 300),
}


def configure(
    changes: Mapping[str, Any], seed: int, output_dir: Path, options: argparse.Namespace
) -> PretrainConfig:
    """The run of one variant; ``model.NAME`` changes a field of the model."""
    own = {
        name: value
        for name, value in changes.items()
        if name != "preset" and not name.startswith("model.")
    }
    inner = {
        name.removeprefix("model."): value
        for name, value in changes.items()
        if name.startswith("model.")
    }
    preset = changes.get("preset", "cifar10-tiny")
    batch_size = GROUPS[options.group].batch_size
    recipe = {
        # The peak, lr * batch_size / 256, falls with the square root of the batch size.
        "lr": PretrainConfig.from_preset(preset).lr * math.sqrt(256 / batch_size),
        **own,
    }
    config = PretrainConfig.from_preset(
        preset,
        data=options.data,
        batch_size=batch_size,
        max_steps=GROUPS[options.group].max_steps,
        epochs=options.epochs,
        warmup_ratio=min(1 / options.epochs, 1 / 6),
        seed=seed,
        device=options.device,
        precision="bf16",
        compile=True,
        output_dir=str(output_dir),
        **recipe,
    )
    return replace(config, model=replace(config.model, **inner))


def started_from(run: Path) -> str:
    """The commit that a run was first started from."""
    return json.loads((run / RUN_FILE).read_text())["starts"][0]["commit"]


def save_half(run: Path, directory: Path) -> None:
    """A run's model with its weights in float16: half the size, and loaded into a
    float32 model as they are.
    """
    model = load_model(run)
    weights = {name: tensor.half() for name, tensor in model.state_dict().items()}
    save_model(directory, model.config.to_dict(), weights)


def pictures_of(options: argparse.Namespace) -> ImageData:
    """The data with fewer training pictures, evenly spaced: what probes, neighbours and
    fine-tuning may see.
    """
    data = open_data(options.data)
    chosen = (
        np.linspace(0, len(data.train) - 1, min(LABELLED, len(data.train)))
        .round()
        .astype(int)
    )
    return replace(data, train=SelectedImages(data.train, chosen))


def scores_of(
    model: MaskedAutoencoder,
    data: ImageData,
    seed: int,
    fine_tuned: bool,
    fresh: bool = False,
) -> dict[str, Any]:
    """What a model is worth: completion on held-out pictures, linear probes,
    neighbours, and fine-tuning.
    """
    started = time.perf_counter()
    held_out = some_pictures(data.held_out, model.config)
    mean_picture = some_pictures(data.train, model.config).mean(dim=0)
    by_ratio = {
        score.mask_ratio: score
        for score in reconstruction_by_ratio(model, held_out, mean_picture)
    }
    train, test = encode(model, data.train), encode(model, data.held_out)
    labels = train.labels, test.labels
    scores = {
        "reconstruction": [asdict(score) for score in by_ratio.values()],
        "loss_at_75": by_ratio[0.75].loss,
        "psnr_at_75": by_ratio[0.75].psnr,
        "probe_accuracy": probe_accuracy(
            train.patch_mean, labels[0], test.patch_mean, labels[1], seed
        ),
        "probe_class_token": probe_accuracy(
            train.class_token, labels[0], test.class_token, labels[1], seed
        ),
        "neighbour_accuracy": neighbour_accuracy(
            train.patch_mean, labels[0], test.patch_mean, labels[1]
        ),
    }
    if fine_tuned:
        with tempfile.TemporaryDirectory() as scratch:
            # Slower lower layers are for pretrained ones; fresh ones must all learn.
            decay = {"layer_decay": 1.0} if fresh else {}
            tuning = FinetuneConfig(
                "cifar10", **FINETUNE, **decay, seed=seed, output_dir=scratch
            )
            tuned = finetune(tuning, False, str, model=model, data=data)
        scores["finetuned_accuracy"] = tuned.accuracy
    return {**scores, "scored_in_seconds": round(time.perf_counter() - started, 1)}


def pixel_scores(data: ImageData, config: FrameConfig) -> dict[str, float]:
    """The same probe and neighbours on raw pixels, which need no encoder."""
    parts = []
    for source in (data.train, data.held_out):
        images = some_pictures(source, config, len(source))
        parts.append(small_pixels(images).numpy())
    labels = np.asarray(data.train.labels), np.asarray(data.held_out.labels)
    return {
        "probe_accuracy": probe_accuracy(parts[0], labels[0], parts[1], labels[1], 0),
        "neighbour_accuracy": neighbour_accuracy(
            parts[0], labels[0], parts[1], labels[1]
        ),
    }


def counted_operations(model: MaskedAutoencoder) -> int:
    """Floating-point operations of one training picture's forward pass, in a batch of
    64, masking ratio 0.75.
    """
    images = torch.zeros(64, model.config.channels, *model.config.image_shape)
    with operation_counter() as counter:
        model(images, 0.75)
    return counter.get_total_flops() // 64


def trained(config: PretrainConfig, directory: Path) -> PretrainResult:
    """The result of a run: the finished one that is there, if it is this run, else
    trained or continued now.
    """
    run = RunDirectory(directory)
    if run.summary() is None:
        return pretrain(config, progress=False)
    # A later version of the package may have more fields; those that both know must
    # agree, but for where the data lies.
    recorded = json.loads((directory / RUN_FILE).read_text())["config"]
    wanted = json.loads(json.dumps(config.to_dict()))
    common = (recorded.keys() & wanted.keys()) - OPERATIONAL - {"data"}
    odd = [name for name in common if recorded[name] != wanted[name]]
    if odd:
        raise ValueError(
            f"{directory} holds a finished run that differs in {sorted(odd)}"
        )
    return result_of(run)


def record_of(
    name: str,
    changes: Mapping[str, Any],
    seed: int,
    data: ImageData,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Train (or reuse) and score one run; its scores are kept beside it."""
    word = name.replace(",", "").replace(" ", "-")
    directory = options.runs / f"{word}-epochs-{options.epochs:g}-seed-{seed}"
    result = trained(configure(changes, seed, directory, options), directory)
    if options.weights:
        save_half(directory, options.weights / f"{name}-seed{seed}")
    record = {
        "seed": seed,
        "steps": result.steps,
        "train_loss": result.train_loss,
        "held_out_loss": result.held_out_loss,
        "commit": started_from(directory),
    }
    if options.train_only or GROUPS[options.group].max_steps is not None:
        return record
    kept = directory / "scores.json"
    if not kept.is_file():
        model = load_model(directory).to(options.device)
        write_json(kept, scores_of(model, data, seed, options.group == "comparison"))
    return {**record, **json.loads(kept.read_text())}


def untrained_records(
    config: FrameConfig, data: ImageData, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """The control: the same network with fresh weights, scored alike; of two seeds, one
    is also fine-tuned.
    """
    records = []
    for seed in options.seeds[:2]:
        kept = options.runs / f"untrained-{config.model_type}-seed-{seed}.json"
        if not kept.is_file():
            write_json(
                kept,
                scores_of(
                    fresh_model(config, seed).to(options.device),
                    data,
                    seed,
                    not records,
                    fresh=True,
                ),
            )
        records.append({"seed": seed, **json.loads(kept.read_text())})
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--data",
        required=True,
        help="as crate pretrain takes; torchvision:CIFAR10 downloads it",
    )
    parser.add_argument("--group", choices=GROUPS, default="comparison")
    parser.add_argument(
        "--variants", nargs="+", help="some of the group's; all unless given"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--weights", type=Path, help="also save each model there, in float16"
    )
    parser.add_argument(
        "--train-only",
        action="store_true",
        help="write no results, only finish the runs",
    )
    options = parser.parse_args()
    group = GROUPS[options.group]
    variants, options.epochs = group.variants, options.epochs or group.epochs
    names = options.variants or list(variants)
    unknown = [name for name in names if name not in variants]
    if unknown:
        parser.error(f"unknown variants {unknown}; accepted are {list(variants)}")

    # Taken now: a checkout can move on while the runs go on.
    command = shlex.join(["python", "benchmarks/cifar10.py", *sys.argv[1:]])
    origin = provenance(command, device_name(torch.device(options.device)))
    data = pictures_of(options)
    models: dict[str, Any] = {}
    for name in names:
        config = configure(variants[name], 0, Path("unused"), options).model
        runs = [
            record_of(name, variants[name], seed, data, options)
            for seed in options.seeds
        ]
        fresh = build_model(config)
        models[name] = {
            "changes": dict(variants[name]),
            "parameters": sum(p.numel() for p in fresh.parameters()),
            "operations": counted_operations(fresh),
            "runs": runs,
        }
        if options.group == "comparison" and not options.train_only:
            models[f"{name}, untrained"] = {
                **models[name],
                "runs": untrained_records(config, data, options),
            }
    if options.train_only:
        return
    output = options.output or Path("results") / group.output
    output.parent.mkdir(parents=True, exist_ok=True)
    pixels = pixel_scores(data, config) if options.group == "comparison" else None
    write_json(
        output,
        {
            "epochs": options.epochs,
            "batch_size": group.batch_size,
            "max_steps": group.max_steps,
            "seeds": options.seeds,
            "labelled": len(data.train),
            "held_out": len(data.held_out),
            "finetune": FINETUNE,
            "pixels": pixels,
            "models": models,
            **origin,
        },
    )
    print(f"written to {output}")


if __name__ == "__main__":
    main()
