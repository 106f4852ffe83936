r"""Numbered pictures in memory and in files, and how a part of them is held out.

A picture is a PIL image or a float tensor (C, H, W) in [0, 1]; sizes, channels and
augmentation are the business of :mod:`crate_core.data.batches`.  Every source is split
once into a training part and a held-out part by a rule that does not depend on the
run's seed, so that evaluation never sees a picture that pretraining saw.

Book: :ref:`ch-first-training`.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from crate_core.data.pictures import (
    DOUBT,
    DarkPictureWarning,
    Picture,
    UnreadableImageError,
    open_picture,
)

SPLIT_SEED = 0
"""Seed of the held-out split; fixed, whatever the run's seed."""

DIGITS_HELD_OUT = 0.2
"""Share of scikit-learn's digits that is held out: 359 of 1,797, as each class is
rounded.
"""

HELD_OUT = 0.1
"""Share that is held out of a source without a test or validation part of its own."""


class ImageSource(ABC):
    """Numbered pictures, with integer ``labels`` (n,) or, when there are none,
    ``None``.
    """

    labels: np.ndarray | None = None
    doubted = False
    """Whether a picture of doubtful range was met and named; the others are not."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call picture ``index`` in a message."""

    @abstractmethod
    def decode(self, index: int) -> Picture:
        """Picture ``index``; may raise anything that a decoder raises."""

    def read(self, index: int) -> Picture:
        """Picture ``index``.

        Warns
        -----
        DarkPictureWarning
            Naming the first picture of doubtful range.

        Raises
        ------
        UnreadableImageError
            If it cannot be decoded.
        """
        try:
            picture = self.decode(index)
        # Decoders and converters of many formats raise whatever they like
        # (struct.error, RuntimeError, NotImplementedError): that picture is unreadable.
        except Exception as error:
            raise UnreadableImageError(
                self.name(index), str(error) or type(error).__name__
            ) from error
        if not self.doubted and not isinstance(picture, Tensor):
            doubt = picture.info.get(DOUBT)
            if doubt is not None:
                self.doubted = True
                warnings.warn(
                    f"{self.name(index)}: {doubt}; more may be like it",
                    DarkPictureWarning,
                    stacklevel=2,
                )
        return picture


@dataclass(eq=False)
class ArrayImages(ImageSource):
    """Pictures in memory: ``images`` (n, C, H, W), float in [0, 1]."""

    images: Tensor
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return f"picture {index}"

    def decode(self, index: int) -> Picture:
        return self.images[index]


@dataclass(eq=False)
class FileImages(ImageSource):
    """Pictures in files."""

    paths: Sequence[Path]
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return str(self.paths[index])

    def decode(self, index: int) -> Picture:
        return open_picture(self.paths[index])


@dataclass(eq=False)
class SelectedImages(ImageSource):
    """The pictures ``indices`` of another source, in that order."""

    source: ImageSource
    indices: np.ndarray
    labels: np.ndarray | None = field(init=False)

    def __post_init__(self) -> None:
        self.labels = (
            None if self.source.labels is None else self.source.labels[self.indices]
        )

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def decode(self, index: int) -> Picture:
        return self.source.decode(int(self.indices[index]))


@dataclass(frozen=True)
class ImageData:
    """A source in two parts that share no picture.

    ``train`` is what pretraining and probes fit on, ``held_out`` what neither sees;
    ``classes`` are the names of the labels, empty where there are none; ``description``
    says in words what was found and how it was split; ``left_out`` what was not taken,
    and why; ``columns`` of a table those that hold images and labels; ``notes`` what
    else its user should know.
    """

    train: ImageSource
    held_out: ImageSource
    classes: tuple[str, ...]
    description: str
    left_out: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def spread_rows(source: ImageSource, most: int) -> np.ndarray:
    """The numbers of at most ``most`` pictures, spread evenly over a source from its
    first to its last.
    """
    count = min(most, len(source))
    return np.linspace(0, len(source) - 1, count).round().astype(int)


def data_identity(data: ImageData) -> dict[str, Any]:
    """What of the data decides a run: how many pictures there are to train on, and the
    names of some of them.
    """
    count = len(data.train)
    names = [Path(data.train.name(i)).name for i in sorted({0, count // 2, count - 1})]
    return {"training pictures": count, "first, middle and last picture": names}


def held_out_split(
    labels: np.ndarray | None, count: int, share: float
) -> tuple[np.ndarray, np.ndarray]:
    r"""Indices of a training and a held-out part, each sorted.

    With labels every class gives ``round(share * n_class)`` pictures, at least one of a
    class that has two; without, ``round(share * count)`` of all.  Drawn with
    ``SPLIT_SEED``.

    Parameters
    ----------
    labels : (count,) integers, or ``None``.
    count : number of pictures, at least two.
    share : of the pictures to hold out, in (0, 1).

    Raises
    ------
    ValueError
        If there are fewer than two pictures, or no class has two.

    Book: :ref:`ch-first-training`.
    """
    if count < 2:
        raise ValueError(
            f"a training and a held-out part need at least two pictures, got {count}"
        )
    generator = np.random.default_rng(SPLIT_SEED)
    groups = (
        [np.arange(count)]
        if labels is None
        else [np.flatnonzero(labels == k) for k in np.unique(labels)]
    )
    held_out = [
        generator.permutation(group)[: max(1, round(share * len(group)))]
        for group in groups
        if len(group) > 1
    ]
    if not held_out:
        raise ValueError("no class has two pictures: none can be held out")
    chosen = np.sort(np.concatenate(held_out))
    return np.setdiff1d(np.arange(count), chosen), chosen


def split_source(
    source: ImageSource,
    classes: Iterable[str],
    share: float,
    what: str,
    left_out: Iterable[str] = (),
    columns: Iterable[str] = (),
    by_class: bool = True,
) -> ImageData:
    """Hold out a ``share`` of a source that has no held-out part of its own: of each
    class if ``by_class`` and there are labels, else of all (see
    :func:`held_out_split`).
    """
    labels = source.labels if by_class else None
    train, held_out = held_out_split(labels, len(source), share)
    how = "at random" if labels is None else "stratified by class"
    return ImageData(
        SelectedImages(source, train),
        SelectedImages(source, held_out),
        tuple(classes),
        f"{what}: {len(train):,} to train on, {len(held_out):,} held out "
        f"({how}, split seed {SPLIT_SEED})",
        tuple(left_out),
        tuple(columns),
    )


def all_digits() -> ArrayImages:
    """The 1,797 handwritten digits that scikit-learn ships, in its order: (1, 8, 8) in
    [0, 1], labels 0 to 9.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    return ArrayImages(
        torch.from_numpy(bunch.images / 16.0).float().unsqueeze(1),
        bunch.target.astype(np.int64),
    )


def digits() -> ImageData:
    """The 1,797 handwritten digits (8 x 8 pixels, grey) that scikit-learn ships; 1,438
    to train on, 359 held out.
    """
    return split_source(
        all_digits(), map(str, range(10)), DIGITS_HELD_OUT, "scikit-learn's digits"
    )
