"""Sparsity, effective rank, subspaces, cosines: what each is at its extremes, and that
scale does not enter.
"""

import math

import hypothesis.extra.numpy as arrays
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given

from crate_core.inspection.measures import (
    entropy_rank,
    gini,
    gram_defect,
    hoyer,
    matrix_cosine,
    nonzero_share,
    orthonormal_bases,
    participation_ratio,
    subspace_cosines,
    token_cosine,
    token_spectrum,
)
from crate_core.theory.mixture import coherence, random_bases

f64 = torch.float64
SPARSITIES = {"hoyer": hoyer, "gini": gini}
RANKS = {"participation": participation_ratio, "entropy": entropy_rank}

vectors = arrays.arrays(
    np.float64,
    st.integers(2, 12),
    elements=st.floats(-1e3, 1e3).filter(lambda x: x == 0 or abs(x) > 1e-3),
).map(torch.from_numpy)
scales = st.floats(1e-6, 1e6)


# -- sparsity


@pytest.mark.parametrize("measure", SPARSITIES.values(), ids=SPARSITIES)
@given(z=vectors, scale=scales)
def test_sparsity_is_blind_to_scale_sign_and_order_and_stays_in_range(
    measure, z, scale
) -> None:
    value = float(measure(z))
    assert 0 <= value <= 1
    for changed in (scale * z, -z, z.flip(0)):
        assert float(measure(changed)) == pytest.approx(value, abs=1e-9)


@pytest.mark.parametrize("d", [2, 7, 128])
def test_sparsity_at_its_extremes(d: int) -> None:
    one, equal, none = (
        torch.zeros(d, dtype=f64),
        torch.full((d,), -3.0, dtype=f64),
        torch.zeros(d, dtype=f64),
    )
    one[d // 2] = 5.0
    assert [float(nonzero_share(z)) for z in (one, equal, none)] == [1 / d, 1.0, 0.0]
    np.testing.assert_allclose(
        [float(hoyer(z)) for z in (one, equal, none)], [1.0, 0.0, 1.0], atol=1e-12
    )
    np.testing.assert_allclose(
        [float(gini(z)) for z in (one, equal, none)], [1 - 1 / d, 0.0, 1.0], atol=1e-12
    )


def test_gini_is_the_mean_difference_of_two_entries() -> None:
    # the textbook definition: E|a - b| over twice the mean
    z = torch.rand(9, dtype=f64)
    naive = (z[:, None] - z).abs().mean() / (2 * z.mean())
    assert float(gini(z)) == pytest.approx(float(naive), rel=1e-12)


@given(z=vectors.filter(lambda z: (z != 0).sum() > 1), moved=st.floats(0.01, 0.5))
def test_moving_mass_from_the_largest_to_the_smallest_entry_makes_a_vector_denser(
    z, moved
) -> None:
    sizes = z.abs().sort().values
    denser = sizes.clone()
    step = moved * (sizes[-1] - sizes[0])
    denser[0], denser[-1] = sizes[0] + step, sizes[-1] - step
    for measure in SPARSITIES.values():
        assert float(measure(denser)) <= float(measure(sizes)) + 1e-9


def test_gaussian_entries_have_the_sparsity_that_the_docstrings_say() -> None:
    z = torch.randn(200, 20_000, dtype=f64)
    assert float(hoyer(z).mean()) == pytest.approx(1 - math.sqrt(2 / math.pi), abs=0.01)
    assert float(gini(z).mean()) == pytest.approx(math.sqrt(2) - 1, abs=0.002)


def test_tiny_entries_do_not_underflow() -> None:
    z = torch.tensor([1e-30, 0.0, 0.0])
    assert float(hoyer(z)) == pytest.approx(1.0)
    assert float(nonzero_share(z)) == pytest.approx(1 / 3)


@pytest.mark.parametrize("measure", [nonzero_share, hoyer, gini])
def test_sparsity_refuses_what_has_no_answer(measure) -> None:
    with pytest.raises(ValueError, match=r"d >= 2, got torch.float32 \(3, 1\)"):
        measure(torch.zeros(3, 1))


@pytest.mark.bad_input
def test_sparsity_refuses_integers() -> None:
    with pytest.raises(ValueError, match="floating point"):
        hoyer(torch.ones(3, 4, dtype=torch.int64))


# -- effective rank


@pytest.mark.parametrize("rank", RANKS.values(), ids=RANKS)
@given(
    values=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8),
    scale=scales,
    zeros=st.integers(0, 3),
)
def test_rank_is_between_one_and_the_count_and_blind_to_scale_and_zeros(
    rank, values, scale, zeros
) -> None:
    spectrum = torch.tensor(values, dtype=f64)
    found = float(rank(spectrum))
    assert 1 - 1e-9 <= found <= len(values) + 1e-9
    padded = torch.cat([scale * spectrum, torch.zeros(zeros, dtype=f64)])
    assert float(rank(padded)) == pytest.approx(found, rel=1e-9)


@given(values=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8))
def test_entropy_rank_is_never_below_the_participation_ratio(values) -> None:
    spectrum = torch.tensor(values, dtype=f64)
    assert float(entropy_rank(spectrum)) >= float(participation_ratio(spectrum)) - 1e-9


@pytest.mark.parametrize("rank", RANKS.values(), ids=RANKS)
def test_rank_counts_equal_directions_of_tokens_about_their_mean(rank) -> None:
    basis = torch.linalg.qr(torch.randn(20, 3, dtype=f64)).Q
    corners = torch.tensor(
        [[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]],
        dtype=f64,
    )
    tokens = corners @ basis.T + 100 * torch.ones(20, dtype=f64)
    assert float(rank(token_spectrum(tokens))) == pytest.approx(3.0, abs=1e-6)
    assert float(rank(token_spectrum(torch.ones(6, 20)))) == 0.0


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (2, 3, 7, 4)])
def test_spectrum_is_that_of_the_covariance(shape: tuple[int, ...]) -> None:
    z = torch.randn(*shape, dtype=f64)
    n, d = shape[-2:]
    covariance = (z - z.mean(-2, keepdim=True)).mT @ (z - z.mean(-2, keepdim=True)) / n
    whole = torch.linalg.eigvalsh(covariance)
    torch.testing.assert_close(
        token_spectrum(z), whole[..., -min(n, d) :].clamp_min(0), atol=1e-12, rtol=1e-9
    )


def test_a_negative_spectrum_is_refused() -> None:
    with pytest.raises(ValueError, match="must be >= 0"):
        participation_ratio(torch.tensor([1.0, -1.0]))


# -- subspaces and matrices


def test_subspace_cosines_are_of_the_subspaces_not_of_their_bases() -> None:
    bases = random_bases(24, 3, 4, orthogonal=False, dtype=f64)
    mixed = bases @ torch.randn(3, 4, 4, dtype=f64)
    torch.testing.assert_close(subspace_cosines(mixed), subspace_cosines(bases))
    assert float(subspace_cosines(bases).max()) == pytest.approx(
        coherence(bases), rel=1e-9
    )
    torch.testing.assert_close(
        orthonormal_bases(mixed).mT @ orthonormal_bases(mixed),
        torch.eye(4, dtype=f64).expand(3, 4, 4),
    )


def test_subspace_cosines_at_their_extremes() -> None:
    orthogonal = random_bases(24, 3, 4, dtype=f64)
    assert float(subspace_cosines(orthogonal).max()) < 1e-12
    shared = torch.stack(
        [orthogonal[0], torch.cat([orthogonal[0][:, :1], orthogonal[1][:, 1:]], dim=1)]
    )
    assert float(subspace_cosines(shared)) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="K >= 2"):
        subspace_cosines(orthogonal[:1])
    with pytest.raises(ValueError, match="cannot be orthonormal"):
        orthonormal_bases(torch.randn(2, 3, 4))


def test_random_subspaces_have_the_coherence_that_the_docstring_says() -> None:
    assert float(
        subspace_cosines(torch.randn(2, 800, 200, dtype=f64))
    ) == pytest.approx(math.sqrt(0.75), abs=0.02)


@given(scale=scales)
def test_gram_defect_is_zero_for_scaled_orthogonal_columns_and_optimal_in_scale(
    scale,
) -> None:
    q = torch.linalg.qr(torch.randn(9, 4, dtype=f64)).Q
    assert float(gram_defect(scale * q)) < 1e-6
    a = scale * torch.randn(9, 4, dtype=f64)
    gram, eye = a.T @ a, torch.eye(4, dtype=f64)
    best = gram.trace() / gram.square().sum()
    errors = [float((c * best * gram - eye).norm()) / 2 for c in (1.0, 0.99, 1.01)]
    assert float(gram_defect(a)) == pytest.approx(errors[0], rel=1e-6)
    assert errors[0] < min(errors[1:])


def test_gram_defect_of_gaussian_columns() -> None:
    assert float(gram_defect(torch.randn(600, 200))) == pytest.approx(
        math.sqrt(200 / 800), abs=0.01
    )


def test_cosines() -> None:
    a, b = torch.randn(2, 5, 7, dtype=f64), torch.randn(2, 5, 7, dtype=f64)
    torch.testing.assert_close(token_cosine(a, 3 * a), torch.ones(2, dtype=f64))
    torch.testing.assert_close(
        token_cosine(a, -a * torch.rand(2, 5, 1, dtype=f64)), -torch.ones(2, dtype=f64)
    )
    assert float(token_cosine(torch.zeros(1, 3), torch.ones(1, 3))) == 0.0
    # The best scalar leaves the sine as relative error.
    cosine, c = matrix_cosine(a, b), (a * b).sum((-2, -1)) / b.square().sum((-2, -1))
    error = (a - c[:, None, None] * b).flatten(1).norm(dim=1) / a.flatten(1).norm(dim=1)
    torch.testing.assert_close(error, (1 - cosine.square()).sqrt())
