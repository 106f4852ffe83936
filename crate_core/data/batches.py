r"""The stream of training batches as a function of (seed, step), and batches for
evaluation.

Training reads one endless row of epochs, each a permutation of the pictures,

.. math:: q = tB + b, \qquad \text{epoch} = \lfloor q / n \rfloor, \qquad
          \text{picture} = \pi_{\text{epoch}}(q \bmod n),

for batch entry b of step t, batch size B and n pictures.  The permutation is a function
of (seed, epoch), the augmentation of (seed, epoch, picture), the mask of (seed, step):
no global random state, so that a run that was cut off goes on exactly, whatever the
number of loader processes or devices.

Book: :ref:`ch-first-training`.
"""

import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from crate_core.data.pictures import Augmentation, Picture, UnreadableImageError
from crate_core.data.sources import ImageSource, SelectedImages, spread_rows
from crate_core.data.transforms import (
    Size,
    augment,
    in_mode,
    mixed,
    prepare,
    raw_tensor,
)
from crate_core.keys import Stream, random_generator, random_key
from crate_core.model.config import FrameConfig
from crate_core.shapes import Images

SUBSTITUTES = 100
"""How many other pictures are tried in the place of one that cannot be read."""

NAMED = 5
"""How many unreadable pictures a warning names."""

MAX_UNREADABLE = 0.1
"""Share of pictures above which work stops as they cannot be read, unless given."""


class UnreadablePictureWarning(UserWarning):
    """Pictures that cannot be read were left out, or others taken in their place."""


MEASURED_PICTURES = 2048
"""How many pictures a quick measure of a model is taken on, at most."""


@lru_cache(maxsize=8)
def epoch_key(seed: int, epoch: int) -> int:
    """What the augmentation of one epoch is drawn from."""
    return random_key(seed, Stream.AUGMENT, epoch)


def picture_key(seed: int, epoch: int, index: int) -> int:
    """What the augmentation of one picture in one epoch is drawn from;
    :func:`random_key` would cost a tenth of reading a small picture.
    """
    return mixed(epoch_key(seed, epoch) ^ mixed(index))


@runtime_checkable
class Order(Protocol):
    """Where position q of the endless stream points: (epoch, picture)."""

    def __getitem__(self, position: int) -> tuple[int, int]: ...


class EpochOrder:
    """One permutation of all pictures per (seed, epoch)."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def __getitem__(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            generator = random_generator(self.seed, Stream.SHUFFLE, epoch)
            self._epoch, self._permutation = (
                epoch,
                torch.randperm(self.count, generator=generator).numpy(),
            )
        return epoch, int(self._permutation[place])


class StepBatches(Sampler[list[tuple[int, int]]]):
    """For each step from ``start`` to ``stop``, this process's share of the global
    batch as (epoch, picture) pairs, in micro-batches: what one loader process builds at
    a time.

    Parameters
    ----------
    count : number of pictures.
    batch_size : global batch size, all processes together; a multiple of ``processes``
        times ``accumulate``.
    seed : of the run.
    start, stop : first step, and the step after the last.
    process, processes : which slice of each batch.
    accumulate : lists per step.
    order : of the pictures; :class:`EpochOrder` unless given.

    Raises
    ------
    ValueError
        If the batch size is not such a multiple.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        process: int = 0,
        processes: int = 1,
        accumulate: int = 1,
        order: Order | None = None,
    ) -> None:
        self.order = EpochOrder(count, seed) if order is None else order
        self.batch_size = batch_size
        self.start, self.stop = start, stop
        self.parts: Sequence[Sequence[int]] = micro_batches(
            batch_size, process, processes, accumulate
        )

    def __len__(self) -> int:
        return max(0, self.stop - self.start) * len(self.parts)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            first = step * self.batch_size
            for rows in self.parts:
                yield [self.order[first + row] for row in rows]


def local_rows(batch_size: int, process: int, processes: int) -> slice:
    """Rows of the global batch that one process works on."""
    share = batch_size // processes
    return slice(process * share, (process + 1) * share)


def micro_batches(
    batch_size: int, process: int, processes: int, accumulate: int
) -> list[range]:
    """Rows of the global batch that one process works on, micro-batch by micro-batch.

    Raises ``ValueError`` unless all have the same size.
    """
    if batch_size % (processes * accumulate):
        by = f" times accumulate, {accumulate}" if accumulate > 1 else ""
        raise ValueError(
            f"batch_size={batch_size} must be a multiple of the number of processes, "
            f"{processes}{by}"
        )
    mine = local_rows(batch_size, process, processes)
    size = batch_size // (processes * accumulate)
    return [range(row, row + size) for row in range(mine.start, mine.stop, size)]


@dataclass(frozen=True)
class Batch:
    """``images`` (b, C, H, W), ``indices`` (b,) of the pictures, and (index, message)
    of unreadable ones.

    Images are bytes where the pictures are (a quarter of what floats would move between
    processes and to a GPU), else floats in [0, 1]; ``model.standardize`` takes both, to
    the same numbers. ``complete`` is false if a picture and all its substitutes were
    unreadable; its row is zero then.
    """

    images: Tensor
    indices: Tensor
    unreadable: tuple[tuple[int, str], ...]
    complete: bool = True

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, from where a GPU copies faster; the loader
        calls it.
        """
        return replace(self, images=self.images.pin_memory())


class TrainingPictures(Dataset[Batch]):
    """Batches of training pictures, asked for by lists of (epoch, picture) from
    :class:`StepBatches`.

    A picture that cannot be read is replaced by another, drawn as a function of (seed,
    picture), and reported in ``Batch.unreadable``.
    """

    def __init__(
        self,
        source: ImageSource,
        size: Size,
        channels: int,
        augmentation: Augmentation,
        seed: int,
    ) -> None:
        self.source, self.size, self.channels = source, size, channels
        self.augmentation, self.seed = augmentation, seed

    def __getitems__(self, items: list[tuple[int, int]]) -> Batch:
        images, indices, unreadable, missing = [], [], [], []
        for row, (epoch, wanted) in enumerate(items):
            for index in self.candidates(wanted):
                try:
                    picture = self.source.read(index)
                except UnreadableImageError as error:
                    unreadable.append((index, str(error)))
                    continue
                images.append(self.transform(picture, epoch, index))
                indices.append(index)
                break
            else:
                missing.append(row)
        for row in missing:
            images.insert(
                row,
                torch.zeros_like(images[0])
                if images
                else torch.zeros(self.channels, *self.size),
            )
            indices.insert(row, items[row][1])
        return Batch(
            torch.stack(images), torch.tensor(indices), tuple(unreadable), not missing
        )

    def candidates(self, wanted: int) -> Iterator[int]:
        """The wanted picture, then its substitutes."""
        yield wanted
        generator = random_generator(self.seed, Stream.SUBSTITUTE, wanted)
        yield from torch.randint(
            len(self.source), (SUBSTITUTES,), generator=generator
        ).tolist()

    def transform(self, picture: Picture, epoch: int, index: int) -> Tensor:
        """The picture (C, H, W) as epoch ``epoch`` sees it."""
        picture = in_mode(picture, self.channels)
        key = picture_key(self.seed, epoch, index)
        shown = augment(picture, self.size, self.augmentation, key)
        pixels = raw_tensor(shown, self.channels)
        return pixels if pixels.dtype == torch.uint8 else pixels.clamp(0, 1)


class HeldOutPictures(Dataset[Batch]):
    """Batches of pictures as evaluation sees them, in order; unreadable ones are left
    out and reported.
    """

    def __init__(self, source: ImageSource, size: Size, channels: int) -> None:
        self.source, self.size, self.channels = source, size, channels

    @cached_property
    def empty(self) -> Tensor:
        return torch.zeros(0, self.channels, *self.size)

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, items: list[int]) -> Batch:
        images, indices, unreadable = [], [], []
        for index in items:
            try:
                images.append(
                    prepare(self.source.read(index), self.size, self.channels)
                )
                indices.append(index)
            except UnreadableImageError as error:
                unreadable.append((index, str(error)))
        stacked = torch.stack(images) if images else self.empty
        return Batch(
            stacked, torch.tensor(indices, dtype=torch.int64), tuple(unreadable)
        )


def as_is(batch: Any) -> Any:
    """Collation for datasets that return whole batches."""
    return batch


def undisturbed(worker: int) -> None:
    """Signals that end a run after its step reach its loader processes too, which have
    to go on until then.
    """
    del worker
    for name in ("SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def loader(
    dataset: Dataset[Batch],
    batches: Iterable[list[Any]],
    workers: int,
    pin: bool = False,
) -> DataLoader:
    """A ``DataLoader`` over whole batches; the batches do not depend on ``workers``."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=as_is,
        pin_memory=pin,
        # the loader draws a seed for its workers; not from the global state
        generator=torch.Generator(),
        persistent_workers=False,
        worker_init_fn=undisturbed,
    )


def evaluation_batches(
    source: ImageSource,
    size: Size,
    channels: int,
    batch_size: int = 256,
    workers: int = 0,
) -> Iterator[Batch]:
    """All pictures of a source in order, as :func:`prepare` leaves them, in batches of
    at most ``batch_size``.
    """
    rows = [
        list(range(i, min(i + batch_size, len(source))))
        for i in range(0, len(source), batch_size)
    ]
    yield from loader(HeldOutPictures(source, size, channels), rows, workers)


def some_pictures(
    source: ImageSource, config: FrameConfig, count: int = MEASURED_PICTURES
) -> Images:
    """Up to ``count`` readable pictures (B, C, H, W) in [0, 1], spread evenly over a
    source, not augmented.

    Raises ``ValueError`` if none is readable.
    """
    return torch.cat(list(some_batches(source, config, count)))


def some_batches(
    source: ImageSource,
    config: FrameConfig,
    count: int = MEASURED_PICTURES,
    batch_size: int = 64,
    report: Callable[[str], None] = lambda line: None,
) -> Iterator[Images]:
    """The pictures of :func:`some_pictures` in batches (b, C, H, W), so that few are in
    memory at a time; ``report`` gets a message with the name of each that cannot be
    read.

    Raises ``ValueError`` if none is readable.
    """
    chosen = spread_rows(source, count)
    found = False
    for batch in evaluation_batches(
        SelectedImages(source, chosen), config.image_shape, config.channels, batch_size
    ):
        for _, message in batch.unreadable:
            report(message)
        if len(batch.images):
            found = True
            yield batch.images
    if not found:
        raise ValueError(
            f"none of {len(chosen)} pictures can be read, the first: "
            f"{source.name(int(chosen[0]))}"
        )


@dataclass
class UnreadableCount:
    """Distinct unreadable pictures met so far, by index, and the share above which the
    work stops; ``part`` says of which pictures.
    """

    total: int
    limit: float
    met: dict[int, str]
    part: str = "training"

    def add(self, batch: Batch, report: Callable[[str], None]) -> None:
        """Count a batch's unreadable pictures, naming each new one through ``report``.

        Raises
        ------
        ValueError
            If more than ``limit`` of all pictures proved unreadable, or no substitute
            was found for one.
        """
        for index, message in batch.unreadable:
            if index not in self.met:
                self.met[index] = message
                report(
                    f"skipped an unreadable picture ({len(self.met)} so far): {message}"
                )
        share = len(self.met) / self.total
        if share > self.limit or not batch.complete:
            last = list(self.met.values())[-1]
            raise ValueError(
                f"{len(self.met)} of {self.total} {self.pictures} ({share:.1%}) "
                f"cannot be read; the run stops above {self.limit:.1%} "
                f"(max_unreadable). The last one: {last}"
            )

    @property
    def pictures(self) -> str:
        """What to call the pictures that are counted."""
        return f"{self.part} pictures".strip()

    @property
    def names(self) -> tuple[str, ...]:
        """A message with the name of each, in order of the pictures."""
        return tuple(message for _, message in sorted(self.met.items()))

    def warn(self, what: str) -> None:
        """Warn of those that were met; ``what`` says what became of them."""
        if self.met:
            more = "; ..." if len(self.met) > NAMED else ""
            warnings.warn(
                f"{len(self.met):,} of {self.total:,} {self.pictures} cannot be "
                f"read and {what}: {'; '.join(self.names[:NAMED])}{more}",
                UnreadablePictureWarning,
                stacklevel=3,
            )


def readable_batches(
    source: ImageSource,
    size: Size,
    channels: int,
    unreadable: UnreadableCount,
    batch_size: int = 256,
    workers: int = 0,
) -> Iterator[Batch]:
    """Batches of :func:`evaluation_batches`, of at least one picture each.

    ``unreadable`` counts those that cannot be read; a warning names them at the end.

    Raises
    ------
    ValueError
        As soon as more than its limit cannot be read, or if none can.
    """
    for batch in evaluation_batches(source, size, channels, batch_size, workers):
        unreadable.add(batch, lambda line: None)
        if len(batch.images):
            yield batch
    if len(unreadable.met) == len(source):
        raise ValueError(
            f"none of {len(source)} {unreadable.pictures} can be read, the "
            f"first: {next(iter(unreadable.names), 'there is none')}"
        )
    unreadable.warn("were left out")
