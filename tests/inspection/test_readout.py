"""What a linear map reads off removed patches: nothing from positions, everything where
a layer put it.
"""

import numpy as np
import pytest
import torch
from torch import nn

from crate_core.inspection.readout import linear_readout
from crate_core.model.build import fresh_model
from crate_core.model.config import CrateMAEConfig, ViTMAEConfig
from crate_core.model.patches import patchify

TINY = CrateMAEConfig.preset("digits", dim=16, depth=2, heads=2)
PICTURES = torch.rand(300, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Puts(nn.Module):
    """Adds a linear image of given patches (B, L, m) to the patch tokens, with noise of
    a given size.
    """

    def __init__(self, patches: torch.Tensor, noise: float) -> None:
        super().__init__()
        self.added = patches @ torch.linalg.qr(torch.randn(16, patches.shape[-1])).Q.T
        self.noise = noise

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        out[:, 1:] += self.added + self.noise * torch.randn_like(self.added)
        return out


def test_what_a_layer_puts_there_is_read_and_positions_know_the_mean_picture_only() -> (
    None
):
    model = fresh_model(TINY, 0).train()
    patches = patchify(model.standardize(PICTURES), 2)
    put, taken = Puts(patches, 0.0), Puts(patches, 0.0)
    taken.added = -put.added
    model.encoder = nn.ModuleList([put, taken])
    shares = linear_readout(model, PICTURES[:200], PICTURES[200:], 0.75)
    assert shares.shape == (3,)
    assert abs(shares[0]) < 0.05  # independent pixels: nothing to know
    assert shares[1] > 0.95
    assert abs(shares[2]) < 0.05  # taken away again
    assert model.training


def test_noise_lowers_the_share() -> None:
    model = fresh_model(TINY, 0)
    patches = patchify(model.standardize(PICTURES), 2)
    shares = []
    for noise in (0.0, 0.3, 3.0):
        model.encoder = nn.ModuleList([Puts(patches, noise)])
        shares.append(linear_readout(model, PICTURES[:200], PICTURES[200:], 0.5)[1])
    assert shares[0] > shares[1] + 0.02 > shares[2] + 0.3


def test_pictures_with_structure_are_partly_read_after_mixing_and_not_before() -> None:
    # All patches of a picture have one grey value: attention can bring it to removed
    # ones.
    grey = (
        torch.rand(300, 1, 1, 1, generator=torch.Generator().manual_seed(1))
        .expand(300, 1, 8, 8)
        .clone()
    )
    shares = linear_readout(fresh_model(TINY, 0), grey[:200], grey[200:], 0.5)
    assert abs(shares[0]) < 0.05
    assert shares[1] > 0.5


def test_a_token_entry_that_hardly_varies_is_not_blown_up() -> None:
    class Dead(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = x.clone()
            out[..., 0] = 1.0
            out[0, :, 0] = 1.0 + 1e-6
            return out

    model = fresh_model(TINY, 0)
    model.encoder = nn.ModuleList([Dead()])
    shares = linear_readout(model, PICTURES[:200], PICTURES[200:], 0.5)
    assert np.isfinite(shares).all()
    assert abs(shares[1]) < 0.05


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match="removes no patch of 16"):
        linear_readout(fresh_model(TINY, 0), PICTURES[:4], PICTURES[4:8], 0.0)
    vit = ViTMAEConfig.preset(
        "cifar10-tiny", dim=16, depth=1, heads=2, decoder_dim=8, decoder_heads=2
    )
    with pytest.raises(ValueError, match="sees no token of a removed patch"):
        linear_readout(
            fresh_model(vit, 0), torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32), 0.5
        )
