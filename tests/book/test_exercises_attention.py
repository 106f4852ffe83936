"""The numbers in the solutions of the chapter on attention, on random instances."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_core.model.attention import attend, attention_weights, exact_mssa, mssa
from crate_core.theory.mixture import LowRankGaussianMixture
from crate_core.theory.rate import head_coordinates, subspace_beta

F64 = torch.float64
seeds = st.integers(0, 2**31)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_stranger_along_the_others_direction():
    """ex-attention-stranger: 0.99 by the exact step, 3.25 by attention."""
    v = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.1, 0.0]], dtype=F64)
    plane, alpha = torch.eye(2, dtype=F64)[None], 2 * math.log(10)
    exact = exact_mssa(v, plane, math.sqrt(2 / (3 * 50))) / 50
    assert float(exact[2, 0]) / 0.1 == pytest.approx(100.5 / 101.5)
    scores = torch.tensor([1.585, 0.631, 1.047], dtype=F64)
    torch.testing.assert_close(
        attention_weights(v[None], alpha)[0, 2], scores / 3.263, atol=2e-4, rtol=0
    )
    assert float(attend(v[None], alpha)[0, 2, 0]) == pytest.approx(0.3244, abs=1e-4)


@settings(deadline=None)
@given(st.integers(2, 12), st.integers(1, 12), st.floats(0.1, 3), seeds)
def test_to_first_order_a_closed_head_is_linear(n, p, alpha, seed):
    """ex-attention-stranger: mean + alpha C v, for a weak token v."""
    v = torch.randn(n, p, generator=seeded(seed), dtype=F64)
    mean, second = v.mean(0), v.mT @ v / n
    errors = []
    for size in (1e-3, 1e-4):
        weak = size * torch.randn(p, generator=seeded(seed + 1), dtype=F64)
        out = torch.softmax(alpha * v @ weak, 0) @ v
        covariance = second - torch.outer(mean, mean)
        errors.append(float((out - mean - alpha * covariance @ weak).norm()))
    # second order, down to rounding
    assert errors[1] <= errors[0] / 50 + 1e-13


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 8), st.floats(0.1, 3), seeds)
def test_leverages_add_up_to_less_than_n_and_p(n, p, eps, seed):
    """ex-attention-leverage, with the exact weights by ridge regression."""
    v = torch.randn(p, n, generator=seeded(seed), dtype=F64)
    beta = subspace_beta(n, p, eps)
    gram = beta * v.mT @ v
    weights = torch.linalg.solve(torch.eye(n, dtype=F64) + gram, gram)
    assert 0 < float(weights.trace()) < min(n, p)
    out = exact_mssa(v.mT, torch.eye(p, dtype=F64)[None], eps) / beta
    torch.testing.assert_close(v @ weights, out.mT, atol=1e-8, rtol=1e-6)


def test_softmax_weights_on_oneself_can_add_up_to_almost_n():
    v = 10 * torch.eye(6, dtype=F64)
    assert float(attention_weights(v[None], 1.0)[0].trace()) > 6 - 1e-6


def test_exact_weights_may_be_negative_and_do_not_add_up_to_one():
    """As the text says of the exact operator."""
    v = torch.randn(16, 24, generator=seeded(0), dtype=F64)
    gram = subspace_beta(24, 16, 1.0) * v.mT @ v
    weights = torch.linalg.solve(torch.eye(24, dtype=F64) + gram, gram)
    assert float(weights.min()) < -0.01
    assert float(weights.sum(0).min()) < 0.9


def test_scale_at_which_the_weight_on_oneself_is_one_half():
    """ex-attention-threshold: 6.68; a sample's median is there within 0.3."""
    n, heads, p, alpha = 768, 12, 64, 6.68
    expected = (n - 1) * (1 - 1 / heads + math.exp(alpha**2 / (2 * p)) / heads)
    assert math.log(expected) == pytest.approx(alpha, abs=0.01)
    assert math.exp(alpha**2 / 128) == pytest.approx(1.42, abs=0.01)
    crossings = []
    for seed in range(20):
        g = seeded(seed)
        codes = torch.randn(n, p, generator=g, dtype=F64) / math.sqrt(p)
        codes[n // heads :] = 0
        codes[0] /= codes[0].norm()
        low, high = 1.0, 20.0
        for _ in range(40):
            middle = (low + high) / 2
            weight = torch.softmax(middle * codes @ codes[0], 0)[0]
            low, high = (low, middle) if weight > 0.5 else (middle, high)
        crossings.append(low)
    assert sorted(crossings)[10] == pytest.approx(alpha, abs=0.3)


@given(st.integers(1, 12), st.integers(1, 8), st.floats(0.3, 2), seeds)
def test_posterior_mean_is_attention_to_clean_tokens(n, p, sigma, seed):
    """prop-attention-posterior, by densities; and the discount of other lengths."""
    g = seeded(seed)
    clean = torch.randn(n, p, generator=g, dtype=F64)
    v = torch.randn(5, p, generator=g, dtype=F64)
    for points in (clean, torch.nn.functional.normalize(clean, dim=-1)):
        square = torch.cdist(v, points).square()
        weights = torch.softmax(-square / (2 * sigma**2), -1)
        scores = v @ points.mT / sigma**2
        discount = points.square().sum(-1) / (2 * sigma**2)
        torch.testing.assert_close(torch.softmax(scores - discount, -1), weights)
    torch.testing.assert_close(torch.softmax(scores, -1), weights)


@pytest.mark.parametrize("seed", range(3))
def test_iterated_attention_turns_round_in_closed_heads(seed):
    """ex-attention-iterate: best within four layers, and then only others get worse."""
    g = seeded(seed)
    mix = LowRankGaussianMixture.random(256, 4, 64, generator=g)
    labels = torch.arange(256) % 4
    s = mix.sample(256, 0.5 / 16, labels=labels, generator=g)
    own = torch.nn.functional.one_hot(labels, 4).bool().T
    noise, z, path = (s.tokens - s.clean).square().sum(), s.tokens, []
    for _ in range(12):
        z = 0.5 * z + 0.5 * mssa(z, mix.bases, scale=16.0)
        v = head_coordinates(z, mix.bases)
        error = head_coordinates(z - s.clean, mix.bases).square().sum(-1)
        path.append((float(error[own].sum() / noise), float(error[~own].sum() / noise)))
    total = [sum(errors) for errors in path]
    assert total.index(min(total)) < 4
    assert total[-1] > 1.3 * min(total)
    assert abs(path[-1][0] - 0.25) < 0.05
    others = v * ~own[..., None]
    common = others.sum(-2) / (~own).sum(-1, keepdim=True)
    alike = (common.square().sum(-1) * (~own).sum(-1)).sum() / others.square().sum()
    assert float(alike) > 0.95
