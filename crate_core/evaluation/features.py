r"""Features of pictures, computed once: in memory, or on disk where they are many.

Book: :ref:`ch-first-training`, :ref:`ch-evaluation`.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crate_core.data.batches import (
    MAX_UNREADABLE,
    UnreadableCount,
    readable_batches,
)
from crate_core.data.pictures import Picture
from crate_core.data.sources import ImageSource
from crate_core.model.autoencoder import MaskedAutoencoder, evaluation_mode
from crate_core.model.config import FrameConfig
from crate_core.model.files import weights_digest
from crate_core.records import printable, write_json
from crate_core.shapes import Images
from crate_core.training.recipe import Precision

PIXEL_SIDE = 32
"""Larger pictures are averaged down to this side for the pixel control, which would not
fit in memory otherwise.
"""


@dataclass(frozen=True)
class Features:
    """What probes are fitted on, one row a picture: ``class_token`` (n, d),
    ``patch_mean`` (n, d), ``pixels`` (n, m), ``labels`` (n,) and ``indices`` (n,), the
    pictures' numbers; ``unreadable`` names those that were left out.
    """

    class_token: np.ndarray
    patch_mean: np.ndarray
    pixels: np.ndarray
    labels: np.ndarray
    indices: np.ndarray
    unreadable: tuple[str, ...]


def encode(
    model: MaskedAutoencoder,
    source: ImageSource,
    batch_size: int = 256,
    workers: int = 0,
    max_unreadable: float = MAX_UNREADABLE,
    part: str = "",
) -> Features:
    r"""Features of all pictures of a source, computed once, nothing masked.

    With encoder output :math:`(z_0, z_1, \dots, z_L)`: the class token :math:`z_0`, the
    mean of patch tokens :math:`\tfrac1L \sum_{i \ge 1} z_i`, and the pixels.

    Parameters
    ----------
    model : used in evaluation mode, on its device.
    source : pictures; brought to the model's image size and channels.
    batch_size, workers : how they are read.
    max_unreadable : largest share of the pictures that may be unreadable.
    part : what to call the pictures in a message, such as "held-out".

    Warns
    -----
    UnreadablePictureWarning
        Naming pictures that were left out.

    Raises
    ------
    ValueError
        If no picture can be read, or more than ``max_unreadable`` of them cannot.

    Book: :ref:`ch-first-training`.
    """
    unreadable = UnreadableCount(len(source), max_unreadable, {}, part)
    found = list(encoded_batches(model, source, unreadable, batch_size, workers))
    rows, tokens, means, pixels = zip(*found, strict=True)
    kept = np.concatenate(rows)
    labels = np.full(len(kept), -1) if source.labels is None else source.labels[kept]
    return Features(
        torch.cat(tokens).numpy(),
        torch.cat(means).numpy(),
        torch.cat(pixels).numpy(),
        labels,
        kept,
        unreadable.names,
    )


def encoded_batches(
    model: MaskedAutoencoder,
    source: ImageSource,
    unreadable: UnreadableCount,
    batch_size: int,
    workers: int,
) -> Iterator[tuple[np.ndarray, Tensor, Tensor, Tensor]]:
    """For each batch of a source, in order: the numbers of its readable pictures, their
    class tokens, means of patch tokens and pixels, on the CPU.
    """
    config = model.config
    device = next(model.parameters()).device
    for batch in readable_batches(
        source, config.image_shape, config.channels, unreadable, batch_size, workers
    ):
        # no gradients here alone: what a generator sets holds for its reader, too
        with torch.no_grad(), evaluation_mode(model):
            images = batch.images.to(device)
            z = model.forward_features(model.standardize(images)).float()
        small = small_pixels(batch.images)
        yield batch.indices.numpy(), z[:, 0].cpu(), z[:, 1:].mean(dim=1).cpu(), small


def pixel_width(config: FrameConfig) -> int:
    """How many numbers :func:`small_pixels` makes of a picture."""
    sides = [min(side, PIXEL_SIDE) for side in config.image_shape]
    return config.channels * math.prod(sides)


def small_pixels(images: Images) -> torch.Tensor:
    """Flattened pixels (B, m) of pictures averaged down to at most ``PIXEL_SIDE`` a
    side.
    """
    size = [min(side, PIXEL_SIDE) for side in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="area").flatten(1)


AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

STORED = ("class_token", "patch_mean", "pixels")


def features_key(
    model: MaskedAutoencoder, source: ImageSource, precision: Precision
) -> str:
    """What features depend on, in 16 letters: weights, configuration, pictures by name
    and order, their labels, and the precision.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps(asdict(model.config), sort_keys=True).encode())
    digest.update(weights_digest(model.state_dict()).encode())
    for index in range(len(source)):
        digest.update(printable(source.name(index)).encode())
        digest.update(b"\0")
    if source.labels is not None:
        digest.update(source.labels.tobytes())
    digest.update(precision.encode())
    return digest.hexdigest()[:16]


def cached_features(
    model: MaskedAutoencoder,
    source: ImageSource,
    cache: str | Path,
    *,
    precision: Precision = "fp32",
    pixels: bool = True,
    batch_size: int = 256,
    workers: int = 0,
    process: int = 0,
    processes: int = 1,
    max_unreadable: float = MAX_UNREADABLE,
    part: str = "",
) -> Features:
    """Features as :func:`encode` gives them, kept on disk and computed once.

    Files ``KEY/class_token.npy`` and so on under ``cache`` are memory-mapped float16, a
    row a picture; KEY is :func:`features_key`, so that other weights or pictures have
    other files.  Memory is one batch, whatever the number of pictures; disk is 4 d
    bytes a picture (and 2 m for m pixels).  Several processes write their own rows of
    the same files, and each returns when all rows are there only if the caller waits
    between them (``accelerator.wait_for_everyone``); a run that was cut off goes on
    after its last whole batch.

    Parameters
    ----------
    model, source, batch_size, workers : as of :func:`encode`.
    cache : a folder, made if it is not there.
    precision : of the encoder's products.
    pixels : also keep the pixels, for their control.
    process, processes : which share of the rows this process computes.
    max_unreadable : largest share of them that may be unreadable.
    part : what to call the pictures in a message, such as "held-out".

    Raises
    ------
    ValueError
        If no picture of this process's share can be read, or too many cannot, or there
        is no such share.

    Book: :ref:`ch-evaluation`.
    """
    if not 0 <= process < processes:
        raise ValueError(f"process={process} of processes={processes}: no such share")
    folder = Path(cache) / features_key(model, source, precision)
    folder.mkdir(parents=True, exist_ok=True)
    mine = range(
        process * len(source) // processes, (process + 1) * len(source) // processes
    )
    done = folder / f"done-{process}-of-{processes}.json"
    state: dict[str, Any] = (
        json.loads(done.read_text()) if done.is_file() else {"rows": 0, "bad": {}}
    )
    names = STORED if pixels else STORED[:2]
    arrays = {name: stored_rows(folder, name, model, len(source)) for name in names}
    left = _Rows(source, range(mine.start + state["rows"], mine.stop))
    met = {int(row) - left.rows.start: said for row, said in state["bad"].items()}
    unreadable = UnreadableCount(len(mine), max_unreadable, met, part)

    def note(rows: int) -> None:
        """What is on disk so far."""
        for array in arrays.values():
            array.flush()
        bad = {row + left.rows.start: said for row, said in unreadable.met.items()}
        write_json(done, {"rows": rows, "bad": bad})

    if len(left):
        autocast = (
            torch.autocast(next(model.parameters()).device.type, AUTOCAST[precision])
            if precision in AUTOCAST
            else nullcontext()
        )
        with autocast:
            for rows, *values in encoded_batches(
                model, left, unreadable, batch_size, workers
            ):
                at = rows + left.rows.start
                for name, value in zip(STORED, values, strict=True):
                    if name in arrays:
                        arrays[name][at] = value.to(torch.float16).numpy()
                note(int(at[-1]) + 1 - mine.start)
        note(len(mine))
    bad = {
        int(row): said
        for file in folder.glob(f"done-*-of-{processes}.json")
        for row, said in json.loads(file.read_text())["bad"].items()
    }
    kept = np.setdiff1d(np.arange(len(source)), list(bad))
    labels = np.full(len(source), -1) if source.labels is None else source.labels
    read = {name: array if not bad else array[kept] for name, array in arrays.items()}
    return Features(
        read["class_token"],
        read["patch_mean"],
        read.get("pixels", np.zeros((len(kept), 0), np.float16)),
        labels[kept],
        kept,
        tuple(bad[row] for row in sorted(bad)),
    )


class _Rows(ImageSource):
    """Consecutive pictures of a source."""

    def __init__(self, source: ImageSource, rows: range) -> None:
        self.source, self.rows = source, rows

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.source.name(self.rows[index])

    def decode(self, index: int) -> Picture:
        return self.source.decode(self.rows[index])


def stored_rows(
    folder: Path, name: str, model: MaskedAutoencoder, count: int
) -> np.memmap:
    """The memory-mapped rows of one kind of features, made if they are not there."""
    path = folder / f"{name}.npy"
    config = model.config
    width = pixel_width(config) if name == "pixels" else config.dim
    if not path.is_file():
        # made whole under another name: a process beside this one never sees half of it
        partial = path.with_name(f"{name}.{os.getpid()}.partial")
        np.lib.format.open_memmap(
            partial, mode="w+", dtype=np.float16, shape=(count, width)
        ).flush()
        if path.is_file():
            partial.unlink()
        else:
            partial.replace(path)
    return np.lib.format.open_memmap(path, mode="r+")
