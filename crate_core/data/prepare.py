r"""``crate prepare``: a resized copy of a data set, as folders or shards, for training
that reads it many times.

A picture of w by h pixels becomes a JPEG file whose shorter side is s,

.. math:: (w, h) \mapsto \Big(\mathrm{round}\,\frac{s\,w}{\min(w, h)},\;
          \mathrm{round}\,\frac{s\,h}{\min(w, h)}\Big),

bicubic with antialiasing, upright, in grey or RGB (:mod:`crate_core.data.pictures`).
None is enlarged: one that is small enough and a plain JPEG file already is copied byte
for byte.  The result is a function of the pictures, s, the quality and the versions of
the libraries, whatever the number of processes or interruptions.

Book: :ref:`ch-pretraining`.
"""

import hashlib
import io
import json
import os
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from crate_core.checks import (
    check_choice,
    check_instance,
    check_integer,
    check_number,
    check_text,
    require,
)
from crate_core.data.batches import MAX_UNREADABLE
from crate_core.data.pictures import UnreadableImageError, open_picture, upright
from crate_core.data.raw import Original, RawData, names_apart, raw_data
from crate_core.data.shards import MANIFEST, ROW_GROUP, index_file
from crate_core.data.sources import ImageSource
from crate_core.records import atomic_write, printable, shortened, write_json

Format = Literal["folders", "parquet", "tar"]

FORMATS: tuple[Format, ...] = ("folders", "parquet", "tar")

LONGEST = 65_500
"""Longest side that libjpeg writes."""

RECORDS = ".prepare"
"""Hidden folder of what is done so far."""

SHUFFLE_SEED = 0
"""Of the order in which pictures lie in shards."""

SECONDS_BETWEEN_LINES = 10.0
"""How often a line takes the place of the bar where there is no terminal."""


@dataclass(frozen=True)
class PrepareConfig:
    """What to make of a data set.

    Raises ``ValueError`` on construction, naming the field and what is accepted.

    Book: :ref:`ch-pretraining`.
    """

    source: str
    """Folder of pictures, or of ImageNet's archives."""
    output_dir: str
    """Where the copy goes."""
    side: int = 256
    """Shorter side, in pixels."""
    quality: int = 90
    """Of the JPEG files."""
    format: Format = "tar"
    """folders, parquet or tar."""
    labels: str | None = None
    """Labels of a flat val/."""
    shard_size: int = 1000
    """Pictures in a shard."""
    workers: int = 1
    """Processes; 0 takes all cores."""
    max_unreadable: float = MAX_UNREADABLE
    """Stop if a larger share of a part's pictures cannot be read."""

    def __post_init__(self) -> None:
        for name in ("source", "output_dir"):
            check_text(self, name)
        check_text(self, "labels", optional=True)
        for name in ("side", "quality", "shard_size"):
            check_integer(self, name, least=1)
        require(self, "quality", self.quality <= 100, "an integer from 1 to 100")
        check_integer(self, "workers")
        check_number(self, "max_unreadable", "a share in [0, 1]", 0, 1, "[]")
        check_choice(self, "format", FORMATS)


@dataclass(frozen=True)
class Task:
    """One shard, or as many pictures of folders: what to read, and the names to give
    them.
    """

    part: str
    number: int
    file: str
    pictures: tuple[Original, ...]
    names: tuple[str, ...]
    labels: tuple[int, ...]

    @property
    def record(self) -> str:
        """The name of the file that says that it is done."""
        return f"{self.part}-{self.number:05d}.json"


class Originals(ImageSource):
    """Pictures to prepare; ``data`` are the bytes of the one that was read last.

    A picture that would be longer than a JPEG file can be is unreadable too.
    """

    def __init__(self, pictures: Sequence[Original], side: int) -> None:
        self.pictures, self.side = pictures, side
        self.data = b""

    def __len__(self) -> int:
        return len(self.pictures)

    def name(self, index: int) -> str:
        return str(self.pictures[index])

    def decode(self, index: int) -> Image.Image:
        self.data = self.pictures[index].read()
        picture = open_picture(io.BytesIO(self.data))
        if max(small_size(picture, self.side)) > LONGEST:
            raise ValueError(
                f"{picture.width} x {picture.height} pixels: too long for JPEG, which "
                f"has at most {LONGEST:,}"
            )
        return picture


def small_size(picture: Image.Image, side: int) -> tuple[int, int]:
    """Width and height with a shorter side of at most ``side``."""
    width, height = picture.size
    shorter = min(width, height)
    if shorter <= side:
        return width, height
    return round(side * width / shorter), round(side * height / shorter)


def small_jpeg(picture: Image.Image, data: bytes, side: int, quality: int) -> bytes:
    """A picture in grey or RGB with its shorter side at most ``side``, as JPEG;
    ``data`` is the file that it was decoded from.
    """
    size = small_size(picture, side)
    if size == picture.size and plain_jpeg(data):
        return data
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return file.getvalue()


def plain_jpeg(data: bytes) -> bool:
    """Whether a picture that can be read is a JPEG file in grey or RGB that no EXIF
    turns.
    """
    with Image.open(io.BytesIO(data)) as image:
        plain = image.format == "JPEG" and image.mode in ("L", "RGB")
        return plain and upright(image) is image


def small_pictures(
    task: Task, config: PrepareConfig, unreadable: list[str]
) -> Iterator[tuple[str, int, bytes]]:
    """Name, label and JPEG bytes of each picture of a task; those that cannot be read
    go to ``unreadable``, with the reason.
    """
    source = Originals(task.pictures, config.side)
    for index, (name, label) in enumerate(zip(task.names, task.labels, strict=True)):
        try:
            picture = source.read(index)
        except UnreadableImageError as error:
            unreadable.append(str(error))
            continue
        assert isinstance(picture, Image.Image)  # as decode gives it
        yield name, label, small_jpeg(picture, source.data, config.side, config.quality)


def run_task(task: Task, config: PrepareConfig, root: Path) -> dict[str, Any]:
    """Write the pictures of a task, then the record that says so; returns the record:
    ``count``, ``bytes``, ``unreadable``, and where pictures of a shard lie.
    """
    unreadable: list[str] = []
    pictures = small_pictures(task, config, unreadable)
    write = {"folders": write_files, "tar": write_tar, "parquet": write_parquet}
    rows = write[config.format](root / task.file, pictures)
    record = {
        "count": len(rows),
        "bytes": sum(size for _, size, _ in rows),
        "unreadable": unreadable,
    }
    if config.format != "folders":
        record["rows"] = rows
    write_json(root / RECORDS / task.record, record)
    return record


Rows = list[tuple[int, int, int]]
"""Of each picture: where it lies in its file, its bytes, its label."""


def write_files(part: Path, pictures: Iterator[tuple[str, int, bytes]]) -> Rows:
    """Each picture in a file of its own under the folder of its part."""
    rows = []
    for name, label, data in pictures:
        path = part / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, data)
        rows.append((0, len(data), label))
    return rows


def write_tar(path: Path, pictures: Iterator[tuple[str, int, bytes]]) -> Rows:
    """A tar file as WebDataset has them: NAME.jpg and, of a picture with a label,
    NAME.cls.
    """
    rows: Rows = []
    partial = path.with_name(f".{path.name}.partial")
    with tarfile.open(partial, "w") as archive:
        for name, label, data in pictures:
            member = tarfile.TarInfo(f"{name}.jpg")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
            padded = -(-len(data) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            rows.append((archive.offset - padded, len(data), label))
            if label >= 0:
                said = str(label).encode()
                member = tarfile.TarInfo(f"{name}.cls")
                member.size = len(said)
                archive.addfile(member, io.BytesIO(said))
    os.replace(partial, path)
    return rows


def write_parquet(path: Path, pictures: Iterator[tuple[str, int, bytes]]) -> Rows:
    """A parquet file in the Hugging Face image schema, ``image`` and ``label``."""
    import pyarrow
    import pyarrow.parquet

    rows: Rows = []
    cells, labels = [], []
    for name, label, data in pictures:
        rows.append((len(rows), len(data), label))
        cells.append({"bytes": data, "path": f"{printable(name)}.jpg"})
        labels.append(label if label >= 0 else None)
    cell = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    features = {
        "image": {"_type": "Image"},
        "label": {"dtype": "int64", "_type": "Value"},
    }
    schema = pyarrow.schema(
        [("image", cell), ("label", pyarrow.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    table = pyarrow.table({"image": cells, "label": labels}, schema=schema)
    partial = path.with_name(f".{path.name}.partial")
    pyarrow.parquet.write_table(
        table,
        partial,
        row_group_size=ROW_GROUP,
        compression="none",  # JPEG files are compressed
        use_dictionary=False,
        write_statistics=False,
    )
    os.replace(partial, path)
    return rows


def tasks_of(raw: RawData, config: PrepareConfig) -> list[Task]:
    """What there is to do, in pieces of ``shard_size`` pictures; in shards the pictures
    of a part lie in random order.
    """
    number = {name: k for k, name in enumerate(raw.classes)}
    same = len(number) - len({name.casefold() for name in number})
    if config.format == "folders" and same:
        raise ValueError(
            f"{same} classes have the name of another in other capitals, which some "
            "systems take for one folder: prepare tar or parquet"
        )
    tasks = []
    for part, pictures in raw.parts.items():
        names = names_apart(pictures)
        order = np.arange(len(pictures))
        if config.format != "folders":
            order = np.random.default_rng(SHUFFLE_SEED).permutation(order)
        pieces = range(0, len(order), config.shard_size)
        for k, start in enumerate(pieces):
            rows = order[start : start + config.shard_size].tolist()
            ending = {"folders": "", "tar": ".tar", "parquet": ".parquet"}
            file = f"{part}-{k:05d}-of-{len(pieces):05d}{ending[config.format]}"
            tasks.append(
                Task(
                    part,
                    k,
                    part if config.format == "folders" else file,
                    tuple(pictures[i] for i in rows),
                    tuple(names[i] for i in rows),
                    tuple(number.get(str(pictures[i].of_class), -1) for i in rows),
                )
            )
    return tasks


def settings_of(tasks: Sequence[Task], config: PrepareConfig) -> dict[str, Any]:
    """What decides the result: the settings, and a digest of the pictures' names,
    classes and sizes.
    """
    digest = hashlib.sha256()
    for task in tasks:
        for name, label, picture in zip(
            task.names, task.labels, task.pictures, strict=True
        ):
            size = picture.size if picture.size >= 0 else os.path.getsize(picture.path)
            line = f"{task.file}\0{printable(name)}\0{label}\0{size}\n"
            digest.update(line.encode())
    chosen = {name: getattr(config, name) for name in ("side", "quality", "format")}
    return {
        **chosen,
        "shard_size": config.shard_size,
        "pictures": sum(len(task.pictures) for task in tasks),
        "digest": digest.hexdigest()[:16],
    }


def claim(root: Path, settings: dict[str, Any]) -> None:
    """Make a folder the copy's, or check that it is; ``ValueError`` if it holds
    something else.
    """
    record = root / RECORDS / "settings.json"
    if record.is_file():
        there = json.loads(record.read_text(encoding="utf8"))
        differing = [
            f"{name} (there {there.get(name)!r}, now {settings[name]!r})"
            for name in settings
            if there.get(name) != settings[name]
        ]
        if differing:
            raise ValueError(
                f"{root} holds another copy, which differs in {'; '.join(differing)}. "
                "Give another folder; nothing was changed"
            )
        return
    if root.is_dir() and any(root.iterdir()):
        raise ValueError(
            f"{root} is not empty and holds no copy to go on with. Give another "
            "folder; nothing was changed"
        )
    record.parent.mkdir(parents=True)
    write_json(record, settings)


def prepare(
    config: PrepareConfig,
    report: Callable[[str], None] = print,
    progress: bool = True,
) -> dict[str, Any]:
    """Make the copy, or go on with one that was cut off.

    Parameters
    ----------
    config : what to make of what.
    report : gets what was understood, each picture that cannot be read, and what was
        done.
    progress : show a bar on a terminal, a line now and then elsewhere.

    Returns
    -------
    What ``prepared.json`` holds: format, classes, settings; of each part the number of
    pictures, bytes, shards, and those that could not be read.

    Raises
    ------
    FileNotFoundError, ValueError
        If the source cannot be used, the folder holds another copy, or more than
        ``max_unreadable`` of a part's pictures cannot be read.

    Book: :ref:`ch-pretraining`.
    """
    check_instance("config", config, PrepareConfig, "a PrepareConfig")
    raw = raw_data(config.source, config.labels)
    for line in understood_raw(raw, config.source):
        report(line)
    tasks = tasks_of(raw, config)
    root = Path(config.output_dir).expanduser()
    settings = settings_of(tasks, config)
    claim(root, settings)
    total = {part: len(pictures) for part, pictures in raw.parts.items()}
    records: dict[str, dict[str, Any]] = {}
    bad: dict[str, list[str]] = {part: [] for part in raw.parts}

    def note(task: Task, record: dict[str, Any]) -> None:
        """Count what a task did, and stop where too much cannot be read."""
        records[task.record] = record
        for said in record["unreadable"]:
            bad[task.part].append(said)
            report(f"left out, cannot be read: {said}")
        if len(bad[task.part]) > config.max_unreadable * total[task.part]:
            raise ValueError(
                f"{len(bad[task.part]):,} of {total[task.part]:,} pictures of "
                f"{task.part} cannot be read, more than {config.max_unreadable:.1%} "
                f"(max_unreadable). The last one: {bad[task.part][-1]}"
            )

    left = []
    for task in tasks:
        done = root / RECORDS / task.record
        if done.is_file():
            note(task, json.loads(done.read_text(encoding="utf8")))
        else:
            left.append(task)
    whole = sum(total.values())
    ready = whole - sum(len(task.pictures) for task in left)
    if ready:
        report(f"continuing after {ready:,} of {whole:,} pictures")
    with Shown(whole, ready, progress, report) as shown:
        for task, record in run_tasks(left, config, root):
            shown.update(len(task.pictures))
            note(task, record)
    manifest = finish(root, config, raw, tasks, records, settings)
    for part, written in manifest["parts"].items():
        report(
            f"{part}: {written['count']:,} pictures, {written['bytes'] / 1e9:.3g} GB"
            + (f" in {len(written['shards']):,} shards" if written["shards"] else "")
        )
    kind = "folder" if config.format == "folders" else "shards"
    report(f"train with --data {kind}:{root}")
    return manifest


def run_tasks(
    tasks: Sequence[Task], config: PrepareConfig, root: Path
) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Tasks with their records as they are done, by ``workers`` processes."""
    workers = config.workers or os.cpu_count() or 1
    if workers == 1:
        for task in tasks:
            yield task, run_task(task, config, root)
        return
    # an interrupt is the main process's business
    quiet = (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(
        workers, initializer=signal.signal, initargs=quiet
    ) as pool:
        futures = {pool.submit(run_task, task, config, root): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def finish(
    root: Path,
    config: PrepareConfig,
    raw: RawData,
    tasks: Sequence[Task],
    records: dict[str, dict[str, Any]],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Write the index of each part and, last, the manifest; returns it."""
    parts: dict[str, Any] = {}
    for part in raw.parts:
        own = [task for task in tasks if task.part == part]
        done = [records[task.record] for task in own]
        # a shard without a readable picture is none
        kept = [k for k, record in enumerate(done) if record["count"]]
        if config.format != "folders":
            # in a record that was read from the disk they are lists
            rows = [[(a, b, c) for a, b, c in done[k]["rows"]] for k in kept]
            write_index(root, part, rows)
        parts[part] = {
            "count": sum(record["count"] for record in done),
            "bytes": sum(record["bytes"] for record in done),
            "shards": [] if config.format == "folders" else [own[k].file for k in kept],
            "unreadable": [said for record in done for said in record["unreadable"]],
        }
    manifest = {
        "format": config.format,
        "classes": list(raw.classes),
        "settings": settings,
        "parts": parts,
    }
    write_json(root / MANIFEST, manifest)
    return manifest


def write_index(root: Path, part: str, shards: Sequence[Rows]) -> None:
    """Where the pictures of a part lie, for :mod:`crate_core.data.shards`."""
    rows = np.array([row for shard in shards for row in shard], np.int64).reshape(-1, 3)
    file = io.BytesIO()
    np.savez(
        file,
        shard=np.repeat(
            np.arange(len(shards)), [len(shard) for shard in shards]
        ).astype(np.int32),
        offset=rows[:, 0],
        size=rows[:, 1].astype(np.int32),
        label=rows[:, 2],
    )
    atomic_write(index_file(root, part), file.getvalue())


def understood_raw(raw: RawData, source: str) -> list[str]:
    """What there is to prepare, in lines."""
    counts = ", ".join(
        f"{len(pictures):,} in {part}" for part, pictures in raw.parts.items()
    )
    how = f" ({raw.how})" if raw.how else ""
    lines = [f"data: {source}: {counts}{how}"]
    if raw.classes:
        lines.append(f"classes: {len(raw.classes):,} ({shortened(raw.classes)})")
    else:
        lines.append("classes: none, the pictures have no labels")
    if raw.left_out:
        lines.append(f"left out: {'; '.join(raw.left_out)}")
    return lines + [f"note: {said}" for said in raw.notes]


class Shown:
    """A bar on a terminal, a line now and then elsewhere, nothing if not wanted."""

    def __init__(
        self, total: int, done: int, wanted: bool, report: Callable[[str], None]
    ) -> None:
        from tqdm import tqdm

        terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=total,
            initial=done,
            unit="picture",
            disable=not (wanted and terminal),
        )
        self.lines, self.report = wanted and not terminal, report
        self.total, self.done, self.start = total, done, done
        self.began = self.said_at = time.perf_counter()

    def __enter__(self) -> "Shown":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def update(self, count: int) -> None:
        """So many pictures more are done."""
        self.bar.update(count)
        self.done += count
        now = time.perf_counter()
        if self.lines and now - self.said_at > SECONDS_BETWEEN_LINES:
            self.said_at = now
            rate = (self.done - self.start) / (now - self.began)
            self.report(
                f"{self.done:,} of {self.total:,} pictures, {rate:,.0f} a second"
            )
