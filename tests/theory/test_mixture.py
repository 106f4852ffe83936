"""Low-rank Gaussian mixtures: densities against dense covariances, scores against
derivatives, tiny noise, refusals.
"""

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_core.theory.mixture import (
    LowRankGaussianMixture,
    check_orthonormal,
    coherence,
    orthonormality_error,
    random_bases,
)

F64 = torch.float64


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[LowRankGaussianMixture, torch.Generator]:
    """A mixture of any size, weights and scales (zeros among them), and a generator for
    what follows.
    """
    d = draw(st.integers(2, 9))
    rank = draw(st.integers(1, d))
    components = draw(st.integers(1, 5))
    g = seeded(draw(st.integers(0, 2**31)))
    weights = torch.rand(components, generator=g, dtype=F64) + 0.05
    scales = torch.rand(components, rank, generator=g, dtype=F64) + 0.1
    if draw(st.booleans()):
        scales[0, 0] = 0.0
    bases = random_bases(d, components, rank, orthogonal=False, generator=g, dtype=F64)
    return LowRankGaussianMixture(bases, weights / weights.sum(), scales), g


def dense_covariances(mix: LowRankGaussianMixture, sigma: float) -> torch.Tensor:
    signal = torch.einsum("kdp,kp,kep->kde", mix.bases, mix.scales**2, mix.bases)
    return signal + sigma**2 * torch.eye(mix.dim, dtype=mix.bases.dtype)


def dense_log_joint(
    mix: LowRankGaussianMixture, z: torch.Tensor, sigma: float
) -> torch.Tensor:
    """log pi_k + log N(z; 0, C_k) from explicit covariances: the independent
    transcription.
    """
    normal = torch.distributions.MultivariateNormal(
        torch.zeros(mix.components, mix.dim, dtype=z.dtype),
        dense_covariances(mix, sigma),
    )
    return mix.weights.log() + normal.log_prob(z[..., None, :])


@settings(max_examples=40)
@given(
    mixtures(), st.sampled_from([(), (3,), (2, 4)]), st.sampled_from([0.05, 0.3, 2.0])
)
def test_density_posterior_and_estimate_match_dense_covariances(
    mixture_and_generator, batch, sigma
):
    mix, g = mixture_and_generator
    z = torch.randn(*batch, mix.dim, generator=g, dtype=F64)
    expected = dense_log_joint(mix, z, sigma)
    torch.testing.assert_close(mix.log_joint(z, sigma), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        mix.log_density(z, sigma), torch.logsumexp(expected, -1), rtol=1e-9, atol=1e-9
    )
    gamma = expected.softmax(-1)
    torch.testing.assert_close(mix.posterior(z, sigma), gamma, rtol=1e-7, atol=1e-9)
    covariances = dense_covariances(mix, sigma)
    inverse = torch.linalg.inv(covariances)
    torch.testing.assert_close(
        mix.score(z, sigma),
        -torch.einsum("...k,kde,...e->...d", gamma, inverse, z),
        rtol=1e-7,
        atol=1e-7,
    )
    signal = covariances - sigma**2 * torch.eye(mix.dim, dtype=F64)
    torch.testing.assert_close(
        mix.denoise(z, sigma),
        torch.einsum("...k,kde,kef,...f->...d", gamma, signal, inverse, z),
        rtol=1e-7,
        atol=1e-9,
    )


@settings(max_examples=40)
@given(mixtures())
def test_score_is_the_gradient_of_the_log_density(mixture_and_generator):
    mix, g = mixture_and_generator
    sigma = 0.4
    z = mix.sample(6, sigma, generator=g).tokens.requires_grad_()
    (autograd,) = torch.autograd.grad(mix.log_density(z, sigma).sum(), z)
    score = mix.score(z.detach(), sigma)
    torch.testing.assert_close(score, autograd, rtol=1e-9, atol=1e-9)
    h, direction = 1e-5, torch.randn(z.shape, generator=g, dtype=F64)
    finite = (
        mix.log_density(z + h * direction, sigma)
        - mix.log_density(z - h * direction, sigma)
    ) / (2 * h)
    torch.testing.assert_close(
        (score * direction).sum(-1), finite.detach(), rtol=1e-5, atol=1e-6
    )


@settings(max_examples=40)
@given(mixtures(), st.floats(0.05, 3.0))
def test_denoiser_is_tweedie(mixture_and_generator, sigma):
    mix, g = mixture_and_generator
    z = torch.randn(7, mix.dim, generator=g, dtype=F64)
    torch.testing.assert_close(
        mix.denoise(z, sigma), z + sigma**2 * mix.score(z, sigma), rtol=1e-9, atol=1e-10
    )


def test_sigma_may_vary_from_token_to_token():
    mix = LowRankGaussianMixture.random(6, 3, 2, generator=seeded(0), dtype=F64)
    z = torch.randn(4, 5, 6, generator=seeded(1), dtype=F64)
    sigma = torch.rand(4, 5, generator=seeded(2), dtype=F64) + 0.1
    for method in (mix.log_density, mix.score, mix.posterior, mix.denoise):
        expected = torch.stack(
            [
                method(t, float(s))
                for t, s in zip(z.reshape(-1, 6), sigma.flatten(), strict=True)
            ]
        )
        torch.testing.assert_close(
            method(z, sigma), expected.reshape(method(z, sigma).shape)
        )


def test_zero_scales_are_a_smaller_rank():
    bases = random_bases(7, 2, 3, generator=seeded(0), dtype=F64)
    padded = LowRankGaussianMixture(
        bases, scales=torch.tensor([[0.5, 0.4, 0.0], [0.3, 0.2, 0.0]], dtype=F64)
    )
    smaller = LowRankGaussianMixture(
        bases[:, :, :2], scales=torch.tensor([[0.5, 0.4], [0.3, 0.2]], dtype=F64)
    )
    z = torch.randn(9, 7, generator=seeded(1), dtype=F64)
    for name in ("log_density", "posterior", "score", "denoise"):
        torch.testing.assert_close(
            getattr(padded, name)(z, 0.2), getattr(smaller, name)(z, 0.2)
        )


@pytest.mark.parametrize("sigma", [1e-2, 1e-5, 1e-8])
def test_log_density_at_tiny_noise_is_as_accurate_as_its_conditioning(sigma):
    mix = LowRankGaussianMixture.random(
        8, 2, 2, orthogonal=False, generator=seeded(3), dtype=F64
    )
    mpmath.mp.dps = 80
    for z in mix.sample(3, sigma, generator=seeded(4)).tokens:
        total = mpmath.mpf(0)
        column = mpmath.matrix(z[:, None].tolist())
        for k in range(2):
            u = mpmath.matrix(mix.bases[k].tolist())
            scales = mpmath.diag([mpmath.mpf(s) ** 2 for s in mix.scales[k].tolist()])
            c = u * scales * u.T + mpmath.mpf(sigma) ** 2 * mpmath.eye(8)
            quadratic = (column.T * mpmath.lu_solve(c, column))[0]
            weight = mpmath.mpf(float(mix.weights[k]))
            total += (
                weight
                * mpmath.exp(-quadratic / 2)
                / mpmath.sqrt((2 * mpmath.pi) ** 8 * mpmath.det(c))
            )
        conditioning = 2**-53 * float(z.norm()) * float(mix.score(z, sigma).norm())
        error = abs(mpmath.mpf(float(mix.log_density(z, sigma))) - mpmath.log(total))
        assert error <= 10 * conditioning + 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_everything_is_finite_at_tiny_and_huge_noise(dtype):
    mix = LowRankGaussianMixture.random(32, 5, 4, generator=seeded(0), dtype=dtype)
    z = mix.sample(10, 0.1, generator=seeded(1)).tokens
    for sigma in (1e-9, 1e-3, 1e3, 1e9):
        for value in (
            mix.log_density(z, sigma),
            mix.posterior(z, sigma),
            mix.score(z, sigma),
            mix.denoise(z, sigma),
        ):
            assert bool(value.isfinite().all())
        torch.testing.assert_close(
            mix.posterior(z, sigma).sum(-1), torch.ones(10, dtype=dtype)
        )


def test_samples_are_unit_signal_on_average_plus_noise():
    mix = LowRankGaussianMixture.random(24, 3, 5, generator=seeded(0), dtype=F64)
    sample = mix.sample(4000, 0.2, generator=seeded(1))
    assert abs(float(sample.clean.square().sum(1).mean()) - 1) < 5 * math.sqrt(
        2 / 5 / 4000
    )
    noise = sample.tokens - sample.clean
    assert abs(float(noise.square().mean()) / 0.04 - 1) < 5 * math.sqrt(2 / (4000 * 24))
    own = mix.bases[sample.labels]
    torch.testing.assert_close(
        (own @ (own.mT @ sample.clean[..., None]))[..., 0], sample.clean
    )
    silent = mix.sample(5, 0.0, generator=seeded(2))
    assert torch.equal(silent.tokens, silent.clean)


@settings(max_examples=10)
@given(st.integers(0, 2**31))
def test_samples_have_the_weights_and_covariances_of_the_model(seed):
    bases = random_bases(6, 2, 2, orthogonal=False, generator=seeded(seed), dtype=F64)
    scales = torch.tensor([[1.0, 0.5], [0.8, 0.2]], dtype=F64)
    weights = torch.tensor([0.3, 0.7], dtype=F64)
    mix = LowRankGaussianMixture(bases, weights, scales)
    drawn = mix.sample(20_000, 0.1, generator=seeded(seed))
    for k in range(2):
        own = drawn.tokens[drawn.labels == k]
        share_error = math.sqrt(0.3 * 0.7 / 20_000)
        assert abs(len(own) / 20_000 - float(weights[k])) < 5 * share_error
        covariance = bases[k] @ torch.diag(scales[k] ** 2) @ bases[k].T
        covariance += 0.01 * torch.eye(6, dtype=F64)
        diagonal = covariance.diag()
        variance = (covariance**2 + diagonal[:, None] * diagonal) / len(own)
        z_scores = (own.T @ own / len(own) - covariance) / variance.sqrt()
        assert float(z_scores.abs().max()) < 5
        independent = (own.T @ own / len(own) - diagonal.diag()) / variance.sqrt()
        assert float(independent.abs().max()) > 5  # a diagonal covariance is refused


def test_given_labels_are_used_and_seeds_repeat():
    mix = LowRankGaussianMixture.random(8, 2, 2, generator=seeded(0))
    labels = torch.tensor([0, 1, 1, 0])
    first = mix.sample(4, 0.1, labels=labels, generator=seeded(5))
    assert torch.equal(first.labels, labels)
    assert torch.equal(
        first.tokens, mix.sample(4, 0.1, labels=labels, generator=seeded(5)).tokens
    )


def test_weights_and_conversion():
    mix = LowRankGaussianMixture(
        random_bases(6, 2, 2, generator=seeded(0), dtype=F64),
        torch.tensor([0.25, 0.75]),
        torch.tensor([0.5, 0.1]),
    )
    labels = mix.sample(8000, 0.1, generator=seeded(1)).labels
    assert abs(float((labels == 1).double().mean()) - 0.75) < 5 * math.sqrt(
        0.25 * 0.75 / 8000
    )
    single = mix.to(torch.float32)
    assert single.score(torch.randn(3, 6), 0.1).dtype == torch.float32
    torch.testing.assert_close(single.scales, mix.scales.float())
    assert (mix.dim, mix.components, mix.rank) == (6, 2, 2)


@settings(max_examples=40)
@given(st.integers(2, 12), st.integers(1, 6), st.integers(1, 12), st.integers(0, 2**31))
def test_random_bases_are_orthonormal_and_mutually_orthogonal_when_they_fit(
    d, components, rank, seed
):
    rank = min(rank, d)
    bases = random_bases(d, components, rank, generator=seeded(seed), dtype=F64)
    assert bases.shape == (components, d, rank)
    assert orthonormality_error(bases) < 1e-12
    if components >= 2 and components * rank <= d:
        assert coherence(bases) < 1e-12
    independent = random_bases(
        d, components, rank, orthogonal=False, generator=seeded(seed), dtype=F64
    )
    assert orthonormality_error(independent) < 1e-12


def test_coherence_is_the_largest_cosine_between_subspaces():
    angle = 0.3
    first = torch.eye(4, dtype=F64)[:, :2]
    second = torch.zeros(4, 2, dtype=F64)
    second[0, 0], second[2, 0], second[3, 1] = math.cos(angle), math.sin(angle), 1.0
    assert coherence(torch.stack([first, second])) == pytest.approx(math.cos(angle))
    assert coherence(torch.stack([first, first])) == pytest.approx(1.0)
    third = torch.eye(4, dtype=F64)[:, 2:]  # orthogonal to the first
    closest = max(math.cos(angle), coherence(torch.stack([second, third])))
    together = torch.stack([first, second, third])
    assert coherence(together) == pytest.approx(closest)


@settings(max_examples=20)
@given(st.integers(0, 2**31))
def test_random_subspaces_keep_the_share_p_over_d(seed):
    bases = random_bases(
        40, 200, 4, orthogonal=False, generator=seeded(seed), dtype=F64
    )
    # the energy that each keeps of the first coordinate vector
    shares = bases[:, 0, :].square().sum(1)
    variance = 2 * 4 * 36 / (40**2 * 42)
    assert abs(float(shares.mean()) - 0.1) < 5 * math.sqrt(variance / 200)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bases": torch.ones(2, 4, 2)}, "orthonormal"),
        ({"bases": torch.eye(4)[:, :2]}, r"shape \(K, d, p\)"),
        ({"weights": torch.tensor([0.5, 0.6])}, "sum to one"),
        ({"weights": torch.tensor([1.0, 0.0])}, "positive"),
        ({"weights": torch.tensor([1.0])}, "2 positive numbers"),
        ({"scales": torch.tensor([0.1, -0.1])}, "not negative"),
        ({"scales": torch.tensor([0.1, math.inf])}, "finite"),
        ({"scales": torch.ones(3)}, "of shape"),
        ({"scales": torch.ones(2, 3)}, "of shape"),
    ],
)
def test_bad_parameters_are_refused(change, message):
    arguments = {"bases": random_bases(4, 2, 2, generator=seeded(0))} | change
    with pytest.raises(ValueError, match=message):
        LowRankGaussianMixture(**arguments)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "method", ["log_joint", "log_density", "posterior", "score", "denoise"]
)
@pytest.mark.parametrize(
    ("z", "sigma", "message"),
    [
        (torch.zeros(3, 5), 0.1, "dimension d = 4"),
        (torch.zeros(3, 4, dtype=F64), 0.1, "float64"),
        (torch.zeros(3, 4), 0.0, "sigma must be"),
        (torch.zeros(3, 4), -1.0, "sigma must be"),
        (torch.zeros(3, 4), math.nan, "sigma must be"),
        (torch.zeros(3, 4), math.inf, "sigma must be"),
        (torch.zeros(3, 4), 1e-30, "representable"),
    ],
)
def test_bad_tokens_and_noise_are_refused(method, z, sigma, message):
    mix = LowRankGaussianMixture.random(4, 2, 2, generator=seeded(0))
    with pytest.raises(ValueError, match=message):
        getattr(mix, method)(z, sigma)


@pytest.mark.bad_input
def test_bad_samples_and_sizes_are_refused():
    mix = LowRankGaussianMixture.random(4, 2, 2, generator=seeded(0))
    for arguments in (
        {"n": 0, "sigma": 0.1},
        {"n": 3, "sigma": -0.1},
        {"n": 3, "sigma": math.nan},
    ):
        with pytest.raises(ValueError):
            mix.sample(**arguments)
    for labels in (
        torch.tensor([0, 2, 0]),
        torch.tensor([0, -1, 0]),
        torch.tensor([0, 1]),
    ):
        with pytest.raises(ValueError, match="labels"):
            mix.sample(3, 0.1, labels=labels)
    for sizes in ((4, 2, 5), (4, 0, 2), (0, 1, 1)):
        with pytest.raises(ValueError):
            random_bases(*sizes)
    with pytest.raises(ValueError, match="mutually orthogonal"):
        random_bases(4, 3, 2, orthogonal=True)
    with pytest.raises(ValueError, match="K >= 2"):
        coherence(random_bases(4, 1, 2))
    with pytest.raises(ValueError, match="orthonormal"):
        check_orthonormal(torch.full((1, 3, 1), math.nan))
