"""Expectation-maximisation: no step lowers the likelihood, the M-step is a maximum, the
model is recovered.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_core.theory.em import fit_mixture
from crate_core.theory.mixture import LowRankGaussianMixture, random_bases

F64 = torch.float64


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=12)
@given(
    st.integers(1, 4),
    st.integers(1, 7),
    st.sampled_from([None, 0.05, 0.3]),
    st.integers(0, 2**31),
)
def test_no_step_lowers_the_likelihood(components, rank, sigma, seed):
    truth = LowRankGaussianMixture.random(
        8, 3, 2, orthogonal=False, generator=seeded(seed), dtype=F64
    )
    z = truth.sample(200, 0.1, generator=seeded(seed)).tokens
    fit = fit_mixture(
        z, components, rank, sigma=sigma, iterations=8, generator=seeded(seed)
    )
    assert np.diff(fit.log_likelihoods).min() > -1e-9
    assert fit.log_likelihoods[-1] == pytest.approx(
        float(fit.mixture.log_density(z, fit.sigma).mean())
    )
    assert sigma is None or fit.sigma == sigma


@settings(max_examples=15)
@given(st.integers(1, 5), st.integers(0, 2**31))
def test_one_component_is_the_maximum_of_the_likelihood(rank, seed):
    """With K = 1 one step ends at the maximum: no other subspace, scales or sigma
    nearby does better.
    """
    g = seeded(seed)
    z = torch.randn(60, 6, generator=g, dtype=F64) * torch.rand(
        6, generator=g, dtype=F64
    )
    fit = fit_mixture(z, 1, rank, iterations=1, generator=g)
    best = float(fit.mixture.log_density(z, fit.sigma).mean())
    for _ in range(20):
        moved = torch.linalg.qr(
            fit.mixture.bases + 0.05 * torch.randn(1, 6, rank, generator=g, dtype=F64)
        ).Q
        scales = (
            fit.mixture.scales
            * (1 + 0.1 * torch.randn(1, rank, generator=g, dtype=F64)).abs()
        )
        sigma = fit.sigma * float(1 + 0.1 * torch.randn((), generator=g))
        assert (
            float(
                LowRankGaussianMixture(moved, None, scales).log_density(z, sigma).mean()
            )
            <= best + 1e-12
        )
        assert float(fit.mixture.log_density(z, sigma).mean()) <= best + 1e-12


def test_one_component_of_nearly_full_rank_is_the_sample_covariance():
    z = torch.randn(500, 5, generator=seeded(0), dtype=F64) * torch.arange(
        1, 6, dtype=F64
    )
    fit = fit_mixture(z, 1, 4, iterations=1)
    covariance = (
        fit.mixture.bases[0] * fit.mixture.scales[0] ** 2 @ fit.mixture.bases[0].T
    )
    torch.testing.assert_close(
        covariance + fit.sigma**2 * torch.eye(5, dtype=F64), z.T @ z / 500
    )


def test_recovers_the_model_it_was_drawn_from():
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=F64)
    truth = LowRankGaussianMixture(
        random_bases(12, 3, 2, orthogonal=False, generator=seeded(0), dtype=F64),
        weights,
        torch.tensor([0.5, 1.0, 0.8]),
    )
    z = truth.sample(3000, 0.05, generator=seeded(1)).tokens
    fit = max(
        (fit_mixture(z, 3, 2, generator=seeded(s)) for s in range(4)),
        key=lambda f: f.log_likelihoods[-1],
    )
    smallest_cosine = torch.linalg.svdvals(
        torch.einsum("jda,kdb->jkab", truth.bases, fit.mixture.bases)
    )[..., -1]
    match = smallest_cosine.argmax(1)
    assert sorted(match.tolist()) == [0, 1, 2]
    assert float(smallest_cosine.amax(1).min()) > 0.999
    assert fit.sigma == pytest.approx(0.05, rel=0.02)
    torch.testing.assert_close(fit.mixture.weights[match], weights, atol=0.04, rtol=0)
    torch.testing.assert_close(
        fit.mixture.scales[match], truth.scales, rtol=0.1, atol=0
    )


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.randn(5)}, "shape"),
        ({"z": torch.full((5, 3), float("nan"))}, "finite"),
        ({"components": 6}, "components"),
        ({"components": 0}, "components"),
        ({"rank": 3}, "rank"),
        ({"iterations": 0}, "iterations"),
        ({"sigma": 0.0}, "sigma"),
        ({"z": torch.eye(5, 3)[:1].repeat(5, 1)}, "no noise"),
    ],
)
def test_bad_input_is_refused(change, message):
    arguments = {
        "z": torch.randn(5, 3),
        "components": 1,
        "rank": 1,
        "iterations": 2,
    } | change
    with pytest.raises(ValueError, match=message):
        fit_mixture(**arguments)
