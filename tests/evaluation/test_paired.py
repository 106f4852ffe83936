"""Paired runs: both exact tests against their definitions, the interval's coverage,
Holm's correction, and what is refused.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from crate_core.evaluation.paired import (
    MOST_EXACT,
    by_seed,
    holm,
    paired_difference,
    read_runs,
    sign_flip_p,
    sign_p,
)

# Integers, so that sums are exact and ties are ties.
whole = st.lists(st.integers(-50, 50).map(float), min_size=2, max_size=7)


@given(differences=whole)
@settings(max_examples=40)
def test_sign_flips_are_counted_one_by_one(differences: list[float]) -> None:
    d = np.array(differences)
    patterns = itertools.product((-1, 1), repeat=len(d))
    at_least = [abs(np.dot(signs, d)) >= abs(d.sum()) for signs in patterns]
    assert sign_flip_p(differences) == pytest.approx(np.mean(at_least))


@given(n=st.integers(2, 7), scale=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
@settings(max_examples=30)
def test_agreeing_signs_give_the_smallest_p(n: int, scale: float, seed: int) -> None:
    d = scale * np.random.default_rng(seed).uniform(0.1, 1, n)
    for flipped in (d, -d):
        assert sign_flip_p(flipped.tolist()) == pytest.approx(2 / 2**n)
        assert sign_p(flipped.tolist()) == pytest.approx(2 / 2**n)


def test_seven_pairs_are_the_fewest_that_pass_three_corrected_tests() -> None:
    for n, passes in ((6, False), (7, True)):
        p = sign_flip_p([1.0] * n)
        smallest = holm({"a": p, "b": p, "c": p})
        assert (max(smallest.values()) < 0.05) is passes


def test_the_sign_test_leaves_out_zeros() -> None:
    assert sign_p([0.0, 0.0]) == 1
    assert sign_p([0.0, 1.0, 2.0]) == sign_p([1.0, 2.0]) == 0.5


def test_tests_reject_as_often_as_they_say() -> None:
    # Under exchangeable arms P(p <= a) <= a; for seven pairs of continuous values the
    # sign flips reach every multiple of 2/128, so at 10 % it is 12/128.
    generator = np.random.default_rng(0)
    p = [sign_flip_p(d) for d in generator.normal(size=(150, 7)).tolist()]
    share = np.mean(np.array(p) <= 0.1)
    assert stats.binomtest(int(share * 150), 150, 12 / 128).pvalue > 1e-3


def test_the_interval_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    covered = 0
    for pair in generator.normal(size=(150, 2, 5)):
        # a common part of large spread, as that of seeds, has no effect
        common = 100 * generator.normal(size=5)
        a, b = (dict(enumerate(rows + common)) for rows in pair)
        found = paired_difference(a, b, level=0.8)
        covered += found.low < 0 < found.high
    assert stats.binomtest(covered, 150, 0.8).pvalue > 1e-3


def test_the_interval_is_students() -> None:
    a, b = {3: 1.0, 1: 2.0, 2: 4.0}, {1: 1.5, 2: 1.0, 3: 0.75}
    found = paired_difference(a, b)
    reference = stats.ttest_rel([2, 4, 1], [1.5, 1, 0.75]).confidence_interval()
    assert found.seeds == (1, 2, 3)
    assert found.differences == pytest.approx((0.5, 3, 0.25))
    assert (found.low, found.high) == pytest.approx(tuple(reference))
    back = paired_difference(b, a)
    assert (back.mean, back.low) == pytest.approx((-found.mean, -found.high))
    assert back.p_sign_flip == found.p_sign_flip


@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_adjusts_upwards_and_keeps_the_order(p: list[float]) -> None:
    named = {str(i): value for i, value in enumerate(p)}
    adjusted = holm(named)
    assert list(adjusted) == list(named)
    assert all(named[n] <= adjusted[n] <= 1 for n in named)
    assert adjusted[str(int(np.argmin(p)))] == min(1, len(p) * min(p))
    ranked = sorted(named, key=lambda n: named[n])
    assert all(adjusted[a] <= adjusted[b] for a, b in itertools.pairwise(ranked))


def test_holm_by_hand() -> None:
    adjusted = holm({"a": 0.04, "b": 0.01, "c": 0.03})
    assert adjusted == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06})


def run(seed: int, loss: float, **more: Any) -> dict[str, Any]:
    """A record of two evaluations."""
    scores = [{"epoch": e, "test": {"loss": v}} for e, v in ((0.0, 1.0), (20.0, loss))]
    return {"name": f"s{seed}", "seed": seed, "arm": "a", "scores": scores, **more}


def test_a_measure_by_seed() -> None:
    runs = [run(1, 0.5), run(2, 0.25), run(2, 0.75, arm="b")]
    assert by_seed(runs, "loss", arm="a") == {1: 0.5, 2: 0.25}
    assert by_seed(runs, "loss", arm="a", gain=True) == {1: -0.5, 2: -0.75}
    assert by_seed(runs, "loss", arm="b", epoch=0.0) == {2: 1.0}
    assert by_seed(runs, "loss", arm="c") == {}


@pytest.mark.bad_input
def test_what_is_refused(tmp_path: Path) -> None:
    runs = [run(1, 0.5), run(1, 0.25, arm="b")]
    with pytest.raises(ValueError, match="two runs of seed 1"):
        by_seed(runs, "loss")
    with pytest.raises(ValueError, match=r"no loss .* at epoch 3; .*20"):
        by_seed(runs, "loss", arm="a", epoch=3)
    with pytest.raises(ValueError, match="no probe of test"):
        by_seed(runs, "probe", arm="a")
    with pytest.raises(ValueError, match=r"seeds \[2, 3\] have no partner"):
        paired_difference({1: 0.0, 2: 0.0}, {1: 0.0, 3: 0.0})
    with pytest.raises(ValueError, match="level=95"):
        paired_difference({1: 0.0, 2: 0.0}, {1: 0.0, 2: 0.0}, level=95)
    for n in (1, MOST_EXACT + 1):
        with pytest.raises(ValueError, match=f"{n} differences"):
            sign_flip_p([1.0] * n)
    with pytest.raises(FileNotFoundError, match="no folder"):
        read_runs(tmp_path / "absent")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is not JSON"):
        read_runs(tmp_path)


def test_records_are_read_by_name(tmp_path: Path) -> None:
    for seed in (2, 1):
        (tmp_path / f"s{seed}.json").write_text(json.dumps(run(seed, 0.5)))
    assert [r["seed"] for r in read_runs(tmp_path)] == [1, 2]
