r"""CIFAR-10: what the layers of trained and untrained encoders do, measured.

    python benchmarks/inspect_cifar.py --data hf:PATH/cifar10-train.parquet --models
    results/weights

Takes every saved model in ``--models`` (folders NAME-seedN, such as crate-seed0,
vit-seed0, labels-seed0; a new name is a new model), and beside each architecture the
same network untrained, from three seeds.  Measures each on the same training and
held-out pictures, whole, and on held-out pictures masked as in pretraining; asks what a
linear map reads off the tokens of removed patches; and writes means and spreads over
pictures with provenance.  About three minutes on one CPU core.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from crate_core.data.batches import some_pictures
from crate_core.data.named import open_data
from crate_core.inspection.layers import inspect_layers, inspect_weights, summarize
from crate_core.inspection.readout import linear_readout
from crate_core.model.autoencoder import MaskedAutoencoder
from crate_core.model.build import fresh_model, load_model
from crate_core.records import device_name, provenance, write_json

UNTRAINED_SEEDS = (0, 1, 2)
MASK_RATIO = 0.75
"""As in pretraining."""
DIGITS = 4
"""Significant digits that are kept."""


def saved_models(directory: Path) -> dict[str, dict[int, Path]]:
    """Folders NAME-seedN that hold a saved model, by name and seed."""
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(directory.iterdir()):
        match = re.fullmatch(r"(.+)-seed(\d+)", path.name)
        if match and (path / "config.json").is_file():
            found.setdefault(match[1], {})[int(match[2])] = path
    if not found:
        raise SystemExit(f"{directory} holds no folder NAME-seedN with a saved model")
    return found


def models_and_controls(
    directory: Path,
) -> Iterator[tuple[str, int, MaskedAutoencoder]]:
    """Name, seed and model: all saved ones, then each architecture untrained, named
    after the first model of it.
    """
    first: dict[Any, str] = {}
    for name, by_seed in saved_models(directory).items():
        for seed, path in by_seed.items():
            model = load_model(path)
            first.setdefault(model.config, name)
            yield name, seed, model
    for config, name in first.items():
        for seed in UNTRAINED_SEEDS:
            yield f"{name} untrained", seed, fresh_model(config, seed)


def rounded(value: Any) -> Any:
    """Numbers in a record with ``DIGITS`` significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--data",
        required=True,
        help="as crate pretrain takes; torchvision:CIFAR10 downloads it",
    )
    parser.add_argument("--models", type=Path, default=Path("results/weights"))
    parser.add_argument(
        "--pictures",
        type=int,
        default=256,
        help="of each part; a quarter of them for masked ones",
    )
    parser.add_argument(
        "--eps", type=float, default=0.5, help="as a share of the tokens' norm"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--output", type=Path, default=Path("results/inspect-cifar10.json")
    )
    options = parser.parse_args()

    # The record names no folder of this machine.
    shown = [
        re.sub(r"\S*/(?=[^/]+\.parquet$)", "", argument) for argument in sys.argv[1:]
    ]
    origin = provenance(
        shlex.join(["python", "benchmarks/inspect_cifar.py", *shown]),
        device_name(torch.device(options.device)),
    )
    data = open_data(options.data)
    pictures: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
    models: dict[str, Any] = {}
    for name, seed, model in models_and_controls(options.models):
        config = model.config
        size = (config.image_size, config.channels)
        if size not in pictures:
            train, held_out = (
                some_pictures(part, config, options.pictures)
                for part in (data.train, data.held_out)
            )
            pictures[size] = (train, held_out)
        train, held_out = pictures[size]
        model.to(options.device)
        few = held_out[: max(1, options.pictures // 4)]
        run = {
            "seed": seed,
            "weights": summarize(inspect_weights(model)),
            "train": summarize(inspect_layers(model, train, eps=options.eps)),
            "held_out": summarize(inspect_layers(model, held_out, eps=options.eps)),
            "masked": summarize(
                inspect_layers(model, few, eps=options.eps, mask_ratio=MASK_RATIO)
            ),
        }
        if not config.encode_visible_only:
            run["readout"] = linear_readout(model, train, held_out, MASK_RATIO).tolist()
        models.setdefault(name, {"model": config.to_dict(), "runs": []})["runs"].append(
            rounded(run)
        )
        print(f"{name}, seed {seed}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        options.output,
        {
            "eps": options.eps,
            "mask_ratio": MASK_RATIO,
            "pictures": options.pictures,
            "models": models,
            **origin,
        },
    )
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
