r"""Masked pretraining: the loop, its schedule, exact resume.

Step t draws its pictures, augmentation and masks from (seed, t) alone (:mod:`crate_core.stream`), so the
state of a run is its weights, the optimizer's averages and t.  A checkpoint holds these; a run that was cut
off at any moment goes on from the last one and, on a CPU with the same number of threads, ends with the bits
of the uncut run.

Book: :ref:`ch-first-training`.
"""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from tqdm import tqdm

from crate_core.architectures import build_model
from crate_core.data import open_data
from crate_core.frame import MaskedAutoencoder
from crate_core.recipes import (
    PretrainConfig,
    expected_range,
    image_size,
    learning_rate,
    parameter_groups,
    total_steps,
)
from crate_core.reconstruction import TrivialLoss, held_out_loss, save_reconstructions, some_pictures, trivial_loss
from crate_core.runs import (
    PICTURES_FILE,
    SUMMARY_FILE,
    PretrainResult,
    RunDirectory,
    describe,
    device_name,
    provenance,
    result_of,
    write_json,
)
from crate_core.shapes import Images
from crate_core.sources import ImageData
from crate_core.stream import (
    StepBatches,
    Stream,
    TrainingPictures,
    UnreadableCount,
    loader,
    local_rows,
    mask_noise,
    random_key,
)

PICTURES_SHOWN = 8


class TrainingDivergedError(ArithmeticError):
    """The loss or gradient is no longer finite; the message names step, learning rate and last good
    checkpoint.
    """


def initial_model(config: PretrainConfig) -> MaskedAutoencoder:
    """The model with weights drawn from ``config.seed``; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(random_key(config.seed))
        return build_model(config.model)


def make_accelerator(config: PretrainConfig) -> Accelerator:
    """Accelerate's view of the devices.  ``ValueError`` if the device asked for is not there."""
    # The state is one per process and would keep the precision of an earlier run.
    AcceleratorState._reset_state(reset_partial_state=True)
    precision = "no" if config.precision == "fp32" else config.precision
    accelerator = Accelerator(mixed_precision=precision, cpu=config.device == "cpu")
    if config.device not in ("auto", accelerator.device.type):
        raise ValueError(f"device={config.device!r}: this machine offers {accelerator.device.type!r}")
    return accelerator


def data_identity(data: ImageData) -> dict[str, Any]:
    """What of the data decides a run: how many pictures there are to train on, and the names of some of
    them.
    """
    count = len(data.train)
    names = [Path(data.train.name(i)).name for i in sorted({0, count // 2, count - 1})]
    return {"training pictures": count, "first, middle and last picture": names}


class Trainer:
    """The loop of one run, from its last checkpoint to its last step.

    Parameters
    ----------
    config : the run.
    data : training and held-out pictures.
    run : its directory, claimed already.
    accelerator : devices, precision and processes.
    report : gets one-line messages.

    Book: :ref:`ch-first-training`.
    """

    def __init__(
        self,
        config: PretrainConfig,
        data: ImageData,
        run: RunDirectory,
        accelerator: Accelerator,
        report: Callable[[str], None],
    ) -> None:
        self.config, self.data, self.run, self.accelerator, self.report = config, data, run, accelerator, report
        self.count = len(data.train)
        self.stop = total_steps(config, self.count)
        self.checkpoint = run.latest()
        self.step = 0
        self.pending: list[Tensor] = []  # (loss, gradient norm) of the steps since the last line of the log
        unreadable: dict[int, str] = {}
        self.model = initial_model(config)
        if self.checkpoint is not None:
            self.step = self.checkpoint.step
            self.pending = list(torch.tensor(self.checkpoint.progress["pending"], device=accelerator.device))
            unreadable = {int(index): message for index, message in self.checkpoint.progress["unreadable"].items()}
            self.model.load_weights(self.checkpoint.weights(), source=str(self.checkpoint.path))
        self.unreadable = UnreadableCount(self.count, config.max_unreadable, unreadable)
        optimizer = torch.optim.AdamW(
            parameter_groups(self.model, config.weight_decay),
            lr=config.peak_lr,
            betas=config.betas,
            fused=accelerator.device.type in ("cpu", "cuda"),
        )
        self.wrapped, self.optimizer = accelerator.prepare(self.model, optimizer)
        self.forward = torch.compile(self.wrapped) if config.compile else self.wrapped
        if self.checkpoint is not None:
            states = self.checkpoint.optimizer()
            self.optimizer.load_state_dict(states["optimizer"])
            if accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(states["scaler"])

    def batches(self) -> Iterable[Any]:
        """The batches of the steps that are left, this process's share."""
        config, accelerator = self.config, self.accelerator
        dataset = TrainingPictures(
            self.data.train, image_size(config.model), config.model.channels, config.augmentation, config.seed
        )
        order = StepBatches(
            self.count,
            config.batch_size,
            config.seed,
            self.step,
            self.stop,
            accelerator.process_index,
            accelerator.num_processes,
        )
        return loader(dataset, order, config.workers, pin=accelerator.device.type == "cuda")

    def update(self, images: Images) -> tuple[Tensor, Tensor]:
        """One step on this process's pictures in [0, 1]: the loss before it and the norm of its gradient."""
        config, accelerator = self.config, self.accelerator
        device = accelerator.device
        rows = local_rows(config.batch_size, accelerator.process_index, accelerator.num_processes)
        noise = mask_noise(config.seed, self.step, config.batch_size, math.prod(config.model.grid))[rows]
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config, self.count)
        images = self.model.standardize(images.to(device, non_blocking=True))
        loss = self.forward(images, config.mask_ratio, noise.to(device)).loss
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(self.wrapped.parameters(), config.clip_gradient or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach(), norm.detach()

    def fit(self, progress: bool) -> None:
        """Train to the last step; checkpoints, log and progress bar on the main process.

        Raises
        ------
        TrainingDivergedError, CheckpointError, ValueError
            See :func:`pretrain`.
        """
        config, main = self.config, self.accelerator.is_main_process
        if main:
            self.run.rewind_metrics(self.step)
        self.wrapped.train()
        bar = tqdm(total=self.stop, initial=self.step, unit="step", disable=not (progress and main), mininterval=0.5)
        with bar:
            for batch in self.batches():
                self.unreadable.add(batch, self.report)
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
                        bar.set_postfix(loss=f"{record['loss']:.4f}", lr=f"{record['lr']:.1e}", epoch=record["epoch"])
                if save:
                    self.save(values=[] if log else values)
                bar.update()

    def check_finite(self) -> list[list[float]]:
        """(loss, gradient norm) of the steps since the last line, averaged over processes; raises if not
        finite.
        """
        values = self.accelerator.reduce(torch.stack(self.pending), reduction="mean").tolist()
        for step, (loss, norm) in enumerate(values, start=self.step - len(values) + 1):
            # With a loss scaler an overflowing gradient is normal: the step is skipped and the scale lowered.
            if not math.isfinite(loss) or (self.accelerator.scaler is None and not math.isfinite(norm)):
                what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
                rate = learning_rate(step - 1, self.config, self.count)
                kept = self.run.latest()
                good = "there is no checkpoint yet" if kept is None else f"the last good checkpoint is {kept.path}"
                raise TrainingDivergedError(f"{what} at step {step} (learning rate {rate:.3g}); {good}")
        return values

    def record(self, values: list[list[float]]) -> dict[str, Any]:
        """A line of the log: means over the steps since the last one, and the last step's learning rate."""
        losses, norms = ([v[i] for v in values] for i in (0, 1))
        finite = [norm for norm in norms if math.isfinite(norm)]
        return {
            "step": self.step,
            "epoch": round(self.step * self.config.batch_size / self.count, 3),
            "loss": sum(losses) / len(losses),
            "lr": learning_rate(self.step - 1, self.config, self.count),
            "gradient_norm": sum(finite) / len(finite) if finite else None,
        }

    def save(self, values: list[list[float]]) -> None:
        """A checkpoint of the current step; ``values`` are what the log has not got yet."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            states = {"optimizer": self.optimizer.state_dict(), "scaler": scaler.state_dict() if scaler else {}}
            met = {str(index): message for index, message in self.unreadable.met.items()}
            self.checkpoint = self.run.save(self.step, self.model, states, {"pending": values, "unreadable": met})


def finish(trainer: Trainer, trivial: TrivialLoss, command: str) -> None:
    """Write weights, pictures and summary of a run whose steps are done; the summary last."""
    config, run, model = trainer.config, trainer.run, trainer.model
    pictures = some_pictures(trainer.data.held_out, config.model)
    epoch = math.ceil(trainer.count / config.batch_size)
    losses = [line["loss"] for line in run.logged() if line["step"] > trainer.step - max(epoch, 1)]
    model.save_pretrained(run.path)
    shown = pictures[:PICTURES_SHOWN]
    noise = mask_noise(0, 0, len(shown), math.prod(config.model.grid), Stream.EVALUATION_MASK)
    save_reconstructions(run.path / PICTURES_FILE, model, shown, config.mask_ratio, noise)
    summary = {
        "steps": trainer.step,
        "train_loss": sum(losses) / len(losses),
        "held_out_loss": held_out_loss(model, pictures, config.mask_ratio),
        "trivial_loss": {"mean_patch": trivial.mean_patch, "mean_picture": trivial.mean_picture},
        "expected_train_loss": expected_range(config, trainer.step, trainer.count),
        "unreadable": len(trainer.unreadable.met),
        "seed": config.seed,
        **provenance(command, device_name(trainer.accelerator.device)),
    }
    write_json(run.path / SUMMARY_FILE, summary)


def pretrain(
    config: PretrainConfig,
    progress: bool = True,
    report: Callable[[str], None] = print,
    command: str = "crate_core.train.pretrain",
) -> PretrainResult:
    r"""Pretrain a CRATE-MAE, or continue a run that was cut off.

    Minimises the mean squared error on removed patches with AdamW; see :mod:`crate_core.recipes` for the
    recipe.

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
        If the directory holds another run, the data cannot be used, too many pictures are unreadable, or the
        device is not there.
    FileNotFoundError
        If the data is not there.
    TrainingDivergedError
        If the loss or the gradient is no longer finite.
    CheckpointError
        If a checkpoint cannot be saved; the previous one is kept, and the same call continues from it.

    Book: :ref:`ch-first-training`.
    """
    accelerator = make_accelerator(config)
    main = accelerator.is_main_process

    def say(line: str) -> None:
        if main:
            report(line)

    data = open_data(config.data, config.data_root)
    run = RunDirectory(config.output_dir)
    identity = {**config.identity(), **data_identity(data)}
    say(f"data: {data.description}")
    if main:
        run.claim(identity, config.to_dict(), provenance(command, device_name(accelerator.device)))
    accelerator.wait_for_everyone()
    summary, latest = run.summary(), run.latest()
    steps = total_steps(config, len(data.train))
    if summary is not None and latest is not None and summary["steps"] == latest.step >= steps:
        result = result_of(run)
        say(f"{run.path} is finished: {latest.step:,} steps are done; nothing was trained")
        for line in describe(result):
            say(line)
        return result
    trivial = trivial_loss(initial_model(config), some_pictures(data.train, config.model))
    trainer = Trainer(config, data, run, accelerator, say)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    say(f"model: {parameters:,} parameters on {device_name(accelerator.device)}, {config.precision}")
    say(f"loss to beat: {trivial.mean_picture:.4f}, what predicting the mean picture costs")
    expected = expected_range(config, steps, trainer.count)
    if expected is not None:
        say(f"loss that is normal at the end: {expected[0]:.3f} to {expected[1]:.3f}")
    if trainer.step:
        say(f"continuing after step {trainer.step:,} of {trainer.stop:,}")
    trainer.fit(progress)
    if main:
        finish(trainer, trivial, command)
    accelerator.wait_for_everyone()
    result = result_of(run)
    for line in describe(result):
        say(line)
    return result
