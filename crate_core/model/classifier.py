r"""A classifier on a masked autoencoder's encoder: a model of its own, saved and loaded
as the others are.

Book: :ref:`ch-evaluation`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from crate_core.checks import check_choice, check_mapping, is_count, require, store
from crate_core.model.autoencoder import MaskedAutoencoder
from crate_core.model.build import build_model
from crate_core.model.config import (
    CLASSIFIER,
    CrateMAEConfig,
    ModelConfig,
    ViTMAEConfig,
    config_from_dict,
)
from crate_core.model.layers import EncoderLayer
from crate_core.model.saved import SavedModel
from crate_core.shapes import Images, PictureVectors, Tokens

Pooling = Literal["patch_mean", "class_token"]
"""What a classifier reads: the mean of patch tokens, or the class token."""


@dataclass(frozen=True)
class ClassifierConfig:
    """An encoder and what is on top of it.

    Raises
    ------
    ValueError
        On construction, naming the field, what was given and what is accepted.

    Book: :ref:`ch-evaluation`.
    """

    model_type: ClassVar[str] = CLASSIFIER

    model: ModelConfig
    """The masked autoencoder whose encoder it is."""
    classes: int
    """How many classes there are, at least two."""
    pooling: Pooling = "patch_mean"
    """The mean of patch tokens, or the class token."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in their order, or none."""

    def __post_init__(self) -> None:
        known = isinstance(self.model, CrateMAEConfig | ViTMAEConfig)
        require(self, "model", known, "a CrateMAEConfig or a ViTMAEConfig")
        enough = is_count(self.classes) and self.classes > 1
        require(self, "classes", enough, "an integer of at least 2")
        check_choice(self, "pooling", get_args(Pooling))
        store(self, "class_names", tuple(self.class_names))
        named = len(self.class_names) in (0, self.classes)
        require(self, "class_names", named, f"{self.classes} names, or none")

    def to_dict(self) -> dict[str, Any]:
        """The architecture and all fields, ready for JSON."""
        return {
            "model_type": self.model_type,
            **asdict(self),
            "class_names": list(self.class_names),
            "model": self.model.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ClassifierConfig":
        """The configuration that :meth:`to_dict` wrote; ``ValueError`` for another
        architecture, or fields that are missing or unknown.
        """
        check_mapping(values)
        found = values.get("model_type", cls.model_type)
        if found != cls.model_type:
            raise ValueError(
                f"this is the configuration of a model of type {found!r}, accepted: "
                f"{cls.model_type!r}"
            )
        own = {name: value for name, value in values.items() if name != "model_type"}
        known = {"model", "classes", "pooling", "class_names"}
        if own.keys() - known or not {"model", "classes"} <= own.keys():
            raise ValueError(
                f"configuration fields {sorted(own)}: a classifier's are "
                f"{sorted(known)}, of which model and classes are needed"
            )
        own["class_names"] = tuple(own.get("class_names", ()))  # lists in JSON
        return cls(**{**own, "model": config_from_dict(own["model"])})


class DropPath(nn.Module):
    r"""Stochastic depth: in training, the branch of picture b is left out where its
    number :math:`u_b` is below the rate r, and else scaled by :math:`1/(1-r)`,

    .. math:: \frac{[u_b \ge r]}{1 - r}\, f(x)_b.

    The same in distribution as timm's ``DropPath``, which draws :math:`u` itself, from
    the global state of each process: what is dropped would depend on the number of
    processes, and a run that was cut off would not go on exactly.

    Parameters
    ----------
    rate : chance of leaving out, in [0, 1).

    Book: :ref:`ch-evaluation`.  Huang et al. (2016), per picture.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.noise: Tensor = torch.empty(0)
        """(B,) uniform in [0, 1), one number per picture of the batch."""

    def forward(self, x: Tokens) -> Tokens:
        """The branch (B, n, d), scaled or zero by picture; in evaluation as it is."""
        if not self.training or self.rate == 0:
            return x
        kept = (self.noise >= self.rate).to(x.dtype) / (1 - self.rate)
        return x * kept[:, None, None]


def pool(tokens: Tokens, pooling: Pooling) -> PictureVectors:
    r"""Encoder output (B, 1 + L, d) as one row per picture (B, d): :math:`z_0`, or
    :math:`\tfrac1L \sum_{i\ge1} z_i`.
    """
    return tokens[:, 0] if pooling == "class_token" else tokens[:, 1:].mean(dim=1)


class Classifier(SavedModel):
    r"""A linear classifier on an encoder, :math:`W\,\mathrm{pool}(\mathrm{LN}(X^L)) +
    b`, W and b zero at first.

    Parameters
    ----------
    autoencoder : its encoder is used; its decoder is kept, and does not learn.
    classes : how many there are.
    pooling : what the classifier reads.
    class_names : names of the classes in their order, or none.

    Book: :ref:`ch-evaluation`.  MAE pools before the last LayerNorm; here the encoder's
    own one comes first.
    """

    config_class: ClassVar[type[ClassifierConfig]] = ClassifierConfig
    config: ClassifierConfig

    def __init__(
        self,
        autoencoder: MaskedAutoencoder,
        classes: int,
        pooling: Pooling = "patch_mean",
        class_names: tuple[str, ...] = (),
    ) -> None:
        model: Any = autoencoder.config
        config = ClassifierConfig(model, classes, pooling, class_names)
        super().__init__()
        self.config = config
        self.autoencoder = autoencoder
        self.head = nn.utils.skip_init(nn.Linear, model.dim, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self.uses(name))

    @classmethod
    def from_config(cls, config: Any) -> "Classifier":
        """A freshly initialised classifier."""
        own: ClassifierConfig = config
        model = build_model(own.model)
        return cls(model, own.classes, own.pooling, own.class_names)

    @staticmethod
    def uses(name: str) -> bool:
        """Whether a parameter has a part in the scores: those of the decoder and the
        mask token have none.
        """
        first, _, rest = name.partition(".")
        own = ("patch_embedding", "class_token", "encoder", "encoder_norm")
        return first == "head" or rest.partition(".")[0] in own

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Parameters by depth for timm's ``param_groups_layer_decay``: the embedding,
        the layers one by one, and what no pattern matches, the norm and the classifier.
        """
        del coarse  # timm's other models group several layers
        return {
            "stem": r"^autoencoder\.(?:patch_embedding|class_token)",
            "blocks": r"^autoencoder\.encoder\.(\d+)",
        }

    def standardize(self, images: Tensor) -> Images:
        """Pixels to model units; see :meth:`MaskedAutoencoder.standardize`."""
        return self.autoencoder.standardize(images)

    def forward(self, images: Images) -> PictureVectors:
        """Class scores (B, classes) of images in model units."""
        features = self.autoencoder.forward_features(images)
        return self.head(pool(features, self.config.pooling))

    def set_drop_path(self, rate: float) -> None:
        r"""Stochastic depth from now on, in training mode: of D layers the
        :math:`\ell`-th (from 0) drops its branches at rate :math:`r \ell / (D - 1)`, as
        in MAE.

        A CRATE layer has one branch, its attention, as ISTA is no step beside an
        identity; a transformer's block has two.  :meth:`set_drop_noise` says what is
        dropped.
        """
        layers = list(self.autoencoder.encoder)
        for index, layer in enumerate(layers):
            own = rate * index / max(1, len(layers) - 1)
            if isinstance(layer, EncoderLayer):
                layer.drop_path = DropPath(own)
            else:
                layer.drop_path1, layer.drop_path2 = DropPath(own), DropPath(own)
            layer.train(layer.training)

    def drop_paths(self) -> list[DropPath]:
        """The modules of :meth:`set_drop_path`, from the lowest layer on."""
        return [m for m in self.modules() if isinstance(m, DropPath)]

    def set_drop_noise(self, noise: Tensor) -> None:
        """Uniform numbers (branches, B) in [0, 1) for the next forward pass; see
        :meth:`drop_paths`.
        """
        for module, row in zip(self.drop_paths(), noise, strict=True):
            module.noise = row
