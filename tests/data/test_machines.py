"""What holds on any machine: Windows' rules for open files, devices without float64,
launchers without a GPU, results that could not be written, streams evaluated later.
"""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_runs import ENVIRONMENT, TINY, tiny, train

import crate_core.evaluation.probe as probing
from crate_core.cli import main
from crate_core.data.prepare import PrepareConfig, prepare
from crate_core.evaluation.evaluate import evaluate, open_for
from crate_core.evaluation.linear_head import LinearHeadConfig
from crate_core.evaluation.probing import probe_checkpoint
from crate_core.model.autoencoder import MaskedAutoencoder
from crate_core.model.build import fresh_model, processes_on_cpu
from crate_core.model.config import CrateMAEConfig
from crate_core.training.run_directory import RunDirectory

SMALL = CrateMAEConfig.preset(
    "cifar10-tiny", image_size=8, patch_size=4, dim=8, depth=1, heads=2
)


def tree(root: Path, count: int) -> Path:
    for name in "ab":
        (root / name).mkdir(parents=True)
        for i in range(count):
            colour = (9 * i % 256, 200 if name == "a" else 20, 99)
            Image.new("RGB", (12, 8), colour).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    fresh_model(SMALL, 0).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# -- Windows


def held_open() -> set[str]:
    """Files that this process has open or mapped."""
    found = set()
    for entry in os.scandir("/proc/self/fd"):
        try:
            found.add(os.readlink(entry.path))
        except FileNotFoundError:
            continue
    with open("/proc/self/maps", encoding="utf8", errors="replace") as maps:
        found |= {line.split(maxsplit=5)[-1].strip() for line in maps if "/" in line}
    return found


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A file that is open cannot be replaced, renamed or removed, nor can a folder be
    renamed that holds one; gives what was tried on others.
    """
    if not Path("/proc/self/maps").exists():
        pytest.skip("what is open is read from Linux's /proc")
    tried: list[str] = []

    def guarded(own: Any) -> Any:
        def act(*paths: Any, **options: Any) -> Any:
            names = [
                os.path.realpath(p)
                for p in paths
                if isinstance(p, str | os.PathLike) and options.get("dir_fd") is None
            ]
            for name in held_open():
                for path in names:
                    if name == path or name.startswith(path + os.sep):
                        raise PermissionError(13, "used by another process", path)
            tried.extend(names)
            return own(*paths, **options)

        return act

    for name in ("replace", "rename", "unlink", "remove"):
        monkeypatch.setattr(os, name, guarded(getattr(os, name)))
    return tried


@pytest.mark.filterwarnings("ignore")
def test_no_command_replaces_or_removes_a_file_that_is_open(
    tmp_path: Path, windows: list[str]
) -> None:
    tree(tmp_path / "d", 12)
    open_file = tmp_path / "x"
    with open(open_file, "w"), pytest.raises(PermissionError):
        open_file.unlink()
    fields = {"data": f"folder:{tmp_path / 'd'}", "model": SMALL, "batch_size": 8}
    run = tmp_path / "run"
    train(tiny(run, **fields, epochs=4, max_steps=6, milestone_epochs=1))
    train(tiny(run, **fields, epochs=4, milestone_epochs=1))  # from its checkpoint
    given = ["--checkpoint", str(run)]
    assert main(["evaluate", *given, "--seeds", "1", "--no-probe"]) == 0
    assert main(["evaluate", *given, "--seeds", "1", "--no-probe"]) == 0
    cache = ["--cache", str(tmp_path / "cache"), "--no-neighbours"]
    assert main(["probe", *given, *cache]) == 0
    assert main(["probe", *given, *cache]) == 0
    picture = str(tmp_path / "o.png")
    for _ in range(2):
        assert (
            main(["reconstruct", *given, "--data", fields["data"], "--output", picture])
            == 0
        )
    for form in ("folders", "tar", "parquet"):
        config = PrepareConfig(str(tmp_path / "d"), str(tmp_path / form), format=form)
        prepare(config, lambda line: None, progress=False)
    assert len(windows) > 20


def test_old_checkpoints_that_something_holds_open_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = os.unlink

    def held(path: Any, **options: Any) -> None:
        if "optimizer.pt" in str(path):
            raise PermissionError(13, "used by another process", str(path))
        own(path, **options)

    monkeypatch.setattr(os, "unlink", held)
    train(tiny(tmp_path / "run"))
    newest = RunDirectory(tmp_path / "run").latest()
    assert newest is not None
    assert newest.step == 12


# -- no float64


class NoDouble(torch.Tensor):
    """Refuses float64 until it is on the CPU, as on Apple's MPS; so does all that
    follows from it.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = super().__torch_function__(func, types, args, kwargs)
        if func is torch.Tensor.cpu:
            return found.as_subclass(torch.Tensor)
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, cls) and tensor.dtype == torch.float64:
                raise TypeError("the MPS framework doesn't support float64")
        return found


def test_evaluation_asks_for_no_float64_of_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree(tmp_path / "d", 12)
    monkeypatch.setattr(MaskedAutoencoder, "to", lambda self, device: self)

    def on_device(config: CrateMAEConfig, seed: int) -> MaskedAutoencoder:
        model = fresh_model(config, seed)
        for module in model.modules():
            for name, weight in list(module.named_parameters(recurse=False)):
                own = weight.data.as_subclass(NoDouble)
                module._parameters[name] = torch.nn.Parameter(own, requires_grad=False)
        return model

    monkeypatch.setattr(probing, "fresh_model", on_device)
    model = on_device(SMALL, 0)
    spec = f"folder:{tmp_path / 'd'}"
    record = evaluate(model, spec, 1, 2, [0.5])
    assert record["reconstruction"][0]["loss"] > 0
    found = probe_checkpoint(
        model,
        spec,
        cache=tmp_path / "cache",
        solver="sgd",
        head=LinearHeadConfig(epochs=1, batch_size=8, base_lrs=(0.1,)),
    )
    assert found["scores"]


# -- launchers


def test_processes_without_a_gpu_meet_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for several, device, expected in (
        ("1", "auto", False),
        ("2", "auto", True),
        ("1", "cpu", True),
        ("2", "mps", False),
    ):
        monkeypatch.setenv("WORLD_SIZE", several)
        assert processes_on_cpu(device) == expected


@pytest.mark.processes
def test_two_processes_without_a_gpu_probe_together(
    tmp_path: Path, checkpoint: Path
) -> None:
    tree(tmp_path / "d", 12)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--standalone", "-m", "crate_core.cli", "probe"),
        *("--checkpoint", str(checkpoint), "--data", f"folder:{tmp_path / 'd'}"),
        *("--cache", str(tmp_path / "cache"), "--no-neighbours"),
    ]
    environment = {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("data: ") == done.stdout.count("saved in") == 1
    records = {path.name for path in (tmp_path / "cache").rglob("done-*.json")}
    assert records == {"done-0-of-2.json", "done-1-of-2.json"}


# -- before the work


@pytest.mark.parametrize("command", ["evaluate", "probe", "reconstruct", "inspect"])
def test_a_result_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path,
    checkpoint: Path,
    command: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for output in (tmp_path / "gone" / "x", tmp_path):
        given = ["--checkpoint", str(checkpoint), "--output", str(output)]
        assert main([command, *given, "--data", "folder:nowhere"]) == 2
        assert str(output) in capsys.readouterr().err
        assert main(["data", "digits", "--output", str(output)]) == 2
        assert "classes" not in capsys.readouterr().out


def test_evaluators_that_need_labels_say_so_before_the_first_step(
    tmp_path: Path,
) -> None:
    tree(tmp_path / "d" / "all", 12)
    config = tiny(
        tmp_path / "r",
        data=f"folder:{tmp_path / 'd' / 'all' / 'a'}",
        model=SMALL,
        batch_size=8,
        evaluators=("crate_core.evaluation.neighbours:held_out_neighbours",),
        evaluate_epochs=1,
    )
    with pytest.raises(ValueError, match="these pictures have none"):
        train(config)
    assert not (tmp_path / "r" / "metrics.jsonl").exists()


# -- evaluation never sees what was trained on


def table(path: Path, count: int) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    cells = []
    for i in range(count):
        file = io.BytesIO()
        Image.new("RGB", (9, 8), (4 * i, 100, 100)).save(file, "PNG")
        cells.append({"bytes": file.getvalue(), "path": None})
    labels = [i % 2 for i in range(count)]
    pyarrow.parquet.write_table(pa.table({"image": cells, "label": labels}), path)


def test_what_a_streamed_run_held_out_is_held_out_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(
        datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False
    )
    datasets.disable_progress_bars()
    table(tmp_path / "x.parquet", 40)
    spec = f"hf:{tmp_path / 'x.parquet'}"
    said = train(
        tiny(tmp_path / "r", data=spec, streaming=True, model=SMALL, batch_size=8)
    )
    assert "4 held out (the first rows)" in said[0]
    for given in (None, spec):
        name, data = open_for(tmp_path / "r", given)
        assert name == spec
        held_out = [data.held_out.read(i).getpixel((0, 0))[0] for i in range(4)]
        assert held_out == [0, 4, 8, 12]
        assert (len(data.train), len(data.held_out)) == (36, 4)
        assert data.train.labels is not None
        assert not data.notes


def test_data_that_changed_since_a_run_is_said(tmp_path: Path) -> None:
    tree(tmp_path / "d", 12)
    spec = f"folder:{tmp_path / 'd'}"
    train(tiny(tmp_path / "r", data=spec, model=SMALL, batch_size=8))
    assert not open_for(tmp_path / "r", None)[1].notes
    shutil.copy(tmp_path / "d" / "a" / "1.png", tmp_path / "d" / "a" / "99.png")
    (note,) = open_for(tmp_path / "r", None)[1].notes
    assert "trained on 22 pictures" in note
    assert "may have seen what is held out" in note
    record = json.loads((tmp_path / "r" / "run.json").read_text())
    assert record["identity"]["training pictures"] == 22


def test_a_model_does_not_say_what_it_was_trained_on() -> None:
    with pytest.raises(ValueError, match="give data"):
        open_for(fresh_model(TINY, 0), None)
