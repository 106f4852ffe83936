"""The numbers in the chapter on layers, by hand and in its exercises."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crate_core.inspection.layer_measures import direction_rate, unit_tokens
from crate_core.theory.rate import subspace_coding_rate

F64 = torch.float64
seeds = st.integers(0, 2**31)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rate_of_pair(degrees: float, first: float = 1.0, second: float = 1.0) -> float:
    """R^c of two tokens in a plane that one head sees whole, eps = 0.5."""
    angle = math.radians(degrees)
    pair = torch.tensor([[first, 0], [math.cos(angle), math.sin(angle)]], dtype=F64)
    pair[1] *= second
    return float(subspace_coding_rate(pair, torch.eye(2, dtype=F64)[None], 0.5))


@given(st.floats(0, 180))
def test_the_pair_by_hand(degrees):
    """sec-lbl-by-hand: eigenvalues 1 +- cos phi, beta = 4."""
    cosine = math.cos(math.radians(degrees))
    wanted = 0.5 * math.log((1 + 4 * (1 + cosine)) * (1 + 4 * (1 - cosine)))
    assert rate_of_pair(degrees) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize(
    ("degrees", "length", "inside"), [(90, 1, 25), (60, 1, 21), (0, 1, 9), (90, 2, 289)]
)
def test_the_rows_of_its_table(degrees, length, inside):
    found = rate_of_pair(degrees, length, length)
    assert found == pytest.approx(0.5 * math.log(inside), abs=1e-9)


@given(st.floats(0, 180), st.floats(0, math.sqrt(2)))
def test_equal_lengths_at_a_right_angle_are_dearest(degrees, first):
    """ex-lbl-pair: squares of the lengths add up to two."""
    second = math.sqrt(max(0.0, 2 - first**2))
    assert rate_of_pair(degrees, first, second) <= math.log(5) + 1e-9


@given(seeds, st.integers(2, 6))
def test_each_doubling_adds_log_two_per_singular_value(seed, count):
    """ex-lbl-units, for large tokens; and nothing in units of their length."""
    g = seeded(seed)
    bases = torch.linalg.qr(torch.randn(2, 8, 4, generator=g, dtype=F64)).Q
    tokens = torch.randn(count, 8, generator=g, dtype=F64)
    per_head = [tokens @ basis for basis in bases]
    smallest = min(float(torch.linalg.svdvals(v).min()) for v in per_head)
    large = tokens * 1e4 / max(smallest, 1e-3)
    gain = subspace_coding_rate(2 * large, bases, 0.5)
    gain = float(gain - subspace_coding_rate(large, bases, 0.5))
    assert gain == pytest.approx(2 * min(count, 4) * math.log(2), rel=1e-2)
    torch.testing.assert_close(unit_tokens(2 * tokens), unit_tokens(tokens))


@given(seeds, st.floats(0.01, 0.1))
def test_the_published_measure_does_not_see_energy_between_heads(seed, rest):
    """ex-lbl-direction, for any small rest in the other heads."""
    g = seeded(seed)
    bases = torch.eye(64, dtype=F64).reshape(64, 4, 16).movedim(1, 0)
    parts = torch.randn(4, 65, 64, generator=g, dtype=F64) @ bases @ bases.mT
    share = torch.tensor([1.0, rest, rest, rest], dtype=F64)[:, None, None]
    spread, one_head = unit_tokens(parts.sum(0)), unit_tokens((share * parts).sum(0))
    torch.testing.assert_close(
        direction_rate(spread, bases), direction_rate(one_head, bases)
    )
    lower = subspace_coding_rate(one_head, bases, 0.5)
    assert lower < 0.7 * subspace_coding_rate(spread, bases, 0.5)
