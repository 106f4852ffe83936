"""What pretraining costs: formulas against torch's own counters, and crops against
torchvision's distribution.
"""

import math
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from crate_core.data.transforms import CROP_RATIO, CROP_SCALE, crop_box, mixed, uniforms
from crate_core.model.classifier import Classifier
from crate_core.model.config import CrateMAEConfig
from crate_core.model.cost import (
    activation_bytes,
    classifier_operations,
    hours,
    operation_counter,
    operations,
    parameter_count,
    state_bytes,
)
from crate_core.model.crate import CrateMAE


@given(
    heads=st.integers(1, 4),
    width=st.integers(1, 3),
    depth=st.integers(1, 3),
    decoder=st.integers(1, 2),
    side=st.sampled_from([8, 16]),
    batch=st.integers(1, 3),
)
def test_operations_and_parameters_are_torchs(
    heads: int, width: int, depth: int, decoder: int, side: int, batch: int
) -> None:
    config = CrateMAEConfig(
        image_size=side,
        patch_size=4,
        dim=4 * heads * width,
        depth=depth,
        heads=heads,
        decoder_depth=decoder,
    )
    with torch.device("meta"):
        model = CrateMAE(config)
        with operation_counter() as forward:
            loss = model(
                torch.empty(batch, 3, side, side),
                0.5,
                torch.empty(batch, math.prod(config.grid)),
            ).loss
        with operation_counter() as backward:
            loss.backward()
    predicted = operations(config, batch)
    assert forward.get_total_flops() == sum(predicted.forward.values())
    # On shapes alone attention stores its weights: what fused attention computes again
    # is not counted.
    assert forward.get_total_flops() + backward.get_total_flops() == predicted.needed
    assert sum(p.numel() for p in model.parameters()) == parameter_count(config)


@given(
    heads=st.integers(1, 3),
    depth=st.integers(1, 3),
    side=st.sampled_from([8, 16]),
    batch=st.integers(1, 3),
    classes=st.integers(2, 12),
)
def test_operations_of_fine_tuning_are_torchs(
    heads: int, depth: int, side: int, batch: int, classes: int
) -> None:
    config = CrateMAEConfig(
        image_size=side, patch_size=4, dim=8 * heads, depth=depth, heads=heads
    )
    with torch.device("meta"):
        model = Classifier(CrateMAE(config), classes).to("meta")  # its head, too
        with operation_counter() as forward:
            scores = model(torch.empty(batch, 3, side, side))
        with operation_counter() as backward:
            scores.sum().backward()
    predicted = classifier_operations(config, batch, classes)
    assert forward.get_total_flops() == sum(predicted.forward.values())
    # on shapes alone attention stores its weights
    both = forward.get_total_flops() + backward.get_total_flops()
    assert both == predicted.needed


def test_published_sizes() -> None:
    counts = {
        "tiny": 11_256_192,
        "small": 24_846_528,
        "base": 43_745_280,
        "large": 152_821_504,
    }
    for name, count in counts.items():
        config = CrateMAEConfig.preset(name)
        assert parameter_count(config) == count
        assert state_bytes(config) == 16 * count
        one, eight = (hours(config, 1000, 10, 1e12, 0.5, gpus) for gpus in (1, 8))
        assert one == pytest.approx(8 * eight)
        assert one == pytest.approx(
            operations(config, 4096).needed / 4096 * 10_000 / 0.5e12 / 3600
        )
        layers = config.depth + config.decoder_layers
        token = (6 * layers + 3) * config.dim + 2 * 768 + (4 + config.heads) * layers
        assert activation_bytes(config) == 4 * 197 * token


@pytest.mark.parametrize(
    "change", [{"separate_values": True}, {"expansion": 2}, {"norm": "rms"}]
)
def test_parameters_of_other_layers_are_refused(change: dict) -> None:
    with pytest.raises(ValueError, match="published layers"):
        parameter_count(CrateMAEConfig.preset("digits", **change))


# -- crops


@given(
    width=st.integers(1, 60), height=st.integers(1, 60), key=st.integers(0, 2**63 - 1)
)
def test_a_crop_lies_in_the_picture(width: int, height: int, key: int) -> None:
    left, top, right, bottom = crop_box(width, height, uniforms(key))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height


@pytest.mark.parametrize("size", [(60, 40), (200, 30)])
def test_crops_are_distributed_as_torchvisions(size: tuple[int, int]) -> None:
    width, height = size
    ours = np.array([crop_box(width, height, uniforms(key)) for key in range(3000)])
    picture = torch.zeros(1, height, width)
    drawn = [
        RandomResizedCrop.get_params(
            picture, list(CROP_SCALE), [1 / CROP_RATIO, CROP_RATIO]
        )
        for _ in range(3000)
    ]
    theirs = np.array([(left, top, left + w, top + h) for top, left, h, w in drawn])
    for a, b in ((ours, theirs),):
        for of in (
            lambda x: (x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]),
            lambda x: (x[:, 2] - x[:, 0]) / (x[:, 3] - x[:, 1]),
            lambda x: x[:, 0],
            lambda x: x[:, 3],
        ):
            assert ks_2samp(of(a), of(b)).pvalue > 1e-3


def test_uniform_numbers_are_uniform_and_keys_apart() -> None:
    # Steele, Lea and Flood's generator from state 0 starts with these 64 bits.
    assert mixed(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    draws = np.array([list(islice(uniforms(key), 4)) for key in range(5000)])
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws[:, 0], bins=20, range=(0, 1))[0]
    # chi-square, 19 degrees of freedom, p = 0.001
    assert ((counts - 250) ** 2 / 250).sum() < 43.8
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 4 / math.sqrt(5000)
