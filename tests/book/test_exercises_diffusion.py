"""The numbers in the solutions of the chapter on diffusion, on random instances."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crate_core.theory.diffusion import noise_levels, reverse_sde
from crate_core.theory.mixture import LowRankGaussianMixture, random_bases

F64 = torch.float64
seeds = st.integers(0, 2**31)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.lists(st.floats(0.01, 3), min_size=1, max_size=8), st.floats(0.1, 4))
def test_preserving_is_exploding_up_to_scale(rates, signal):
    """ex-diff-preserving: y = m z with sigma = sqrt(1 - m^2) / m.

    Over a time in which b is constant the process multiplies the token by
    exp(-b / 2) and adds variance 1 - exp(-b).
    """
    variance, m = signal, 1.0
    for b in rates:
        variance = math.exp(-b) * variance + 1 - math.exp(-b)
        m *= math.exp(-b / 2)
    sigma = math.sqrt(1 - m**2) / m
    assert variance == pytest.approx(m**2 * (signal + sigma**2))


@given(st.floats(0.1, 3), st.floats(0.05, 0.95))
def test_the_factor_on_the_fresh_noise_makes_a_step_exact_outside(sigma, share):
    """ex-diff-ancestral: sigma'^2 (1 + (1 - f)^2 / f) without the factor,
    sigma'^2 with.
    """
    lower, f = math.sqrt(share) * sigma, share
    plain = lower**4 / sigma**2 + sigma**2 - lower**2
    assert plain == pytest.approx(lower**2 * (1 + (1 - f) ** 2 / f))
    assert plain > lower**2
    mixture = LowRankGaussianMixture(
        random_bases(40, 1, 1, generator=seeded(0)).to(F64)
    )
    z = mixture.sample(4000, sigma, generator=seeded(1)).tokens
    moved = reverse_sde(mixture, z, sigma, lower, 1, seeded(2))
    outside = moved - moved @ mixture.bases[0] @ mixture.bases[0].mT
    count = 4000 * 39
    found = float(outside.square().sum() / count)
    assert abs(found / lower**2 - 1) < 5 * math.sqrt(2 / count)


@given(st.floats(0.5, 2), st.floats(0.02, 0.2), st.floats(0, 4))
def test_where_the_variance_settles(zeta, delta, start):
    """ex-diff-dice: the fixed point of the recursion, and its symmetry."""
    growth = (1 + zeta**2) ** 2 / (4 * zeta**2)
    if delta * growth > 0.9:
        return
    e = start
    for _ in range(round(400 / (delta * min(zeta, 1) ** 2))):
        e = ((1 - (1 + zeta**2) * delta / 2) ** 2 * e + zeta**2 * delta) / (1 - delta)
    assert e == pytest.approx(1 / (1 - delta * growth), rel=1e-6)
    other = 1 / zeta
    assert (1 + other**2) ** 2 / (4 * other**2) == pytest.approx(growth)


@given(st.integers(2, 200), st.floats(0.01, 0.9))
def test_number_of_steps(steps, low):
    """ex-diff-dice: about 2 log(sigma_1 / sigma_0) / delta steps."""
    grid = noise_levels(1.0, low, steps)
    delta = 1 - float(grid[1] / grid[0]) ** 2
    assert steps == pytest.approx(2 * math.log(1 / low) / -math.log1p(-delta))


@given(st.integers(1, 4), st.integers(0, 8), seeds)
def test_completion_in_one_subspace(rank, more, seed):
    """ex-diff-mask: exact without noise; a singular value s is shrunk by
    s^2 / (s^2 + sigma^2 / tau^2)."""
    g = seeded(seed)
    basis = random_bases(12, 1, rank, generator=g)[0].to(F64)
    visible = torch.randperm(12, generator=g)[: min(rank + more, 12)]
    code = torch.randn(rank, generator=g, dtype=F64)
    rows = basis[visible]
    _, singular, right = torch.linalg.svd(rows, full_matrices=False)
    if singular[-1] > 1e-3:
        found = basis @ torch.linalg.solve(rows.mT @ rows, rows.mT @ (rows @ code))
        torch.testing.assert_close(found, basis @ code, rtol=1e-6, atol=1e-8)
    tau, sigma = 0.7, 0.2
    gram = tau**2 * rows @ rows.mT + sigma**2 * torch.eye(len(rows), dtype=F64)
    guess = tau**2 * rows.mT @ torch.linalg.solve(gram, rows @ code)
    shrunk = singular**2 / (singular**2 + sigma**2 / tau**2)
    torch.testing.assert_close(guess, right.mT @ (shrunk * (right @ code)))
