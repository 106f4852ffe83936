r"""What a forward pass and a reconstruction return.

Book: :ref:`ch-crate-mae`.
"""

from dataclasses import dataclass

from torch import Tensor

from crate_core.shapes import Images, Patches, PatchMask, PatchOrder


@dataclass(frozen=True)
class CrateMAEOutput:
    """What a forward pass returns; names as in transformers' ViTMAE."""

    loss: Tensor
    """Mean squared error over removed patches; not a number when none is removed."""
    logits: Patches
    """Predicted patches (B, L, P*P*C), in the units of the targets."""
    mask: PatchMask
    """(B, L), 1 where a patch was removed."""
    ids_restore: PatchOrder
    """(B, L), position of each patch in the order of increasing noise."""
    hidden_states: tuple[Tensor, ...] | None = None
    """Encoder tokens (B, n, d): the embedding, then the output of each layer; when
    asked for.
    """
    attentions: tuple[Tensor, ...] | None = None
    """Encoder attention weights (B, K, n, n) of each layer; when asked for."""
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    """Decoder tokens (B, n, d): its input, then the output of each layer; with the
    encoder's.
    """


@dataclass(frozen=True)
class Reconstruction:
    """Pictures (B, C, H, W) in the units of the input: ``masked`` input (removed
    patches at the pixel mean), ``predicted`` by the model everywhere, ``pasted``:
    visible patches of the input and predictions elsewhere; and the ``mask`` (B, L).
    """

    masked: Images
    predicted: Images
    pasted: Images
    mask: PatchMask
