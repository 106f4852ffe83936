"""A tiny ImageNet, as it is downloaded, prepared in every form and trained on."""

import io
import json
import os
import subprocess
import sys
import tarfile
import time
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_runs import ENVIRONMENT, contents, tiny, train

import crate_core.data.prepare as preparing
from crate_core.cli import main
from crate_core.data.batches import EpochOrder, StepBatches, micro_batches
from crate_core.data.named import open_data
from crate_core.data.prepare import PrepareConfig, prepare
from crate_core.data.raw import Original, label_rows, names_apart, raw_data
from crate_core.data.shards import LANES, ShardedImages, ShardOrder, lanes_of
from crate_core.model.config import CrateMAEConfig

WNIDS = ("n01440764", "n01443537", "n02102040")
TRAIN, VAL = 7, 4
SMALL = CrateMAEConfig.preset("cifar10-tiny", image_size=8, dim=16, depth=1, heads=2)


def jpeg(number: int, size: tuple[int, int] = (40, 30), **options: object) -> bytes:
    """A picture whose colour tells its number."""
    file = io.BytesIO()
    colour = (number * 3 % 256, 255 - number, 100)
    Image.new("RGB", size, colour).save(file, "JPEG", quality=95, **options)
    return file.getvalue()


def val_class(number: int) -> str:
    """Classes of the flat held-out part: by no order of theirs."""
    return WNIDS[(2 * number + 1) % 3]


def training_files() -> dict[str, bytes]:
    """Names below train/ with their bytes; one damaged, one a PNG file, one small."""
    files = {}
    for k, wnid in enumerate(WNIDS):
        for i in range(TRAIN):
            files[f"{wnid}/{wnid}_{i}.JPEG"] = jpeg(10 * k + i)
    files[f"{WNIDS[0]}/{WNIDS[0]}_3.JPEG"] = b"no picture"
    png = io.BytesIO()
    Image.new("RGBA", (60, 40), (200, 0, 0, 255)).save(png, "PNG")
    files[f"{WNIDS[1]}/{WNIDS[1]}_2.JPEG"] = png.getvalue()
    files[f"{WNIDS[2]}/{WNIDS[2]}_1.JPEG"] = jpeg(21, (12, 9))
    return files


def val_files() -> dict[str, bytes]:
    return {
        f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg(40 + i)
        for i in range(VAL * len(WNIDS))
    }


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def devkit() -> dict[str, bytes]:
    """The two files of the devkit that say the labels; one kind has others below it."""
    from scipy.io import savemat

    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O")]
    kind += [("num_children", "O"), ("children", "O"), ("wordnet_height", "O")]
    rows = [
        (7 - k, wnid, f"words {k}", "", 0, np.zeros(0), 0.0)
        for k, wnid in enumerate(WNIDS)
    ]
    rows.append((99, "n00000001", "animal", "", 3, np.array([5, 6, 7]), 1.0))
    file = io.BytesIO()
    savemat(file, {"synsets": np.array(rows, dtype=kind)})
    number = {wnid: 7 - k for k, wnid in enumerate(WNIDS)}
    truth = "".join(f"{number[val_class(i)]}\n" for i in range(len(val_files())))
    return {
        "meta.mat": file.getvalue(),
        "ILSVRC2012_validation_ground_truth.txt": truth.encode(),
    }


def label_file(root: Path, kind: str) -> Path | None:
    """One of the ways in which the labels of the flat part come; ``None`` where they
    are found by themselves.
    """
    names = sorted(val_files())
    classes = [val_class(i) for i in range(len(names))]
    if kind == "devkit folder":
        write(root / "ILSVRC2012_devkit_t12" / "data", devkit())
        return None
    if kind == "devkit archive":
        with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
            for name, data in devkit().items():
                add(archive, f"ILSVRC2012_devkit_t12/data/{name}", data)
        return None
    if kind == "meta.bin":
        words = {wnid: (wnid,) for wnid in WNIDS}
        torch.save((words, classes), root / "meta.bin")
        return None
    if kind == "numbers":
        write(root / "kit", devkit())
        return root / "kit" / "ILSVRC2012_validation_ground_truth.txt"
    lines = {
        "LOC_val_solution.csv": [
            f"{Path(name).stem},{of} 1 2 3 4 {of} 5 6 7 8"
            for name, of in zip(names, classes, strict=True)
        ]
        + ["ImageId,PredictionString"],
        "names.txt": [f"{n} {of}" for n, of in zip(names, classes, strict=True)],
        "classes.txt": classes,
    }[kind]
    # names may come in any order, and a table has its head first
    ordered = lines if kind == "classes.txt" else lines[::-1]
    (root / kind).write_text("\n".join(ordered) + "\n", encoding="utf8")
    return None if kind == "LOC_val_solution.csv" else root / kind


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders, a flat val/, and the devkit beside them."""
    root = tmp_path_factory.mktemp("raw")
    write(root / "train", training_files())
    write(root / "val", val_files())
    label_file(root, "devkit folder")
    return root


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as the archives that are downloaded."""
    root = tmp_path_factory.mktemp("archives")
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as archive:
        for wnid in WNIDS:
            file = io.BytesIO()
            with tarfile.open(fileobj=file, mode="w") as inner:
                for name, data in training_files().items():
                    if name.startswith(wnid):
                        add(inner, Path(name).name, data)
            add(archive, f"{wnid}.tar", file.getvalue())
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as archive:
        for name, data in val_files().items():
            add(archive, name, data)
    label_file(root, "devkit archive")
    return root


def made(source: Path, output: Path, **options: object) -> list[str]:
    said: list[str] = []
    fields = {"side": 16, "shard_size": 5, **options}
    config = PrepareConfig(str(source), str(output), **fields)
    prepare(config, said.append, progress=False)
    return said


def spec_of(output: Path, form: str) -> str:
    return f"folder:{output}" if form == "folders" else f"shards:{output}"


def files_of(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


# -- what there is


@pytest.mark.parametrize(
    "kind",
    [
        "devkit folder",
        "devkit archive",
        "meta.bin",
        "numbers",
        "LOC_val_solution.csv",
        "names.txt",
        "classes.txt",
    ],
)
def test_labels_of_a_flat_held_out_part(tmp_path: Path, kind: str) -> None:
    root = tmp_path / "Data" / "CLS-LOC"
    write(root / "train", training_files())
    write(root / "val", val_files())
    found = raw_data(root, label_file(tmp_path, kind))
    assert found.classes == WNIDS
    told = {of.name: of.of_class for of in found.parts["val"]}
    assert told == {name: val_class(i) for i, name in enumerate(sorted(val_files()))}


def test_labels_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train", training_files())
    write(tmp_path / "val", val_files())
    assert any("val has no labels" in said for said in raw_data(tmp_path).notes)
    labels = tmp_path / "labels.txt"
    for text, message in (
        ("a\nb\n", "has 2 classes, one a line, for 12 pictures"),
        ("ILSVRC2012_val_00000001 n01440764\n", "no label of 11 of 12 .*00000002"),
        ("1\n2\n", "meta.mat of the devkit"),
        ("".join(["../x\n"] * 12), "cannot be the name of a class"),
    ):
        labels.write_text(text)
        with pytest.raises(ValueError, match=message):
            raw_data(tmp_path, labels)
    with pytest.raises(FileNotFoundError, match="gone"):
        raw_data(tmp_path, tmp_path / "gone")
    (tmp_path / "kit").mkdir()
    with pytest.raises(ValueError, match="as the devkit does"):
        label_rows(tmp_path / "kit")


def test_archives_hold_what_folders_do(folders: Path, archives: Path) -> None:
    one, other = raw_data(folders), raw_data(archives)
    assert one.classes == other.classes
    for part in ("train", "val"):
        for a, b in zip(one.parts[part], other.parts[part], strict=True):
            assert (a.name, a.of_class, a.read()) == (b.name, b.of_class, b.read())


@given(st.lists(st.sampled_from(["a.png", "a.jpg", "A.PNG", "a-2.jpg", "b.jpg"])))
def test_names_differ_where_capitals_do_not(names: list[str]) -> None:
    apart = names_apart([Original("", name, "c") for name in names])
    assert len({name.casefold() for name in apart}) == len(names)


def test_a_damaged_archive_is_named(tmp_path: Path, archives: Path) -> None:
    whole = (archives / "ILSVRC2012_img_train.tar").read_bytes()
    bad = tmp_path / "ILSVRC2012_img_train.tar"
    for data in (b"no tar", b"", whole[:700] + bytes([7] * 600) + whole[1300:]):
        bad.write_bytes(data)
        with pytest.raises(ValueError, match="img_train"):
            raw_data(tmp_path)


# -- the copy


@pytest.mark.parametrize("form", ["folders", "tar", "parquet"])
def test_every_form_holds_the_same_pictures(
    tmp_path: Path, folders: Path, archives: Path, form: str
) -> None:
    output = tmp_path / "out"
    said = made(folders, output, format=form)
    (name,) = [line for line in said if "cannot be read" in line]
    assert f"{WNIDS[0]}_3.JPEG" in name
    assert said[-1] == f"train with --data {spec_of(output, form)}"
    data = open_data(spec_of(output, form))
    assert data.classes == WNIDS
    assert (len(data.train), len(data.held_out)) == (3 * TRAIN - 1, 3 * VAL)
    for part in (data.train, data.held_out):
        assert part.labels is not None
        for index in range(len(part)):
            picture = part.read(index)
            red = picture.getpixel((0, 0))[0]
            if red > 190 and part is data.train:  # the PNG file, on its side 3 : 2
                assert picture.size == (24, 16)
                assert data.classes[part.labels[index]] == WNIDS[1]
                continue
            number = round(red / 3)
            small = number == 21 and part is data.train
            assert picture.size == ((12, 9) if small else (21, 16))
            wanted = (
                WNIDS[number // 10] if part is data.train else val_class(number - 40)
            )
            assert data.classes[part.labels[index]] == wanted
    # a plain JPEG file that is small enough is copied as it is
    copies = [
        path.read_bytes() for path in output.rglob("*_1.jpg") if WNIDS[2] in path.name
    ]
    if isinstance(data.train, ShardedImages):
        copies = [data.train.encoded(i) for i in range(len(data.train))]
    assert training_files()[f"{WNIDS[2]}/{WNIDS[2]}_1.JPEG"] in copies
    # the same from archives, by several processes, bit for bit
    made(archives, tmp_path / "again", format=form, workers=2)
    one, other = files_of(output), files_of(tmp_path / "again")
    for files in (one, other):  # settings have sizes of files; names of what was read
        files.pop(".prepare/settings.json")
        manifest = json.loads(files.pop("prepared.json"))
        assert len(manifest["parts"]["train"]["unreadable"]) == 1
        for name in [n for n in files if n.startswith(".prepare")]:
            files.pop(name)
    assert one == other


def test_no_number_of_workers_takes_every_core_and_makes_the_same(
    tmp_path: Path, archives: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    pool = preparing.ProcessPoolExecutor

    def counted(workers: int, **options: Any) -> Any:
        asked.append(workers)
        return pool(workers, **options)

    monkeypatch.setattr(preparing, "ProcessPoolExecutor", counted)
    monkeypatch.setattr(preparing.os, "cpu_count", lambda: 3)
    shards = []
    for workers in (1, 0):
        made(archives, tmp_path / str(workers), workers=workers)
        files = files_of(tmp_path / str(workers))
        shards.append({k: v for k, v in files.items() if k.endswith(".tar")})
    assert asked == [3]
    assert shards[0] == shards[1]
    assert shards[0]


def test_other_programs_read_the_shards(tmp_path: Path, folders: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    made(folders, tmp_path / "tar", format="tar")
    names = set()
    for path in sorted((tmp_path / "tar").glob("val-*.tar")):
        with tarfile.open(path) as archive:
            names |= {member.name for member in archive}
    stems = {str(Path(name).with_suffix("")) for name in names}
    assert len(stems) == 3 * VAL
    assert names == {stem + end for stem in stems for end in (".jpg", ".cls")}
    made(folders, tmp_path / "parquet", format="parquet")
    table = open_data(f"hf:{tmp_path / 'parquet'}")
    assert (len(table.train), len(table.held_out)) == (3 * TRAIN - 1, 3 * VAL)
    own = open_data(f"shards:{tmp_path / 'parquet'}")
    np.testing.assert_array_equal(table.train.labels, own.train.labels)
    assert table.train.read(4) == own.train.read(4)


@pytest.mark.parametrize("form", ["folders", "tar", "parquet"])
def test_a_copy_that_is_cut_off_goes_on_to_the_same_files(
    tmp_path: Path, folders: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(folders, tmp_path / "whole", format=form)
    own, done = preparing.run_task, []

    def cut(task: object, *arguments: object) -> object:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(task)
        return own(task, *arguments)

    monkeypatch.setattr(preparing, "run_task", cut)
    with pytest.raises(KeyboardInterrupt):
        made(folders, tmp_path / "cut", format=form)
    monkeypatch.setattr(preparing, "run_task", own)
    said = made(folders, tmp_path / "cut", format=form)
    assert "continuing after 15 of 33 pictures" in said
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")
    said = made(folders, tmp_path / "cut", format=form)
    assert "continuing after 33 of 33 pictures" in said
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


@pytest.mark.processes
def test_a_killed_copy_goes_on(tmp_path: Path, folders: Path) -> None:
    command = [
        *(sys.executable, "-m", "crate_core.cli", "prepare", str(folders)),
        *(str(tmp_path / "cut"), "--side", "16", "--shard-size", "2"),
        *("--workers", "2"),
    ]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    records = tmp_path / "cut" / ".prepare"
    while process.poll() is None and len(list(records.glob("*-*.json"))) < 2:
        time.sleep(0.005)
    process.kill()
    process.wait()
    subprocess.run(command, env=ENVIRONMENT, check=True, stdout=subprocess.DEVNULL)
    made(folders, tmp_path / "whole", shard_size=2)
    cut, whole = files_of(tmp_path / "cut"), files_of(tmp_path / "whole")
    assert {name for name in cut if not name.endswith(".partial")} == set(whole)
    assert all(cut[name] == whole[name] for name in whole)


@pytest.mark.bad_input
def test_what_cannot_be_prepared(tmp_path: Path, folders: Path) -> None:
    with pytest.raises(ValueError, match=r"1 of 21 .*train .*more than 1\.0%"):
        made(folders, tmp_path / "a", max_unreadable=0.01)
    made(folders, tmp_path / "a")
    with pytest.raises(ValueError, match=r"another copy.*side \(there 16, now 17\)"):
        made(folders, tmp_path / "a", side=17)
    with pytest.raises(ValueError, match="is not empty"):
        made(folders, folders)
    for field, value in (("side", 0), ("quality", 101), ("format", "zip")):
        with pytest.raises(ValueError, match=f"{field}="):
            PrepareConfig("x", "y", **{field: value})
    write(tmp_path / "c", {"A/1.png": jpeg(1), "a/2.png": jpeg(2), "a/3.png": jpeg(3)})
    if len(os.listdir(tmp_path / "c")) == 2:
        with pytest.raises(ValueError, match="other capitals"):
            made(tmp_path / "c", tmp_path / "d", format="folders")


def test_pictures_too_long_for_jpeg_are_named(tmp_path: Path) -> None:
    for i in range(20):
        write(tmp_path / "in", {f"{i}.jpg": jpeg(i)})
    Image.new("L", (70_000, 2)).save(tmp_path / "in" / "long.png")
    said = made(tmp_path / "in", tmp_path / "out", max_unreadable=1.0)
    assert any("long.png" in line and "65,500" in line for line in said)


def test_shards_that_cannot_be_used(tmp_path: Path, folders: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"):
        open_data(f"shards:{tmp_path / 'gone'}")
    with pytest.raises(ValueError, match=r"no prepared\.json"):
        open_data(f"shards:{folders}")
    made(folders, tmp_path / "f", format="folders")
    with pytest.raises(ValueError, match="give folder:"):
        open_data(f"shards:{tmp_path / 'f'}")
    made(folders, tmp_path / "t")
    gone = sorted((tmp_path / "t").glob("train-*.tar"))[1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=gone.name):
        open_data(f"shards:{tmp_path / 't'}")


def test_the_command(
    tmp_path: Path, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    given = ["prepare", str(folders), str(output), "--side", "16", "--workers", "1"]
    assert main(given) == 0
    said = capsys.readouterr().out
    for what in ("21 in train", "12 in val", "3 (n01440764", "devkit", "_3.JPEG"):
        assert what in said
    assert main(["data", f"shards:{output}"]) == 0
    assert "1 picture of train that could not be read" in capsys.readouterr().out
    assert main([*given, "--quality", "0"]) == 2


# -- reading shards


@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    batch_size=st.sampled_from([1, 2, 6, 8, 12]),
    seed=st.integers(0, 2),
)
def test_every_lane_has_every_picture_of_its_stretch_once_an_epoch(
    counts: list[int], batch_size: int, seed: int
) -> None:
    order = ShardOrder(counts, seed, batch_size)
    assert order.lanes == lanes_of(len(counts), batch_size) <= LANES
    for epoch in range(3):
        drawn = [order.pictures(lane, epoch).tolist() for lane in range(order.lanes)]
        assert sorted(chain(*drawn)) == list(range(sum(counts)))
        assert max(map(len, drawn)) - min(map(len, drawn)) <= 1
    share = batch_size // order.lanes
    for lane in range(order.lanes):
        stream = [
            order[step * batch_size + lane * share + place]
            for step in range(3)
            for place in range(share)
        ]
        length = len(order.pictures(lane, 0))
        wanted = [
            (epoch, int(index))
            for epoch in range(1 + len(stream) // length)
            for index in order.pictures(lane, epoch)
        ]
        assert stream == wanted[: len(stream)]


@given(seed=st.integers(0, 5), processes=st.sampled_from([1, 2, 4, 8]))
def test_each_process_reads_its_own_shards(seed: int, processes: int) -> None:
    counts = [20] * 24
    order = ShardOrder(counts, seed, 64)  # 16 lanes
    steps = 480 // 64
    touched = [
        {
            index // 20
            for batch in StepBatches(480, 64, seed, 0, steps, p, processes, 1, order)
            for _, index in batch
        }
        for p in range(processes)
    ]
    assert set().union(*touched) == set(range(24))
    # beyond one's own, those cut at the two ends of a stretch
    assert max(map(len, touched)) <= 24 / processes + 2
    # and few at a time: WINDOW a lane
    first = next(iter(StepBatches(480, 64, seed, 0, 1, 0, processes, 1, order)))
    assert len({index // 20 for _, index in first}) <= 4 * (16 // processes)


def test_shards_are_shuffled_anew_each_epoch() -> None:
    order = ShardOrder([50] * 4, 0, 4)
    epochs = [order.pictures(0, epoch).tolist() for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != sorted(epochs[0])
    assert epochs[0] != ShardOrder([50] * 4, 1, 4).pictures(0, 0).tolist()


@given(
    accumulate=st.sampled_from([1, 2, 3]),
    processes=st.sampled_from([1, 2]),
    start=st.integers(0, 3),
)
def test_micro_batches_are_the_batch_cut_up(
    accumulate: int, processes: int, start: int
) -> None:
    order = EpochOrder(17, 5)
    for process in range(processes):
        given_ = (17, 12, 5, start, 5, process, processes)
        whole = list(StepBatches(*given_))
        cut = list(StepBatches(*given_, accumulate))
        assert len(cut) == len(StepBatches(*given_, accumulate))
        joined = [
            list(chain(*cut[k : k + accumulate]))
            for k in range(0, len(cut), accumulate)
        ]
        assert joined == whole
    assert order[start * 12] == next(iter(StepBatches(17, 12, 5, start, 5)))[0]
    with pytest.raises(ValueError, match="processes, 2 times accumulate, 5"):
        micro_batches(12, 0, 2, 5)


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_a_run_on_shards_that_is_cut_goes_on_exactly(
    tmp_path: Path, folders: Path, form: str
) -> None:
    made(folders, tmp_path / "d", format=form)
    fields = {
        "data": f"shards:{tmp_path / 'd'}", "model": SMALL, "batch_size": 8,
        "augmentation": "crop_flip", "epochs": 12 * 8 / 20,
    }  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    said = train(tiny(tmp_path / "uncut", **fields))
    assert "20 to train on in 5 files, 12 held out" in said[0]
    train(tiny(tmp_path / "cut", **fields, max_steps=6))
    train(tiny(tmp_path / "cut", **fields, workers=2, accumulate=1))
    torch.set_num_threads(threads)
    assert contents(tmp_path / "cut") == contents(tmp_path / "uncut")
