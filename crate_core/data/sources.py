r"""Numbered pictures in memory and in files, and how a part of them is held out.

A picture is a PIL image or a float tensor (C, H, W) in [0, 1]; sizes, channels and
augmentation are the business of :mod:`crate_core.data.batches`.  Every source is split
once into a training part and a held-out part by a rule that does not depend on the
run's seed, so that evaluation never sees a picture that pretraining saw.

Book: :ref:`ch-first-training`.
"""

import io
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGE_EXTENSIONS = (
    ".jpg",
    ".jpeg",
    ".png",
    ".bmp",
    ".webp",
    ".tif",
    ".tiff",
    ".ppm",
    ".pgm",
)
"""File names that count as images, in any case."""

SPLIT_SEED = 0
"""Seed of the held-out split; fixed, whatever the run's seed."""

DIGITS_HELD_OUT = 0.2
"""Share of scikit-learn's digits that is held out: 359 of 1,797, as each class is
rounded.
"""

HELD_OUT = 0.1
"""Share that is held out of a source without a test or validation part of its own."""

DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
)
"""What Pillow raises on damaged files of the formats above."""

Picture = Image.Image | Tensor


class UnreadableImageError(ValueError):
    """A picture that cannot be decoded; ``name`` says which, ``reason`` what the
    decoder said.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.name, self.reason)


class ImageSource(ABC):
    """Numbered pictures, with integer ``labels`` (n,) or ``None`` when there are none."""

    labels: np.ndarray | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call picture ``index`` in a message."""

    @abstractmethod
    def decode(self, index: int) -> Picture:
        """Picture ``index``; may raise any of ``DECODING_ERRORS``."""

    def read(self, index: int) -> Picture:
        """Picture ``index``.

        Raises
        ------
        UnreadableImageError
            If it cannot be decoded.
        """
        try:
            return self.decode(index)
        except DECODING_ERRORS as error:
            raise UnreadableImageError(
                self.name(index), str(error) or type(error).__name__
            ) from error


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
    says in words what was found and how it was split.
    """

    train: ImageSource
    held_out: ImageSource
    classes: tuple[str, ...]
    description: str


def open_picture(file: str | Path | io.BytesIO) -> Image.Image:
    """Decode a picture whole.  Sixteen-bit grey is brought to eight bits, which
    Pillow's own conversion would clip.
    """
    with Image.open(file) as image:
        image.load()
    if image.mode.startswith("I;16") or image.mode == "I":
        return Image.fromarray(
            (np.asarray(image, dtype=np.float64) / 257.0)
            .round()
            .clip(0, 255)
            .astype(np.uint8)
        )
    return image


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
    source: ImageSource, classes: Iterable[str], share: float, what: str
) -> ImageData:
    """Hold out a ``share`` of a source that has no held-out part of its own (see
    :func:`held_out_split`).
    """
    train, held_out = held_out_split(source.labels, len(source), share)
    how = "at random" if source.labels is None else "stratified by class"
    return ImageData(
        SelectedImages(source, train),
        SelectedImages(source, held_out),
        tuple(classes),
        f"{what}: {len(train):,} to train on, {len(held_out):,} held out ({how}, split seed {SPLIT_SEED})",
    )


def digits() -> ImageData:
    """The 1,797 handwritten digits (8 x 8 pixels, grey) that scikit-learn ships; 1,438
    to train on, 359 held out.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    source = ArrayImages(
        torch.from_numpy(bunch.images / 16.0).float().unsqueeze(1),
        bunch.target.astype(np.int64),
    )
    return split_source(
        source, map(str, range(10)), DIGITS_HELD_OUT, "scikit-learn's digits"
    )


def image_files(directory: Path) -> list[Path]:
    """Image files under a directory, at any depth, sorted; hidden files and folders are
    left out.

    Raises ``OSError`` for a folder that cannot be read, where ``Path.rglob`` would
    leave its pictures out in silence.
    """

    def refuse(error: OSError) -> None:
        raise error

    found = []
    for folder, folders, names in os.walk(directory, onerror=refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(folder, n)
            for n in names
            if n.lower().endswith(IMAGE_EXTENSIONS) and not n.startswith(".")
        ]
    return sorted(found)


def class_folders(directory: Path) -> tuple[FileImages, list[str]]:
    """Pictures of one directory: labelled by its class folders, or unlabelled when they
    lie in it directly.

    Raises
    ------
    ValueError
        If there is no image file, or there are both class folders of images and images beside them.
    """
    by_class = {
        folder.name: files
        for folder in sorted(directory.iterdir())
        if folder.is_dir()
        and not folder.name.startswith(".")
        and (files := image_files(folder))
    }
    loose = [path for path in image_files(directory) if path.parent == directory]
    if not by_class and not loose:
        found = "is empty" if not any(directory.iterdir()) else "holds no image file"
        raise ValueError(
            f"the folder {directory} {found}; accepted are files named *{', *'.join(IMAGE_EXTENSIONS)}"
        )
    if by_class and loose:
        raise ValueError(
            f"the folder {directory} holds {len(loose)} images, such as {loose[0].name}, beside class folders of "
            f"images, such as {next(iter(by_class))}/; accepted are class folders, or images only"
        )
    if loose:
        return FileImages(loose), []
    labels = np.repeat(
        np.arange(len(by_class)), [len(files) for files in by_class.values()]
    )
    return FileImages(
        [path for files in by_class.values() for path in files], labels
    ), list(by_class)


def folder(path: str | Path) -> ImageData:
    """Images in a folder: class folders with or without ``train/`` and ``val/`` (or
    ``test/``), or images only.

    Without ``val/`` or ``test/`` a tenth of each class (of all, without classes) is
    held out.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    ValueError If it is empty or holds no images (the message names the accepted
        extensions), or the classes of its parts differ.

    Book: :ref:`ch-first-training`.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"there is no folder {root}")
    if not root.is_dir():
        raise ValueError(f"{root} is a file; give the folder that holds the images")
    if not (root / "train").is_dir():
        source, classes = class_folders(root)
        return split_source(source, classes, HELD_OUT, f"folder {root}")
    source, classes = class_folders(root / "train")
    part = next(
        (name for name in ("val", "validation", "test") if (root / name).is_dir()), None
    )
    if part is None:
        return split_source(source, classes, HELD_OUT, f"folder {root}/train")
    held_out, held_out_classes = class_folders(root / part)
    if classes != held_out_classes:
        odd = sorted(set(classes) ^ set(held_out_classes))
        raise ValueError(
            f"train/ and {part}/ of {root} have different class folders: {', '.join(odd[:5])}"
        )
    description = f"folder {root}: {len(source):,} in train/ to train on, {len(held_out):,} held out in {part}/"
    return ImageData(source, held_out, tuple(classes), description)
