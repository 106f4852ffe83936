r"""The configuration of a CRATE-MAE and its named sizes.

Book: :ref:`ch-crate-mae`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from crate_core.patches import patch_grid
from crate_core.sparsify import check_step

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class CrateMAEConfig:
    """Sizes and constants of a CRATE-MAE; the decoder is as deep as the encoder.

    Raises
    ------
    ValueError
        On construction, naming the field, if a value is out of range or sizes do not fit each other.

    Book: :ref:`ch-crate-mae`.  Defaults are the authors' published base model.
    """

    image_size: int | tuple[int, int] = 224
    """Height and width in pixels that fix the position table; other sizes are accepted by the model."""
    patch_size: int = 16
    """Side of a square patch in pixels; divides the image's height and width."""
    channels: int = 3
    """Colour channels."""
    dim: int = 768
    """Token dimension d, a multiple of four (sine-cosine positions)."""
    depth: int = 12
    """Encoder layers, and decoder layers."""
    heads: int = 12
    """Subspaces K; divides dim."""
    eta: float = 0.1
    """Step size of ISTA."""
    lambd: float = 0.5
    """Weight lambda of the l1 penalty in ISTA."""
    normalize_targets: bool = False
    """Predict each patch standardised by its own mean and variance (MAE's normalised-pixel targets)."""
    encode_visible_only: bool = False
    """Ours, not the paper's: the encoder sees visible patches only, as in MAE; mask tokens enter at the decoder."""
    pixel_mean: tuple[float, ...] | None = None
    """Mean of [0, 1] pixels per channel; ``None`` takes ImageNet's (their average unless there are 3 channels)."""
    pixel_std: tuple[float, ...] | None = None
    """Standard deviation of [0, 1] pixels per channel; ``None`` as for the mean."""

    def __post_init__(self) -> None:
        for name in ("patch_size", "channels", "dim", "depth", "heads"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        size = self.image_size
        sides = (size,) * 2 if isinstance(size, int) else size if isinstance(size, tuple) else ()
        if len(sides) != 2 or not all(isinstance(side, int) for side in sides):
            raise ValueError(f"image_size must be an integer or two (height, width), got {size!r}")
        object.__setattr__(self, "image_size", size if isinstance(size, int) else sides)
        patch_grid(sides[0], sides[1], self.patch_size)
        if self.normalize_targets and self.patch_size**2 * self.channels < 2:
            raise ValueError("normalize_targets needs patches of more than one number: a single one has no variance")
        if self.dim % self.heads or self.dim % 4:
            raise ValueError(f"dim must be a multiple of heads and of four, got dim={self.dim}, heads={self.heads}")
        check_step(self.eta, self.lambd)
        for name, imagenet in (("pixel_mean", IMAGENET_MEAN), ("pixel_std", IMAGENET_STD)):
            given = getattr(self, name)
            if given is None:
                given = imagenet if self.channels == 3 else (sum(imagenet) / 3,) * self.channels
            if len(given) != self.channels:
                raise ValueError(f"{name} needs one number for each of {self.channels} channels, got {given!r}")
            if name == "pixel_std" and min(given) <= 0:
                raise ValueError(f"pixel_std must be positive, got {given!r}")
            object.__setattr__(self, name, tuple(float(value) for value in given))

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "CrateMAEConfig":
        """A named size: "tiny", "small", "base", "large" as published; "digits", "cifar10" for small pictures.

        Raises ``ValueError`` for an unknown name or field.
        """
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}, accepted: {', '.join(PRESETS)}")
        return cls.from_dict({**PRESETS[name], **overrides})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CrateMAEConfig":
        """The configuration with these fields; ``ValueError`` names unknown ones."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise ValueError(f"unknown configuration fields {unknown}, accepted: {sorted(known)}")
        # JSON has lists where the configuration has tuples.
        given: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in values.items()}
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for JSON."""
        return asdict(self)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across at the configured image size."""
        height, width = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        return patch_grid(height, width, self.patch_size)


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
