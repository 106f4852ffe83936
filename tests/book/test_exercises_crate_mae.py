"""The numbers in the chapter on the masked autoencoder, on random instances."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_core.model.crate import CrateMAE
from crate_core.model.patches import patchify, sincos_positions, unpatchify

F64 = torch.float64
seeds = st.integers(0, 2**31)
WORLD = torch.tensor([[1, -1, 1, -1], [1, 1, -1, -1], [-1, -1, -1, -1]], dtype=F64)


@given(st.floats(0.5, 50.0))
def test_odds_of_the_picture_by_hand_are_sixteen_over_the_variance(sigma):
    """sec-mae-by-hand: e^{16 / sigma^2}, with four pixels in a patch."""
    squares = 4 * (WORLD[0] - WORLD[1]).square().sum()
    odds = float(squares / (2 * sigma**2))
    assert odds == pytest.approx(16 / sigma**2)


def test_seen_from_the_lower_right_the_mean_costs_eight_ninths():
    """ex-mae-blur: the means, the loss, and a median that is no picture
    of the world.
    """
    possible = WORLD[WORLD[:, 3] == -1]
    assert len(possible) == 3
    mean = possible[:, :3].mean(0)
    torch.testing.assert_close(mean, torch.tensor([1, -1, -1], dtype=F64) / 3)
    assert float((possible[:, :3] - mean).square().mean()) == pytest.approx(8 / 9)
    median = possible[:, :3].median(0).values
    assert median.tolist() == [1, -1, -1]
    assert not (possible[:, :3] == median).all(1).any()


@given(st.integers(1, 40), st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=20, deadline=None)
def test_the_count_is_the_models(quarters, layers, patch_pixels):
    """eq-mae-count, for any width, depth and patch."""
    d = 4 * quarters
    with torch.device("meta"):
        model = CrateMAE.from_preset(
            "base",
            dim=d,
            heads=1,
            depth=layers,
            patch_size=1,
            image_size=2,
            channels=patch_pixels,
        )
    built = sum(parameter.numel() for parameter in model.parameters())
    assert built == (
        2 * layers * (3 * d**2 + 5 * d) + 2 * patch_pixels * d + 7 * d + patch_pixels
    )


def test_large_by_hand():
    """ex-mae-large."""
    layers = 48 * (3 * 1024**2 + 5 * 1024)
    ends = 2 * 768 * 1024 + 7 * 1024 + 768
    assert (layers, ends, layers + ends) == (151_240_704, 1_580_800, 152_821_504)
    norms = 48 * 4 * 1024 + 4 * 1024
    assert norms == 200_704
    assert round(100 * norms / (layers + ends), 2) == 0.13
    for width, more in ((188, False), (196, True)):
        inside = 2 * 12 * 3 * width**2
        assert (inside > 0.9 * (inside + 2 * 768 * width)) == more


@given(seeds, st.integers(1, 3))
@settings(max_examples=10, deadline=None)
def test_without_positions_hidden_patches_are_alike(seed, depth):
    """ex-mae-permutation."""
    torch.manual_seed(seed)
    model = CrateMAE.from_preset("digits", depth=depth).double().requires_grad_(False)
    model.positions.zero_()
    picture, noise = torch.randn(1, 1, 8, 8, dtype=F64), torch.rand(1, 16, dtype=F64)
    out = model(picture, 0.75, noise)
    predicted = out.logits[out.mask > 0]
    assert float((predicted - predicted[0]).abs().max()) < 1e-10
    shuffle = torch.randperm(16)
    moved = unpatchify(patchify(picture, 2)[:, shuffle], 2, (4, 4))
    features = model.forward_features(picture)[:, 1:]
    torch.testing.assert_close(
        model.forward_features(moved)[:, 1:], features[:, shuffle]
    )


@given(st.integers(1, 6), st.integers(2, 5), st.integers(2, 5))
def test_products_of_positions_depend_on_the_displacement(quarters, rows, columns):
    """The sentence below the table of the walk: a sum of cosines, largest at zero."""
    d = 4 * quarters
    table = sincos_positions(d, (rows, columns))[1:].double()
    f = [10000 ** (-4 * j / d) for j in range(d // 4)]
    for i in range(rows * columns):
        down, right = divmod(i, columns)
        wanted = sum(math.cos(right * w) + math.cos(down * w) for w in f)
        assert float(table[0] @ table[i]) == pytest.approx(wanted, abs=1e-5)
    assert int((table @ table[0]).argmax()) == 0
