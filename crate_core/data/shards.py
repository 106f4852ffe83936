r"""Prepared pictures in tar or parquet shards, read in place: each process its own.

``crate prepare`` writes shards of some thousand pictures and an index of where each
picture lies, so that any of them can be read by its number: an epoch goes on where it
was cut off without reading what came before, and no buffer is filled first.  What
training asks for lies close together.  With batch size B, a batch has L lanes of B / L
rows, and in each epoch

* the shards are put in random order, and the row of their pictures is cut into L
  stretches of (nearly) equal length, one a lane;
* a lane shuffles the pictures of ``WINDOW`` shards at a time.

L is the largest divisor of B up to ``LANES`` and the number of shards.  Order depends
on (seed, epoch, B) alone; a process that works on the rows of its lanes opens their
shards and, but for those cut at the ends of a stretch, no others.  Every lane has its
own epochs, which end within a step of each other.

Book: :ref:`ch-pretraining`.
"""

import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from crate_core.data.batches import Order
from crate_core.data.folders import counted
from crate_core.data.pictures import Picture, open_picture
from crate_core.data.sources import ImageData, ImageSource
from crate_core.keys import Stream, random_generator

MANIFEST = "prepared.json"
"""What ``crate prepare`` wrote: format, classes, parts and their shards, settings."""

ROW_GROUP = 64
"""Rows of a parquet file that are read together."""

LANES = 64
"""Most lanes of a batch."""

WINDOW = 4
"""Shards whose pictures a lane mixes."""

OPEN_FILES = 512
"""Files that a process keeps open."""


class OpenFile:
    """A file that is open for reading as long as something holds it."""

    def __init__(self, path: Path) -> None:
        self.file = open(path, "rb")  # noqa: SIM115

    def __del__(self) -> None:
        self.file.close()

    def read(self, offset: int, size: int) -> bytes:
        """Some of its bytes."""
        self.file.seek(offset)
        return self.file.read(size)


@lru_cache(maxsize=OPEN_FILES)
def opened(path: Path, process: int) -> OpenFile:
    """A file, kept open; each process has its own, with a position of its own."""
    del process
    return OpenFile(path)


@lru_cache(maxsize=OPEN_FILES)
def opened_parquet(path: Path, process: int) -> Any:
    """A parquet file open for reading, kept open; each process has its own."""
    import pyarrow.parquet

    del process
    return pyarrow.parquet.ParquetFile(path)


@lru_cache(maxsize=32)
def row_group(path: Path, group: int, process: int) -> Any:
    """The encoded pictures of one row group, a column of bytes."""
    table = opened_parquet(path, process).read_row_group(group, columns=["image"])
    return table.column("image").combine_chunks().field("bytes")


@dataclass(eq=False)
class ShardedImages(ImageSource):
    """Pictures of one part in shards.

    Parameters
    ----------
    files : the shards.
    shard : (n,) which shard a picture lies in; those of one shard follow each other.
    offset : (n,) where: its first byte in a tar file, its row in a parquet file.
    size : (n,) bytes of a picture.
    labels : (n,) class numbers, or ``None``.
    """

    files: Sequence[Path]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.shard)

    @cached_property
    def counts(self) -> list[int]:
        """Pictures in each shard."""
        return np.bincount(self.shard, minlength=len(self.files)).tolist()

    def name(self, index: int) -> str:
        path = self.files[self.shard[index]]
        where = "byte" if path.suffix == ".tar" else "row"
        return f"{path} {where} {self.offset[index]}"

    def encoded(self, index: int) -> bytes:
        """The bytes of a picture's file."""
        path, offset = self.files[self.shard[index]], int(self.offset[index])
        if path.suffix == ".tar":
            return opened(path, os.getpid()).read(offset, int(self.size[index]))
        group, row = divmod(offset, ROW_GROUP)
        data: bytes = row_group(path, group, os.getpid())[row].as_py()
        return data

    def decode(self, index: int) -> Picture:
        return open_picture(io.BytesIO(self.encoded(index)))


def lanes_of(shards: int, batch_size: int) -> int:
    """The largest divisor of the batch size up to ``LANES`` and ``shards``."""
    most = min(LANES, shards, batch_size)
    return next(n for n in range(most, 0, -1) if batch_size % n == 0)


class ShardOrder:
    """Where position q of the endless stream points, (epoch, picture), as the module
    says.

    Parameters
    ----------
    counts : pictures in each shard, at least one.
    seed : of the run.
    batch_size : B, all processes together.
    """

    def __init__(self, counts: Sequence[int], seed: int, batch_size: int) -> None:
        self.seed, self.batch_size = seed, batch_size
        self.counts = np.asarray(counts)
        self.first = np.concatenate([[0], np.cumsum(self.counts)])
        self.lanes = lanes_of(len(counts), batch_size)
        total = int(self.first[-1])
        self.ends = [lane * total // self.lanes for lane in range(self.lanes + 1)]
        self._kept: dict[int, tuple[int, np.ndarray]] = {}

    def __getitem__(self, position: int) -> tuple[int, int]:
        step, row = divmod(position, self.batch_size)
        share = self.batch_size // self.lanes
        lane, place = divmod(row, share)
        length = self.ends[lane + 1] - self.ends[lane]
        epoch, at = divmod(step * share + place, length)
        return epoch, int(self.pictures(lane, epoch)[at])

    def pictures(self, lane: int, epoch: int) -> np.ndarray:
        """The pictures of one lane in one epoch, in order; the last epoch of each lane
        is kept.
        """
        if lane not in self._kept or self._kept[lane][0] != epoch:
            self._kept[lane] = epoch, self._drawn(lane, epoch)
        return self._kept[lane][1]

    def _drawn(self, lane: int, epoch: int) -> np.ndarray:
        shuffle = random_generator(self.seed, Stream.SHUFFLE, epoch)
        shards = torch.randperm(len(self.counts), generator=shuffle).numpy()
        stops = np.cumsum(self.counts[shards])
        low, high = self.ends[lane], self.ends[lane + 1]
        pieces = []
        for shard, stop in zip(shards, stops, strict=True):
            start = stop - self.counts[shard]
            if start < high and stop > low:
                own = np.arange(max(start, low), min(stop, high)) - start
                pieces.append(self.first[shard] + own)
        draw = random_generator(self.seed, Stream.SHUFFLE, epoch, 1 + lane)
        mixed = []
        for k in range(0, len(pieces), WINDOW):
            window = np.concatenate(pieces[k : k + WINDOW])
            mixed.append(window[torch.randperm(len(window), generator=draw).numpy()])
        return np.concatenate(mixed)


def order_of(source: ImageSource, seed: int, batch_size: int) -> Order | None:
    """The order in which a source is read best; ``None`` where any order will do."""
    if isinstance(source, ShardedImages):
        return ShardOrder(source.counts, seed, batch_size)
    return None


def index_file(root: Path, part: str) -> Path:
    """Where the index of one part lies."""
    return root / f"{part}.index.npz"


def shards(path: str | Path) -> ImageData:
    """What ``crate prepare`` wrote in tar or parquet shards.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or a shard is not there.
    ValueError
        If it holds no prepared shards.

    Book: :ref:`ch-pretraining`.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    if not (root / MANIFEST).is_file():
        raise ValueError(
            f"{root} has no {MANIFEST}: it is not what crate prepare wrote, or it is "
            "not finished"
        )
    manifest = json.loads((root / MANIFEST).read_text(encoding="utf8"))
    if manifest["format"] not in ("tar", "parquet"):
        raise ValueError(f"{root} holds prepared folders: give folder:{root}")
    sources = {
        part: part_of_shards(root, part, [root / name for name in written["shards"]])
        for part, written in manifest["parts"].items()
    }
    left_out = [
        f"{counted(len(written['unreadable']), 'picture')} of {part} that could not be "
        "read when they were prepared"
        for part, written in manifest["parts"].items()
        if written["unreadable"]
    ]
    train, held_out, classes = sources["train"], sources["val"], manifest["classes"]
    return ImageData(
        train,
        held_out,
        tuple(classes),
        f"shards {root}: {len(train):,} to train on in {len(train.files):,} files, "
        f"{len(held_out):,} held out",
        tuple(left_out),
    )


def part_of_shards(root: Path, part: str, files: Sequence[Path]) -> ShardedImages:
    """The pictures of one part; ``FileNotFoundError`` names a shard that is missing."""
    for file in (index_file(root, part), *files):
        if not file.is_file():
            raise FileNotFoundError(f"there is no file {file}; prepare {root} again")
    with np.load(index_file(root, part)) as index:
        labels = index["label"]
        return ShardedImages(
            files,
            index["shard"],
            index["offset"],
            index["size"],
            labels if (labels >= 0).any() else None,
        )
