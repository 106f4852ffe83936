r"""When the exact gradient of R^c denoises: the bound, the failure bound, and the
random-matrix law.

Tokens are rows, ``z`` of shape (..., n, d); the subspaces are mutually orthogonal in
every function of this module. Pure functions; beta = p / (n eps^2) as in
:func:`crate_core.theory.rate.subspace_beta`.

Book: :ref:`ch-compression-denoising`.
"""

import math

import torch
from torch import Tensor

from crate_core.checks import as_number, check_tensor, is_count
from crate_core.shapes import Bases, Labels, PerToken, Tokens
from crate_core.theory.mixture import check_members, check_orthogonal_subspaces
from crate_core.theory.rate import (
    check_bases,
    check_eps,
    head_coordinates,
    subspace_beta,
    subspace_coding_rate_grad,
)


def check_labels(z: Tokens, bases: Bases, labels: Labels) -> None:
    """Raise ``ValueError`` unless each of the n tokens has a label in [0, K)."""
    check_bases(z, bases)
    check_members(labels, z.shape[-2], bases.shape[0])


def noise_direction(
    z: Tokens, bases: Bases, labels: Labels, *, within_span: bool = False
) -> Tokens:
    r"""The part of each token outside its own subspace, :math:`z_i - U_{k_i}
    U_{k_i}^\top z_i`.

    Subtracting it projects the token on its subspace.  With ``within_span`` only what
    lies in the span of all the subspaces, :math:`r_i = \sum_{k \ne k_i} U_k U_k^\top
    z_i`: all that the gradient of R^c can ever see.

    Parameters
    ----------
    z : tensor (..., n, d)
        Tokens as rows.
    bases : tensor (K, d, p)
        Orthonormal bases.
    labels : tensor (n,)
        Own subspace of each token.
    within_span : bool
        Leave out what no subspace holds.

    Returns
    -------
    tensor (..., n, d)

    Raises
    ------
    ValueError
        If shapes or labels do not fit.

    Book: :ref:`ch-compression-denoising`, :eq:`eq-cd-target`.
    """
    check_labels(z, bases, labels)
    v = head_coordinates(z, bases)  # (..., K, n, p)
    # (K, n)
    own = labels == torch.arange(bases.shape[0], device=labels.device)[:, None]
    if within_span:
        return (v.masked_fill(own[..., None], 0.0) @ bases.mT).sum(-3)
    return z - (v.masked_fill(~own[..., None], 0.0) @ bases.mT).sum(-3)


def denoising_cosine(z: Tokens, bases: Bases, labels: Labels, eps: float) -> PerToken:
    r"""Cosine between :math:`\nabla_{z_i} R^c` and the noise direction :math:`z_i -
    U_{k_i} U_{k_i}^\top z_i`.

    One: a step against the gradient moves the token straight towards its subspace.

    Parameters
    ----------
    z : tensor (..., n, d)
        Tokens as rows.
    bases : tensor (K, d, p)
        Orthonormal bases, orthogonal to each other or not.
    labels : tensor (n,)
        Own subspace of each token.
    eps : float
        Coding precision, > 0.

    Returns
    -------
    tensor (..., n)

    Raises
    ------
    ValueError
        If shapes, labels or eps do not fit.

    Book: :ref:`ch-compression-denoising`.
    """
    target = noise_direction(z, bases, labels)
    return torch.cosine_similarity(
        subspace_coding_rate_grad(z, bases, eps), target, dim=-1, eps=0.0
    )


def compression_error(z: Tokens, bases: Bases, labels: Labels, eps: float) -> PerToken:
    r"""How far the gradient is from the noise it should point at, :math:`\|\nabla_{z_i}
    R^c/\beta - r_i\| / \|r_i\|`.

    :math:`r_i` is :func:`noise_direction` within the span.

    Parameters
    ----------
    z : tensor (..., n, d)
        Tokens as rows.
    bases : tensor (K, d, p)
        Orthonormal bases of mutually orthogonal subspaces.
    labels : tensor (n,)
        Own subspace of each token.
    eps : float
        Coding precision, > 0.

    Returns
    -------
    tensor (..., n)
        Relative errors; 0 is perfect, 1 is no better than a zero gradient.

    Raises
    ------
    ValueError
        If shapes, labels or eps do not fit, or the subspaces are not mutually
        orthogonal.

    Book: :ref:`ch-compression-denoising`, :prf:ref:`thm-cd-bound`.
    """
    check_orthogonal_subspaces(bases)
    target = noise_direction(z, bases, labels, within_span=True)
    beta = subspace_beta(z.shape[-2], bases.shape[-1], eps)
    gradient = subspace_coding_rate_grad(z, bases, eps)
    return (gradient / beta - target).norm(dim=-1) / target.norm(dim=-1)


def compression_bound(z: Tokens, bases: Bases, labels: Labels, eps: float) -> PerToken:
    r"""Upper bound of :func:`compression_error` for every token,

    .. math:: \sqrt{\Big(\frac{1+\beta b^2}{\beta\, \mathrm{dist}_i \|r_i\|}\Big)^2 +
              \big(o_i + \beta b^2\big)^2} .

    The terms are explained in :func:`compression_bound_terms`.

    Parameters
    ----------
    z : tensor (n, d)
        Tokens as rows, no batch.
    bases : tensor (K, d, p)
        Orthonormal bases of mutually orthogonal subspaces.
    labels : tensor (n,)
        Own subspace of each token.
    eps : float
        Coding precision, > 0.

    Returns
    -------
    tensor (n,)
        Infinite where a token's coordinates depend linearly on its class mates'
        (certain with more than p of them).

    Raises
    ------
    ValueError
        If shapes, labels or eps do not fit, or the subspaces are not mutually
        orthogonal.

    Book: :ref:`ch-compression-denoising`, :prf:ref:`thm-cd-bound`.
    """
    own, occupied, mistaken = compression_bound_terms(z, bases, labels, eps)
    return torch.hypot((1 + mistaken) * own, occupied + mistaken)


def compression_bound_terms(
    z: Tokens, bases: Bases, labels: Labels, eps: float
) -> tuple[PerToken, PerToken, float]:
    r"""The three numbers of :func:`compression_bound`,

    .. math:: \frac1{\beta\, \mathrm{dist}_i \|r_i\|}, \qquad o_i, \qquad \beta b^2 :

    how much of the own signal is in the gradient, against the noise
    (:math:`\mathrm{dist}_i` is the distance of a token's own coordinates from the span
    of those of its class mates); the root of the share of the noise :math:`r_i` that
    lies in the ranges of the other heads' own tokens; and how far noise counts as
    occupying a head (b is the largest spectral norm of a head's coordinates of tokens
    that are not its own).

    Parameters
    ----------
    z : tensor (n, d)
        Tokens as rows, no batch.
    bases : tensor (K, d, p)
        Orthonormal bases of mutually orthogonal subspaces.
    labels : tensor (n,)
        Own subspace of each token.
    eps : float
        Coding precision, > 0.

    Returns
    -------
    tuple of tensor (n,), tensor (n,), float
        The first is infinite where the bound is.

    Raises
    ------
    ValueError
        As :func:`compression_bound`.

    Book: :ref:`ch-compression-denoising`, :prf:ref:`thm-cd-bound`.
    """
    check_tensor("tokens", z)
    if z.ndim != 2:
        raise ValueError(
            f"the bound takes one set of tokens (n, d), got {tuple(z.shape)}"
        )
    check_labels(z, bases, labels)
    check_orthogonal_subspaces(bases)
    beta = subspace_beta(z.shape[0], bases.shape[-1], eps)
    v = head_coordinates(z, bases)  # (K, n, p)
    r_norm = noise_direction(z, bases, labels, within_span=True).norm(dim=-1)
    distance = torch.zeros_like(r_norm)
    seen_squared = torch.zeros_like(r_norm)
    largest = 0.0
    for k, coordinates in enumerate(v):
        own = labels == k
        others = coordinates[~own]
        if own.any():
            q, distance[own] = _range_and_distances(coordinates[own])
            seen_squared[~own] += (others @ q).square().sum(-1)
        if len(others):
            largest = max(largest, float(torch.linalg.matrix_norm(others, ord=2)))
    return (
        1 / (beta * distance * r_norm),
        seen_squared.sqrt() / r_norm,
        beta * largest**2,
    )


def _range_and_distances(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal basis (p, r) of the span of the rows, and each row's distance from
    the span of the others.
    """
    count = rows.shape[0]
    left, singular, right = torch.linalg.svd(rows, full_matrices=False)
    kept = singular > singular[0] * max(rows.shape) * torch.finfo(rows.dtype).eps
    if int(kept.sum()) < count:
        return right[kept].mT, rows.new_zeros(count)
    # 1/dist_i^2 is entry (i, i) of the inverse Gram matrix
    return right.mT, (left / singular).norm(dim=-1).reciprocal()


def contraction_bound(z: Tokens, bases: Bases, eps: float) -> tuple[Tensor, Tensor]:
    r"""How close the gradient is to a pure contraction of the tokens: factor theta and
    relative deviation delta in

    .. math:: \nabla R^c / \beta = \theta\,(P Z + \Delta), \quad
              \|\Delta_i\| \le \delta \|P z_i\|, \qquad
              \delta = \frac{\beta (\mu_+ - \mu_-)}{2 + \beta (\mu_+ + \mu_-)},

    where :math:`\mu_\pm` are the extreme eigenvalues of all :math:`V_k V_k^\top` (p x
    p) and :math:`P` projects on the span of the subspaces.

    Parameters
    ----------
    z : tensor (..., n, d)
        Tokens as rows.
    bases : tensor (K, d, p)
        Orthonormal bases of mutually orthogonal subspaces.
    eps : float
        Coding precision, > 0.

    Returns
    -------
    tuple of tensors (...)
        theta in (0, 1] and delta in [0, 1).

    Raises
    ------
    ValueError
        If shapes or eps do not fit, or the subspaces are not mutually orthogonal.

    Book: :ref:`ch-compression-denoising`, :prf:ref:`thm-cd-contraction`.
    """
    check_bases(z, bases)
    check_orthogonal_subspaces(bases)
    v = head_coordinates(z, bases)
    n, rank = v.shape[-2:]
    beta = subspace_beta(n, rank, eps)
    squares = beta * torch.linalg.svdvals(v).square()  # (..., K, min(n, p))
    largest = squares.amax((-2, -1))
    smallest = squares.amin((-2, -1)) if n >= rank else torch.zeros_like(largest)
    # extreme eigenvalues of (I + beta V V^T)^{-1}
    high, low = 1 / (1 + smallest), 1 / (1 + largest)
    return (high + low) / 2, (high - low) / (high + low)


def denoising_cosine_law(
    n: int, dim: int, components: int, rank: int, sigma: float, eps: float
) -> float:
    r"""Random-matrix prediction of :func:`denoising_cosine` for n tokens of a balanced
    mixture,

    .. math:: \cos = \frac{\bar\mu}{\sqrt{\overline{\mu^2}}}\;
              \frac{\sqrt{(K-1)\,g_2}\; q_2}{\sqrt{g_1 q_1^2 + (K-1)\,g_2 q_2^2}}
              \sqrt{\frac{(K-1)\,p}{d-p}},

    with the load :math:`\chi = n/(Kp)`, :math:`g_2 = \sigma^2 p`, :math:`g_1 = 1 +
    g_2`, :math:`q_i = 1/(1+\beta g_i \bar\mu)`, :math:`S = g_1 q_1^2 + (K-1)\, g_2
    q_2^2`, :math:`\overline{\mu^2} = \bar\mu/(1+\beta\chi S)`, and :math:`\bar\mu` the
    solution of :math:`\bar\mu = 1/(1+\beta\chi[g_1 q_1 + (K-1)\, g_2 q_2])`.

    A heuristic (a deterministic equivalent for n, d, p large together), no theorem.
    The model: mutually orthogonal subspaces, signal of unit mean squared norm spread
    evenly over its p directions, isotropic noise.

    Parameters
    ----------
    n : int
        Number of tokens, in equal shares to the subspaces.
    dim, components, rank : int
        d, K and p, with K >= 2 and K p <= d.
    sigma : float
        Noise standard deviation per coordinate, > 0.
    eps : float
        Coding precision, > 0.

    Returns
    -------
    float
        Predicted mean cosine, in (0, 1).

    Raises
    ------
    ValueError
        If sigma or eps is not positive, or the sizes are impossible.

    Book: :ref:`ch-compression-denoising`, :eq:`eq-cd-law`.
    """
    check_eps(eps)
    if not as_number(sigma) > 0:
        raise ValueError(f"sigma must be > 0, got {sigma!r}")
    counts = all(map(is_count, (dim, components, rank)))
    if not counts or components < 2 or components * rank > dim:
        raise ValueError(
            f"need K >= 2 and K p <= d, got dim={dim!r}, components={components!r}, "
            f"rank={rank!r}"
        )
    beta = subspace_beta(n, rank, eps)
    load = n / (components * rank)
    g2 = sigma**2 * rank
    g1 = 1 + g2
    other_g2 = (components - 1) * g2

    # x = beta mean(mu) is where this, increasing in x, is 0:
    def excess(log_x: float) -> float:
        x = math.exp(log_x)
        seen = g1 * x / (1 + g1 * x) + other_g2 * x / (1 + g2 * x)
        return x / beta + load * seen - 1

    # here, because scipy would double the time of `import crate_core`
    from scipy.optimize import brentq

    # at its ends the function has its signs, which rounding must not change: a margin
    low, high = -math.log(1 / beta + load * (g1 + other_g2)), math.log(beta)
    x = math.exp(brentq(excess, low - 0.01, high + 0.01, xtol=1e-15))
    m = x / beta
    q1, q2 = 1 / (1 + g1 * x), 1 / (1 + g2 * x)
    energy = g1 * q1**2 + other_g2 * q2**2
    visible = math.sqrt((components - 1) * rank / (dim - rank))
    return visible * math.sqrt(m * (1 + beta * load * energy) * other_g2 / energy) * q2
