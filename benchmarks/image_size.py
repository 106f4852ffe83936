r"""Seconds of a training step against the size of the picture, to 1,024 pixels, beside
what the operations predict.

    OMP_NUM_THREADS=2 python benchmarks/image_size.py --size tiny

One picture, the package's model and the plain transcription with stored attention
weights, in turn, with equal weights; the transcription only where the weights that it
stores fit in ``--limit`` bytes.  Predicted are the operations of
``crate_core.model.cost`` over the speed of a large product, measured in the same run.
Writes ``results/image-size.json``.
"""

import argparse
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from speed import Forward, Stopwatch, ceilings, copy_of, own, plain

from crate_core.model.cost import operations
from crate_core.model.crate import CrateMAE
from crate_core.records import device_name, provenance, write_json


def stored_bytes(model: CrateMAE, patches: int) -> int:
    """Bytes of attention weights that the plain form keeps: inner products, scaled ones
    and softmax of each layer.
    """
    layers = model.config.depth + model.config.decoder_layers
    return 3 * 4 * layers * model.config.heads * (patches + 1) ** 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="tiny")
    parser.add_argument(
        "--sides", type=int, nargs="+", default=[224, 384, 512, 768, 1024]
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=8e9)
    parser.add_argument("--output", type=Path, default=Path("results/image-size.json"))
    options = parser.parse_args()
    device = torch.device("cpu")
    watch = Stopwatch("wall", device)
    torch.manual_seed(0)
    model = CrateMAE.from_preset(options.size)
    transcribed, transcription = plain(copy_of(model))
    ours: dict[str, tuple[torch.nn.Module, Forward]] = {"ours": (model, own(model))}
    rows = []
    for side in options.sides:
        patches = (side // model.config.patch_size) ** 2
        images, noise = torch.randn(1, 3, side, side), torch.rand(1, patches)
        entries = dict(ours)
        if stored_bytes(model, patches) < options.limit:
            entries["plain"] = (transcribed, transcription)
        seconds: dict[str, list[float]] = {name: [] for name in entries}
        for turn in range(options.repeats + 1):  # the first warms up
            for name, (module, forward) in entries.items():
                module.zero_grad()
                taken = watch(
                    lambda forward=forward, images=images, noise=noise: forward(
                        images, noise
                    )[0].backward()
                )
                if turn:
                    seconds[name].append(taken)
        row: dict[str, Any] = {
            "pixels": side,
            "patches": patches,
            "operations": operations(model.config, 1, patches).total,
            "seconds": {
                name: statistics.median(times) for name, times in seconds.items()
            },
        }
        rows.append(row)
        print(
            side,
            patches,
            {name: round(value, 3) for name, value in row["seconds"].items()},
            flush=True,
        )
    content = {
        "size": options.size,
        "ceilings": ceilings(watch, torch.float32),
        "rows": rows,
        "provenance": provenance(
            shlex.join(["python", "benchmarks/image_size.py", *sys.argv[1:]]),
            device_name(device),
        ),
    }
    write_json(options.output, content)


if __name__ == "__main__":
    main()
