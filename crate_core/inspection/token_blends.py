r"""Pictures from tokens: decoding, blending the tokens of two pictures, swapping some
of them.

Book: :ref:`ch-tokens-heads`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from crate_core.inspection.tokens import BATCH, TokenTrace, check_pairs, trace_tokens
from crate_core.model.autoencoder import MaskedAutoencoder, evaluation_mode
from crate_core.model.patches import patchify, unpatchify, upsample
from crate_core.shapes import Images, PatchNoise, PatchOrder, PatchSelection, Tokens


@torch.no_grad()
def decode_tokens(
    model: MaskedAutoencoder,
    tokens: Tokens,
    ids_restore: PatchOrder,
    grid: tuple[int, int],
    *,
    layer: int | None = None,
    like: Images | None = None,
) -> Images:
    """Encoder tokens to pictures: the encoder layers after ``layer``, then the decoder.
    Not cut off at 0 and 1.

    Parameters
    ----------
    model : used in evaluation mode, on its device.
    tokens : (B, n, d) as in ``TokenTrace.hidden_states[layer]``.
    ids_restore, grid : of the trace.
    layer : 0 is the embedding, ``depth`` (the default) the output of the last layer.
    like : (B, C, H, W) in [0, 1], pictures whose patch means and deviations a model of
        normalised targets needs.

    Raises
    ------
    ValueError
        For a layer that there is not, or a model of normalised targets without
        ``like``.

    Book: :ref:`ch-tokens-heads`.
    """
    depth, size = model.config.depth, model.config.patch_size
    layer = depth if layer is None else layer
    if not 0 <= layer <= depth:
        raise ValueError(f"layer must be in 0 .. {depth}, got {layer}")
    if model.config.normalize_targets and like is None:
        raise ValueError(
            "this model predicts normalised patches; give like=, pictures with "
            "their means and deviations"
        )
    with evaluation_mode(model):
        device = next(model.parameters()).device
        decoded = []
        for some, order in zip(
            tokens.split(BATCH), ids_restore.split(BATCH), strict=True
        ):
            encoded = model.encode(some.to(device), start=layer)
            decoded.append(model.decode(encoded, order.to(device), grid))
    patches = torch.cat(decoded)
    if like is not None:
        originals = patchify(model.standardize(like.to(device)), size)
        patches = model.denormalize(patches, originals)
    return model.unstandardize(unpatchify(patches, size, grid)).cpu()


@dataclass(frozen=True)
class Interpolation:
    """Pictures (T, B, C, H, W) between two: decoded from blends of ``tokens``, decoded
    from the tokens of blended ``pixels``, and the ``blend`` of pixels itself.
    """

    tokens: Tensor
    pixels: Tensor
    blend: Tensor


def interpolate_tokens(
    model: MaskedAutoencoder,
    first: Images,
    second: Images,
    weights: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    layer: int | None = None,
    mask_ratio: float = 0.0,
    noise: PatchNoise | None = None,
) -> Interpolation:
    r"""Decode :math:`(1-t)\,\phi_\ell(a) + t\,\phi_\ell(b)`, and beside it
    :math:`\phi_\ell((1-t)a + tb)`.

    At the embedding, layer 0, the two are the same; after it they differ as far as the
    layers are not affine.

    Parameters
    ----------
    model : of either architecture.
    first, second : (B, C, H, W) in [0, 1], pairs a, b.
    weights : the values of t.
    layer : where tokens are blended, 0 .. depth; the last by default.
    mask_ratio, noise : as in :func:`trace_tokens`; one mask for both pictures of a
        pair.

    Raises
    ------
    ValueError
        If there are not as many first as second pictures, or as :func:`trace_tokens`
        and :func:`decode_tokens` do.

    Book: :ref:`ch-tokens-heads`.
    """
    check_pairs(first, second)
    layer = model.config.depth if layer is None else layer

    def trace(images: Tensor) -> TokenTrace:
        return trace_tokens(model, images, mask_ratio=mask_ratio, noise=noise)

    one, two = trace(first), trace(second)
    tokens: list[Tensor] = []
    pixels: list[Tensor] = []
    blends: list[Tensor] = []
    for t in weights:
        blend = torch.lerp(first, second, t)
        between = torch.lerp(one.hidden_states[layer], two.hidden_states[layer], t)
        for states, pictures in (
            (between, tokens),
            (trace(blend).hidden_states[layer], pixels),
        ):
            pictures.append(
                decode_tokens(
                    model, states, one.ids_restore, one.grid, layer=layer, like=blend
                )
            )
        blends.append(blend)
    return Interpolation(torch.stack(tokens), torch.stack(pixels), torch.stack(blends))


def swap_tokens(
    model: MaskedAutoencoder,
    first: Images,
    second: Images,
    swapped: PatchSelection,
    *,
    layer: int | None = None,
    mask_ratio: float = 0.0,
    noise: PatchNoise | None = None,
) -> Images:
    """Decode the first pictures' tokens, those of the selected patches taken from the
    second pictures.

    Parameters
    ----------
    model : of either architecture.
    first, second : (B, C, H, W) in [0, 1].
    swapped : (L,), true for patches whose tokens come from the second picture.
    layer : where tokens are swapped, 0 .. depth; the last by default.
    mask_ratio, noise : as in :func:`trace_tokens`; one mask for both pictures of a
        pair.

    Returns
    -------
    tensor (B, C, H, W), not cut off at 0 and 1.

    Raises
    ------
    ValueError
        If there are not as many first as second pictures, or ``swapped`` has not one
        entry a patch.

    Book: :ref:`ch-tokens-heads`.
    """
    check_pairs(first, second)
    layer = model.config.depth if layer is None else layer
    one, two = (
        trace_tokens(model, pictures, mask_ratio=mask_ratio, noise=noise)
        for pictures in (first, second)
    )
    if len(swapped) != one.ids_restore.shape[1]:
        raise ValueError(
            f"swapped must have {one.ids_restore.shape[1]} entries, one a "
            f"patch, got {len(swapped)}"
        )
    tokens = one.hidden_states[layer]
    chosen = swapped.expand(len(first), -1)
    if model.config.encode_visible_only:  # tokens stand in the order of the mask
        chosen = chosen.gather(1, one.ids_restore.argsort(1)[:, : tokens.shape[1] - 1])
    chosen = F.pad(chosen, (1, 0), value=False)[..., None]
    like = torch.where(
        patch_pixels(swapped, one.grid, model.config.patch_size), second, first
    )
    mixed = torch.where(chosen, two.hidden_states[layer], tokens)
    return decode_tokens(
        model, mixed, one.ids_restore, one.grid, layer=layer, like=like
    )


def patch_pixels(
    selected: PatchSelection, grid: tuple[int, int], patch_size: int
) -> Tensor:
    """A selection of patches (L,) as pixels (H, W)."""
    size = (grid[0] * patch_size, grid[1] * patch_size)
    return upsample(selected.float().reshape(1, 1, *grid), size)[0, 0] > 0
