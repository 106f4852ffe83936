"""Surrogates keep the property they name, and have no subspaces."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_core.theory.mixture import LowRankGaussianMixture
from crate_core.theory.surrogates import (
    direction_surrogate,
    elliptical_surrogate,
    gaussian_surrogate,
)

F64 = torch.float64
N = 20_000


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(seed: int) -> torch.Tensor:
    """Tokens of three planes in six dimensions, of two contrasts."""
    mix = LowRankGaussianMixture.random(
        6, 3, 2, orthogonal=False, generator=seeded(seed), dtype=F64
    )
    z = mix.sample(3000, 0.2, generator=seeded(seed + 1)).tokens
    z[::2] *= 3
    return z


def worst_moment(x: torch.Tensor, y: torch.Tensor) -> float:
    """Largest difference of second moments, in standard errors of those of y."""
    products = y[:, :, None] * y[:, None, :]
    wanted = x.T @ x / len(x)
    error = products.mean(0) - wanted
    return float((error / (products.std(0) / math.sqrt(len(y)))).abs().max())


@settings(max_examples=10)
@given(st.integers(0, 2**31))
def test_second_moments_are_kept(seed):
    x = tokens(seed)
    for draw in (gaussian_surrogate, elliptical_surrogate):
        y = draw(x, N, seeded(seed))
        assert worst_moment(x, y) < 5
        assert worst_moment(x, 1.1 * y) > 5
    unit = x / x.norm(dim=1, keepdim=True)
    y = direction_surrogate(unit, N, seeded(seed))
    torch.testing.assert_close(y.norm(dim=1), torch.ones(N, dtype=F64))
    # The fixed point's expectations have an error of their own, of 20,000 draws.
    assert worst_moment(unit, y) < 5 * math.sqrt(2)
    # Normalising Gaussian vectors of the same covariance is not enough.
    naive = gaussian_surrogate(unit, N, seeded(seed))
    assert worst_moment(unit, naive / naive.norm(dim=1, keepdim=True)) > 5 * math.sqrt(
        2
    )


@settings(max_examples=10)
@given(st.integers(0, 2**31))
def test_elliptical_keeps_contrasts_and_gaussian_does_not(seed):
    x = tokens(seed)
    inverse = torch.linalg.inv(x.T @ x / len(x))

    def spread(y: torch.Tensor) -> float:
        """Variance of the squared contrast: (d + 2) / d - 1 for a Gaussian."""
        return float(((y @ inverse) * y).sum(1).var() / 36)

    gaussian = spread(gaussian_surrogate(x, N, seeded(seed)))
    assert gaussian == pytest.approx(2 / 6, rel=0.1)
    assert spread(elliptical_surrogate(x, N, seeded(seed))) > 2 * gaussian


@pytest.mark.bad_input
def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="more vectors than dimensions"):
        gaussian_surrogate(torch.randn(3, 4), 5)
    with pytest.raises(ValueError, match="norm one"):
        direction_surrogate(2 * torch.eye(4).repeat(3, 1), 5)
