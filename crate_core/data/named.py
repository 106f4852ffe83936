r"""Opening data by name: digits (embedded), image folders, torchvision and Hugging Face
datasets.

The libraries that exist for the last two are used, and imported only when they are
asked for.

Book: :ref:`ch-first-training`.
"""

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from crate_core.data.sources import (
    HELD_OUT,
    ImageData,
    ImageSource,
    Picture,
    digits,
    folder,
    open_picture,
    split_source,
)


@dataclass(eq=False)
class TableImages(ImageSource):
    """Rows of a Hugging Face dataset whose ``column`` holds encoded images (struct of
    ``bytes`` and ``path``).
    """

    table: Any
    column: str
    origin: str
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.table)

    def name(self, index: int) -> str:
        return f"{self.origin} row {index}"

    def decode(self, index: int) -> Picture:
        cell = self.table[index][self.column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise ValueError("the row holds no image")
        return open_picture(
            cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])
        )


@dataclass(eq=False)
class PairImages(ImageSource):
    """A torchvision dataset of (PIL image, label) pairs."""

    pairs: Any
    origin: str
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def name(self, index: int) -> str:
        return f"{self.origin} picture {index}"

    def decode(self, index: int) -> Picture:
        return self.pairs[index][0]


TORCHVISION_PARTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **dict.fromkeys(
        ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "KMNIST"),
        ({"train": True}, {"train": False}),
    ),
    **dict.fromkeys(
        ("STL10", "SVHN", "Food101", "FGVCAircraft"),
        ({"split": "train"}, {"split": "test"}),
    ),
    "Flowers102": ({"split": "train"}, {"split": "test"}),
    "OxfordIIITPet": ({"split": "trainval"}, {"split": "test"}),
}
"""torchvision datasets with the arguments of their training and held-out parts."""


def torchvision_data(name: str, root: str | Path) -> ImageData:
    """A dataset of torchvision, looked for under ``root`` and downloaded there when it
    is absent.

    Raises
    ------
    ValueError
        If the name is not one of ``TORCHVISION_PARTS``.
    FileNotFoundError
        If it is neither there nor to be had.
    """
    import torchvision.datasets

    if name not in TORCHVISION_PARTS:
        raise ValueError(
            f"torchvision:{name} is not known; accepted are {', '.join(sorted(TORCHVISION_PARTS))}"
        )
    maker = getattr(torchvision.datasets, name)
    parts = []
    for arguments in TORCHVISION_PARTS[name]:
        try:
            pairs = maker(root=str(root), download=True, **arguments)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"torchvision:{name} is not under {root} and was not downloaded: {error}"
            ) from error
        found = next(
            (
                getattr(pairs, a)
                for a in ("targets", "labels", "_labels")
                if hasattr(pairs, a)
            ),
            None,
        )
        parts.append(
            PairImages(
                pairs,
                f"torchvision:{name}",
                None if found is None else np.asarray(found, np.int64),
            )
        )
    train, held_out = parts
    description = f"torchvision:{name}: {len(train):,} to train on, {len(held_out):,} held out (its own parts)"
    return ImageData(
        train,
        held_out,
        tuple(map(str, getattr(train.pairs, "classes", ()))),
        description,
    )


def parquet_parts(path: Path) -> tuple[list[str], list[str]]:
    """Parquet files to train on and held-out ones, told apart by ``train`` and ``test``
    (``val``) in their names.

    A single file whose name holds ``train`` is joined by the file beside it that holds
    ``test``, ``val`` or ``validation`` instead; the second list is empty when nothing
    is set apart.

    Raises ``ValueError`` if a folder holds no parquet file.
    """
    if path.is_file():
        beside = (
            path.with_name(path.name.replace("train", part))
            for part in ("validation", "val", "test")
        )
        held_out = [
            str(other) for other in beside if other != path and other.is_file()
        ][:1]
        return [str(path)], held_out
    files = sorted(path.rglob("*.parquet"))
    if not files:
        raise ValueError(f"the folder {path} holds no .parquet file")
    held_out = [str(file) for file in files if re.search(r"test|val", file.name)]
    return [str(file) for file in files if str(file) not in held_out], held_out


def hugging_face(location: str) -> ImageData:
    """A dataset in the Hugging Face image schema: parquet files here, or a name on the
    Hub.

    The image column is the one of image type (``image``, ``img``, or the only struct of
    ``bytes`` and ``path``), the label column ``label`` or the only column of class
    labels; labels may be absent.

    Raises
    ------
    FileNotFoundError
        If there is no such file and the Hub does not give a dataset of that name.
    ValueError
        If the table has no image column.
    """
    import datasets

    path = Path(location).expanduser()
    origin = f"hf:{location}"
    if path.exists():
        train_files, held_out_files = parquet_parts(path)
        files = {
            "train": train_files,
            **({"test": held_out_files} if held_out_files else {}),
        }
        try:
            tables = datasets.load_dataset("parquet", data_files=files)
        except (ValueError, datasets.exceptions.DatasetGenerationError) as error:
            # pyarrow's errors are ValueErrors
            raise ValueError(
                f"{origin} is not readable parquet: {error.__cause__ or error}"
            ) from error
    elif path.suffix == ".parquet" or path.is_absolute():
        raise FileNotFoundError(f"there is no file {path}")
    else:
        try:
            tables = datasets.load_dataset(location)
        except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
            raise FileNotFoundError(
                f"{origin} is neither a file here nor a dataset the Hub gave: {error}"
            ) from error
    train_name = "train" if "train" in tables else next(iter(tables))
    train, classes = table_images(tables[train_name], origin)
    held_out_name = next(
        (name for name in ("validation", "val", "test") if name in tables), None
    )
    if held_out_name in (None, train_name):
        return split_source(train, classes, HELD_OUT, origin)
    held_out, _ = table_images(tables[held_out_name], origin)
    description = f"{origin}: {len(train):,} to train on ({train_name}), {len(held_out):,} held out ({held_out_name})"
    return ImageData(train, held_out, tuple(classes), description)


def image_column(features: Any, origin: str) -> str:
    """The first column that holds images; ``ValueError`` if there is none."""
    import datasets

    def holds_images(feature: Any) -> bool:
        return isinstance(feature, datasets.Image) or (
            isinstance(feature, dict) and {"bytes", "path"} <= feature.keys()
        )

    columns = [name for name, feature in features.items() if holds_images(feature)]
    if not columns:
        raise ValueError(
            f"{origin} has no image column (struct of bytes and path); its columns: {list(features)}"
        )
    return columns[0]


def table_images(table: Any, origin: str) -> tuple[TableImages, list[str]]:
    """Pictures and class names of one Hugging Face table; ``ValueError`` if no column
    holds images.
    """
    import datasets

    column = image_column(table.features, origin)
    typed = [
        name
        for name, feature in table.features.items()
        if isinstance(feature, datasets.ClassLabel)
    ]
    label = (
        "label"
        if "label" in table.column_names
        else (typed[0] if len(typed) == 1 else None)
    )
    labels = (
        None
        if label is None
        else np.asarray(table.with_format("numpy")[label][:], dtype=np.int64)
    )
    if labels is None or label is None:
        classes = []
    elif isinstance(table.features[label], datasets.ClassLabel):
        classes = list(table.features[label].names)
    else:
        classes = [str(k) for k in np.unique(labels)]
    encoded = table.cast_column(column, datasets.Image(decode=False))
    return TableImages(encoded, column, origin, labels), classes


def open_data(spec: str, root: str | Path = "data") -> ImageData:
    """Open ``digits``, ``folder:PATH``, ``torchvision:NAME`` or
    ``hf:NAME-OR-PARQUET-PATH``.

    Parameters
    ----------
    spec : one of the four forms.
    root : where torchvision datasets lie or are downloaded to.

    Returns
    -------
    ImageData : training and held-out part.

    Raises
    ------
    ValueError
        If ``spec`` has another form, or what it names holds no usable pictures.
    FileNotFoundError
        If what it names is not there.

    Book: :ref:`ch-first-training`.
    """
    kind, _, location = spec.partition(":")
    if spec == "digits":
        return digits()
    if kind in ("folder", "torchvision", "hf") and location:
        if kind == "folder":
            return folder(location)
        return (
            torchvision_data(location, root)
            if kind == "torchvision"
            else hugging_face(location)
        )
    raise ValueError(
        f"data={spec!r}: accepted are digits, folder:PATH, torchvision:NAME, hf:NAME-OR-PARQUET-PATH"
    )
