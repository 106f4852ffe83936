"""What the published sources say of the recipe, field by field, beside each other.

Nothing is computed from this table; it says where each number of a preset comes from,
and the tests hold the presets to it.

Book: :ref:`ch-pretraining`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from crate_core.training.recipe import PretrainConfig

NOT_SAID = "not said"


@dataclass(frozen=True)
class Source:
    """A publication, where in it the recipe stands, and what it says by field; a field
    that is left out is not said there.
    """

    title: str
    where: str
    says: Mapping[str, str]


TEXTBOOK = Source(
    "the authors' textbook",
    "Learning Deep Representations of Data Distributions (Buchanan, Pai, Wang, Ma; "
    "2025), the section on masked autoencoding in the chapter of applications; for "
    "CRATE-MAE and for their ViT-MAE alike",
    {
        "optimizer": "AdamW",
        "lr": "3e-5, called the base learning rate",
        "weight_decay": "0.1",
        "batch_size": "4,096",
        "epochs": "800",
        "warmup_ratio": "0.05: the first 40 epochs",
        "after warm-up": "cosine to 0 over 760 epochs",
        "mask_ratio": "3/4",
        "augmentation": "shorter side to 256, random crop of 224, flips, Gaussian "
        "blur, solarisation, 'etc.'",
        "model.patch_size": "16",
        "model.eta": "1 (its beta)",
        "model.lambd": "0.1",
        "model.depth": "half of the layers each for encoder and decoder",
    },
)

CODE = Source(
    "the authors' code",
    "the repository of CRATE: a model file, to be put into MAE's training code",
    {
        "model.patch_size": "16",
        "model.eta": "0.1",
        "model.lambd": "0.5",
        "model.depth": "12 and 12",
        "model.normalize_targets": "a flag, off",
    },
)

MAE = Source(
    "MAE",
    "He et al. (2022), the table of the pretraining setting; crop, flip and precision "
    "from its code",
    {
        "optimizer": "AdamW",
        "lr": "1.5e-4, times batch / 256",
        "weight_decay": "0.05",
        "betas": "0.9, 0.95",
        "batch_size": "4,096",
        "epochs": "800 (1,600 for its best)",
        "warmup_ratio": "0.05: 40 epochs of 800",
        "after warm-up": "cosine to 0",
        "clip_gradient": "none",
        "mask_ratio": "0.75",
        "augmentation": "random crop of 0.2 to 1 of the area, bicubic, flip",
        "model.patch_size": "16",
        "model.normalize_targets": "on, for its best",
        "precision": "fp16 with loss scaling",
    },
)

SOURCES = (TEXTBOOK, CODE, MAE)

READINGS: Mapping[str, float] = {
    "base rate, times batch / 256": 3e-5,
    "peak rate": 3e-5 * 256 / 4096,
}
"""Two readings of the textbook's 3e-5 as ``lr``, which is multiplied by batch / 256.

The presets take the first: the authors train with MAE's code, where "base learning
rate" is the number that is multiplied, and the peak is 4.8e-4. For the second speaks
that the sentence goes on "increases the learning rate linearly to the base learning
rate": then the peak is 3e-5, a sixteenth (``--lr 1.875e-6``). Both cost the same
operations, bytes and hours; a wrong choice costs a whole run, and a short one is no
judge, since it favours the larger rate.
"""

OURS: Mapping[str, str] = {
    "betas": "MAE's: the textbook does not say",
    "clip_gradient": "MAE's",
    "augmentation": "blur on a tenth of the pictures and solarisation on a fifth, as "
    "in DINO's second view, to which the same chapter refers",
    "precision": "ours: no loss scaling is needed",
    "model.normalize_targets": "the authors' code's",
}
"""What a preset of the textbook's recipe takes from elsewhere."""


def value_here(config: PretrainConfig, field: str) -> str:
    """A field of a configuration in words; ``model.NAME`` is one of its model."""
    if field == "optimizer":
        return "AdamW"
    if field == "after warm-up":
        return "half a cosine to 0"
    record: Any = config
    for name in field.split("."):
        record = getattr(record, name)
    if field == "lr":
        return f"{record:.3g}, times batch / 256: {config.peak_lr:.3g}"
    if isinstance(record, tuple):
        return ", ".join(f"{value:g}" for value in record)
    if record is None or isinstance(record, bool):
        return {None: "none", True: "on", False: "off"}[record]
    return f"{record:,g}" if isinstance(record, int | float) else str(record)


def recipe_table(*presets: str) -> list[dict[str, str]]:
    """Rows of the table: a field, its value in each preset, and what each source says.

    Book: :ref:`ch-pretraining`.
    """
    order = list(dict.fromkeys(field for source in SOURCES for field in source.says))
    configs = {name: PretrainConfig(preset=name) for name in presets}
    return [
        {
            "field": field,
            **{name: value_here(config, field) for name, config in configs.items()},
            **{source.title: source.says.get(field, NOT_SAID) for source in SOURCES},
        }
        for field in order
    ]


def markdown_table(rows: list[dict[str, str]]) -> str:
    """Rows as a Markdown table, one column a key of the first."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([row[n] for n in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
