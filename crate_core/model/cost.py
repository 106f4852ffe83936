r"""What a CRATE-MAE costs, from its formulas: operations, numbers kept for the backward
pass, bytes moved.

Counts are of multiplications and additions in matrix products (an m x k by k x n
product has 2 m k n), which is what :func:`operation_counter` counts; element-wise work
is counted in bytes.

Book: :ref:`ch-cost`.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from crate_core.checks import as_number, check_count, check_instance
from crate_core.model.config import CrateMAEConfig

OperationCounts = dict[str, int]
"""Operations by part of the model."""


@dataclass(frozen=True)
class StepCost:
    """Operations of one step, ``forward`` and ``backward``, by part."""

    forward: OperationCounts
    backward: OperationCounts
    recomputed: int
    """Operations that repeat, backwards, a product of the forward pass not stored."""

    @property
    def total(self) -> int:
        """All operations of the step."""
        return sum(self.forward.values()) + sum(self.backward.values())

    @property
    def needed(self) -> int:
        """All but the recomputed ones: what a share of a GPU's peak is usually counted
        from.
        """
        return self.total - self.recomputed


def operation_counter() -> FlopCounterMode:
    """PyTorch's counter of operations, which also counts fused attention on a CPU.

    By itself it does so from torch 2.15 on only.  A context manager;
    ``get_total_flops()`` is the sum.

    Book: :ref:`ch-cost`.
    """

    def forward(query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(
        gradient: Any, query: Any, key: Any, value: Any, *rest: Any, **more: Any
    ) -> int:
        return sdpa_backward_flop_count(gradient, query, key, value)

    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: forward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        },
    )


def check_config(config: CrateMAEConfig) -> None:
    """Raise ``TypeError`` unless it is a :class:`CrateMAEConfig`."""
    check_instance("config", config, CrateMAEConfig, "a CrateMAEConfig")


def require_published(config: CrateMAEConfig) -> None:
    """Raise ``ValueError`` for ablations that change a layer's products.

    Book: :ref:`ch-cost`.
    """
    check_config(config)
    if config.expansion != 1 or config.separate_values:
        raise ValueError(
            "costs are counted for the published layers: expansion=1, "
            "separate_values=False"
        )


def token_counts(
    config: CrateMAEConfig, patches: int | None = None, mask_ratio: float = 0.75
) -> tuple[int, int]:
    """Tokens in the encoder and in the decoder, the class token included, for images of
    so many ``patches``.
    """
    check_config(config)
    if patches is not None:
        check_count("patches", patches)
    if not 0 <= as_number(mask_ratio) <= 1:
        raise ValueError(f"mask_ratio must be in [0, 1], got {mask_ratio!r}")
    length = config.grid[0] * config.grid[1] if patches is None else patches
    return 1 + (
        int(length * (1 - mask_ratio)) if config.encode_visible_only else length
    ), 1 + length


def operations(
    config: CrateMAEConfig,
    batch: int,
    patches: int | None = None,
    mask_ratio: float = 0.75,
    fused: bool = True,
) -> StepCost:
    r"""Operations of a training step on ``batch`` images, by part.

    With N tokens in a batch of images of n tokens each,

    .. math:: \mathrm{projections}\; 4 N d^2, \qquad
              \mathrm{attention}\; 4 N n d, \qquad
              \mathrm{ISTA}\; 2 N d^2 + 2 d^3 \ \mathrm{(fused)} \ \mathrm{or}\ 6 N d^2,
              \qquad
              \mathrm{densify}\; 2 N d^2

    a layer in the forward pass.  Backwards a linear map costs twice that (gradients of
    its input and of its weight; the patch embedding once, images have no gradient),
    attention 5/2 of it (its weights are computed again, not stored; 1/2 less where they
    are stored) and M once.

    Parameters
    ----------
    config : sizes.
    batch : images.
    patches : patches an image; those of the configured size if ``None``.
    mask_ratio : decides the encoder's tokens with ``encode_visible_only``.
    fused : the package's own form; otherwise three products in ISTA and stored
        attention weights.

    Raises
    ------
    ValueError
        For a configuration with ablations that change the products.

    Book: :ref:`ch-cost`, :eq:`eq-cost-layer`.
    """
    require_published(config)
    check_count("batch", batch)
    encoded, decoded = (batch * n for n in token_counts(config, patches, mask_ratio))
    d, pixels = config.dim, config.patch_size**2 * config.channels
    square = 2 * d * d
    forward = {
        "embedding": 2 * (decoded - batch) * pixels * d,
        "projections": 2
        * square
        * (encoded * config.depth + decoded * config.decoder_layers),
        "attention": 4
        * d
        * (encoded**2 * config.depth + decoded**2 * config.decoder_layers)
        // batch,
        "ISTA": (1 if fused else 3) * square * encoded * config.depth,
        "densify": square * decoded * config.decoder_layers,
        "prediction": 2 * decoded * pixels * d,
    }
    return _step_cost(forward, square * d * config.depth if fused else None)


def _step_cost(forward: dict[str, int], matrices: int | None) -> StepCost:
    """A step from its forward operations by part, see :func:`operations`.

    ``matrices`` are the operations of M of ISTA in all layers; ``None`` for the form
    that has no M and stores the attention weights.
    """
    backward = {
        part: (1 if part == "embedding" else 2) * count
        for part, count in forward.items()
    }
    recomputed = 0 if matrices is None else forward["attention"] // 2
    backward["attention"] += recomputed
    if matrices is not None:
        forward = {**forward, "M of ISTA": matrices}
        backward["M of ISTA"] = matrices
    return StepCost(forward, backward, recomputed)


def classifier_operations(config: CrateMAEConfig, batch: int, classes: int) -> StepCost:
    r"""Operations of a fine-tuning step on ``batch`` images, by part: the encoder on
    all patches, and a linear classifier with 2 B d c operations forward.

    Counted as in :func:`operations` with ``fused``; a step of a probe's features is
    ``forward`` alone, without the classifier.

    Parameters
    ----------
    config : sizes; the decoder does not count.
    batch : images, B.
    classes : c.

    Raises
    ------
    ValueError
        For a configuration with ablations that change the products.

    Book: :ref:`ch-evaluation`.
    """
    require_published(config)
    check_count("batch", batch)
    check_count("classes", classes)
    patches, d = math.prod(config.grid), config.dim
    tokens, square = batch * (1 + patches), 2 * d * d
    pixels = config.patch_size**2 * config.channels
    forward = {
        "embedding": 2 * batch * patches * pixels * d,
        "projections": 2 * square * tokens * config.depth,
        "attention": 4 * d * tokens * (1 + patches) * config.depth,
        "ISTA": square * tokens * config.depth,
        "classifier": 2 * batch * d * classes,
    }
    return _step_cost(forward, square * d * config.depth)


def saved_numbers(
    config: CrateMAEConfig,
    batch: int,
    patches: int | None = None,
    mask_ratio: float = 0.75,
) -> int:
    r"""Numbers that the layers keep for the backward pass, beside the weights.

    Each layer keeps six arrays of N tokens: after each LayerNorm, the projection V, the
    attended tokens, the half step and its output (which the next layer starts from);
    two numbers a token and LayerNorm; one a token and head, the logarithm of the
    softmax's sum, in the place of n; and an encoder layer the matrix M:

    .. math:: 6 N d + 4 N + N K \quad (+\, d^2).

    Linear in the tokens.  Stored attention weights would add :math:`N n K` a layer.

    Raises
    ------
    ValueError
        For a configuration with ablations that change the products.

    Book: :ref:`ch-cost`, :eq:`eq-cost-memory`.
    """
    require_published(config)
    check_count("batch", batch)
    encoded, decoded = (batch * n for n in token_counts(config, patches, mask_ratio))
    token = 6 * config.dim + 4 + config.heads
    return (
        token * (encoded * config.depth + decoded * config.decoder_layers)
        + config.depth * config.dim**2
    )


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
            f"norm={config.norm!r}: parameters are counted for the published layers, "
            "norm='layer'"
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
    :func:`saved_numbers` that grow with the batch, and at the
    ends patches, embedding and errors.  Autocast to bf16 keeps about three quarters.

    Book: :ref:`ch-pretraining`.
    """
    check_config(config)
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

    Raises
    ------
    ValueError
        If a number is not positive, or the utilisation above one.

    Book: :ref:`ch-pretraining`.
    """
    numbers = {"pictures": pictures, "epochs": epochs, "peak": peak, "gpus": gpus}
    for name, value in {**numbers, "utilisation": utilisation}.items():
        most = 1 if name == "utilisation" else math.inf
        if not 0 < as_number(value) <= most:
            raise ValueError(f"{name} must be above 0, up to {most}, got {value!r}")
    return (
        operations(config, BATCH).needed
        / BATCH
        * pictures
        * epochs
        / (gpus * peak * utilisation)
        / 3600
    )
