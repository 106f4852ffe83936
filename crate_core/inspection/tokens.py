r"""What tokens hold: traces of them through the layers, principal components, how
linear they are in the picture.

Everything here reads the named intermediates of
:class:`crate_core.model.autoencoder.MaskedAutoencoder` (``hidden_states``,
``attentions``) and takes pictures (B, C, H, W) in [0, 1], batch by batch.  It works for
CRATE-MAE and for the ViT-MAE baseline, trained in whatever way, and returns arrays;
plotting is elsewhere.

Book: :ref:`ch-tokens-heads`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from crate_core.model.autoencoder import MaskedAutoencoder, evaluation_mode
from crate_core.model.patches import patch_grid
from crate_core.shapes import (
    ColorMaps,
    HeadMaps,
    Images,
    Patches,
    PatchNoise,
    PatchOrder,
)

BATCH = 64
"""Pictures that pass through a model at a time."""


@dataclass(frozen=True)
class TokenTrace:
    """What an encoder made of B pictures, on the CPU; the class token comes first
    everywhere.

    ``hidden_states``: tokens (B, n, d), the embedding and then the output of each
    layer, before the final norm; ``attentions``: weights (B, K, n, n) of each layer,
    empty unless asked for; ``ids_restore`` (B, L) and ``grid`` say where the tokens
    belong.  n is L + 1, or fewer where a model encodes visible patches only.
    """

    hidden_states: tuple[Tensor, ...]
    attentions: tuple[Tensor, ...]
    ids_restore: PatchOrder
    grid: tuple[int, int]


@torch.no_grad()
def trace_tokens(
    model: MaskedAutoencoder,
    images: Images,
    *,
    mask_ratio: float = 0.0,
    noise: PatchNoise | None = None,
    attentions: bool = False,
) -> TokenTrace:
    """Tokens of every encoder layer, and attention weights if asked for; nothing is
    masked by default.

    Unmasked, tokens come in raster order, also from a model that encodes visible
    patches only.

    Parameters
    ----------
    model : used in evaluation mode, on its device.
    images : (B, C, H, W) in [0, 1], sides multiples of the patch size.
    mask_ratio : share of patches to remove, in [0, 1).
    noise : (B, L), fixes the mask: the lowest values stay visible.  Needed where the
        ratio is above 0.
    attentions : n x n numbers a head, picture and layer.

    Raises
    ------
    ValueError
        If there is no picture, for pictures or noise of the wrong shape, a ratio out of
        range, or one without noise.

    Book: :ref:`ch-tokens-heads`.
    """
    if len(images) == 0:
        raise ValueError("there is no picture to inspect")
    grid = patch_grid(images.shape[2], images.shape[3], model.config.patch_size)
    length = grid[0] * grid[1]
    if noise is None:
        if mask_ratio > 0:
            raise ValueError(
                f"mask_ratio={mask_ratio} needs noise (B, L) that says which "
                "patches to remove"
            )
        noise = (torch.arange(length) / length).expand(len(images), -1)
    with evaluation_mode(model):
        device = next(model.parameters()).device
        parts = [
            model(
                model.standardize(some.to(device)),
                mask_ratio,
                order.to(device),
                True,
                attentions,
            )
            for some, order in zip(images.split(BATCH), noise.split(BATCH), strict=True)
        ]
    return TokenTrace(
        tuple(
            torch.cat(layer).cpu()
            for layer in zip(*(part.hidden_states for part in parts), strict=True)
        ),
        tuple(
            torch.cat(layer).cpu()
            for layer in zip(*(part.attentions or () for part in parts), strict=True)
        ),
        torch.cat([part.ids_restore for part in parts]).cpu(),
        grid,
    )


# ---- principal components ----


@dataclass(frozen=True)
class TokenPCA:
    """Principal components of the patch tokens of several pictures jointly.

    ``coordinates`` (B, L, c); ``explained`` (c,), each component's share of the
    variance; ``directions`` (d, c), orthonormal, signs fixed by a positive third moment
    of the coordinates; ``mean`` (d,).
    """

    coordinates: Tensor
    explained: Tensor
    directions: Tensor
    mean: Tensor

    def colors(self, grid: tuple[int, int]) -> ColorMaps:
        """The first three components as red, green and blue (B, 3, h, w), each from its
        2nd to its 98th percentile over all pictures to [0, 1], so that a colour means
        the same in every picture.

        Raises ``ValueError`` with fewer than three components, or a grid of another
        number of tokens.
        """
        batch, length, components = self.coordinates.shape
        if components < 3 or grid[0] * grid[1] != length:
            raise ValueError(
                f"colours need 3 components on a grid of {length} tokens, got "
                f"{components} on {grid}"
            )
        flat = self.coordinates[..., :3].reshape(-1, 3)
        low, high = torch.quantile(
            flat, torch.tensor([0.02, 0.98], dtype=flat.dtype), dim=0
        )
        scaled = (
            (flat - low) / (high - low).clamp_min(torch.finfo(flat.dtype).tiny)
        ).clamp(0, 1)
        return scaled.reshape(batch, *grid, 3).movedim(-1, 1)


def token_pca(tokens: Patches, components: int = 3) -> TokenPCA:
    r"""Principal components of patch tokens of B pictures jointly: with all B L tokens
    as rows of one matrix, :math:`X - \mathbf{1}\bar x^\top = P S Q^\top`, the
    coordinates are the leading columns of :math:`PS`.

    Parameters
    ----------
    tokens : (B, L, d), without the class token; ``patchify(images, P)`` gives the
        control, components of pixels.
    components : how many, at most min(B L, d).

    Raises
    ------
    ValueError
        For a number of components that there are not.

    Book: :ref:`ch-tokens-heads`.
    """
    flat = tokens.cpu().double().flatten(0, 1)
    if not 1 <= components <= min(flat.shape):
        raise ValueError(
            f"components must be in 1 .. {min(flat.shape)}, got {components}"
        )
    mean = flat.mean(0)
    left, values, right = torch.linalg.svd(flat - mean, full_matrices=False)
    coordinates = (left * values)[:, :components]
    signs = torch.where(coordinates.pow(3).sum(0) < 0, -1.0, 1.0).to(flat)
    return TokenPCA(
        (coordinates * signs).unflatten(0, tokens.shape[:2]).to(tokens),
        (values.square() / values.square().sum())[:components].to(tokens),
        (right[:components].mT * signs).to(tokens),
        mean.to(tokens),
    )


def signed_components(pca: TokenPCA, grid: tuple[int, int]) -> HeadMaps:
    """Components as maps (B, 2c, h, w), each up and then each down, shifted so that the
    lowest value of a map is 0.

    A component's sign says nothing about what is an object, so both are offered.  Book:
    :ref:`ch-tokens-heads`.
    """
    maps = pca.coordinates.mT.unflatten(-1, grid)
    both = torch.cat([maps, -maps], dim=1)
    return both - both.amin((-2, -1), keepdim=True)


# ---- linearity ----


def midpoint_nonlinearity(
    model: MaskedAutoencoder, first: Images, second: Images
) -> Tensor:
    r"""How far the tokens of a half-and-half picture are from the mean of the two
    pictures' tokens, by layer,

    .. math:: \frac{\|\phi_\ell(\tfrac12 a + \tfrac12 b) - \tfrac12\phi_\ell(a) -
              \tfrac12\phi_\ell(b)\|_F}
                   {\tfrac12 \|\phi_\ell(a) - \phi_\ell(b)\|_F},

    0 where :math:`\phi_\ell` is affine between the two, 1 where the half-and-half
    picture's tokens are still those of one of the two pictures.

    Parameters
    ----------
    model : of either architecture; :math:`\phi_\ell` are the patch tokens after layer
        l, unmasked, before the norm.
    first, second : (B, C, H, W) in [0, 1], pairs a, b.

    Returns
    -------
    tensor (depth + 1, B), the embedding (always 0 up to rounding) and then every layer.

    Raises
    ------
    ValueError
        If there are not as many first as second pictures, of the same size.

    Book: :ref:`ch-tokens-heads`.
    """
    check_pairs(first, second)
    one, two, middle = (
        trace_tokens(model, pictures).hidden_states
        for pictures in (first, second, (first + second) / 2)
    )

    def norm(x: Tensor) -> Tensor:
        return x[:, 1:].cpu().double().flatten(1).norm(dim=1)

    return torch.stack(
        [
            norm(m - (a + b) / 2) / (norm(a - b) / 2)
            for a, b, m in zip(one, two, middle, strict=True)
        ]
    )


def check_pairs(first: Tensor, second: Tensor) -> None:
    """``ValueError`` unless there are as many first as second pictures, of the same
    size.
    """
    if first.shape != second.shape:
        raise ValueError(
            f"pairs of pictures must have one shape, got {tuple(first.shape)} "
            f"and {tuple(second.shape)}"
        )
