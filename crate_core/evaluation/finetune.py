r"""Fine-tuning: an encoder with a linear classifier on top, trained whole with labels,
from pretrained weights or from scratch.

What is random in step t is a function of (seed, t) alone, for the whole batch, so that
a run that was cut off goes on exactly and several processes compute what one does, to
the order of sums.  RandAugment, erasing and mixing are timm's.

Book: :ref:`ch-evaluation`.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.data import Mixup
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip
from torchvision.transforms.functional import normalize, to_pil_image

from crate_core.checks import check_instance
from crate_core.data.batches import (
    MAX_UNREADABLE,
    Batch,
    StepBatches,
    TrainingPictures,
    UnreadableCount,
    evaluation_batches,
    loader,
    micro_batches,
    picture_key,
    readable_batches,
)
from crate_core.data.named import open_data
from crate_core.data.pictures import Picture
from crate_core.data.shards import order_of
from crate_core.data.sources import (
    ImageData,
    ImageSource,
    SelectedImages,
    data_identity,
)
from crate_core.data.transforms import fit, in_mode, to_tensor
from crate_core.data.understood import understood, with_labels
from crate_core.evaluation.finetune_recipe import FinetuneConfig
from crate_core.evaluation.labels import class_count
from crate_core.keys import Stream, random_generator, seeded
from crate_core.model.autoencoder import MaskedAutoencoder, evaluation_mode
from crate_core.model.build import fresh_model, load_model
from crate_core.model.classifier import Classifier
from crate_core.model.config import FrameConfig
from crate_core.model.files import weights_digest
from crate_core.records import device_name, provenance, write_json
from crate_core.training.devices import make_accelerator
from crate_core.training.loop import Loop, relative_directory
from crate_core.training.progress import Progress
from crate_core.training.recipe import Schedule
from crate_core.training.run_directory import SUMMARY_FILE, RunDirectory

SHIFT = 0.125
"""Largest shift, as a share of the side: four pixels of CIFAR-10's thirty-two."""


def layer_groups(
    model: Classifier, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    r"""AdamW's groups for the parameters that learn, with ``lr_scale``
    :math:`\gamma^{\,D + 1 - \ell}` for the learning rate of depth :math:`\ell` of
    0..D+1, and weight decay for matrices only.

    Book: :ref:`ch-evaluation`.
    """
    return param_groups_layer_decay(
        model,
        weight_decay,
        no_weight_decay_list=["autoencoder.class_token"],
        layer_decay=layer_decay,
    )


def picture_transform(
    config: FinetuneConfig, model: FrameConfig
) -> Callable[[Picture], Tensor]:
    """Training pictures to tensors (C, H, W) in model units, under the augmentations of
    a run; draws from the global generators of Python, numpy and torch.

    With crop_flip it is what timm's ``create_transform`` makes, as MAE uses it.
    """
    size, channels = model.image_shape, model.channels
    height, width = size
    steps: list[Any] = [lambda picture: in_mode(picture, channels)]
    if config.augmentation == "crop_flip":
        steps.append(RandomResizedCropAndInterpolation(size, interpolation="bicubic"))
    else:
        steps.append(lambda picture: fit(picture, size))
    if config.augmentation.startswith("shift"):
        edges = [round(SHIFT * width), round(SHIFT * height)]
        steps.append(RandomCrop(size, padding=edges, padding_mode="edge"))
    if config.augmentation.endswith("flip"):
        steps.append(RandomHorizontalFlip())
    mean, std = (list(v) for v in (model.pixel_mean or (), model.pixel_std or ()))
    if config.rand_augment is not None:
        grey = [min(255, round(255 * value)) for value in mean]
        settings = {
            "translate_const": int(0.45 * min(size)),
            "img_mean": tuple(grey) if channels > 1 else grey[0],
            "interpolation": 3,  # bicubic, as PIL numbers it
            # at ten timm would posterize to no bit at all, which Pillow refuses
            "magnitude_max": 9.99,
        }
        steps.append(lambda p: to_pil_image(p) if isinstance(p, Tensor) else p)
        steps.append(rand_augment_transform(config.rand_augment, settings))
    steps.append(lambda picture: to_tensor(picture, channels).clamp(0, 1))
    steps.append(lambda pixels: normalize(pixels, mean, std))
    if config.erasing:
        steps.append(RandomErasing(config.erasing, mode="pixel", device="cpu"))
    return Compose(steps)


class LabelledPictures(TrainingPictures):
    """Training pictures in model units under the augmentations of fine-tuning, each a
    function of (seed, epoch, picture).
    """

    def __init__(
        self, source: ImageSource, model: FrameConfig, config: FinetuneConfig
    ) -> None:
        super().__init__(source, model.image_shape, model.channels, "none", config.seed)
        self.settings = config, model

    def transform(self, picture: Picture, epoch: int, index: int) -> Tensor:
        """The picture as epoch ``epoch`` sees it."""
        with seeded(picture_key(self.seed, epoch, index)):
            return self.shown(picture)

    @cached_property
    def shown(self) -> Callable[[Picture], Tensor]:
        """Made where it is first used, in a loader's process: it cannot be pickled."""
        return picture_transform(*self.settings)


def paired_rows(batch_size: int, part: int, parts: int) -> list[int]:
    """Rows of a batch of B that one of several parts works on: a piece of the first
    half, and the same piece from the end.

    Rows i and B - 1 - i stay in one part, since timm's Mixup pairs picture i of what it
    gets with the i-th from its end.
    """
    piece = batch_size // parts // 2
    first = range(part * piece, (part + 1) * piece)
    return [*first, *(batch_size - 1 - row for row in reversed(first))]


@dataclass(frozen=True)
class FinetuneResult:
    """How a run ended: ``accuracy`` is that of the last step's classifier on the
    ``held_out`` pictures that could be read, in [0, 1]; ``best_accuracy`` the highest
    after any epoch, chosen on the pictures that it is over, so a little too good.

    ``curve`` has a record per epoch (step, epoch, held_out_accuracy, held_out_loss);
    ``train_loss`` is the mean over the last epoch's steps of what was minimised;
    ``unreadable`` the number of training pictures that could not be read,
    ``held_out_unreadable`` names those that accuracies leave out.
    """

    output_dir: Path
    steps: int
    accuracy: float
    best_accuracy: float
    best_epoch: float
    train_loss: float
    held_out: int
    curve: tuple[dict[str, float], ...]
    unreadable: int
    held_out_unreadable: tuple[str, ...]

    def describe(self) -> list[str]:
        """In lines: accuracies and where things are."""
        lines = [
            f"held-out accuracy   {self.accuracy:.4f}   on {self.held_out:,} pictures "
            "after the last step",
            f"best epoch          {self.best_accuracy:.4f}   after epoch "
            f"{self.best_epoch:g}, chosen on the same pictures",
        ]
        if self.unreadable:
            lines.append(
                f"unreadable pictures {self.unreadable}, named above, replaced "
                "by others"
            )
        if self.held_out_unreadable:
            names = ", ".join(self.held_out_unreadable[:3])
            lines.append(
                f"unreadable held-out {len(self.held_out_unreadable)}, left "
                f"out ({names})"
            )
        return [
            *lines,
            f"saved in {self.output_dir}: the last classifier; best: in best",
        ]


def result_of(run: RunDirectory) -> FinetuneResult:
    """The result that a finished run wrote; ``ValueError`` if it is not finished."""
    summary = run.summary()
    if summary is None:
        raise ValueError(f"{run.path} holds no {SUMMARY_FILE}: the run is not finished")
    return FinetuneResult(
        output_dir=run.path,
        steps=summary["steps"],
        accuracy=summary["held_out_accuracy"],
        best_accuracy=summary["best"]["held_out_accuracy"],
        best_epoch=summary["best"]["epoch"],
        train_loss=summary["train_loss"],
        held_out=summary["held_out"],
        curve=tuple(run.evaluated()),
        unreadable=summary["unreadable"],
        held_out_unreadable=tuple(summary["held_out_unreadable"]),
    )


@torch.no_grad()
def accuracy(
    model: Classifier,
    source: ImageSource,
    workers: int = 0,
    max_unreadable: float = MAX_UNREADABLE,
) -> float:
    """Share of a labelled source's readable pictures that the classifier gets right, in
    evaluation mode; a warning names those that cannot be read.

    Raises ``ValueError`` if none can be read, more than ``max_unreadable`` cannot, or
    there are no labels.
    """
    if source.labels is None:
        raise ValueError("accuracy needs labels; these pictures have none")
    unreadable = UnreadableCount(len(source), max_unreadable, {}, "held-out")
    config = model.autoencoder.config
    size, channels = config.image_shape, config.channels
    batches = readable_batches(source, size, channels, unreadable, workers=workers)
    right, _, seen = scored(model, source, batches)
    return right / seen


@torch.no_grad()
def scored(
    model: Classifier, source: ImageSource, batches: Iterable[Batch]
) -> tuple[float, float, float]:
    """How many pictures of some batches of a source are classified rightly, the sum of
    their cross-entropies, and how many there are.
    """
    totals = torch.zeros(3, dtype=torch.float64)
    device = next(model.parameters()).device
    with evaluation_mode(model):
        for batch in batches:
            if not len(batch.images):
                continue
            labels = torch.as_tensor(source.labels)[batch.indices]
            scores = model(model.standardize(batch.images.to(device))).float().cpu()
            right = (scores.argmax(dim=1) == labels).sum()
            loss = F.cross_entropy(scores, labels, reduction="sum")
            totals += torch.stack([right, loss, torch.tensor(len(labels))]).double()
    right, loss, seen = totals.tolist()
    return right, loss, seen


class FinetuneTrainer(Loop[FinetuneConfig, Classifier]):
    r"""Fine-tuning's steps in the common loop (:mod:`crate_core.training.loop`).

    Minimises :math:`-\sum_k t_k \log \mathrm{softmax}(\mathrm{logits})_k` with AdamW,
    where t is the label smoothed by s, :math:`t = (1 - s)\,e_y + s /
    \mathrm{classes}`, or what mixing makes of two of them.

    Parameters
    ----------
    config, data, run, accelerator, report, report_unreadable : as of ``Loop``; both
        parts of the data have labels.
    start : pretrained or fresh; it is changed in place.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        data: ImageData,
        run: RunDirectory,
        accelerator: Accelerator,
        report: Callable[[str], None],
        report_unreadable: Callable[[str], None],
        start: MaskedAutoencoder,
    ) -> None:
        self.start, self.classes = start, class_count(data)
        self.labels = torch.as_tensor(data.train.labels)
        self.mixup = (
            Mixup(
                config.mixup,
                config.cutmix,
                label_smoothing=config.label_smoothing,
                num_classes=self.classes,
            )
            if config.mixes
            else None
        )
        schedule = Schedule(config, len(data.train))
        super().__init__(
            config, schedule, data, run, accelerator, report, report_unreadable
        )

    def initial_model(self) -> Classifier:
        """A classifier of zeros on the starting weights."""
        names = self.data.classes if len(self.data.classes) == self.classes else ()
        model = Classifier(self.start, self.classes, self.config.pooling, names)
        model.set_drop_path(self.config.drop_path)
        return model

    def distributed(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The classifier and its AdamW, a copy on each process."""
        config, accelerator = self.config, self.accelerator
        optimizer = torch.optim.AdamW(
            layer_groups(self.model, config.weight_decay, config.rate_decay),
            lr=config.peak_lr,
            betas=config.betas,
            fused=accelerator.device.type in ("cpu", "cuda"),
        )
        return accelerator.prepare(self.model, optimizer)

    def about(self) -> Iterator[str]:
        """The classifier and what of it learns."""
        learning = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        scratch = "from scratch " if self.config.from_scratch else ""
        yield (
            f"classifier: {self.classes} classes, {learning:,} parameters that learn "
            f"{scratch}on {self.where()}"
        )

    def parts(self) -> list[Sequence[int]]:
        """Rows of the batch that this process works on, micro-batch by micro-batch.

        Raises ``ValueError`` unless all have the same size, and an even one to mix.
        """
        config, accelerator = self.config, self.accelerator
        own, all_own = accelerator.process_index, accelerator.num_processes
        rows = micro_batches(config.batch_size, own, all_own, config.accumulate)
        if self.mixup is None:
            return list(rows)
        if len(rows[0]) % 2:
            raise ValueError(
                f"batch_size={config.batch_size} must be a multiple of processes times "
                f"accumulate times two, {all_own} x {config.accumulate} x 2: mixing "
                "pairs the pictures of a part"
            )
        return [
            paired_rows(config.batch_size, part, all_own * config.accumulate)
            for part in range(own * config.accumulate, (own + 1) * config.accumulate)
        ]

    def batches(self) -> Iterable[Batch]:
        """The micro-batches of the steps that are left, this process's share."""
        config = self.config
        order = StepBatches(
            self.count,
            config.batch_size,
            config.seed,
            self.step,
            self.schedule.steps,
            order=order_of(self.data.train, config.seed, config.batch_size),
        )
        order.parts = self.parts()
        return loader(
            LabelledPictures(self.data.train, self.start.config, config),
            order,
            config.workers,
            pin=self.accelerator.device.type == "cuda",
        )

    def drop_noise(self) -> Tensor:
        """What the branches of the next step are dropped by: (branches, B), one column
        per picture of the whole batch.
        """
        generator = random_generator(self.config.seed, Stream.DROP, self.step)
        branches = len(self.model.drop_paths())
        return torch.rand(branches, self.config.batch_size, generator=generator)

    def micro_losses(self) -> list[Callable[[Batch], Tensor]]:
        """The cross-entropy of each micro-batch, under the step's dropped branches."""
        noise = self.drop_noise()
        return [
            partial(self.labelled_loss, noise=noise[:, list(rows)])
            for rows in self.parts()
        ]

    def labelled_loss(self, batch: Batch, noise: Tensor) -> Tensor:
        """The cross-entropy of a micro-batch, mixed with itself if the run mixes."""
        config, device = self.config, self.accelerator.device
        images = batch.images.to(device, non_blocking=True)
        targets = self.labels[batch.indices].to(device)
        smoothing = config.label_smoothing
        if self.mixup is not None:
            # the same weight and box in all parts of the batch
            with seeded(config.seed, Stream.MIX, self.step):
                images, targets = self.mixup(images, targets)
            smoothing = 0.0
        self.model.set_drop_noise(noise.to(device))
        scores = self.forward(images).float()
        return F.cross_entropy(scores, targets, label_smoothing=smoothing)

    def due(self) -> bool:
        """Whether an epoch ends."""
        last = self.step == self.schedule.steps
        return last or self.schedule.passes(self.step, 1.0)

    def to_save(self) -> bool:
        """Whether a checkpoint is due: every so many steps, and after each epoch."""
        return super().to_save() or self.due()

    def evaluate(self, shown: Progress) -> None:
        """Accuracy on held-out pictures, each process on its share; the best model is
        kept.
        """
        accelerator, config = self.accelerator, self.config
        source, frame = self.data.held_out, self.start.config
        process, processes = accelerator.process_index, accelerator.num_processes
        rows = torch.arange(len(source))[process::processes].numpy()
        mine = SelectedImages(source, rows)
        met: dict[int, str] = {}

        def noted() -> Iterator[Batch]:
            for batch in evaluation_batches(
                mine, frame.image_shape, frame.channels, workers=config.workers
            ):
                met.update({int(rows[i]): said for i, said in batch.unreadable})
                yield batch

        with accelerator.autocast():
            counts = torch.tensor(scored(self.model, mine, noted()))
        right, loss, seen = accelerator.reduce(
            counts.to(accelerator.device), reduction="sum"
        ).tolist()
        for others in gather_object([met]) if processes > 1 else []:
            met |= others
        if not seen or len(met) > config.max_unreadable * len(source):
            raise ValueError(
                f"{len(met)} of {len(source)} held-out pictures cannot be read; the "
                f"run stops above {config.max_unreadable:.1%} (max_unreadable). The "
                f"first: {met[min(met)]}"
            )
        scores = {"held_out_accuracy": right / seen, "held_out_loss": loss / seen}
        self.progress["held_out"] = {
            "pictures": int(seen),
            "unreadable": [met[index] for index in sorted(met)],
        }
        best = self.progress.get("best")
        better = best is None or scores["held_out_accuracy"] > best["held_out_accuracy"]
        if better:
            self.progress["best"] = {**self.position(), **scores}
        if accelerator.is_main_process:
            if better:
                self.run.keep_best(self.step, self.model)
            self.log_evaluation(scores, shown)
        accelerator.wait_for_everyone()

    def saved(self) -> None:
        """The best model's folder is that which the checkpoint knows of."""
        best = self.progress.get("best")
        if best is not None:
            self.run.show_best(best["step"])

    def write_result(self, model: Classifier, command: str) -> None:
        """The last classifier and, last, the summary."""
        model.save_pretrained(self.run.path)
        last = self.run.evaluated()[-1]
        summary = {
            "steps": self.step,
            "train_loss": self.last_epoch_loss(),
            "held_out_accuracy": last["held_out_accuracy"],
            "held_out_loss": last["held_out_loss"],
            "best": self.progress["best"],
            "held_out": self.progress["held_out"]["pictures"],
            "held_out_unreadable": self.progress["held_out"]["unreadable"],
            "unreadable": len(self.unreadable.met),
            "classes": self.classes,
            "seed": self.config.seed,
            **provenance(command, device_name(self.accelerator.device)),
        }
        write_json(self.run.path / SUMMARY_FILE, summary)


def finetune(
    config: FinetuneConfig,
    progress: bool = True,
    report: Callable[[str], None] = print,
    command: str = "crate_core.evaluation.finetune.finetune",
    *,
    model: MaskedAutoencoder | None = None,
    data: ImageData | None = None,
) -> FinetuneResult:
    r"""Train an encoder and a classifier on it with labels, or continue a run that was
    cut off; of several seeds the first (:func:`finetune_seeds` runs all).

    ``Classifier.from_pretrained(config.output_dir)`` loads the last classifier, and of
    the folder ``best`` in it the best; ``load_model`` of either gives the encoder to
    every tool that opens a model.

    Parameters
    ----------
    config : the run; ``config.output_dir`` is where it lives.
    progress : show a progress bar on stderr.
    report : gets each line of text.
    command : what to record as the command.
    model : start from this in place of ``config.checkpoint``; it is left as it is.
    data : take this in place of ``config.data``; fits on ``train``, scores
        ``held_out``.

    Raises
    ------
    ValueError
        If the directory holds another run, pictures have no labels or labels out of
        range, too many are unreadable, the batch cannot be split, or the model is to be
        compiled and there is no compiler.
    FileNotFoundError
        If checkpoint or data are not there.
    TrainingDivergedError
        If the loss is no longer finite.
    TrainingStoppedError
        If SIGTERM or SIGUSR1 came: the step was finished and a checkpoint written.
    CheckpointError
        If a checkpoint cannot be saved; the previous one is kept, and the same call
        continues from it.

    Book: :ref:`ch-evaluation`.
    """
    check_instance("config", config, FinetuneConfig, "a FinetuneConfig")
    accelerator = make_accelerator(config)
    main = accelerator.is_main_process

    def say(line: str) -> None:
        if main:
            report(line)

    start = load_model(config.checkpoint) if model is None else copy.deepcopy(model)
    if config.from_scratch:
        start = fresh_model(start.config, config.seed)
    with accelerator.main_process_first():
        opened = open_data(config.data, config.data_root) if data is None else data
    for line in understood(opened):
        say(line)
    labelled = with_labels(opened) or opened
    identity = {
        **config.identity(),
        **data_identity(labelled),
        "classes": class_count(labelled),
        "starting weights": weights_digest(start.state_dict()),
    }
    run = RunDirectory(config.output_dir)
    try:
        if main:
            begun = {
                **provenance(command, device_name(accelerator.device)),
                "started_from": relative_directory(run.path),
            }
            run.claim(identity, config.to_dict(), begun)
        accelerator.wait_for_everyone()
        if run.finished(Schedule(config, len(labelled.train)).steps):
            steps = f"{result_of(run).steps:,} steps are done"
            say(f"{run.path} is finished: {steps}; nothing was trained")
        else:
            trainer = FinetuneTrainer(
                config, labelled, run, accelerator, say, report, start
            )
            trainer.introduce()
            trainer.fit(progress)
            trainer.finish(command)
        result = result_of(run)
        for line in result.describe():
            say(line)
        return result
    finally:
        run.release()


def finetune_seeds(
    config: FinetuneConfig,
    progress: bool = True,
    report: Callable[[str], None] = print,
    command: str = "crate_core.evaluation.finetune.finetune_seeds",
    *,
    model: MaskedAutoencoder | None = None,
    data: ImageData | None = None,
) -> list[FinetuneResult]:
    """:func:`finetune` once for each of ``config.seeds`` seeds, with mean and standard
    deviation of the accuracies at the end if there are several.
    """
    check_instance("config", config, FinetuneConfig, "a FinetuneConfig")
    if config.seeds == 1:
        return [finetune(config, progress, report, command, model=model, data=data)]
    results = []
    for seed in range(config.seed, config.seed + config.seeds):
        own = replace(
            config,
            seed=seed,
            seeds=1,
            output_dir=str(Path(config.output_dir) / f"seed-{seed}"),
        )
        report(f"seed {seed}")
        results.append(finetune(own, progress, report, command, model=model, data=data))
    found = torch.tensor([result.accuracy for result in results], dtype=torch.float64)
    report(
        f"held-out accuracy {found.mean():.4f} ± {found.std():.4f} over "
        f"{len(results)} seeds"
    )
    return results
