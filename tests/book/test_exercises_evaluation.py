"""The numbers in the solutions of the chapter on evaluation, on random instances."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from crate_core.evaluation.finetune import layer_groups
from crate_core.evaluation.neighbours import neighbour_votes
from crate_core.model.classifier import Classifier
from crate_core.model.config import CrateMAEConfig
from crate_core.model.crate import CrateMAE

seeds = st.integers(0, 2**31)


@given(st.floats(0.5, 0.95), st.floats(0.05, 0.4), st.floats(0.3, 3.0))
def test_two_win_from_the_gap_over_log_two_on(nearest, gap, times):
    """ex-evaluation-temperature: theta < (difference of cosines) / log 2."""
    assume(abs(times - 1) > 1e-2)
    cosines = [nearest, nearest - gap, nearest - gap]
    rows = np.array([[c, math.sqrt(1 - c * c)] for c in cosines], dtype=np.float32)
    asked = np.array([[1, 0]], dtype=np.float32)
    theta = times * gap / math.log(2)
    votes = neighbour_votes(rows, np.array([0, 1, 1]), asked, 2, 3, theta)
    assert votes.argmax() == (0 if times < 1 else 1)


def test_the_votes_of_the_exercise():
    """ex-evaluation-temperature: 0.144; 4.2 against 2 at 0.07."""
    assert 0.1 / math.log(2) == pytest.approx(0.144, abs=5e-4)
    assert math.exp(0.1 / 0.07) == pytest.approx(4.2, abs=0.05)


@given(st.floats(0.6, 0.95), st.sampled_from([359, 2000, 50_000]), seeds)
def test_the_best_of_five_is_too_high_by_that_much(right, n, seed):
    """ex-evaluation-best: 1.163 deviations of one accuracy."""
    draws = np.random.default_rng(seed).binomial(n, right, size=(20_000, 5))
    excess = draws.max(axis=1).mean() / n - right
    assert excess == pytest.approx(1.163 * math.sqrt(right * (1 - right) / n), rel=0.1)


@pytest.mark.parametrize(
    ("depth", "decay", "factor"), [(12, 0.65, 0.0037), (2, 0.75, 0.42)]
)
def test_the_embedding_learns_slower_by_a_power_of_depth_and_one(depth, decay, factor):
    """ex-evaluation-scratch."""
    config = CrateMAEConfig.preset("digits", depth=depth)
    groups = layer_groups(Classifier(CrateMAE(config), 10), 0.05, decay)
    scales = [group["lr_scale"] for group in groups]
    assert min(scales) / max(scales) == pytest.approx(decay ** (depth + 1))
    assert decay ** (depth + 1) == pytest.approx(factor, rel=0.01)


@given(st.floats(0.05, 2.0), st.floats(0, 1), st.floats(0.01, 3.0), seeds)
def test_clipping_only_raises_the_psnr(deviation, mean, error, seed):
    """ex-evaluation-psnr."""
    g = torch.Generator().manual_seed(seed)
    truth = torch.rand(50, generator=g, dtype=torch.float64)
    standard = (truth - mean) / deviation
    noise = torch.randn(50, generator=g, dtype=torch.float64)
    predicted = standard + error * noise
    loss = float((predicted - standard).square().mean())
    pixels = (predicted * deviation + mean).clamp(0, 1)
    psnr = -10 * math.log10(float((pixels - truth).square().mean()))
    assert psnr >= -10 * math.log10(deviation**2 * loss) - 1e-9
