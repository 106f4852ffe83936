r"""Masked pretraining: a run, and what a step of it is; the loop around the steps, with
exact resume, is :mod:`crate_core.training.loop`.

Book: :ref:`ch-first-training`, :ref:`ch-pretraining`.
"""

import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from crate_core.checks import check_instance
from crate_core.data.batches import (
    Batch,
    StepBatches,
    TrainingPictures,
    loader,
    local_rows,
    some_batches,
    some_pictures,
)
from crate_core.data.named import open_data
from crate_core.data.shards import order_of
from crate_core.data.sources import ImageData, data_identity
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
from crate_core.training.devices import (
    distribute,
    make_accelerator,
    whole_weights,
)
from crate_core.training.loop import Loop, relative_directory
from crate_core.training.progress import Progress
from crate_core.training.recipe import Plan, PretrainConfig
from crate_core.training.run_directory import (
    PICTURES_FILE,
    SUMMARY_FILE,
    PretrainResult,
    RunDirectory,
    branch_of,
    describe,
    result_of,
)
from crate_core.training.yardsticks import (
    TrivialLoss,
    held_out_loss,
    save_reconstructions,
    trivial_loss,
)

Evaluator = Callable[[MaskedAutoencoder, ImageData], Mapping[str, float]]

PICTURES_SHOWN = 8
"""Held-out pictures in a figure of reconstructions."""


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
    CheckpointError
        If a checkpoint cannot be saved; the previous one is kept, and the same call
        continues from it.

    Book: :ref:`ch-first-training`.
    """
    check_instance("config", config, PretrainConfig, "a PretrainConfig")
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


class Trainer(Loop[PretrainConfig, MaskedAutoencoder]):
    """Pretraining's steps in the common loop (:mod:`crate_core.training.loop`).

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
        self.plan = Plan(config, len(data.train))
        self.trivial = TrivialLoss(math.nan, math.nan)
        self.evaluators = [evaluator(name) for name in config.evaluators]
        super().__init__(
            config, self.plan, data, run, accelerator, report, report_unreadable
        )

    def initial_model(self) -> MaskedAutoencoder:
        """Fresh weights of the run's seed."""
        return fresh_model(self.config.model, self.config.seed)

    def distributed(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The model and its AdamW, as a copy or as a share."""
        return distribute(self.model, self.config, self.accelerator)

    def about(self) -> Iterator[str]:
        """The model, the loss to beat and, where it is known, the normal one."""
        config = self.config
        if self.accelerator.is_main_process:
            # what the end needs is looked for before the work: some held-out picture
            some_pictures(self.data.held_out, config.model, PICTURES_SHOWN)
            for name in config.evaluators:
                evaluator_check(name)(self.data)
            pictures = some_batches(self.data.train, config.model)
            self.trivial = trivial_loss(
                fresh_model(config.model, config.seed), pictures
            )
        parameters = sum(p.numel() for p in self.model.parameters())
        yield f"model: {parameters:,} parameters on {self.where()}"
        yield (
            f"loss to beat: {self.trivial.mean_picture:.4f}, "
            "what predicting the mean picture costs"
        )
        normal = self.plan.expected_final
        if normal is not None:
            yield f"loss that is normal at the end: {normal[0]:.3f} to {normal[1]:.3f}"

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

    def micro_losses(self) -> list[Callable[[Batch], Tensor]]:
        """The error on what the step's masks remove of each micro-batch; all remove
        equally many patches.
        """
        config, accelerator = self.config, self.accelerator
        rows = local_rows(
            config.batch_size, accelerator.process_index, accelerator.num_processes
        )
        noise = mask_noise(
            config.seed, self.step, config.batch_size, math.prod(config.model.grid)
        )[rows]
        chances = noise.split(len(noise) // config.accumulate)
        return [partial(self.masked_loss, chances=own) for own in chances]

    def masked_loss(self, batch: Batch, chances: Tensor) -> Tensor:
        """The error on the patches with the largest chances."""
        device = self.accelerator.device
        images = batch.images.to(device, non_blocking=True)
        standardized = self.model.standardize(images)
        ratio = self.config.mask_ratio
        return self.forward(standardized, ratio, chances.to(device)).loss

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

    def due(self) -> bool:
        """Whether the run passes a multiple of ``evaluate_epochs``."""
        return self.plan.passes(self.step, self.config.evaluate_epochs)

    def milestone(self) -> bool:
        """Whether the run passes a multiple of ``milestone_epochs``."""
        return self.plan.passes(self.step, self.config.milestone_epochs)

    def after_step(self, shown: Progress) -> None:
        """Reconstructions by the current weights, every so many steps."""
        every = self.config.picture_every
        if every is not None and self.step % every == 0:
            self.draw(shown)

    def evaluate(self, shown: Progress) -> None:
        """The held-out loss and what the evaluators give, by the main process."""
        model = self.whole_model()
        if self.accelerator.is_main_process and model is not None:
            pictures = some_batches(self.data.held_out, self.config.model)
            loss = held_out_loss(model, pictures, self.config.mask_ratio)
            scores = {"held_out_loss": loss}
            for evaluate in self.evaluators:
                scores |= evaluate(model, self.data)
            self.log_evaluation(scores, shown)
        self.accelerator.wait_for_everyone()

    def draw(self, shown: Progress) -> None:
        """A picture of reconstructions by the current weights."""
        model = self.whole_model()
        if self.accelerator.is_main_process and model is not None:
            path = shown.picture_path(self.step)
            with self.run.writing("the picture of reconstructions"):
                draw_reconstructions(path, model, self.data, self.config)
            shown.show_picture(path, self.step)

    def write_result(self, model: MaskedAutoencoder, command: str) -> None:
        """Weights, pictures and, last, the summary."""
        config, run = self.config, self.run
        left_out: list[str] = []
        pictures = some_batches(
            self.data.held_out, config.model, report=left_out.append
        )
        model.save_pretrained(run.path)
        draw_reconstructions(run.path / PICTURES_FILE, model, self.data, config)
        summary = {
            "steps": self.step,
            "train_loss": self.last_epoch_loss(),
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


def evaluator_check(name: str) -> Callable[[ImageData], None]:
    """What looks, before the first step, whether data are what an evaluator needs:
    FUNCTION_check beside it, which raises ``ValueError``, if there is one.
    """
    module, _, function = name.partition(":")
    found = getattr(importlib.import_module(module), f"{function}_check", None)
    return (lambda data: None) if found is None else found


def draw_reconstructions(
    path: Path, model: MaskedAutoencoder, data: ImageData, config: PretrainConfig
) -> None:
    """A few held-out pictures under fixed masks, filled in by the model."""
    pictures = some_pictures(data.held_out, config.model, PICTURES_SHOWN)
    noise = evaluation_noise(0, len(pictures), math.prod(config.model.grid))
    save_reconstructions(path, model, pictures, config.mask_ratio, noise)
