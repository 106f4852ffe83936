r"""Hugging Face datasets read as they come (``streaming=True``), for what fits neither
in memory nor on the disk.

A stream has no random access, so an epoch is the data's own order through a shuffle
buffer of ``BUFFER`` rows:

.. math:: q = tB + b, \qquad \text{epoch} = \lfloor q / n \rfloor, \qquad
          \text{row} =
          \mathrm{shuffled}_{(\text{seed},\,\text{epoch})}\big(q \bmod n\big),

files in random order, rows mixed over a buffer's length.  What that means:

* Batches are a function of (seed, step), whatever the number of loader processes, as
  for other data.  A process of several decodes its share, and reads all of it.
* A run that is continued skips the rows of its epoch that were used already: exact, and
  as slow as reading them.
* Rows that lie far apart in a file are never in one batch: data sorted by class should
  be shuffled when written.
* Labels are not read.  Where the data has no part of its own for it, the first rows are
  held out.

Book: :ref:`ch-pretraining`.
"""

import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from crate_core.data.batches import Batch, TrainingPictures, micro_batches
from crate_core.data.named import (
    KEPT_ROWS,
    cell_file,
    damaged_shard,
    encoded_column,
    image_column,
    open_tables,
    streamed_rows,
    table_features,
)
from crate_core.data.parts import visible_parquet
from crate_core.data.pictures import Picture, open_picture
from crate_core.data.sources import ImageData, ImageSource
from crate_core.keys import Stream, random_key

BUFFER = 10_000
"""Rows of the shuffle buffer."""


@dataclass(frozen=True)
class Row:
    """A picture as it comes: the file's bytes, a number made from them, the same in
    every epoch, and what to call it: rows of a shuffled stream have no number.
    """

    data: bytes
    index: int
    name: str


def encoded(cell: Any, origin: str) -> Row:
    """A cell of an image column as a row; one without bytes is read from its path, or
    empty.  Its name is its path's, or says its size and checksum.
    """
    try:
        file = cell_file(cell)
        data = file.getvalue() if isinstance(file, BytesIO) else Path(file).read_bytes()
    except (ValueError, OSError):
        data = b""
    index = zlib.crc32(data)
    path = cell.get("path") if isinstance(cell, dict) else None
    name = path or f"picture of {len(data):,} bytes, CRC-32 {index:08x}"
    return Row(data, index, f"{origin} {name}")


@dataclass(eq=False)
class EncodedImages(ImageSource):
    """Pictures in memory, as the bytes of their files."""

    rows: list[Row]
    origin: str

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        return self.rows[index].name

    def decode(self, index: int) -> Picture:
        return open_picture(BytesIO(self.rows[index].data))


@dataclass(eq=False)
class StreamedImages(ImageSource):
    """Pictures in the order of a stream, ``count`` an epoch; ``first`` are those that
    can be looked at by number.
    """

    table: Any
    column: str
    count: int
    first: EncodedImages
    buffer: int = BUFFER

    def __len__(self) -> int:
        return self.count

    # Yardsticks look at pictures spread over a source; of a stream they get its first
    # ones.
    def name(self, index: int) -> str:
        return self.first.name(index * len(self.first) // self.count)

    def decode(self, index: int) -> Picture:
        return self.first.decode(index * len(self.first) // self.count)

    def epoch(self, seed: int, epoch: int) -> Iterator[Row]:
        """All rows of one epoch, shuffled as a function of (seed, epoch)."""
        key = random_key(seed, Stream.SHUFFLE, epoch) % 2**32
        try:
            for row in self.table.shuffle(seed=key, buffer_size=self.buffer):
                yield encoded(row[self.column], self.first.origin)
        # pyarrow's are ValueErrors; a column of another type is a TypeError
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(
                f"{self.first.origin} cannot be read on: {error}"
            ) from error


class StreamedBatches(Sampler[list[tuple[int, Row]]]):
    """For each step from ``start`` to ``stop``, this process's share of the global
    batch as (epoch, row) pairs, in micro-batches.

    Parameters and errors as those of :class:`crate_core.data.batches.StepBatches`, with
    the source in place of the count.
    """

    def __init__(
        self,
        source: StreamedImages,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        process: int = 0,
        processes: int = 1,
        accumulate: int = 1,
    ) -> None:
        self.source, self.batch_size, self.seed = source, batch_size, seed
        self.start, self.stop = start, stop
        self.parts = micro_batches(batch_size, process, processes, accumulate)

    def __len__(self) -> int:
        return max(0, self.stop - self.start) * len(self.parts)

    def endless(self) -> Iterator[tuple[int, Row]]:
        """The rows from the first one of step ``start`` on, epoch after epoch."""
        first, skipped = divmod(self.start * self.batch_size, len(self.source))
        for epoch in itertools.count(first):
            rows = itertools.islice(
                self.source.epoch(self.seed, epoch),
                skipped if epoch == first else 0,
                None,
            )
            yield from ((epoch, row) for row in rows)

    def __iter__(self) -> Iterator[list[tuple[int, Row]]]:
        rows = self.endless()
        for _ in range(self.start, self.stop):
            batch = list(itertools.islice(rows, self.batch_size))
            for part in self.parts:
                yield batch[part.start : part.stop]


class OneBatch(TrainingPictures):
    """The pictures of one streamed batch; a picture that cannot be read is replaced by
    another of them.
    """

    def __init__(self, rows: list[Row], like: TrainingPictures) -> None:
        source = EncodedImages(rows, "")
        super().__init__(source, like.size, like.channels, like.augmentation, like.seed)
        self.rows = rows

    def transform(self, picture: Picture, epoch: int, index: int) -> Tensor:
        """The picture (C, H, W) as epoch ``epoch`` sees it, whatever its place in the
        batch.
        """
        return super().transform(picture, epoch, self.rows[index].index)


class StreamedPictures(TrainingPictures):
    """Batches of streamed pictures, asked for by lists of (epoch, row) from
    :class:`StreamedBatches`.

    The main process reads, the loader's processes decode.
    """

    def __getitems__(self, items: list[tuple[int, Row]]) -> Batch:  # type: ignore[override]
        rows = [row for _, row in items]
        batch = OneBatch(rows, self).__getitems__(
            [(epoch, place) for place, (epoch, _) in enumerate(items)]
        )
        indices = torch.tensor([rows[place].index for place in batch.indices.tolist()])
        unreadable = tuple(
            (rows[place].index, message) for place, message in batch.unreadable
        )
        return Batch(batch.images, indices, unreadable, batch.complete)


def stream_data(location: str, keep: bool = True) -> ImageData:
    """A dataset in the Hugging Face image schema as a stream: parquet files here, or a
    name on the Hub.

    Parameters
    ----------
    location : of the dataset.
    keep : whether to keep rows in memory, those held out and the first to train on; of
        several processes only the one that looks at them needs to.

    Raises
    ------
    FileNotFoundError
        If there is no such file and the Hub does not give a dataset of that name.
    ValueError
        If the table has no image column, or the number of its rows is not known.

    Book: :ref:`ch-pretraining`.
    """
    origin = f"hf:{location}"
    tables, counts, left_out = open_tables(location, streaming=True, labels=False)
    count = counts["train"]
    if count is None:
        raise ValueError(
            f"{origin} does not say how many rows it has to train on; read it without "
            "streaming"
        )
    other_name = next((name for name in tables if name != "train"), None)
    table = tables["train"]
    column = image_column(table_features(table), origin)

    def kept(stream: Any, rows: int) -> EncodedImages:
        try:
            first = stream.take(rows if keep else 0)
            return EncodedImages(
                [encoded(row[column], origin) for row in first], origin
            )
        except (ValueError, TypeError, OSError) as error:  # as in an epoch
            path = Path(location).expanduser()
            files = visible_parquet(path) if path.is_dir() else [path]
            found = damaged_shard(files) if path.exists() else ""
            raise ValueError(
                found or f"{origin} is not readable parquet: {error}"
            ) from error

    table, other = (
        encoded_column(part, column, origin)
        for part in (table, table if other_name is None else tables[other_name])
    )
    rows = KEPT_ROWS if other_name is not None else streamed_rows(count, origin)
    held_out = kept(other, rows)
    if other_name is None:
        table, count = table.skip(rows), count - rows
    train = StreamedImages(table, column, count, kept(table, KEPT_ROWS))
    description = (
        f"{origin}: {count:,} to train on (streamed), {len(held_out):,} held out "
        f"({other_name or 'the first rows'})"
    )
    columns = (f"images in {column!r}", "labels are not read")
    return ImageData(train, held_out, (), description, tuple(left_out), columns)
