"""Damaged files of every format, tables and folder trees drawn at random: nothing but
the documented errors escapes.

``CRATE_FUZZ_FILES=10000 pytest tests/data/test_fuzz.py`` is the longer mode.
"""

import io
import os
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crate_core.data.folders import folder
from crate_core.data.named import open_data
from crate_core.data.pictures import UnreadableImageError, formats, image_extensions
from crate_core.data.sources import FileImages
from crate_core.data.streamed import stream_data
from crate_core.data.transforms import augment, in_mode, prepare, to_tensor

FILES = int(os.environ.get("CRATE_FUZZ_FILES", "400"))
"""How many picture files are damaged; tables and trees are a fiftieth and a fifth."""

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "F", "I;16")
SIZE = (8, 8)


def random_picture(draw: np.random.Generator, mode: str) -> Image.Image:
    height, width = draw.integers(1, 70, 2)
    if mode in ("I", "F", "I;16"):
        scale = draw.choice([1, 255, 4095, 65535])
        kind = {"I": np.int32, "F": np.float32, "I;16": np.uint16}[mode]
        return Image.fromarray((draw.random((height, width)) * scale).astype(kind))
    pixels = Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
    if mode == "LAB":
        return Image.merge("LAB", pixels.split())
    return pixels.convert(mode)


def encoded(draw: np.random.Generator) -> tuple[str, bytes]:
    """A picture in some format that has it, with random EXIF now and then."""
    able = sorted(set(formats()) & set(Image.SAVE))
    while True:
        kind, mode = str(draw.choice(able)), str(draw.choice(MODES))
        exif = Image.Exif()
        exif[0x0112] = int(draw.integers(0, 12))
        options = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}
        file = io.BytesIO()
        try:
            random_picture(draw, mode).save(file, kind, **options)
        except (OSError, ValueError, KeyError, SystemError):
            continue  # this format has no such mode or size
        return kind, file.getvalue()


def damaged(draw: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """Bytes flipped, cut, zeroed, repeated or spliced; now and then whole."""
    changed = bytearray(data)
    for _ in range(draw.integers(0, 3)):
        if not changed:
            break
        start, stop = sorted(draw.integers(0, len(changed) + 1, 2))
        near = min(stop, start + int(draw.integers(1, 20)))
        match draw.integers(6):
            case 0:
                for _ in range(draw.integers(1, 20)):
                    changed[draw.integers(len(changed))] = draw.integers(256)
            case 1:
                del changed[stop:]
            case 2:
                changed[start:near] = bytes(near - start)
            case 3:
                del changed[start:near]
            case 4:
                changed[start:start] = changed[start:near]
            case _:
                changed[start:] = other[min(start, len(other)) :]
    return bytes(changed)


def check(source: FileImages, index: int, channels: int) -> str:
    """What became of a picture: its tensor is checked."""
    try:
        picture = source.read(index)
    except UnreadableImageError as error:
        return "unreadable" if error.name == source.name(index) else "misnamed"
    for tensor in (
        prepare(picture, SIZE, channels),
        to_tensor(
            augment(in_mode(picture, channels), SIZE, "crop_flip", index), channels
        ).clamp(0, 1),
    ):
        assert tensor.shape == (channels, *SIZE)
        assert torch.isfinite(tensor).all()
        assert tensor.min() >= 0
        assert tensor.max() <= 1
    return "read"


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_named(tmp_path: Path) -> None:
    draw = np.random.default_rng(12)
    ends = image_extensions()
    _, other = encoded(draw)
    met: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for i in range(FILES):
        kind, data = encoded(draw)
        path = tmp_path / f"x{draw.choice(ends)}"
        path.write_bytes(damaged(draw, data, other))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            met[check(FileImages([path]), 0, 1 + 2 * (i % 2))] += 1
        kinds[kind] += 1
        other = data
        path.unlink()
    # the fuzzer reaches both ends, and most formats
    assert not met["misnamed"]
    assert min(met["read"], met["unreadable"]) > FILES / 10
    assert len(kinds) > 10
    print(dict(met), dict(kinds))


def random_column(draw: np.random.Generator, count: int) -> list:
    """Values of one column, of a type drawn at random."""
    return [
        lambda: [{"bytes": encoded(draw)[1], "path": None} for _ in range(count)],
        lambda: [
            {"bytes": damaged(draw, encoded(draw)[1], b""), "path": "gone.png"}
            for _ in range(count)
        ],
        lambda: [
            None if draw.random() < 0.3 else {"bytes": None, "path": "gone.png"}
            for _ in range(count)
        ],
        lambda: [encoded(draw)[1] for _ in range(count)],
        lambda: draw.integers(-2, 3, count).tolist(),
        lambda: [None if draw.random() < 0.3 else "ab"[i % 2] for i in range(count)],
        lambda: [[int(k)] * int(k) for k in draw.integers(0, 3, count)],
        lambda: draw.random(count).tolist(),
        lambda: [None] * count,
        lambda: [{"a": int(k)} for k in draw.integers(0, 3, count)],
    ][draw.integers(10)]()


@pytest.mark.filterwarnings("ignore")
def test_random_tables_are_read_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(
        datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False
    )
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()
    draw = np.random.default_rng(13)
    names = ["image", "img", "label", "Label", "mask", "photo", "kind"]
    opened = 0
    tables = max(16, FILES // 50)
    for i in range(tables):
        root = Path(f"t{i}")
        parts = draw.choice(["train", "Test", "dev", "x", "latest"], 2, replace=False)
        for part in parts[: draw.integers(1, 3)]:
            count = int(draw.integers(1, 24))
            chosen = draw.choice(names, draw.integers(1, 4), replace=False)
            columns = {str(name): random_column(draw, count) for name in chosen}
            if draw.random() < 0.7:
                columns["image"] = random_column(draw, count)
            file = io.BytesIO()
            pq.write_table(pa.table(columns), file)
            data = file.getvalue()
            if draw.random() < 0.3:
                data = damaged(draw, data, b"")
            root.mkdir(exist_ok=True)
            (root / f"{part}.parquet").write_bytes(data)
        for opener in (open_data, lambda spec: stream_data(spec[3:])):
            try:
                found = opener(f"hf:{root}")
            except (ValueError, FileNotFoundError) as error:
                assert str(root) in str(error) or "two pictures" in str(error)  # noqa: PT017
                continue
            opened += 1
            for k in range(min(4, len(found.held_out))):
                check(found.held_out, k, 3)
    assert opened > tables / 10


@pytest.mark.filterwarnings("ignore")
def test_random_trees_are_read_or_refused(tmp_path: Path) -> None:
    draw = np.random.default_rng(14)
    words = ["train", "Val", "test", "a", "b", ".git", "__MACOSX", "train2017", "eval"]
    ends = [".png", ".JPG", ".avif", ".txt", "", ".heic"]
    data = io.BytesIO()
    Image.new("RGB", (4, 4)).save(data, "PNG")
    opened = 0
    trees = max(80, FILES // 5)
    for i in range(trees):
        root = tmp_path / f"t{i}"
        root.mkdir()
        # few words and depths a tree, or hardly one of them could be read
        own, depth = draw.choice(words, draw.integers(1, 4)), draw.integers(0, 3)
        for k in range(draw.integers(0, 24)):
            folders = draw.choice(own, depth + (draw.random() < 0.03))
            place = root.joinpath(*map(str, folders))
            place.mkdir(parents=True, exist_ok=True)
            path = place / f"{k}{draw.choice(ends)}"
            if draw.random() < 0.15:
                inside = sorted(root.rglob("*"))
                target = inside[draw.integers(len(inside))] if inside else root
                path.symlink_to(root if draw.random() < 0.2 else target)
            else:
                path.write_bytes(data.getvalue())
        try:
            found = folder(root)
        except ValueError as error:
            said = str(error)
            assert str(root) in said or "two pictures" in said
            continue
        opened += 1
        train, held_out = (
            {os.path.realpath(part.name(k)) for k in range(len(part))}
            for part in (found.train, found.held_out)
        )
        assert not train & held_out
        assert len(train) == len(found.train)
    assert opened > trees / 10
