"""Which files and folders are trained on, by their names: never a held-out one."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from crate_core.data.folders import folder, image_files
from crate_core.data.parts import WORDS, parquet_parts, part_of
from crate_core.data.sources import ImageData, ImageSource

FRESH = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
CASES = st.sampled_from([str.lower, str.upper, str.title])
DELIMITERS = ["-", "_", "2017", "-0", ""]
PART_WORDS = {word for of in WORDS.values() for word in of}


@st.composite
def named(draw: st.DrawFn, part: str, shards: bool = True) -> str:
    """A name that says nothing but a part, and perhaps which shard it is."""
    word = draw(CASES)(draw(st.sampled_from(WORDS[part])))
    delimiters = [*DELIMITERS, "-00000-of-00001"] if shards else DELIMITERS
    return word + draw(st.sampled_from(delimiters))


def fill(directory: Path, count: int, first: int = 0, end: str = ".png") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for i in range(first, first + count):
        Image.new("RGB", (4, 4), (i % 256, 0, 0)).save(directory / f"{i:03d}{end}")


def names(source: ImageSource) -> set[str]:
    return {os.path.realpath(source.name(i)) for i in range(len(source))}


@given(part=st.sampled_from(list(WORDS)), data=st.data())
def test_a_part_is_named_by_a_delimited_word_in_any_case(
    part: str, data: st.DataObject
) -> None:
    name = data.draw(named(part))
    assert part_of([name]) == part
    assert part_of(["pets", f"x-{name}"]) == part
    # within a longer word it names nothing
    assert part_of([f"la{name}"]) is None
    other = data.draw(st.sampled_from([p for p in WORDS if p != part]))
    with pytest.raises(ValueError, match="speaks of"):
        part_of([name, data.draw(named(other))])


@FRESH
@given(
    train=named("train", shards=False),
    held=named("validation", shards=False) | named("test", shards=False),
)
def test_folders_of_parts_in_any_spelling(
    tmp_path_factory: pytest.TempPathFactory, train: str, held: str
) -> None:
    root = tmp_path_factory.mktemp("d")
    for name in "ab":
        fill(root / train / name, 3)
        fill(root / held / name, 2, first=50)
    data = folder(root)
    assert data.classes == ("a", "b")
    assert (len(data.train), len(data.held_out)) == (6, 4)
    assert all(str(root / held) in name for name in names(data.held_out))


@FRESH
@given(
    layout=st.lists(
        st.lists(
            st.sampled_from(
                ["train", "Val", "test", "cat", "dog", "test_tube", "data", "dev2"]
            ),
            min_size=1,
            max_size=3,
        ),
        min_size=1,
        max_size=6,
    )
)
def test_no_tree_trains_on_a_folder_that_names_a_held_out_part(
    tmp_path_factory: pytest.TempPathFactory, layout: list[list[str]]
) -> None:
    root = tmp_path_factory.mktemp("d")
    for k, path in enumerate(layout):
        fill(root.joinpath(*path), 3, first=10 * k)
    try:
        data = folder(root)
    except ValueError:  # refused: nothing is trained on
        return
    held_out_words = {"val", "test", "dev"}
    for i in range(len(data.train)):
        inside = Path(data.train.name(i)).relative_to(root).parts
        assert not {part.lower().rstrip("2") for part in inside} & held_out_words
    assert not names(data.train) & names(data.held_out)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["val/a", "test/a"], "no part to train on, only test, validation"),
        (["train/a", "Training/a"], "both name the part train"),
        (["train", "bus", "car"], r"train/, by name a part, beside bus/, car/"),
        (["data/train", "data/val"], "mixes parts"),
        (["cat/train", "cat/test", "dog/train"], "mixes parts"),
    ],
)
def test_trees_that_leave_parts_open_are_refused(
    tmp_path: Path, folders: list[str], message: str
) -> None:
    for k, name in enumerate(folders):
        fill(tmp_path / name, 3, first=10 * k)
    with pytest.raises(ValueError, match=message):
        folder(tmp_path)


def test_file_names_that_speak_of_parts_are_refused(tmp_path: Path) -> None:
    for i in range(6):
        part = "train" if i % 2 else "test"
        Image.new("L", (4, 4)).save(tmp_path / f"{part}_{i}.png")
    with pytest.raises(ValueError, match="mixes parts"):
        folder(tmp_path)


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    for part in ("train", "val", "test", "extra"):
        for name in "ab":
            fill(tmp_path / part / name, 3)
    (tmp_path / "train" / "c").mkdir()
    (tmp_path / "train" / "a" / "x.heic").write_bytes(b"")
    (tmp_path / "train" / "a" / "Thumbs.db").write_bytes(b"")
    fill(tmp_path / "train" / "__MACOSX" / "a", 2)
    data = folder(tmp_path)
    said = "; ".join(data.left_out)
    for what in ("1 file of other kinds (1 .heic)", "(c/)", "test/", "extra/"):
        assert what in said
    assert len(data.train) == 6


@pytest.mark.parametrize("end", [".gif", ".avif", ".jfif", ".JPE", ".jp2", ".tga"])
def test_formats_that_pillow_reads_count(tmp_path: Path, end: str) -> None:
    fill(tmp_path / "a", 3)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / f"x{end}").write_bytes(b"any")
    found = image_files(tmp_path)
    assert [len(found.by_class[name]) for name in "ab"] == [3, 1]


# -- links


def test_a_real_file_counts_once_whatever_links_lead_to_it(tmp_path: Path) -> None:
    root, store = tmp_path / "d", tmp_path / "store"
    fill(root / "a", 3)
    fill(root / "b", 3, first=20)
    fill(store, 4, first=40)
    (root / "a" / "loop").symlink_to(root)
    (root / "again").symlink_to(root / "a")
    (root / "c").symlink_to(store)
    (root / "b" / "more").symlink_to(store)
    (root / "b" / "twin.png").symlink_to(root / "b" / "020.png")
    (root / "b" / "gone.png").symlink_to(root / "nowhere.png")
    data = folder(root)
    assert len(data.train) + len(data.held_out) == len(
        names(data.train) | names(data.held_out)
    )
    assert len(names(data.train) | names(data.held_out)) == 10
    assert "again" not in data.classes


def test_links_made_on_purpose_are_followed(tmp_path: Path) -> None:
    store = tmp_path / "store"
    for name in "ab":
        fill(store / name, 6)
    for part, rows in (("train", range(4)), ("val", range(3, 6))):
        for name in "ab":
            (tmp_path / "d" / part / name).mkdir(parents=True)
            for i in rows:
                link = tmp_path / "d" / part / name / f"{i}.png"
                link.symlink_to(store / name / f"{i:03d}.png")
    data = folder(tmp_path / "d")
    # picture 3 of each class lies in both parts: it is held out
    assert (len(data.train), len(data.held_out)) == (6, 6)
    assert "2 training pictures that are held out too" in data.left_out
    whole = tmp_path / "linked"
    whole.symlink_to(tmp_path / "d")
    assert len(folder(whole).train) == 6


PLACES = ["plain", "outside", "hidden", "blob", "beside", "hard", "hard beside"]


@FRESH
@given(
    places=st.lists(st.sampled_from(PLACES), min_size=3, max_size=12),
    broken=st.integers(0, 3),
    loops=st.lists(st.sampled_from(["root", "above", "sibling"]), max_size=3),
)
def test_every_real_file_counts_once_wherever_links_put_it(
    tmp_path_factory: pytest.TempPathFactory,
    places: list[str],
    broken: int,
    loops: list[str],
) -> None:
    top = tmp_path_factory.mktemp("t")
    root = top / "d"
    for where in ("a", "b", ".annex", "blobs"):
        (root / where).mkdir(parents=True)
    (top / "store").mkdir()
    for i, place in enumerate(places):
        name = root / "ab"[i % 2] / f"{i:03d}.png"
        real = {
            "outside": top / "store" / f"{i}.png",
            "hard": top / "store" / f"{i}.png",
            "hidden": root / ".annex" / f"{i}.png",
            "blob": root / "blobs" / f"{i}",
        }.get(place, name)
        Image.new("L", (4, 4), i).save(real, "PNG")
        if place in ("outside", "hidden", "blob"):
            name.symlink_to(os.path.relpath(real, name.parent))
        elif place == "hard":
            name.hardlink_to(real)
        elif place == "beside":
            (root / "ba"[i % 2] / f"{i}-again.png").symlink_to(name)
        elif place == "hard beside":
            (root / "ba"[i % 2] / f"{i}-again.png").hardlink_to(name)
    for i in range(broken):
        (root / "a" / f"gone{i}.png").symlink_to(
            ("/nowhere/", "gone/")[i % 2] + "x.png"
        )
    for i, kind in enumerate(loops):
        to = {"root": root, "above": top, "sibling": root / "a"}[kind]
        (root / "b" / f"loop{i}").symlink_to(to)
    found = image_files(root)
    files = [file for of in found.by_class.values() for file in of]
    assert len(files) == len(places)
    assert len({Image.open(file).getpixel((0, 0)) for file in files}) == len(places)
    again = sum(place in ("beside", "hard beside") for place in places)
    assert (found.broken, found.repeated) == (broken, again + len(loops))
    said = "; ".join(found.left_out())
    assert ("to nothing" in said) == bool(broken)
    assert ("to what is counted already" in said) == (found.repeated > 0)


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_picture_that_is_held_out_by_a_link_is_not_trained_on(
    tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    for name in "ab":
        fill(tmp_path / "train" / name, 4)
        (tmp_path / "val" / name).mkdir(parents=True)
        link(tmp_path / "train" / name / "001.png", tmp_path / "val" / name / "x.png")
    data = folder(tmp_path)
    assert (len(data.train), len(data.held_out)) == (6, 2)
    assert "2 training pictures that are held out too" in data.left_out


def test_a_folder_of_links_to_nothing_says_so(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"{i}.png").symlink_to(f"/nowhere/{i}.png")
    with pytest.raises(ValueError, match="holds no image file, but 3 links to nothing"):
        folder(tmp_path)


def test_parts_that_are_one_folder_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "train" / "a", 3)
    (tmp_path / "val").symlink_to(tmp_path / "train")
    with pytest.raises(ValueError, match="are the same folder"):
        folder(tmp_path)


# -- parquet files


@FRESH
@given(
    train=named("train"),
    held=named("validation"),
    test=named("test"),
    above=st.booleans(),
    prefix=st.sampled_from(["", "carnival-", "latest_", "x/default/"]),
)
def test_parquet_files_by_part(
    tmp_path_factory: pytest.TempPathFactory,
    train: str,
    held: str,
    test: str,
    above: bool,
    prefix: str,
) -> None:
    root = tmp_path_factory.mktemp("d")
    expected = {}
    for part, name in (("train", train), ("validation", held), ("test", test)):
        file = root / (f"{prefix}{name}/0000" if above else f"{prefix}{name}")
        file = file.with_name(file.name + ".parquet")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        (file.parent / f"._{file.name}").touch()
        (file.parent / "@eaDir").mkdir(exist_ok=True)
        (file.parent / "@eaDir" / file.name).touch()
        expected[part] = [file]
    assert parquet_parts(root) == expected
    (root / "other.parquet").touch()
    assert parquet_parts(root) == expected


def test_parquet_files_without_a_part(tmp_path: Path) -> None:
    for name in ("latest-0", "carnival-1"):
        (tmp_path / f"{name}.parquet").touch()
    assert list(parquet_parts(tmp_path)) == ["train"]
    (tmp_path / "test.parquet").touch()
    parts = parquet_parts(tmp_path)
    assert [len(parts[part]) for part in ("train", "test")] == [2, 1]
    (tmp_path / "latest-0.parquet").unlink()
    (tmp_path / "carnival-1.parquet").unlink()
    with pytest.raises(ValueError, match="no part to train on, only test"):
        parquet_parts(tmp_path)


def test_one_parquet_file_is_joined_by_its_held_out_part(tmp_path: Path) -> None:
    for name in ("x-train-0-of-2", "x-test-0-of-1", "y-test", "x-val", "._x-val"):
        (tmp_path / f"{name}.parquet").touch()
    parts = parquet_parts(tmp_path / "x-train-0-of-2.parquet")
    assert [p.name for p in parts["test"]] == ["x-test-0-of-1.parquet"]


def test_the_data_says_how_many(tmp_path: Path) -> None:
    fill(tmp_path, 20)
    data = folder(tmp_path)
    assert isinstance(data, ImageData)
    assert np.intersect1d(data.train.indices, data.held_out.indices).size == 0
