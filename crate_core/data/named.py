r"""Opening data by name: digits (embedded), image folders, prepared shards, torchvision
and Hugging Face datasets.

The libraries that exist for the last two are used, and imported only when they are
asked for.

Book: :ref:`ch-first-training`.
"""

import glob
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from crate_core.checks import check_instance
from crate_core.data.folders import counted, folder
from crate_core.data.parts import (
    chosen_parts,
    exact_part,
    parquet_parts,
    visible_parquet,
)
from crate_core.data.pictures import Picture, as_shown, open_picture
from crate_core.data.shards import shards
from crate_core.data.sources import (
    HELD_OUT,
    ImageData,
    ImageSource,
    SelectedImages,
    digits,
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
        return open_picture(cell_file(self.table[index][self.column]))


def cell_file(cell: Any) -> str | io.BytesIO:
    """What to open of a cell of an image column: its bytes, or the path that it names.

    Raises ``ValueError`` if it holds neither.
    """
    if isinstance(cell, bytes):
        return io.BytesIO(cell)
    if cell is not None and cell["bytes"] is not None:
        return io.BytesIO(cell["bytes"])
    if cell is None or cell["path"] is None:
        raise ValueError("the row holds no image")
    path: str = cell["path"]
    return path


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
        image = self.pairs[index][0]
        return image if isinstance(image, Tensor) else as_shown(image)


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
            f"torchvision:{name} is not known; accepted are "
            f"{', '.join(sorted(TORCHVISION_PARTS))}"
        )
    maker = getattr(torchvision.datasets, name)
    parts = []
    for arguments in TORCHVISION_PARTS[name]:
        try:
            pairs = maker(root=str(root), download=True, **arguments)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(
                f"torchvision:{name} is not under {root} and was not "
                f"downloaded: {error}"
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
    description = (
        f"torchvision:{name}: {len(train):,} to train on, {len(held_out):,} held "
        "out (its own parts)"
    )
    return ImageData(
        train,
        held_out,
        tuple(map(str, getattr(train.pairs, "classes", ()))),
        description,
    )


KEPT_ROWS = 2048
"""Rows of a stream that are kept in memory to be held out, and of its training part for
the yardsticks.
"""

IMAGE_COLUMNS = ("image", "img")
"""Names that an image column is preferred by, in this order and any case."""


def read_shards(files: Sequence[Path]) -> int:
    """The number of rows of parquet files, from their ends.

    Raises ``ValueError`` naming the first that is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    count = 0
    for file in files:
        try:
            count += pyarrow.parquet.read_metadata(file).num_rows
        # what a damaged thrift footer raises is no short list
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise ValueError(f"{file} is not readable parquet: {error}") from error
    return count


def damaged_shard(files: Sequence[Path]) -> str:
    """Which of some parquet files cannot be read to its end, or has a column of another
    type than the first one's, and why; "" if there is none.
    """
    import pyarrow
    import pyarrow.parquet

    types: dict[str, Any] = {}
    for file in files:
        try:
            with pyarrow.parquet.ParquetFile(file) as opened:
                for _ in opened.iter_batches():
                    pass
                schema = opened.schema_arrow
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            return f"{file} is not readable parquet: {error}"
        for name, kind in zip(schema.names, schema.types, strict=True):
            if types.setdefault(name, kind) != kind:
                return (
                    f"{file} does not fit the files before it: its column {name!r} "
                    f"holds {kind}, theirs {types[name]}"
                )
    return ""


def hub_parts(names: Sequence[str], origin: str) -> dict[str, str]:
    """Splits of a Hub dataset by the part that their names speak of; a dataset of one
    split is to train on, whatever its name.

    Raises ``ValueError`` if several splits name no part to train on.
    """
    if len(names) == 1:
        return {"train": names[0]}
    by_part: dict[str, str] = {}
    for name in names:
        exact = exact_part(name)
        if exact is not None:
            by_part.setdefault(exact, name)
    chosen_parts(list(by_part) or list(names), origin)
    return by_part


def used_columns(file: Path, origin: str, labels: bool) -> list[str]:
    """The columns of a parquet file that are read: its images, and with ``labels``
    those.

    Raises ``ValueError`` if it has no image column, or several without a name that
    decides.
    """
    import datasets
    import pyarrow.parquet

    features = datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(file))
    label = label_column(features) if labels else None
    image = image_column(features, origin)
    return [name for name in features if name in (image, label)]


def open_tables(
    location: str, streaming: bool, labels: bool
) -> tuple[dict[str, Any], dict[str, int | None], list[str]]:
    """Hugging Face tables by part ("train" and perhaps "validation" or "test"), their
    numbers of rows, ``None`` where not known, and what was left out.

    Of parquet files here only the column of images is read, and with ``labels`` that of
    labels: whatever else a table holds, or how it is damaged, is no concern.

    Raises
    ------
    FileNotFoundError
        If there is no such file and the Hub does not give a dataset of that name.
    ValueError
        If a parquet file is damaged, or names leave open which part is which.
    """
    import datasets

    path = Path(location).expanduser()
    origin = f"hf:{location}"
    if path.exists():
        files = parquet_parts(path)
        taken = chosen_parts(list(files), origin)
        chosen = {part: files[part] for part in taken if part is not None}
        counts: dict[str, int | None] = {
            part: read_shards(shards) for part, shards in chosen.items()
        }
        try:
            # one part after the other: a held-out part may lack the labels
            tables = {
                part: datasets.load_dataset(
                    "parquet",
                    data_files={part: [glob.escape(str(f.absolute())) for f in shards]},
                    columns=used_columns(shards[0], origin, labels),
                    streaming=streaming,
                )[part]
                for part, shards in chosen.items()
            }
        except (ValueError, OSError, datasets.exceptions.DatasetGenerationError) as e:
            # pyarrow's errors are ValueErrors
            found = damaged_shard([f for shards in chosen.values() for f in shards])
            raise ValueError(
                found or f"{origin} is not readable parquet: {e.__cause__ or e}"
            ) from e
        left_out = [
            f"{counted(len(paths), 'file')} of the part {part}"
            for part, paths in files.items()
            if part not in chosen
        ]
        every = {f for paths in files.values() for f in paths}
        if path.is_dir() and (
            rest := [f for f in visible_parquet(path) if f not in every]
        ):
            left_out.append(
                f"{counted(len(rest), 'file')} whose names speak of no part, such as "
                f"{rest[0].relative_to(path)}"
            )
        return tables, counts, left_out
    if path.suffix == ".parquet" or path.is_absolute():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        tables = datasets.load_dataset(location, streaming=streaming)
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        raise FileNotFoundError(
            f"{origin} is neither a file here nor a dataset the Hub gave: {error}"
        ) from error
    names = hub_parts(list(tables), origin)
    taken = chosen_parts(list(names), origin)
    chosen_names = {part: names[part] for part in taken if part is not None}
    counts = {
        part: getattr((tables[n].info.splits or {}).get(n), "num_examples", None)
        or None
        for part, n in chosen_names.items()
    }
    left_out = [f"the split {n}" for n in tables if n not in chosen_names.values()]
    return {part: tables[n] for part, n in chosen_names.items()}, counts, left_out


def hugging_face(
    location: str, labels: bool = True, streamed: bool = False
) -> ImageData:
    """A dataset in the Hugging Face image schema: parquet files here, or a name on the
    Hub; without ``labels`` that column is not read.  Without a held-out part a tenth of
    the rows is held out, at random, or the first ones if the table was ``streamed``.

    The image column is ``image`` or ``img``, else the only one that holds images
    (:func:`image_column`); labels are those of :func:`label_column` and may be absent.
    Which pictures are held out does not depend on them.

    Raises
    ------
    FileNotFoundError
        If there is no such file and the Hub does not give a dataset of that name.
    ValueError
        If a file is damaged, the table has no image column or several without one of
        these names, or names leave open which part is which.
    """
    origin = f"hf:{location}"
    tables, _, left_out = open_tables(location, streaming=False, labels=labels)
    held_out_name = next((name for name in tables if name != "train"), None)
    column = image_column(tables["train"].features, origin)
    label = label_column(tables["train"].features) if labels else None
    values = {
        name: None
        if label is None or label not in table.column_names
        else table[label][:]
        for name, table in tables.items()
    }
    typed = None if label is None else tables["train"].features[label]
    numbers, classes, said = class_numbers(values, typed)
    if not labels:
        said = "labels are not read"
    columns = [f"images in {column!r}", said.format(column=label)]
    sources = {}
    for name, table in tables.items():
        sources[name] = TableImages(
            encoded_column(table, column, origin), column, origin, numbers[name]
        )
    if held_out_name is None and streamed:
        whole = sources["train"]
        first = streamed_rows(len(whole), origin)
        rows = np.arange(len(whole))
        return ImageData(
            SelectedImages(whole, rows[first:]),
            SelectedImages(whole, rows[:first]),
            tuple(classes),
            f"{origin}: {len(whole) - first:,} to train on, {first:,} held out (the "
            "first rows)",
            tuple(left_out),
            tuple(columns),
        )
    if held_out_name is None:
        # by no label: what is trained on must not depend on that column
        return split_source(
            sources["train"],
            classes,
            HELD_OUT,
            origin,
            left_out,
            columns,
            by_class=False,
        )
    train, held_out = sources["train"], sources[held_out_name]
    description = (
        f"{origin}: {len(train):,} to train on (train), {len(held_out):,} held out "
        f"({held_out_name})"
    )
    return ImageData(
        train, held_out, tuple(classes), description, tuple(left_out), tuple(columns)
    )


def streamed_rows(count: int, origin: str) -> int:
    """How many rows, the first, are held out of a stream of ``count``; ``ValueError``
    if there are too few.
    """
    if count < 10:
        raise ValueError(
            f"{origin}: a held-out part needs at least ten rows, got {count}"
        )
    return min(KEPT_ROWS, count // 10)


def image_column(features: Any, origin: str) -> str:
    """The column of images: ``image`` or ``img`` in any case, else the only one of
    image type, a struct of ``bytes`` and ``path``, or bytes under one of these names.

    Raises ``ValueError`` if there is none, or several and none has such a name.
    """
    import datasets

    def holds_images(name: str, feature: Any) -> bool:
        return (
            isinstance(feature, datasets.Image)
            or (isinstance(feature, dict) and {"bytes", "path"} <= feature.keys())
            or (
                name.lower() in IMAGE_COLUMNS
                and getattr(feature, "dtype", None) in ("binary", "large_binary")
            )
        )

    columns = [
        name for name, feature in features.items() if holds_images(name, feature)
    ]
    if not columns:
        raise ValueError(
            f"{origin} has no image column (struct of bytes and path); its columns: "
            f"{list(features)}"
        )
    for wanted in IMAGE_COLUMNS:
        named = [name for name in columns if name.lower() == wanted]
        if len(named) == 1:
            return named[0]
    if len(columns) > 1:
        raise ValueError(
            f"{origin} has several columns of images, {columns}: name the one to read "
            f"{' or '.join(IMAGE_COLUMNS)}"
        )
    return columns[0]


def table_features(table: Any) -> Any:
    """The columns of a table or stream with their types."""
    return table.features or table._resolve_features().features


def encoded_column(table: Any, column: str, origin: str) -> Any:
    """The table with the images of ``column`` left encoded; ``ValueError`` if that is
    not its image column.
    """
    import datasets

    features = table_features(table)
    if (own := image_column(features, origin)) != column:
        raise ValueError(
            f"{origin}: images lie in {column!r} in one part and in {own!r} in another"
        )
    feature = features[column]
    if getattr(feature, "dtype", None) in ("binary", "large_binary"):
        return table
    return table.cast_column(column, datasets.Image(decode=False))


def label_column(features: Any) -> str | None:
    """The column of labels: ``label`` in any case, else the only ``ClassLabel``."""
    import datasets

    named = [name for name in features if name.lower() == "label"]
    typed = [
        name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)
    ]
    return next((found[0] for found in (named, typed) if len(found) == 1), None)


def class_numbers(
    values: Mapping[str, Sequence[Any] | None], typed: Any
) -> tuple[dict[str, np.ndarray | None], list[str], str]:
    """Labels of all parts as class numbers, the classes' names, and a word on how.

    A column of class labels keeps its numbers.  Otherwise any hashable values are
    classes, in sorted order over all parts together: 1 and 2 are classes 0 and 1.  What
    is missing (null, NaN, a negative class label) is -1; lists and other values that
    cannot be hashed are no labels at all.
    """
    import datasets

    nothing: dict[str, np.ndarray | None] = dict.fromkeys(values)
    given = {part: column for part, column in values.items() if column is not None}
    if not given:
        return nothing, [], "no label column"

    def missing(value: Any) -> bool:
        return value is None or value != value

    try:
        distinct = {v for column in given.values() for v in column if not missing(v)}
    except TypeError:
        return nothing, [], "no labels ({column!r} holds what is no class)"
    if isinstance(typed, datasets.ClassLabel):
        number = {v: max(int(v), -1) for v in distinct}
        classes = list(typed.names)
    else:
        try:
            ordered = sorted(distinct)
        except TypeError:  # of several types, or without an order
            ordered = sorted(distinct, key=lambda v: (type(v).__name__, str(v)))
        number = {value: k for k, value in enumerate(ordered)}
        classes = [str(value) for value in ordered]
    labels = dict(nothing)
    for part, column in given.items():
        labels[part] = np.array([number.get(v, -1) for v in column], dtype=np.int64)
    return labels, classes, "labels in {column!r}"


def open_data(
    spec: str | Path,
    root: str | Path = "data",
    labels: bool = True,
    streamed: bool = False,
) -> ImageData:
    """Open ``digits``, ``folder:PATH``, ``shards:PATH``, ``torchvision:NAME`` or
    ``hf:NAME-OR-PARQUET-PATH``.

    Parameters
    ----------
    spec : one of the five forms; a ``Path`` is short for ``folder:PATH``.
    root : where torchvision datasets lie or are downloaded to.
    labels : whether the column of labels of a table is read; pretraining does not.
    streamed : hold out of a table without a held-out part the first rows, as training
        that streams it does.

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
    check_instance("root", root, (str, Path), "a path")
    spec = f"folder:{spec}" if isinstance(spec, Path) else spec
    kind, _, location = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    if spec == "digits":
        return digits()
    if kind in ("folder", "shards", "torchvision", "hf") and location:
        if kind in ("folder", "shards"):
            return folder(location) if kind == "folder" else shards(location)
        return (
            torchvision_data(location, root)
            if kind == "torchvision"
            else hugging_face(location, labels, streamed)
        )
    raise ValueError(
        f"data={spec!r}: accepted are digits, folder:PATH, shards:PATH, "
        "torchvision:NAME, hf:NAME-OR-PARQUET-PATH, or a Path of a folder"
    )
