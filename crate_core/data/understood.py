r"""What was understood of data, in a few lines and as a sheet of pictures, for its user
to look at before a long run; and which of its pictures can be read.

Book: :ref:`ch-first-training`.
"""

import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from crate_core.data.batches import (
    HeldOutPictures,
    UnreadableCount,
    evaluation_batches,
)
from crate_core.data.sources import ImageData, ImageSource, SelectedImages, spread_rows
from crate_core.data.transforms import Size
from crate_core.records import printable, shortened


def understood(data: ImageData) -> list[str]:
    """Parts and their sizes, classes, columns, and what was left out, in lines."""
    lines = [f"data: {data.description}"]
    if data.classes:
        names = shortened(list(data.classes))
        lines.append(f"classes: {len(data.classes):,} ({names})")
    elif data.train.labels is None:
        lines.append("classes: none, the pictures have no labels")
    for part, source in (("to train on", data.train), ("held out", data.held_out)):
        if source.labels is not None and (missing := int((source.labels < 0).sum())):
            lines.append(f"without a label: {missing:,} {part}")
    if data.columns:
        lines.append(f"columns: {', '.join(data.columns)}")
    if data.left_out:
        lines.append(f"left out: {'; '.join(data.left_out)}")
    return lines + [f"note: {said}" for said in data.notes]


def unreadable_lines(unreadable: Mapping[str, list[str]]) -> list[str]:
    """How many pictures of each part cannot be read, and what is said of the first."""
    return [
        f"unreadable: {len(said):,} of the part {part} ({shortened(said, 3)})"
        for part, said in unreadable.items()
        if said
    ]


@dataclass(frozen=True)
class Readable:
    """Data without its unreadable pictures: ``data``, and ``unreadable``, a message
    with the name of each, by part ("train", "held_out").
    """

    data: ImageData
    unreadable: dict[str, list[str]]

    def lines(self) -> list[str]:
        """How many pictures cannot be read, and the names of the first."""
        return unreadable_lines(self.unreadable)


def readable(
    data: ImageData, size: Size, channels: int, limit: float, workers: int = 0
) -> Readable:
    """Read every picture of both parts once, and leave out those that cannot be.

    Parameters
    ----------
    data : both parts can be read by number.
    size, channels : of the model, as :func:`crate_core.data.transforms.prepare` takes.
    limit : largest share of a part that may be unreadable, in [0, 1].
    workers : reading processes.

    Raises
    ------
    ValueError
        If a larger share of a part, or all of it, cannot be read; the message names
        some, and classes of which nothing is left.
    """
    parts: dict[str, ImageSource] = {}
    unreadable: dict[str, list[str]] = {}
    for part in ("train", "held_out"):
        source: ImageSource = getattr(data, part)
        kept: list[int] = []
        said: list[str] = []
        for batch in evaluation_batches(source, size, channels, workers=workers):
            kept += batch.indices.tolist()
            said += [message for _, message in batch.unreadable]
        gone = ""
        if source.labels is not None:
            lost = set(source.labels.tolist()) - set(source.labels[kept].tolist())
            names = [data.classes[k] if data.classes else str(k) for k in sorted(lost)]
            gone = f"; nothing is left of {shortened(names)}" if lost else ""
        if len(said) > limit * len(source) or not kept:
            raise ValueError(
                f"{len(said):,} of {len(source):,} pictures of the part {part} "
                f"({len(said) / len(source):.0%}) cannot be read, more than "
                f"{limit:.0%} (max_unreadable){gone}: {shortened(said, 3)}"
            )
        parts[part] = selected(source, np.array(kept))
        unreadable[part] = said
    kept_data = replace(data, train=parts["train"], held_out=parts["held_out"])
    return Readable(kept_data, unreadable)


def with_labels(data: ImageData) -> ImageData | None:
    """The pictures that have a label, for what needs one; ``None`` if a part has none,
    or there are fewer than two classes to train on.
    """
    if data.train.labels is None or data.held_out.labels is None:
        return None
    rows = np.flatnonzero(data.train.labels >= 0)
    held_out = np.flatnonzero(data.held_out.labels >= 0)
    if len(np.unique(data.train.labels[rows])) < 2 or not len(held_out):
        return None
    return replace(
        data,
        train=selected(data.train, rows),
        held_out=selected(data.held_out, held_out),
    )


def selected(source: ImageSource, rows: np.ndarray) -> ImageSource:
    """Some pictures of a source, in order; the source itself if these are all."""
    return source if len(rows) == len(source) else SelectedImages(source, rows)


def some_readable(
    source: ImageSource, size: Size, channels: int, count: int
) -> Iterator[tuple[int, Tensor | str]]:
    """Up to ``count`` pictures spread evenly over a source, with their numbers: as the
    model sees them, or the message of one that cannot be read.
    """
    rows = spread_rows(source, count)
    for batch in evaluation_batches(SelectedImages(source, rows), size, channels, 64):
        shown: list[tuple[int, Tensor | str]] = [
            *zip(batch.indices.tolist(), batch.images, strict=True),
            *batch.unreadable,
        ]
        for place, picture in sorted(shown, key=lambda pair: pair[0]):
            yield int(rows[place]), picture


def chosen_pictures(
    source: ImageSource,
    size: Size,
    channels: int,
    count: int,
    unreadable: UnreadableCount,
    report: Callable[[str], None],
) -> list[tuple[int, Tensor]]:
    """Up to ``count`` readable pictures spread evenly over a source, with their
    numbers, as the model sees them; for one that cannot be read the next one is taken.

    ``unreadable`` counts those, and ``report`` gets a line with the name of each.

    Raises
    ------
    ValueError
        As soon as more than the limit of ``unreadable`` cannot be read, or if none can.
    """
    tried = set(spread_rows(source, count).tolist())
    reader = HeldOutPictures(source, size, channels)
    found: list[tuple[int, Tensor]] = []
    for wanted in sorted(tried):
        index: int | None = wanted
        while index is not None:
            batch = reader.__getitems__([index])
            for _, message in batch.unreadable:
                report(f"left out, cannot be read: {message}")
            unreadable.add(batch, lambda line: None)
            if len(batch.images):
                found.append((index, batch.images[0]))
                break
            index = next((i for i in range(index, len(source)) if i not in tried), None)
            tried |= set() if index is None else {index}
    if not found:
        raise ValueError(
            f"none of {len(tried)} pictures can be read, the first: "
            f"{next(iter(unreadable.names))}"
        )
    return sorted(found, key=lambda pair: pair[0])


def contact_sheet(
    data: ImageData,
    size: Size,
    channels: int,
    count: int,
    report: Callable[[str], None],
) -> bytes:
    """A PNG of some pictures of each part as the model sees them, with their classes.

    Raises ``ValueError`` if a part has no readable picture among them.
    """
    from matplotlib.figure import Figure

    parts = {"to train on": data.train, "held out": data.held_out}
    found: dict[str, list[tuple[int, Tensor]]] = {}
    for part, source in parts.items():
        found[part] = []
        for index, picture in some_readable(source, size, channels, count):
            if isinstance(picture, str):
                report(f"unreadable: {picture}")
            else:
                found[part].append((index, picture))
        if not found[part]:
            raise ValueError(f"none of {count} pictures {part} can be read")
    columns = max(len(pictures) for pictures in found.values())
    figure = Figure(figsize=(1.3 * columns, 3.4), dpi=120, layout="constrained")
    axes = figure.subplots(len(parts), columns, squeeze=False)
    for row, (part, source) in zip(axes, parts.items(), strict=True):
        for axis in row:
            axis.set_axis_off()
        for axis, (index, picture) in zip(row, found[part], strict=False):
            pixels = picture.permute(1, 2, 0).squeeze(-1).numpy()
            axis.imshow(pixels, cmap="gray", vmin=0, vmax=1)
            label = -1 if source.labels is None else int(source.labels[index])
            named = data.classes[label] if 0 <= label < len(data.classes) else ""
            said = printable(named)[:14]
            if axis is row[0]:
                said = f"{part}: {said}".rstrip(": ")
            # a class may be called $x^2$, which is no formula here
            axis.set_title(said, fontsize=7, parse_math=False)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def class_counts(data: ImageData) -> list[str]:
    """The smallest and the largest class to train on, in words; none without labels."""
    labels = data.train.labels
    if labels is None or not data.classes:
        return []
    counts = Counter(labels[labels >= 0].tolist())
    if not counts:
        return []
    (least, few), (most, many) = counts.most_common()[-1], counts.most_common(1)[0]
    names = data.classes
    return [f"pictures a class: {few:,} ({names[least]}) to {many:,} ({names[most]})"]
