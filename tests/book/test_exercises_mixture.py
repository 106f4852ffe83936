"""The numbers in the solutions of the chapter on the signal model, on random
instances.
"""

import math

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_core.theory.denoise import nearest_subspace, project
from crate_core.theory.mixture import LowRankGaussianMixture, coherence, random_bases

F64 = torch.float64


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=10)
@given(st.integers(0, 2**31), st.integers(1, 4), st.floats(0.05, 0.5))
def test_inside_what_is_removed_is_independent_given_the_subspace(seed, rank, sigma):
    """ex-mixture-inside: error p sigma^2; no correlation given k, some without."""
    mix = LowRankGaussianMixture.random(6, 1, rank, generator=seeded(seed), dtype=F64)
    n = 4000
    sample = mix.sample(n, sigma, generator=seeded(seed))
    kept = project(sample.tokens, mix.bases[0])
    error = (kept - sample.clean).square().sum(1)
    wanted = rank * sigma**2
    assert abs(float(error.mean()) - wanted) < 5 * wanted * math.sqrt(2 / (rank * n))
    removed, clean = sample.tokens - kept, sample.clean

    def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
        """Of squared lengths: zero for independent vectors, up to 1/sqrt(n)."""
        pair = torch.stack([a.square().sum(1), b.square().sum(1)])
        return float(torch.corrcoef(pair)[0, 1])

    assert abs(correlation(removed, clean)) < 5 / math.sqrt(n)
    assert abs(correlation(removed, kept - clean)) < 5 / math.sqrt(n)
    # Without k: on two axes, what is removed lies along the other line.
    cross = LowRankGaussianMixture(torch.eye(2, dtype=F64)[..., None], scales=1.0)
    two = cross.sample(n, sigma, generator=seeded(seed))
    gone = two.tokens - project(two.tokens, cross.bases[two.labels])
    assert torch.equal(nearest_subspace(gone, cross.bases), 1 - two.labels)
    assert abs(correlation(gone[:, :1], two.clean[:, :1])) > 5 / math.sqrt(n)


@settings(max_examples=5)
@given(st.integers(0, 2**31), st.floats(0.3, 0.7))
def test_incoherent_dimension_for_a_wanted_coherence(seed, wanted):
    """ex-mixture-incoherent: d = 2 p / (1 - sqrt(1 - coherence^2)), for one pair."""
    p = 32
    d = round(2 * p / (1 - math.sqrt(1 - wanted**2)))
    bases = random_bases(d, 2, p, orthogonal=False, generator=seeded(seed), dtype=F64)
    found = coherence(bases)
    assert abs(found / wanted - 1) < 2 * p ** (-2 / 3)
    assert abs(found / (wanted / 2) - 1) > 2 * p ** (-2 / 3)


@settings(max_examples=10)
@given(st.integers(0, 2**31))
def test_ranks_zero_scale_is_a_smaller_subspace(seed):
    """ex-mixture-ranks, in random directions."""
    g = seeded(seed)
    frame = torch.linalg.qr(torch.randn(3, 3, generator=g, dtype=F64)).Q
    scales = torch.tensor([[1.0, 0.0], [0.7, 0.7]], dtype=F64)
    bases = torch.stack([frame[:, [0, 1]], frame[:, [1, 2]]])
    mix = LowRankGaussianMixture(bases, scales=scales)
    line = frame[:, :1] @ frame[:, :1].T + 0.01 * torch.eye(3, dtype=F64)
    plane = 0.49 * frame[:, 1:] @ frame[:, 1:].T + 0.01 * torch.eye(3, dtype=F64)
    normals = torch.distributions.MultivariateNormal(
        torch.zeros(2, 3, dtype=F64), torch.stack([line, plane])
    )
    z = torch.randn(5, 1, 3, generator=g, dtype=F64)
    dense = torch.logsumexp(normals.log_prob(z), 1) - math.log(2)
    torch.testing.assert_close(mix.log_density(z[:, 0], 0.1), dense)


@settings(max_examples=10)
@given(st.integers(0, 2**31))
def test_blob_posterior_tends_to_the_weights_at_the_order_said(seed):
    """ex-mixture-blob: order -2 in sigma, -4 with equal signal energies."""
    g = seeded(seed)
    bases = random_bases(5, 3, 2, orthogonal=False, generator=g, dtype=F64)
    z = 3 * torch.randn(5, generator=g, dtype=F64)
    equal = torch.rand(3, 2, generator=g, dtype=F64) + 0.3
    equal = equal / equal.norm(dim=1, keepdim=True)
    unequal = equal * torch.tensor([[1.0], [2.0], [0.5]], dtype=F64)
    for scales, order in ((equal, -4), (unequal, -2)):
        mix = LowRankGaussianMixture(bases, scales=scales)
        sigmas = np.array([40.0, 80.0])
        gaps = [float((mix.posterior(z, s) - 1 / 3).abs().max()) for s in sigmas]
        slope = math.log(gaps[1] / gaps[0]) / math.log(2)
        assert abs(slope - order) < 0.2


@settings(max_examples=10)
@given(st.integers(0, 2**31), st.sampled_from([10, 40, 80]))
def test_contrast_two_gaussians_gain_at_least_the_bound(seed, d):
    """ex-mixture-contrast with a log-normal contrast, cut at its median."""
    g = seeded(seed)
    n = 20_000
    root = torch.randn(d, d, generator=g, dtype=F64) / math.sqrt(d)
    factor = torch.linalg.cholesky(root @ root.T + 0.1 * torch.eye(d, dtype=F64))
    h = (0.8 * torch.randn(n, generator=g, dtype=F64)).exp()
    x = h[:, None] * (torch.randn(n, d, generator=g, dtype=F64) @ factor.T)
    below = h <= 1
    q = float(below.to(F64).mean())
    squares = [float(h[part].square().mean()) for part in (below, ~below)]
    mean_square = float(h.square().mean())
    zero = torch.zeros(d, dtype=F64)

    def log_likelihood(square: float) -> torch.Tensor:
        return torch.distributions.MultivariateNormal(
            zero, scale_tril=factor * math.sqrt(square)
        ).log_prob(x)

    mixture = torch.logaddexp(
        log_likelihood(squares[0]) + math.log(q),
        log_likelihood(squares[1]) + math.log(1 - q),
    )
    gain = mixture - log_likelihood(mean_square)
    entropy = -q * math.log(q) - (1 - q) * math.log(1 - q)
    bracket = math.log(mean_square)
    bracket -= q * math.log(squares[0]) + (1 - q) * math.log(squares[1])
    bound = d / 2 * bracket - entropy
    error = float(gain.std()) / math.sqrt(n)
    assert float(gain.mean()) > bound - 5 * error
    assert bound > 0 or d == 10
