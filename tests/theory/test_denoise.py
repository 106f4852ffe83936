"""Noising, Tweedie, projections, and the small-noise limit with its rate."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_core.theory.denoise import (
    add_noise,
    nearest_subspace,
    noise_left,
    project,
    project_nearest,
    tweedie,
)
from crate_core.theory.mixture import LowRankGaussianMixture, random_bases

F64 = torch.float64


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_noise_has_the_standard_deviation_asked_for():
    x = torch.randn(300, 50, generator=seeded(0), dtype=F64)
    noise = add_noise(x, 0.3, generator=seeded(1)) - x
    assert abs(float(noise.std()) / 0.3 - 1) < 5 / math.sqrt(2 * noise.numel())
    assert torch.equal(add_noise(x, 0.0), x)
    assert torch.equal(add_noise(x, 0.3, generator=seeded(1)), x + noise)


def test_tweedie_of_one_gaussian_is_linear_shrinkage():
    z = torch.randn(4, 3, 5, generator=seeded(0), dtype=F64)
    sigma = torch.rand(4, 3, generator=seeded(1), dtype=F64) + 0.1
    variance = sigma[..., None] ** 2
    score = -z / (4.0 + variance)  # x ~ N(0, 4 I)
    torch.testing.assert_close(tweedie(z, score, sigma), z * 4.0 / (4.0 + variance))
    torch.testing.assert_close(tweedie(z, -z / 4.25, 0.5), z * 4.0 / 4.25)


def test_tweedie_minimises_the_squared_error():
    mix = LowRankGaussianMixture.random(6, 3, 2, generator=seeded(0), dtype=F64)
    sample = mix.sample(40_000, 0.2, generator=seeded(1))
    best = tweedie(sample.tokens, mix.score(sample.tokens, 0.2), 0.2)
    error = noise_left(best, sample.tokens, sample.clean)
    for scale in (0.9, 1.1):
        assert noise_left(scale * best, sample.tokens, sample.clean) > error
    assert (
        noise_left(
            project_nearest(sample.tokens, mix.bases), sample.tokens, sample.clean
        )
        > error
    )


@settings(max_examples=40)
@given(st.integers(2, 10), st.integers(1, 5), st.integers(1, 10), st.integers(0, 2**31))
def test_projections_are_projections(d, components, rank, seed):
    g = seeded(seed)
    bases = random_bases(
        d, components, min(rank, d), orthogonal=False, generator=g, dtype=F64
    )
    z = torch.randn(3, 4, d, generator=g, dtype=F64)
    for basis in bases:
        projected = project(z, basis)
        torch.testing.assert_close(projected, z @ (basis @ basis.T))
        torch.testing.assert_close(project(projected, basis), projected)
    distances = torch.stack(
        [(z - project(z, basis)).norm(dim=-1) for basis in bases], -1
    )
    nearest = nearest_subspace(z, bases)
    torch.testing.assert_close(
        distances.gather(-1, nearest[..., None])[..., 0], distances.amin(-1)
    )
    torch.testing.assert_close(project_nearest(z, bases), project(z, bases[nearest]))


def test_small_noise_limit_is_projection_at_second_order():
    mix = LowRankGaussianMixture.random(
        48, 4, 6, orthogonal=False, generator=seeded(0), dtype=F64
    )
    z = mix.sample(20, 0.02, generator=seeded(1)).tokens
    sigmas = 0.02 * 0.5 ** np.arange(5)
    limit = project_nearest(z, mix.bases)
    distances = [float((mix.denoise(z, s) - limit).norm()) for s in sigmas]
    order = np.polyfit(np.log(sigmas), np.log(distances), 1)[0]
    assert abs(order - 2) < 0.02


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.floats(0.01, 1.0))
def test_small_noise_bound_holds_at_any_noise(seed, sigma):
    mix = LowRankGaussianMixture.random(
        12, 4, 2, orthogonal=False, generator=seeded(seed), dtype=F64
    )
    z = torch.randn(12, generator=seeded(seed + 1), dtype=F64)
    energies = (
        torch.einsum("d,kdp->kp", z, mix.bases)
        .square()
        .sum(-1)
        .sort(descending=True)
        .values
    )
    tau2, s2 = 0.5, sigma**2
    projected = project_nearest(z, mix.bases)
    distance = float((mix.denoise(z, sigma) - projected).norm())
    shrinkage = s2 / (tau2 + s2) * float(projected.norm())
    bound = (
        3
        * float(z.norm())
        * math.exp(-tau2 * float(energies[0] - energies[1]) / (2 * s2 * (tau2 + s2)))
    )
    assert abs(distance - shrinkage) <= bound + 1e-12


def test_noise_left_of_the_true_projection_is_p_over_d():
    mix = LowRankGaussianMixture.random(60, 5, 12, generator=seeded(0), dtype=F64)
    sample = mix.sample(3000, 0.05, generator=seeded(1))
    left = noise_left(
        project(sample.tokens, mix.bases[sample.labels]), sample.tokens, sample.clean
    )
    assert abs(left / 0.2 - 1) < 0.02
    assert noise_left(sample.tokens, sample.tokens, sample.clean) == pytest.approx(1)
    assert noise_left(sample.clean, sample.tokens, sample.clean) == 0


@pytest.mark.bad_input
def test_bad_input_is_refused():
    z, bases = torch.randn(3, 4), random_bases(4, 2, 2)
    with pytest.raises(ValueError, match="sigma"):
        add_noise(z, -0.1)
    with pytest.raises(ValueError, match="shape of z"):
        tweedie(z, torch.zeros(3, 5), 0.1)
    with pytest.raises(ValueError, match="orthonormal"):
        project(z, torch.ones(4, 2))
    with pytest.raises(ValueError, match="basis must be"):
        project(z, torch.eye(5)[:, :2])
    for function in (project_nearest, nearest_subspace):
        with pytest.raises(ValueError, match="orthonormal"):
            function(z, torch.ones(2, 4, 2))
        with pytest.raises(ValueError, match="bases must be"):
            function(torch.randn(3, 5), bases)
    with pytest.raises(ValueError, match="shapes must agree"):
        noise_left(z, z, torch.zeros(2, 4))
    with pytest.raises(ValueError, match="no noise"):
        noise_left(z, z, z)
