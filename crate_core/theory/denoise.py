r"""Noising, Tweedie's formula, projections, and the measure of what a denoiser leaves
behind.

Book: :ref:`ch-denoising`.
"""

import torch
from torch import Tensor

from crate_core.checks import as_number, check_real, check_tensor
from crate_core.shapes import Bases, SubspaceIndex, TokenVectors
from crate_core.theory.mixture import check_orthonormal


def add_noise(
    x: TokenVectors, sigma: float, generator: torch.Generator | None = None
) -> TokenVectors:
    r"""Gaussian noising :math:`z = x + \sigma w`, :math:`w \sim \mathcal{N}(0, I)`;
    sigma is per coordinate.

    Raises ``ValueError`` if sigma < 0.  Book: :ref:`ch-denoising`.
    """
    check_tensor("x", x)
    if not as_number(sigma) >= 0:
        raise ValueError(f"sigma must be >= 0, got {sigma!r}")
    return x + sigma * torch.randn(
        x.shape, generator=generator, dtype=x.dtype, device=x.device
    )


def tweedie(
    z: TokenVectors, score: TokenVectors, sigma: float | Tensor
) -> TokenVectors:
    r"""Tweedie's formula :math:`\mathbb{E}[x \mid z] = z + \sigma^2 \nabla_z \log
    p_\sigma(z)` for Gaussian noise.

    Parameters
    ----------
    z : (..., d) noisy tokens.
    score : (..., d) the score of the *noisy* density at z.
    sigma : noise standard deviation per coordinate, a number or a tensor of shape
        (...).

    Raises
    ------
    ValueError
        If the score does not have the shape of z.

    Book: :ref:`ch-denoising`.
    """
    check_tensor("z", z)
    check_tensor("score", score)
    check_real("sigma", sigma)
    if score.shape != z.shape:
        raise ValueError(
            f"the score must have the shape of z, {tuple(z.shape)}, got "
            f"{tuple(score.shape)}"
        )
    variance = torch.as_tensor(sigma, dtype=z.dtype, device=z.device)[..., None] ** 2
    return z + variance * score


def project(z: TokenVectors, basis: Tensor) -> TokenVectors:
    r"""Orthogonal projection :math:`U U^\top z` on one subspace, or on token i's own
    subspace.

    Parameters
    ----------
    z : (..., d) tokens.
    basis : (d, p), or (..., d, p) with one basis per token (``bases[labels]``);
        orthonormal columns.

    Raises
    ------
    ValueError
        If the dimensions do not fit or the columns are not orthonormal.

    Book: :ref:`ch-denoising`.
    """
    check_tensor("z", z)
    check_tensor("basis", basis)
    if basis.ndim < 2 or basis.shape[-2] != z.shape[-1]:
        raise ValueError(
            f"basis must be (..., {z.shape[-1]}, p) for tokens {tuple(z.shape)}, got "
            f"{tuple(basis.shape)}"
        )
    check_orthonormal(basis.reshape(-1, *basis.shape[-2:]))
    coordinates = basis.mT @ z[..., None]
    return (basis @ coordinates)[..., 0]


def nearest_subspace(z: TokenVectors, bases: Bases) -> SubspaceIndex:
    r"""Index of the subspace nearest to each token, :math:`\argmax_k \|U_k^\top z\|`,
    shape (...).

    Raises ``ValueError`` if the bases are not orthonormal or do not fit.  Book:
    :ref:`ch-denoising`.
    """
    check_tensor("z", z)
    check_orthonormal(bases)
    if bases.shape[1] != z.shape[-1]:
        raise ValueError(
            f"bases must be (K, {z.shape[-1]}, p) for tokens {tuple(z.shape)}, got "
            f"{tuple(bases.shape)}"
        )
    return torch.einsum("...d,kdp->...kp", z, bases).square().sum(-1).argmax(-1)


def project_nearest(z: TokenVectors, bases: Bases) -> TokenVectors:
    r"""Projection on the nearest subspace, :math:`U_k U_k^\top z` with :math:`k =
    \argmax_j \|U_j^\top z\|`.

    The limit of the posterior mean of a mixture with equal ranks as the noise vanishes,
    for almost every z.

    Raises ``ValueError`` if the bases are not orthonormal or do not fit.  Book:
    :ref:`ch-denoising`.
    """
    nearest = bases[nearest_subspace(z, bases)]  # (..., d, p)
    return (nearest @ (nearest.mT @ z[..., None]))[..., 0]


def noise_left(
    estimate: TokenVectors, noisy: TokenVectors, clean: TokenVectors
) -> float:
    r"""Share of the noise energy that a denoiser leaves, :math:`\|\hat X - X\|_F^2 /
    \|Z - X\|_F^2`.

    One: nothing was gained.  Zero: the clean signal was returned.  Above one: harm.
    For isotropic noise and small sigma, projecting on the true subspace leaves about
    p/d.

    Raises
    ------
    ValueError
        If the shapes differ or there is no noise to remove.

    Book: :ref:`ch-denoising`.
    """
    check_tensor("estimate", estimate)
    check_tensor("noisy", noisy)
    check_tensor("clean", clean)
    if not (estimate.shape == noisy.shape == clean.shape):
        raise ValueError(
            f"shapes must agree, got {tuple(estimate.shape)}, {tuple(noisy.shape)} "
            f"and {tuple(clean.shape)}"
        )
    before = float((noisy - clean).square().sum())
    if before == 0:
        raise ValueError("noisy equals clean: there is no noise to compare with")
    return float((estimate - clean).square().sum()) / before
