r"""Do attention heads find objects?  Scores of every model in a folder beside their
controls.

    python benchmarks/segmentation.py                                  #
    results/segmentation.json python benchmarks/segmentation.py --models runs/mine
    --pictures 64 --output mine.json

Reads the models in ``--models`` (folders NAME-seedN of config.json and
model.safetensors), makes pictures with exact masks (objects pasted on photographs,
digits), and scores attention maps, token components, the same networks untrained, and
maps that need no model.  The best of a model's maps is chosen on one half of the
pictures and scored on the other; what choosing it on the same pictures would have said
is written beside.  Needs no data and no GPU, and takes under three minutes of one core.
"""

import argparse
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from crate_core.inspection.composites import Composites, composites, digit_pictures
from crate_core.inspection.foreground import (
    ATTENTION_MASS,
    ForegroundScores,
    centre_blob,
    foreground_scores,
    patch_contrast,
    random_maps,
    select_map,
)
from crate_core.inspection.heads import all_attention_maps
from crate_core.inspection.tokens import signed_components, token_pca, trace_tokens
from crate_core.model.autoencoder import MaskedAutoencoder
from crate_core.model.build import fresh_model, load_model
from crate_core.model.patches import patch_grid, patchify, upsample
from crate_core.records import device_name, provenance, write_json

METRICS = ("iou", "pointing", "auc")


def picture_sets(pictures: int, seed: int) -> dict[str, Composites]:
    """Pictures by name; the last set is larger than what the models were trained on."""
    return {
        "objects anywhere": composites(pictures, seed),
        "objects in the centre": composites(pictures, seed, place="centre"),
        "digits": digit_pictures(pictures, seed),
        "objects anywhere, 64 px": composites(pictures // 2, seed, size=64),
    }


def named_models(
    folder: Path, untrained_seeds: int
) -> Iterator[tuple[str, int, MaskedAutoencoder]]:
    """Name, seed and model: all saved ones, then each architecture among them
    untrained.
    """
    fresh: dict[str, MaskedAutoencoder] = {}
    for directory in sorted(folder.iterdir()):
        match = re.fullmatch(r"(.+)-seed(\d+)", directory.name)
        if match and (directory / "config.json").is_file():
            model = load_model(directory)
            fresh.setdefault(model.config.model_type, model)
            yield match[1], int(match[2]), model
    for kind, model in fresh.items():
        for seed in range(untrained_seeds):
            yield (
                f"{kind.removesuffix('-mae')} untrained",
                seed,
                fresh_model(model.config, seed),
            )


def attention(model: MaskedAutoencoder, images: Tensor) -> dict[str, Tensor]:
    """Attention maps (B, K, h, w) of every head of every layer, by the token that
    looks.
    """
    layers = all_attention_maps(model, images)
    return {
        "class token": torch.cat([layer.class_token for layer in layers], 1),
        "mean token": torch.cat([layer.mean_token for layer in layers], 1),
    }


def component_maps(model: MaskedAutoencoder, images: Tensor) -> Tensor:
    """Token components (B, 6, h, w) up and down, the mean over pictures taken off at
    each place, as the first components would show the place otherwise.
    """
    trace = trace_tokens(model, images)
    tokens = trace.hidden_states[-1][:, 1:]
    return signed_components(token_pca(tokens - tokens.mean(0)), trace.grid)


def record_of(
    model: MaskedAutoencoder, pictures: Composites, seed: int
) -> dict[str, Any]:
    """All scores of a model on a set of pictures, and those of the same heads on the
    pictures without their object.
    """
    maps, erased = (
        attention(model, pictures.images),
        attention(model, pictures.background),
    )
    record = {source: summary(maps[source], pictures, seed) for source in maps}
    record |= {
        f"{source}, object erased": summary(
            maps[source], pictures, seed, erased[source]
        )
        for source in maps
    }
    return record | {
        "components": summary(component_maps(model, pictures.images), pictures, seed)
    }


def maps_without_model(
    images: Tensor, patch_size: int, heads: int, seed: int
) -> dict[str, Tensor]:
    """Maps that need no model, on the same grid."""
    grid = patch_grid(images.shape[2], images.shape[3], patch_size)
    patches = patchify(images, patch_size)
    return {
        "centre blob": centre_blob(grid).expand(len(images), 1, *grid),
        "random": random_maps(
            len(images), heads, grid, torch.Generator().manual_seed(seed)
        ),
        "pixel contrast": patch_contrast(patches, grid),
        "pixel components": signed_components(
            token_pca(patches - patches.mean(0)), grid
        ),
    }


def summary(
    maps: Tensor, pictures: Composites, seed: int, control: Tensor | None = None
) -> dict[str, Any]:
    """Each metric of the best of the maps: held-out mean and its standard error over
    pictures, and the biased ones.

    With a control, the maps chosen are the same and the scores are those of the
    control's maps.
    """

    def scored(some: Tensor) -> ForegroundScores:
        return foreground_scores(upsample(some, pictures.mask.shape[1:]), pictures.mask)

    scores, reported = scored(maps), scored(maps if control is None else control)
    record: dict[str, Any] = {"maps": maps.shape[1]}
    for metric in METRICS:
        best = select_map(getattr(scores, metric), seed, getattr(reported, metric))
        record[metric] = {
            "held_out": round(float(best.held_out.mean()), 4),
            "standard_error": round(
                float(best.held_out.std() / len(best.held_out) ** 0.5), 4
            ),
            "same_pictures": round(best.same_pictures, 4),
            "each_picture": round(best.each_picture, 4),
            "mean": round(best.mean, 4),
            "chosen": best.chosen,
        }
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", type=Path, default=Path("results/weights"))
    parser.add_argument("--pictures", type=int, default=192)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the pictures and of the halves"
    )
    parser.add_argument("--untrained-seeds", type=int, default=3)
    parser.add_argument(
        "--output", type=Path, default=Path("results/segmentation.json")
    )
    options = parser.parse_args()
    if not options.models.is_dir():
        parser.error(
            f"{options.models} is no folder; --models takes a folder of NAME-seedN"
        )

    command = shlex.join(["python", "benchmarks/segmentation.py", *sys.argv[1:]])
    origin = provenance(command, device_name(torch.device("cpu")))
    models = list(named_models(options.models, options.untrained_seeds))
    if not models:
        parser.error(
            f"{options.models} holds no model; folders NAME-seedN with "
            "config.json are looked for"
        )
    config = models[0][2].config
    heads = config.depth * config.heads
    records: dict[str, Mapping[str, Any]] = {}
    for name, pictures in picture_sets(options.pictures, options.seed).items():
        by_model: dict[str, dict[str, dict[str, Any]]] = {}
        for kind, seed, model in models:
            by_source = record_of(model, pictures, options.seed)
            by_model.setdefault(kind, {})[str(seed)] = by_source
        controls = maps_without_model(
            pictures.images, config.patch_size, heads, options.seed
        )
        records[name] = {
            "pictures": len(pictures.images),
            "side": pictures.images.shape[-1],
            "object_share": round(float(pictures.mask.float().mean()), 4),
            "models": by_model,
            "controls": {
                source: summary(maps, pictures, options.seed)
                for source, maps in controls.items()
            },
        }
        print(
            f"{name}: "
            + ", ".join(
                f"{k} {v['iou']['held_out']:.3f}"
                for k, v in records[name]["controls"].items()
            )
        )
        for kind, by_seed in by_model.items():
            for seed, by_source in by_seed.items():
                line = ", ".join(
                    f"{k} {v['iou']['held_out']:.3f}" for k, v in by_source.items()
                )
                print(f"    {kind} {seed}: {line}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "attention_mass": ATTENTION_MASS,
        "metrics": METRICS,
        "seed": options.seed,
        "sets": records,
        **origin,
    }
    write_json(options.output, content)
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
