r"""Masked pretraining: the loop, its schedule, exact resume.

Step t draws its pictures, augmentation and masks from (seed, t) alone (:mod:`crate_core.stream`), so the state of a run
is its weights, the optimizer's averages and t.  A checkpoint holds these; a run that was cut off at any moment goes on
from the last one and, on a CPU with the same number of threads, ends with the bits of the uncut run.

Book: :ref:`ch-first-training`.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from tqdm import tqdm

from crate_core.data import open_data
from crate_core.model import CrateMAE
from crate_core.pictures import save_reconstructions
from crate_core.recipes import PRESETS, PretrainConfig
from crate_core.runs import PICTURES_FILE, SUMMARY_FILE, RunDirectory, device_name, provenance, write_json
from crate_core.shapes import Images
from crate_core.sources import ImageData, ImageSource
from crate_core.stream import (
    StepBatches,
    Stream,
    TrainingPictures,
    UnreadableCount,
    evaluation_batches,
    loader,
    local_rows,
    mask_noise,
    random_key,
)

YARDSTICK_PICTURES = 2048
"""How many pictures the trivial and the held-out loss are measured on, at most."""

PICTURES_SHOWN = 8


class TrainingDivergedError(ArithmeticError):
    """The loss or gradient is no longer finite; the message names step, learning rate and last good checkpoint."""


@dataclass(frozen=True)
class TrivialLoss:
    """What knowing nothing of the visible patches costs, in model units.

    ``mean_patch``: predicting one patch, the mean of all; ``mean_picture``: at each position that position's mean.
    """

    mean_patch: float
    mean_picture: float


@dataclass(frozen=True)
class PretrainResult:
    """How a run ended; losses are means over removed patches, in model units.

    ``train_loss`` is the mean over the last epoch's steps, ``held_out_loss`` that of held-out pictures under fixed
    masks; ``expected`` the range of ``train_loss`` that is normal for an unchanged preset, else ``None``.
    """

    output_dir: Path
    steps: int
    train_loss: float
    held_out_loss: float
    trivial: TrivialLoss
    expected: tuple[float, float] | None
    unreadable: int


def learning_rate(step: int, config: PretrainConfig, pictures: int) -> float:
    r"""Learning rate of a step (counted from 0), linear warm-up and half a cosine,

    .. math:: \eta(e) = \eta_{\max} \begin{cases} e / w & e < w \\
              \tfrac12 \big(1 + \cos \pi \tfrac{e - w}{E - w}\big) & e \ge w \end{cases}, \qquad e = tB/n,

    with w warm-up epochs, E epochs, batch size B and n ``pictures``; zero from epoch E on.

    Book: :ref:`ch-first-training`.  MAE's schedule, which also changes every step.
    """
    epoch = step * config.batch_size / pictures
    if epoch < config.warmup_epochs:
        return config.peak_lr * epoch / config.warmup_epochs
    progress = (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return config.peak_lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def total_steps(config: PretrainConfig, pictures: int) -> int:
    """Steps of a run: ``epochs`` passes over the pictures, rounded up, or ``max_steps`` if that is fewer."""
    steps = math.ceil(config.epochs * pictures / config.batch_size)
    return steps if config.max_steps is None else min(steps, config.max_steps)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: decay for matrices (and the two tokens, as in MAE), none for biases, norms and other vectors."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def initial_model(config: PretrainConfig) -> CrateMAE:
    """The model with weights drawn from ``config.seed``; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(random_key(config.seed))
        return CrateMAE(config.model)


def trivial_loss(model: CrateMAE, images: Images) -> TrivialLoss:
    r"""The loss of predicting means, from the variance of the targets :math:`t_{ijk}` (picture, position, pixel),

    .. math:: \mathrm{mean}_{ijk} (t_{ijk} - \bar t_{k})^2 \quad\text{and}\quad
              \mathrm{mean}_{ijk} (t_{ijk} - \bar t_{jk})^2.

    Parameters
    ----------
    model : gives the units, and whether targets are normalised.
    images : (B, C, H, W) in [0, 1].

    Book: :ref:`ch-first-training`.
    """
    targets = model.targets(model.standardize(images)).double()
    return TrivialLoss(
        float((targets - targets.mean(dim=(0, 1))).square().mean()),
        float((targets - targets.mean(dim=0)).square().mean()),
    )


@torch.no_grad()
def held_out_loss(model: CrateMAE, images: Images, mask_ratio: float, seed: int = 0, batch_size: int = 256) -> float:
    """Mean loss of pictures (B, C, H, W) in [0, 1] under masks fixed by ``seed``, in evaluation mode.

    Book: :ref:`ch-first-training`.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    length = math.prod(model.config.grid)
    noise = mask_noise(seed, 0, len(images), length, Stream.EVALUATION_MASK)
    total = 0.0
    for rows in torch.arange(len(images)).split(batch_size):
        loss = model(model.standardize(images[rows].to(device)), mask_ratio, noise[rows].to(device)).loss
        total += float(loss) * len(rows)
    model.train(was_training)
    return total / len(images)


def some_pictures(source: ImageSource, config: PretrainConfig, count: int) -> Images:
    """Up to ``count`` readable pictures (B, C, H, W) in [0, 1], spread evenly over a source, not augmented.

    Raises ``ValueError`` if none is readable.
    """
    from crate_core.sources import SelectedImages

    chosen = torch.linspace(0, len(source) - 1, min(count, len(source))).round().long().numpy()
    batches = evaluation_batches(SelectedImages(source, chosen), config.image_size, config.model.channels)
    images = torch.cat([batch.images for batch in batches])
    if len(images) == 0:
        raise ValueError(f"none of {len(chosen)} pictures can be read, the first: {source.name(int(chosen[0]))}")
    return images


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
    """What of the data decides a run: how many pictures there are to train on, and the names of some of them."""
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
        if self.checkpoint is not None:
            states = self.checkpoint.optimizer()
            self.optimizer.load_state_dict(states["optimizer"])
            if accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(states["scaler"])

    def batches(self) -> Iterable[Any]:
        """The batches of the steps that are left, this process's share."""
        config, accelerator = self.config, self.accelerator
        dataset = TrainingPictures(
            self.data.train, config.image_size, config.model.channels, config.augmentation, config.seed
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
        loss = self.wrapped(images, config.mask_ratio, noise.to(device)).loss
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
        """(loss, gradient norm) of the steps since the last line, averaged over processes; raises if not finite."""
        values = self.accelerator.reduce(torch.stack(self.pending), reduction="mean").tolist()
        for back, (loss, norm) in enumerate(reversed(values)):
            # With a loss scaler an overflowing gradient is normal: the step is skipped and the scale lowered.
            if not math.isfinite(loss) or (self.accelerator.scaler is None and not math.isfinite(norm)):
                step = self.step - back
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


def expected_range(config: PretrainConfig, steps: int, pictures: int) -> tuple[float, float] | None:
    """The final training loss that is normal for a preset, if the run is that preset but for its seed, else ``None``."""
    preset = PretrainConfig.from_preset(config.preset, seed=config.seed)
    whole = steps == total_steps(preset, pictures)
    return PRESETS[config.preset].loss if whole and preset.identity() == config.identity() else None


def finish(trainer: Trainer, trivial: TrivialLoss, command: str) -> PretrainResult:
    """Write weights, pictures and summary of a run whose steps are done; the summary last."""
    config, run, model = trainer.config, trainer.run, trainer.model
    pictures = some_pictures(trainer.data.held_out, config, YARDSTICK_PICTURES)
    epoch = math.ceil(trainer.count / config.batch_size)
    losses = [line["loss"] for line in run.logged() if line["step"] > trainer.step - max(epoch, 1)]
    result = PretrainResult(
        output_dir=run.path,
        steps=trainer.step,
        train_loss=sum(losses) / len(losses),
        held_out_loss=held_out_loss(model, pictures, config.mask_ratio),
        trivial=trivial,
        expected=expected_range(config, trainer.step, trainer.count),
        unreadable=len(trainer.unreadable.met),
    )
    model.save_pretrained(run.path)
    shown = pictures[:PICTURES_SHOWN]
    noise = mask_noise(0, 0, len(shown), math.prod(config.model.grid), Stream.EVALUATION_MASK)
    save_reconstructions(run.path / PICTURES_FILE, model, shown, config.mask_ratio, noise)
    summary = {
        "steps": result.steps,
        "train_loss": result.train_loss,
        "held_out_loss": result.held_out_loss,
        "trivial_loss": {"mean_patch": trivial.mean_patch, "mean_picture": trivial.mean_picture},
        "expected_train_loss": result.expected,
        "unreadable": result.unreadable,
        "seed": config.seed,
        **provenance(command, device_name(trainer.accelerator.device)),
    }
    write_json(run.path / SUMMARY_FILE, summary)
    return result


def result_of(run: RunDirectory, summary: dict[str, Any]) -> PretrainResult:
    """The result that a finished run wrote."""
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
    lines.append(f"saved in {result.output_dir}: model.safetensors, config.json, run.json, metrics.jsonl, {PICTURES_FILE}")
    return lines


def pretrain(
    config: PretrainConfig,
    progress: bool = True,
    report: Callable[[str], None] = print,
    command: str = "crate_core.train.pretrain",
) -> PretrainResult:
    r"""Pretrain a CRATE-MAE, or continue a run that was cut off.

    Minimises the mean squared error on removed patches with AdamW; see :mod:`crate_core.recipes` for the recipe.

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
        If the directory holds another run, the data cannot be used, too many pictures are unreadable, or the device
        is not there.
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
        result = result_of(run, summary)
        say(f"{run.path} is finished: {latest.step:,} steps are done; nothing was trained")
        for line in describe(result):
            say(line)
        return result
    trivial = trivial_loss(initial_model(config), some_pictures(data.train, config, YARDSTICK_PICTURES))
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
    result = finish(trainer, trivial, command) if main else None
    accelerator.wait_for_everyone()
    result = result or result_of(run, run.summary() or {})
    for line in describe(result):
        say(line)
    return result
