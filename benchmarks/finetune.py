r"""Fine-tuning against a linear probe of the same features and against the same network
from scratch, on the same labels, over seeds.

    python benchmarks/finetune.py --data hf:PATH/cifar10-train.parquet --runs runs/tune

Writes ``results/finetune-cifar10.json``.  Runs under ``--runs`` that were cut off are
continued, finished ones are read.  From scratch another learning rate is best, so the
control runs at several (the first seed only) and its best counts.
"""

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crate_core.data.named import open_data
from crate_core.data.sources import SelectedImages
from crate_core.evaluation.features import encode
from crate_core.evaluation.finetune import finetune
from crate_core.evaluation.finetune_recipe import FinetuneConfig
from crate_core.evaluation.probe import Score, probe_accuracy
from crate_core.model.build import load_model
from crate_core.records import device_name, provenance, write_json

OUTPUT = Path(__file__).resolve().parents[1] / "results" / "finetune-cifar10.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--data", required=True, help="as crate finetune takes")
    parser.add_argument("--checkpoint", default="cifar10-tiny")
    parser.add_argument("--preset", default="cifar10")
    parser.add_argument("--runs", type=Path, required=True, help="where runs lie")
    parser.add_argument("--labelled", type=int, default=10_000)
    parser.add_argument("--held-out", type=int, default=10_000)
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--scratch-lr", type=float, nargs="+", default=[1e-3, 4e-3], help="base rates"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    shown = [Path(a).name if "/" in a else a for a in sys.argv[1:]]
    origin = provenance(
        shlex.join(["python", "benchmarks/finetune.py", *shown]),
        device_name(torch.device(options.device)),
    )
    opened = open_data(options.data)
    data = replace(
        opened,
        train=SelectedImages(opened.train, np.arange(options.labelled)),
        held_out=SelectedImages(opened.held_out, np.arange(options.held_out)),
    )
    base = FinetuneConfig(
        options.preset,
        checkpoint=options.checkpoint,
        epochs=options.epochs,
        precision=options.precision,
        compile=options.compile,
        device=options.device,
    )

    def accuracy(**changes: Any) -> float:
        own = replace(base, **changes)
        kind = "scratch" if own.from_scratch else "pretrained"
        folder = options.runs / f"{kind}-lr-{own.lr:g}-seed-{own.seed}"
        return finetune(
            replace(own, output_dir=str(folder)), progress=True, data=data
        ).accuracy

    tuned = [accuracy(seed=seed) for seed in options.seeds]
    first = {
        rate: accuracy(seed=options.seeds[0], lr=rate, from_scratch=True)
        for rate in options.scratch_lr
    }
    best = max(first, key=lambda rate: first[rate])
    scratch = [
        first[best],
        *(accuracy(seed=s, lr=best, from_scratch=True) for s in options.seeds[1:]),
    ]
    model = load_model(options.checkpoint).to(options.device)
    train, test = encode(model, data.train), encode(model, data.held_out)
    probe = probe_accuracy(
        train.patch_mean, train.labels, test.patch_mean, test.labels, 0
    )
    record = {
        "labelled": options.labelled,
        "held_out": options.held_out,
        "seeds": options.seeds,
        "linear_probe": probe,
        "fine_tuned": Score(tuple(tuned)).to_dict(),
        "from_scratch": {
            **Score(tuple(scratch)).to_dict(),
            "lr": best,
            "first_seed_by_lr": {f"{rate:g}": value for rate, value in first.items()},
        },
        "config": {
            name: value
            for name, value in base.identity().items()
            if name not in ("data", "from_scratch", "seed")
        },
        **origin,
    }
    write_json(options.output, record)
    print(f"written to {options.output.name}")


if __name__ == "__main__":
    main()
