r"""What a run is: one frozen, validated record, and its schedule, which knows the
number of pictures too.

The recipes are in :mod:`crate_core.training.presets`; most are that of MAE (He et al.,
2022): AdamW with betas (0.9, 0.95), peak learning rate ``lr * batch_size / 256``,
warm-up over 40 of 800 epochs and a half cosine to zero, weight decay 0.05 except on
biases and norms, masking ratio 0.75.

Book: :ref:`ch-first-training`.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, TypeVar, get_args

from crate_core.checks import (
    check_choice,
    check_flag,
    check_integer,
    check_mapping,
    check_number,
    check_text,
    require,
    store,
)
from crate_core.data.batches import MAX_UNREADABLE
from crate_core.data.pictures import Augmentation
from crate_core.model.config import (
    CrateMAEConfig,
    ModelConfig,
    ViTMAEConfig,
    config_from_dict,
)
from crate_core.training.checks import check_betas
from crate_core.training.expected import band_at, measured
from crate_core.training.presets import PRESETS, Preset

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
    | {"milestone_epochs", "evaluate_epochs", "evaluators"}
)
"""Fields that may change when a run is continued: where, how far and how fast, not
what.  (Another device, process count, ``accumulate`` or ``shard`` sums the same numbers
in another order: equal up to rounding, not bit by bit.)
"""


class FromPreset:
    """Stands for a field that was not given: the preset fills it in."""

    def __repr__(self) -> str:
        return "from the preset"


FROM_PRESET: Any = FromPreset()

Config = TypeVar("Config", bound="TrainingConfig")


@dataclass(frozen=True)
class TrainingConfig:
    """What pretraining and fine-tuning both choose: pictures, budget, optimizer,
    machine.

    A field that is not given is the preset's, whichever constructor is used, so that
    ``CONFIG(preset=NAME)`` and ``CONFIG.from_preset(NAME)`` are the same record.
    (``dataclasses.replace`` gives every field, so that a ``preset`` replaced in this
    way is a name and nothing else.)

    Raises
    ------
    ValueError
        On construction, naming the field, what was given and what is accepted, for
        wrong types too.

    Book: :ref:`ch-first-training`.
    """

    presets: ClassVar[Mapping[str, Preset]] = {}
    operational: ClassVar[frozenset[str]] = OPERATIONAL
    default_output: ClassVar[str] = "runs/{}"

    preset: str = "digits"
    """Recipe that the other fields default to."""
    output_dir: str = ""
    """Where weights, config, logs and checkpoints go; a folder of runs, named after
    the preset, unless given.
    """
    data: str = FROM_PRESET
    """digits, folder:PATH, shards:PATH (which crate prepare writes), torchvision:NAME,
    or hf:NAME-OR-PARQUET-PATH.
    """
    epochs: float = FROM_PRESET
    """Passes over the training pictures; they set the learning-rate schedule."""
    max_steps: int | None = None
    """Stop after this many steps; the schedule stays that of epochs. A larger number
    continues the run.
    """
    batch_size: int = FROM_PRESET
    """Pictures in a step, all devices and micro-batches together."""
    accumulate: int = FROM_PRESET
    """Micro-batches whose gradients are added up in a step, for pictures that do not
    fit in memory at once.
    """
    lr: float = FROM_PRESET
    """Base learning rate; the peak is lr * batch_size / 256."""
    warmup_ratio: float = FROM_PRESET
    """Share of the epochs in which the learning rate rises linearly from zero."""
    weight_decay: float = FROM_PRESET
    """AdamW's weight decay; none on biases, norms and other one-dimensional parameters.
    """
    betas: tuple[float, float] = FROM_PRESET
    """AdamW's averaging constants."""
    clip_gradient: float | None = FROM_PRESET
    """Largest gradient norm; None does not clip, as MAE."""
    seed: int = 0
    """Fixes initial weights, the order of pictures, augmentation, and masks or mixing.
    """
    precision: Precision = FROM_PRESET
    """fp32, or mixed precision in bf16 or fp16."""
    device: Device = "auto"
    """auto takes a GPU when there is one."""
    compile: bool = False
    """Compile the model with torch.compile: a minute at the start for faster steps."""
    workers: int = FROM_PRESET
    """Processes that read pictures; batches do not depend on it."""
    checkpoint_every: int = FROM_PRESET
    """Steps between checkpoints."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl; each holds means over these steps."""
    max_unreadable: float = MAX_UNREADABLE
    """Share of unreadable pictures above which the run stops."""
    tensorboard: bool = False
    """Also write losses, gradient norm, throughput and pictures to the folder
    tensorboard.
    """
    data_root: str = "data"
    """Where torchvision's datasets lie, or are downloaded to."""

    def __post_init__(self) -> None:
        require(
            self,
            "preset",
            isinstance(self.preset, str) and self.preset in self.presets,
            ", ".join(self.presets),
        )
        for name, value in self.presets[self.preset].fields.items():
            if getattr(self, name) is FROM_PRESET:
                store(self, name, value)
        if self.output_dir == "":
            store(self, "output_dir", self.default_output.format(self.preset))
        for name in ("output_dir", "data", "data_root"):
            check_text(self, name)
        check_choice(self, "precision", get_args(Precision))
        check_choice(self, "device", get_args(Device))
        for name in ("compile", "tensorboard"):
            check_flag(self, name)
        for name in ("batch_size", "accumulate", "checkpoint_every", "log_every"):
            check_integer(self, name, least=1)
        check_integer(self, "max_steps", least=1, optional=True)
        for name in ("workers", "seed"):
            check_integer(self, name)
        for name in ("epochs", "lr"):
            check_number(self, name, "a positive number")
        check_number(self, "weight_decay", "zero or a positive number", ends="[]")
        check_number(self, "warmup_ratio", "a share in [0, 1)", 0, 1, "[)")
        check_number(self, "max_unreadable", "a share in [0, 1]", 0, 1, "[]")
        check_number(self, "clip_gradient", "a positive number or None", optional=True)
        check_betas(self, "betas")
        require(
            self,
            "accumulate",
            self.batch_size % self.accumulate == 0,
            f"a divisor of batch_size={self.batch_size}",
        )

    @classmethod
    def from_preset(cls: type[Config], name: str, **overrides: Any) -> Config:
        """A preset with some fields replaced; ``ValueError`` for an unknown preset or
        field.
        """
        return cls.from_dict({**overrides, "preset": name})

    @property
    def peak_lr(self) -> float:
        """Learning rate at the end of warm-up, ``lr * batch_size / 256``."""
        return self.lr * self.batch_size / 256

    @property
    def warmup_epochs(self) -> float:
        """Epochs of warm-up, ``warmup_ratio * epochs``."""
        return self.warmup_ratio * self.epochs

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """The record that :meth:`to_dict` wrote, or one that leaves fields to its
        preset; ``ValueError`` names unknown fields.
        """
        check_mapping(values)
        known = [field.name for field in fields(cls)]
        unknown = sorted(values.keys() - set(known))
        if unknown:
            raise ValueError(f"unknown fields {unknown}; accepted are {known}")
        # JSON has no tuples
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**given)

    def identity(self) -> dict[str, Any]:
        """The fields that decide what the run computes, flat, ready for JSON."""
        return {
            name: value
            for name, value in self.to_dict().items()
            if name not in self.operational | {"preset"}
        }


@dataclass(frozen=True)
class PretrainConfig(TrainingConfig):
    """Every choice of a pretraining run.

    Raises
    ------
    ValueError
        On construction, naming the field, what was given and what is accepted, for
        wrong types too.

    Book: :ref:`ch-first-training`.
    """

    presets: ClassVar[Mapping[str, Preset]] = PRESETS

    model: ModelConfig = FROM_PRESET
    """The model; image_size is what pictures are cropped to."""
    mask_ratio: float = FROM_PRESET
    """Share of patches to remove."""
    augmentation: Augmentation = FROM_PRESET
    """none; crop_flip: random resized crop of area 0.2 to 1 and horizontal flip; or
    crop_blur_solarize: shorter side to 8/7 of the model's, random crop, flip, blur of
    a tenth and solarisation of a fifth of the pictures.
    """
    shard: bool = FROM_PRESET
    """Spread weights, gradients and optimizer over the processes (FSDP2) instead of a
    copy on each (DDP).
    """
    milestone_epochs: float | None = None
    """Epochs between checkpoints that are kept for good, in the folder milestones;
    None keeps the newest checkpoint alone.
    """
    evaluate_epochs: float | None = None
    """Epochs between evaluations on held-out pictures, in evaluation.jsonl; None: at
    the end only.
    """
    evaluators: tuple[str, ...] = ()
    """What is evaluated beside the held-out loss: names MODULE:FUNCTION of functions
    that take the model and the data and give named numbers.
    crate_core.evaluation.neighbours:held_out_neighbours lets neighbours vote.
    """
    branch_from: str | None = None
    """Start from a checkpoint of another run (its directory, or one of its checkpoints
    or milestones), with another learning rate, say: no continuation of that run.
    """
    picture_every: int | None = None
    """Steps between reconstruction pictures (reconstructions.png in the output
    directory); None: at the end only.
    """
    streaming: bool = False
    """Read hf: data as it comes instead of copying it to the disk first; shuffled
    through a buffer.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self,
            "model",
            isinstance(self.model, CrateMAEConfig | ViTMAEConfig),
            "a CrateMAEConfig or a ViTMAEConfig",
        )
        check_choice(self, "augmentation", get_args(Augmentation))
        for name in ("shard", "streaming"):
            check_flag(self, name)
        check_integer(self, "picture_every", least=1, optional=True)
        for name in ("milestone_epochs", "evaluate_epochs"):
            check_number(self, name, "a positive number or None", optional=True)
        check_text(self, "branch_from", optional=True)
        names = self.evaluators
        plain = isinstance(names, list | tuple)
        ok = plain and all(isinstance(n, str) and n.count(":") == 1 for n in names)
        require(self, "evaluators", ok, "names MODULE:FUNCTION")
        store(self, "evaluators", tuple(names))
        require(
            self,
            "shard",
            not (self.shard and self.precision == "fp16"),
            "bf16 or fp32 beside it: no loss scaling there",
        )
        require(
            self,
            "streaming",
            not self.streaming or self.data.startswith("hf:"),
            "only with data=hf:...",
        )
        patches = math.prod(self.model.grid)
        accepted = (
            f"a share in (0, 1) that leaves some of the model's {patches} patches "
            "visible and removes some"
        )
        check_number(self, "mask_ratio", accepted, 0, 1, "()")
        visible = int(patches * (1 - self.mask_ratio))
        require(self, "mask_ratio", 0 < visible < patches, accepted)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return {**super().to_dict(), "model": self.model.to_dict()}

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """The record that :meth:`to_dict` wrote, or one that leaves fields to its
        preset; ``ValueError`` names unknown fields.
        """
        check_mapping(values)
        model = values.get("model", FROM_PRESET)
        if isinstance(model, Mapping):
            values = {**values, "model": config_from_dict(model)}
        return super().from_dict(values)  # type: ignore[misc]

    def identity(self) -> dict[str, Any]:
        """The fields that decide what the run computes, flat (``model.dim``), ready for
        JSON.
        """
        own = super().identity()
        del own["model"]
        model = {f"model.{name}": v for name, v in self.model.to_dict().items()}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in {**own, **model}.items()
        }


def warmup_cosine(
    epoch: float, peak: float, warmup_epochs: float, epochs: float
) -> float:
    r"""Learning rate after ``epoch`` epochs e, linear warm-up over w epochs and half a
    cosine to epoch E,

    .. math:: \eta(e) = \eta_{\max} \begin{cases} e / w & e < w \\
              \tfrac12 \big(1 + \cos \pi \tfrac{e - w}{E - w}\big) & e \ge w
              \end{cases},

    zero from epoch E on.

    Book: :ref:`ch-first-training`.  MAE's schedule.
    """
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


@dataclass(frozen=True)
class Schedule:
    r"""A run's configuration and how many pictures there are: together they fix its
    steps and learning rates.

    Parameters
    ----------
    config : the run.
    count : pictures to train on, n.

    Raises
    ------
    ValueError
        If there is no picture.

    Book: :ref:`ch-first-training`.
    """

    config: TrainingConfig
    count: int

    def __post_init__(self) -> None:
        check_integer(self, "count", least=1)

    @cached_property
    def steps(self) -> int:
        """Steps of the run: ``epochs`` passes over the pictures, rounded up, or
        ``max_steps`` if that is fewer.
        """
        limit = self.config.max_steps
        steps = math.ceil(self.config.epochs * self.count / self.config.batch_size)
        return steps if limit is None else min(steps, limit)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every picture is met once, rounded up."""
        return math.ceil(self.count / self.config.batch_size)

    def epoch(self, step: int) -> float:
        """Passes over the pictures after ``step`` steps, :math:`tB/n`."""
        return step * self.config.batch_size / self.count

    def passes(self, step: int, every: float | None) -> bool:
        """Whether the run passes a multiple of ``every`` epochs in the step that makes
        ``step`` steps; never for ``None``.
        """
        if every is None:
            return False
        # A multiple that is reached up to rounding counts as reached.
        done, before = (
            math.floor(self.epoch(s) / every + 1e-9) for s in (step, step - 1)
        )
        return done > before

    def lr(self, step: int) -> float:
        r"""Learning rate of step t, counted from 0: :func:`warmup_cosine` at
        :math:`e = tB/n` epochs.

        As in MAE, it changes every step.
        """
        config = self.config
        return warmup_cosine(
            self.epoch(step), config.peak_lr, config.warmup_epochs, config.epochs
        )

    def expected(self, step: int) -> tuple[float, float] | None:
        """Lowest and highest loss that a line of the log normally shows after ``step``
        steps; ``None`` where nothing was measured.
        """
        del step
        return None


@dataclass(frozen=True)
class Plan(Schedule):
    """A pretraining run's schedule, and what loss is normal when.

    Book: :ref:`ch-first-training`.
    """

    config: PretrainConfig

    def differing(self) -> list[str]:
        """Fields in which the run differs from its preset, but for the seed and where
        the pictures come from.
        """
        own = self.config.identity()
        preset = PretrainConfig(preset=self.config.preset).identity()
        return [
            name
            for name in sorted(own.keys() | preset.keys())
            if name not in ("seed", "data") and own.get(name) != preset.get(name)
        ]

    def expected(self, step: int) -> tuple[float, float] | None:
        """Lowest and highest loss that a line of the log normally shows after ``step``
        steps.

        ``None`` where nothing was measured: another recipe, another number of pictures,
        or before the first point.
        """
        band = measured().get(self.config.preset)
        if band is None or band["pictures"] != self.count or self.differing():
            return None
        return band_at(band["points"], self.epoch(step))

    @property
    def expected_final(self) -> tuple[float, float] | None:
        """The range of the last epoch's mean loss that is normal, if the run is its
        preset but for the seed, else ``None``.
        """
        config = self.config
        preset = PretrainConfig(preset=config.preset, seed=config.seed)
        whole = self.steps == replace(self, config=preset).steps
        same = preset.identity() == config.identity()
        return PRESETS[config.preset].loss if whole and same else None
