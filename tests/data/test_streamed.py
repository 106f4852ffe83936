"""Hugging Face data read as it comes: what batches hold, resuming, damage, and what
cannot be streamed.
"""

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import contents, tiny, train

import crate_core.data.streamed as streaming
from crate_core.data.batches import Batch, UnreadableCount, loader
from crate_core.data.streamed import StreamedBatches, StreamedPictures, stream_data
from crate_core.model.config import CrateMAEConfig

datasets = pytest.importorskip("datasets")
DAMAGE = b"no image"
COLOUR = CrateMAEConfig.preset("cifar10-tiny", image_size=8, dim=16, depth=1, heads=2)


def write(path: Path, count: int, first: int = 0, damaged: int = -1) -> None:
    """Rows of one colour each, which tells them apart."""
    rows = []
    for i in range(first, first + count):
        buffer = io.BytesIO()
        Image.new("RGB", (9, 8), (i, 255 - i, 100)).save(buffer, format="PNG")
        rows.append(
            {"bytes": DAMAGE if i == damaged else buffer.getvalue(), "path": None}
        )
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Value("int64")}
    )
    columns = {"image": rows, "label": list(range(first, first + count))}
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files to train on, one held out."""
    path = tmp_path_factory.mktemp("stream")
    datasets.disable_progress_bars()
    for k in range(3):
        write(path / f"x-train-{k}.parquet", 20, first=20 * k)
    write(path / "x-test.parquet", 5, first=200)
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers smaller than the data."""
    monkeypatch.setattr(streaming.StreamedImages, "buffer", 16)
    monkeypatch.setattr(streaming, "KEPT_ROWS", 10)
    # The library waits five seconds for its reading threads at the end of each pass.
    monkeypatch.setattr(
        datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False
    )


def batches(
    location: Path,
    steps: int,
    start: int = 0,
    workers: int = 0,
    share: tuple[int, int] = (0, 1),
    seed: int = 3,
) -> list[Batch]:
    source = stream_data(str(location)).train
    assert isinstance(source, streaming.StreamedImages)
    source.buffer = 16
    dataset = StreamedPictures(source, (8, 8), 3, "crop_flip", seed)
    return list(
        loader(dataset, StreamedBatches(source, 8, seed, start, steps, *share), workers)
    )


def colours(found: list[Batch]) -> list[int]:
    """Which row each picture is, by its red."""
    return [int(image[0, 4, 4]) for batch in found for image in batch.images]


def test_an_epoch_has_every_row_once_and_another_order_each_time(folder: Path) -> None:
    rows = colours(batches(folder, 15))  # two epochs of 60 rows
    assert sorted(rows[:60]) == sorted(rows[60:]) == list(range(60))
    assert rows[:60] != rows[60:] != list(range(60))
    assert colours(batches(folder, 15, seed=4)) != rows


def test_batches_depend_on_seed_and_step_alone(folder: Path) -> None:
    whole = batches(folder, 12)
    for other in (
        batches(folder, 12, workers=2),
        batches(folder, 12, start=9),
        batches(folder, 12, start=5),
    ):
        for one, again in zip(whole[-len(other) :], other, strict=True):
            assert torch.equal(one.images, again.images)
    halves = [batches(folder, 12, share=(process, 2)) for process in range(2)]
    for one, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(one.images, torch.cat([part.images for part in parts]))


def test_a_streamed_run_that_is_cut_goes_on_exactly(
    folder: Path, tmp_path: Path
) -> None:
    fields = {
        "data": f"hf:{folder}",
        "streaming": True,
        "model": COLOUR,
        "augmentation": "crop_flip",
        "epochs": 12 * 16 / 60,
        "warmup_ratio": 0.15,
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    said = train(tiny(tmp_path / "uncut", **fields))
    assert "60 to train on (streamed), 5 held out (test)" in said[0]
    train(tiny(tmp_path / "cut", **fields, max_steps=6))
    train(tiny(tmp_path / "cut", **fields, workers=1))
    torch.set_num_threads(threads)
    assert contents(tmp_path / "cut") == contents(tmp_path / "uncut")
    with pytest.raises(ValueError, match=r"streaming \(there True, now False\)"):
        train(tiny(tmp_path / "cut", **{**fields, "streaming": False}))


def test_a_damaged_row_is_named_once_and_replaced_by_another_of_its_batch(
    tmp_path: Path,
) -> None:
    write(tmp_path / "x-train.parquet", 32, damaged=20)
    write(tmp_path / "x-test.parquet", 5)
    said: list[str] = []
    count, found = UnreadableCount(32, 0.1, {}), batches(tmp_path, 12)
    for batch in found:
        count.add(batch, said.append)
        assert batch.images.shape == (8, 3, 8, 8)
    assert len(said) == len(count.met) == 1
    # by size and checksum: a shuffled stream has no row numbers
    assert f"{len(DAMAGE)} bytes, CRC-32 {zlib.crc32(DAMAGE):08x}" in said[0]
    assert 20 not in colours(found)


def test_without_a_held_out_part_the_first_rows_are_held_out(tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", 40)
    data = stream_data(str(tmp_path / "x.parquet"))
    assert (len(data.train), len(data.held_out)) == (36, 4)
    held_out = [np.asarray(data.held_out.read(i))[0, 0, 0] for i in range(4)]
    assert held_out == [0, 1, 2, 3]
    assert sorted(colours(batches(tmp_path / "x.parquet", 9))[:36]) == list(
        range(4, 40)
    )


def test_what_cannot_be_streamed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.parquet"):
        stream_data(str(tmp_path / "gone.parquet"))
    (tmp_path / "broken.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match="not readable parquet"):
        stream_data(str(tmp_path / "broken.parquet"))
    datasets.Dataset.from_dict({"text": ["a"] * 20}).to_parquet(
        tmp_path / "text.parquet"
    )
    with pytest.raises(ValueError, match=r"no image column.*\['text'\]"):
        stream_data(str(tmp_path / "text.parquet"))
    write(tmp_path / "few.parquet", 5)
    with pytest.raises(ValueError, match="at least ten rows, got 5"):
        stream_data(str(tmp_path / "few.parquet"))
