"""The numbers in the exercises of the chapter on a first training."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

WORLD = torch.tensor(
    [[1, -1, 1, -1], [1, 1, -1, -1], [-1, -1, -1, -1]], dtype=torch.float64
)


def best_loss(world: torch.Tensor, visible: list[int]) -> float:
    """Loss on the hidden places of the mean of the pictures that are still possible."""
    hidden = [i for i in range(world.shape[1]) if i not in visible]
    lost = []
    for picture in world:
        alike = world[(world[:, visible] == picture[visible]).all(1)]
        lost.append((picture - alike.mean(0))[hidden].square().mean())
    return float(torch.stack(lost).mean())


def ladder(world: torch.Tensor, count: int) -> tuple[float, float, float]:
    """One grey, the mean picture, the best completion with ``count`` places visible."""
    sets = list(itertools.combinations(range(world.shape[1]), count))
    best = sum(best_loss(world, list(visible)) for visible in sets) / len(sets)
    grey = float(world.var(correction=0))
    return grey, float(world.var(0, correction=0).mean()), best


def test_the_ladder_by_hand_and_with_two_visible():
    assert ladder(WORLD, 1) == pytest.approx((8 / 9, 2 / 3, 5 / 9))
    assert ladder(WORLD, 2) == pytest.approx((8 / 9, 2 / 3, 1 / 3))


@given(st.integers(2, 5), st.integers(2, 5), st.integers(0, 2**31))
def test_every_world_has_a_ladder(pictures, places, seed):
    """Each rung is no higher than the one above it, and more visible never costs."""
    generator = torch.Generator().manual_seed(seed)
    world = torch.randint(-1, 2, (pictures, places), generator=generator).double()
    previous = math.inf
    for count in range(places):
        grey, mean, best = ladder(world, count)
        assert best <= mean + 1e-12
        assert mean <= grey + 1e-12
        assert best <= previous + 1e-12
        previous = best


def test_masks_and_numbers_of_the_gaussian():
    """ex-first-gaussian: matrices by mask, and the numbers behind them."""
    assert math.comb(16, 4) == 1820
    assert 1820 * 48 * 16 == 1_397_760
    assert 64 * 65 // 2 == 2_080
