r"""The training loop: step t of a run as a function of its weights, the optimizer's
averages and t.

Book: :ref:`ch-first-training`.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from crate_core.data.batches import (
    StepBatches,
    TrainingPictures,
    UnreadableCount,
    loader,
    local_rows,
)
from crate_core.data.sources import ImageData
from crate_core.data.streamed import StreamedBatches, StreamedImages, StreamedPictures
from crate_core.keys import evaluation_noise, mask_noise
from crate_core.model.autoencoder import MaskedAutoencoder
from crate_core.model.build import fresh_model
from crate_core.shapes import Pictures
from crate_core.training.devices import (
    clip_gradient,
    distribute,
    gradient_sync,
    load_optimizer_state,
    optimizer_state,
    whole_weights,
)
from crate_core.training.progress import Progress
from crate_core.training.recipe import (
    PretrainConfig,
    learning_rate,
    total_steps,
)
from crate_core.training.run_directory import RunDirectory
from crate_core.training.yardsticks import save_reconstructions, some_pictures

PICTURES_SHOWN = 8


class TrainingDivergedError(ArithmeticError):
    """The loss or gradient is no longer finite; the message names step, learning rate
    and last good checkpoint.
    """


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
        self.stop = total_steps(config, self.count)
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

    @property
    def sharded(self) -> bool:
        """Whether each process holds a share of the model only."""
        return isinstance(self.wrapped, FSDPModule)

    def batches(self) -> Iterable[Any]:
        """The batches of the steps that are left, this process's share."""
        config, accelerator = self.config, self.accelerator
        share = (accelerator.process_index, accelerator.num_processes)
        remaining = (config.batch_size, config.seed, self.step, self.stop, *share)
        pictures = (
            self.data.train,
            config.model.image_shape,
            config.model.channels,
            config.augmentation,
            config.seed,
        )
        if config.batch_size % (accelerator.num_processes * config.accumulate):
            raise ValueError(
                f"batch_size={config.batch_size} must be a multiple of processes times accumulate, "
                f"{accelerator.num_processes} x {config.accumulate}"
            )
        if isinstance(self.data.train, StreamedImages):
            dataset: TrainingPictures = StreamedPictures(*pictures)
            order: StreamedBatches | StepBatches = StreamedBatches(
                self.data.train, *remaining
            )
        else:
            dataset, order = (
                TrainingPictures(*pictures),
                StepBatches(self.count, *remaining),
            )
        return loader(
            dataset, order, config.workers, pin=accelerator.device.type == "cuda"
        )

    def update(self, images: Pictures) -> tuple[Tensor, Tensor]:
        """One step on this process's pictures in [0, 1]: the loss before it and the
        norm of its gradient.
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
            group["lr"] = learning_rate(self.step, config, self.count)
        losses = []
        micro = len(images) // config.accumulate
        for i, (pictures, chances) in enumerate(
            zip(images.split(micro), noise.split(micro), strict=True)
        ):
            with gradient_sync(
                self.wrapped, accelerator, wanted=i == config.accumulate - 1
            ):
                standardized = self.model.standardize(
                    pictures.to(device, non_blocking=True)
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
            self.run.rewind_metrics(self.step)
        self.wrapped.train()
        with Progress(
            self.run,
            config,
            self.count,
            self.step,
            self.stop,
            progress,
            main,
            self.report,
        ) as shown:
            for batch in self.batches():
                self.unreadable.add(batch, self.report_unreadable)
                self.pending.append(torch.stack(self.update(batch.images)).float())
                self.step += 1
                last = self.step == self.stop
                log = self.step % config.log_every == 0 or last
                save = self.step % config.checkpoint_every == 0 or last
                if log or save:
                    values = self.check_finite()
                if log:
                    record = self.record(values)
                    self.pending = []
                    if main:
                        self.run.log(record)
                    shown.line(record)
                if save:
                    self.save(values=[] if log else values)
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
                rate = learning_rate(step - 1, self.config, self.count)
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
            "epoch": round(self.step * self.config.batch_size / self.count, 3),
            "loss": sum(losses) / len(losses),
            "lr": learning_rate(self.step - 1, self.config, self.count),
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
            self.checkpoint = self.run.save(
                self.step, model, states, {"pending": values, "unreadable": named}
            )

    def draw(self, shown: Progress) -> None:
        """A picture of reconstructions by the current weights."""
        model = self.whole_model()
        if self.accelerator.is_main_process and model is not None:
            path = shown.picture_path(self.step)
            with self.run.writing("the picture of reconstructions"):
                draw_reconstructions(path, model, self.data, self.config)
            shown.show_picture(path, self.step)


def draw_reconstructions(
    path: Path, model: MaskedAutoencoder, data: ImageData, config: PretrainConfig
) -> None:
    """A few held-out pictures under fixed masks, filled in by the model."""
    pictures = some_pictures(data.held_out, config.model, PICTURES_SHOWN)
    noise = evaluation_noise(0, len(pictures), math.prod(config.model.grid))
    save_reconstructions(path, model, pictures, config.mask_ratio, noise)
