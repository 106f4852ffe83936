r"""A run on disk: who owns the directory, checkpoints that are whole or absent, the
metrics log, provenance.

Layout of an output directory::

    run.json                    resolved config, data, each start (command, commit, ...)
    metrics.jsonl               one line per ``log_every`` steps; cut or uncut, the same
    evaluation.jsonl            held-out pictures every so many epochs, when asked for
    timing.jsonl                throughput beside them: what happened, never rewound
    pictures/  tensorboard/     when asked for
    .lock                       held by the process that trains, until it ends
    checkpoints/step-00000500/  model and config, optimizer.pt, progress.json
    milestones/step-00000500/   the same, kept for good, when asked for
    best/                       of fine-tuning: the model of the best held-out accuracy
    stopped.json                a signal ended the run after a step: start it again
    model.safetensors config.json reconstructions.png summary.json     when finished

Book: :ref:`ch-first-training`.
"""

import contextlib
import json
import os
import pickle
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError

from crate_core.model.files import CONFIG_FILE, WEIGHTS_FILE, StateDict, load_weights
from crate_core.model.saved import SavedModel
from crate_core.records import RUN_FILE, atomic_write, write_json
from crate_core.training.yardsticks import TrivialLoss

METRICS_FILE = "metrics.jsonl"
EVALUATION_LOG = "evaluation.jsonl"
TIMING_FILE = "timing.jsonl"
STOPPED_FILE = "stopped.json"
LOCK_FILE = ".lock"
SUMMARY_FILE = "summary.json"
PICTURES_FILE = "reconstructions.png"
CHECKPOINTS = "checkpoints"
MILESTONES = "milestones"
BEST = "best"
OPTIMIZER_FILE = "optimizer.pt"
PROGRESS_FILE = "progress.json"
CHECKPOINT_FILES = frozenset({CONFIG_FILE, WEIGHTS_FILE, OPTIMIZER_FILE, PROGRESS_FILE})


class CheckpointError(OSError):
    """A checkpoint or another file of a run that could not be written; the message
    names the last good one.
    """

    exit_code = 1
    """Of the command: the run failed on its way, its input was not at fault."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: ``step`` steps are done; ``progress`` is what the loop wrote
    about them.
    """

    path: Path
    step: int
    progress: dict[str, Any]

    def weights(self) -> StateDict:
        """The model's tensors."""
        return load_weights(self.path / WEIGHTS_FILE)

    def optimizer(self) -> dict[str, Any]:
        """States of optimizer and loss scaler.  ``ValueError`` for a file that
        ``weights_only=True`` refuses.
        """
        try:
            return torch.load(
                self.path / OPTIMIZER_FILE, map_location="cpu", weights_only=True
            )
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(
                f"{self.path / OPTIMIZER_FILE} was refused (read with "
                f"weights_only=True): {error}"
            ) from error


def sync(path: Path) -> None:
    """Flush a file or directory to disk.

    Windows flushes files that are open for writing only, and no directories.
    """
    if path.is_dir():
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except PermissionError:
            return
    else:
        descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def real_data(spec: str, start: Path) -> str:
    """A name of data with the path that it holds, if there is one from ``start`` on,
    absolute and without links: two names of one folder are equal.
    """
    kind, colon, location = spec.partition(":")
    path = start / Path(location).expanduser()
    if kind in ("folder", "shards", "hf") and path.exists():
        return kind + colon + str(path.resolve())
    return spec


class RunDirectory:
    """An output directory and the run that owns it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.checkpoints = self.path / CHECKPOINTS
        self.metrics = self.path / METRICS_FILE
        self.milestones = self.path / MILESTONES
        self.evaluations = self.path / EVALUATION_LOG
        self.timing = self.path / TIMING_FILE
        self._lock: IO[str] | None = None

    def claim(
        self,
        identity: Mapping[str, Any],
        config: Mapping[str, Any],
        start: Mapping[str, Any],
    ) -> None:
        """Make the directory this run's, or check that it is; ``start`` is added to the
        starts in ``run.json``.

        Parameters
        ----------
        identity : flat fields that decide what the run computes; those of the owner
            must be equal.
        config : the whole resolved configuration, for the record.
        start : provenance of this start.

        Raises
        ------
        ValueError
            If another run owns the directory (the differing fields are named), it holds
            files of something else, or another process is writing it. Nothing is
            changed then.
        """
        starts = self.owner_starts(identity)
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        self.lock()
        try:
            # another process may have claimed it before the lock was ours
            starts = self.owner_starts(identity)
            write_json(
                self.path / RUN_FILE,
                {"identity": identity, "config": config, "starts": [*starts, start]},
            )
            (self.path / STOPPED_FILE).unlink(missing_ok=True)
        except (OSError, ValueError):
            self.release()
            raise

    def owner_starts(self, identity: Mapping[str, Any]) -> list[Any]:
        """The starts of the run that owns the directory, empty if none does;
        ``ValueError`` if another run does.
        """
        record = self.path / RUN_FILE
        if not record.is_file():
            ours = (
                METRICS_FILE,
                CONFIG_FILE,
                WEIGHTS_FILE,
                SUMMARY_FILE,
                PICTURES_FILE,
            )
            present = [name for name in ours if (self.path / name).exists()]
            # An empty folder is what a process leaves that was killed before it wrote
            # its record.
            present += (
                [CHECKPOINTS]
                if self.checkpoints.is_dir() and any(self.checkpoints.iterdir())
                else []
            )
            if present:
                raise ValueError(
                    f"{self.path} already holds {', '.join(present)} and no "
                    f"{RUN_FILE}: it is not a run to continue. "
                    "Give another --output-dir; nothing was changed"
                )
            return []
        try:
            owner = json.loads(record.read_text(encoding="utf8"))
            recorded, starts = owner["identity"], owner["starts"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{record} is not the record of a run: {error!r}"
            ) from error
        # relative names of data count from where the run was started
        there = self.path / (starts[-1] if starts else {}).get("started_from", ".")
        differing = [
            f"{name} (there {recorded.get(name)!r}, now {identity.get(name)!r})"
            for name in sorted(recorded.keys() | identity.keys())
            if recorded.get(name) != identity.get(name)
            and not (
                name == "data"
                and real_data(str(recorded.get(name)), there)
                == real_data(str(identity.get(name)), Path())
            )
        ]
        if differing:
            raise ValueError(
                f"{self.path} holds another run, which differs in "
                f"{'; '.join(differing)}. "
                "Give another --output-dir; nothing was changed"
            )
        return starts

    def lock(self) -> None:
        """Hold the directory for this process until :meth:`release` or its end, however
        it ends.

        A record lock (``fcntl.lockf``), which the operating system takes back from a
        killed process; loader processes do not inherit it.  Where there is no ``fcntl``
        (Windows), nothing is locked.

        Raises ``ValueError`` if another process holds it.
        """
        try:
            import fcntl
        except ModuleNotFoundError:
            return
        # open as long as the lock is held
        file = open(self.path / LOCK_FILE, "a+", encoding="utf8")  # noqa: SIM115
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            file.close()
            raise ValueError(
                f"{self.path} is being written by another process ({holder}). Wait for "
                "it or end it, or give another --output-dir; nothing was changed"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        self._lock = file

    def release(self) -> None:
        """Let go of the directory."""
        if self._lock is not None:
            self._lock.truncate(0)
            self._lock.close()
            self._lock = None

    @contextlib.contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Turn a failed write of ``what`` into a :class:`CheckpointError` that names
        the last good checkpoint.
        """
        try:
            yield
        except CheckpointError:
            raise
        except (OSError, RuntimeError, SafetensorError) as error:
            kept = self.latest()
            good = (
                "there is no checkpoint"
                if kept is None
                else f"the last good one is {kept.path}"
            )
            raise CheckpointError(
                f"{what} could not be saved ({error}); {good}"
            ) from error

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint."""
        if not self.checkpoints.is_dir():
            return None
        paths = sorted(self.checkpoints.glob("step-*"), reverse=True)
        return next(filter(None, map(read_checkpoint, paths)), None)

    def save(
        self,
        step: int,
        model: SavedModel,
        optimizer: Mapping[str, Any],
        progress: Mapping[str, Any],
        milestone: bool = False,
    ) -> Checkpoint:
        """Write the checkpoint of ``step``, then remove older ones; keep it for good if
        it is a ``milestone``.

        All files are written to a hidden directory and flushed to disk before it gets
        its name, so that a checkpoint with a name is whole and the previous one stays
        until then.

        Raises
        ------
        CheckpointError
            If it cannot be written (disk full, no permission); the previous one is
            untouched.
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
            (partial / PROGRESS_FILE).write_text(json.dumps(progress), encoding="utf8")
            for file in [*partial.iterdir(), partial]:
                sync(file)
            if milestone:  # before the step counts as done, so that none is missed
                self.keep(partial, final.name)
            partial.rename(final)
            sync(self.checkpoints)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            kept = (
                "there is no earlier one"
                if previous is None
                else f"the last good one is {previous.path}"
            )
            raise CheckpointError(
                f"the checkpoint of step {step} could not be saved ({error}); {kept}"
            ) from error
        for path in self.checkpoints.glob("step-*"):
            if path != final:
                # one that is open elsewhere, where that holds it (Windows), stays
                shutil.rmtree(path, ignore_errors=True)
        return Checkpoint(final, step, dict(progress))

    def keep(self, checkpoint: Path, name: str) -> None:
        """A second name for a checkpoint's files among the milestones, whole or
        absent.
        """
        if (self.milestones / name).exists():
            return
        partial = self.milestones / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(checkpoint, partial, copy_function=link_or_copy)
        partial.rename(self.milestones / name)
        sync(self.milestones)

    def keep_best(self, step: int, model: SavedModel) -> None:
        """Write the best model so far, whole or not at all; an earlier one stays until
        :meth:`show_best`.
        """
        partial = self.path / BEST / ".partial"
        final = self.path / BEST / f"step-{step:08d}"
        with self.writing(f"the best model, of step {step}"):
            for path in (partial, final):
                shutil.rmtree(path, ignore_errors=True)
            model.save_pretrained(partial)
            for file in [*partial.iterdir(), partial]:
                sync(file)
            partial.rename(final)

    def show_best(self, step: int) -> None:
        """Let the folder ``best`` be the model of ``step``, and drop the others.  Call
        it after the checkpoint whose progress names ``step`` is written.
        """
        kept = self.path / BEST / f"step-{step:08d}"
        with self.writing(f"the best model, of step {step}"):
            for name in (WEIGHTS_FILE, CONFIG_FILE):
                partial = self.path / BEST / f".{name}.partial"
                partial.unlink(missing_ok=True)
                link_or_copy(str(kept / name), str(partial))
                partial.replace(self.path / BEST / name)
                # two names of one file: replacing does nothing then
                partial.unlink(missing_ok=True)
            for path in (self.path / BEST).glob("step-*"):
                if path != kept:
                    shutil.rmtree(path)

    def adopt(self, checkpoint: "Checkpoint") -> None:
        """Begin with a copy of another run's checkpoint, whole or absent."""
        partial = self.checkpoints / ".partial"
        with self.writing(f"a copy of {checkpoint.path}"):
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(checkpoint.path, partial)
            for file in [*partial.iterdir(), partial]:
                sync(file)
            partial.rename(self.checkpoints / checkpoint.path.name)
            sync(self.checkpoints)

    def rewind(self, step: int) -> None:
        """Drop lines after ``step`` of what is logged and evaluated, and a line cut off
        half-way; each file whole or not at all.
        """
        for path in (self.metrics, self.evaluations):
            if not path.exists():
                continue
            kept = []
            for line in path.read_text(encoding="utf8").splitlines(keepends=True):
                if not line.endswith("\n") or json.loads(line)["step"] > step:
                    break
                kept.append(line)
            atomic_write(path, "".join(kept).encode())

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to the metrics log.  ``CheckpointError`` if it cannot be
        written.
        """
        self._append(self.metrics, "the log", record)

    def _append(self, path: Path, what: str, record: Mapping[str, Any]) -> None:
        with self.writing(what), open(path, "a", encoding="utf8") as file:
            file.write(json.dumps(record) + "\n")

    def log_evaluation(self, record: Mapping[str, Any]) -> None:
        """Append one line to the evaluations.  ``CheckpointError`` if it cannot be
        written.
        """
        self._append(self.evaluations, "an evaluation", record)

    def log_timing(self, record: Mapping[str, Any]) -> None:
        """Append one line to the timing log.  ``CheckpointError`` if it cannot be
        written.
        """
        self._append(self.timing, "the timing log", record)

    def logged(self) -> list[dict[str, Any]]:
        """All records of the metrics log."""
        return (
            [
                json.loads(line)
                for line in self.metrics.read_text(encoding="utf8").splitlines()
            ]
            if self.metrics.exists()
            else []
        )

    def evaluated(self) -> list[dict[str, Any]]:
        """All records of evaluations."""
        path = self.evaluations
        lines = path.read_text(encoding="utf8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]

    def finished(self, steps: int) -> bool:
        """Whether a run of this many steps is done and written."""
        summary, latest = self.summary(), self.latest()
        return (
            summary is not None
            and latest is not None
            and summary["steps"] == latest.step >= steps
        )

    def summary(self) -> dict[str, Any] | None:
        """What a finished run wrote, or ``None``."""
        path = self.path / SUMMARY_FILE
        return json.loads(path.read_text(encoding="utf8")) if path.is_file() else None


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint in a folder, or ``None`` if there is no whole one."""
    if (
        not path.is_dir()
        or not re.fullmatch(r"step-\d+", path.name)
        or not {file.name for file in path.iterdir()} >= CHECKPOINT_FILES
    ):
        return None
    progress = json.loads((path / PROGRESS_FILE).read_text(encoding="utf8"))
    return Checkpoint(path, int(path.name[5:]), progress)


def link_or_copy(source: str, target: str) -> None:
    """A second name for a file, or a copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@dataclass(frozen=True)
class Branch:
    """Where another run begins: the checkpoint of a run, and what is different from
    then on, by field: (there, here).
    """

    checkpoint: Checkpoint
    changed: dict[str, tuple[Any, Any]]

    def describe(self) -> str:
        """What was branched off and what is different, in a line."""
        changes = [f"{n} {was!r} -> {now!r}" for n, (was, now) in self.changed.items()]
        return (
            f"branched off {self.checkpoint.path} after step {self.checkpoint.step:,}; "
            f"changed: {', '.join(changes) or 'nothing'}. This is another run, not the "
            "continuation of that one"
        )

    def to_dict(self) -> dict[str, Any]:
        """For the record of the new run."""
        checkpoint = self.checkpoint
        return {
            "run": checkpoint.path.parents[1].name,
            "step": checkpoint.step,
            "changed": {name: list(pair) for name, pair in self.changed.items()},
        }


def branch_of(source: str | Path, identity: Mapping[str, Any]) -> Branch:
    """The branching point of a run of ``identity`` that begins at ``source``: a run's
    directory, or one of its checkpoints or milestones.

    Raises
    ------
    FileNotFoundError
        If there is no checkpoint.
    ValueError
        If model, batch size or pictures differ: a step would be something else.
    """
    path = Path(source).expanduser()
    checkpoint = read_checkpoint(path) or RunDirectory(path).latest()
    if checkpoint is None:
        raise FileNotFoundError(
            f"branch_from={str(source)!r}: there is no run and no checkpoint"
        )
    record = checkpoint.path.parents[1] / RUN_FILE
    if not record.is_file():
        raise FileNotFoundError(f"{checkpoint.path} lies in no run: no {record}")
    there = json.loads(record.read_text(encoding="utf8"))["identity"]
    changed = {
        name: (there.get(name), identity.get(name))
        for name in sorted(there.keys() | identity.keys())
        if name != "branch_from" and there.get(name) != identity.get(name)
    }
    fixed = [
        f"{name} (there {was!r}, now {now!r})"
        for name, (was, now) in changed.items()
        if name.startswith("model.") or name in ("batch_size", "training pictures")
    ]
    if fixed:
        raise ValueError(
            f"branch_from={str(source)!r}: these must stay as they were: "
            f"{'; '.join(fixed)}"
        )
    return Branch(checkpoint, changed)


@dataclass(frozen=True)
class PretrainResult:
    """How a run ended; losses are means over removed patches, in model units.

    ``train_loss`` is the mean over the last epoch's steps, ``held_out_loss`` that of
    held-out pictures under fixed masks; ``expected`` the range of ``train_loss`` that
    is normal for an unchanged preset, else ``None``; ``unreadable`` is the number of
    training pictures that could not be read, ``held_out_unreadable`` names those that
    ``held_out_loss`` leaves out.
    """

    output_dir: Path
    steps: int
    train_loss: float
    held_out_loss: float
    trivial: TrivialLoss
    expected: tuple[float, float] | None
    unreadable: int
    held_out_unreadable: tuple[str, ...] = ()


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
        tuple(summary.get("held_out_unreadable", ())),
    )


def describe(result: PretrainResult) -> list[str]:
    """A result in lines: losses, what is normal, where things are."""
    normal = (
        "no range was measured for a changed recipe"
        if result.expected is None
        else "normal for this preset: "
        f"{result.expected[0]:.3f} to {result.expected[1]:.3f}"
    )
    lines = [
        f"training loss, last epoch  {result.train_loss:.4f}   ({normal})",
        f"held-out loss              {result.held_out_loss:.4f}",
        f"trivial loss               {result.trivial.mean_picture:.4f} predicting the "
        "mean picture, "
        f"{result.trivial.mean_patch:.4f} the mean patch",
    ]
    if result.unreadable:
        lines.append(
            f"unreadable pictures        {result.unreadable}, named above, replaced by "
            "others"
        )
    if result.held_out_unreadable:
        lines.append(
            f"unreadable held-out        {len(result.held_out_unreadable)}, left out "
            "of "
            f"the held-out loss ({', '.join(result.held_out_unreadable[:3])})"
        )
    lines.append(
        f"saved in {result.output_dir}: model.safetensors, config.json, run.json, "
        f"metrics.jsonl, {PICTURES_FILE}"
    )
    return lines
