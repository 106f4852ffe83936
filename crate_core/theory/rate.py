r"""Coding rates R and R^c, the sparse rate reduction, and their gradients in closed
form.

Tokens are rows, ``z`` of shape (..., n, d).  ``eps`` is the coding precision epsilon
(not its square).

Book: :ref:`ch-coding-rate`.
"""

import math

import torch
from torch import Tensor

from crate_core.checks import as_number, check_tensor
from crate_core.shapes import Bases, Heads, Labels, Scalars, Tokens

CHOLESKY_LIMIT = 1e-3
"""Cholesky serves while ``weight * |v|_F^2 * machine epsilon`` is below this: its error
in nats is of that order.
"""


def check_eps(eps: float) -> None:
    """Raise ``ValueError`` unless eps, the coding precision, is positive and finite
    (and its square is).
    """
    value = as_number(eps)
    if not (value > 0 and 0 < value * value < math.inf):
        raise ValueError(
            f"eps, the coding precision, must be positive and finite, got {eps!r}"
        )


def check_tokens(z: Tokens) -> None:
    """Raise ``ValueError`` unless z are floating-point tokens (..., n, d) with n >= 1
    and d >= 1.
    """
    check_tensor("tokens", z)
    if z.ndim < 2 or min(z.shape[-2:]) < 1 or not z.is_floating_point():
        raise ValueError(
            "tokens must be floating point, (..., n, d) with n, d >= 1, got "
            f"{z.dtype} {tuple(z.shape)}"
        )


def check_bases(z: Tokens, bases: Bases) -> None:
    """Raise ``ValueError`` unless bases are (K, d, p) for tokens (..., n, d)."""
    check_tokens(z)
    check_tensor("bases", bases)
    if bases.ndim != 3 or bases.shape[1] != z.shape[-1]:
        raise ValueError(
            f"bases must be (K, {z.shape[-1]}, p) for tokens {tuple(z.shape)}, got "
            f"{tuple(bases.shape)}"
        )


def head_coordinates(z: Tokens, bases: Bases) -> Heads:
    r"""Coordinates of every token in every subspace, :math:`V_k = U_k^\top Z`, as rows:
    (..., K, n, p).

    Raises ``ValueError`` if the bases do not fit the tokens.  Book:
    :ref:`ch-coding-rate`.
    """
    check_bases(z, bases)
    # (d, K p): one product with all tokens, not K products with copies
    stacked = bases.transpose(0, 1).flatten(1)
    return (
        (z @ stacked).unflatten(-1, (bases.shape[0], bases.shape[2])).transpose(-3, -2)
    )


def subspace_beta(n: int, rank: int, eps: float) -> float:
    r"""The constant :math:`\beta = p / (n \varepsilon^2)` of :math:`R^c`, for n tokens
    and rank p.

    Raises ``ValueError`` if eps is not positive or n < 1.  Book: :ref:`ch-coding-rate`.
    """
    check_eps(eps)
    if not (as_number(n) >= 1 and as_number(rank) > 0):
        raise ValueError(
            f"the number of tokens and the rank must be positive, got n={n!r}, "
            f"rank={rank!r}"
        )
    return rank / (n * eps**2)


def _tall(v: Tensor) -> Tensor:
    """v or v^T, whichever has no more columns than rows: det(I + w v^T v) is the same
    for both, on the smaller side.
    """
    return v if v.shape[-2] >= v.shape[-1] else v.mT


def _cholesky(v: Tensor, weight: float) -> Tensor | None:
    """Lower factor of I + weight v^T v, in float64 where squaring v in float32 would
    cost too many digits; None where float64 would not do either (or v is not finite).
    """
    # heads lie apart in memory after their one projection; products of strided batches
    # are slow
    v = v.contiguous()
    gram = weight * (v.mT @ v)
    lost = gram.diagonal(dim1=-2, dim2=-1).sum(-1) * torch.finfo(v.dtype).eps
    if not bool((lost <= CHOLESKY_LIMIT).all()):
        # which has no float64
        wider = v.dtype == torch.float32 and v.device.type != "mps"
        return _cholesky(v.double(), weight) if wider else None
    return torch.linalg.cholesky(
        gram + torch.eye(gram.shape[-1], dtype=v.dtype, device=v.device)
    )


def _stacked_qr(v: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    """Q1, Q2, R with [I; sqrt(weight) v] = [Q1; Q2] R, hence R^T R = I + weight v^T v
    without forming a square.
    """
    columns = v.shape[-1]
    identity = torch.eye(columns, dtype=v.dtype, device=v.device).expand(
        *v.shape[:-2], columns, columns
    )
    q, r = torch.linalg.qr(torch.cat([identity, math.sqrt(weight) * v], dim=-2))
    return q[..., :columns, :], q[..., columns:, :], r


def _half_log_det(v: Tensor, weight: float) -> Tensor:
    """1/2 log det(I + weight v v^T) over the last two dimensions."""
    v = _tall(v)
    factor = _cholesky(v, weight)
    if factor is None:
        factor = _stacked_qr(v, weight)[2]
    return factor.diagonal(dim1=-2, dim2=-1).abs().log().sum(-1).to(v.dtype)


def _shrink(v: Tensor, weight: float) -> Tensor:
    """(I + weight v v^T)^{-1} v = v (I + weight v^T v)^{-1}: singular values s become s
    / (1 + weight s^2).
    """
    tall = _tall(v)
    factor = _cholesky(tall, weight)
    if factor is None:
        # v = Q2 R / sqrt(w), R^{-1} = Q1: v (R^T R)^{-1} = Q2 Q1^T / sqrt(w)
        q1, q2, _ = _stacked_qr(tall, weight)
        shrunk = q2 @ q1.mT / math.sqrt(weight)
    else:
        shrunk = torch.cholesky_solve(tall.mT.to(factor.dtype), factor).mT.to(
            tall.dtype
        )
    return shrunk if tall.shape == v.shape else shrunk.mT


def _at_least_single(z: Tensor) -> Tensor:
    """Half precision as float32, which factorisations need; the rest unchanged."""
    check_tensor("tokens and bases", z)
    return z.float() if z.dtype in (torch.float16, torch.bfloat16) else z


def coding_rate(z: Tokens, eps: float) -> Scalars:
    r"""Lossy coding rate of the tokens as one Gaussian,

    .. math:: R(Z) = \tfrac12 \log\det\!\Big(I + \frac{d}{n \varepsilon^2} Z
              Z^\top\Big).

    Parameters
    ----------
    z : tensor (..., n, d)
        Tokens as rows.
    eps : float
        Coding precision, > 0, in the units of the tokens: the norm of the error allowed
        per token.

    Returns
    -------
    tensor (...)
        Rates in nats per token, one for each leading batch entry; float32 for
        half-precision tokens.

    Raises
    ------
    ValueError
        If eps is not positive, or z is not floating point of shape (..., n, d).

    Notes
    -----
    The smaller of the n x n and d x d determinants is factored: by Cholesky; in float64
    where forming the square in float32 would cost more than about ``CHOLESKY_LIMIT``
    nats; by QR of the stack :math:`[I;\, \sqrt{d/(n\varepsilon^2)}\, Z^\top]` where it
    would in float64 too.  Tokens that are not finite give a rate that is not finite.

    The constant d / (n eps^2) is that of :cite:t:`yu2020learning`; some public code
    writes ``eps`` for its square.

    Book: :ref:`ch-coding-rate`, :eq:`eq-rate-def`.
    """
    check_eps(eps)
    check_tokens(z)
    n, d = z.shape[-2:]
    return _half_log_det(_at_least_single(z), d / (n * eps**2))


def coding_rate_grad(z: Tokens, eps: float) -> Tokens:
    r"""Gradient of :func:`coding_rate`, with :math:`\alpha = d/(n\varepsilon^2)`,

    .. math:: \nabla R(Z) = \alpha\, (I + \alpha Z Z^\top)^{-1} Z = \alpha\, Z\, (I +
              \alpha Z^\top Z)^{-1}.

    A singular value s of Z becomes :math:`\alpha s / (1 + \alpha s^2)`.

    Parameters
    ----------
    z : tensor (..., n, d)
        Tokens as rows.
    eps : float
        Coding precision, > 0.

    Returns
    -------
    tensor (..., n, d)
        In the dtype of z.

    Raises
    ------
    ValueError
        As :func:`coding_rate`.

    Book: :ref:`ch-coding-rate`, :eq:`eq-rate-grad`, :prf:ref:`thm-rate-grad`.
    """
    check_eps(eps)
    check_tokens(z)
    n, d = z.shape[-2:]
    alpha = d / (n * eps**2)
    return (alpha * _shrink(_at_least_single(z), alpha)).to(z.dtype)


def subspace_coding_rate(z: Tokens, bases: Bases, eps: float) -> Scalars:
    r"""Coding rate of the tokens against K subspaces, with :math:`\beta =
    p/(n\varepsilon^2)`,

    .. math:: R^c(Z \mid U_{[K]}) = \tfrac12 \sum_{k} \log\det\!\big(I + \beta\,
              (U_k^\top Z)^\top (U_k^\top Z)\big).

    Defined for any bases, orthonormal or not (trained ones are not).

    Parameters
    ----------
    z : tensor (..., n, d)
        Tokens as rows.
    bases : tensor (K, d, p)
        Bases of the subspaces, of the dtype of z.
    eps : float
        Coding precision, > 0, in the units of the tokens.

    Returns
    -------
    tensor (...)
        Rates in nats; float32 for half-precision tokens.

    Raises
    ------
    ValueError
        If eps is not positive or the bases do not fit the tokens.

    Notes
    -----
    The smaller of the n x n and p x p determinants is factored, as in
    :func:`coding_rate`.

    Book: :ref:`ch-coding-rate`, :eq:`eq-rate-subspace`.
    """
    v = head_coordinates(_at_least_single(z), _at_least_single(bases))
    return _half_log_det(v, subspace_beta(v.shape[-2], v.shape[-1], eps)).sum(-1)


def subspace_coding_rate_grad(z: Tokens, bases: Bases, eps: float) -> Tokens:
    r"""Gradient of :func:`subspace_coding_rate`,

    .. math:: \nabla R^c(Z) = \beta \sum_k U_k\, U_k^\top Z\, \big(I + \beta (U_k^\top
              Z)^\top (U_k^\top Z)\big)^{-1}.

    Parameters
    ----------
    z : tensor (..., n, d)
        Tokens as rows.
    bases : tensor (K, d, p)
        Bases of the subspaces, orthonormal or not, of the dtype of z.
    eps : float
        Coding precision, > 0.

    Returns
    -------
    tensor (..., n, d)
        In the dtype of z.

    Raises
    ------
    ValueError
        As :func:`subspace_coding_rate`.

    Book: :ref:`ch-coding-rate`, :eq:`eq-rate-subspace-grad`, :prf:ref:`thm-rate-grad`.
    """
    bases = _at_least_single(bases)
    v = head_coordinates(_at_least_single(z), bases)
    beta = subspace_beta(v.shape[-2], v.shape[-1], eps)
    return (beta * (_shrink(v, beta) @ bases.mT).sum(-3)).to(z.dtype)


def class_coding_rate(z: Tokens, labels: Labels, eps: float) -> Scalars:
    r"""Coding rate of the tokens class by class, each class as one Gaussian with a
    codebook of its own,

    .. math:: R^c(Z \mid \Pi) = \sum_k \frac{n_k}{n}\, R(Z_k)
              = \sum_k \frac{n_k}{2n} \log\det\!\Big(I + \frac{d}{n_k \varepsilon^2} Z_k
              Z_k^\top\Big).

    It needs to know which token is of which class; :func:`subspace_coding_rate` does
    not.

    Parameters
    ----------
    z : tensor (..., n, d)
        Tokens as rows.
    labels : tensor (n,)
        Integer class of each token; the same for every batch entry.
    eps : float
        Coding precision, > 0.

    Returns
    -------
    tensor (...)
        Rates in nats per token.

    Raises
    ------
    ValueError
        As :func:`coding_rate`, or if there is not one label a token.

    Book: :ref:`ch-coding-rate`, :eq:`eq-rate-class`.  Follows :cite:t:`yu2020learning`.
    """
    check_tokens(z)
    check_tensor("labels", labels)
    if labels.shape != z.shape[-2:-1]:
        raise ValueError(
            f"labels must be ({z.shape[-2]},), one a token, got {tuple(labels.shape)}"
        )
    members = [z[..., labels == k, :] for k in labels.unique()]
    return torch.stack(
        [m.shape[-2] / z.shape[-2] * coding_rate(m, eps) for m in members]
    ).sum(0)


def rate_reduction(z: Tokens, bases: Bases, eps: float) -> Scalars:
    r"""Rate reduction :math:`\Delta R(Z) = R(Z) - R^c(Z \mid U_{[K]})`, in nats.

    Large when the tokens together span much and each subspace needs little.  It is
    blind to which token lies where: replacing the tokens by orthogonal mixtures of each
    other changes nothing.

    Parameters
    ----------
    z : tensor (..., n, d)
        Tokens as rows.
    bases : tensor (K, d, p)
        Bases of the subspaces.
    eps : float
        Coding precision, > 0.

    Returns
    -------
    tensor (...)
        Differences in nats, of either sign.

    Raises
    ------
    ValueError
        As :func:`subspace_coding_rate`.

    Book: :ref:`ch-coding-rate`, :prf:ref:`thm-rate-blind`.
    """
    return coding_rate(z, eps) - subspace_coding_rate(z, bases, eps)


def sparse_rate_reduction(z: Tokens, bases: Bases, eps: float, lambd: float) -> Scalars:
    r"""The sparse rate reduction :math:`R(Z) - R^c(Z \mid U_{[K]}) - \lambda \|Z\|_0`,
    in nats.

    :math:`\|Z\|_0` counts the nonzero entries; the count has no gradient.

    Parameters
    ----------
    z : tensor (..., n, d)
        Tokens as rows.
    bases : tensor (K, d, p)
        Bases of the subspaces.
    eps : float
        Coding precision, > 0.
    lambd : float
        Price of a nonzero entry in nats, >= 0.

    Returns
    -------
    tensor (...)
        One value for each leading batch entry.

    Raises
    ------
    ValueError
        As :func:`subspace_coding_rate`, or if lambd is negative.

    Book: :ref:`ch-coding-rate`.  The objective of :cite:t:`yu2023white`.
    """
    check_bases(z, bases)
    if not as_number(lambd) >= 0:
        raise ValueError(f"lambd must be >= 0, got {lambd!r}")
    nonzeros = torch.count_nonzero(z, dim=(-2, -1))
    return rate_reduction(z, bases, eps) - lambd * nonzeros
