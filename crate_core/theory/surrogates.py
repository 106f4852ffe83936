r"""Control data: what real tokens would look like with one property kept and the others
taken away.

Each function draws ``n`` vectors that share a stated property with the rows of ``x``
and have no union of subspaces.  A finding about ``x`` that a surrogate shows as well is
explained by the property that the surrogate kept.

Book: :ref:`ch-mixture` and :ref:`ch-denoising`.
"""

import torch
from torch import Tensor

from crate_core.checks import check_count, check_tensor
from crate_core.shapes import TokenMatrix

FIXED_POINT_STEPS = 200
"""Most rounds of the fixed point in :func:`direction_surrogate`; about twenty are
needed."""

FIXED_POINT_DRAWS = 20_000
"""Gaussian draws that its expectations are computed with."""


def _second_moments(x: TokenMatrix) -> Tensor:
    r""":math:`\frac1n \sum_i x_i x_i^\top`, after a check of the shape."""
    check_tensor("x", x)
    if x.ndim != 2 or len(x) <= x.shape[1]:
        raise ValueError(
            "a surrogate needs more vectors than dimensions, (n, d) with n > d, got "
            f"shape {tuple(x.shape)}"
        )
    return x.T @ x / len(x)


def gaussian_surrogate(
    x: TokenMatrix, n: int, generator: torch.Generator | None = None
) -> Tensor:
    r"""Gaussian vectors :math:`\mathcal{N}(0, \hat\Sigma)` with :math:`\hat\Sigma =
    \frac1n\sum_i x_i x_i^\top`: the second moments of x and nothing else, (n, d).

    Raises ``ValueError`` unless x has more rows than columns.  Book:
    :ref:`ch-mixture`.
    """
    check_count("n", n)
    factor = torch.linalg.cholesky(_second_moments(x))
    drawn = torch.randn(
        n, x.shape[1], dtype=x.dtype, device=x.device, generator=generator
    )
    return drawn @ factor.T


def elliptical_surrogate(
    x: TokenMatrix, n: int, generator: torch.Generator | None = None
) -> Tensor:
    r"""Contrast without subspaces: :math:`h_i\, y_i` with :math:`y_i \sim
    \mathcal{N}(0, \hat\Sigma)` and contrasts :math:`h_i` drawn from those of x,
    :math:`h = \|\hat\Sigma^{-1/2} x\| / \sqrt d`, (n, d).

    The mean of :math:`h^2` over x is one, so second moments agree with those of x too.
    A Gaussian scale mixture, as :cite:t:`wainwright2000scale` model patches.

    Raises ``ValueError`` unless x has more rows than columns.  Book:
    :ref:`ch-mixture`.
    """
    check_count("n", n)
    factor = torch.linalg.cholesky(_second_moments(x))
    whitened = torch.linalg.solve_triangular(factor, x.T, upper=False)
    contrast = whitened.norm(dim=0) / x.shape[1] ** 0.5
    chosen = torch.randint(len(x), (n,), generator=generator, device=x.device)
    return gaussian_surrogate(x, n, generator) * contrast[chosen, None]


def direction_surrogate(
    x: TokenMatrix, n: int, generator: torch.Generator | None = None
) -> Tensor:
    r"""Unit vectors :math:`y / \|y\|`, :math:`y \sim \mathcal{N}(0, \Sigma)`, whose
    second moments are those of the unit vectors x, (n, d).

    Normalising Gaussian vectors changes their second moments, so :math:`\Sigma` is not
    :math:`\hat\Sigma`: it has the same eigenvectors, and its eigenvalues solve
    :math:`\mathbb{E}[\mu_j g_j^2 / \sum_l \mu_l g_l^2] = \hat\mu_j`, found by a fixed
    point.

    Raises ``ValueError`` unless x are unit vectors and more of them than dimensions.

    Book: :ref:`ch-mixture`.
    """
    check_count("n", n)
    wanted, vectors = torch.linalg.eigh(_second_moments(x))
    if not torch.allclose(x.norm(dim=1), torch.ones_like(x[:, 0]), atol=1e-6):
        raise ValueError("directions have norm one: divide x by its norms first")
    squares = torch.randn(
        FIXED_POINT_DRAWS,
        x.shape[1],
        dtype=x.dtype,
        device=x.device,
        generator=generator,
    ).square()
    eigenvalues = wanted.clone()
    for _ in range(FIXED_POINT_STEPS):
        energy = squares * eigenvalues
        reached = (energy / energy.sum(1, keepdim=True)).mean(0)
        if float((reached / wanted - 1).abs().max()) < 1e-4:
            break
        eigenvalues = eigenvalues * wanted / reached
    drawn = torch.randn(
        n, x.shape[1], dtype=x.dtype, device=x.device, generator=generator
    )
    y = drawn * eigenvalues.sqrt() @ vectors.T
    return y / y.norm(dim=1, keepdim=True)
