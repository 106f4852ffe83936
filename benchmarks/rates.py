r"""R^c of all layers of a model on many images: batched Cholesky on the smaller side,
beside a loop over determinants.

    OMP_NUM_THREADS=2 python benchmarks/rates.py --images 64

The loop takes, for each layer, image and head, log det(I + beta V V^T) of the n x n
matrix by LU; the middle form does so for all heads and images of a layer at once.  The
values of all are compared.  The projection onto the subspaces, which every form needs,
is timed alone too: it bounds the gain.  Writes ``results/rates.json``.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from crate_core.model.crate import CrateMAE
from crate_core.records import device_name, provenance, write_json
from crate_core.shapes import Bases, Scalars, Tokens
from crate_core.theory.rate import head_coordinates, subspace_beta, subspace_coding_rate


def rate_by_loop(z: Tokens, bases: Bases, eps: float) -> Scalars:
    """R^c (B,) of tokens (B, n, d): one determinant of an n x n matrix for each image
    and head.
    """
    n, rank = z.shape[-2], bases.shape[-1]
    beta = subspace_beta(n, rank, eps)
    identity = torch.eye(n)
    values = []
    for tokens in z:
        total = torch.zeros(())
        for basis in bases:
            v = tokens @ basis
            total = total + 0.5 * torch.logdet(identity + beta * (v @ v.T))
        values.append(total)
    return torch.stack(values)


def rate_by_large_determinants(z: Tokens, bases: Bases, eps: float) -> Scalars:
    """R^c (B,) of tokens (B, n, d): the n x n determinants of all images and heads at
    once.
    """
    v = head_coordinates(z, bases)
    beta = subspace_beta(v.shape[-2], v.shape[-1], eps)
    return 0.5 * torch.logdet(torch.eye(v.shape[-2]) + beta * (v @ v.mT)).sum(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="base")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--eps", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("results/rates.json"))
    options = parser.parse_args()
    torch.manual_seed(0)
    model = CrateMAE.from_preset(options.size)
    images = torch.randn(
        options.images,
        model.config.channels,
        *(side * 16 for side in model.config.grid),
    )
    with torch.inference_mode():
        chunks = [
            model(part, output_hidden_states=True).hidden_states
            for part in images.split(8)
        ]
        layers = [
            (
                layer.norm_attention(torch.cat([chunk[i] for chunk in chunks])),
                layer.attention.bases,
            )
            for i, layer in enumerate(model.encoder)
        ]
        forms: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
            "loop over determinants": rate_by_loop,
            "batched, n x n determinants": rate_by_large_determinants,
            "subspace_coding_rate": subspace_coding_rate,
        }
        seconds: dict[str, list[float]] = {name: [] for name in forms}
        values: dict[str, Tensor] = {}
        projecting = []
        for _ in range(options.repeats):
            start = time.perf_counter()
            for z, bases in layers:
                head_coordinates(z, bases)
            projecting.append(time.perf_counter() - start)
            for name, form in forms.items():
                start = time.perf_counter()
                values[name] = torch.stack(
                    [form(z, bases, options.eps) for z, bases in layers]
                )
                seconds[name].append(time.perf_counter() - start)
        exact = torch.stack(
            [
                subspace_coding_rate(z.double(), bases.double(), options.eps)
                for z, bases in layers[:2]
            ]
        )
    slowest = min(seconds["loop over determinants"])
    record = {
        "size": options.size,
        "images": options.images,
        "layers": len(layers),
        "eps": options.eps,
        "forms": {
            name: {
                "seconds": min(times),
                "speedup": slowest / min(times),
                "relative_error": float(
                    ((values[name][:2].double() - exact) / exact).abs().max()
                ),
            }
            for name, times in seconds.items()
        },
        "projection_seconds": min(projecting),
        "largest_gain": slowest / min(projecting),
        "provenance": provenance(
            shlex.join(["python", "benchmarks/rates.py", *sys.argv[1:]]),
            device_name(torch.device("cpu")),
        ),
    }
    write_json(options.output, record)
    for name, form_record in record["forms"].items():  # type: ignore[attr-defined]
        print(f"{name:28s} {form_record['seconds']:8.3f} s "
                f"{form_record['speedup']:6.1f}x  "
              f"relative error {form_record['relative_error']:.1e}")  # fmt: skip


if __name__ == "__main__":
    main()
