"""The numbers in the solutions of the chapter on pretraining, on random instances."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crate_core.model.config import CrateMAEConfig
from crate_core.model.cost import operations, parameter_count

seeds = st.integers(0, 2**31)


@pytest.mark.parametrize("batch", [64, 4096])
def test_twice_the_pixels(batch: int) -> None:
    """ex-pretraining-pixels: 5.7 times, attention from a seventh to two fifths."""
    base, wide = (
        operations(CrateMAEConfig.preset("base", image_size=side), batch)
        for side in (224, 448)
    )
    assert wide.needed / base.needed == pytest.approx(5.7, abs=0.05)
    for counts, share in ((base, 1 / 7), (wide, 2 / 5)):
        forward = counts.forward
        found = forward["attention"] / sum(forward.values())
        assert found == pytest.approx(share, abs=0.005)


@given(seeds, st.integers(2, 6))
def test_sums_and_counts_give_the_gradient_of_the_mean(seed: int, parts: int) -> None:
    """ex-pretraining-micro: both mends agree with the whole batch; means do not."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(1, 9, (parts,), generator=g)
    counts[0], counts[1] = 1, 8
    # gradients of the patches' losses by one weight
    patches = [torch.randn(int(m), generator=g, dtype=torch.float64) for m in counts]
    whole = torch.cat(patches).mean()
    shares = counts / counts.sum()
    weighted = sum(
        share * part.mean() for share, part in zip(shares, patches, strict=True)
    )
    summed = sum(part.sum() for part in patches) / counts.sum()
    assert float(weighted) == pytest.approx(float(whole), abs=1e-6)
    assert float(summed) == pytest.approx(float(whole), abs=1e-12)
    ones = [torch.ones(1).double(), torch.zeros(8).double()]
    assert float(sum(part.mean() for part in ones) / 2) == 0.5  # the mean is a ninth


def test_how_often_to_save() -> None:
    """ex-pretraining-checkpoint: 525 MB, every 416 steps, 0.5 % against 0.7 %."""
    size = 12 * parameter_count(CrateMAEConfig.preset("base"))
    assert size == 12 * 43_745_280
    assert size / 1e6 == pytest.approx(525, abs=0.5)

    def cost(every: float) -> float:
        return 1 / every + every / (2 * 86_400)

    best = min(range(1, 5000), key=cost)
    assert best == round(math.sqrt(2 * 86_400)) == 416
    assert cost(best) == pytest.approx(0.005, abs=5e-4)
    assert cost(1000) == pytest.approx(0.007, abs=5e-4)
