r"""What a training step keeps for its backward pass, against the number of tokens: 224
to 1,024 pixels.

    python benchmarks/memory.py
    python benchmarks/memory.py --device cuda --size base --batch 8

Bytes of all distinct storages that autograd saves in one forward pass, weights left
out, for the package's model and for the plain transcription with stored attention
weights; on a GPU the peak of a whole step too.  The width is narrow by default so that
the plain form fits: the shape of the curve is that of any width, and the formula of
``crate_core.model.cost.saved_numbers`` gives it for all.  Writes
``results/memory.json``.
"""

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from plain import PlainCrateMAE
from torch import Tensor, nn

from crate_core.model.config import CrateMAEConfig
from crate_core.model.cost import saved_numbers
from crate_core.model.crate import CrateMAE
from crate_core.records import device_name, provenance, write_json

SIDES = (224, 320, 448, 640, 768, 1024)
"""Pixels; at 16 to a patch, 196 to 4,096 tokens."""


def saved_bytes(call: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes of the storages that one forward pass keeps for the backward pass, the
    weights' own left out.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}
    # storages must live on, or a later one could get the same address
    held: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        held.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dim", type=int, default=48)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--size", help="a published size in the place of --dim, --heads and --depth"
    )
    parser.add_argument("--output", type=Path, default=Path("results/memory.json"))
    options = parser.parse_args()
    device = torch.device(options.device)
    given = (
        {}
        if options.size
        else {"dim": options.dim, "heads": options.heads, "depth": options.depth}
    )
    rows: list[dict[str, Any]] = []
    for side in SIDES:
        config = CrateMAEConfig.preset(options.size or "base", **given, image_size=side)
        torch.manual_seed(0)
        model = CrateMAE(config).to(device)
        transcription = PlainCrateMAE(model)
        images = torch.randn(options.batch, config.channels, side, side, device=device)
        patches = config.grid[0] * config.grid[1]
        noise = torch.rand(options.batch, patches, device=device)
        forwards: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
            "ours": (model, lambda m=model, x=images, r=noise: m(x, 0.75, r).loss),
            "plain": (
                transcription,
                lambda m=transcription, x=images, r=noise: m(x, 0.75, r)[0],
            ),
        }
        row: dict[str, Any] = {
            "pixels": side,
            "patches": patches,
            "predicted_layers": 4 * saved_numbers(config, options.batch),
        }
        for name, (owner, call) in forwards.items():
            row[name] = saved_bytes(call, owner)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                call().backward()
                owner.zero_grad()
                row[f"{name}_peak"] = torch.cuda.max_memory_allocated()
        rows.append(row)
        kept = {name: row[name] / 2**20 for name in forwards}
        print(
            f"{side:5d} px {patches:5d} patches: ours {kept['ours']:8.1f} MiB, "
            f"plain {kept['plain']:8.1f} MiB"
        )
    record = {
        "dim": config.dim,
        "heads": config.heads,
        "layers": config.depth + config.decoder_layers,
        "batch": options.batch,
        "rows": rows,
        "provenance": provenance(
            shlex.join(["python", "benchmarks/memory.py", *sys.argv[1:]]),
            device_name(device),
        ),
    }
    write_json(options.output, record)


if __name__ == "__main__":
    main()
