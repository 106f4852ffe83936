r"""A run on disk: who owns the directory, checkpoints that are whole or absent, the metrics log, provenance.

Layout of an output directory::

    run.json                     resolved config, data, and each start (command, versions, commit, device)
    metrics.jsonl                one line per ``log_every`` steps
    checkpoints/step-00000500/   config.json, model.safetensors, optimizer.pt, progress.json
    model.safetensors config.json reconstructions.png summary.json     when finished

Book: :ref:`ch-first-training`.
"""

import importlib.metadata
import json
import os
import pickle
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from crate_core.frame import MaskedAutoencoder
from crate_core.pretrained import CONFIG_FILE, WEIGHTS_FILE, StateDict, atomic_write, load_weights
from crate_core.reconstruction import TrivialLoss

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
PICTURES_FILE = "reconstructions.png"
CHECKPOINTS = "checkpoints"
OPTIMIZER_FILE = "optimizer.pt"
PROGRESS_FILE = "progress.json"
CHECKPOINT_FILES = frozenset({CONFIG_FILE, WEIGHTS_FILE, OPTIMIZER_FILE, PROGRESS_FILE})
PACKAGES = ("crate-core", "torch", "numpy", "scikit-learn", "accelerate", "safetensors", "torchvision")


class CheckpointError(OSError):
    """A checkpoint that could not be saved; the message names the last good one."""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all.  ``ValueError`` for NaN and infinities, which JSON does not have."""
    atomic_write(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def git_commit() -> str:
    """Commit of the checkout that this package runs from, ``+changes`` if it was edited, else
    ``"uncommitted"``.
    """
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    if shutil.which("git") is None or not (root / ".git").exists() or not (commit := git("rev-parse", "HEAD")):
        return "uncommitted"
    return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def provenance(command: str, device: str) -> dict[str, Any]:
    """Where a number comes from: command, commit, device, versions, time (UTC).  Names no machine and no
    path.
    """

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return {
        "command": command,
        "commit": git_commit(),
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """A device in words: the GPU's name, or the processor's architecture and core count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{device.type} ({platform.machine()}, {cores} cores)"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: ``step`` steps are done; ``progress`` is what the loop wrote about them."""

    path: Path
    step: int
    progress: dict[str, Any]

    def weights(self) -> StateDict:
        """The model's tensors."""
        return load_weights(self.path / WEIGHTS_FILE)

    def optimizer(self) -> dict[str, Any]:
        """States of optimizer and loss scaler.  ``ValueError`` for a file that ``weights_only=True`` refuses."""
        try:
            return torch.load(self.path / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"{self.path / OPTIMIZER_FILE} was refused (read with weights_only=True): {error}"
            ) from error


def sync(path: Path) -> None:
    """Flush a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class RunDirectory:
    """An output directory and the run that owns it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.checkpoints = self.path / CHECKPOINTS
        self.metrics = self.path / METRICS_FILE

    def claim(self, identity: Mapping[str, Any], config: Mapping[str, Any], start: Mapping[str, Any]) -> None:
        """Make the directory this run's, or check that it is; ``start`` is added to the starts in
        ``run.json``.

        Parameters
        ----------
        identity : flat fields that decide what the run computes; those of the owner must be equal.
        config : the whole resolved configuration, for the record.
        start : provenance of this start.

        Raises
        ------
        ValueError
            If another run owns the directory (the differing fields are named) or it holds files of something
            else. Nothing is written then.
        """
        record = self.path / RUN_FILE
        starts: list[Any] = []
        if record.is_file():
            try:
                owner = json.loads(record.read_text())
                recorded, starts = owner["identity"], owner["starts"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{record} is not the record of a run: {error!r}") from error
            names = sorted(recorded.keys() | identity.keys())
            differing = [
                f"{name} (there {recorded.get(name)!r}, now {identity.get(name)!r})"
                for name in names
                if recorded.get(name) != identity.get(name)
            ]
            if differing:
                raise ValueError(
                    f"{self.path} holds another run, which differs in {'; '.join(differing)}. "
                    "Give another --output-dir; nothing was changed"
                )
        else:
            ours = (METRICS_FILE, CONFIG_FILE, WEIGHTS_FILE, SUMMARY_FILE, PICTURES_FILE, CHECKPOINTS)
            present = [name for name in ours if (self.path / name).exists()]
            if present:
                raise ValueError(
                    f"{self.path} already holds {', '.join(present)} and no {RUN_FILE}: it is not a run to continue. "
                    "Give another --output-dir; nothing was changed"
                )
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_json(record, {"identity": identity, "config": config, "starts": [*starts, start]})

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint."""
        if not self.checkpoints.is_dir():
            return None
        for path in sorted(self.checkpoints.glob("step-*"), reverse=True):
            if re.fullmatch(r"step-\d+", path.name) and {file.name for file in path.iterdir()} >= CHECKPOINT_FILES:
                return Checkpoint(path, int(path.name[5:]), json.loads((path / PROGRESS_FILE).read_text()))
        return None

    def save(
        self, step: int, model: MaskedAutoencoder, optimizer: Mapping[str, Any], progress: Mapping[str, Any]
    ) -> Checkpoint:
        """Write the checkpoint of ``step``, then remove older ones.

        All files are written to a hidden directory and flushed to disk before it gets its name, so that a
        checkpoint with a name is whole and the previous one stays until then.

        Raises
        ------
        CheckpointError
            If it cannot be written (disk full, no permission); the previous one is untouched.
        """
        previous = self.latest()
        final = self.checkpoints / f"step-{step:08d}"
        if previous is not None and previous.path == final:
            return previous
        partial = self.checkpoints / ".partial"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            model.save_pretrained(partial)
            torch.save(optimizer, partial / OPTIMIZER_FILE)
            (partial / PROGRESS_FILE).write_text(json.dumps(progress))
            for file in [*partial.iterdir(), partial]:
                sync(file)
            partial.rename(final)
            sync(self.checkpoints)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            kept = "there is no earlier one" if previous is None else f"the last good one is {previous.path}"
            raise CheckpointError(f"the checkpoint of step {step} could not be saved ({error}); {kept}") from error
        for path in self.checkpoints.glob("step-*"):
            if path != final:
                shutil.rmtree(path)
        return Checkpoint(final, step, dict(progress))

    def rewind_metrics(self, step: int) -> None:
        """Drop the log's lines after ``step`` and a line cut off half-way, whole or not at all."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text().splitlines(keepends=True):
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
            kept.append(line)
        atomic_write(self.metrics, "".join(kept).encode())

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to the metrics log."""
        with open(self.metrics, "a") as file:
            file.write(json.dumps(record) + "\n")

    def logged(self) -> list[dict[str, Any]]:
        """All records of the metrics log."""
        return [json.loads(line) for line in self.metrics.read_text().splitlines()] if self.metrics.exists() else []

    def summary(self) -> dict[str, Any] | None:
        """What a finished run wrote, or ``None``."""
        path = self.path / SUMMARY_FILE
        return json.loads(path.read_text()) if path.is_file() else None


@dataclass(frozen=True)
class PretrainResult:
    """How a run ended; losses are means over removed patches, in model units.

    ``train_loss`` is the mean over the last epoch's steps, ``held_out_loss`` that of held-out pictures under
    fixed masks; ``expected`` the range of ``train_loss`` that is normal for an unchanged preset, else
    ``None``.
    """

    output_dir: Path
    steps: int
    train_loss: float
    held_out_loss: float
    trivial: TrivialLoss
    expected: tuple[float, float] | None
    unreadable: int


def result_of(run: RunDirectory) -> PretrainResult:
    """The result that a finished run wrote; ``ValueError`` if it is not finished."""
    summary = run.summary()
    if summary is None:
        raise ValueError(f"{run.path} holds no {SUMMARY_FILE}: the run is not finished")
    expected = summary["expected_train_loss"]
    return PretrainResult(
        run.path,
        summary["steps"],
        summary["train_loss"],
        summary["held_out_loss"],
        TrivialLoss(**summary["trivial_loss"]),
        None if expected is None else (expected[0], expected[1]),
        summary["unreadable"],
    )


def describe(result: PretrainResult) -> list[str]:
    """A result in lines: losses, what is normal, where things are."""
    normal = (
        "no range was measured for a changed recipe"
        if result.expected is None
        else f"normal for this preset: {result.expected[0]:.3f} to {result.expected[1]:.3f}"
    )
    lines = [
        f"training loss, last epoch  {result.train_loss:.4f}   ({normal})",
        f"held-out loss              {result.held_out_loss:.4f}",
        f"trivial loss               {result.trivial.mean_picture:.4f} predicting the mean picture, "
        f"{result.trivial.mean_patch:.4f} the mean patch",
    ]
    if result.unreadable:
        lines.append(f"unreadable pictures        {result.unreadable}, named above, replaced by others")
    lines.append(
        f"saved in {result.output_dir}: model.safetensors, config.json, run.json, metrics.jsonl, {PICTURES_FILE}"
    )
    return lines
