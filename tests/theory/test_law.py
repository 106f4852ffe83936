"""When the gradient of R^c denoises: the bounds hold, they are tight, and the law
agrees with measurement.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_core.theory.law import (
    compression_bound,
    compression_bound_terms,
    compression_error,
    contraction_bound,
    denoising_cosine,
    denoising_cosine_law,
    noise_direction,
)
from crate_core.theory.mixture import LowRankGaussianMixture, random_bases
from crate_core.theory.rate import subspace_beta, subspace_coding_rate_grad

F64 = torch.float64


def draw_tokens(seed, dim, components, rank, n, noise):
    """A mixture with orthogonal subspaces and n tokens, memberships in turn, noise of
    norm about ``noise``.
    """
    generator = torch.Generator().manual_seed(seed)
    mix = LowRankGaussianMixture.random(
        dim, components, rank, orthogonal=True, generator=generator, dtype=F64
    )
    sample = mix.sample(
        n, noise / dim**0.5, labels=torch.arange(n) % components, generator=generator
    )
    return mix, sample


@st.composite
def configurations(draw, most_per_rank: float = 1.0):
    components, rank = draw(st.integers(2, 5)), draw(st.integers(1, 8))
    dim = components * rank + draw(st.integers(0, 6))
    n = components * draw(st.integers(1, max(1, int(most_per_rank * rank))))
    noise, eps = 10 ** draw(st.floats(-4, 0)), 10 ** draw(st.floats(-3, 0))
    return draw(st.integers(0, 2**31 - 1)), dim, components, rank, n, noise, eps


def project_own(z, bases, labels):
    return torch.stack(
        [bases[k] @ (bases[k].T @ x) for x, k in zip(z, labels, strict=True)]
    )


@given(configurations(most_per_rank=3.0))
@settings(max_examples=40)
def test_noise_direction_is_what_projecting_removes(configuration):
    *sizes, noise, eps = configuration
    mix, s = draw_tokens(*sizes, noise)
    own = project_own(s.tokens, mix.bases, s.labels)
    torch.testing.assert_close(
        noise_direction(s.tokens, mix.bases, s.labels),
        s.tokens - own,
        rtol=1e-9,
        atol=1e-12,
    )
    span = sum(u @ u.T for u in mix.bases)
    within = noise_direction(s.tokens, mix.bases, s.labels, within_span=True)
    torch.testing.assert_close(within, s.tokens @ span - own, rtol=1e-9, atol=1e-12)
    cosine = denoising_cosine(s.tokens, mix.bases, s.labels, eps)
    gradient, target = (
        subspace_coding_rate_grad(s.tokens, mix.bases, eps),
        s.tokens - own,
    )
    expected = (gradient * target).sum(-1) / (
        gradient.norm(dim=-1) * target.norm(dim=-1)
    )
    torch.testing.assert_close(cosine, expected, rtol=1e-6, atol=1e-9)


@given(configurations())
@settings(max_examples=60)
def test_the_error_of_every_token_is_below_the_bound(configuration):
    *sizes, noise, eps = configuration
    mix, s = draw_tokens(*sizes, noise)
    error = compression_error(s.tokens, mix.bases, s.labels, eps)
    bound = compression_bound(s.tokens, mix.bases, s.labels, eps)
    assert bool((error <= bound * (1 + 1e-8)).all())


@given(configurations())
@settings(max_examples=30)
def test_the_bound_and_its_terms_follow_the_letter_of_the_theorem(configuration):
    *sizes, noise, eps = configuration
    mix, s = draw_tokens(*sizes, noise)
    z, labels, bases = s.tokens, s.labels, mix.bases
    beta = bases.shape[2] / (len(z) * eps**2)
    mistaken = beta * max(
        float(torch.linalg.matrix_norm(z[labels != k] @ u, ord=2)) ** 2
        for k, u in enumerate(bases)
    )
    own, occupied = [], []
    for i, k in enumerate(labels.tolist()):
        others = (labels == k) & (torch.arange(len(z)) != i)
        mates, v = z[others] @ bases[k], z[i] @ bases[k]
        distance = (v - torch.linalg.pinv(mates) @ mates @ v).norm()
        noise_squared, seen_squared = 0.0, 0.0
        for j, u in enumerate(bases):
            if j != k:
                x, used = z[i] @ u, z[labels == j] @ u
                noise_squared += x @ x
                seen_squared += (torch.linalg.pinv(used) @ used @ x).square().sum()
        own.append(1 / (beta * distance * noise_squared**0.5))
        occupied.append((seen_squared / noise_squared) ** 0.5)
    own, occupied = torch.stack(own), torch.stack(occupied)
    terms = compression_bound_terms(z, bases, labels, eps)
    for found, wanted in zip(terms, (own, occupied, mistaken), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(
        compression_bound(z, bases, labels, eps),
        torch.hypot((1 + mistaken) * own, occupied + mistaken),
        rtol=1e-5,
        atol=1e-9,
    )


def test_the_bound_is_tight_and_vanishes_in_the_window():
    mix, s = draw_tokens(0, 600, 2, 300, 2, 1e-4)
    error = compression_error(s.tokens, mix.bases, s.labels, 3e-3)
    bound = compression_bound(s.tokens, mix.bases, s.labels, 3e-3)
    assert float(bound.max()) < 0.2
    assert float((error / bound).max()) > 0.5
    # At fixed eps the error grows as the noise goes away: the bound follows it closely.
    mix, s = draw_tokens(0, 40, 4, 10, 8, 1e-4)
    ratio = compression_error(s.tokens, mix.bases, s.labels, 0.1) / compression_bound(
        s.tokens, mix.bases, s.labels, 0.1
    )
    assert float(ratio.max()) > 0.99


def test_the_bound_is_infinite_with_dependent_class_mates():
    mix, s = draw_tokens(0, 12, 3, 4, 15, 0.1)  # five tokens in four dimensions
    assert bool(compression_bound(s.tokens, mix.bases, s.labels, 0.1).isinf().all())
    mix, s = draw_tokens(0, 12, 3, 4, 6, 0.1)
    z = s.tokens.clone()
    z[3] = z[0]
    bound = compression_bound(z, mix.bases, s.labels, 0.1)
    assert bound.isinf().tolist() == [True, False, False, True, False, False]


@given(configurations(most_per_rank=30.0))
@settings(max_examples=30)
def test_deviation_from_contraction_is_below_delta(configuration):
    *sizes, noise, eps = configuration
    mix, s = draw_tokens(*sizes, noise)
    n, rank = sizes[4], sizes[3]
    m, delta = contraction_bound(s.tokens, mix.bases, eps)
    assert 0 < float(m) <= 1
    assert 0 <= float(delta) < 1
    inside = s.tokens @ sum(u @ u.T for u in mix.bases)
    gradient = subspace_coding_rate_grad(s.tokens, mix.bases, eps) / subspace_beta(
        n, rank, eps
    )
    deviation = (gradient / m - inside).norm(dim=-1) / inside.norm(dim=-1)
    assert float(deviation.max()) <= float(delta) + 1e-9


def test_contraction_bound_takes_batches_and_shrinks_with_tokens():
    mix, s = draw_tokens(0, 24, 3, 8, 24 * 100, 0.3)
    batch = torch.stack([s.tokens, 2 * s.tokens])
    m, delta = contraction_bound(batch, mix.bases, 0.1)
    assert m.shape == delta.shape == (2,)
    torch.testing.assert_close(m[1], contraction_bound(2 * s.tokens, mix.bases, 0.1)[0])
    few = contraction_bound(s.tokens[:48], mix.bases, 0.1)[1]
    assert float(delta[0]) < 0.3 < float(few)


@pytest.mark.parametrize("factor", [1 / 16, 1 / 4, 1, 4])
@pytest.mark.parametrize(
    ("noise", "eps"), [(0.1, 0.1), (0.01, 0.1), (1.0, 0.3), (0.03, 0.01)]
)
def test_law_agrees_with_measurement(factor, noise, eps):
    n = round(192 * factor)
    values = []
    for seed in range(4):
        mix, s = draw_tokens(seed, 192, 12, 16, n, noise)
        values.append(denoising_cosine(s.tokens, mix.bases, s.labels, eps).mean())
    predicted = denoising_cosine_law(n, 192, 12, 16, noise / 192**0.5, eps)
    assert abs(float(torch.stack(values).mean()) - predicted) < 0.04


def test_law_counts_what_lies_outside_the_span():
    mix, s = draw_tokens(0, 400, 4, 50, 40, 0.1)
    value = float(denoising_cosine(s.tokens, mix.bases, s.labels, 0.1).mean())
    assert abs(value - denoising_cosine_law(40, 400, 4, 50, 0.1 / 20, 0.1)) < 0.02
    assert value < 0.7


def test_law_has_the_limits_of_both_theorems():
    # In the window: the ceiling sqrt(1 - N/Kp).  Many tokens: the share of noise in the
    # token.
    assert denoising_cosine_law(
        192, 768, 12, 64, 1e-9 / 768**0.5, 1e-6
    ) == pytest.approx(math.sqrt(0.75), abs=2e-3)
    floor = 0.1 * math.sqrt(704 / 768) / math.sqrt(1 + 0.1**2)
    assert denoising_cosine_law(
        768 * 10_000, 768, 12, 64, 0.1 / 768**0.5, 0.1
    ) == pytest.approx(floor, rel=0.01)


@given(
    st.integers(2, 8),
    st.integers(1, 64),
    st.integers(0, 50),
    st.integers(1, 5000),
    st.floats(-6, 1),
    st.floats(-4, 1),
)
def test_law_is_a_cosine(components, rank, extra, n, log_sigma, log_eps):
    dim = components * rank + extra
    value = denoising_cosine_law(n, dim, components, rank, 10**log_sigma, 10**log_eps)
    assert 0 < value <= 1 + 1e-12


@pytest.mark.bad_input
def test_bad_input():
    mix, s = draw_tokens(0, 12, 3, 4, 6, 0.1)
    z, bases, labels = s.tokens, mix.bases, s.labels
    tilted = random_bases(12, 3, 4, orthogonal=False, dtype=F64)
    with pytest.raises(ValueError, match="mutually orthogonal"):
        compression_error(z, tilted, labels, 0.1)
    with pytest.raises(ValueError, match="mutually orthogonal"):
        compression_bound(z, tilted, labels, 0.1)
    with pytest.raises(ValueError, match="mutually orthogonal"):
        contraction_bound(z, tilted, 0.1)
    with pytest.raises(ValueError, match="orthonormal"):
        contraction_bound(z, 2 * bases, 0.1)
    with pytest.raises(ValueError, match="labels"):
        noise_direction(z, bases, labels[:-1])
    with pytest.raises(ValueError, match="labels"):
        denoising_cosine(z, bases, labels + 1, 0.1)
    with pytest.raises(ValueError, match=r"\(n, d\)"):
        compression_bound(z[None], bases, labels, 0.1)
    with pytest.raises(ValueError, match="eps"):
        compression_error(z, bases, labels, 0.0)
    for arguments in (
        (6, 12, 1, 4, 0.1, 0.1),
        (6, 12, 4, 4, 0.1, 0.1),
        (0, 12, 3, 4, 0.1, 0.1),
    ):
        with pytest.raises(ValueError):
            denoising_cosine_law(*arguments)
    for sigma, eps in ((0.0, 0.1), (-1.0, 0.1), (0.1, 0.0)):
        with pytest.raises(ValueError):
            denoising_cosine_law(6, 12, 3, 4, sigma, eps)
