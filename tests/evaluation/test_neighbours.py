"""Weighted nearest neighbours: the definition, its limits, what leaves it alone, and
what it refuses.
"""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ortho_group
from sklearn.neighbors import KNeighborsClassifier

from crate_core.evaluation.neighbours import (
    neighbour_accuracy,
    neighbour_judge,
    neighbour_votes,
)

sizes = st.tuples(
    st.integers(1, 30),
    st.integers(1, 12),
    st.integers(2, 6),
    st.integers(2, 4),
    st.integers(0, 10**6),
)


def clouds(
    n: int, m: int, d: int, classes: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training rows, their labels, and test rows, all random."""
    generator = np.random.default_rng(seed)
    train, test = (
        generator.normal(size=(count, d)).astype(np.float32) for count in (n, m)
    )
    return train, generator.integers(0, classes, n), test


@given(sizes=sizes, neighbours=st.integers(1, 8), temperature=st.floats(0.05, 5.0))
@settings(max_examples=40)
def test_votes_are_their_definition(
    sizes: Any, neighbours: int, temperature: float
) -> None:
    train, labels, test = clouds(*sizes)
    votes = neighbour_votes(
        train, labels, test, sizes[3], neighbours, temperature, chunk=5
    )
    for row, mine in zip(test.astype(np.float64), votes, strict=True):
        cosines = train @ row / (np.linalg.norm(train, axis=1) * np.linalg.norm(row))
        nearest = np.argsort(-cosines)[:neighbours]
        weights = np.exp((cosines[nearest] - cosines.max()) / temperature)
        expected = [weights[labels[nearest] == c].sum() for c in range(sizes[3])]
        np.testing.assert_allclose(mine, expected, rtol=1e-3, atol=1e-4)


@given(sizes=sizes)
@settings(max_examples=20)
def test_rotations_and_scales_change_nothing(sizes: Any) -> None:
    train, labels, test = clouds(*sizes)
    generator = np.random.default_rng(sizes[4])
    rotation = ortho_group.rvs(train.shape[1], random_state=generator).astype(
        np.float32
    )
    scale = [
        generator.uniform(0.1, 10, size=(len(rows), 1)).astype(np.float32)
        for rows in (train, test)
    ]
    before = neighbour_votes(train, labels, test, sizes[3], 5)
    after = neighbour_votes(
        scale[0] * train @ rotation, labels, scale[1] * test @ rotation, sizes[3], 5
    )
    np.testing.assert_allclose(after, before, atol=2e-4)


def test_shifts_and_scales_of_single_columns_change_it() -> None:
    # A probe with scaled columns does not notice either.
    train, labels, test = clouds(200, 50, 4, 3, seed=0)
    before = neighbour_votes(train, labels, test, 3)
    assert np.abs(neighbour_votes(train + 3, labels, test + 3, 3) - before).max() > 0.5
    columns = np.array([30.0, 1, 1, 1], dtype=np.float32)
    assert (
        np.abs(
            neighbour_votes(train * columns, labels, test * columns, 3) - before
        ).max()
        > 0.5
    )


def test_limits_of_the_temperature() -> None:
    train, labels, test = clouds(300, 80, 5, 4, seed=1)
    for neighbours, temperature in ((7, 1e-6), (1, 1.0)):
        votes = neighbour_votes(train, labels, test, 4, neighbours, temperature)
        nearest = (
            KNeighborsClassifier(1, metric="cosine").fit(train, labels).predict(test)
        )
        np.testing.assert_array_equal(votes.argmax(axis=1), nearest)
    counts = neighbour_votes(train, labels, test, 4, 300, 1e9)
    np.testing.assert_allclose(
        counts, np.tile(np.bincount(labels, minlength=4), (80, 1)), rtol=1e-4
    )


def test_accuracy_counts_right_winners() -> None:
    train = np.eye(3, dtype=np.float32)
    labels, test = np.array([0, 1, 2]), np.eye(3, dtype=np.float32)[[0, 1, 1, 2]]
    assert neighbour_accuracy(train, labels, test, np.array([0, 1, 2, 2]), 1) == 0.75
    assert (
        neighbour_judge().accuracy(train, labels, test, np.array([0, 1, 1, 2]), 0)
        == 1.0
    )
    generator = np.random.default_rng(0)
    y = generator.integers(0, 10, 4000)
    noise = generator.normal(size=(4000, 8)).astype(np.float32)
    # Features that know nothing: chance, one in ten, +- 0.7 points.
    assert (
        abs(neighbour_accuracy(noise[:2000], y[:2000], noise[2000:], y[2000:]) - 0.1)
        < 0.03
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neighbours": 0}, "neighbours=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"labels": np.array([0, 1])}, "2 labels for 3 rows"),
        ({"labels": np.array([0, 1, 5])}, "in 0 to 1"),
        ({"labels": np.array([0, -1, 1])}, "in 0 to 1"),
        (
            {"train": np.zeros((0, 2), np.float32), "labels": np.zeros(0, np.int64)},
            "0 labels for 0 rows",
        ),
    ],
)
def test_bad_values_are_named(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "train": np.ones((3, 2), np.float32),
        "labels": np.array([0, 1, 1]),
        "test": np.ones((1, 2), np.float32),
        "classes": 2,
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        neighbour_votes(**given)
