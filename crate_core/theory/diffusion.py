r"""Forward noising, its two reversals with the exact score, and the structured
diffusion ODE with its exact solution.

One integrator, :func:`crate_core.theory.integrators.integrate`, serves every ordinary
differential equation here.

Book: :ref:`ch-diffusion` and :ref:`ch-structured-ode`.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from crate_core.checks import (
    as_number,
    check_count,
    check_instance,
    check_numbers,
    check_tensor,
    is_count,
)
from crate_core.shapes import Bases, Tokens, TokenVectors
from crate_core.theory.integrators import Field, check_method, integrate
from crate_core.theory.mixture import (
    LowRankGaussianMixture,
    check_orthogonal_subspaces,
)
from crate_core.theory.rate import (
    check_bases,
    check_eps,
    head_coordinates,
    subspace_beta,
    subspace_coding_rate_grad,
)


def check_mixture(mixture: LowRankGaussianMixture) -> None:
    """Raise ``TypeError`` unless it is a :class:`LowRankGaussianMixture`."""
    accepted = "a LowRankGaussianMixture"
    check_instance("mixture", mixture, LowRankGaussianMixture, accepted)


# Forward noising and its reversals: the clock is the noise level sigma, per coordinate.


def noise_levels(sigma_from: float, sigma_to: float, steps: int) -> Tensor:
    r"""Geometric grid :math:`\sigma_i = \sigma_{\mathrm{from}} (\sigma_{\mathrm{to}} /
    \sigma_{\mathrm{from}})^{i/S}`.

    Float64, shape (steps + 1,), both ends included exactly.

    Raises ``ValueError`` unless both levels are positive and different, and steps >= 1.
    Book: :ref:`ch-diffusion`.
    """
    positive = as_number(sigma_from) > 0 and as_number(sigma_to) > 0
    if not positive or sigma_from == sigma_to:
        raise ValueError(
            f"noise levels must be positive and different, got {sigma_from!r} and "
            f"{sigma_to!r}"
        )
    check_count("steps", steps)
    levels = torch.logspace(
        math.log10(sigma_from), math.log10(sigma_to), steps + 1, dtype=torch.float64
    )
    levels[0], levels[-1] = sigma_from, sigma_to
    return levels


def forward_noising(
    x: TokenVectors,
    sigmas: Sequence[float] | Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""One path of the variance-exploding process :math:`dx = \sqrt{d\sigma^2/dt}\;
    dw`, seen at given noise levels.

    .. math:: x_i = x_{i-1} + \sqrt{\sigma_i^2 - \sigma_{i-1}^2}\; w_i, \qquad
              w_i \sim \mathcal{N}(0, I), \quad
        \sigma_{-1} = 0,

    so that :math:`x_i - x \sim \mathcal{N}(0, \sigma_i^2 I)` at each level, and the
    path is Markov.

    Parameters
    ----------
    x : tensor (..., d), clean tokens.
    sigmas : S noise levels per coordinate, nonnegative and nondecreasing.
    generator : of the noise, on the device of x; torch's default where there is none.

    Returns
    -------
    tensor (S, ..., d).

    Raises ``ValueError`` if the levels are negative or decrease.  Book:
    :ref:`ch-diffusion`.
    """
    check_tensor("x", x)
    check_numbers("sigmas", sigmas)
    variances = torch.as_tensor(sigmas, dtype=x.dtype, device=x.device) ** 2
    increments = torch.diff(variances, prepend=variances.new_zeros(1))
    if bool((torch.as_tensor(sigmas) < 0).any()) or bool((increments < 0).any()):
        raise ValueError(
            "noise levels must be nonnegative and nondecreasing, got "
            f"{list(map(float, sigmas))}"
        )
    w = torch.randn(
        len(increments), *x.shape, generator=generator, dtype=x.dtype, device=x.device
    )
    scale = increments.sqrt().reshape(-1, *[1] * x.ndim)
    return x + torch.cumsum(scale * w, dim=0)


def probability_flow_field(mixture: LowRankGaussianMixture) -> Field:
    r"""The field :math:`dz/d\sigma = -\sigma\, \nabla \log p_\sigma(z) = (z -
    \mathbb{E}[x \mid z]) / \sigma`.

    For :func:`crate_core.theory.integrators.integrate` over noise levels, downwards
    from noise to samples. Book: :ref:`ch-diffusion`.
    """
    check_mixture(mixture)
    return lambda sigma, z: -sigma * mixture.score(z, sigma)


def probability_flow(
    mixture: LowRankGaussianMixture,
    z: TokenVectors,
    sigma_from: float,
    sigma_to: float,
    steps: int,
    method: str = "heun",
) -> TokenVectors:
    r"""Carry tokens from noise level to noise level along the probability-flow ODE with
    the exact score,

    .. math:: \frac{dz}{d\sigma} = -\sigma\, \nabla \log p_\sigma(z).

    If z is distributed as the mixture plus noise of level ``sigma_from``, the result is
    distributed as the mixture plus noise of level ``sigma_to``, up to the error of the
    integrator; deterministic, and ``sigma_to > sigma_from`` runs it the other way.

    Parameters
    ----------
    mixture : the density whose score drives the flow.
    z : tensor (..., d).
    sigma_from, sigma_to : positive noise levels, standard deviations per coordinate.
    steps : number of steps, on the geometric grid of :func:`noise_levels`.
    method : as :func:`crate_core.theory.integrators.integrate`.

    Returns
    -------
    tensor (..., d), the tokens at ``sigma_to``.

    Raises ``ValueError`` for levels that are not positive, steps < 1, or an unknown
    method.

    Book: :ref:`ch-diffusion`, :eq:`eq-diff-pf`, :prf:ref:`thm-diff-back`.
    """
    return integrate(
        probability_flow_field(mixture),
        z,
        noise_levels(sigma_from, sigma_to, steps),
        method,
    )[-1]


def reverse_sde(
    mixture: LowRankGaussianMixture,
    z: TokenVectors,
    sigma_from: float,
    sigma_to: float,
    steps: int,
    generator: torch.Generator | None = None,
) -> TokenVectors:
    r"""Carry tokens down in noise level along the reverse SDE with the exact score, by
    ancestral steps,

    .. math:: z' = z + (\sigma^2 - \sigma'^2)\, \nabla \log p_\sigma(z)
        + \frac{\sigma'}{\sigma}\sqrt{\sigma^2 - \sigma'^2}\; w, \qquad
        w \sim \mathcal{N}(0, I).

    The drift is Euler--Maruyama's; the noise carries the factor :math:`\sigma'/\sigma
    \to 1` that makes a step exact where the clean token is certain.  Same marginals as
    :func:`probability_flow`, other paths.

    Parameters
    ----------
    mixture : the density whose score drives the process.
    z : tensor (..., d).
    sigma_from, sigma_to : positive noise levels per coordinate,
        ``sigma_to < sigma_from``.
    steps : number of steps, on the geometric grid of :func:`noise_levels`.
    generator : of the noise, on the device of z; torch's default where there is none.

    Raises ``ValueError`` if the levels are not positive and decreasing, or steps < 1.
    Book: :ref:`ch-diffusion`.
    """
    check_mixture(mixture)
    check_tensor("z", z)
    if not as_number(sigma_to) < as_number(sigma_from):
        raise ValueError(
            "the reverse SDE goes down in noise: need sigma_to < sigma_from, got "
            f"{sigma_from!r} to {sigma_to!r}"
        )
    levels = noise_levels(sigma_from, sigma_to, steps).tolist()
    for high, low in pairwise(levels):
        removed = high**2 - low**2
        w = torch.randn(z.shape, generator=generator, dtype=z.dtype, device=z.device)
        z = z + removed * mixture.score(z, high) + (low / high) * math.sqrt(removed) * w
    return z


# The structured diffusion ODE: the clock is the time t of the gradient flow of R^c.


def structured_field(bases: Bases, eps: float) -> Field:
    r"""The field :math:`dZ/dt = -\nabla R^c(Z \mid U_{[K]})`, the same at all times.

    For any bases; tokens (..., n, d) move together as one set of n.  Book:
    :ref:`ch-structured-ode`.
    """
    check_tensor("bases", bases)
    check_eps(eps)
    return lambda _t, z: -subspace_coding_rate_grad(z, bases, eps)


def structured_flow(
    z: Tokens, bases: Bases, eps: float, time: float, steps: int, method: str = "euler"
) -> Tokens:
    r"""Integrate the structured diffusion ODE :math:`dZ/dt = -\nabla R^c(Z \mid
    U_{[K]})` numerically.

    An Euler step of length :math:`\kappa` = time / steps is one layer :math:`Z - \kappa
    \nabla R^c(Z)`; negative time runs the flow backwards, and its Euler step :math:`Z +
    \kappa \nabla R^c(Z)` is the explicit decoder layer.

    Parameters
    ----------
    z : tensor (..., n, d), sets of n tokens as rows; n is the number of tokens that
        share :math:`R^c`.
    bases : tensor (K, d, p), orthonormal or not.
    eps : coding precision, > 0, as in
        :func:`crate_core.theory.rate.subspace_coding_rate`.
    time : any number; 0 returns z.
    steps : number of steps (with ``"dop853"``: of reported times; its steps are its
        own).
    method : as :func:`crate_core.theory.integrators.integrate`.

    Returns
    -------
    tensor (..., n, d), the tokens at ``time``.

    Raises
    ------
    ValueError
        If eps <= 0, the bases do not fit, steps < 1, or the method is unknown.

    Book: :ref:`ch-structured-ode`, :eq:`eq-sode-def`.
    """
    check_count("steps", steps)
    check_bases(z, bases)
    check_eps(eps)
    check_method(method)
    if not math.isfinite(as_number(time)):
        raise ValueError(f"time must be a finite number, got {time!r}")
    if time == 0:
        return z
    times = torch.linspace(0.0, time, steps + 1, dtype=torch.float64)
    return integrate(structured_field(bases, eps), z, times, method)[-1]


def flow_singular_values(singular: Tensor, beta: float, time: float) -> Tensor:
    r"""Solve :math:`\dot s = -\beta s / (1 + \beta s^2)` exactly, for all entries at
    once,

    .. math:: s(t) = \sqrt{\omega\big(\ln(\beta s_0^2) + \beta s_0^2 - 2 \beta t\big) /
              \beta},

    with :math:`\omega` the Wright omega function, :math:`\omega + \ln \omega = x`.  No
    digits are lost where Lambert's :math:`W(e^x)` overflows (large :math:`\beta s_0^2`)
    or :math:`\omega` underflows (tiny s(t)); zero stays zero. Negative time reverses.

    Parameters
    ----------
    singular : tensor of any shape, nonnegative.
    beta : positive, :func:`crate_core.theory.rate.subspace_beta`.
    time : any finite number.

    Returns
    -------
    tensor of the same shape, dtype and device; computed in float64, without a gradient.

    Raises
    ------
    ValueError
        If beta <= 0, time is not finite or a singular value is negative.

    Book: :ref:`ch-structured-ode`, :eq:`eq-sode-omega`, :prf:ref:`thm-sode-closed`.
    """
    check_tensor("singular", singular)
    if not as_number(beta) > 0 or not math.isfinite(as_number(time)):
        raise ValueError(
            f"need beta > 0 and a finite time, got beta = {beta!r}, time = {time!r}"
        )
    if bool((singular < 0).any()):
        raise ValueError(
            "singular values must be nonnegative, the smallest is "
            f"{float(singular.min())}"
        )
    start = singular.detach().double().cpu()
    energy = beta * start**2  # beta s_0^2, and its logarithm without underflow
    exponent = math.log(beta) + 2 * start.log() + energy - 2 * beta * time
    # here, because scipy would double the time of `import crate_core`
    from scipy.special import wrightomega

    omega = torch.from_numpy(np.asarray(wrightomega(exponent.numpy())))
    # omega = exp(exponent - omega): below exponent = 0 this form keeps digits that
    # omega itself loses to underflow.
    small = start * torch.exp((energy - 2 * beta * time - omega) / 2)
    end = torch.where(exponent < 0, small, (omega / beta).sqrt())
    # s^2 changes by about 2 t: nothing beside 1e308 / beta
    end = torch.where(energy.isinf(), start, end)
    return torch.where(start > 0, end, 0.0).to(singular)


def flow_derivative(singular: Tensor, beta: float, time: float) -> Tensor:
    r"""How the end of the flow moves with its start,

    .. math:: \frac{d s(t)}{d s_0} = \frac{s(t)\, (1 + \beta s_0^2)}{s_0\, (1 + \beta
              s(t)^2)}.

    Its reciprocal is the factor by which inverting the flow multiplies an error in
    s(t): at most :math:`e^{\beta t}`, reached as :math:`s_0 \to 0`.

    Parameters and errors as :func:`flow_singular_values`, with ``singular`` positive.
    Book: :ref:`ch-structured-ode`.
    """
    check_tensor("singular", singular)
    if not bool((singular > 0).all()):
        raise ValueError(
            f"singular values must be positive, the smallest is {float(singular.min())}"
        )
    end = flow_singular_values(singular, beta, time)
    return end / singular * (1 + beta * singular**2) / (1 + beta * end**2)


def exact_structured_flow(z: Tokens, bases: Bases, eps: float, time: float) -> Tokens:
    r"""The structured diffusion ODE solved in closed form, for mutually orthogonal
    subspaces.

    With :math:`U_k^\top Z = Q_k \mathrm{diag}(s_k) R_k^\top` and :math:`\beta = p / (n
    \varepsilon^2)`,

    .. math:: Z(t) = \Big(I - \sum_k U_k U_k^\top\Big) Z + \sum_k U_k Q_k
              \,\mathrm{diag}\big(s_k(t)\big) R_k^\top,

    with s(t) from :func:`flow_singular_values`: singular vectors, and what lies outside
    all subspaces, do not move.

    Parameters
    ----------
    z : tensor (..., n, d), sets of n tokens as rows; n is the number of tokens that
        share :math:`R^c`.
    bases : tensor (K, d, p), orthonormal columns, mutually orthogonal subspaces.
    eps : coding precision, > 0, as in
        :func:`crate_core.theory.rate.subspace_coding_rate`.
    time : any finite number; negative time reverses.

    Returns
    -------
    tensor (..., n, d), same dtype; computed in float64, without a gradient.

    Raises
    ------
    ValueError
        If eps <= 0, the bases do not fit, are not orthonormal or not mutually
        orthogonal.

    Book: :ref:`ch-structured-ode`, :eq:`eq-sode-closed`, :prf:ref:`thm-sode-closed`.
    """
    check_bases(z, bases)
    check_orthogonal_subspaces(bases)
    n, rank = z.shape[-2], bases.shape[-1]
    beta = subspace_beta(n, rank, eps)
    frames = bases.detach().double()
    coordinates = head_coordinates(z.detach().double(), frames)  # (..., K, n, p)
    left, singular, right = torch.linalg.svd(coordinates, full_matrices=False)
    moved = (left * flow_singular_values(singular, beta, time)[..., None, :]) @ right
    return (z.detach().double() + ((moved - coordinates) @ frames.mT).sum(-3)).to(z)


def invert_euler(
    z: Tokens, bases: Bases, eps: float, time: float, steps: int
) -> Tokens:
    r"""Undo :func:`structured_flow` with Euler steps exactly: solve :math:`Z - \kappa
    \nabla R^c(Z) = Z'` step by step.

    The implicit decoder layer, by the fixed-point iteration :math:`Z \leftarrow Z' +
    \kappa \nabla R^c(Z)`, a contraction with factor :math:`c = \kappa \beta \|\sum_k
    U_k U_k^\top\|_2`, run until a power of c is below machine precision.
    (:func:`structured_flow` with negative time is the explicit layer, one iteration of
    this.)

    Parameters
    ----------
    z : tensor (..., n, d), what ``structured_flow(..., time, steps)`` returned.
    bases, eps, time, steps : as they were there; time > 0.

    Raises ``ValueError`` if time <= 0, steps < 1, or c >= 1, where the iteration need
    not converge and a layer need not be injective.

    Book: :ref:`ch-structured-ode`.
    """
    check_bases(z, bases)
    if not is_count(steps) or not as_number(time) > 0:
        raise ValueError(
            f"need time > 0 and steps >= 1, got time = {time!r}, steps = {steps!r}"
        )
    kappa = time / steps
    overlap = float(torch.linalg.matrix_norm((bases @ bases.mT).sum(0), ord=2))
    factor = kappa * subspace_beta(z.shape[-2], bases.shape[-1], eps) * overlap
    if factor >= 1:
        raise ValueError(
            "each step must be a contraction: kappa * beta * |sum U U^T| = "
            f"{factor:.3g}, need < 1"
        )
    iterations = math.ceil(math.log(torch.finfo(z.dtype).eps) / math.log(factor))
    for _ in range(steps):
        target = z
        for _ in range(iterations):
            z = target + kappa * subspace_coding_rate_grad(z, bases, eps)
    return z


def round_trip_bound(c: float, steps: int) -> float:
    r"""Bound on the relative error of L explicit encoder steps followed by L explicit
    decoder steps,

    .. math:: \|\hat Z - Z\|_F \le \big((1 - c^2)^{-L} - 1\big)\, \|P Z\|_F, \qquad c =
              \kappa\beta < 1,

    for mutually orthogonal subspaces, with P the projection on their sum.

    ``ValueError`` unless 0 <= c < 1 and steps >= 1.  Book: :ref:`ch-structured-ode`,
    :eq:`eq-sode-round-trip-norm`, :prf:ref:`thm-sode-round-trip`.
    """
    if not 0 <= as_number(c) < 1 or not is_count(steps):
        raise ValueError(
            f"need 0 <= c < 1 and steps >= 1, got c = {c!r}, steps = {steps!r}"
        )
    return math.expm1(-steps * math.log1p(-(c**2)))
