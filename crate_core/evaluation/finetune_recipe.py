r"""What a fine-tuning run is: one frozen, validated record, and recipes by name.

Book: :ref:`ch-evaluation`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from crate_core.checks import (
    check_choice,
    check_flag,
    check_integer,
    check_number,
    check_text,
    require,
)
from crate_core.model.classifier import Pooling
from crate_core.training.presets import Preset
from crate_core.training.recipe import FROM_PRESET, OPERATIONAL, TrainingConfig

FinetuneAugmentation = Literal["none", "shift", "shift_flip", "crop_flip"]

RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
"""MAE's RandAugment as timm spells it: magnitude 9, of standard deviation 0.5, each
operation stronger with it.
"""

MAE: Mapping[str, Any] = {
    "checkpoint": "runs/imagenet-base",
    "data": "folder:imagenet",
    "epochs": 100.0,
    "warmup_ratio": 5 / 100,
    "batch_size": 1024,
    "accumulate": 1,
    "lr": 5e-4,
    "weight_decay": 0.05,
    "betas": (0.9, 0.999),
    "layer_decay": 0.65,
    "clip_gradient": None,
    "drop_path": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "label_smoothing": 0.1,
    "augmentation": "crop_flip",
    "rand_augment": RAND_AUGMENT,
    "erasing": 0.25,
    "pooling": "patch_mean",
    "precision": "bf16",
    "workers": 16,
    "checkpoint_every": 1000,
}
"""MAE's end-to-end fine-tuning of its base model (He et al., 2022, appendix A.1; layer
decay, erasing and batch size as in the commands of its repository's FINETUNE.md).
"""

SMALL: Mapping[str, Any] = {
    **MAE,
    "drop_path": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "augmentation": "none",
    "rand_augment": None,
    "erasing": 0.0,
    "precision": "fp32",
    "workers": 0,
    "checkpoint_every": 200,
}
"""Small networks for few steps, without regularisation: they do not overfit in so
few.
"""

FINETUNE_PRESETS: Mapping[str, Preset] = {
    "digits": Preset(
        fields={
            **SMALL,
            "checkpoint": "runs/digits",
            "data": "digits",
            "epochs": 30.0,
            "warmup_ratio": 0.1,
            "batch_size": 64,
            "lr": 8e-3,
            "layer_decay": 0.75,
            "augmentation": "shift",
        },
        cost="about 50 s of processor time on one x86-64 core (674 steps)",
    ),
    "cifar10": Preset(
        fields={
            **SMALL,
            "checkpoint": "cifar10-tiny",
            "data": "torchvision:CIFAR10",
            "epochs": 10.0,
            "warmup_ratio": 0.1,
            "batch_size": 64,
            "lr": 1.2e-2,
            "layer_decay": 0.75,
            "augmentation": "shift_flip",
        },
        cost="about 35 min of one x86-64 core (7,813 steps)",
    ),
    "imagenet-small": Preset(
        fields={**MAE, "checkpoint": "runs/imagenet-small"}, cost="not measured yet"
    ),
    "imagenet-base": Preset(fields=MAE, cost="not measured yet"),
    "imagenet-large": Preset(
        fields={
            **MAE,
            "checkpoint": "runs/imagenet-large",
            "epochs": 50.0,
            "warmup_ratio": 5 / 50,
            "lr": 1e-3,
            "layer_decay": 0.75,
            "drop_path": 0.2,
        },
        cost="not measured yet",
    ),
}
"""Recipes by name.

``imagenet-base``: MAE's for its base model, ``imagenet-large`` for its large one;
``imagenet-small``, of which MAE has none, takes that of the base model.  ``cifar10``
and ``digits``: smaller batches and higher learning rates for runs of few steps.
"""


@dataclass(frozen=True)
class FinetuneConfig(TrainingConfig):
    """Every choice of a fine-tuning run.

    Raises
    ------
    ValueError
        On construction, naming the field, what was given and what is accepted, for
        wrong types too.

    Book: :ref:`ch-evaluation`.
    """

    presets: ClassVar[Mapping[str, Preset]] = FINETUNE_PRESETS
    # the starting weights decide, wherever they lie
    operational: ClassVar[frozenset[str]] = OPERATIONAL | {"checkpoint", "seeds"}
    default_output: ClassVar[str] = "runs/{}-finetuned"

    checkpoint: str = FROM_PRESET
    """What is fine-tuned: directory of a saved model, a bundled name, or a Hugging Face
    Hub id.
    """
    from_scratch: bool = False
    """The control: the same network with fresh weights; all layers learn at one rate.
    """
    seeds: int = 1
    """How many runs, of seeds seed, seed + 1, ...; more than one go to the folders
    seed-S of the output directory.
    """
    layer_decay: float = FROM_PRESET
    """Each layer learns this much slower than the one above it; 1 from scratch."""
    drop_path: float = FROM_PRESET
    """Stochastic depth: chance that the last layer's branch is left out for a picture,
    falling linearly to zero at the first layer.
    """
    mixup: float = FROM_PRESET
    """Alpha of mixup (weights of two pictures drawn from Beta(alpha, alpha)); 0 is
    none. Beside cutmix, half of the batches get one and half the other.
    """
    cutmix: float = FROM_PRESET
    """Alpha of cutmix; 0 is none."""
    label_smoothing: float = FROM_PRESET
    """Share of the target that is spread evenly over the classes."""
    augmentation: FinetuneAugmentation = FROM_PRESET
    """none; shift: by up to an eighth of the side; shift_flip: and horizontal flip; or
    crop_flip: random resized crop of area 0.08 to 1 and horizontal flip.
    """
    rand_augment: str | None = FROM_PRESET
    """RandAugment by timm's name for it, such as rand-m9-mstd0.5-inc1; None is none."""
    erasing: float = FROM_PRESET
    """Chance that a rectangle of a picture is replaced by noise."""
    pooling: Pooling = FROM_PRESET
    """What the classifier reads: patch_mean, or class_token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_text(self, "checkpoint")
        check_flag(self, "from_scratch")
        check_integer(self, "seeds", least=1)
        check_number(self, "layer_decay", "a number in (0, 1]", 0, 1)
        for name in ("drop_path", "label_smoothing"):
            check_number(self, name, "a number in [0, 1)", 0, 1, "[)")
        for name in ("mixup", "cutmix"):
            check_number(self, name, "zero or a positive number", ends="[]")
        check_number(self, "erasing", "a chance in [0, 1]", 0, 1, "[]")
        check_choice(self, "augmentation", get_args(FinetuneAugmentation))
        check_choice(self, "pooling", get_args(Pooling))
        check_text(self, "rand_augment", optional=True)
        chosen = self.rand_augment
        accepted = f"None, or a name of timm's such as {RAND_AUGMENT}"
        require(self, "rand_augment", chosen is None or known(chosen), accepted)
        if self.mixes:
            parts = 2 * self.accumulate
            accepted = f"a multiple of {parts}, as mixing pairs the pictures of a part"
            require(self, "batch_size", self.batch_size % parts == 0, accepted)

    @property
    def mixes(self) -> bool:
        """Whether pictures are mixed."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def rate_decay(self) -> float:
        """``layer_decay``, or 1 from scratch: slowing down layers that know nothing
        would hold the control back.
        """
        return 1.0 if self.from_scratch else self.layer_decay


def known(name: str) -> bool:
    """Whether timm makes a RandAugment of a name."""
    from timm.data.auto_augment import rand_augment_transform

    if name.partition("-")[0] != "rand":
        return False
    try:
        rand_augment_transform(name, {})
    except (AssertionError, ValueError, KeyError, NotImplementedError):
        return False
    return True
