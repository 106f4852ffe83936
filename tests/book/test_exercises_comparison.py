"""The numbers in the solutions of the chapter on comparison."""

import pytest
import torch

from crate_core.evaluation.paired import sign_flip_p
from crate_core.model.build import build_model
from crate_core.model.config import CrateMAEConfig, ViTMAEConfig
from crate_core.model.vit import ViTBlock


def parameters(config) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(config).parameters())


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_transformer_blocks_in_the_place_of_layers_weigh_almost_four_times(dim):
    """ex-comparison-depth."""
    frame = {"dim": dim, "decoder_dim": dim, "decoder_depth": 4, "decoder_heads": 4}
    vit = ViTMAEConfig.preset("cifar10-tiny", depth=4, heads=4, **frame)
    crate = CrateMAEConfig.preset("cifar10-tiny", dim=dim)
    assert 3 < parameters(vit) / parameters(crate) < 4
    with torch.device("meta"):
        block = sum(p.numel() for p in ViTBlock(dim, 4, 4.0).parameters())
    assert 3.9 < block / (3 * dim**2 + 5 * dim) < 4


def test_two_signs_agree_half_of_the_time():
    """ex-comparison-seeds."""
    assert sign_flip_p([0.004, 0.006]) == 0.5
