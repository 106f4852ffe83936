r"""Patches and back, sine-cosine positions, random masking and restoring.

Book: :ref:`ch-crate-mae`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from crate_core.checks import as_number, check_count, check_tensor, is_count
from crate_core.shapes import (
    HeadMaps,
    Images,
    Patches,
    PatchIndex,
    PatchMask,
    PatchNoise,
    PatchOrder,
    PixelMaps,
    Tokens,
    TokenSubset,
)

TARGET_VARIANCE_FLOOR = 1e-6
"""Added to a patch's variance before dividing by its root; the value that MAE uses."""


def check_grid(name: str, value: tuple[int, int]) -> None:
    """Raise ``ValueError`` unless an argument is two positive integers."""
    pair = isinstance(value, Sequence) and len(value) == 2
    if not pair or not all(map(is_count, value)):
        raise ValueError(f"{name} must be two positive integers, got {value!r}")


def patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Number of patches down and across; ``ValueError`` unless both sides are positive
    multiples of the patch.
    """
    if (
        not all(map(is_count, (height, width, patch_size)))
        or height < patch_size
        or width < patch_size
        or height % patch_size
        or width % patch_size
    ):
        raise ValueError(
            "image height and width must be multiples of the patch size "
            f"{patch_size!r}, got {height!r}x{width!r}"
        )
    return height // patch_size, width // patch_size


def patchify(images: Images, patch_size: int) -> Patches:
    r"""Cut images into flattened patches, (B, C, H, W) to (B, L, P*P*C) with L =
    (H/P)(W/P).

    Patches run along rows of the image; inside a patch: rows, columns, channels.

    Raises
    ------
    ValueError
        If the height or width is not a multiple of the patch size.

    Book: :ref:`ch-crate-mae`.  The order of MAE and of transformers' ViTMAE.
    """
    check_tensor("images", images)
    if images.ndim != 4:
        raise ValueError(f"images must be (B, C, H, W), got {tuple(images.shape)}")
    rows, columns = patch_grid(images.shape[-2], images.shape[-1], patch_size)
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", h=rows, w=columns)


def unpatchify(patches: Patches, patch_size: int, grid: tuple[int, int]) -> Images:
    r"""Inverse of :func:`patchify`, (B, L, P*P*C) to (B, C, H, W); ``grid`` is (H/P,
    W/P).

    Raises
    ------
    ValueError
        If L is not the grid's number of patches, or the last dimension is no multiple
        of P*P.

    Book: :ref:`ch-crate-mae`.
    """
    check_tensor("patches", patches)
    check_grid("grid", grid)
    check_count("patch_size", patch_size)
    rows, columns = grid
    if patches.shape[-2] != rows * columns or patches.shape[-1] % patch_size**2:
        raise ValueError(
            f"patches must be (B, {rows * columns}, {patch_size}*{patch_size}*C) for "
            f"grid {grid}, "
            f"got {tuple(patches.shape)}"
        )
    return rearrange(
        patches,
        "b (h w) (p q c) -> b c (h p) (w q)",
        h=rows,
        w=columns,
        p=patch_size,
        q=patch_size,
    )


def upsample(maps: HeadMaps, size: tuple[int, int], smooth: bool = False) -> PixelMaps:
    """Maps (B, K, h, w) over the picture, (B, K, H, W).

    By default each patch keeps its one value, since the model has no finer ones;
    ``smooth`` interpolates linearly between patch centres, which looks better and says
    no more.  Book: :ref:`ch-tokens-heads`.
    """
    check_tensor("maps", maps)
    check_grid("size", size)
    if not smooth:
        return F.interpolate(maps, size=size, mode="nearest")
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class NormalizedPatches:
    """Patches with mean 0 and variance 1 each; ``patches = normalized * std + mean``
    gives the originals back.
    """

    normalized: Patches
    mean: Tensor
    std: Tensor


def normalize_patches(patches: Patches) -> NormalizedPatches:
    r"""Standardise every patch by its own mean and (unbiased) variance, :math:`(x -
    \mu)/\sqrt{s^2 + 10^{-6}}`.

    Book: :ref:`ch-crate-mae`.  MAE's ``norm_pix_loss`` targets.
    """
    check_tensor("patches", patches)
    mean = patches.mean(dim=-1, keepdim=True)
    std = (patches.var(dim=-1, keepdim=True) + TARGET_VARIANCE_FLOOR).sqrt()
    return NormalizedPatches((patches - mean) / std, mean, std)


def sincos_positions(
    dim: int, grid: tuple[int, int], reference_grid: tuple[int, int] | None = None
) -> Tensor:
    r"""Fixed 2-D sine-cosine position table with a zero row for the class token, (1 +
    rows*columns, dim).

    .. math:: \big[\sin x\omega,\ \cos x\omega,\ \sin y\omega,\ \cos y\omega\big],
              \qquad
              \omega_i = 10000^{-4i/d}, \quad i = 0, \dots, d/4 - 1,

    x the column and y the row of the patch.  With a ``reference_grid`` the coordinates
    are rescaled so that the image covers the same range as in the reference, :math:`x =
    (c + \tfrac12)\, w_0/w - \tfrac12`: the exact table that interpolating the
    reference's table approximates.

    Raises
    ------
    ValueError
        If dim is not a multiple of four.

    Book: :ref:`ch-crate-mae`.  At the reference grid, the table of MAE.
    """
    check_grid("grid", grid)
    if reference_grid is not None:
        check_grid("reference_grid", reference_grid)
    if not is_count(dim) or dim % 4:
        raise ValueError(
            "dim must be a positive multiple of four for 2-D sine-cosine positions, "
            f"got {dim!r}"
        )
    rows, columns = grid
    reference_rows, reference_columns = reference_grid or grid
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    y = (torch.arange(rows, dtype=torch.float64) + 0.5) * (reference_rows / rows) - 0.5
    x = (torch.arange(columns, dtype=torch.float64) + 0.5) * (
        reference_columns / columns
    ) - 0.5
    phase_y, phase_x = y[:, None] * frequencies, x[:, None] * frequencies
    along_x = torch.cat([phase_x.sin(), phase_x.cos()], dim=-1).expand(
        rows, columns, dim // 2
    )
    along_y = torch.cat([phase_y.sin(), phase_y.cos()], dim=-1)[:, None].expand(
        rows, columns, dim // 2
    )
    table = torch.cat([along_x, along_y], dim=-1).reshape(rows * columns, dim)
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), table]).to(
        torch.get_default_dtype()
    )


@dataclass(frozen=True)
class Masking:
    """A random mask: ``ids_keep`` (B, L_visible), ``ids_restore`` (B, L), ``mask`` (B,
    L) with 1 where removed.
    """

    ids_keep: PatchIndex
    ids_restore: PatchOrder
    mask: PatchMask


def random_masking(noise: PatchNoise, mask_ratio: float) -> Masking:
    r"""Keep the ``int(L * (1 - mask_ratio))`` patches with the lowest noise.

    Parameters
    ----------
    noise : (B, L), uniform in [0, 1); fixes the mask.
    mask_ratio : share of patches to remove, in [0, 1).

    Raises
    ------
    ValueError
        If mask_ratio is outside [0, 1) or so large that no patch stays visible.

    Book: :ref:`ch-crate-mae`.  As in MAE and transformers' ViTMAE, with ties broken in
    order.
    """
    check_tensor("noise", noise)
    if not 0 <= as_number(mask_ratio) < 1:
        raise ValueError(f"mask_ratio must be in [0, 1), got {mask_ratio!r}")
    length = noise.shape[-1]
    visible = int(length * (1 - mask_ratio))
    if visible < 1:
        raise ValueError(
            f"mask_ratio={mask_ratio} leaves none of {length} patches visible"
        )
    ids_shuffle = torch.argsort(noise, dim=-1, stable=True)
    ids_restore = torch.argsort(ids_shuffle, dim=-1)
    return Masking(
        ids_shuffle[:, :visible], ids_restore, (ids_restore >= visible).to(noise.dtype)
    )


def gather_tokens(tokens: Tokens, ids: PatchIndex) -> TokenSubset:
    """Select tokens by index per image, (B, L, d) and (B, m) to (B, m, d)."""
    check_tensor("tokens", tokens)
    check_tensor("ids", ids)
    return torch.take_along_dim(tokens, ids[..., None], dim=-2)


def restore_tokens(
    visible: TokenSubset, mask_token: Tensor, ids_restore: PatchOrder
) -> Tokens:
    r"""Put visible tokens back in place and the mask token everywhere else, (B,
    L_visible, d) to (B, L, d).

    Book: :ref:`ch-crate-mae`.
    """
    check_tensor("visible", visible)
    check_tensor("mask_token", mask_token)
    check_tensor("ids_restore", ids_restore)
    removed = ids_restore.shape[-1] - visible.shape[-2]
    filler = mask_token.to(visible.dtype).expand(visible.shape[0], removed, -1)
    return gather_tokens(torch.cat([visible, filler], dim=-2), ids_restore)
