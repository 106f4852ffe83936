"""What commands say of their data, and what each does with pictures that cannot be
read, are without a label, or of one class.
"""

import json
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator
from io import BytesIO, TextIOWrapper
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_runs import ENVIRONMENT, tiny, train

from crate_core.cli import main
from crate_core.data.batches import UnreadableCount
from crate_core.data.pictures import Picture
from crate_core.data.sources import ImageData, ImageSource
from crate_core.data.understood import (
    chosen_pictures,
    contact_sheet,
    readable,
    understood,
    with_labels,
)
from crate_core.evaluation.evaluate import evaluate, run_data
from crate_core.model.config import CrateMAEConfig
from crate_core.model.crate import CrateMAE
from crate_core.training.checks import check_compiler
from crate_core.training.run_directory import sync
from crate_core.training.yardsticks import trivial_loss

SMALL = CrateMAEConfig.preset(
    "cifar10-tiny", image_size=8, patch_size=4, dim=8, depth=1, heads=2
)
SIZE = (4, 4)


class Flawed(ImageSource):
    """Pictures of which some cannot be read."""

    def __init__(self, bad: list[bool], labels: list[int] | None = None) -> None:
        self.bad = bad
        self.labels = None if labels is None else np.array(labels)

    def __len__(self) -> int:
        return len(self.bad)

    def name(self, index: int) -> str:
        return f"picture-{index}."

    def decode(self, index: int) -> Picture:
        if self.bad[index]:
            raise RuntimeError("damaged")
        return torch.full((1, 4, 4), index / 100)


def data_of(train: ImageSource, held_out: ImageSource, classes: int = 0) -> ImageData:
    return ImageData(train, held_out, tuple("abcdefgh"[:classes]), "made up")


@given(
    bad=st.lists(st.booleans(), min_size=1, max_size=40),
    limit=st.floats(0, 1),
    labelled=st.booleans(),
)
def test_unreadable_pictures_are_named_and_leave_the_denominator(
    bad: list[bool], limit: float, labelled: bool
) -> None:
    labels = [i % 3 for i in range(len(bad))] if labelled else None
    whole = Flawed([False] * 4, [0, 1, 2, 0] if labelled else None)
    data = data_of(whole, Flawed(bad, labels), 3 if labelled else 0)
    if sum(bad) > limit * len(bad) or all(bad):
        with pytest.raises(ValueError, match=f"{sum(bad)} of {len(bad)} ") as caught:
            readable(data, SIZE, 1, limit)
        if labelled:
            kept = {i % 3 for i, b in enumerate(bad) if not b}
            lost = {i % 3 for i in range(len(bad))} - kept
            named = ", ".join("abc"[k] for k in sorted(lost))
            assert (f"nothing is left of {named}" in str(caught.value)) == bool(lost)
        return
    found = readable(data, SIZE, 1, limit)
    assert len(found.data.held_out) == len(bad) - sum(bad)
    assert len(found.data.train) == 4
    said = found.unreadable["held_out"]
    assert [s.split(".")[0] for s in said] == [
        f"picture-{i}" for i, b in enumerate(bad) if b
    ]
    assert len(found.lines()) == any(bad)


@given(
    train=st.lists(st.integers(-1, 2), min_size=1, max_size=12),
    held_out=st.lists(st.integers(-1, 2), min_size=1, max_size=12),
)
def test_what_needs_labels_gets_pictures_that_have_one(
    train: list[int], held_out: list[int]
) -> None:
    data = data_of(
        Flawed([False] * len(train), train),
        Flawed([False] * len(held_out), held_out),
        3,
    )
    found = with_labels(data)
    if len(set(train) - {-1}) < 2 or not set(held_out) - {-1}:
        assert found is None
    else:
        assert found.train.labels.tolist() == [k for k in train if k >= 0]
        assert found.held_out.labels.tolist() == [k for k in held_out if k >= 0]
    missing = sum(k < 0 for k in train) > 0
    assert any("to train on" in s for s in understood(data)) == missing


def photo(i: int) -> Image.Image:
    return Image.new("RGB", (12, 8), (20 * i % 256, 100, 200))


def tree(root: Path, per_class: int, classes: str = "ab", bad: int = 0) -> Path:
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            photo(i).save(root / name / f"{i:02d}.png")
        for i in range(bad):
            (root / name / f"{i:02d}.png").write_bytes(b"no picture")
    return root


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    CrateMAE(SMALL).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_crate_data_says_what_was_understood_and_draws_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tree(tmp_path / "d", 20)
    (root / "a" / "x.heic").write_bytes(b"")
    (root / "b" / "00.png").write_bytes(b"no picture")
    sheet = tmp_path / "sheet.png"
    command = ["data", f"folder:{root}", "--image-size", "8", "--check"]
    assert main([*command, "--count", "40", "--output", str(sheet)]) == 0
    said = capsys.readouterr().out
    for what in ("36 to train on", "4 held out", "2 (a, b)", ".heic", "b/00.png"):
        assert what in said
    with Image.open(sheet) as drawn:
        assert drawn.width > drawn.height


def test_a_sheet_of_nothing_is_refused() -> None:
    data = data_of(Flawed([False] * 3), Flawed([True] * 3))
    said: list[str] = []
    with pytest.raises(ValueError, match="held out can be read"):
        contact_sheet(data, SIZE, 1, 3, said.append)
    assert len(said) == 3


def test_evaluation_carries_the_true_denominator(
    tmp_path: Path, checkpoint: Path
) -> None:
    tree(tmp_path / "d" / "train", 8)
    tree(tmp_path / "d" / "val", 6, bad=2)
    spec = f"folder:{tmp_path / 'd'}"
    with pytest.raises(ValueError, match=r"4 of 12 pictures .*val/a/00\.png"):
        evaluate(checkpoint, spec, 1, 2, [0.5])
    said: list[str] = []
    record = evaluate(
        checkpoint,
        spec,
        1,
        2,
        [0.5],
        probe=False,
        max_unreadable=0.4,
        report=said.append,
    )
    assert record["held_out"] == record["labelled"]["held_out"] == 8
    assert len(record["unreadable"]["held_out"]) == 4
    assert "val/a/00.png" in "".join(said)


@pytest.mark.parametrize("classes", ["a", ""])
def test_pictures_of_one_class_or_none_are_reconstructed(
    tmp_path: Path, checkpoint: Path, classes: str
) -> None:
    tree(tmp_path / "d", 12, classes)
    for i in range(0 if classes else 12):
        (tmp_path / "d").mkdir(exist_ok=True)
        photo(i).save(tmp_path / "d" / f"{i}.png")
    # a ratio that four patches cannot have is left out, not found after the work
    record = evaluate(checkpoint, f"folder:{tmp_path / 'd'}", 1, 2, [0.5, 0.9])
    assert [score["mask_ratio"] for score in record["reconstruction"]] == [0.5]
    assert record["linear_probe"] is record["neighbours"] is None


def test_reconstruct_names_rows_and_what_is_left_out(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tree(tmp_path / "d", 3, "a", bad=1) / "a"
    files = [str(root / f"{i:02d}.png") for i in range(3)]
    output = str(tmp_path / "o.png")
    command = ["reconstruct", "--checkpoint", str(checkpoint), "--output", output]
    assert main([*command, "--images", *files]) == 0
    said = capsys.readouterr().out
    assert f"cannot be read: {files[0]}" in said
    assert f"row 1: {files[1]}\nrow 2: {files[2]}" in said
    for count in ("0", "-3", "400"):
        assert main([*command, "--data", "digits", "--count", count]) == 2
        assert f"--count {count}: 1 to " in capsys.readouterr().err


@given(
    bad=st.lists(st.booleans(), min_size=1, max_size=30),
    count=st.integers(1, 12),
    limit=st.floats(0, 1),
)
def test_a_look_at_some_pictures_takes_others_for_unreadable_ones(
    bad: list[bool], count: int, limit: float
) -> None:
    met, said = UnreadableCount(len(bad), limit, {}, "held-out"), []
    try:
        shown = chosen_pictures(Flawed(bad), SIZE, 1, count, met, said.append)
    except ValueError as error:
        assert len(met.met) > limit * len(bad) or all(bad)
        assert "picture-" in str(error)  # noqa: PT017
        return
    assert len(met.met) <= limit * len(bad)
    rows = [index for index, _ in shown]
    assert rows == sorted(set(rows))
    assert not any(bad[index] for index in rows)
    # all that were wanted, unless those after one that is unreadable are used up
    assert len(rows) <= count
    if not any(bad):
        assert len(rows) == min(count, len(bad))
    assert len(said) == len(met.met)
    for index, line in zip(met.met, said, strict=True):
        assert f"picture-{index}." in line
    for index, picture in shown:
        assert torch.equal(picture, torch.full((1, 4, 4), index / 100))


def test_the_limit_holds_where_few_pictures_are_looked_at(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree(tmp_path / "d" / "train", 4)
    tree(tmp_path / "d" / "val", 10, bad=2)
    given = ["--checkpoint", str(checkpoint), "--data", f"folder:{tmp_path / 'd'}"]
    cache = ["--cache", str(tmp_path / "cache"), "--no-neighbours"]
    commands = {
        "reconstruct": ["--output", str(tmp_path / "o.png"), "--count", "20"],
        "inspect": ["--output", str(tmp_path / "o.html"), "--seeds", "1"],
        "probe": ["--output", str(tmp_path / "o.json"), *cache],
    }
    for name, options in commands.items():
        assert main([name, *given, *options]) == 2
        said = capsys.readouterr().err
        assert re.search(r"of 20 (held-out )?pictures \(.*max_unreadable", said)
        assert "val/" in said
        assert main([name, *given, *options, "--max-unreadable", "0.2"]) == 0
        said = capsys.readouterr()
        assert name == "probe" or "val/b/01.png" in said.out
    record = json.loads((tmp_path / "o.json").read_text())
    assert record["held_out"] == 16
    assert len(record["unreadable"]) == 4


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    tree(tmp_path, 6)
    command = [sys.executable, "-m", "crate_core.cli", "data", f"folder:{tmp_path}"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        command, env=ENVIRONMENT, stdout=writing, stderr=subprocess.PIPE, check=False
    )
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr == b""


def test_names_that_a_console_cannot_print_are_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree(tmp_path / "котики", 12)
    written = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(written, encoding="cp1252"))
    assert main(["data", f"folder:{root}"]) == 0
    assert b"\\u043a" in written.getvalue()
    assert json.dumps("к")[1:-1].encode() in written.getvalue()


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are bytes on Linux")
def test_names_in_another_encoding_go_through_every_command(
    tmp_path: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    root = tree(tmp_path / "d", 12, "a")
    odd = Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9"))
    os.rename(tree(tmp_path / "e", 12, "b") / "b", odd)
    (odd / os.fsdecode(b"\xff.png")).write_bytes(b"no picture")
    (root / "$x_{$").mkdir()  # nor a formula
    for i in range(12):
        photo(i).save(root / "$x_{$" / f"{i}.png")
    data, model = f"folder:{root}", ["--checkpoint", str(checkpoint)]
    sheet = ["--output", str(tmp_path / "s.png"), "--check", "--image-size", "8"]
    assert main(["data", data, *sheet]) == 0
    probe = ["probe", *model, "--data", data, "--cache", str(tmp_path / "c")]
    assert main([*probe, "--no-neighbours", "--epochs", "1"]) == 0
    picture = str(sorted(odd.iterdir())[0])
    page = ["--seeds", "1", "--output", str(tmp_path / "p.html")]
    assert main(["inspect", *model, "--images", picture, *page]) == 0
    for kind in ("parquet", "tar"):
        copy = ["prepare", str(root), str(tmp_path / kind), "--format", kind]
        assert main([*copy, "--workers", "1"]) == 0
    said = capsys.readouterr()
    assert "caf" in said.out
    assert "error" not in said.err
    # recorded here, since a name that is no text cannot go to another process
    assert any("caf" in str(warned.message) for warned in recwarn)


# -- before the work, on any machine


def test_a_run_whose_held_out_part_cannot_be_read_does_not_start(
    tmp_path: Path,
) -> None:
    tree(tmp_path / "d" / "train", 8)
    tree(tmp_path / "d" / "val", 2, bad=2)
    config = tiny(
        tmp_path / "run", data=f"folder:{tmp_path / 'd'}", model=SMALL, batch_size=8
    )
    with pytest.raises(ValueError, match=r"none of 4 pictures.*val"):
        train(config)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_yardsticks_hold_few_pictures_at_a_time() -> None:
    alive, most = weakref.WeakSet(), 0

    def batches(images: torch.Tensor) -> Iterator[torch.Tensor]:
        nonlocal most
        for batch in images.split(8):
            own = batch.clone()
            alive.add(own)
            most = max(most, len(alive))
            yield own
            del own

    torch.manual_seed(0)
    images, model = torch.rand(80, 3, 8, 8) ** 3, CrateMAE(SMALL)
    whole, streamed = trivial_loss(model, images), trivial_loss(model, batches(images))
    assert streamed.mean_patch == pytest.approx(whole.mean_patch)
    assert streamed.mean_picture == pytest.approx(whole.mean_picture)
    assert most <= 3


def test_relative_data_is_found_from_where_the_run_was_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path / "d", 12)
    monkeypatch.chdir(tmp_path)
    train(tiny("r", data="folder:d", model=SMALL, batch_size=8))
    elsewhere = tmp_path / "else" / "where"
    elsewhere.mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    for run in (tmp_path / "r", Path("../../r")):
        spec, _ = run_data(run)
        assert Path(spec.removeprefix("folder:")).resolve() == tmp_path / "d"
    (tmp_path / "d").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="give --data"):
        run_data(tmp_path / "r")


def test_files_and_folders_are_flushed_as_windows_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, flushed = {}, []
    own = os.open

    def windows(path: Path, flags: int) -> int:
        if Path(path).is_dir():
            raise PermissionError("a folder")
        descriptor = own(path, flags)
        opened[descriptor] = flags
        return descriptor

    def fsync(descriptor: int) -> None:
        if not opened[descriptor] & (os.O_RDWR | os.O_WRONLY):
            raise OSError("open for reading")
        flushed.append(descriptor)

    monkeypatch.setattr(os, "open", windows)
    monkeypatch.setattr(os, "fsync", fsync)
    (tmp_path / "f").write_bytes(b"x")
    sync(tmp_path / "f")
    sync(tmp_path)
    assert len(flushed) == 1


def test_compiling_without_a_compiler_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    builder = pytest.importorskip("torch._inductor.cpp_builder")
    error = pytest.importorskip("torch._inductor.exc").InvalidCxxCompiler

    def none() -> str:
        raise error

    monkeypatch.setattr(builder, "get_cpp_compiler", none)
    with pytest.raises(ValueError, match="leave out --compile"):
        check_compiler(torch.device("cpu"))
    check_compiler(torch.device("cuda"))
