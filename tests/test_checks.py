"""Wrong types get the message that wrong values get: what was given, and what is
accepted.
"""

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crate_core import (
    ISTA,
    MSSA,
    CrateMAE,
    CrateMAEConfig,
    LowRankGaussianMixture,
    coding_rate,
    ista,
    load_model,
    mssa,
    patchify,
    random_masking,
    subspace_coding_rate,
)
from crate_core.checks import as_number, is_count
from crate_core.model.build import build_model
from crate_core.model.config import ViTMAEConfig, config_from_dict

pytestmark = pytest.mark.bad_input
MODEL = CrateMAE.from_preset("digits")
Z = torch.rand(5, 8)
MIX = LowRankGaussianMixture.random(dim=8, components=2, rank=2)
IMAGES = torch.rand(2, 1, 8, 8)

CASES: dict[str, tuple[Callable[[], object], str]] = {
    "dim": (lambda: CrateMAEConfig(dim="64"), "dim must be .* got '64'"),
    "eta": (lambda: CrateMAEConfig(eta="0.1"), "eta.* got '0.1'"),
    "eta inf": (lambda: CrateMAEConfig(eta=math.inf), "eta.* got inf"),
    "lambd": (lambda: CrateMAEConfig(lambd=None), "lambd.* got None"),
    "mean": (lambda: CrateMAEConfig(pixel_mean=0.5), "pixel_mean needs .* got 0.5"),
    "std": (lambda: CrateMAEConfig(pixel_std=(math.nan, 1, 1)), "pixel_std .*nan"),
    "flag": (lambda: CrateMAEConfig(normalize_targets="no"), "'no'.*True or False"),
    "size": (lambda: CrateMAEConfig(image_size=224.0), "image_size .*224.0"),
    "ratio": (lambda: ViTMAEConfig(mlp_ratio="4"), "mlp_ratio .* got '4'"),
    "config": (lambda: CrateMAE({"dim": 64}), "is a CrateMAEConfig, got dict"),
    "other": (lambda: CrateMAE(ViTMAEConfig()), "CrateMAEConfig, got ViTMAEConfig"),
    "build": (lambda: build_model({"dim": 64}), "Config, got dict"),
    "fields": (lambda: config_from_dict(None), "mapping .* got NoneType"),
    "preset": (lambda: CrateMAE.from_preset(["base"]), "unknown preset .* accepted"),
    "load": (lambda: load_model(5), "Hub id, got int"),
    "pretrained": (lambda: CrateMAE.from_pretrained(5), "Hub id, got int"),
    "bytes as floats": (lambda: MODEL.standardize(IMAGES * 255), r"in \[0, 1\].*255"),
    "array": (lambda: MODEL.standardize(np.zeros((2, 1, 8, 8))), "got ndarray"),
    "forward": (lambda: MODEL(np.zeros((2, 1, 8, 8))), "images .*got ndarray"),
    "noise": (lambda: MODEL(IMAGES, 0.5, [0.1] * 16), "noise must be .*got list"),
    "mask": (lambda: MODEL(IMAGES, "0.5"), "mask_ratio .* got '0.5'"),
    "masking": (lambda: random_masking([[0.1]], 0.5), "noise .*got list"),
    "rate": (lambda: coding_rate(np.zeros((3, 4)), 0.5), "tokens .*got ndarray"),
    "eps": (lambda: coding_rate(Z, "a"), "eps.*got 'a'"),
    "bases": (lambda: subspace_coding_rate(Z, [1], 0.5), "bases .*got list"),
    "mixture": (lambda: LowRankGaussianMixture(np.zeros((2, 8, 2))), "got ndarray"),
    "sizes": (
        lambda: LowRankGaussianMixture.random(dim="8", components=2, rank=2),
        "got dim='8'",
    ),
    "sample": (lambda: MIX.sample("5", 0.1), "got '5'"),
    "members": (lambda: MIX.sample(2, 0.1, labels=[0, 1]), "labels .*got list"),
    "sigma": (lambda: MIX.sample(5, "0.1"), "sigma .* got '0.1'"),
    "score": (lambda: MIX.score([[0.0] * 8], 0.1), "tokens .*got list"),
    "mssa": (lambda: mssa(np.zeros((3, 8)), MIX.bases), "tokens .*got ndarray"),
    "ista": (lambda: ista(Z, np.eye(8)), "dictionary .*got ndarray"),
    "patch": (lambda: patchify(torch.rand(1, 3, 8, 8), "4"), "'4'"),
    "no batch": (lambda: patchify(torch.rand(3, 8, 8), 4), r"\(B, C, H, W\), got"),
    "heads": (lambda: MSSA("8", 2), "dim='8'"),
    "step": (lambda: ISTA(8, eta="1"), "eta.*got '1'"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrong_type_is_named_with_what_is_accepted(name: str) -> None:
    call, message = CASES[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_pixels_that_overshoot_a_little_are_accepted() -> None:
    assert MODEL.standardize(IMAGES * 1.2).shape == IMAGES.shape


@given(st.one_of(st.integers(), st.floats(allow_nan=False), st.fractions()))
def test_numbers_of_every_kind_are_read(value: int | float | Fraction) -> None:
    try:
        expected = float(value)
    except OverflowError:
        return
    assert as_number(value) == expected
    assert as_number(torch.tensor(expected, dtype=torch.float64)) == expected


@given(st.one_of(st.text(), st.none(), st.booleans(), st.lists(st.floats())))
def test_what_is_no_number_compares_with_none(value: object) -> None:
    assert math.isnan(as_number(value))
    assert not is_count(value)
