"""The numbers of the example by hand and of the solutions in the chapter on coding
rates, on random instances.
"""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_core.theory.rate import (
    class_coding_rate,
    coding_rate,
    coding_rate_grad,
    subspace_coding_rate,
)

F64 = torch.float64
SEEDS = st.integers(0, 2**31)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=F64)


def orthogonal(generator: torch.Generator, size: int) -> torch.Tensor:
    return torch.linalg.qr(randn(generator, size, size)).Q


def test_the_example_by_hand():
    """4.44 words, 1.49 nats, 2.15 bits; against the two axes 1.14 nats; one step."""
    z = torch.tensor([[2.0, 0.0], [0.0, 0.2]], dtype=F64)
    rate = float(coding_rate(z, 0.5))
    words = math.sqrt(17 * 1.16)
    assert math.isclose(rate, math.log(words), rel_tol=1e-12)
    assert round(words, 2) == 4.44
    assert (round(rate, 2), round(rate / math.log(2), 2)) == (1.49, 2.15)
    axes = torch.eye(2, dtype=F64)[..., None]
    assert round(float(subspace_coding_rate(z, axes, 0.5)), 2) == 1.14
    step = z - 0.5 / 4 * coding_rate_grad(z, 0.5)
    assert [round(float(x), 2) for x in step.diagonal()] == [1.94, 0.11]


@settings(max_examples=20)
@given(SEEDS, st.integers(1, 5), st.floats(0.05, 2.0))
def test_the_dearest_tokens_are_spread_evenly(seed, rank, eps):
    """ex-rate-flat: at most k/2 log(1 + d/(k eps^2)), attained by equal singular
    values.
    """
    generator, n, d = seeded(seed), 9, 6
    left, right = orthogonal(generator, n)[:, :rank], orthogonal(generator, d)[:rank]
    most = rank / 2 * math.log(1 + d / (rank * eps**2))
    flat = math.sqrt(n / rank) * left @ right
    assert math.isclose(float(coding_rate(flat, eps)), most, rel_tol=1e-9)
    uneven = left @ torch.diag(randn(generator, rank)) @ right
    uneven *= math.sqrt(n) / uneven.norm()
    assert float(coding_rate(uneven, eps)) <= most * (1 + 1e-9)


@settings(max_examples=30)
@given(st.floats(0.05, 4.0), st.floats(0.05, 3.0), st.floats(0.1, 3.0))
def test_steps_in_one_dimension(share, start, eps):
    """ex-rate-hessian: |z| shrinks from every start if 0 < kappa beta_R <= 2."""
    beta = 1 / eps**2

    def moved(value: float) -> float:
        z = torch.tensor([[value]], dtype=F64)
        return float(z - share / beta * coding_rate_grad(z, eps))

    if share <= 2:
        assert abs(moved(start)) < start
    elif share > 2.01:  # a start near zero grows
        tiny = 1e-3 * eps
        assert abs(moved(tiny)) > tiny
    near = 1e-4 * eps
    assert math.isclose(moved(near) / near, 1 - share, abs_tol=1e-6)


@settings(max_examples=20)
@given(SEEDS, st.floats(0.1, 1.0))
def test_mixing_inside_classes_leaves_the_labelled_rate(seed, eps):
    """ex-rate-labels: block-diagonal mixing changes nothing, full mixing does."""
    generator = seeded(seed)
    labels = torch.tensor([0] * 5 + [1] * 7)
    z = randn(generator, 12, 4) * (1 + labels[:, None])
    blocks = torch.block_diag(orthogonal(generator, 5), orthogonal(generator, 7))
    before = class_coding_rate(z, labels, eps)
    torch.testing.assert_close(class_coding_rate(blocks @ z, labels, eps), before)
    mixed = orthogonal(generator, 12) @ z
    torch.testing.assert_close(coding_rate(mixed, eps), coding_rate(z, eps))
    assert abs(float(class_coding_rate(mixed, labels, eps) - before)) > 1e-6


@settings(max_examples=20)
@given(st.integers(20, 200), st.floats(0.5, 3.0), st.floats(0.02, 0.3))
def test_a_steep_spectrum_costs_more_than_the_least(d, power, eps):
    """ex-rate-bits: R is above the least rate by more than the directions given up."""
    values = torch.arange(1, d + 1, dtype=F64) ** -power
    values /= values.sum()
    rate = float(coding_rate(torch.diag((values * d).sqrt()), eps))
    low, high = 0.0, float(values[0])
    for _ in range(200):
        level = (low + high) / 2
        spent = float(values.clamp_max(level).sum())
        low, high = (level, high) if spent < eps**2 else (low, level)
    least = 0.5 * float((values / low).clamp_min(1).log().sum())
    assert rate > least
    given_up = values[values < low]
    assert rate - least > 0.5 * float((1 + d * given_up / eps**2).log().sum()) - 1e-9
