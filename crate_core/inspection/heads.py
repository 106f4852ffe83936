r"""Where the attention heads of an encoder look.

Book: :ref:`ch-tokens-heads`.
"""

from dataclasses import dataclass

import torch

from crate_core.inspection.tokens import trace_tokens
from crate_core.model.autoencoder import MaskedAutoencoder
from crate_core.shapes import AttentionWeights, HeadMaps, Images

PICTURES_AT_A_TIME = 16
"""Pictures whose n x n weights are held at once, those of all layers and heads."""


@dataclass(frozen=True)
class AttentionMaps:
    """Where the heads of one layer look in B pictures, on the grid of patches: (B, K,
    h, w).

    ``class_token``: weight of each patch in the class token's output, the class token's
    own weight left out; ``mean_token``: weight of each patch in the output of the
    average patch token.
    """

    class_token: HeadMaps
    mean_token: HeadMaps


def attention_maps(
    model: MaskedAutoencoder, images: Images, layer: int = -1
) -> AttentionMaps:
    r"""Attention of one encoder layer, head by head, over the patches of unmasked
    pictures,

    .. math:: \text{class token:}\ (A_k)_{0j}, \qquad \text{mean token:}\ \tfrac1L
              \sum_{i \ge 1} (A_k)_{ij},
              \qquad j = 1, \dots, L.

    Each map sums to at most 1; what is missing went to the class token.

    Parameters
    ----------
    model : of either architecture.
    images : (B, C, H, W) in [0, 1], sides multiples of the patch size; larger than in
        training is allowed.
    layer : index of the encoder layer, negative from the end.

    Raises
    ------
    ValueError
        For pictures of the wrong shape, or a layer that there is not.

    Book: :ref:`ch-tokens-heads`.
    """
    depth = model.config.depth
    if not -depth <= layer < depth:
        raise ValueError(f"layer must be in -{depth} .. {depth - 1}, got {layer}")
    return all_attention_maps(model, images)[layer]


def all_attention_maps(model: MaskedAutoencoder, images: Images) -> list[AttentionMaps]:
    """:func:`attention_maps` of every encoder layer, from one pass.  Book:
    :ref:`ch-tokens-heads`.
    """
    maps: list[list[AttentionMaps]] = []
    for some in images.split(PICTURES_AT_A_TIME):
        trace = trace_tokens(model, some, attentions=True)
        maps.append([maps_of(weights, trace.grid) for weights in trace.attentions])
    return [
        AttentionMaps(
            torch.cat([m.class_token for m in layer]),
            torch.cat([m.mean_token for m in layer]),
        )
        for layer in zip(*maps, strict=True)
    ]


def maps_of(weights: AttentionWeights, grid: tuple[int, int]) -> AttentionMaps:
    """Attention weights (B, K, n, n) of one layer as maps on the grid; n = 1 + h w."""
    return AttentionMaps(
        weights[..., 0, 1:].unflatten(-1, grid).clone(),
        weights[..., 1:, 1:].mean(-2).unflatten(-1, grid),
    )
