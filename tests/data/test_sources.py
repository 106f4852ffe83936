"""Where pictures come from, how they are split, and the stream of training batches."""

import io
import struct
from collections import deque
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from crate_core.data.batches import (
    SUBSTITUTES,
    StepBatches,
    TrainingPictures,
    UnreadableCount,
    evaluation_batches,
    loader,
)
from crate_core.data.named import open_data
from crate_core.data.pictures import (
    UnreadableImageError,
    image_extensions,
    open_picture,
)
from crate_core.data.sources import ArrayImages, FileImages, held_out_split
from crate_core.data.transforms import augment, fit, in_mode, prepare, to_tensor
from crate_core.evaluation.labels import class_count


def picture(
    seed: int, size: tuple[int, int] = (12, 10), mode: str = "RGB"
) -> Image.Image:
    """A smooth picture that differs from seed to seed."""
    width, height = size
    generator = np.random.default_rng(seed)
    low = Image.fromarray(generator.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    return low.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def fill(folder: Path, count: int, seed: int = 0, suffix: str = ".png") -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:03d}{suffix}" for i in range(count)]
    for i, path in enumerate(paths):
        picture(seed + i).save(path)
    return paths


# -- sources and splits


def test_a_path_is_a_folder(tmp_path: Path) -> None:
    fill(tmp_path / "pictures", 12)
    by_path, by_name = (
        open_data(spec)
        for spec in (tmp_path / "pictures", f"folder:{tmp_path / 'pictures'}")
    )
    assert by_path.description == by_name.description
    assert len(by_path.train) == len(by_name.train)


def test_digits_are_split_by_class_without_overlap() -> None:
    data, again = open_data("digits"), open_data("digits")
    assert len(data.train) + len(data.held_out) == 1797
    np.testing.assert_array_equal(data.held_out.indices, again.held_out.indices)
    assert not set(data.train.indices) & set(data.held_out.indices)
    whole = np.bincount(data.train.labels) + np.bincount(data.held_out.labels)
    np.testing.assert_allclose(np.bincount(data.held_out.labels), 0.2 * whole, atol=0.5)
    values = torch.stack([data.train.read(i) for i in range(50)])
    assert values.shape == (50, 1, 8, 8)
    assert values.min() == 0
    assert values.max() == 1


@given(
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=60).filter(
        lambda x: max(map(x.count, x)) > 1
    ),
    share=st.floats(0.05, 0.6),
)
def test_split_is_a_partition_that_keeps_a_picture_of_each_class(
    labels: list[int], share: float
) -> None:
    array = np.array(labels)
    train, held_out = held_out_split(array, len(labels), share)
    np.testing.assert_array_equal(
        np.sort(np.concatenate([train, held_out])), np.arange(len(labels))
    )
    for label in np.unique(array):
        count = (array == label).sum()
        expected = 0 if count == 1 else max(1, round(share * count))
        assert (array[held_out] == label).sum() == expected


def test_folder_of_class_folders(tmp_path: Path) -> None:
    fill(tmp_path / "cat", 20)
    fill(tmp_path / "ant", 10, seed=50)
    fill(tmp_path / ".hidden", 3)
    (tmp_path / "ant" / "._000.png").write_bytes(b"a file that a Mac leaves behind")
    (tmp_path / "notes.txt").write_text("no image")
    data = open_data(f"folder:{tmp_path}")
    assert data.classes == ("ant", "cat")
    np.testing.assert_array_equal(np.bincount(data.train.labels), [9, 18])
    np.testing.assert_array_equal(np.bincount(data.held_out.labels), [1, 2])
    for part in (data.train, data.held_out):
        names = [Path(part.name(i)).parent.name for i in range(len(part))]
        assert names == [data.classes[label] for label in part.labels]


@pytest.mark.parametrize("part", ["val", "validation", "test"])
def test_folder_with_parts(tmp_path: Path, part: str) -> None:
    for name in ("a", "b"):
        fill(tmp_path / "train" / name, 4)
        fill(tmp_path / part / name, 3)
    data = open_data(f"folder:{tmp_path}")
    assert (len(data.train), len(data.held_out)) == (8, 6)
    assert all(f"/{part}/" in data.held_out.name(i) for i in range(6))


def test_flat_folder_has_no_labels_and_any_case_of_extension(tmp_path: Path) -> None:
    fill(tmp_path, 9)
    picture(99).save(tmp_path / "LAST.JPeG", format="JPEG")
    data = open_data(f"folder:{tmp_path}")
    assert data.train.labels is None
    assert data.classes == ()
    assert (len(data.train), len(data.held_out)) == (9, 1)


def test_folder_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_data(f"folder:{tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match=r"is empty.*\.jpg"):
        open_data(f"folder:{tmp_path}")
    (tmp_path / "readme.txt").write_text("text")
    with pytest.raises(ValueError, match="holds no image") as caught:
        open_data(f"folder:{tmp_path}")
    assert all(extension in str(caught.value) for extension in image_extensions())
    with pytest.raises(ValueError, match="is a file"):
        open_data(f"folder:{tmp_path / 'readme.txt'}")
    fill(tmp_path, 1)
    with pytest.raises(ValueError, match="at least two pictures, got 1"):
        open_data(f"folder:{tmp_path}")
    fill(tmp_path / "class", 2)
    with pytest.raises(ValueError, match="beside class folders"):
        open_data(f"folder:{tmp_path}")


def test_folder_parts_with_other_classes(tmp_path: Path) -> None:
    for name in ("b", "c"):
        fill(tmp_path / "train" / name, 2)
    for name in ("a", "c"):
        fill(tmp_path / "val" / name, 2)
    data = open_data(f"folder:{tmp_path}")
    assert data.classes == ("b", "c", "a")
    for part in (data.train, data.held_out):
        names = [Path(part.name(i)).parent.name for i in range(len(part))]
        assert names == [data.classes[label] for label in part.labels]
    assert data.notes == (
        "train/ lacks 1 classes of val/ (a)",
        "val/ lacks 1 classes of train/ (b)",
    )
    with pytest.raises(ValueError, match="no training picture has, such as a"):
        class_count(data)


def test_a_flat_held_out_folder_has_no_labels(tmp_path: Path) -> None:
    for name in ("a", "b"):
        fill(tmp_path / "train" / name, 2)
    fill(tmp_path / "val", 3)
    data = open_data(f"folder:{tmp_path}")
    assert (len(data.train), len(data.held_out)) == (4, 3)
    assert data.held_out.labels is None
    assert data.notes == ("val/ has no class folders: its pictures have no labels",)


@pytest.mark.parametrize("spec", ["", "folder:", "digit", "zip:x", "torchvision:"])
def test_unknown_form_of_data(spec: str) -> None:
    with pytest.raises(
        ValueError,
        match=r"accepted are digits, folder:PATH, shards:PATH, torchvision:NAME, "
        r"hf:NAME",
    ):
        open_data(spec)


def test_torchvision_reads_its_own_parts(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"CIFAR10.*MNIST"):
        open_data("torchvision:Imagnet")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    pixels = {}
    for name, count in (("train", 7), ("t10k", 4)):
        pixels[name] = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        images = struct.pack(">IIII", 0x0803, count, 28, 28) + pixels[name].tobytes()
        (raw / f"{name}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(
            struct.pack(">II", 0x0801, count) + bytes(range(count))
        )
    data = open_data("torchvision:MNIST", tmp_path)
    assert (len(data.train), len(data.held_out)) == (7, 4)
    np.testing.assert_array_equal(data.train.labels, np.arange(7))
    read = to_tensor(data.held_out.read(2), 1)
    torch.testing.assert_close(read, torch.from_numpy(pixels["t10k"][2])[None] / 255)


def write_parquet(
    path: Path, count: int, classes: list[str] | None = None, damaged: int = -1
) -> None:
    """Rows in the Hugging Face image schema: struct of bytes and path, and an integer
    label if there are classes.
    """
    import datasets

    rows = []
    for i in range(count):
        buffer = io.BytesIO()
        picture(i).save(buffer, format="PNG")
        rows.append(
            {"bytes": b"no image" if i == damaged else buffer.getvalue(), "path": None}
        )
    columns: dict[str, list] = {"image": rows}
    features = {"image": datasets.Image()}
    if classes:
        columns["label"] = [i % len(classes) for i in range(count)]
        features["label"] = datasets.ClassLabel(names=classes)
    datasets.Dataset.from_dict(
        columns, features=datasets.Features(features)
    ).to_parquet(path)


@pytest.fixture
def hugging_face_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    datasets.disable_progress_bars()


@pytest.mark.usefixtures("hugging_face_cache")
def test_parquet_with_labels_and_a_damaged_row(tmp_path: Path) -> None:
    path = tmp_path / "pets.parquet"
    write_parquet(path, 20, ["cat", "dog"], damaged=3)
    data = open_data(f"hf:{path}")
    assert data.classes == ("cat", "dog")
    assert (len(data.train), len(data.held_out)) == (18, 2)
    rows = {int(data.train.indices[i]): i for i in range(18)}
    expected = np.asarray(picture(7 if 7 in rows else 8))
    np.testing.assert_array_equal(
        np.asarray(data.train.read(rows[7 if 7 in rows else 8])), expected
    )
    part = data.train if 3 in rows else data.held_out
    with pytest.raises(UnreadableImageError, match=r"pets.parquet row 3"):
        part.read(int(np.flatnonzero(part.indices == 3)[0]))


@pytest.mark.usefixtures("hugging_face_cache")
def test_parquet_parts_by_name_and_without_labels(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x-train.parquet", 6)
    write_parquet(tmp_path / "x-test.parquet", 3)
    for spec in (tmp_path / "x-train.parquet", tmp_path):
        data = open_data(f"hf:{spec}")
        assert (len(data.train), len(data.held_out)) == (6, 3)
        assert data.train.labels is None


@pytest.mark.usefixtures("hugging_face_cache")
def test_parquet_that_cannot_be_used(tmp_path: Path) -> None:
    import datasets

    with pytest.raises(FileNotFoundError, match=r"gone\.parquet"):
        open_data(f"hf:{tmp_path / 'gone.parquet'}")
    with pytest.raises(ValueError, match=r"holds no \.parquet"):
        open_data(f"hf:{tmp_path}")
    datasets.Dataset.from_dict({"text": ["a", "b"]}).to_parquet(
        tmp_path / "text.parquet"
    )
    with pytest.raises(ValueError, match=r"no image column.*\['text'\]"):
        open_data(f"hf:{tmp_path / 'text.parquet'}")
    (tmp_path / "broken.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match="not readable parquet"):
        open_data(f"hf:{tmp_path / 'broken.parquet'}")


# -- pictures to tensors


def test_sixteen_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    read = to_tensor(open_picture(tmp_path / "ramp.png"), 1)[0]
    np.testing.assert_allclose(read.numpy(), ramp / 65535, atol=0.5 / 255 + 1e-6)


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK", "LA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_mode_becomes_grey_or_colour(mode: str, channels: int) -> None:
    tensor = prepare(picture(1, mode="RGB").convert(mode), (8, 8), channels)
    assert tensor.shape == (channels, 8, 8)
    assert tensor.dtype == torch.float32
    assert tensor.min() >= 0
    assert tensor.max() <= 1


def test_other_channel_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="the model has 2"):
        in_mode(picture(0), 2)
    with pytest.raises(ValueError, match="4 channels do not fit a model of 2"):
        to_tensor(torch.zeros(4, 8, 8), 2)


@given(
    width=st.integers(4, 40),
    height=st.integers(4, 40),
    to=st.tuples(st.integers(4, 24), st.integers(4, 24)),
)
def test_fit_gives_the_size_and_cuts_the_centre(
    width: int, height: int, to: tuple[int, int]
) -> None:
    source = picture(0, (width, height))
    fitted = fit(source, to)
    assert fitted.size == to[::-1]
    if (height, width) == to:
        assert fitted is source


def test_fit_does_not_stretch() -> None:
    # A wide picture, black left and right of a white middle: a square cut of the middle
    # is white.
    wide = np.zeros((10, 40), dtype=np.uint8)
    wide[:, 12:28] = 255
    assert to_tensor(fit(Image.fromarray(wide), (10, 10)), 1).min() > 0.99


# -- the stream


@given(count=st.integers(1, 30), batch=st.integers(1, 40), seed=st.integers(0, 3))
def test_every_epoch_is_a_permutation(count: int, batch: int, seed: int) -> None:
    steps = -(-3 * count // batch)
    positions = [item for b in StepBatches(count, batch, seed, 0, steps) for item in b]
    for epoch in range(3):
        assert sorted(index for e, index in positions if e == epoch)[:count] == list(
            range(count)
        )


@given(start=st.integers(0, 12), processes=st.sampled_from([1, 2, 3, 6]))
def test_batches_depend_on_the_step_alone_and_processes_share_them(
    start: int, processes: int
) -> None:
    whole = list(StepBatches(17, 6, 5, 0, 12))
    shares = [
        list(StepBatches(17, 6, 5, start, 12, process, processes))
        for process in range(processes)
    ]
    joined = [
        [item for share in step for item in share] for step in zip(*shares, strict=True)
    ]
    assert joined == whole[start:]


def test_batch_size_must_be_shared_evenly() -> None:
    with pytest.raises(
        ValueError,
        match="batch_size=6 must be a multiple of the number of processes, 4",
    ):
        StepBatches(17, 6, 0, 0, 1, 0, 4)


def test_seeds_and_epochs_shuffle_differently() -> None:
    def epoch(seed: int, number: int) -> list[int]:
        return [i for b in StepBatches(50, 50, seed, number, number + 1) for _, i in b]

    orders = [epoch(0, 0), epoch(0, 1), epoch(1, 0)]
    assert len({tuple(order) for order in orders}) == 3


def batches_of(
    source: FileImages | ArrayImages, workers: int = 0, seed: int = 0, steps: int = 4
) -> list:
    dataset = TrainingPictures(source, (8, 8), 3, "crop_flip", seed)
    return list(loader(dataset, StepBatches(len(source), 4, seed, 0, steps), workers))


def test_batches_do_not_depend_on_workers_or_global_state(tmp_path: Path) -> None:
    source = FileImages(fill(tmp_path, 7))
    source.paths[2].write_bytes(b"damaged")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    direct = batches_of(source)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    for one, other in zip(direct, batches_of(source, workers=2), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.indices, other.indices)
        assert one.unreadable == other.unreadable
    changed = batches_of(source, seed=1)
    assert not torch.equal(direct[0].images, changed[0].images)


def test_augmentation_changes_with_its_key_and_only_with_it() -> None:
    source = picture(3, (40, 30))
    one, same, other = (
        to_tensor(augment(source, (8, 8), "crop_flip", key), 3) for key in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert one.shape == (3, 8, 8)
    assert one.min() >= 0
    assert one.max() <= 1


def test_random_crops_are_flipped_half_the_time() -> None:
    # A ramp from left to right survives any crop; its direction tells whether it was
    # flipped.
    ramp = Image.fromarray(np.tile(np.linspace(0, 255, 32).astype(np.uint8), (32, 1)))
    shown = [
        to_tensor(augment(ramp, (8, 8), "crop_flip", key), 1)[0] for key in range(400)
    ]
    falling = [bool(picture[4, 0] > picture[4, -1]) for picture in shown]
    assert 160 < sum(falling) < 240  # four standard deviations


# -- unreadable pictures


def test_damaged_pictures_are_named_replaced_and_counted(tmp_path: Path) -> None:
    paths = fill(tmp_path, 10)
    whole = paths[4].read_bytes()
    paths[4].write_bytes(whole[: len(whole) // 2])  # cut off
    paths[7].unlink()  # gone since the folder was listed
    source, said = FileImages(paths), []
    count = UnreadableCount(10, 0.2, {})
    first = [
        batch
        for batch in batches_of(source, steps=10)
        if count.add(batch, said.append) is None
    ]
    assert all(batch.images.shape == (4, 3, 8, 8) for batch in first)
    assert set(count.met) == {4, 7}
    assert len(said) == 2
    assert any(str(paths[4]) in line for line in said)
    for batch, again in zip(first, batches_of(source, steps=10), strict=True):
        assert not {4, 7} & set(batch.indices.tolist())
        assert torch.equal(batch.images, again.images)


def test_too_many_damaged_pictures_stop_the_run(tmp_path: Path) -> None:
    paths = fill(tmp_path, 10)
    for path in paths[:3]:
        path.write_bytes(b"")
    count = UnreadableCount(10, 0.2, {})
    batches = iter(batches_of(FileImages(paths), steps=10))
    with pytest.raises(
        ValueError, match=r"3 of 10 training pictures \(30.0%\).*stops above 20.0%"
    ):
        deque((count.add(batch, str) for batch in batches), maxlen=0)
    assert len(count.met) == 3


def test_a_source_of_nothing_but_damaged_pictures_stops_the_run(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(3 * SUBSTITUTES)]
    for path in paths:
        path.write_bytes(b"x")
    batch = batches_of(FileImages(paths), steps=1)[0]
    assert not batch.complete
    with pytest.raises(ValueError, match="cannot be read"):
        UnreadableCount(len(paths), 1.0, {}).add(batch, str)


def test_evaluation_leaves_damaged_pictures_out_in_order(tmp_path: Path) -> None:
    paths = fill(tmp_path, 7)
    paths[3].write_bytes(b"x")
    batches = list(evaluation_batches(FileImages(paths), (8, 8), 1, batch_size=4))
    assert torch.cat([b.indices for b in batches]).tolist() == [0, 1, 2, 4, 5, 6]
    assert [index for b in batches for index, _ in b.unreadable] == [3]
    expected = torch.stack([prepare(picture(i), (8, 8), 1) for i in (0, 1, 2, 4, 5, 6)])
    torch.testing.assert_close(torch.cat([b.images for b in batches]), expected)
