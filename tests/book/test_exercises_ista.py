"""The numbers in the solutions of the chapter on ISTA, on random instances."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_core.model.sparsify import ista_matrix, lasso_objective, proximal_step

F64 = torch.float64
seeds = st.integers(0, 2**31)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def problem(dim: int, atoms: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random dictionary with unit atoms, and a token."""
    g = seeded(seed)
    dictionary = torch.randn(dim, atoms, generator=g, dtype=F64)
    token = torch.randn(1, dim, generator=g, dtype=F64)
    return torch.nn.functional.normalize(dictionary, dim=0), token


@given(st.integers(1, 8), st.integers(1, 12), seeds)
def test_zero_is_the_minimiser_exactly_up_to_the_largest_correlation(dim, atoms, seed):
    """ex-ista-zero: D^T z <= lambda; lambda >= 1 for a token of length one."""
    dictionary, token = problem(dim, atoms, seed)
    zero = torch.zeros(1, atoms, dtype=F64)
    largest = float((token @ dictionary).max())
    eta = 1 / float(torch.linalg.matrix_norm(dictionary, 2) ** 2)
    if largest > 0:
        below = proximal_step(zero, token, dictionary, eta, 0.9 * largest)
        start = lasso_objective(zero, token, dictionary, 0.9 * largest)
        assert lasso_objective(below, token, dictionary, 0.9 * largest) < start
    above = max(0.0, largest) * (1 + 1e-12)
    assert torch.equal(proximal_step(zero, token, dictionary, eta, above), zero)
    unit = token / token.norm()
    assert torch.equal(proximal_step(zero, unit, dictionary, eta, 1.0), zero)


@given(st.floats(0.01, 1.0), st.floats(0.1, 5.0))
def test_the_rate_is_tight_up_to_four_twentysevenths_and_one_half(share, start):
    """ex-ista-tight (a): the ratio is x (1 - x)^2 with x = eta D^2."""
    eta, dictionary = 0.5, torch.tensor([[math.sqrt(2 * share)]], dtype=F64)
    a0, token = torch.tensor([[start]], dtype=F64), torch.zeros(1, 1, dtype=F64)
    a1 = proximal_step(a0, token, dictionary, eta, 0.0)
    ratio = float(lasso_objective(a1, token, dictionary, 0.0)) / (start**2 / (2 * eta))
    assert ratio == pytest.approx(share * (1 - share) ** 2, abs=1e-12)
    assert ratio <= 4 / 27 + 1e-12


@given(st.integers(1, 30), st.floats(0.1, 2.0), st.floats(0.1, 2.0))
def test_half_of_the_bound_is_reached_without_a_dictionary(k, eta, lambd):
    """ex-ista-tight (b)."""
    dictionary, token = torch.zeros(1, 1, dtype=F64), torch.ones(1, 1, dtype=F64)
    a = a0 = torch.tensor([[2 * k * eta * lambd]], dtype=F64)
    for _ in range(k):
        a = proximal_step(a, token, dictionary, eta, lambd)
    gap = float(lasso_objective(a, token, dictionary, lambd)) - 0.5
    assert gap == pytest.approx(float(a0) ** 2 / (2 * eta * k) / 2)


@given(st.integers(2, 10), seeds, st.floats(0.05, 1.0))
def test_a_symmetric_dictionary_never_shrinks(dim, seed, eta):
    """ex-ista-symmetric: M symmetric iff D is; eigenvalues 1 + eta mu (1 - mu)."""
    g = seeded(seed)
    rotation = torch.linalg.qr(torch.randn(dim, dim, generator=g, dtype=F64)).Q
    mu = torch.rand(dim, generator=g, dtype=F64).sort().values
    symmetric = rotation * mu @ rotation.mT
    found = torch.linalg.eigvalsh(ista_matrix(symmetric, eta))
    wanted = (1 + eta * mu * (1 - mu)).sort().values
    torch.testing.assert_close(found, wanted)
    assert found.min() >= 1 - 1e-12
    other = torch.randn(dim, dim, generator=g, dtype=F64)
    matrix = ista_matrix(other, eta)
    assert not torch.allclose(matrix, matrix.mT)


@settings(max_examples=15)
@given(st.integers(2, 6), st.integers(1, 5), seeds)
def test_the_doubled_dictionary_is_the_signed_lasso(dim, atoms, seed):
    """ex-ista-doubled: equal minima; the squared norm doubles."""
    dictionary, token = problem(dim, atoms, seed)
    doubled = torch.cat([dictionary, -dictionary], dim=1)
    lip = float(torch.linalg.matrix_norm(dictionary, 2) ** 2)
    assert float(torch.linalg.matrix_norm(doubled, 2) ** 2) == pytest.approx(2 * lip)
    pair = torch.zeros(1, 2 * atoms, dtype=F64)
    signed = torch.zeros(1, atoms, dtype=F64)
    for _ in range(400):
        pair = proximal_step(pair, token, doubled, 0.5 / lip, 0.1)
        moved = signed + (token - signed @ dictionary.mT) @ dictionary / lip
        signed = torch.nn.functional.softshrink(moved, 0.1 / lip)
    error = token - signed @ dictionary.mT
    minimum = 0.5 * error.square().sum() + 0.1 * signed.abs().sum()
    found = lasso_objective(pair, token, doubled, 0.1)
    # both within |a*|^2 / (2 eta k) of their minima
    slack = float(signed.square().sum()) * 2 * lip / 400
    assert abs(float(found - minimum)) <= slack + 1e-12
