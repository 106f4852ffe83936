r"""What a pretraining run is: one frozen, validated record, its presets, and the loss
each preset should reach.

The recipe is that of MAE (He et al., 2022): AdamW with betas (0.9, 0.95), peak learning
rate ``lr * batch_size / 256``, warm-up over 40 of 800 epochs and a half cosine to zero,
weight decay 0.05 except on biases and norms, masking ratio 0.75.  The authors of
CRATE-MAE publish no pretraining code; where a preset departs from MAE its docstring
says so.

Book: :ref:`ch-first-training`.
"""

import math
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from torch import nn

from crate_core.data.pictures import Augmentation
from crate_core.model.config import (
    CrateMAEConfig,
    ModelConfig,
    ViTMAEConfig,
    config_from_dict,
)

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["fp32", "bf16", "fp16"]

OPERATIONAL = frozenset(
    {
        "output_dir",
        "max_steps",
        "checkpoint_every",
        "workers",
        "device",
        "data_root",
        "compile",
    }
    | {"accumulate", "shard", "tensorboard", "picture_every"}
)
"""Fields that may change when a run is continued: where, how far and how fast, not
what.  (Another device, process count, ``accumulate`` or ``shard`` sums the same numbers
in another order: equal up to rounding, not bit by bit.)
"""

LATER = {"streaming": False}
"""Fields that older runs do not know, with what they did; left out of a run's identity
at this value.
"""


@dataclass(frozen=True)
class PretrainConfig:
    """Every choice of a pretraining run.

    Raises
    ------
    ValueError
        On construction, naming the field, what was given and what is accepted.

    Book: :ref:`ch-first-training`.
    """

    preset: str = "digits"
    """Recipe that the other fields default to; see crate_core.training.recipe.PRESETS.
    """
    output_dir: str = ""
    """Where weights, config, logs and checkpoints go; runs/PRESET unless given."""
    data: str = "digits"
    """digits, folder:PATH, torchvision:NAME, or hf:NAME-OR-PARQUET-PATH."""
    model: ModelConfig = field(default_factory=lambda: CrateMAEConfig.preset("digits"))
    """The model; image_size is what pictures are cropped to."""
    epochs: float = 800.0
    """Passes over the training pictures; they set the learning-rate schedule."""
    max_steps: int | None = None
    """Stop after this many steps; the schedule stays that of epochs. A larger number
    continues the run.
    """
    batch_size: int = 4096
    """Pictures in a step, all devices and micro-batches together."""
    accumulate: int = 1
    """Micro-batches whose gradients are added up in a step, for pictures that do not
    fit in memory at once.
    """
    lr: float = 1.5e-4
    """Base learning rate; the peak is lr * batch_size / 256."""
    warmup_epochs: float = 40.0
    """Epochs of linear warm-up from zero."""
    weight_decay: float = 0.05
    """AdamW's weight decay; none on biases, norms and other one-dimensional parameters.
    """
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averaging constants."""
    clip_gradient: float | None = None
    """Largest gradient norm; None does not clip, as MAE."""
    mask_ratio: float = 0.75
    """Share of patches to remove."""
    augmentation: Augmentation = "crop_flip"
    """none, or crop_flip: random resized crop of area 0.2 to 1 and horizontal flip."""
    seed: int = 0
    """Fixes the initial weights, the order of pictures, augmentation and masks."""
    precision: Precision = "fp32"
    """fp32, or mixed precision in bf16 or fp16."""
    device: Device = "auto"
    """auto takes a GPU when there is one."""
    compile: bool = False
    """Compile the model with torch.compile: a minute at the start for faster steps."""
    shard: bool = False
    """Spread weights, gradients and optimizer over the processes (FSDP2) instead of a
    copy on each (DDP).
    """
    workers: int = 0
    """Processes that read pictures; batches do not depend on it."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl; each holds means over these steps."""
    max_unreadable: float = 0.1
    """Share of unreadable pictures above which the run stops."""
    picture_every: int | None = None
    """Steps between reconstruction pictures (reconstructions.png in the output
    directory); None: at the end only.
    """
    tensorboard: bool = False
    """Also write losses, gradient norm, throughput and pictures to the folder
    tensorboard.
    """
    streaming: bool = False
    """Read hf: data as it comes instead of copying it to the disk first; shuffled
    through a buffer.
    """
    data_root: str = "data"
    """Where torchvision's datasets lie, or are downloaded to."""

    def __post_init__(self) -> None:
        def accept(name: str, ok: bool, accepted: str) -> None:
            if not ok:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: accepted is {accepted}"
                )

        if not self.output_dir:
            object.__setattr__(self, "output_dir", f"runs/{self.preset}")
        accept("preset", self.preset in PRESETS, ", ".join(PRESETS))
        accept(
            "augmentation",
            self.augmentation in ("none", "crop_flip"),
            "none or crop_flip",
        )
        accept(
            "precision",
            self.precision in ("fp32", "bf16", "fp16"),
            "fp32, bf16 or fp16",
        )
        accept(
            "device",
            self.device in ("auto", "cpu", "cuda", "mps"),
            "auto, cpu, cuda or mps",
        )
        for name in ("batch_size", "accumulate", "checkpoint_every", "log_every"):
            accept(name, getattr(self, name) >= 1, "an integer of at least 1")
        accept(
            "accumulate",
            self.batch_size % self.accumulate == 0,
            f"a divisor of batch_size={self.batch_size}",
        )
        accept(
            "picture_every",
            self.picture_every is None or self.picture_every >= 1,
            "an integer of at least 1",
        )
        accept(
            "shard",
            not (self.shard and self.precision == "fp16"),
            "bf16 or fp32 beside it: no loss scaling there",
        )
        accept(
            "streaming",
            not self.streaming or self.data.startswith("hf:"),
            "only with data=hf:...",
        )
        for name in ("epochs", "lr"):
            accept(name, 0 < getattr(self, name) < math.inf, "a positive number")
        for name in ("weight_decay", "workers", "seed"):
            accept(
                name, 0 <= getattr(self, name) < math.inf, "zero or a positive number"
            )
        accept(
            "warmup_epochs",
            0 <= self.warmup_epochs < self.epochs,
            f"0 to less than epochs={self.epochs:g}",
        )
        accept(
            "max_steps",
            self.max_steps is None or self.max_steps >= 1,
            "an integer of at least 1",
        )
        accept(
            "betas",
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
            "two numbers in [0, 1)",
        )
        accept(
            "clip_gradient",
            self.clip_gradient is None or self.clip_gradient > 0,
            "a positive number",
        )
        accept("max_unreadable", 0 <= self.max_unreadable <= 1, "a share in [0, 1]")
        rows, columns = self.model.grid
        visible = (
            int(rows * columns * (1 - self.mask_ratio))
            if 0 < self.mask_ratio < 1
            else 0
        )
        accept(
            "mask_ratio",
            0 < visible < rows * columns,
            f"a share in (0, 1) that leaves some of the model's {rows * columns} patches visible and removes some",
        )

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "PretrainConfig":
        """A preset with some fields replaced; ``ValueError`` for an unknown preset or
        field.
        """
        if name not in PRESETS:
            raise ValueError(f"preset={name!r}: accepted is {', '.join(PRESETS)}")
        unknown = sorted(overrides.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(
                f"unknown fields {unknown}; accepted are {[f.name for f in fields(cls)]}"
            )
        config = cls(preset=name, **PRESETS[name].fields)
        # The default directory follows the preset, so it is derived again unless given.
        return replace(config, **{"output_dir": "", **overrides})

    @property
    def peak_lr(self) -> float:
        """Learning rate at the end of warm-up, ``lr * batch_size / 256``."""
        return self.lr * self.batch_size / 256

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**asdict(self), "model": self.model.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PretrainConfig":
        """The record that :meth:`to_dict` wrote; ``ValueError`` names unknown fields."""
        unknown = sorted(values.keys() - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(
                f"unknown fields {unknown}; accepted are {[f.name for f in fields(cls)]}"
            )
        model = config_from_dict(values["model"])
        return cls(**{**values, "model": model, "betas": tuple(values["betas"])})

    def identity(self) -> dict[str, Any]:
        """The fields that decide what the run computes, flat (``model.dim``), ready for
        JSON.
        """
        own = {
            name: value
            for name, value in self.to_dict().items()
            if name not in OPERATIONAL | {"model", "preset"}
        }
        own = {
            name: value
            for name, value in own.items()
            if name not in LATER or value != LATER[name]
        }
        flat = {
            **own,
            **{f"model.{name}": value for name, value in self.model.to_dict().items()},
        }
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in flat.items()
        }


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW's groups: decay for matrices (and the two tokens, as in MAE), none for
    biases, norms and other vectors.
    """
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class Preset:
    """Fields of a recipe, what it costs, and the final training loss that is normal for
    it.

    ``loss`` is a range measured over seeds (mean over the last epoch, in model units),
    or ``None`` where no run was made; ``cost`` says on what and how long.
    """

    fields: dict[str, Any]
    cost: str
    loss: tuple[float, float] | None = None


def warmup_cosine(
    epoch: float, peak: float, warmup_epochs: float, epochs: float
) -> float:
    r"""Learning rate after ``epoch`` epochs e, linear warm-up over w epochs and half a
    cosine to epoch E,

    .. math:: \eta(e) = \eta_{\max} \begin{cases} e / w & e < w \\
              \tfrac12 \big(1 + \cos \pi \tfrac{e - w}{E - w}\big) & e \ge w \end{cases},

    zero from epoch E on.

    Book: :ref:`ch-first-training`.  MAE's schedule.
    """
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def learning_rate(step: int, config: PretrainConfig, pictures: int) -> float:
    r"""Learning rate of a step t (counted from 0): :func:`warmup_cosine` at :math:`e =
    tB/n` epochs,

    batch size B and n ``pictures``.

    Book: :ref:`ch-first-training`.  As in MAE, the rate changes every step.
    """
    epoch = step * config.batch_size / pictures
    return warmup_cosine(epoch, config.peak_lr, config.warmup_epochs, config.epochs)


def total_steps(config: PretrainConfig, pictures: int) -> int:
    """Steps of a run: ``epochs`` passes over the pictures, rounded up, or ``max_steps``
    if that is fewer.
    """
    steps = math.ceil(config.epochs * pictures / config.batch_size)
    return steps if config.max_steps is None else min(steps, config.max_steps)


CIFAR10: dict[str, Any] = {
    "data": "torchvision:CIFAR10",
    "epochs": 6.0,
    "warmup_epochs": 1.0,
    "batch_size": 256,
    "lr": 2e-3,
    "augmentation": "none",
    "precision": "bf16",
    "checkpoint_every": 200,
}
"""What the two cifar10-tiny presets share, so that the comparison has one budget: some
ten minutes of one CPU core; in so few epochs nothing is learnt by heart, so pictures
are not augmented.
"""

PRESETS: dict[str, Preset] = {
    "digits": Preset(
        fields={
            "data": "digits",
            "model": CrateMAEConfig.preset("digits"),
            "epochs": 300.0,
            "warmup_epochs": 15.0,
            "batch_size": 128,
            "lr": 6e-3,
            "augmentation": "none",
            "checkpoint_every": 500,
        },
        cost="about 150 s of processor time on one x86-64 core (3,371 steps)",
        # three seeds: 0.278 +- 0.005; widened to four standard deviations
        loss=(0.26, 0.30),
    ),
    "cifar10": Preset(
        fields={
            "data": "torchvision:CIFAR10",
            "model": CrateMAEConfig.preset("cifar10"),
            "epochs": 200.0,
            "warmup_epochs": 10.0,
            "batch_size": 512,
            "lr": 7.5e-4,
        },
        cost="not measured yet",
    ),
    "cifar10-tiny": Preset(
        fields={**CIFAR10, "model": CrateMAEConfig.preset("cifar10-tiny")},
        cost="about 13 min of one x86-64 core with bfloat16 instructions, compiled (1,172 steps)",
    ),
    "cifar10-tiny-vit": Preset(
        # Of 1e-3, 2e-3 and 6e-3, each has the rate with the lowest loss after 300 steps
        # (results/cifar10-rates.json).
        fields={**CIFAR10, "model": ViTMAEConfig.preset("cifar10-tiny"), "lr": 6e-3},
        cost="about 5 min of one x86-64 core with bfloat16 instructions, compiled (1,172 steps)",
    ),
    "imagenet-small": Preset(
        fields={
            "data": "folder:imagenet",
            "model": CrateMAEConfig.preset("small"),
            "workers": 16,
            "precision": "bf16",
        },
        cost="not measured yet",
    ),
    "imagenet-base": Preset(
        fields={
            "data": "folder:imagenet",
            "model": CrateMAEConfig.preset("base"),
            "workers": 16,
            "precision": "bf16",
        },
        cost="not measured yet",
    ),
    "imagenet-large": Preset(
        fields={
            "data": "folder:imagenet",
            "model": CrateMAEConfig.preset("large"),
            "workers": 16,
            "precision": "bf16",
            "accumulate": 2,
            "shard": True,
        },
        cost="not measured yet",
    ),
}
"""Recipes by name.

``digits``: scikit-learn's digits, no augmentation, a higher learning rate than MAE's
for a model of this size. ``cifar10``: MAE's recipe with the batch of one small GPU.
``imagenet-small``, ``imagenet-base`` and ``imagenet-large``: MAE's recipe for the
published sizes, the last one sharded and in two micro-batches.
"""


def expected_range(
    config: PretrainConfig, steps: int, pictures: int
) -> tuple[float, float] | None:
    """The final training loss that is normal for a preset, if the run is that preset
    but for its seed, else ``None``.
    """
    preset = PretrainConfig.from_preset(config.preset, seed=config.seed)
    whole = steps == total_steps(preset, pictures)
    return (
        PRESETS[config.preset].loss
        if whole and preset.identity() == config.identity()
        else None
    )
