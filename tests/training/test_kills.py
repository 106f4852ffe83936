"""Runs that end badly while they save: killed, out of disk, two at once; and what must
not be overwritten.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_runs import ENVIRONMENT, FLAGS, ROOT, contents, snapshot, tiny, train

from crate_core.cli import main
from crate_core.training.run_directory import RunDirectory

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills need POSIX processes"),
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bits are compared at one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    path = tmp_path_factory.mktemp("uncut")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(tiny(path))
    torch.set_num_threads(threads)
    return path


def test_a_run_that_is_ended_has_its_log_in_the_file(tmp_path: Path) -> None:
    """What a time limit does to a run whose output goes to a file: names of skipped
    pictures are there while it runs, and no progress bar.
    """
    for part, count in (("train", 40), ("val", 4)):
        folder = tmp_path / "d" / part / "a"
        folder.mkdir(parents=True)
        for i in range(count):
            Image.new("L", (8, 8), 6 * i).save(folder / f"{i}.png")
    bad = [tmp_path / "d" / "train" / "a" / f"bad{i}.png" for i in range(4)]
    for path in bad:
        path.write_bytes(b"x")
    command = [sys.executable, "-m", "crate_core.cli", "pretrain", *FLAGS]
    command += ["--data", f"folder:{tmp_path / 'd'}", "--epochs", "100000"]
    said, errors = tmp_path / "o.txt", tmp_path / "e.txt"
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "PYTHONUNBUFFERED"}
    with open(said, "wb") as out, open(errors, "wb") as err:
        process = subprocess.Popen(
            [*command, "--output-dir", str(tmp_path / "run")],
            env=environment, cwd=ROOT, stdout=out, stderr=err,
        )  # fmt: skip
        end = time.monotonic() + 200
        while (
            process.poll() is None
            and time.monotonic() < end
            and said.read_text().count("skipped") < len(bad)
        ):
            time.sleep(0.05)
        running = process.poll() is None
        process.terminate()
        status = process.wait()
    assert running
    assert status == 75
    assert all(f"{path}: no format" in said.read_text() for path in bad)
    (line,) = errors.read_text().splitlines()
    assert "SIGTERM ended the run after step" in line


DRIVER = """
import json, os, resource, signal, sys, time
from pathlib import Path
import torch
import crate_core.training.run_directory as runs, crate_core.training.pretrain as loop
from crate_core.training.recipe import PretrainConfig
from crate_core.training.pretrain import pretrain

torch.set_num_threads(1)
config, moment = PretrainConfig.from_dict(json.loads(sys.argv[1])), sys.argv[2]
save, update = torch.save, loop.Trainer.update
# killed with half of the optimizer's file written, at the second checkpoint
if moment == "half":
    def killed(content, path):
        save(content, path)
        if RUN.latest() is not None:
            os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
    RUN = runs.RunDirectory(config.output_dir)
    torch.save = killed
# files may not grow beyond so many bytes from step 6 on
elif moment.startswith("limit"):
    def limited(self, images):
        if self.step == 6:
            limits = (int(moment[5:]), resource.RLIM_INFINITY)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        return update(self, images)
    loop.Trainer.update = limited
elif moment == "fill":          # something else takes the rest of the disk at step 6
    def filled(self, images):
        if self.step == 6:
            try:
                beside = Path(config.output_dir).parent / "filler"
                with open(beside, "wb", buffering=0) as filler:
                    while True:
                        filler.write(bytes(4096))
            except OSError:
                pass
        return update(self, images)
    loop.Trainer.update = filled
elif moment == "slow":
    def slow(self, images):
        time.sleep(0.5 if self.step >= 5 else 0)
        return update(self, images)
    loop.Trainer.update = slow
try:
    pretrain(config, progress=False, report=str)
except runs.CheckpointError as error:
    print(error)
    sys.exit(7)
"""


def command(directory: Path, moment: str) -> list[str]:
    return [sys.executable, "-c", DRIVER, json.dumps(tiny(directory).to_dict()), moment]


def drive(directory: Path, moment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(directory, moment),
        env=ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def kept_step(directory: Path) -> int | None:
    latest = RunDirectory(directory).latest()
    return None if latest is None else latest.step


def test_a_kill_with_half_a_checkpoint_written(tmp_path: Path, uncut: Path) -> None:
    done = drive(tmp_path, "half")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert kept_step(tmp_path) == 4
    torn = tmp_path / "checkpoints" / ".partial" / "optimizer.pt"
    whole = tmp_path / "checkpoints" / "step-00000004" / "optimizer.pt"
    assert 0 < torn.stat().st_size < 0.6 * whole.stat().st_size
    train(tiny(tmp_path))
    assert contents(tmp_path) == contents(uncut)
    assert not torn.exists()


def test_kills_from_outside_while_it_saves(tmp_path: Path, uncut: Path) -> None:
    # It saves after every step; a kill comes as soon as the folder of an unfinished
    # checkpoint is seen.
    arguments = command(tmp_path / "cut", "none")
    arguments[3] = json.dumps(tiny(tmp_path / "cut", checkpoint_every=1).to_dict())
    partial, hit = tmp_path / "cut" / "checkpoints" / ".partial", 0
    for _ in range(3):
        before = kept_step(tmp_path / "cut") or 0
        process = subprocess.Popen(
            arguments, env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL
        )
        while process.poll() is None and not (
            (kept_step_or(tmp_path / "cut") > before) and partial.exists()
        ):
            time.sleep(0.0005)
        process.kill()
        hit += process.wait() == -signal.SIGKILL
    assert hit == 3
    done = subprocess.run(
        arguments, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "cut") == contents(uncut)


def kept_step_or(directory: Path) -> int:
    """The newest checkpoint's step by its name alone: it may be gone a moment later."""
    names = [path.name for path in (directory / "checkpoints").glob("step-*")]
    return max((int(name[5:]) for name in names), default=0)


@pytest.mark.parametrize("limit", [1000, 20_000])
def test_a_file_that_may_not_grow_stops_the_run_and_keeps_the_last_checkpoint(
    tmp_path: Path, uncut: Path, limit: int
) -> None:
    # The operating system refuses the write (EFBIG): in the weights, or in the
    # optimizer's file after them.
    weights = (uncut / "model.safetensors").stat().st_size
    assert (
        1000
        < weights
        < 20_000
        < (uncut / "checkpoints" / "step-00000012" / "optimizer.pt").stat().st_size
    )
    done = drive(tmp_path, f"limit{limit}")
    assert done.returncode == 7, done.stderr
    assert "the last good one is" in done.stdout
    assert "step-00000004" in done.stdout
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [
        "step-00000004"
    ]
    assert RunDirectory(tmp_path).latest() is not None
    done = drive(tmp_path, "none")
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path) == contents(uncut)


MOUNTED = """set -e
mount -t tmpfs -o size=700k tmpfs "$1"
{ "${@:3}" fill; echo "ended with $?"; } || true
df -k --output=avail "$1" | tail -1
ls "$1"/run/checkpoints
rm "$1"/filler
"${@:3}" none
cp "$1"/run/model.safetensors "$1"/run/metrics.jsonl "$2"
"""


def test_a_disk_that_is_really_full(tmp_path: Path, uncut: Path) -> None:
    # A file system of 700 kB in a mount namespace of its own, filled to the last byte
    # between two checkpoints.
    namespace = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-rm"]
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    probe = [*namespace, "mount", "-t", "tmpfs", "tmpfs", str(disk)]
    if (
        shutil.which("unshare") is None
        or subprocess.run(probe, capture_output=True, check=False).returncode
    ):
        pytest.skip(
            "this machine lets no test mount a file system; RLIMIT_FSIZE above is the "
            "test that runs anywhere"
        )
    run = command(disk / "run", "")[:-1]
    done = subprocess.run(
        [*namespace, "bash", "-c", MOUNTED, "mounted", str(disk), str(kept), *run],
        env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stdout.split("\n")
    assert "No space left on device" in said[0]
    assert "step-00000004" in said[0]
    assert said[1:4] == ["ended with 7", said[2], "step-00000004"]
    assert int(said[2]) < 32  # kB: what the refused checkpoint gave back
    assert contents(kept) == contents(uncut)


def test_a_second_process_is_refused_and_the_first_goes_on(
    tmp_path: Path, uncut: Path
) -> None:
    first = subprocess.Popen(
        command(tmp_path / "run", "slow"),
        env=ENVIRONMENT,
        cwd=ROOT,
        stderr=subprocess.PIPE,
    )
    try:
        while (
            first.poll() is None
            and not (tmp_path / "run" / "checkpoints" / "step-00000004").exists()
        ):
            time.sleep(0.01)
        assert first.poll() is None, first.stderr and first.stderr.read()
        before = snapshot(tmp_path)
        with pytest.raises(
            ValueError,
            match=rf"written by another process \(process {first.pid} on .*nothing was",
        ):
            train(tiny(tmp_path / "run"))
        after = snapshot(tmp_path)
        assert {name: after[name] for name in before} == before
        assert after.keys() == before.keys()
    finally:
        first.kill()  # which frees the directory at once
        first.wait()
    train(tiny(tmp_path / "run"))
    assert contents(tmp_path / "run") == contents(uncut)
    assert (tmp_path / "run" / ".lock").read_text() == ""


def test_a_process_killed_before_its_record_leaves_a_directory_that_can_be_used(
    tmp_path: Path, uncut: Path
) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".lock").write_text("process 1 on nowhere")
    train(tiny(tmp_path))
    assert contents(tmp_path) == contents(uncut)


def test_checkpoints_of_something_else_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-100").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-100" / "mine").write_text("precious")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"already holds checkpoints and no run\.json"):
        train(tiny(tmp_path))
    assert snapshot(tmp_path) == before


# -- the command line: one line, exit code 2, nothing changed


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["pretrain", "--device", "cpu", *arguments]) == 2
    return capsys.readouterr().err


def test_another_presets_directory_is_refused(
    tmp_path: Path, uncut: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(uncut, tmp_path / "run")
    before = snapshot(tmp_path)
    said = refused(
        ["--preset", "digits", "--output-dir", str(tmp_path / "run")], capsys
    )
    assert "holds another run, which differs in" in said
    assert "model.dim (there 16, now 64)" in said
    assert snapshot(tmp_path) == before


def test_a_folder_that_may_not_be_read_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (8, 8), 40 * i).save(tmp_path / "data" / name / f"{i}.png")
    (tmp_path / "data" / "b").chmod(0)
    root = os.geteuid() == 0
    if root:  # who may read everything; look with another user's eyes
        tmp_path.chmod(0o755)
        for parent in tmp_path.parents:
            if not parent.stat().st_mode & 0o001:
                parent.chmod(parent.stat().st_mode | 0o111)
        os.seteuid(65534)
    try:
        said = refused(
            [
                "--data",
                f"folder:{tmp_path / 'data'}",
                "--output-dir",
                str(tmp_path / "run"),
            ],
            capsys,
        )
    finally:
        if root:
            os.seteuid(0)
        (tmp_path / "data" / "b").chmod(0o755)
    assert "Permission denied" in said
    assert str(tmp_path / "data" / "b") in said
    assert not (tmp_path / "run").exists()
