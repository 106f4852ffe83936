"""The numbers in the solutions of the chapter on compression and denoising, on random
instances.
"""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_core.theory.law import (
    compression_bound,
    compression_error,
    denoising_cosine,
    denoising_cosine_law,
)
from crate_core.theory.mixture import LowRankGaussianMixture
from crate_core.theory.rate import subspace_beta, subspace_coding_rate_grad

F64 = torch.float64
SEEDS = st.integers(0, 2**31)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=20)
@given(SEEDS, st.integers(1, 9), st.floats(0.05, 2.0))
def test_lines_multiply_every_token_by_the_same_numbers(seed, n, eps):
    """ex-cd-lines: coordinate k of the gradient is 1/(1 + beta |V_k|^2) of
    the token's.
    """
    z = torch.randn(n, 3, generator=seeded(seed), dtype=F64)
    lines = torch.eye(3, dtype=F64)[..., None]
    beta = subspace_beta(n, 1, eps)
    gradient = subspace_coding_rate_grad(z, lines, eps) / beta
    torch.testing.assert_close(gradient, z / (1 + beta * z.square().sum(0)))
    even = z / z.norm(dim=0)  # equal energy on all lines: only lengths change
    moved = even - subspace_coding_rate_grad(even, lines, eps) / beta
    cosine = torch.cosine_similarity(moved, even, dim=-1)
    torch.testing.assert_close(cosine, torch.ones(n, dtype=F64))
    if n > 1:  # unequal energies do turn tokens
        moved = z - gradient
        assert float(torch.cosine_similarity(moved, z, dim=-1).min()) < 1 - 1e-6


@settings(max_examples=20)
@given(st.floats(0.05, 3.0), st.floats(-0.3, 0.3), st.floats(0.1, 0.3))
def test_a_second_token_at_an_angle_occupies_the_plane(phi, first, second):
    """ex-cd-third: nothing is removed for beta phi^2 / 2 >> 1, the part across for phi
    = 0.
    """
    turn = torch.tensor([math.cos(phi), math.sin(phi)], dtype=F64)
    assert math.isclose(
        float(
            torch.linalg.eigvalsh(
                torch.outer(turn, turn)
                + torch.diag(torch.tensor([1.0, 0.0], dtype=F64))
            )[0]
        ),
        1 - abs(math.cos(phi)),
        abs_tol=1e-12,
    )
    planes = torch.eye(4, dtype=F64).reshape(4, 2, 2).permute(1, 0, 2)
    scale = 1e-4  # noise far below the precision, so that it does not count as energy

    def removed(angle: float) -> torch.Tensor:
        own = [0.0, 0.0, math.cos(angle), math.sin(angle)]
        z = torch.tensor(
            [[1, 0, scale * first, scale * second], [0, 0, 1, 0], own], dtype=F64
        )
        eps = math.sqrt(2 / 3) * 1e-3  # beta = 1e6
        gradient = subspace_coding_rate_grad(z, planes, eps)
        return gradient[0, 2:] / (subspace_beta(3, 2, eps) * scale)

    if abs(math.sin(phi)) > 0.05:
        assert float(removed(phi).norm()) < 0.01
    assert abs(float(removed(0.0)[0])) < 1e-3
    assert abs(float(removed(0.0)[1]) / second - 1) < 0.1


@settings(max_examples=20)
@given(
    st.integers(1, 400), st.floats(0.01, 1.0), st.floats(0.02, 1.0), st.integers(2, 12)
)
def test_second_moment_of_the_law(n, noise, eps, components):
    """app-cd-law: mean mu^2 = mean mu / (1 + beta chi S_2), by a difference in beta."""
    rank = 8
    load = n / (components * rank)
    t2 = noise**2 / components
    t1 = 1 + t2

    def mean(beta: float) -> float:
        low, high = 0.0, 1.0
        for _ in range(200):
            mu = (low + high) / 2
            q1, q2 = 1 / (1 + beta * t1 * mu), 1 / (1 + beta * t2 * mu)
            wanted = 1 / (1 + beta * load * (t1 * q1 + (components - 1) * t2 * q2))
            low, high = (mu, high) if mu < wanted else (low, mu)
        return (low + high) / 2

    beta = 1 / (load * components * eps**2)
    mu, step = mean(beta), 1e-4
    slope = (mean(beta * (1 + step)) - mean(beta * (1 - step))) / (2 * step)
    q1, q2 = 1 / (1 + beta * t1 * mu), 1 / (1 + beta * t2 * mu)
    energy = t1 * q1**2 + (components - 1) * t2 * q2**2
    second = mu / (1 + beta * load * energy)
    assert math.isclose(mu + slope, second, rel_tol=1e-5, abs_tol=1e-6 * mu)
    # and eq-cd-law with it is the package's
    noise_energy = (components - 1) * t2 * q2**2
    law = mu / math.sqrt(second) * math.sqrt(noise_energy / energy)
    sigma = noise / math.sqrt(components * rank)
    found = denoising_cosine_law(n, components * rank, components, rank, sigma, eps)
    assert math.isclose(found, law, rel_tol=1e-6)


@settings(max_examples=10)
@given(SEEDS)
def test_pairs_blow_up_the_bound_and_not_the_error(seed):
    """ex-cd-duplicates."""
    generator = seeded(seed)
    mix = LowRankGaussianMixture.random(
        192, 12, 16, orthogonal=True, generator=generator, dtype=F64
    )
    labels = torch.arange(24) % 12
    s = mix.sample(24, 0.02 / 192**0.5, labels=labels, generator=generator)
    pairs = s.clean[:12].repeat(2, 1) + (s.tokens - s.clean)
    error, bound, single = (
        float(f(z, mix.bases, labels, 0.03).mean())
        for f, z in (
            (compression_error, pairs),
            (compression_bound, pairs),
            (compression_bound, s.tokens),
        )
    )
    assert bound > 5 * error
    assert bound > 5 * single
    assert error < 0.6


@settings(max_examples=10)
@given(SEEDS, st.floats(0.02, 0.3))
def test_the_best_precision_lies_between_the_ends_of_the_window(seed, noise):
    """ex-cd-best-eps, on tokens and not only by the law."""
    d, components, rank, n = 192, 12, 16, 48
    sigma = noise / math.sqrt(d)
    grid = [10 ** (x / 10) for x in range(-30, 11)]
    law = [denoising_cosine_law(n, d, components, rank, sigma, eps) for eps in grid]
    best = grid[law.index(max(law))]
    low = noise * math.sqrt(rank / d) * (1 + math.sqrt(rank / n))
    assert 0.5 * low < best < 2 * math.sqrt(noise * rank / n)
    generator = seeded(seed)
    mix = LowRankGaussianMixture.random(
        d, components, rank, orthogonal=True, generator=generator, dtype=F64
    )
    labels = torch.arange(n) % components
    s = mix.sample(n, sigma, labels=labels, generator=generator)

    def cosine(eps: float) -> float:
        return float(denoising_cosine(s.tokens, mix.bases, labels, eps).mean())

    assert cosine(best) > max(cosine(best / 10), cosine(best * 10))
