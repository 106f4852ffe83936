"""The numbers in the solutions of the chapter on reviewers' questions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_core.inspection.measures import hoyer
from crate_core.model.build import build_model
from crate_core.model.config import CrateMAEConfig
from crate_core.model.cost import operation_counter
from crate_core.model.layers import DecoderLayer

SMALL = {"image_size": 8, "patch_size": 2, "heads": 2}


def parameters(**changed) -> int:
    with torch.device("meta"):
        model = build_model(CrateMAEConfig(**(SMALL | changed)))
    return sum(p.numel() for p in model.parameters())


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 10))
def test_values_add_a_square_matrix_to_every_layer(depth, decoder_depth, quarter):
    """ex-open-values."""
    sizes = {"dim": 4 * quarter, "depth": depth, "decoder_depth": decoder_depth}
    added = parameters(**sizes, separate_values=True) - parameters(**sizes)
    assert added == (depth + decoder_depth) * (4 * quarter) ** 2


def test_values_are_a_third_more_in_the_limit():
    """ex-open-values: and sixteen layers have the parameters of twelve with values."""
    wide = {"dim": 2048}
    twelve = parameters(**wide, depth=12, decoder_depth=12)
    assert parameters(
        **wide, depth=12, decoder_depth=12, separate_values=True
    ) / twelve == pytest.approx(4 / 3, rel=0.002)
    assert parameters(**wide, depth=16, decoder_depth=16) / twelve == pytest.approx(
        4 / 3, rel=0.002
    )


@given(st.floats(0, 5))
def test_when_two_tokens_are_equally_sparse(c):
    """ex-open-hoyer."""
    w = torch.tensor([1.0, 1, 0, 0], dtype=torch.float64)
    edge = -3 + 2 * math.sqrt(3)
    v = torch.tensor([3.0, c, c, c], dtype=torch.float64)
    if abs(c - edge) > 1e-9:
        assert (float(hoyer(v)) > float(hoyer(w))) == (c < edge)
    at = torch.tensor([3.0, edge, edge, edge], dtype=torch.float64)
    assert float(hoyer(at)) == pytest.approx(float(hoyer(w)))


@pytest.mark.parametrize("width", [8, 16])
def test_products_between_tokens_take_half_at_three_halves_of_the_width(width):
    """ex-open-crossing: a decoder layer, exactly; 543 and 271 pixels at 768."""
    layer, tokens = DecoderLayer(CrateMAEConfig(**SMALL, dim=width)), 3 * width // 2
    with operation_counter() as counter:
        layer(torch.randn(1, tokens, width))
    assert counter.get_total_flops() == 12 * tokens * width**2
    assert round(16 * math.sqrt(1151)) == 543
    assert round(8 * math.sqrt(1151)) == 271
