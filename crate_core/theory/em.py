r"""Fitting a mixture of low-rank Gaussians to tokens: expectation-maximisation with an
exact M-step.

Book: :ref:`ch-mixture`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from crate_core.checks import as_number, check_tensor, is_count
from crate_core.shapes import TokenMatrix
from crate_core.theory.mixture import LowRankGaussianMixture


@dataclass(frozen=True)
class MixtureFit:
    """A mixture fitted to tokens: the mixture, the noise level ``sigma``, and the mean
    log-likelihood per token after each EM step (it never falls).
    """

    mixture: LowRankGaussianMixture
    sigma: float
    log_likelihoods: list[float]


def _noise_variance(outside: float, kept: Tensor, weights: Tensor, free: int) -> float:
    """The shared sigma^2 of the M-step, from the variance outside the subspaces and the
    eigenvalues kept (K, p).

    Variances inside must not fall below sigma^2; those that would are pooled with the
    outside ones.  Pooling the m smallest gives one candidate for each m, and the
    solution is the smallest of them.
    """
    rank = kept.shape[1]
    order = kept.flatten().argsort()
    pooled = weights.repeat_interleave(rank)[order]
    zero = kept.new_zeros(1)
    numerators = outside + torch.cat([zero, (pooled * kept.flatten()[order]).cumsum(0)])
    variance = float((numerators / (free + torch.cat([zero, pooled.cumsum(0)]))).min())
    if not variance >= torch.finfo(kept.dtype).tiny:
        raise ValueError(
            "the tokens lie on the fitted subspaces exactly: there is no noise to "
            "estimate"
        )
    return variance


def _maximise(
    z: Tensor, responsibilities: Tensor, rank: int, sigma: float | None
) -> tuple[LowRankGaussianMixture, float]:
    """The M-step: mixture (and sigma, unless given) of largest expected likelihood."""
    n, d = z.shape
    # A component that owns nothing keeps a vanishing weight: the mixture asks for
    # positive ones.
    counts = responsibilities.sum(0).clamp_min(torch.finfo(z.dtype).eps * n)
    weights = counts / counts.sum()
    # (K, d, d)
    covariance = (responsibilities.T[:, None, :] * z.T) @ z / counts[:, None, None]
    eigenvalues, vectors = torch.linalg.eigh(covariance)  # ascending
    kept = eigenvalues[:, -rank:].clamp_min(0)
    if sigma is None:
        outside = float((weights[:, None] * eigenvalues[:, :-rank].clamp_min(0)).sum())
        sigma = math.sqrt(_noise_variance(outside, kept, weights, d - rank))
    scales = (kept - sigma**2).clamp_min(0).sqrt()
    return LowRankGaussianMixture(
        vectors[:, :, -rank:].contiguous(), weights, scales
    ), sigma


def fit_mixture(
    z: TokenMatrix,
    components: int,
    rank: int,
    *,
    sigma: float | None = None,
    iterations: int = 30,
    generator: torch.Generator | None = None,
) -> MixtureFit:
    r"""Maximum likelihood by expectation-maximisation: all of :math:`\pi, U, \tau,
    \sigma` from tokens alone.

    The E-step is :meth:`LowRankGaussianMixture.posterior`.  The M-step is exact: with
    :math:`\hat C_k = \sum_i \gamma_{ik} z_i z_i^\top / \sum_i \gamma_{ik}`, the columns
    of :math:`U_k` are its leading p eigenvectors, :math:`\tau_{kj}^2` its eigenvalues
    less :math:`\sigma^2`, and :math:`\sigma^2` the mean of what remains.  Means are
    zero: subtract them first.  Some energy must lie outside the leading eigenvectors:
    without it the likelihood has no maximum (proof in :ref:`ch-appendix`).

    Starts from the tokens clustered by direction around randomly drawn ones; ends in a
    local maximum, so several generators give several answers.

    Parameters
    ----------
    z : tensor (n, d), n >= components.
    components : int, the number of subspaces K.
    rank : int, their dimension p, below d.
    sigma : float, optional
        Noise level per coordinate, when it is known; ``None`` estimates it.  An
        estimate rests on the d - p directions outside each subspace, so with p near d
        give it.
    iterations : int, number of EM steps, at least 1.
    generator : torch.Generator, optional, for the start.

    Returns
    -------
    MixtureFit
        mixture, sigma (per coordinate) and the mean log-likelihood per token after each
        step.

    Raises
    ------
    ValueError
        For sizes that do not fit, tokens that are not finite, or tokens that lie
        exactly on the subspaces found.

    Notes
    -----
    The mixture of probabilistic principal component analysers of
    :cite:t:`tipping1999mixtures`, with zero means and one noise level for all
    components.

    Book: :ref:`ch-mixture`.
    """
    check_tensor("tokens", z)
    if z.ndim != 2 or not bool(z.isfinite().all()):
        raise ValueError(
            f"tokens must be finite, of shape (n, d), got shape {tuple(z.shape)}"
        )
    if sigma is not None and not as_number(sigma) > 0:
        raise ValueError(f"sigma must be > 0, got {sigma!r}")
    n, d = z.shape
    counts = all(map(is_count, (components, rank, iterations)))
    if not (counts and components <= n and rank < d):
        raise ValueError(
            "need 1 <= components <= n, 1 <= rank < d and iterations >= 1, got "
            f"components={components!r}, rank={rank!r}, "
            f"iterations={iterations!r} for n={n}, d={d}"
        )
    starts = z[
        torch.randperm(
            n, generator=generator, device=generator.device if generator else None
        )[:components]
    ]
    directions = starts / starts.norm(dim=1, keepdim=True).clamp_min(
        torch.finfo(z.dtype).tiny
    )
    nearest = (z @ directions.T).abs().argmax(1)
    responsibilities = torch.nn.functional.one_hot(nearest, components).to(z.dtype)
    log_likelihoods = []
    for _ in range(iterations):
        mixture, level = _maximise(z, responsibilities, rank, sigma)
        log_joint = mixture.log_joint(z, level)
        log_likelihoods.append(float(torch.logsumexp(log_joint, -1).mean()))
        responsibilities = torch.softmax(log_joint, -1)
    return MixtureFit(mixture, level, log_likelihoods)
