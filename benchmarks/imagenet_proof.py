r"""The full-size path for a few hundred steps: throughput, memory, and a loss that goes
down.

    python benchmarks/imagenet_proof.py --data folder:PATH/imagenet --steps 300
    --batch-size 256 --device cuda --compile python benchmarks/imagenet_proof.py --data
    folder:PATH/imagenet --steps 2 --batch-size 2 --device cpu    # a trial

``imagenet-base`` with a smaller batch and a warm-up of a tenth of the steps; everything
else is the preset.  Writes ``results/imagenet-proof.json``.
"""

import argparse
import json
import resource
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from crate_core.data.named import open_data
from crate_core.model.cost import operations, state_bytes
from crate_core.records import device_name, provenance, write_json
from crate_core.training.pretrain import pretrain
from crate_core.training.recipe import PretrainConfig
from crate_core.training.run_directory import TIMING_FILE, RunDirectory


def main() -> None:
    parser = argparse.ArgumentParser(
        description="A few hundred steps of the full-size recipe."
    )
    parser.add_argument("--data", required=True, help="as crate pretrain's --data")
    parser.add_argument("--preset", default="imagenet-base")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1.5e-4)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument(
        "--output", type=Path, default=Path("results/imagenet-proof.json")
    )
    options = parser.parse_args()
    shown = [
        "--data" if a == "--data" else Path(a).name if "/" in a else a
        for a in sys.argv[1:]
    ]
    origin = provenance(
        shlex.join(["python", "benchmarks/imagenet_proof.py", *shown]),
        device_name(torch.device(options.device)),
    )
    epochs = options.steps * options.batch_size / len(open_data(options.data).train)
    with tempfile.TemporaryDirectory() as scratch:
        config = PretrainConfig.from_preset(
            options.preset,
            data=options.data,
            output_dir=scratch,
            batch_size=options.batch_size,
            lr=options.lr,
            epochs=epochs,
            warmup_ratio=0.1,
            device=options.device,
            precision=options.precision,
            workers=options.workers,
            compile=options.compile,
            log_every=max(1, options.steps // 30),
            checkpoint_every=options.steps,
        )
        result = pretrain(config, progress=sys.stderr.isatty())
        log = RunDirectory(scratch).logged()
        timing = [
            json.loads(line)
            for line in Path(scratch, TIMING_FILE).read_text().splitlines()
        ]
    # compilation and the first batches are not the run's pace
    settled = timing[len(timing) // 3 :]
    speed = statistics.median(line["images_per_second"] for line in settled)
    model = config.model
    content = {
        "preset": options.preset,
        "batch_size": options.batch_size,
        "precision": options.precision,
        "compile": options.compile,
        "steps": result.steps,
        "images_per_second": speed,
        "operations_per_second": speed
        * operations(model, options.batch_size).needed
        / options.batch_size,
        "state_bytes_predicted": state_bytes(model),
        "peak_memory_bytes": timing[-1].get(
            "peak_memory_bytes",
            1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        ),
        "loss": [line["loss"] for line in log],
        "trivial_loss": result.trivial.mean_picture,
        **origin,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, content)
    print(
        f"{speed:.2f} pictures a second, "
        f"{content['operations_per_second'] / 1e12:.3f} TFLOP/s, "
        f"{content['peak_memory_bytes'] / 2**30:.2f} GiB; loss "
        f"{log[0]['loss']:.3f} to {log[-1]['loss']:.3f}"
    )


if __name__ == "__main__":
    main()
