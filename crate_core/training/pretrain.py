r"""Masked pretraining, from top to bottom: a run, its loop, exact resume.

Step t draws its pictures, augmentation and masks from (seed, t) alone
(:mod:`crate_core.data.batches`), so the state of a run is its weights, the optimizer's
averages and t.  A checkpoint holds these; a run that was cut off at any moment goes on
from the last one and, on a CPU with the same number of threads, ends with the bits of
the uncut run.

Book: :ref:`ch-first-training`, :ref:`ch-pretraining`.
"""

import importlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from crate_core.data.batches import (
    Batch,
    StepBatches,
    TrainingPictures,
    UnreadableCount,
    loader,
    local_rows,
    some_batches,
    some_pictures,
)
from crate_core.data.named import open_data
from crate_core.data.shards import order_of
from crate_core.data.sources import ImageData
from crate_core.data.streamed import (
    StreamedBatches,
    StreamedImages,
    StreamedPictures,
    stream_data,
)
from crate_core.data.understood import understood
from crate_core.keys import evaluation_noise, mask_noise
from crate_core.model.autoencoder import MaskedAutoencoder
from crate_core.model.build import fresh_model
from crate_core.records import device_name, provenance, write_json
from crate_core.training.checks import check_compiler
from crate_core.training.devices import (
    clip_gradient,
    company,
    distribute,
    gradient_sync,
    load_optimizer_state,
    make_accelerator,
    optimizer_state,
    whole_weights,
)
from crate_core.training.progress import Progress
from crate_core.training.recipe import Plan, PretrainConfig
from crate_core.training.run_directory import (
    PICTURES_FILE,
    STOPPED_FILE,
    SUMMARY_FILE,
    PretrainResult,
    RunDirectory,
    branch_of,
    describe,
    result_of,
)
from crate_core.training.signals import StopSignals, TrainingStoppedError
from crate_core.training.yardsticks import (
    TrivialLoss,
    held_out_loss,
    save_reconstructions,
    trivial_loss,
)

Evaluator = Callable[[MaskedAutoencoder, ImageData], Mapping[str, float]]

PICTURES_SHOWN = 8
"""Held-out pictures in a figure of reconstructions."""


class TrainingDivergedError(ArithmeticError):
    """The loss or gradient is no longer finite; the message names step, learning rate
    and last good checkpoint.
    """


def pretrain(
    config: PretrainConfig,
    progress: bool = True,
    report: Callable[[str], None] = print,
    command: str = "crate_core.training.pretrain.pretrain",
) -> PretrainResult:
    r"""Pretrain a CRATE-MAE, or continue a run that was cut off.

    Minimises the mean squared error on removed patches with AdamW; see
    :mod:`crate_core.training.recipe` for the recipe.

    Parameters
    ----------
    config : the run; ``config.output_dir`` is where it lives.
    progress : show a progress bar on stderr.
    report : gets each line of text.
    command : what to record as the command.

    Returns
    -------
    PretrainResult : losses and where things were saved.

    Raises
    ------
    ValueError
        If the directory holds another run, the data cannot be used, too many pictures
        are unreadable, or the device is not there.
    FileNotFoundError
        If the data is not there.
    TrainingDivergedError
        If the loss or the gradient is no longer finite.
    TrainingStoppedError
        If SIGTERM or SIGUSR1 came: the step was finished and a checkpoint written.
    CheckpointError If a checkpoint cannot be saved; the previous one is kept, and the
        same call continues from it.

    Book: :ref:`ch-first-training`.
    """
    accelerator = make_accelerator(config)
    main = accelerator.is_main_process

    def say(line: str) -> None:
        if main:
            report(line)

    # which downloads, where there is something to download
    with accelerator.main_process_first():
        data = (
            stream_data(config.data[3:], keep=main)
            if config.streaming
            else open_data(config.data, config.data_root, bool(config.evaluators))
        )
    for line in understood(data):
        say(line)
    run, plan = RunDirectory(config.output_dir), Plan(config, len(data.train))
    try:
        if main:
            start = {
                **provenance(command, device_name(accelerator.device)),
                "started_from": relative_directory(run.path),
            }
            identity = {**config.identity(), **data_identity(data)}
            branch = None
            if config.branch_from is not None and run.latest() is None:
                branch = branch_of(config.branch_from, identity)
                if branch.checkpoint.step >= plan.steps:
                    raise ValueError(
                        f"branch_from: step {branch.checkpoint.step:,} of that run is "
                        f"not before the end of this one, {plan.steps:,} steps"
                    )
                start["branched_from"] = branch.to_dict()
            run.claim(identity, config.to_dict(), start)
            if branch is not None:
                run.adopt(branch.checkpoint)
                say(branch.describe())
        accelerator.wait_for_everyone()
        if run.finished(plan.steps):
            steps = f"{result_of(run).steps:,} steps are done"
            say(f"{run.path} is finished: {steps}; nothing was trained")
        else:
            trainer = Trainer(config, data, run, accelerator, say, report)
            trainer.introduce()
            trainer.fit(progress)
            trainer.finish(command)
        result = result_of(run)
        for line in describe(result):
            say(line)
        return result
    finally:
        run.release()


def data_identity(data: ImageData) -> dict[str, Any]:
    """What of the data decides a run: how many pictures there are to train on, and the
    names of some of them.
    """
    count = len(data.train)
    names = [Path(data.train.name(i)).name for i in sorted({0, count // 2, count - 1})]
    return {"training pictures": count, "first, middle and last picture": names}


def relative_directory(start: Path) -> str:
    """The working directory as seen from ``start``: where relative names of data lie,
    wherever the tree is moved to.
    """
    try:
        return os.path.relpath(Path.cwd(), start)
    except ValueError:  # another drive of Windows
        return str(Path.cwd())


class Trainer:
    """The loop of one run, from its last checkpoint to its last step.

    Parameters
    ----------
    config : the run.
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
        config: PretrainConfig,
        data: ImageData,
        run: RunDirectory,
        accelerator: Accelerator,
        report: Callable[[str], None],
        report_unreadable: Callable[[str], None],
    ) -> None:
        self.config, self.data, self.run, self.accelerator = (
            config,
            data,
            run,
            accelerator,
        )
        self.report, self.report_unreadable = report, report_unreadable
        self.count = len(data.train)
        self.plan = Plan(config, self.count)
        self.trivial = TrivialLoss(math.nan, math.nan)
        self.evaluators = [evaluator(name) for name in config.evaluators]
        self.checkpoint = run.latest()
        self.step = 0
        # (loss, gradient norm) of the steps since the last line of the log
        self.pending: list[Tensor] = []
        unreadable: dict[int, str] = {}
        self.model = fresh_model(config.model, config.seed)
        if self.checkpoint is not None:
            self.step = self.checkpoint.step
            self.pending = list(
                torch.tensor(
                    self.checkpoint.progress["pending"], device=accelerator.device
                )
            )
            unreadable = {
                int(index): message
                for index, message in self.checkpoint.progress["unreadable"].items()
            }
            self.model.load_weights(
                self.checkpoint.weights(), source=str(self.checkpoint.path)
            )
        self.unreadable = UnreadableCount(self.count, config.max_unreadable, unreadable)
        self.wrapped, self.optimizer = distribute(self.model, config, accelerator)
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

    def introduce(self) -> None:
        """Check what can fail before the work, and say what is about to run."""
        config, accelerator = self.config, self.accelerator
        if config.compile:
            check_compiler(accelerator.device)
        if accelerator.is_main_process:
            # what the end needs is looked for before the work: some held-out picture
            some_pictures(self.data.held_out, config.model, PICTURES_SHOWN)
            pictures = some_batches(self.data.train, config.model)
            self.trivial = trivial_loss(
                fresh_model(config.model, config.seed), pictures
            )
        parameters = sum(p.numel() for p in self.model.parameters())
        processes = accelerator.num_processes
        self.report(
            f"model: {parameters:,} parameters on {device_name(accelerator.device)}"
            f"{f', {processes} processes' if processes > 1 else ''}, {config.precision}"
        )
        self.report(
            f"loss to beat: {self.trivial.mean_picture:.4f}, "
            "what predicting the mean picture costs"
        )
        crowded = company() if accelerator.device.type == "cpu" else None
        if crowded is not None:
            self.report(crowded)
        normal = self.plan.expected_final
        if normal is not None:
            self.report(
                f"loss that is normal at the end: {normal[0]:.3f} to {normal[1]:.3f}"
            )
        if self.step:
            self.report(f"continuing after step {self.step:,} of {self.plan.steps:,}")

    @property
    def sharded(self) -> bool:
        """Whether each process holds a share of the model only."""
        return isinstance(self.wrapped, FSDPModule)

    def batches(self) -> Iterable[Batch]:
        """The micro-batches of the steps that are left, this process's share."""
        config, accelerator = self.config, self.accelerator
        share = (accelerator.process_index, accelerator.num_processes)
        remaining = (
            *(config.batch_size, config.seed, self.step, self.plan.steps),
            *(*share, config.accumulate),
        )
        pictures = (
            self.data.train,
            config.model.image_shape,
            config.model.channels,
            config.augmentation,
            config.seed,
        )
        if isinstance(self.data.train, StreamedImages):
            dataset: TrainingPictures = StreamedPictures(*pictures)
            order: StreamedBatches | StepBatches = StreamedBatches(
                self.data.train, *remaining
            )
        else:
            own = order_of(self.data.train, config.seed, config.batch_size)
            dataset, order = (
                TrainingPictures(*pictures),
                StepBatches(self.count, *remaining, own),
            )
        return loader(
            dataset, order, config.workers, pin=accelerator.device.type == "cuda"
        )

    def update(self, batches: Iterator[Batch]) -> tuple[Tensor, Tensor]:
        """One step on the next micro-batches of this process: the loss before it and
        the norm of its gradient.
        """
        config, accelerator = self.config, self.accelerator
        device = accelerator.device
        rows = local_rows(
            config.batch_size, accelerator.process_index, accelerator.num_processes
        )
        noise = mask_noise(
            config.seed, self.step, config.batch_size, math.prod(config.model.grid)
        )[rows]
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.lr(self.step)
        losses = []
        for i, chances in enumerate(noise.split(len(noise) // config.accumulate)):
            batch = next(batches)
            self.unreadable.add(batch, self.report_unreadable)
            with gradient_sync(
                self.wrapped, accelerator, wanted=i == config.accumulate - 1
            ):
                standardized = self.model.standardize(
                    batch.images.to(device, non_blocking=True)
                )
                loss = self.forward(
                    standardized, config.mask_ratio, chances.to(device)
                ).loss
                # Micro-batches have equally many removed patches, so the mean of their
                # means is the batch's.
                accelerator.backward(loss / config.accumulate)
            losses.append(loss.detach())
        norm = clip_gradient(self.wrapped, accelerator, config.clip_gradient)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack(losses).mean(), norm.detach()

    def fit(self, progress: bool) -> None:
        """Train to the last step; checkpoints, log and progress bar on the main
        process.

        Raises
        ------
        TrainingDivergedError, CheckpointError, ValueError
            See :func:`pretrain`.
        """
        config, main = self.config, self.accelerator.is_main_process
        if main:
            self.run.rewind(self.step)
        self.wrapped.train()
        with (
            StopSignals() as signals,
            Progress(
                self.run, self.plan, self.step, progress, main, self.report
            ) as shown,
        ):
            batches = iter(self.batches())
            while self.step < self.plan.steps:
                self.pending.append(torch.stack(self.update(batches)).float())
                self.step += 1
                last = self.step == self.plan.steps
                stop = signals.agreed() and not last
                milestone = self.plan.passes(self.step, config.milestone_epochs)
                log = self.step % config.log_every == 0 or last
                save = self.step % config.checkpoint_every == 0 or last
                save = save or milestone or stop
                if log or save:
                    values = self.check_finite()
                if log:
                    record = self.record(values)
                    self.pending = []
                    if main:
                        self.run.log(record)
                    shown.line(record)
                if self.plan.passes(self.step, config.evaluate_epochs):
                    self.evaluate(shown)
                if save:
                    self.save([] if log else values, milestone)
                if stop:
                    self.stop(signals.received)
                if (
                    config.picture_every is not None
                    and self.step % config.picture_every == 0
                ):
                    self.draw(shown)
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
                rate = self.plan.lr(step - 1)
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
            "step": self.step,
            "epoch": round(self.plan.epoch(self.step), 3),
            "loss": sum(losses) / len(losses),
            "lr": self.plan.lr(self.step - 1),
            "gradient_norm": sum(finite) / len(finite) if finite else None,
        }

    def whole_model(self) -> MaskedAutoencoder | None:
        """The model in one piece; ``None`` on other processes when it is sharded.
        Every process calls it.
        """
        if not self.sharded:
            return self.model
        weights = whole_weights(self.wrapped)
        if not self.accelerator.is_main_process:
            return None
        model = fresh_model(self.config.model, self.config.seed)
        model.load_weights(weights, source="the processes' shares")
        return model

    def evaluate(self, shown: Progress) -> None:
        """The held-out loss and what the evaluators give, by the main process."""
        model = self.whole_model()
        if self.accelerator.is_main_process and model is not None:
            pictures = some_batches(self.data.held_out, self.config.model)
            loss = held_out_loss(model, pictures, self.config.mask_ratio)
            scores = {"held_out_loss": loss}
            for evaluate in self.evaluators:
                scores |= evaluate(model, self.data)
            where = {"step": self.step, "epoch": round(self.plan.epoch(self.step), 3)}
            self.run.log_evaluation({**where, **scores})
            shown.evaluation(self.step, scores)
        self.accelerator.wait_for_everyone()

    def stop(self, received: str | None) -> None:
        """End a run that was asked to stop and has its checkpoint."""
        if self.accelerator.is_main_process:
            record = {"step": self.step, "steps": self.plan.steps}
            with self.run.writing(STOPPED_FILE):
                write_json(self.run.path / STOPPED_FILE, record)
        self.accelerator.wait_for_everyone()
        raise TrainingStoppedError(
            f"{received or 'another process'} ended the run after step {self.step:,} "
            f"of {self.plan.steps:,}, with a checkpoint; the same command continues it"
        )

    def save(self, values: list[list[float]], milestone: bool) -> None:
        """A checkpoint of the current step, kept for good if it is a ``milestone``;
        ``values`` are what the log has not got yet.
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
            progress = {"pending": values, "unreadable": named}
            self.checkpoint = self.run.save(
                self.step, model, states, progress, milestone
            )

    def draw(self, shown: Progress) -> None:
        """A picture of reconstructions by the current weights."""
        model = self.whole_model()
        if self.accelerator.is_main_process and model is not None:
            path = shown.picture_path(self.step)
            with self.run.writing("the picture of reconstructions"):
                draw_reconstructions(path, model, self.data, self.config)
            shown.show_picture(path, self.step)

    def finish(self, command: str) -> None:
        """Write weights, pictures and summary of a run whose steps are done; the
        summary last.
        """
        model = self.whole_model()
        if self.accelerator.is_main_process and model is not None:
            what = "the finished run (its steps are done; the same call writes it)"
            with self.run.writing(what):
                self.write_result(model, command)
        self.accelerator.wait_for_everyone()

    def write_result(self, model: MaskedAutoencoder, command: str) -> None:
        """The files of a finished run, on the main process."""
        config, run = self.config, self.run
        left_out: list[str] = []
        pictures = some_batches(
            self.data.held_out, config.model, report=left_out.append
        )
        last_epoch = self.step - self.plan.steps_per_epoch
        losses = [line["loss"] for line in run.logged() if line["step"] > last_epoch]
        model.save_pretrained(run.path)
        draw_reconstructions(run.path / PICTURES_FILE, model, self.data, config)
        summary = {
            "steps": self.step,
            "train_loss": sum(losses) / len(losses),
            "held_out_loss": held_out_loss(model, pictures, config.mask_ratio),
            "held_out_unreadable": left_out,
            "trivial_loss": {
                "mean_patch": self.trivial.mean_patch,
                "mean_picture": self.trivial.mean_picture,
            },
            "expected_train_loss": self.plan.expected_final,
            "unreadable": len(self.unreadable.met),
            "seed": config.seed,
            **provenance(command, device_name(self.accelerator.device)),
        }
        write_json(run.path / SUMMARY_FILE, summary)


def evaluator(name: str) -> Evaluator:
    """The function that ``MODULE:FUNCTION`` names; ``ValueError`` if there is none."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"evaluators: {name!r} was not found: {error}") from error


def draw_reconstructions(
    path: Path, model: MaskedAutoencoder, data: ImageData, config: PretrainConfig
) -> None:
    """A few held-out pictures under fixed masks, filled in by the model."""
    pictures = some_pictures(data.held_out, config.model, PICTURES_SHOWN)
    noise = evaluation_noise(0, len(pictures), math.prod(config.model.grid))
    save_reconstructions(path, model, pictures, config.mask_ratio, noise)
