"""The numbers in the solutions of the chapter on denoising, on random instances."""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_core.theory.denoise import tweedie
from crate_core.theory.mixture import LowRankGaussianMixture, random_bases

F64 = torch.float64


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.floats(0.2, 3.0))
def test_wrong_level_multiplies_what_is_across(seed, ratio):
    """ex-denoising-wrong-level: by 1 - sigma^2 / sigma'^2; by 0 when consistent."""
    basis = random_bases(6, 1, 2, generator=seeded(seed), dtype=F64)
    mix = LowRankGaussianMixture(basis)
    z = torch.randn(4, 6, generator=seeded(seed), dtype=F64)
    sigma, wrong = 0.3, 0.3 * ratio
    across = torch.eye(6, dtype=F64) - basis[0] @ basis[0].T
    mixed = tweedie(z, mix.score(z, wrong), sigma) @ across
    torch.testing.assert_close(mixed, (1 - 1 / ratio**2) * z @ across)
    assert float((mix.denoise(z, wrong) @ across).abs().max()) < 1e-12


@settings(max_examples=10, deadline=None)
@given(st.floats(0.3, 3.0), st.floats(3.0, 6.0))
def test_laplace_noise_moves_the_formula_too_little(spread, z):
    """ex-denoising-laplace, for x ~ N(0, spread^2): slope bounded, mean elsewhere."""
    u = np.linspace(-40, 40, 80_001)

    def density_and_mean(at: float) -> tuple[float, float]:
        weight = np.exp(-((u / spread) ** 2) / 2 - math.sqrt(2) * np.abs(at - u))
        return weight.sum(), (weight * u).sum() / weight.sum()

    ends = [density_and_mean(z + step)[0] for step in (-0.01, 0.01)]
    slope = math.log(ends[1] / ends[0]) / 0.02
    assert -math.sqrt(2) * (1 + 1e-6) <= slope < 0
    assert abs(density_and_mean(z)[1] - z - slope) > 0.01


@settings(max_examples=20)
@given(st.integers(0, 2**31))
def test_unequal_ranks_add_the_term_with_the_sign_said(seed):
    """ex-denoising-unequal: log odds + gap / (2 sigma^2) grow as (p_j - p_k) log sigma.

    A zero scale lowers a rank by one.  The slope in log sigma is 1 or -1, never 0.
    """
    g = seeded(seed)
    bases = random_bases(6, 2, 2, orthogonal=False, generator=g, dtype=F64)
    z = torch.randn(6, generator=g, dtype=F64)
    for low, difference in ((0, 1), (1, -1)):  # p_1 - p_0
        scales = 0.5 + torch.rand(2, 2, generator=g, dtype=F64)
        scales[low, 1] = 0.0
        mix = LowRankGaussianMixture(bases, scales=scales)
        spans = [bases[k][:, scales[k] > 0] for k in (0, 1)]
        off = [float((z - span @ (span.T @ z)).square().sum()) for span in spans]
        rest = []
        for sigma in (0.02, 0.01):
            joint = mix.log_joint(z, sigma)
            gap = (off[1] - off[0]) / (2 * sigma**2)
            rest.append(float(joint[1] - joint[0]) + gap)
        slope = (rest[0] - rest[1]) / math.log(2)
        assert abs(slope - difference) < 0.05


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.floats(0.1, 0.6))
def test_lipschitz_constant_midway_between_two_points(seed, sigma):
    """ex-denoising-lipschitz: norm delta^2 / (4 sigma^2), along the segment."""
    ends = torch.randn(2, 4, generator=seeded(seed), dtype=F64)
    length = float((ends[0] - ends[1]).norm())

    def best_guess(z: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(-(z - ends).square().sum(1) / (2 * sigma**2), 0)
        return weights @ ends

    jacobian = torch.autograd.functional.jacobian(best_guess, ends.mean(0))
    norm = float(torch.linalg.matrix_norm(jacobian, ord=2))
    assert abs(norm / (length**2 / (4 * sigma**2)) - 1) < 1e-9
