"""The numbers in the solutions of the chapter on layers, on random instances."""

import copy

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from crate_core.model.attention import mssa_step
from crate_core.model.config import CrateMAEConfig
from crate_core.model.layers import EncoderLayer
from crate_core.model.sparsify import ista
from crate_core.theory.mixture import random_bases
from crate_core.theory.rate import (
    subspace_beta,
    subspace_coding_rate,
    subspace_coding_rate_grad,
)

F64 = torch.float64
seeds = st.integers(0, 2**31)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_second_layer_by_hand():
    """ex-layers-second, from the numbers that the exercise gives."""
    codes = torch.tensor([[3.8216, 0.15], [2.8412, 0.0]], dtype=F64)
    axes = torch.eye(2, dtype=F64).reshape(2, 2, 1)
    half = mssa_step(codes, axes, 0.5, 0.5, exact=True)
    torch.testing.assert_close(
        half, torch.tensor([[3.74, 0.006], [2.78, 0]], dtype=F64), atol=0.005, rtol=0
    )
    after = ista(half, torch.eye(2, dtype=F64), 1.0, 0.1)
    torch.testing.assert_close(
        after, torch.tensor([[3.639, 0], [2.680, 0]], dtype=F64), atol=6e-4, rtol=0
    )
    rates = [float(subspace_coding_rate(z, axes, 0.5)) for z in (codes, after)]
    assert rates == pytest.approx([1.94, 1.87], abs=0.005)
    clean = torch.tensor([[4.0, 0], [3, 0]], dtype=F64)
    errors = [float((z - clean).square().sum()) / 0.5 for z in (codes, after)]
    assert errors == pytest.approx([0.16, 0.47], abs=0.005)


@given(seeds, st.integers(1, 4), st.integers(1, 12), st.floats(0.05, 2))
def test_halving_lowers_the_rate(seed, components, n, eps):
    """ex-layers-control, first half: any bases."""
    g = seeded(seed)
    bases = torch.randn(components, 6, 2, generator=g, dtype=F64)
    tokens = torch.randn(n, 6, generator=g, dtype=F64)
    half, whole = (subspace_coding_rate(z, bases, eps) for z in (tokens / 2, tokens))
    assert half < whole


@given(st.floats(0.1, 50), st.floats(0.05, 2))
def test_a_relu_can_raise_the_rate_from_zero(size, eps):
    """ex-layers-control, second half."""
    basis = torch.tensor([[[1.0], [1.0]]], dtype=F64) / 2**0.5
    token = torch.tensor([[size, -size]], dtype=F64)
    assert float(subspace_coding_rate(token, basis, eps)) < 1e-12
    assert float(subspace_coding_rate(torch.relu(token / 2), basis, eps)) > 1e-4


def relu_norm(z: torch.Tensor) -> torch.Tensor:
    return torch.relu(torch.nn.functional.layer_norm(z, z.shape[-1:], eps=0.0))


@given(st.lists(st.integers(0, 5), min_size=2, max_size=12))
def test_relu_of_layernorm_adds_no_nonzeros_to_nonnegative_tokens(entries):
    """prp-layers-ln, part 2: a zero stays zero, for ever; signed tokens may gain."""
    assume(len(set(entries)) > 1)
    token = torch.tensor(entries, dtype=F64)
    while len(token.unique()) > 2:
        after = relu_norm(token)
        assert bool((after[token == 0] == 0).all())
        assert int((after > 0).sum()) <= int((token > 0).sum())
        if torch.equal(after > 0, token > 0):
            break
        token = after
    signed = relu_norm(torch.tensor([-5.0, 0, 0, 0], dtype=F64))
    assert (signed > 0).tolist() == [False, True, True, True]


@given(seeds, st.integers(1, 6))
def test_equal_heads_share_one_step(seed, components):
    """Said below thm-layers-descent: norm K; beyond 2 / K a small
    token's rate rises.
    """
    g = seeded(seed)
    basis = random_bases(8, 1, 2, generator=g, dtype=F64)
    bases = basis.repeat(components, 1, 1)
    overlap = (bases @ bases.mT).sum(0)
    assert float(torch.linalg.matrix_norm(overlap, 2)) == pytest.approx(components)
    token = 1e-4 * basis[0, :, 0][None]
    beta = subspace_beta(1, 2, 0.5)
    for share, rises in ((1.9, False), (2.1, True)):
        grad = subspace_coding_rate_grad(token, bases, 0.5)
        after = token - share / (components * beta) * grad
        before, now = (subspace_coding_rate(z, bases, 0.5) for z in (token, after))
        assert bool(now > before) is rises


@given(seeds, st.floats(0.5, 8))
def test_length_sets_the_size_of_the_step(seed, factor):
    """ex-layers-length: tokens times a factor, or the output map divided by it."""
    torch.manual_seed(seed)
    layer = EncoderLayer(CrateMAEConfig(image_size=32, dim=64, heads=4)).double()
    weaker = copy.deepcopy(layer)
    tokens = torch.randn(1, 10, 64, generator=seeded(seed), dtype=F64)
    with torch.no_grad():
        weaker.attention.output.weight /= factor
        weaker.attention.output.bias /= factor
        torch.testing.assert_close(
            layer(factor * tokens), weaker(tokens), atol=1e-3, rtol=0
        )
