r"""What pretraining costs, from the counts of :mod:`crate_core.model.cost`: parameters,
bytes, hours.

Book: :ref:`ch-pretraining`.
"""

import math

from crate_core.model.config import CrateMAEConfig
from crate_core.model.cost import operations, require_published, saved_numbers

BATCH = 4096
"""Pictures in a batch of the recipe, over which ISTA's one product of d x d matrices a
layer is spread.
"""

ADAM_BYTES = 16
"""Bytes a parameter in float32: itself, its gradient, and AdamW's two averages."""


def parameter_count(config: CrateMAEConfig) -> int:
    r"""Trainable parameters: a layer has :math:`U`, the output map with its bias, a
    dictionary, and two norms.

    Raises
    ------
    ValueError
        For a configuration with ablations that change a layer's parameters.

    Book: :ref:`ch-pretraining`.
    """
    require_published(config)
    if config.norm != "layer":
        raise ValueError(
            f"norm={config.norm!r}: parameters are counted for the published layers, norm='layer'"
        )
    d, pixels = config.dim, config.patch_size**2 * config.channels
    layer = 3 * d**2 + d + 4 * d
    ends = pixels * d + d + 2 * d + 4 * d + d * pixels + pixels
    return (config.depth + config.decoder_layers) * layer + ends


def state_bytes(config: CrateMAEConfig) -> int:
    """Bytes of weights, gradients and optimizer in float32."""
    return ADAM_BYTES * parameter_count(config)


def activation_bytes(config: CrateMAEConfig) -> int:
    r"""Bytes that one picture keeps for its backward pass in float32,

    .. math:: 4 n \big( (6 L + 3)\, d + 2 p + (4 + K)\, L \big)

    for L layers in all and p numbers a patch: the numbers of
    :func:`crate_core.model.cost.saved_numbers` that grow with the batch, and at the
    ends patches, embedding and errors.  Autocast to bf16 keeps about three quarters.

    Book: :ref:`ch-pretraining`.
    """
    n, pixels = math.prod(config.grid) + 1, config.patch_size**2 * config.channels
    layers = saved_numbers(config, 2) - saved_numbers(config, 1)
    return 4 * (layers + n * (3 * config.dim + 2 * pixels))


def hours(
    config: CrateMAEConfig,
    pictures: int,
    epochs: int | float,
    peak: float,
    utilisation: float,
    gpus: int,
) -> float:
    r"""Hours of a run, :math:`\text{operations} \cdot \text{pictures} \cdot
    \text{epochs} / (\text{gpus} \cdot \text{peak} \cdot \text{utilisation})`, in
    batches of 4,096.

    Parameters
    ----------
    config : the model.
    pictures, epochs : how much it sees.
    peak : operations a second that one GPU could do.
    utilisation : share of them that the run reaches, in (0, 1].
    gpus : how many.

    Book: :ref:`ch-pretraining`.
    """
    return (
        operations(config, BATCH).needed
        / BATCH
        * pictures
        * epochs
        / (gpus * peak * utilisation)
        / 3600
    )
