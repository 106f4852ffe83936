r"""The configuration of a masked autoencoder, of a CRATE-MAE, and its named sizes.

Book: :ref:`ch-crate-mae`.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, TypeVar, get_args

from crate_core.checks import as_number, check_flag, check_mapping, is_count
from crate_core.model.patches import patch_grid
from crate_core.model.sparsify import check_step

CLASSIFIER = "classifier"
"""What ``config.json`` of a classifier says under ``model_type``."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


Norm = Literal["layer", "rms", "none"]
Config = TypeVar("Config", bound="FrameConfig")


@dataclass(frozen=True)
class FrameConfig:
    """What every masked autoencoder here has: pictures, patches, widths, targets.

    Raises
    ------
    ValueError
        On construction, naming the field, if a value is out of range or sizes do not
        fit each other.

    Book: :ref:`ch-crate-mae`.  Defaults are the authors' published base model.
    """

    model_type: ClassVar[str] = "frame"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    image_size: int | tuple[int, int] = 224
    """Height and width in pixels that fix the position table; other sizes are accepted
    by the model.
    """
    patch_size: int = 16
    """Side of a square patch in pixels; divides the image's height and width."""
    channels: int = 3
    """Colour channels."""
    dim: int = 768
    """Token dimension d, a multiple of four (sine-cosine positions)."""
    depth: int = 12
    """Encoder layers."""
    heads: int = 12
    """Attention heads (subspaces K); divides dim."""
    normalize_targets: bool = False
    """Predict each patch standardised by its own mean and variance (MAE's
    normalised-pixel targets).
    """
    encode_visible_only: bool = False
    """The encoder sees visible patches only, as in MAE; mask tokens enter at the
    decoder.
    """
    pixel_mean: tuple[float, ...] | None = None
    """Mean of [0, 1] pixels per channel; ``None`` takes ImageNet's (their average
    unless there are 3 channels).
    """
    pixel_std: tuple[float, ...] | None = None
    """Standard deviation of [0, 1] pixels per channel; ``None`` as for the mean."""

    def __post_init__(self) -> None:
        for name in ("patch_size", "channels", "dim", "depth", "heads"):
            self.require_positive(name)
        for name in ("normalize_targets", "encode_visible_only"):
            check_flag(self, name)
        size = self.image_size
        sides = (
            (size,) * 2
            if isinstance(size, int)
            else size
            if isinstance(size, tuple)
            else ()
        )
        if len(sides) != 2 or not all(is_count(side) for side in sides):
            raise ValueError(
                f"image_size must be an integer or two (height, width), got {size!r}"
            )
        object.__setattr__(self, "image_size", size if isinstance(size, int) else sides)
        patch_grid(sides[0], sides[1], self.patch_size)
        if self.normalize_targets and self.patch_size**2 * self.channels < 2:
            raise ValueError(
                "normalize_targets needs patches of more than one number: a single "
                "one has no variance"
            )
        if self.dim % self.heads or self.dim % 4:
            raise ValueError(
                f"dim must be a multiple of heads and of four, got dim={self.dim}, "
                f"heads={self.heads}"
            )
        for name, imagenet in (
            ("pixel_mean", IMAGENET_MEAN),
            ("pixel_std", IMAGENET_STD),
        ):
            given = getattr(self, name)
            if given is None:
                given = (
                    imagenet
                    if self.channels == 3
                    else (sum(imagenet) / 3,) * self.channels
                )
            numbers = (
                [as_number(value) for value in given]
                if isinstance(given, Iterable) and not isinstance(given, str)
                else []
            )
            if len(numbers) != self.channels or not all(map(math.isfinite, numbers)):
                raise ValueError(
                    f"{name} needs one number for each of {self.channels} channels, "
                    f"got {given!r}"
                )
            if name == "pixel_std" and min(numbers) <= 0:
                raise ValueError(f"pixel_std must be positive, got {given!r}")
            object.__setattr__(self, name, tuple(numbers))

    def require_positive(self, name: str) -> None:
        """``ValueError`` unless a field is a positive integer."""
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")

    @classmethod
    def preset(cls: type[Config], name: str, **overrides: Any) -> Config:
        """A named size; ``ValueError`` for an unknown name or field."""
        if not isinstance(name, str) or name not in cls.presets:
            raise ValueError(
                f"unknown preset {name!r}, accepted: {', '.join(cls.presets)}"
            )
        return cls.from_dict({**cls.presets[name], **overrides})

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
        """The configuration with these fields; ``ValueError`` names unknown ones, or
        another architecture.
        """
        check_mapping(values)
        found = values.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"this is the configuration of a model of type {found!r}, accepted: "
                f"{cls.model_type!r}"
            )
        known = {field.name for field in fields(cls)}
        unknown = sorted(values.keys() - known - {"model_type"})
        if unknown:
            raise ValueError(
                f"unknown configuration fields {unknown}, accepted: {sorted(known)}"
            )
        # JSON has lists where the configuration has tuples.
        given: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v
            for k, v in values.items()
            if k != "model_type"
        }
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The architecture and all fields, ready for JSON."""
        return {"model_type": self.model_type, **asdict(self)}

    @property
    def image_shape(self) -> tuple[int, int]:
        """Height and width in pixels at the configured image size."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else size

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across at the configured image size."""
        return patch_grid(*self.image_shape, self.patch_size)


@dataclass(frozen=True)
class CrateMAEConfig(FrameConfig):
    """Sizes and constants of a CRATE-MAE; the decoder is as deep as the encoder unless
    said otherwise.

    Named sizes: "tiny", "small", "base", "large" as published; "digits", "cifar10",
    "cifar10-tiny" for small pictures. The last four fields are for ablations: with
    their defaults the model is the published one.

    Raises
    ------
    ValueError
        On construction, naming the field, if a value is out of range or sizes do not
        fit each other.

    Book: :ref:`ch-crate-mae`.  Defaults are the authors' published base model.
    """

    model_type: ClassVar[str] = "crate-mae"

    eta: float = 0.1
    """Step size of ISTA."""
    lambd: float = 0.5
    """Weight lambda of the l1 penalty in ISTA."""
    decoder_depth: int | None = None
    """Decoder layers; ``None`` takes as many as the encoder has."""
    separate_values: bool = False
    """Ablation: a value projection of its own in attention, where the paper shares one
    with queries and keys.
    """
    norm: Norm = "layer"
    """Ablation: LayerNorm as published, RMSNorm, or no normalisation inside layers."""
    expansion: int = 1
    """Ablation: above 1, ISTA is two steps on an over-complete dictionary of expansion
    * dim atoms, decoded by a dictionary of its own onto a residual path (CRATE-alpha).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check_step(self.eta, self.lambd)
        check_flag(self, "separate_values")
        self.require_positive("expansion")
        if self.decoder_depth is not None:
            self.require_positive("decoder_depth")
        if self.norm not in get_args(Norm):
            raise ValueError(
                f"norm must be one of {', '.join(get_args(Norm))}, got {self.norm!r}"
            )

    @property
    def decoder_layers(self) -> int:
        """Layers of the decoder."""
        return self.depth if self.decoder_depth is None else self.decoder_depth


@dataclass(frozen=True)
class ViTMAEConfig(FrameConfig):
    """Sizes of a ViT-MAE in this project's frame.

    Named sizes: "small" and "base" as the authors of CRATE-MAE compare with (47.6M and
    143.8M), "mae-base"
    with MAE's own narrower decoder, "base-matched" and "cifar10" with as many
    parameters as the CRATE-MAE of that size.

    Raises
    ------
    ValueError
        On construction, naming the field, if a value is out of range or sizes do not
        fit each other.

    Book: :ref:`ch-comparison`.
    """

    model_type: ClassVar[str] = "vit-mae"

    encode_visible_only: bool = True
    """The encoder sees visible patches only, as in MAE; else all, as in CRATE-MAE."""
    decoder_dim: int = 768
    """Token dimension of the decoder, a multiple of four."""
    decoder_depth: int = 8
    """Decoder blocks."""
    decoder_heads: int = 16
    """Attention heads of the decoder; divides decoder_dim."""
    mlp_ratio: float = 4.0
    """Width of each MLP's hidden layer, as a multiple of the token dimension."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("decoder_dim", "decoder_depth", "decoder_heads"):
            self.require_positive(name)
        if self.decoder_dim % self.decoder_heads or self.decoder_dim % 4:
            raise ValueError(
                "decoder_dim must be a multiple of decoder_heads and of four, "
                f"got decoder_dim={self.decoder_dim}, "
                f"decoder_heads={self.decoder_heads}"
            )
        if not 0 < as_number(self.mlp_ratio) < math.inf:
            raise ValueError(f"mlp_ratio must be positive, got {self.mlp_ratio!r}")


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"dim": 384, "depth": 12, "heads": 6},
    "small": {"dim": 576, "depth": 12, "heads": 12},
    "base": {"dim": 768, "depth": 12, "heads": 12},
    "large": {"dim": 1024, "depth": 24, "heads": 16},
    "digits": {
        "image_size": 8,
        "patch_size": 2,
        "channels": 1,
        "dim": 64,
        "depth": 4,
        "heads": 4,
        "pixel_mean": (0.305,),
        "pixel_std": (0.376,),
    },
    "cifar10": {
        "image_size": 32,
        "patch_size": 4,
        "dim": 192,
        "depth": 6,
        "heads": 6,
        "pixel_mean": (0.4914, 0.4822, 0.4465),
        "pixel_std": (0.2470, 0.2435, 0.2616),
    },
}
PRESETS["cifar10-tiny"] = {**PRESETS["cifar10"], "dim": 128, "depth": 4, "heads": 4}
"""Named sizes of CRATE-MAE."""

VIT_PRESETS: dict[str, dict[str, Any]] = {
    # 47.6M parameters with two fixed position tables, as the authors report.
    "small": {
        "dim": 384,
        "depth": 12,
        "heads": 6,
        "decoder_dim": 512,
        "decoder_depth": 8,
        "decoder_heads": 16,
    },
    # Width 768 in the decoder too, which makes the 143.8M parameters that the authors
    # report.
    "base": {
        "dim": 768,
        "depth": 12,
        "heads": 12,
        "decoder_dim": 768,
        "decoder_depth": 8,
        "decoder_heads": 16,
    },
    # He et al.'s own decoder: 111.7M trainable parameters.
    "mae-base": {
        "dim": 768,
        "depth": 12,
        "heads": 12,
        "decoder_dim": 512,
        "decoder_depth": 8,
        "decoder_heads": 16,
    },
    # As many parameters as CRATE-MAE base, 43.7M, within 2 %: fewer blocks in the
    # proportion of MAE's.
    "base-matched": {
        "dim": 768,
        "depth": 4,
        "heads": 12,
        "decoder_dim": 768,
        "decoder_depth": 2,
        "decoder_heads": 12,
    },
    # As many parameters as CRATE-MAE's presets of these names, within 2 %: MAE's shape,
    # a deep encoder and a narrower, shallow decoder.
    "cifar10": {
        **PRESETS["cifar10"],
        "dim": 144,
        "depth": 4,
        "decoder_dim": 96,
        "decoder_depth": 3,
        "decoder_heads": 6,
    },
    "cifar10-tiny": {
        **PRESETS["cifar10-tiny"],
        "dim": 96,
        "depth": 3,
        "decoder_dim": 64,
        "decoder_depth": 1,
        "decoder_heads": 4,
    },
}
"""Named sizes of the baseline."""

CrateMAEConfig.presets = PRESETS
ViTMAEConfig.presets = VIT_PRESETS

ModelConfig = CrateMAEConfig | ViTMAEConfig
CONFIGS: Mapping[str, type[ModelConfig]] = {
    config.model_type: config for config in (CrateMAEConfig, ViTMAEConfig)
}
"""Configurations by what ``config.json`` says under ``model_type``."""


def config_from_dict(values: Mapping[str, Any]) -> ModelConfig:
    """The configuration of either architecture, told by ``model_type``; ``ValueError``
    for another one.
    """
    check_mapping(values)
    found = values.get("model_type", CrateMAEConfig.model_type)
    if found not in CONFIGS:
        raise ValueError(f"a model of type {found!r}, accepted: {', '.join(CONFIGS)}")
    return CONFIGS[found].from_dict(values)
