r"""The stream of training batches as a function of (seed, step), and batches for evaluation.

Training reads one endless row of epochs, each a permutation of the pictures,

.. math:: q = tB + b, \qquad \text{epoch} = \lfloor q / n \rfloor, \qquad
          \text{picture} = \pi_{\text{epoch}}(q \bmod n),

for batch entry b of step t, batch size B and n pictures.  The permutation is a function of (seed, epoch), the
augmentation of (seed, epoch, picture), the mask of (seed, step): no global random state, so that a run that
was cut off goes on exactly, whatever the number of loader processes or devices.

Book: :ref:`ch-first-training`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import InterpolationMode, RandomHorizontalFlip, RandomResizedCrop
from torchvision.transforms import functional as transforms

from crate_core.recipes import Augmentation
from crate_core.shapes import Images, PatchNoise
from crate_core.sources import ImageSource, Picture, UnreadableImageError

Size = tuple[int, int]

CROP_SCALE = (0.2, 1.0)
"""Area of a random crop, as a share of the picture: MAE's pretraining."""

SUBSTITUTES = 100
"""How many other pictures are tried in the place of one that cannot be read."""


class Stream(IntEnum):
    """What a random key is for; keeps the streams of one seed apart."""

    SHUFFLE = 0
    AUGMENT = 1
    MASK = 2
    SUBSTITUTE = 3
    EVALUATION_MASK = 4


def random_key(*numbers: int) -> int:
    """A 63-bit seed from nonnegative integers, well mixed (numpy's ``SeedSequence``)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def random_generator(*numbers: int) -> torch.Generator:
    """A torch generator on the CPU seeded by :func:`random_key`."""
    return torch.Generator().manual_seed(random_key(*numbers))


def mask_noise(seed: int, step: int, batch_size: int, length: int, stream: Stream = Stream.MASK) -> PatchNoise:
    """Uniform noise (batch_size, length) in [0, 1) that fixes the masks of one step: a function of (seed,
    step).
    """
    return torch.rand(batch_size, length, generator=random_generator(seed, stream, step))


def to_tensor(picture: Picture, channels: int) -> Tensor:
    """A picture as a float tensor (C, H, W) in [0, 1], grey for one channel and colour for three.

    Raises ``ValueError`` for other channel counts, unless the picture is a tensor that has just as many.
    """
    if isinstance(picture, Tensor):
        if len(picture) == channels:
            return picture
        if len(picture) == 1 and channels == 3:
            return picture.expand(3, -1, -1)
        if len(picture) == 3 and channels == 1:
            return transforms.rgb_to_grayscale(picture)
        raise ValueError(f"pictures of {len(picture)} channels do not fit a model of {channels}")
    return transforms.pil_to_tensor(in_mode(picture, channels)).float() / 255


def in_mode(picture: Picture, channels: int) -> Picture:
    """A PIL picture in the mode that has this many channels; tensors pass.  ``ValueError`` unless 1 or 3."""
    if isinstance(picture, Tensor):
        return picture
    if channels not in (1, 3):
        raise ValueError(f"image files are read as grey (1 channel) or colour (3), the model has {channels}")
    return picture.convert("L" if channels == 1 else "RGB")


def fit(picture: Picture, size: Size) -> Picture:
    """Resize so that the picture just covers ``size`` (height, width), bicubic, and cut the centre."""
    width, height = transforms.get_image_size(picture)
    if (height, width) == size:
        return picture
    scale = max(size[0] / height, size[1] / width)
    covering = [max(size[0], round(height * scale)), max(size[1], round(width * scale))]
    resized = transforms.resize(picture, covering, InterpolationMode.BICUBIC, antialias=True)
    return transforms.center_crop(resized, list(size))


def prepare(picture: Picture, size: Size, channels: int) -> Tensor:
    """What evaluation sees: :func:`fit`, then a tensor (channels, height, width) in [0, 1]."""
    return to_tensor(fit(in_mode(picture, channels), size), channels).clamp(0, 1)


def augmented(picture: Picture, size: Size, channels: int, key: int) -> Tensor:
    """Random resized crop (area 0.2 to 1, bicubic) and horizontal flip, a function of ``key`` alone; then a
    tensor.

    The two transforms of MAE's pretraining, from torchvision, which draw from torch's global generator: its
    state is put aside and back.
    """
    picture = in_mode(picture, channels)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(key)
        cropped = RandomResizedCrop(size, CROP_SCALE, interpolation=InterpolationMode.BICUBIC, antialias=True)(picture)
        flipped = RandomHorizontalFlip()(cropped)
    return to_tensor(flipped, channels).clamp(0, 1)


class EpochOrder:
    """Where position q of the endless stream points: (epoch, picture), with one permutation per (seed,
    epoch).
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed = count, seed
        self._epoch, self._permutation = -1, torch.empty(0, dtype=torch.int64)

    def __getitem__(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            generator = random_generator(self.seed, Stream.SHUFFLE, epoch)
            self._epoch, self._permutation = epoch, torch.randperm(self.count, generator=generator)
        return epoch, int(self._permutation[place])


class StepBatches(Sampler[list[tuple[int, int]]]):
    """For each step from ``start`` to ``stop``, this process's share of the global batch as (epoch, picture)
    pairs.

    Parameters
    ----------
    count : number of pictures.
    batch_size : global batch size, all processes together; a multiple of ``processes``.
    seed : of the run.
    start, stop : first step, and the step after the last.
    process, processes : which slice of each batch.

    Raises
    ------
    ValueError
        If the batch size is not a multiple of the number of processes.
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
    ) -> None:
        if batch_size % processes:
            raise ValueError(f"batch_size={batch_size} must be a multiple of the number of processes, {processes}")
        self.order, self.batch_size = EpochOrder(count, seed), batch_size
        self.start, self.stop = start, stop
        self.rows = local_rows(batch_size, process, processes)

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for step in range(self.start, self.stop):
            first = step * self.batch_size
            yield [self.order[first + row] for row in range(self.rows.start, self.rows.stop)]


def local_rows(batch_size: int, process: int, processes: int) -> slice:
    """Rows of the global batch that one process works on."""
    share = batch_size // processes
    return slice(process * share, (process + 1) * share)


@dataclass(frozen=True)
class Batch:
    """``images`` (b, C, H, W) in [0, 1], ``indices`` (b,) of the pictures, and (index, message) of unreadable
    ones.

    ``complete`` is false if a picture and all its substitutes were unreadable; its row is zero then.
    """

    images: Images
    indices: Tensor
    unreadable: tuple[tuple[int, str], ...]
    complete: bool = True

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory, from where a GPU copies faster; the loader calls it."""
        return replace(self, images=self.images.pin_memory())


class TrainingPictures(Dataset[Batch]):
    """Batches of training pictures, asked for by lists of (epoch, picture) from :class:`StepBatches`.

    A picture that cannot be read is replaced by another, drawn as a function of (seed, picture), and reported
    in ``Batch.unreadable``.
    """

    def __init__(self, source: ImageSource, size: Size, channels: int, augmentation: Augmentation, seed: int) -> None:
        self.source, self.size, self.channels = source, size, channels
        self.augmentation, self.seed = augmentation, seed

    def __getitems__(self, items: list[tuple[int, int]]) -> Batch:
        images, indices, unreadable, complete = [], [], [], True
        for epoch, wanted in items:
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
                images.append(torch.zeros(self.channels, *self.size))
                indices.append(wanted)
                complete = False
        return Batch(torch.stack(images), torch.tensor(indices), tuple(unreadable), complete)

    def candidates(self, wanted: int) -> Iterator[int]:
        """The wanted picture, then its substitutes."""
        yield wanted
        generator = random_generator(self.seed, Stream.SUBSTITUTE, wanted)
        yield from torch.randint(len(self.source), (SUBSTITUTES,), generator=generator).tolist()

    def transform(self, picture: Picture, epoch: int, index: int) -> Tensor:
        """The picture as epoch ``epoch`` sees it."""
        if self.augmentation == "none":
            return prepare(picture, self.size, self.channels)
        return augmented(picture, self.size, self.channels, random_key(self.seed, Stream.AUGMENT, epoch, index))


class HeldOutPictures(Dataset[Batch]):
    """Batches of pictures as evaluation sees them, in order; unreadable ones are left out and reported."""

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
                images.append(prepare(self.source.read(index), self.size, self.channels))
                indices.append(index)
            except UnreadableImageError as error:
                unreadable.append((index, str(error)))
        stacked = torch.stack(images) if images else self.empty
        return Batch(stacked, torch.tensor(indices, dtype=torch.int64), tuple(unreadable))


def as_is(batch: Any) -> Any:
    """Collation for datasets that return whole batches."""
    return batch


def loader(dataset: Dataset[Batch], batches: Iterable[list[Any]], workers: int, pin: bool = False) -> DataLoader:
    """A ``DataLoader`` over whole batches; the batches do not depend on ``workers``."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=as_is,
        pin_memory=pin,
        generator=torch.Generator(),  # the loader draws a seed for its workers; not from the global state
        persistent_workers=False,
    )


def evaluation_batches(
    source: ImageSource, size: Size, channels: int, batch_size: int = 256, workers: int = 0
) -> Iterator[Batch]:
    """All pictures of a source in order, as :func:`prepare` leaves them, in batches of at most
    ``batch_size``.
    """
    rows = [list(range(i, min(i + batch_size, len(source)))) for i in range(0, len(source), batch_size)]
    yield from loader(HeldOutPictures(source, size, channels), rows, workers)


@dataclass
class UnreadableCount:
    """Distinct unreadable pictures met so far, by index, and the share above which a run stops."""

    total: int
    limit: float
    met: dict[int, str]

    def add(self, batch: Batch, report: Callable[[str], None]) -> None:
        """Count a batch's unreadable pictures, naming each new one through ``report``.

        Raises
        ------
        ValueError
            If more than ``limit`` of all pictures proved unreadable, or no substitute was found for one.
        """
        for index, message in batch.unreadable:
            if index not in self.met:
                self.met[index] = message
                report(f"skipped an unreadable picture ({len(self.met)} so far): {message}")
        share = len(self.met) / self.total
        if share > self.limit or not batch.complete:
            last = list(self.met.values())[-1]
            raise ValueError(
                f"{len(self.met)} of {self.total} training pictures ({share:.1%}) cannot be read; the run stops above "
                f"{self.limit:.1%} (max_unreadable). The last one: {last}"
            )
