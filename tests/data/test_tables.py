"""Which column holds images, which labels, and which classes these are."""

import datetime
import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_runs import tiny, train

import crate_core.training.pretrain as pretraining
from crate_core.data.named import class_numbers, hub_parts, image_column, open_data
from crate_core.data.sources import HELD_OUT, ImageData, held_out_split
from crate_core.data.streamed import StreamedImages, stream_data
from crate_core.model.config import CrateMAEConfig

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    datasets.disable_progress_bars()


def cells(count: int, red: int = 0) -> list[dict]:
    def png(i: int) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (red, i, 0)).save(file, "PNG")
        return file.getvalue()

    return [{"bytes": png(i), "path": None} for i in range(count)]


def write(path: Path, **columns: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


values = (
    st.none()
    | st.integers(-3, 9)
    | st.text(max_size=2)
    | st.booleans()
    | st.floats(allow_infinity=False)
    | st.dates(datetime.date(2020, 1, 1), datetime.date(2020, 1, 3))
    | st.tuples(st.integers(0, 2))
)


@given(train=st.lists(values, max_size=30), held_out=st.lists(values, max_size=10))
def test_any_hashable_values_are_classes_and_what_is_missing_is_none(
    train: list, held_out: list
) -> None:
    labels, classes, _ = class_numbers({"train": train, "test": held_out}, None)
    kept = {}
    for part, given_values in (("train", train), ("test", held_out)):
        for value, label in zip(given_values, labels[part], strict=True):
            if value is None or value != value:
                assert label == -1
            else:
                assert kept.setdefault(value, label) == label
                assert 0 <= label < len(classes)
    assert sorted(kept.values()) == list(range(len(classes)))


@given(st.lists(st.lists(st.integers(0, 1)), min_size=1))
def test_lists_are_no_labels(lists: list) -> None:
    labels, classes, said = class_numbers({"train": lists}, None)
    assert labels == {"train": None}
    assert classes == []
    assert "no class" in said


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["cat" if i % 2 else "dog" for i in range(30)], ("cat", "dog")),
        ([i % 2 + 1 for i in range(30)], ("1", "2")),
        ([None if i == 3 else i % 2 for i in range(30)], ("0", "1")),
        ([[i % 2, 1] for i in range(30)], ()),
        ([[i % 2] * (1 + i % 2) for i in range(30)], ()),
        ([None] * 30, ()),
    ],
    ids=["names", "from one", "a null", "lists", "ragged lists", "nulls"],
)
def test_tables_open_whatever_their_labels_hold(
    tmp_path: Path, labels: list, classes: tuple
) -> None:
    file = write(tmp_path / "x.parquet", image=cells(30), label=labels)
    data = open_data(f"hf:{file}")
    assert len(data.train) + len(data.held_out) == 30
    assert data.classes == classes
    if classes:
        for part in (data.train, data.held_out):
            for label, row in zip(part.labels, part.indices, strict=True):
                expected = "None" if label < 0 else classes[label]
                assert expected == str(labels[row])


@pytest.mark.parametrize("streaming", [False, True])
def test_pretraining_reads_pictures_whatever_befell_other_columns(
    tmp_path: Path, streaming: bool
) -> None:
    labels = [f"{i:04d}" * 300 for i in range(30)]
    file = write(tmp_path / "x.parquet", image=cells(30), label=labels)
    chunk = pq.read_metadata(file).row_group(0).column(2)
    assert chunk.path_in_schema == "label"
    data = bytearray(file.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = bytes(
        chunk.total_compressed_size
    )
    file.write_bytes(bytes(data))
    opened = (
        stream_data(str(file)) if streaming else open_data(f"hf:{file}", labels=False)
    )
    assert len(opened.train) + len(opened.held_out) == 30
    assert opened.train.labels is None
    assert "labels are not read" in opened.columns
    assert opened.held_out.read(0).size == (4, 4)
    with pytest.raises(ValueError, match=r"x\.parquet"):
        open_data(f"hf:{file}")


def test_pretraining_opens_tables_without_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "x.parquet", image=cells(30), label=list(range(30)))
    opened: list[bool] = []
    own = pretraining.open_data

    def noted(spec: str, root: str, labels: bool = True) -> object:
        opened.append(labels)
        return own(spec, root, labels)

    monkeypatch.setattr(pretraining, "open_data", noted)
    small = CrateMAEConfig.preset("cifar10-tiny", image_size=8, dim=8, depth=1, heads=2)
    said = train(tiny(tmp_path / "r", data=f"hf:{file}", model=small, batch_size=8))
    assert opened == [False]
    assert "labels are not read" in "".join(said)


label_columns = st.lists(
    st.none() | st.integers(-1, 3) | st.sampled_from(["a", "b"]), min_size=24
)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(labels=st.none() | label_columns)
def test_what_is_trained_on_does_not_depend_on_labels(
    tmp_path: Path, labels: list | None
) -> None:
    columns = {} if labels is None else {"label": [str(v) for v in labels[:24]]}
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        data = open_data(
            f"hf:{write(Path(folder) / 'x.parquet', image=cells(24), **columns)}"
        )
    expected = held_out_split(None, 24, HELD_OUT)
    for part, rows in zip((data.train, data.held_out), expected, strict=True):
        np.testing.assert_array_equal(part.indices, rows)


def test_class_labels_keep_their_numbers(tmp_path: Path) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "kind": datasets.ClassLabel(names=["a", "b", "c"])}
    )
    table = datasets.Dataset.from_dict(
        {"image": cells(6), "kind": [0, 2, 2, None, -1, 2]}, features=features
    )
    labels, classes, _ = class_numbers({"train": table["kind"][:]}, features["kind"])
    assert classes == ["a", "b", "c"]
    assert labels["train"].tolist() == [0, 2, 2, -1, -1, 2]


@pytest.mark.parametrize("name", ["image", "Image", "img", "photo"])
@pytest.mark.parametrize("others", [(), ("mask",), ("depth", "mask")])
def test_the_image_column_goes_by_name_then_alone(
    tmp_path: Path, name: str, others: tuple[str, ...]
) -> None:
    columns = {other: cells(20, 200) for other in others} | {name: cells(20, 100)}
    spec = f"hf:{write(tmp_path / 'x.parquet', **columns)}"
    if name == "photo" and others:
        with pytest.raises(ValueError, match="several columns of images"):
            open_data(spec)
        return
    data = open_data(spec)
    assert data.train.read(0).getpixel((0, 0))[0] == 100
    assert f"images in {name!r}" in data.columns


def test_encoded_bytes_without_a_struct_are_images_by_name(tmp_path: Path) -> None:
    plain = [cell["bytes"] for cell in cells(20)]
    data = open_data(f"hf:{write(tmp_path / 'x.parquet', image=plain, other=plain)}")
    assert data.held_out.read(0).size == (4, 4)
    with pytest.raises(ValueError, match="no image column"):
        image_column(datasets.Features({"x": datasets.Value("binary")}), "hf:x")


def test_parts_are_read_with_classes_over_both(tmp_path: Path) -> None:
    write(tmp_path / "d/Train.parquet", image=cells(6, 10), label=["b", "c"] * 3)
    write(tmp_path / "d/val.parquet", image=cells(4, 20), label=["c", "a"] * 2)
    write(tmp_path / "d/test.parquet", image=cells(4, 30), label=["c", "a"] * 2)
    write(tmp_path / "d/._val.parquet", image=cells(4, 40), label=["c", "a"] * 2)
    data = open_data(f"hf:{tmp_path / 'd'}")
    assert data.classes == ("a", "b", "c")
    np.testing.assert_array_equal(data.held_out.labels, [2, 0, 2, 0])
    assert {data.held_out.read(i).getpixel((0, 0))[0] for i in range(4)} == {20}
    assert any("the part test" in said for said in data.left_out)


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    for i in range(3):
        write(tmp_path / f"d/train-{i}-of-3.parquet", image=cells(20))
    bad = tmp_path / "d/train-1-of-3.parquet"
    whole = bad.read_bytes()
    for data in (whole[:-200], whole[:4] + bytes(200) + whole[204:]):
        bad.write_bytes(data)
        with pytest.raises(ValueError, match=r"train-1-of-3\.parquet"):
            open_data(f"hf:{tmp_path / 'd'}")


@pytest.mark.parametrize("opener", [open_data, lambda spec: stream_data(spec[3:])])
@pytest.mark.parametrize("part", ["train-1", "test"])
@pytest.mark.parametrize("column", [[{"a": 1}] * 20, list(range(20)), [["x"]] * 20])
def test_a_shard_whose_images_are_none_is_named(
    tmp_path: Path, opener: Callable[[str], ImageData], part: str, column: list
) -> None:
    write(tmp_path / "d/train-0.parquet", image=cells(20))
    write(tmp_path / "d/train-2.parquet", image=cells(20))
    write(tmp_path / f"d/{part}.parquet", image=column)
    try:
        source = opener(f"hf:{tmp_path / 'd'}").train
        assert isinstance(source, StreamedImages)  # of which the first rows are read
        with pytest.raises(ValueError, match="cannot be read on"):
            list(source.epoch(0, 0))
    except ValueError as error:
        assert str(tmp_path / "d") in str(error)  # noqa: PT017
        if part == "train-1":
            assert "train-1.parquet does not fit" in str(error)  # noqa: PT017


@pytest.mark.parametrize("name", ["a[b]", "x*", "wh?t", "{a,b}", "co lon", "ä"])
def test_names_with_signs_of_patterns(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name / f"{name}.parquet", image=cells(20))
    assert len(open_data(f"hf:{file}").train) == 18
    assert len(open_data(f"hf:{file.parent}").train) == 18


def test_splits_of_the_hub_by_their_names() -> None:
    assert hub_parts(["test"], "hf:x") == {"train": "test"}
    assert hub_parts(["Train", "dev", "x"], "hf:x") == {
        "train": "Train",
        "validation": "dev",
    }
    with pytest.raises(ValueError, match="no part to train on"):
        hub_parts(["validation", "test"], "hf:x")
