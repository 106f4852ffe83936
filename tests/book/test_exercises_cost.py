"""The numbers in the solutions of the chapter on cost, on random instances."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from crate_core.model.config import CrateMAEConfig
from crate_core.model.cost import operation_counter, operations, saved_numbers
from crate_core.model.sparsify import ista

BASE = CrateMAEConfig.preset("base")


def two_products(z: Tensor, dictionary: Tensor, eta: float, lambd: float) -> Tensor:
    return torch.relu(z + eta * (z - z @ dictionary.mT) @ dictionary - eta * lambd)


def work(
    step: Callable[[Tensor, Tensor, float, float], Tensor],
    tokens: int,
    dim: int,
    training: bool,
) -> int:
    """Operations that torch counts, the backward pass included in training."""
    z = torch.ones(tokens, dim, requires_grad=training)
    dictionary = torch.ones(dim, dim, requires_grad=training)
    with operation_counter() as counter:
        out = step(z, dictionary, 0.1, 0.5)
        if training:
            out.sum().backward()
    return counter.get_total_flops()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 24), st.integers(1, 48))
def test_two_products_are_beaten_from_d_tokens_on(dim, tokens):
    """ex-cost-break-even: N > d forward, N > 2 d / 3 in a step."""
    for training, edge in ((False, dim), (True, 2 * dim / 3)):
        through, two = (work(f, tokens, dim, training) for f in (ista, two_products))
        assert (through < two) == (tokens > edge)


def test_pictures_from_which_the_matrix_beats_two_products():
    """ex-cost-break-even: four pictures of 197 tokens forward, three in a step."""
    assert math.floor(BASE.dim / 197) + 1 == 4
    assert math.floor(2 * BASE.dim / 3 / 197) + 1 == 3


@given(st.integers(1, 8), st.sampled_from([4, 8, 12, 32]), st.integers(1, 40))
def test_stored_weights_outgrow_the_rest_by_the_rank_of_a_head(heads, rank, side):
    """ex-cost-square: from n > 6 p + 1 + 4 / K on, whatever the width."""
    config = CrateMAEConfig(
        image_size=4 * side,
        patch_size=4,
        dim=heads * rank,
        depth=1,
        decoder_depth=1,
        heads=heads,
    )
    n = side**2 + 1
    both = saved_numbers(config, 2) - saved_numbers(config, 1)  # the matrix M left out
    assume(6 * rank + 1 + 4 / heads != n)
    assert (n**2 * heads > both // 2) == (n > 6 * rank + 1 + 4 / heads)


def test_stored_weights_of_base():
    """ex-cost-square: 386 tokens, a picture of about 314 pixels."""
    edge = 6 * BASE.dim // BASE.heads + 1 + 4 / BASE.heads
    assert math.floor(edge) + 1 == 386
    assert round(16 * math.sqrt(math.floor(edge))) == 314


@given(st.floats(0.01, 0.99), st.floats(0.1, 100))
def test_a_faster_part_gains_no_more_than_its_share(share, seconds):
    """ex-cost-amdahl: 1 / (1 - a / 2), at most 1 / (1 - a)."""
    attention, rest = share * seconds, (1 - share) * seconds
    gain = (attention + rest) / (attention / 2 + rest)
    assert gain == pytest.approx(1 / (1 - share / 2))
    assert gain < 1 / (1 - share)


def test_amdahl_at_the_recorded_share():
    """ex-cost-amdahl: 1.12 and 1.28."""
    assert (round(1 / (1 - 0.11), 2), round(1 / (1 - 0.22), 2)) == (1.12, 1.28)


@given(
    st.integers(1, 4), st.integers(1, 4), st.sampled_from([1, 2, 4]), st.floats(0, 0.95)
)
def test_visible_tokens_gain_at_most_what_the_encoder_takes(
    depth, decoder_depth, heads, ratio
):
    """ex-cost-visible: the limit is that of a model without an encoder."""
    sizes = {"image_size": 32, "patch_size": 4, "dim": 16, "heads": heads}

    def total(depth: int, **fields: bool) -> int:
        config = CrateMAEConfig(
            **sizes, depth=depth, decoder_depth=decoder_depth, **fields
        )
        return operations(config, 64, mask_ratio=ratio).total

    rest = 2 * total(1) - total(2)
    everything = total(depth)
    gain = everything / total(depth, encode_visible_only=True)
    assert 1 <= gain < everything / rest


@given(st.integers(1, 64), st.integers(1, 200), st.sampled_from([1, 2, 4, 8]))
def test_share_of_attention_in_a_layer(width, n, heads):
    """ex-cost-linear: 2 n / (3 d + 2 n), one half at n = 3 d / 2."""
    dim = 8 * width
    config = CrateMAEConfig(
        image_size=n, patch_size=1, dim=dim, depth=1, decoder_depth=1, heads=heads
    )
    tokens = n**2 + 1
    forward = operations(config, 10**9).forward
    layers = sum(forward[part] for part in ("projections", "attention", "ISTA"))
    found = forward["attention"] / (layers + forward["densify"] + forward["M of ISTA"])
    assert found == pytest.approx(2 * tokens / (3 * dim + 2 * tokens), rel=1e-4)


def test_share_of_attention_in_base():
    """ex-cost-linear: 15 % at 197 tokens, 78 % at 4,097, half at 1,152."""
    d = BASE.dim
    shares = [2 * n / (3 * d + 2 * n) for n in (197, 4097, 1152)]
    assert [round(100 * share) for share in shares] == [15, 78, 50]
