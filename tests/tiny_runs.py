"""Twelve steps of a very small model: what the tests of pretraining share."""

import os
from pathlib import Path

from crate_core.model.config import CrateMAEConfig
from crate_core.training.pretrain import pretrain
from crate_core.training.recipe import PretrainConfig

ROOT = Path(__file__).resolve().parents[1]
TINY = CrateMAEConfig.preset("digits", dim=16, depth=1, heads=2)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
"""Of processes that tests start: one thread, as the tests have while bits are compared.
"""

FLAGS = [
    *(
        "--device",
        "cpu",
        "--model.dim",
        "16",
        "--model.depth",
        "1",
        "--model.heads",
        "2",
    ),
    *("--batch-size", "16", "--warmup-ratio", "0.003"),
]
"""The small model on the command line."""


def tiny(output_dir: Path, **overrides: object) -> PretrainConfig:
    """Twelve steps; neither log nor checkpoints fall on the end alone."""
    fields = {
        "model": TINY,
        "batch_size": 16,
        "epochs": 12 * 16 / 1438,
        "warmup_ratio": 1 / 6,
        "log_every": 3,
        "checkpoint_every": 4,
        "device": "cpu",
        "output_dir": str(output_dir),
    }
    return PretrainConfig.from_preset("digits", **{**fields, **overrides})


def train(config: PretrainConfig) -> list[str]:
    """Pretrain without a progress bar; returns what was said."""
    said: list[str] = []
    pretrain(config, progress=False, report=said.append)
    return said


def contents(
    directory: Path, names: tuple[str, ...] = ("model.safetensors", "metrics.jsonl")
) -> dict[str, bytes]:
    """The files that are equal for a cut and an uncut run."""
    return {name: (directory / name).read_bytes() for name in names}


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file under a directory."""
    return {
        str(p.relative_to(directory)): p.read_bytes()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }
