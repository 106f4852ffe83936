"""The numbers in the solutions of the chapter on tokens and heads, and its proposition,
on random instances."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crate_core.inspection.foreground import area_under_curve, select_map

F64 = torch.float64
seeds = st.integers(0, 2**31)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 5), st.integers(2, 5), seeds)
def test_a_fixed_map_scores_one_half_on_single_patches(rows, columns, seed):
    """ex-heads-one-patch: also with ties; upside down it is one minus the area."""
    places = torch.eye(rows * columns, dtype=torch.bool).reshape(-1, rows, columns)
    fixed = torch.randint(4, (1, 1, rows, columns), generator=seeded(seed)).double()
    maps = fixed.expand(len(places), -1, -1, -1)
    area = area_under_curve(maps, places)
    assert float(area.mean()) == pytest.approx(0.5, abs=1e-12)
    torch.testing.assert_close(area_under_curve(-maps, places), 1 - area)


def test_the_map_by_hand_upside_down():
    """ex-heads-one-patch: 0.725 and 0.275."""
    blob = torch.tensor([[1.0, 2, 1], [2, 5, 2], [1, 2, 1]]).expand(1, 1, 3, 3)
    corner = torch.zeros(1, 3, 3, dtype=torch.bool)
    corner[0, :2, :2] = True
    assert float(area_under_curve(blob, corner)) == pytest.approx(0.725)
    assert float(area_under_curve(-blob, corner)) == pytest.approx(0.275)


@given(st.integers(1, 6), st.integers(1, 6), seeds)
def test_bend_of_a_relu_layer(dim, width, seed):
    """ex-tokens-relu: one for opposite pictures, zero for equal signs."""
    g = seeded(seed)
    weight = torch.randn(width, dim, generator=g, dtype=F64)

    def bend(a, b):
        phi = [torch.relu(weight @ x) for x in (a, b, (a + b) / 2)]
        half = (phi[0] - phi[1]).norm() / 2
        return float((phi[2] - (phi[0] + phi[1]) / 2).norm() / half)

    a = torch.randn(dim, generator=g, dtype=F64)
    assert bend(a, -a) == pytest.approx(1)
    if bool((weight @ a > 0).any()):  # else both tokens are zero
        assert bend(a, 2.5 * a) == pytest.approx(0, abs=1e-9)


def test_what_sixteen_chances_are_worth():
    """ex-heads-chances: 1.77 deviations, below 0.01 from 314 pictures on."""
    draws = torch.randn(200_000, 16, generator=seeded(0), dtype=F64).amax(1)
    assert float(draws.mean()) == pytest.approx(1.766, abs=0.005)
    assert 0.177 / math.sqrt(314) < 0.01 < 0.177 / math.sqrt(312)
    scores = 0.5 + 0.1 * torch.randn(400, 314, 16, generator=seeded(1), dtype=F64)
    best = [select_map(of) for of in scores]
    same = sum(one.same_pictures for one in best) / len(best) - 0.5
    each = sum(one.each_picture for one in best) / len(best) - 0.5
    assert same == pytest.approx(0.01, abs=0.001)
    assert each == pytest.approx(0.177, abs=0.002)


@given(st.integers(1, 6), st.integers(1, 4), seeds)
def test_random_heads_keep_inner_products(dim, rank, seed):
    """prop-heads-outline: mean and variance over many projections, within five
    standard errors."""
    g, draws = seeded(seed), 20_000
    x, y = torch.randn(2, dim, generator=g, dtype=F64)
    heads = torch.randn(draws, dim, rank, generator=g, dtype=F64) / math.sqrt(rank)
    inner = ((x @ heads) * (y @ heads)).sum(-1)
    product = float(x @ y)
    variance = float((x @ x) * (y @ y) + product**2) / rank
    assert abs(float(inner.mean()) - product) < 5 * math.sqrt(variance / draws)
    # the fourth moment of a product of two normal numbers is below 105 times its
    # scale^4
    spread = math.sqrt(105 * float((x @ x) * (y @ y)) ** 2 / draws)
    assert abs(float(inner.var()) - variance) < 5 * spread
