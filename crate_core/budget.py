r"""What pretraining costs, from formulas: operations, bytes, hours and money.

One multiply-add counts as two operations.  For B pictures of n tokens (class token included), width d and a layer of
CRATE-MAE, the products of matrices cost

.. math::

    \underbrace{2 n d^2}_{U^* x} + \underbrace{4 n^2 d}_{\text{attention}} + \underbrace{2 n d^2}_{\text{output}}
    + \underbrace{2 n d^2 + 2 d^3 / B}_{\text{ISTA or } E,\ D^\top D}

and the backward pass twice as much, as each product needs the gradient of both its factors.

Book: :ref:`ch-pretraining`.
"""

import math
from dataclasses import dataclass

from crate_core.config import CrateMAEConfig

ADAM_BYTES = 16
"""Bytes a parameter in float32: itself, its gradient, and AdamW's two averages."""


@dataclass(frozen=True)
class Operations:
    r"""Floating-point operations of the products of matrices, for one picture."""

    embedding: int | float
    encoder: int | float
    gram: int | float
    r"""The encoder's :math:`D^\top D`, once a layer and batch."""
    decoder: int | float
    prediction: int | float

    @property
    def forward(self) -> int | float:
        """All of a forward pass."""
        return self.embedding + self.encoder + self.gram + self.decoder + self.prediction

    @property
    def training(self) -> int | float:
        r"""Forward and backward: thrice the forward pass, but for the pixels, which need no gradient, and for
        :math:`D^\top D`, whose two factors share one product.
        """
        return 3 * self.forward - self.embedding - self.gram


def operations(config: CrateMAEConfig, batch_size: int | float = math.inf) -> Operations:
    r"""Operations of a CRATE-MAE, one picture of a batch: the formula of the module, summed over the layers.

    Parameters
    ----------
    config : the published layers only (shared values, no over-complete dictionary, all tokens encoded).
    batch_size : over how many pictures the one :math:`D^\top D` a layer is spread.

    Raises
    ------
    ValueError
        For an ablation whose layers the formula does not describe.

    Book: :ref:`ch-pretraining`.
    """
    if config.separate_values or config.expansion != 1 or config.encode_visible_only:
        raise ValueError("the formula is for the published layers: no separate_values, expansion, encode_visible_only")
    patches = math.prod(config.grid)
    n, d, pixels = patches + 1, config.dim, config.patch_size**2 * config.channels
    attention = 4 * n * d**2 + 4 * n**2 * d
    return Operations(
        2 * patches * pixels * d,
        config.depth * (attention + 2 * n * d**2),
        config.depth * 2 * d**3 / batch_size,
        config.decoder_layers * (attention + 2 * n * d**2),
        2 * n * d * pixels,
    )


def parameter_count(config: CrateMAEConfig) -> int:
    r"""Trainable parameters: a layer has :math:`U`, the output map with its bias, a dictionary, and two norms.

    Book: :ref:`ch-pretraining`.
    """
    d, pixels = config.dim, config.patch_size**2 * config.channels
    layer = 3 * d**2 + d + 4 * d
    ends = pixels * d + d + 2 * d + 4 * d + d * pixels + pixels
    return (config.depth + config.decoder_layers) * layer + ends


def state_bytes(config: CrateMAEConfig) -> int:
    """Bytes of weights, gradients and optimizer in float32."""
    return ADAM_BYTES * parameter_count(config)


def activation_bytes(config: CrateMAEConfig) -> int:
    r"""Bytes that one picture keeps for its backward pass in float32,

    .. math:: 4 n \big( (6 L + 3)\, d + 2 p \big)

    for L layers in all and p numbers a patch: a layer keeps its input, two normalised ones, the shared projection, the
    attention's output and the ReLU's.  Fused attention keeps no weights.  Autocast to bf16 keeps about three quarters.

    Book: :ref:`ch-pretraining`.
    """
    n, pixels = math.prod(config.grid) + 1, config.patch_size**2 * config.channels
    return 4 * n * ((6 * (config.depth + config.decoder_layers) + 3) * config.dim + 2 * pixels)


def hours(
    config: CrateMAEConfig, pictures: int, epochs: int | float, peak: float, utilisation: float, gpus: int
) -> float:
    r"""Hours of a run, :math:`\text{operations} \cdot \text{pictures} \cdot \text{epochs} / (\text{gpus} \cdot
    \text{peak} \cdot \text{utilisation})`.

    Parameters
    ----------
    config : the model.
    pictures, epochs : how much it sees.
    peak : operations a second that one GPU could do.
    utilisation : share of them that the run reaches, in (0, 1].
    gpus : how many.

    Book: :ref:`ch-pretraining`.
    """
    return operations(config, 4096).training * pictures * epochs / (gpus * peak * utilisation) / 3600
