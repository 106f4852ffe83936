r"""The linear probe and the neighbours at ImageNet's width on made features: seconds
and memory, and what they say of 1.28 million pictures.

    python benchmarks/probe_scale.py     # 128,000 rows, 768 wide, 1,000 classes

Features of a class are its mean plus normal noise, :math:`x = m_c + w`, with means
:math:`m_c \sim \mathcal N(0, s^2 I)`; the best classifier knows the means and takes the
nearest, and its accuracy is measured beside the probe's.  Rows lie on disk in half
precision, as :func:`crate_core.evaluation.features.cached_features` writes them.
Writes ``results/probe-scale.json``.
"""

import argparse
import json
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crate_core.evaluation.linear_head import (
    LinearHeadConfig,
    fit_linear_head,
    head_accuracy,
)
from crate_core.evaluation.neighbours import neighbour_accuracy
from crate_core.records import device_name, provenance, write_json

IMAGENET, VALIDATION = 1_281_167, 50_000
"""Training and validation pictures of ImageNet-1k."""

BLOCK = 8192
"""Rows made at a time."""


def memory(field: str) -> float:
    """A field of this process's status, MiB (Linux): ``RssAnon`` leaves out the pages
    of mapped files, which the system takes back when it needs them.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise OSError(f"this system's status has no {field}")


@contextmanager
def peak_memory(told: dict[str, float]) -> Iterator[None]:
    """Put the highest anonymous memory of the body, above where it began, in MiB."""
    start, over = memory("RssAnon"), threading.Event()
    highest = [start]

    def watch() -> None:
        while not over.wait(0.02):
            highest[0] = max(highest[0], memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        told["peak_mib"] = highest[0] - start


def made_features(
    path: Path, labels: np.ndarray, means: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Rows ``means[label] + noise`` as a memory map in half precision."""
    rows = np.lib.format.open_memmap(
        path, mode="w+", dtype=np.float16, shape=(len(labels), means.shape[1])
    )
    for start in range(0, len(labels), BLOCK):
        some = labels[start : start + BLOCK]
        noise = rng.standard_normal((len(some), means.shape[1]), dtype=np.float32)
        rows[start : start + BLOCK] = means[some] + noise
    rows.flush()
    return np.load(path, mmap_mode="r")


def nearest_mean_accuracy(
    means: np.ndarray, rows: np.ndarray, labels: np.ndarray
) -> float:
    """Accuracy of who knows the means: no classifier does better on average."""
    scores = rows.astype(np.float32) @ means.T - 0.5 * np.square(means).sum(axis=1)
    return float((scores.argmax(axis=1) == labels).mean())


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """What some work returns, with its seconds and its peak of memory."""
    told: dict[str, float] = {}
    start = time.perf_counter()
    with peak_memory(told):
        value = work()
    told["seconds"] = time.perf_counter() - start
    return value, told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=128_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--held-out", type=int, default=2048)
    parser.add_argument("--separation", type=float, default=0.18, help="s, above")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=Path("results/probe-scale.json"))
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    means = options.separation * rng.standard_normal(
        (options.classes, options.dim), dtype=np.float32
    )
    labels = np.arange(options.rows) % options.classes
    held_labels = np.arange(options.held_out) % options.classes
    config = LinearHeadConfig(
        epochs=options.epochs,
        warmup_ratio=1 / options.epochs,
        batch_size=min(16_384, max(1, options.rows // 4)),
        base_lrs=(0.1, 1.0),
    )
    with tempfile.TemporaryDirectory() as folder:
        train = made_features(Path(folder) / "train.npy", labels, means, rng)
        held = made_features(Path(folder) / "held.npy", held_labels, means, rng)
        fitted, probe = timed(
            lambda: fit_linear_head(
                train, labels, options.classes, config, device=options.device
            )
        )
        probe["accuracy"] = head_accuracy(
            fitted.head, held, held_labels, device=options.device
        )
        voted, neighbours = timed(
            lambda: neighbour_accuracy(
                train, labels, held, held_labels, device=options.device
            )
        )
        neighbours["accuracy"] = voted
        best = nearest_mean_accuracy(means, held, held_labels)
    # fits: one a rate on what does not validate, and the last on all
    passes = config.epochs * (len(config.base_lrs) * (1 - config.validation_share) + 1)
    an_epoch = probe["seconds"] / passes
    recipe = LinearHeadConfig()
    recipe_passes = recipe.epochs * (
        len(recipe.base_lrs)
        * (1 - min(recipe.validation_share, recipe.most_validating / IMAGENET))
        + 1
    )
    bigger = IMAGENET / options.rows
    record = {
        "rows": options.rows,
        "dim": options.dim,
        "classes": options.classes,
        "held_out": options.held_out,
        "head": asdict(config),
        "chosen_lr": fitted.base_lr,
        "probe": probe | {"seconds_an_epoch": an_epoch},
        "neighbours": neighbours,
        "accuracy_of_nearest_mean": best,
        "chance": 1 / options.classes,
        "bytes_on_disk": 2 * options.rows * options.dim,
        "extrapolated_to_imagenet": {
            "rows": IMAGENET,
            "probe_hours": an_epoch * bigger * recipe_passes / 3600,
            "neighbours_hours": neighbours["seconds"]
            * bigger
            * VALIDATION
            / options.held_out
            / 3600,
            "gigabytes_on_disk": 2 * IMAGENET * options.dim / 1e9,
        },
        "provenance": provenance(
            shlex.join(["python", "benchmarks/probe_scale.py", *sys.argv[1:]]),
            device_name(torch.device(options.device)),
        ),
    }
    write_json(options.output, record)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
