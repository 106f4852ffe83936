"""Pretraining: recipe, schedule, the loop, and runs that are cut off at any moment and
go on exactly.
"""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import ENVIRONMENT, ROOT, TINY, contents, snapshot, tiny, train

import crate_core.training.run_directory as runs
from crate_core.model.build import fresh_model
from crate_core.model.config import CrateMAEConfig
from crate_core.model.crate import CrateMAE
from crate_core.model.patches import patchify
from crate_core.records import git_commit, provenance
from crate_core.training.loop import TrainingDivergedError
from crate_core.training.pretrain import (
    PICTURES_SHOWN,
    pretrain,
)
from crate_core.training.recipe import Plan, PretrainConfig
from crate_core.training.run_directory import CheckpointError, RunDirectory
from crate_core.training.yardsticks import trivial_loss


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bits are compared at one thread, as the processes of these tests have."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Finished:
    """The uncut run, what it said, whether it left the global random state alone."""

    path: Path
    said: list[str]
    random_state_kept: bool

    def copy(self, to: Path) -> Path:
        return Path(shutil.copytree(self.path, to, dirs_exist_ok=True))


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    path = tmp_path_factory.mktemp("uncut")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    said = train(tiny(path))
    kept = torch.equal(torch.get_rng_state(), before)
    torch.set_num_threads(threads)
    return Finished(path, said, kept)


# -- the loop


def test_trivial_loss_is_the_loss_of_predicting_means() -> None:
    model = CrateMAE(TINY)
    images = torch.rand(40, 1, 8, 8) ** 2 * torch.linspace(0.2, 1, 8)
    losses = trivial_loss(model, images)
    patches = patchify(model.standardize(images), 2).numpy().astype(np.float64)
    assert losses.mean_patch == pytest.approx(patches.reshape(-1, 4).var(axis=0).mean())
    assert losses.mean_picture == pytest.approx(patches.var(axis=0).mean())
    assert losses.mean_picture < losses.mean_patch


def test_initial_weights_are_a_function_of_the_seed(tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, same, other = (fresh_model(tiny(tmp_path).model, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [model.patch_embedding.weight for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_training_beats_the_mean_patch(tmp_path: Path) -> None:
    model = CrateMAEConfig.preset("digits", dim=32, depth=1, heads=2)
    config = tiny(
        tmp_path,
        model=model,
        batch_size=64,
        epochs=9.0,
        warmup_ratio=1 / 9,
        lr=0.04,
        checkpoint_every=500,
    )
    result = pretrain(config, progress=False, report=str)
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert result.train_loss < 0.8 * result.trivial.mean_patch < first
    assert result.held_out_loss == pytest.approx(result.train_loss, rel=0.15)


def test_a_finished_run_holds_what_it_says(uncut: Finished) -> None:
    tmp_path, said = uncut.path, uncut.said
    config = tiny(tmp_path)
    assert any(
        "data: scikit-learn's digits: 1,438 to train on, 359 held out" in line
        for line in said
    )
    assert any("no range was measured for a changed recipe" in line for line in said)
    record = json.loads((tmp_path / "run.json").read_text())
    assert PretrainConfig.from_dict(record["config"]) == config
    assert record["starts"][0]["command"] == "crate_core.training.pretrain.pretrain"
    assert (
        record["starts"][0]["versions"]["torch"] == torch.__version__.partition("+")[0]
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    log = [
        json.loads(line)
        for line in (tmp_path / "metrics.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in log] == [3, 6, 9, 12]
    assert summary["steps"] == 12
    assert summary["train_loss"] == pytest.approx(
        np.mean([line["loss"] for line in log])
    )
    assert all(line["lr"] == Plan(config, 1438).lr(line["step"] - 1) for line in log)
    model = CrateMAE.from_pretrained(tmp_path)
    assert model.config == TINY
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert checkpoint.name == "step-00000012"
    for name, tensor in CrateMAE.from_pretrained(checkpoint).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])
    with Image.open(tmp_path / "reconstructions.png") as png:
        width, height = png.size
    assert height / width == pytest.approx(PICTURES_SHOWN / 4, rel=0.1)


def test_the_loss_in_the_log_is_the_models(tmp_path: Path) -> None:
    # Step 1 has learning rate 0, so that the first line's loss is that of the initial
    # weights on the first batches.
    from crate_core.data.batches import StepBatches, TrainingPictures
    from crate_core.data.named import open_data
    from crate_core.keys import mask_noise

    config = tiny(tmp_path, max_steps=1, log_every=1)
    train(config)
    logged = json.loads((tmp_path / "metrics.jsonl").read_text())["loss"]
    dataset = TrainingPictures(
        open_data("digits").train, (8, 8), 1, "none", config.seed
    )
    (items,) = StepBatches(1438, 16, config.seed, 0, 1)
    model = fresh_model(config.model, config.seed)
    images = model.standardize(dataset.__getitems__(items).images)
    loss = model(images, 0.75, mask_noise(config.seed, 0, 16, 16)).loss.item()
    assert logged == pytest.approx(loss, rel=1e-6)


def test_training_leaves_the_global_random_state_alone(uncut: Finished) -> None:
    assert uncut.random_state_kept


def test_mixed_precision_trains_and_differs(tmp_path: Path, uncut: Finished) -> None:
    train(tiny(tmp_path, precision="bf16"))
    full, mixed = (
        [
            json.loads(line)["loss"]
            for line in (path / "metrics.jsonl").read_text().splitlines()
        ]
        for path in (uncut.path, tmp_path)
    )
    assert mixed != full
    np.testing.assert_allclose(mixed, full, rtol=0.05)


def test_clipping_changes_the_weights_and_logs_the_whole_norm(
    tmp_path: Path, uncut: Finished
) -> None:
    train(tiny(tmp_path, clip_gradient=0.01, max_steps=3))
    free, clipped = (
        json.loads((path / "metrics.jsonl").read_text().splitlines()[0])
        for path in (uncut.path, tmp_path)
    )
    assert free["loss"] != clipped["loss"]
    assert clipped["gradient_norm"] > 0.1


def test_a_folder_smaller_than_a_batch_trains_and_counts_damage(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(12):
        Image.fromarray(
            np.random.default_rng(i).integers(0, 256, (9, 11, 3), dtype=np.uint8)
        ).save(pictures / f"{i:02d}.png")
    (pictures / "05.png").write_bytes(b"no picture")
    config = tiny(
        tmp_path / "run",
        data=f"folder:{pictures}",
        epochs=6.0,
        augmentation="crop_flip",
    )
    said = train(config)
    assert (
        json.loads((tmp_path / "run" / "summary.json").read_text())["unreadable"] == 1
    )
    assert sum("05.png" in line for line in said) == 1


# -- a directory belongs to one run


def test_another_runs_directory_is_refused_and_untouched(
    tmp_path: Path, uncut: Finished
) -> None:
    uncut.copy(tmp_path)
    before = snapshot(tmp_path)
    other = tiny(tmp_path, seed=1, model=replace(TINY, lambd=0.25))
    with pytest.raises(
        ValueError,
        match=r"model.lambd \(there 0.5, now 0.25\); seed \(there 0, now 1\)",
    ):
        train(other)
    assert snapshot(tmp_path) == before


def test_a_directory_of_something_else_is_refused_and_untouched(tmp_path: Path) -> None:
    CrateMAE(TINY).save_pretrained(tmp_path)
    before = snapshot(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"already holds config.json, model.safetensors and no run.json",
    ):
        train(tiny(tmp_path))
    assert snapshot(tmp_path) == before


def test_a_finished_run_is_not_trained_again(tmp_path: Path, uncut: Finished) -> None:
    uncut.copy(tmp_path)
    before = snapshot(tmp_path)
    said = train(tiny(tmp_path, checkpoint_every=2))
    assert any(
        "is finished: 12 steps are done; nothing was trained" in line for line in said
    )
    after = snapshot(tmp_path)
    # the new start is recorded
    assert {name for name in before if before[name] != after[name]} == {"run.json"}
    assert before.keys() == after.keys()


def test_more_steps_continue_a_run_exactly(tmp_path: Path, uncut: Finished) -> None:
    train(tiny(tmp_path, max_steps=6))
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 6
    train(tiny(tmp_path))
    assert contents(tmp_path) == contents(uncut.path)
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 12


def test_changed_data_is_another_run(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(12):
        Image.new("L", (8, 8), 20 * i).save(pictures / f"{i:02d}.png")
    config = tiny(tmp_path / "run", data=f"folder:{pictures}", epochs=3.0)
    train(config)
    Image.new("L", (8, 8)).save(pictures / "99.png")
    with pytest.raises(ValueError, match=r"training pictures \(there 11, now 12\)"):
        train(config)


# -- cut off at any moment

DRIVER = """
import json, os, signal, sys, time
from pathlib import Path
import torch
import crate_core.training.run_directory as runs, crate_core.training.pretrain as train
from crate_core.training.recipe import PretrainConfig

directory, config, moments = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def arm(moment):
    what, _, step = moment.partition("@")
    if what == "step":          # after the backward pass of a step
        original = train.Trainer.update
        def update(self, images):
            return die() if self.step == int(step) else original(self, images)
        train.Trainer.update = update
    elif what == "weights":     # half of a checkpoint's files are there
        torch.save = die
    elif what == "rename":      # all of its files are there and it has no name yet
        Path.rename = die
    elif what == "clean":       # it has its name and the old one is still there
        original = runs.shutil.rmtree
        def rmtree(path, **k):
            return die() if Path(path).name.startswith("step-") else original(path, **k)
        runs.shutil.rmtree = rmtree
    elif what == "finish":      # all steps are done and the summary is not written
        train.write_json = die

for moment in moments:
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        arm(moment)
        own = PretrainConfig.from_dict({**config, "output_dir": str(directory)})
        train.pretrain(own, progress=False, report=str)
        os._exit(0)
    if moment == "outside":     # whenever the log has its third line
        log = directory / "metrics.jsonl"
        while not log.exists() or log.read_text().count("\\n") < 3:
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    kept = sorted(path.name for path in (directory / "checkpoints").glob("step-*"))
    killed = os.WIFSIGNALED(status)
    ended = os.WTERMSIG(status) if killed else -os.WEXITSTATUS(status)
    print(json.dumps([moment, ended, kept]))
"""


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills need POSIX processes")
def test_a_run_killed_at_any_moment_ends_with_the_bits_of_the_uncut_run(
    tmp_path: Path, uncut: Finished
) -> None:
    # Each moment is a process of its own that gets a SIGKILL there; the next one starts
    # with the same configuration.
    moments = [
        "step@2",
        "weights",
        "step@5",
        "rename",
        "clean",
        "step@10",
        "finish",
        "none",
    ]
    config = tiny(uncut.path)
    command = [
        sys.executable,
        "-c",
        DRIVER,
        str(tmp_path / "cut"),
        json.dumps(config.to_dict()),
        *moments,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    ends = {
        moment: (code, kept)
        for moment, code, kept in map(json.loads, done.stdout.splitlines())
    }
    assert all(ends[moment][0] == signal.SIGKILL for moment in moments[:-1]), ends
    assert ends["none"][0] == 0
    step = "step-{:08d}".format
    assert ends["step@2"][1] == ends["weights"][1] == []
    assert ends["step@5"][1] == ends["rename"][1] == [step(4)]
    assert ends["clean"][1] == [step(4), step(8)]
    assert ends["finish"][1] == [step(12)]
    assert contents(tmp_path / "cut") == contents(uncut.path)
    same = (
        "steps",
        "train_loss",
        "held_out_loss",
        "trivial_loss",
        "unreadable",
        "seed",
    )
    one, other = (
        json.loads((path / "summary.json").read_text())
        for path in (tmp_path / "cut", uncut.path)
    )
    assert {name: one[name] for name in same} == {name: other[name] for name in same}
    assert not list((tmp_path / "cut" / "checkpoints").glob(".*"))
    assert len(
        json.loads((tmp_path / "cut" / "run.json").read_text())["starts"]
    ) == len(moments)


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills need POSIX processes")
def test_a_command_killed_from_outside_goes_on(tmp_path: Path) -> None:
    base = [
        sys.executable,
        "-m",
        "crate_core.cli",
        "pretrain",
        "--device",
        "cpu",
        "--max-steps",
        "60",
    ]
    base += [
        "--model.dim",
        "16",
        "--model.depth",
        "1",
        "--model.heads",
        "2",
        "--batch-size",
        "16",
        "--log-every",
        "7",
    ]
    base += ["--checkpoint-every", "5", "--warmup-ratio", "0.003", "--seed", "3"]
    log = tmp_path / "cut" / "metrics.jsonl"
    process = subprocess.Popen(
        [*base, "--output-dir", str(tmp_path / "cut")],
        env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while process.poll() is None and not (
        log.exists() and log.read_text().count("\n") >= 2
    ):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "cut" / "summary.json").exists()
    done = subprocess.run(
        [*base, "--output-dir", str(tmp_path / "cut")],
        env=ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "continuing after step" in done.stdout
    config = tiny(
        tmp_path / "uncut",
        max_steps=60,
        epochs=300.0,
        warmup_ratio=0.003,
        log_every=7,
        checkpoint_every=5,
        seed=3,
    )
    train(config)
    assert contents(tmp_path / "cut") == contents(tmp_path / "uncut")


def full_after(step: int, run: Path, name: str) -> Callable[[Path], None]:
    """A ``sync`` that finds the disk full when this file, or folder, of the checkpoint
    that follows the one of ``step`` (0: of the first) is flushed.
    """

    def sync(path: Path) -> None:
        latest = RunDirectory(run).latest()
        if path.name == name and step == (latest.step if latest else 0):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    return sync


@pytest.mark.parametrize("name", [runs.OPTIMIZER_FILE, ".partial"])
def test_a_full_disk_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uncut: Finished, name: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(runs, "sync", full_after(4, tmp_path, name))
        with pytest.raises(
            CheckpointError,
            match=r"step 8 could not.*No space left.*last good one is .*step-00000004",
        ):
            train(tiny(tmp_path))
    latest = RunDirectory(tmp_path).latest()
    assert latest is not None
    assert latest.step == 4
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [
        "step-00000004"
    ]
    train(tiny(tmp_path))
    assert contents(tmp_path) == contents(uncut.path)


def test_the_first_checkpoint_that_fails_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "sync", full_after(0, tmp_path, "model.safetensors"))
    with pytest.raises(CheckpointError, match="there is no earlier one"):
        train(tiny(tmp_path))
    assert RunDirectory(tmp_path).latest() is None


def test_divergence_names_step_rate_and_checkpoint(tmp_path: Path) -> None:
    config = tiny(tmp_path, lr=1e30, log_every=1, checkpoint_every=1)
    with pytest.raises(
        TrainingDivergedError,
        match=r"at step (\d+) \(learning rate .*last good checkpoint is",
    ) as caught:
        train(config)
    kept = RunDirectory(tmp_path).latest()
    assert kept is not None
    step = int(str(caught.value).partition("at step ")[2].split()[0])
    assert kept.step == step - 1
    assert f"{Plan(config, 1438).lr(step - 1):.3g}" in str(caught.value)
    assert all(torch.isfinite(tensor).all() for tensor in kept.weights().values())


def test_divergence_before_any_checkpoint_finds_the_step_between_log_lines(
    tmp_path: Path,
) -> None:
    # Step 1 has learning rate 0; step 2 takes the weights beyond float32, and step 3
    # sees it.
    with pytest.raises(
        TrainingDivergedError, match=r"at step [23] .*there is no checkpoint yet"
    ):
        train(tiny(tmp_path, lr=1e30, log_every=6, checkpoint_every=12))


class Payload:
    """Pickles to a call that would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_checkpoint_that_would_execute_code_is_refused(
    tmp_path: Path, uncut: Finished
) -> None:
    uncut.copy(tmp_path)
    (tmp_path / "summary.json").unlink()
    target = tmp_path / "executed"
    harmful = pickle.dumps(Payload(target), protocol=2)
    (tmp_path / "checkpoints" / "step-00000012" / "optimizer.pt").write_bytes(harmful)
    with pytest.raises(ValueError, match="was refused"):
        train(tiny(tmp_path))
    assert not target.exists()


def test_a_line_cut_off_in_the_log_is_dropped(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for step in (3, 6, 9):
        run.log({"step": step, "loss": 0.5})
    with open(run.metrics, "a") as file:
        file.write('{"step": 12, "lo')
    run.rewind(6)
    assert [line["step"] for line in run.logged()] == [3, 6]
    run.rewind(6)
    assert [line["step"] for line in run.logged()] == [3, 6]


def test_provenance_names_versions_and_no_path() -> None:
    record = provenance("crate pretrain", "cpu")
    assert record["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert git_commit() == record["commit"]
    assert str(Path.home()) not in json.dumps(record)
