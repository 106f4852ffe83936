r"""The loop that pretraining and fine-tuning share: steps, log, exact resume, an
orderly end.

Step t draws its pictures and all that is random from (seed, t) alone
(:mod:`crate_core.data.batches`), so the state of a run is its weights, the optimizer's
averages and t.  A checkpoint holds these; a run that was cut off at any moment goes on
from the last one and, on a CPU with the same number of threads, ends with the bits of
the uncut run.

Book: :ref:`ch-pretraining`.
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from crate_core.data.batches import Batch, UnreadableCount
from crate_core.data.sources import ImageData
from crate_core.model.saved import SavedModel
from crate_core.records import device_name, write_json
from crate_core.training.checks import check_compiler
from crate_core.training.devices import (
    clip_gradient,
    company,
    gradient_sync,
    load_optimizer_state,
    optimizer_state,
)
from crate_core.training.progress import Progress
from crate_core.training.recipe import Schedule, TrainingConfig
from crate_core.training.run_directory import STOPPED_FILE, RunDirectory
from crate_core.training.signals import StopSignals, TrainingStoppedError

Config = TypeVar("Config", bound=TrainingConfig)
Model = TypeVar("Model", bound=SavedModel)


class TrainingDivergedError(ArithmeticError):
    """The loss or gradient is no longer finite; the message names step, learning rate
    and last good checkpoint.
    """


def relative_directory(start: Path) -> str:
    """The working directory as seen from ``start``: where relative names of data lie,
    wherever the tree is moved to.
    """
    try:
        return os.path.relpath(Path.cwd(), start)
    except ValueError:  # another drive of Windows
        return str(Path.cwd())


class Loop(ABC, Generic[Config, Model]):
    """The loop of one run, from its last checkpoint to its last step; what a step is,
    and what happens besides, is for a subclass to say.

    Parameters
    ----------
    config : the run.
    schedule : its steps and learning rates.
    data : training and held-out pictures.
    run : its directory, claimed already.
    accelerator : devices, precision and processes.
    report : gets one-line messages.
    report_unreadable : gets those of unreadable pictures, which each process meets by
        itself.

    Book: :ref:`ch-first-training`.
    """

    def __init__(
        self,
        config: Config,
        schedule: Schedule,
        data: ImageData,
        run: RunDirectory,
        accelerator: Accelerator,
        report: Callable[[str], None],
        report_unreadable: Callable[[str], None],
    ) -> None:
        self.config, self.data, self.run = config, data, run
        self.accelerator = accelerator
        self.report, self.report_unreadable = report, report_unreadable
        self.count = len(data.train)
        self.schedule = schedule
        self.checkpoint = run.latest()
        self.step = 0
        # (loss, gradient norm) of the steps since the last line of the log
        self.pending: list[Tensor] = []
        self.progress: dict[str, Any] = {}
        unreadable: dict[int, str] = {}
        self.model = self.initial_model()
        if self.checkpoint is not None:
            self.step = self.checkpoint.step
            self.progress = dict(self.checkpoint.progress)
            self.pending = list(
                torch.tensor(self.progress.pop("pending"), device=accelerator.device)
            )
            unreadable = {
                int(index): message
                for index, message in self.progress.pop("unreadable").items()
            }
            self.model.load_weights(
                self.checkpoint.weights(), source=str(self.checkpoint.path)
            )
        self.unreadable = UnreadableCount(self.count, config.max_unreadable, unreadable)
        self.wrapped, self.optimizer = self.distributed()
        # Shapes and masking ratio do not change in a run: none is to be taken as
        # unknown.
        self.forward = (
            torch.compile(self.wrapped, dynamic=False)
            if config.compile
            else self.wrapped
        )
        if self.checkpoint is not None:
            states = self.checkpoint.optimizer()
            load_optimizer_state(self.wrapped, self.optimizer, states["optimizer"])
            if accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(states["scaler"])

    @abstractmethod
    def initial_model(self) -> Model:
        """What the run starts from, on the CPU."""

    @abstractmethod
    def distributed(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model and its optimizer on this process's device."""

    @abstractmethod
    def batches(self) -> Iterable[Batch]:
        """The micro-batches of the steps that are left, this process's share."""

    @abstractmethod
    def micro_losses(self) -> list[Callable[[Batch], Tensor]]:
        """The next step's loss as a function of each of its micro-batches."""

    @abstractmethod
    def about(self) -> Iterable[str]:
        """What is about to run, in lines, after a look at what could fail at its end.
        Every process calls it.
        """

    @abstractmethod
    def due(self) -> bool:
        """Whether an evaluation is due after the current step."""

    @abstractmethod
    def evaluate(self, shown: Progress) -> None:
        """Evaluate on held-out pictures.  Every process calls it."""

    @abstractmethod
    def write_result(self, model: Model, command: str) -> None:
        """The files of a finished run, on the main process; the summary last."""

    def introduce(self) -> None:
        """Check what can fail before the work, and say what is about to run."""
        if self.config.compile:
            check_compiler(self.accelerator.device)
        for line in self.about():
            self.report(line)
        crowded = company() if self.accelerator.device.type == "cpu" else None
        if crowded is not None:
            self.report(crowded)
        if self.step:
            self.report(
                f"continuing after step {self.step:,} of {self.schedule.steps:,}"
            )

    def where(self) -> str:
        """Device, processes and precision, for a line."""
        processes = self.accelerator.num_processes
        together = f", {processes} processes" if processes > 1 else ""
        device = device_name(self.accelerator.device)
        return f"{device}{together}, {self.config.precision}"

    def update(self, batches: Iterator[Batch]) -> tuple[Tensor, Tensor]:
        """One step on the next micro-batches of this process: the loss before it and
        the norm of its gradient.

        Micro-batches are equally large, so the mean of their means is the batch's.
        """
        config, accelerator = self.config, self.accelerator
        rate = self.schedule.lr(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        losses = []
        for i, loss_of in enumerate(self.micro_losses(), start=1):
            batch = next(batches)
            self.unreadable.add(batch, self.report_unreadable)
            last = i == config.accumulate
            with gradient_sync(self.wrapped, accelerator, wanted=last):
                loss = loss_of(batch)
                accelerator.backward(loss / config.accumulate)
            losses.append(loss.detach())
        norm = clip_gradient(self.wrapped, accelerator, config.clip_gradient)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack(losses).mean(), norm.detach()

    def to_save(self) -> bool:
        """Whether a checkpoint of the current step is due."""
        every = self.step % self.config.checkpoint_every == 0
        return every or self.milestone()

    def milestone(self) -> bool:
        """Whether the checkpoint of the current step is to be kept for good."""
        return False

    def after_step(self, shown: Progress) -> None:
        """What else a run shows of itself; by default nothing."""

    def whole_model(self) -> Model | None:
        """The model in one piece; ``None`` where this process has none.  Every process
        calls it.
        """
        return self.model

    def saved(self) -> None:
        """What follows a checkpoint on the main process; by default nothing."""

    def fit(self, progress: bool) -> None:
        """Train to the last step; checkpoints, log and progress bar on the main
        process.

        Raises
        ------
        TrainingDivergedError
            If the loss or the gradient is no longer finite.
        TrainingStoppedError
            If SIGTERM or SIGUSR1 came: the step was finished and a checkpoint written.
        CheckpointError
            If a checkpoint cannot be saved; the previous one is kept.
        ValueError
            If too many pictures are unreadable.
        """
        config, main = self.config, self.accelerator.is_main_process
        if main:
            self.run.rewind(self.step)
        self.wrapped.train()
        with (
            StopSignals() as signals,
            Progress(
                self.run, self.schedule, self.step, progress, main, self.report
            ) as shown,
        ):
            batches = iter(self.batches())
            while self.step < self.schedule.steps:
                self.pending.append(torch.stack(self.update(batches)).float())
                self.step += 1
                last = self.step == self.schedule.steps
                stop = signals.agreed() and not last
                log = self.step % config.log_every == 0 or last
                save = self.to_save() or last or stop
                if log or save:
                    values = self.check_finite()
                if log:
                    record = self.record(values)
                    self.pending = []
                    if main:
                        self.run.log(record)
                    shown.line(record)
                if self.due():
                    self.evaluate(shown)
                if save:
                    self.save([] if log else values)
                if stop:
                    self.stop(signals.received)
                self.after_step(shown)
                shown.bar.update()

    def check_finite(self) -> list[list[float]]:
        """(loss, gradient norm) of the steps since the last line, averaged over
        processes; raises if not finite.
        """
        values = self.accelerator.reduce(
            torch.stack(self.pending), reduction="mean"
        ).tolist()
        for step, (loss, norm) in enumerate(values, start=self.step - len(values) + 1):
            # With a loss scaler an overflowing gradient is normal: the step is skipped
            # and the scale lowered.
            if not math.isfinite(loss) or (
                self.accelerator.scaler is None and not math.isfinite(norm)
            ):
                what = (
                    f"the loss is {loss}"
                    if not math.isfinite(loss)
                    else f"the gradient's norm is {norm}"
                )
                rate = self.schedule.lr(step - 1)
                kept = self.run.latest()
                good = (
                    "there is no checkpoint yet"
                    if kept is None
                    else f"the last good checkpoint is {kept.path}"
                )
                raise TrainingDivergedError(
                    f"{what} at step {step} (learning rate {rate:.3g}); {good}"
                )
        return values

    def record(self, values: list[list[float]]) -> dict[str, Any]:
        """A line of the log: means over the steps since the last one, and the last
        step's learning rate.
        """
        losses, norms = ([v[i] for v in values] for i in (0, 1))
        finite = [norm for norm in norms if math.isfinite(norm)]
        return {
            **self.position(),
            "loss": sum(losses) / len(losses),
            "lr": self.schedule.lr(self.step - 1),
            "gradient_norm": sum(finite) / len(finite) if finite else None,
        }

    def position(self) -> dict[str, Any]:
        """How far the run is: steps and epochs."""
        epoch = round(self.schedule.epoch(self.step), 3)
        return {"step": self.step, "epoch": epoch}

    def log_evaluation(self, scores: dict[str, float], shown: Progress) -> None:
        """Note what held-out pictures gave, on the main process."""
        self.run.log_evaluation({**self.position(), **scores})
        shown.evaluation(self.step, scores)

    def last_epoch_loss(self) -> float:
        """Mean of the logged losses of the last epoch's steps."""
        first = self.step - self.schedule.steps_per_epoch
        losses = [line["loss"] for line in self.run.logged() if line["step"] > first]
        return sum(losses) / len(losses)

    def stop(self, received: str | None) -> None:
        """End a run that was asked to stop and has its checkpoint."""
        if self.accelerator.is_main_process:
            record = {"step": self.step, "steps": self.schedule.steps}
            with self.run.writing(STOPPED_FILE):
                write_json(self.run.path / STOPPED_FILE, record)
        self.accelerator.wait_for_everyone()
        raise TrainingStoppedError(
            f"{received or 'another process'} ended the run after step {self.step:,} "
            f"of {self.schedule.steps:,}, with a checkpoint; the same command "
            "continues it"
        )

    def save(self, values: list[list[float]]) -> None:
        """A checkpoint of the current step; ``values`` are what the log has not got
        yet.
        """
        accelerator = self.accelerator
        accelerator.wait_for_everyone()
        model, state = self.whole_model(), optimizer_state(self.wrapped, self.optimizer)
        met = dict(self.unreadable.met)
        for others in gather_object([met]) if accelerator.num_processes > 1 else []:
            met |= others
        if accelerator.is_main_process and model is not None:
            states = {
                "optimizer": state,
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler else {},
            }
            named = {str(index): message for index, message in met.items()}
            progress = {**self.progress, "pending": values, "unreadable": named}
            self.checkpoint = self.run.save(
                self.step, model, states, progress, self.milestone()
            )
            self.saved()

    def finish(self, command: str) -> None:
        """Write the files of a run whose steps are done."""
        model = self.whole_model()
        if self.accelerator.is_main_process and model is not None:
            what = "the finished run (its steps are done; the same call writes it)"
            with self.run.writing(what):
                self.write_result(model, command)
        self.accelerator.wait_for_everyone()
