r"""What tokens hold: rank, linearity and components of every model in a folder, beside
their controls.

    python benchmarks/tokens.py --data hf:PATH/cifar10-train.parquet        #
    results/tokens.json python benchmarks/tokens.py --data hf:PATH/cifar10-train.parquet
    --models runs/mine --output mine.json

Measures held-out pictures of ``--data`` in the models of ``--models`` (folders
NAME-seedN), in the same networks untrained, and in patches of pixels.  Needs no GPU and
takes under two minutes of one core.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from segmentation import named_models
from torch import Tensor

from crate_core.data.batches import some_pictures
from crate_core.data.named import open_data
from crate_core.inspection.measures import (
    entropy_rank,
    participation_ratio,
    token_spectrum,
)
from crate_core.inspection.token_blends import interpolate_tokens
from crate_core.inspection.tokens import midpoint_nonlinearity, token_pca, trace_tokens
from crate_core.model.autoencoder import MaskedAutoencoder
from crate_core.model.patches import patchify
from crate_core.records import device_name, provenance, write_json

DIRECTIONS = 32
"""How many leading shares of the spectrum are written."""


def without_positions(tokens: Tensor) -> Tensor:
    """Patch tokens (B, L, d) with the mean over pictures taken off at each position."""
    return tokens - tokens.mean(0, keepdim=True)


def spectrum_record(tokens: Tensor) -> dict[str, Any]:
    """Rank of patch tokens (B, L, d) of all pictures jointly."""
    spectrum = token_spectrum(tokens.flatten(0, 1)).flip(-1)
    shares = spectrum / spectrum.sum()
    return {
        "entropy_rank": round(float(entropy_rank(spectrum)), 3),
        "participation_ratio": round(float(participation_ratio(spectrum)), 3),
        "rank_of_90_percent": int((shares.cumsum(0) < 0.9).sum()) + 1,
        "shares": [round(float(share), 5) for share in shares[:DIRECTIONS]],
    }


def explained_by(features: Tensor, target: Tensor) -> Tensor:
    """Share of the variance of each column of the target (n, c) that an affine map of
    the features (n, m) explains.
    """
    x = torch.cat([features, torch.ones(len(features), 1)], 1).double()
    y = target.double()
    residual = y - x @ torch.linalg.lstsq(x, y, driver="gelsd").solution
    return 1 - residual.square().sum(0) / (y - y.mean(0)).square().sum(0)


def components_record(
    tokens: Tensor, images: Tensor, patch_size: int
) -> dict[str, Any]:
    """What the first three components are made of: position, the patch's own pixels,
    the picture's mean colour.
    """
    pca = token_pca(tokens)
    coordinates = pca.coordinates
    patches = patchify(images, patch_size)
    total = (coordinates - coordinates.mean((0, 1))).square().sum((0, 1))
    position = (
        (coordinates.mean(0) - coordinates.mean((0, 1))).square().sum(0)
        * len(coordinates)
        / total
    )
    picture = (
        (coordinates.mean(1) - coordinates.mean((0, 1))).square().sum(0)
        * coordinates.shape[1]
        / total
    )
    pixels = explained_by(patches.flatten(0, 1), coordinates.flatten(0, 1))
    return {
        name: [round(float(value), 4) for value in values]
        for name, values in (
            ("explained", pca.explained),
            ("by_position", position),
            ("by_picture", picture),
            ("by_pixels", pixels),
        )
    }


def record_of(model: MaskedAutoencoder, images: Tensor) -> dict[str, Any]:
    """All measures of one model."""
    states = [state[:, 1:] for state in trace_tokens(model, images).hidden_states]
    half = len(images) // 2
    first, second = images[:half], images[half : 2 * half]
    nonlinearity = midpoint_nonlinearity(model, first, second)
    between = interpolate_tokens(model, first, second, (0.0, 0.5))
    return {
        "spectrum": [spectrum_record(tokens) for tokens in states],
        "spectrum_without_positions": [
            spectrum_record(without_positions(tokens)) for tokens in states
        ],
        "components": components_record(states[-1], images, model.config.patch_size),
        "components_without_positions": components_record(
            without_positions(states[-1]), images, model.config.patch_size
        ),
        "nonlinearity": {
            "mean": [round(float(value), 4) for value in nonlinearity.mean(1)],
            "std_over_pairs": [round(float(value), 4) for value in nonlinearity.std(1)],
        },
        # Mean squared errors of pixels in [0, 1]; the variance of the pictures is the
        # scale.
        "decoded_own": round(float((between.tokens[0] - first).square().mean()), 5),
        "decoded_blend_of_tokens": round(
            float((between.tokens[1] - between.blend[1]).square().mean()), 5
        ),
        "decoded_tokens_of_blend": round(
            float((between.pixels[1] - between.blend[1]).square().mean()), 5
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--data",
        required=True,
        help="as crate pretrain takes; held-out pictures are measured",
    )
    parser.add_argument("--models", type=Path, default=Path("results/weights"))
    parser.add_argument("--pictures", type=int, default=256)
    parser.add_argument("--untrained-seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/tokens.json"))
    options = parser.parse_args()
    if not options.models.is_dir():
        parser.error(
            f"{options.models} is no folder; --models takes a folder of NAME-seedN"
        )

    command = shlex.join(["python", "benchmarks/tokens.py", *sys.argv[1:]])
    origin = provenance(command, device_name(torch.device("cpu")))
    data = open_data(options.data)
    records: dict[str, dict[str, Any]] = {}
    for kind, seed, model in named_models(options.models, options.untrained_seeds):
        images = some_pictures(data.held_out, model.config, options.pictures)
        record = records.setdefault(kind, {})[str(seed)] = record_of(model, images)
        ranks = [
            layer["entropy_rank"] for layer in record["spectrum_without_positions"]
        ]
        print(
            f"{kind} {seed}: nonlinearity {record['nonlinearity']['mean']}, "
            f"ranks {ranks}"
        )
    if not records:
        parser.error(
            f"{options.models} holds no model; folders NAME-seedN with "
            "config.json are looked for"
        )
    patches = patchify(images, model.config.patch_size)
    content = {
        "description": data.description,
        "pictures": len(images),
        "pixel_variance": round(float(images.var()), 5),
        "models": records,
        "pixels": {
            "spectrum": spectrum_record(patches),
            "spectrum_without_positions": spectrum_record(without_positions(patches)),
            "components": components_record(patches, images, model.config.patch_size),
        },
        **origin,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, content)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
