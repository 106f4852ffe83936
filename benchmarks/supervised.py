r"""The supervised control: a CRATE encoder trained from scratch with labels, no
masking.

    python benchmarks/supervised.py --data hf:PATH/cifar10-train.parquet --epochs 6
    --seed 0 --output DIR

Writes a fine-tuning run, ``DIR/config.json`` and ``DIR/model.safetensors`` (whose
encoder every tool here opens; its decoder is untrained) and ``DIR/summary.json``
(held-out accuracy, provenance).  bf16 and compiled, on one core;
``--preset cifar10-tiny-vit`` trains the ViT instead, ``--precision fp32 --no-compile``
is the plain run.
"""

import argparse
import shlex
import sys
from pathlib import Path

from crate_core.evaluation.finetune import finetune
from crate_core.evaluation.finetune_recipe import FinetuneConfig
from crate_core.model.build import fresh_model
from crate_core.training.recipe import PretrainConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="as crate pretrain takes")
    parser.add_argument(
        "--preset", default="cifar10-tiny", help="recipe whose model is trained"
    )
    parser.add_argument("--epochs", type=float, default=6.0)
    parser.add_argument(
        "--lr", type=float, default=2e-3, help="base rate; the peak is lr * 256 / 256"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="weights, order and augmentation"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()

    command = shlex.join(["python", "benchmarks/supervised.py", *sys.argv[1:]])
    config = FinetuneConfig(
        "cifar10",
        data=options.data,
        from_scratch=True,
        output_dir=str(options.output),
        batch_size=256,
        epochs=options.epochs,
        warmup_ratio=min(1 / options.epochs, 1 / 6),
        lr=options.lr,
        seed=options.seed,
        precision=options.precision,
        compile=not options.no_compile,
        device=options.device,
    )
    model = fresh_model(PretrainConfig.from_preset(options.preset).model, options.seed)
    finetune(config, command=command, model=model)


if __name__ == "__main__":
    main()
