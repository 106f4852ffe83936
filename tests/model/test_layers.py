"""Encoder and decoder layer with known subspaces and dictionary in their weights."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crate_core.model.attention import mssa
from crate_core.model.config import CrateMAEConfig
from crate_core.model.layers import LAYER_NORM_EPS, DecoderLayer, EncoderLayer
from crate_core.theory.mixture import random_bases
from crate_core.theory.rate import coding_rate, subspace_coding_rate

HEADS, RANK = 4, 8
DIM = HEADS * RANK
F64 = torch.float64
seeds = st.integers(0, 2**31)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normed(z: Tensor) -> Tensor:
    centred = z - z.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + LAYER_NORM_EPS).sqrt()


def config(eta: float, lambd: float) -> CrateMAEConfig:
    return CrateMAEConfig(
        image_size=32, dim=DIM, depth=1, heads=HEADS, eta=eta, lambd=lambd
    )


def problem(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (n, d), orthogonal bases (K, d, p) and a dictionary (d, d), any."""
    g = seeded(seed)
    tokens = torch.randn(10, DIM, generator=g, dtype=F64)
    bases = random_bases(DIM, HEADS, RANK, generator=g, dtype=F64)
    return tokens, bases, torch.randn(DIM, DIM, generator=g, dtype=F64) / DIM**0.5


def load_attention(layer: EncoderLayer | DecoderLayer, bases: Tensor, c: float) -> None:
    """Heads that project on the subspaces, and back with weight c / (1 - c)."""
    side_by_side = bases.permute(1, 0, 2).reshape(DIM, DIM)
    with torch.no_grad():
        layer.attention.project.weight.copy_(side_by_side.mT)
        layer.attention.output.weight.copy_(c / (1 - c) * side_by_side)
        layer.attention.output.bias.zero_()


@given(seeds, st.floats(0.05, 0.9))
def test_encoder_layer_is_the_formula_with_norms(seed, c):
    tokens, bases, dictionary = problem(seed)
    layer = EncoderLayer(config(0.7, 0.3)).double().requires_grad_(False)
    load_attention(layer, bases, c)
    layer.sparsify.weight.copy_(dictionary)
    attended = mssa(normed(tokens), bases, scale=1 / math.sqrt(RANK))
    half = normed(tokens + c / (1 - c) * attended)
    residual = half - half @ dictionary.mT
    wanted = torch.relu(half + 0.7 * residual @ dictionary - 0.7 * 0.3)
    torch.testing.assert_close(layer(tokens), wanted)
    assert torch.equal(layer.attention.bases, bases)


@given(seeds, st.floats(0.05, 0.9))
def test_decoder_layer_is_the_reversed_formula_with_norms(seed, c):
    codes, bases, dictionary = problem(seed)
    layer = DecoderLayer(config(0.7, 0.3)).double().requires_grad_(False)
    load_attention(layer, bases, c)
    layer.densify.weight.copy_(dictionary)
    dense = normed(codes) @ dictionary.mT
    attended = mssa(normed(dense), bases, scale=1 / math.sqrt(RANK))
    torch.testing.assert_close(layer(codes), dense - c / (1 - c) * attended)


@given(seeds)
def test_an_orthogonal_change_of_basis_costs_no_rate(seed):
    """prp-layers-rotation; a dictionary that is not orthogonal changes both rates."""
    tokens, bases, dictionary = problem(seed)
    turn = torch.linalg.qr(dictionary).Q
    assert float(coding_rate(tokens @ turn, 0.3)) == pytest.approx(
        float(coding_rate(tokens, 0.3))
    )
    after = subspace_coding_rate(tokens @ turn, turn.mT @ bases, 0.3)
    assert float(after) == pytest.approx(
        float(subspace_coding_rate(tokens, bases, 0.3))
    )
    assert (
        abs(float(coding_rate(tokens @ dictionary, 0.3) / coding_rate(tokens, 0.3) - 1))
        > 1e-3
    )


@given(seeds, st.floats(0.05, 0.95))
def test_layernorm_absorbs_the_factor_of_the_residual(seed, c):
    """prp-layers-ln, part 1, up to LayerNorm's small constant; and part 2."""
    tokens, bases, _ = problem(seed)
    attended = mssa(tokens, bases, scale=4.0)
    derived, residual = (1 - c) * tokens + c * attended, tokens + c / (1 - c) * attended
    exact = [
        torch.nn.functional.layer_norm(z, (DIM,), eps=0.0) for z in (derived, residual)
    ]
    torch.testing.assert_close(*exact)
    above = tokens > tokens.mean(-1, keepdim=True)
    assert torch.equal(torch.relu(normed(tokens)) > 0, above)
