"""The nonnegative lasso and its steps: proximal map, descent, rates with known
minimisers, the fused form.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from crate_core.model.sparsify import (
    ISTA,
    ista,
    ista_matrix,
    lasso_objective,
    proximal_step,
)

SETTINGS = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**31 - 1)
dims = st.integers(1, 7)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, g):
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def problem(dim, atoms, seed, n=3):
    """Dictionary, tokens and feasible codes."""
    g = generator(seed)
    return (
        normal(dim, atoms, g=g),
        normal(n, dim, g=g),
        F.relu(normal(n, atoms, g=g)),
        g,
    )


def lipschitz(dictionary):
    return float(torch.linalg.matrix_norm(dictionary, 2) ** 2)


def known_minimiser(dim, atoms, active, lambd, seed):
    """A token, a dictionary and its exact code: atoms are bent until the optimality
    conditions hold.
    """
    g = generator(seed)
    support = torch.arange(atoms) < active
    code = torch.where(
        support, 0.5 + torch.rand(atoms, generator=g, dtype=torch.float64), 0.0
    )
    dictionary, residual = normal(dim, atoms, g=g), normal(dim, g=g)
    off = 1.8 * torch.rand(atoms, generator=g, dtype=torch.float64) - 0.9
    target = lambd * torch.where(support, 1.0, off)
    dictionary = (
        dictionary
        + torch.outer(residual, target - dictionary.mT @ residual)
        / residual.square().sum()
    )
    return (dictionary @ code + residual)[None], dictionary, code[None]


def step_by_loops(codes, z, dictionary, eta, lambd):
    result = torch.zeros_like(codes)
    for t in range(len(codes)):
        residual = z[t] - dictionary @ codes[t]
        for j in range(dictionary.shape[1]):
            result[t, j] = max(
                float(codes[t, j] + eta * dictionary[:, j] @ residual - eta * lambd),
                0.0,
            )
    return result


@SETTINGS
@given(dim=dims, atoms=dims, seed=seeds, eta=st.floats(0.01, 2), lambd=st.floats(0, 2))
def test_step_is_the_loop_and_minimises_its_model(dim, atoms, seed, eta, lambd):
    dictionary, z, _, g = problem(dim, atoms, seed)
    codes = normal(3, atoms, g=g)  # infeasible as a rule
    new = proximal_step(codes, z, dictionary, eta, lambd)
    torch.testing.assert_close(
        new, step_by_loops(codes, z, dictionary, eta, lambd), rtol=1e-10, atol=1e-11
    )
    gradient = -(z - codes @ dictionary.mT) @ dictionary

    def model(u):
        return (
            (gradient * (u - codes)).sum()
            + (u - codes).square().sum() / (2 * eta)
            + lambd * u.sum()
        )

    for _ in range(5):
        assert (
            float(model(new))
            <= float(model(F.relu(new + 0.1 * normal(*new.shape, g=g)))) + 1e-9
        )


@SETTINGS
@given(dim=dims, atoms=dims, seed=seeds, lambd=st.floats(0, 2))
def test_objective_is_its_formula_and_infinite_off_the_feasible_set(
    dim, atoms, seed, lambd
):
    dictionary, z, codes, _ = problem(dim, atoms, seed)
    expected = sum(
        0.5 * float((z[t] - dictionary @ codes[t]).square().sum())
        + lambd * float(codes[t].abs().sum())
        for t in range(3)
    )
    assert float(lasso_objective(codes, z, dictionary, lambd)) == pytest.approx(
        expected, rel=1e-11
    )
    codes[1, 0] = -1e-9
    assert float(lasso_objective(codes, z, dictionary, lambd)) == math.inf
    pair = torch.stack([codes, codes.abs()])
    values = lasso_objective(pair, z.expand(2, -1, -1), dictionary, lambd)
    assert values.shape == (2,)
    assert values.isinf().tolist() == [True, False]


@SETTINGS
@given(
    dim=dims,
    atoms=dims,
    seed=seeds,
    share=st.floats(0.01, 1.999),
    lambd=st.floats(0, 1),
)
def test_descent_from_feasible_codes_up_to_two_over_the_lipschitz_constant(
    dim, atoms, seed, share, lambd
):
    dictionary, z, codes, _ = problem(dim, atoms, seed)
    constant = lipschitz(dictionary)
    assume(constant > 1e-6)
    eta = share / constant
    for _ in range(5):
        new = proximal_step(codes, z, dictionary, eta, lambd)
        before, after = (
            float(lasso_objective(c, z, dictionary, lambd)) for c in (codes, new)
        )
        promised = (1 / eta - constant / 2) * float((new - codes).square().sum())
        assert after <= before - promised + 1e-11 * (1 + before)
        codes = new


def test_descent_fails_beyond_two_over_the_lipschitz_constant():
    one, start = torch.ones(1, 1), torch.tensor([[1.2]])
    assert lasso_objective(
        proximal_step(start, one, one, 2.5, 0.0), one, one, 0.0
    ) > lasso_objective(start, one, one, 0.0)


@SETTINGS
@given(
    dim=dims, atoms=dims, seed=seeds, share=st.floats(0.05, 1), lambd=st.floats(0, 1)
)
def test_three_point_inequality_from_any_start(dim, atoms, seed, share, lambd):
    dictionary, z, feasible, g = problem(dim, atoms, seed)
    assume(lipschitz(dictionary) > 1e-6)
    eta = share / lipschitz(dictionary)
    start = normal(3, atoms, g=g)
    new = proximal_step(start, z, dictionary, eta, lambd)
    right = float(lasso_objective(feasible, z, dictionary, lambd)) + float(
        (feasible - start).square().sum() - (feasible - new).square().sum()
    ) / (2 * eta)
    assert float(lasso_objective(new, z, dictionary, lambd)) <= right + 1e-9 * (
        1 + abs(right)
    )


@pytest.mark.parametrize(
    ("dim", "atoms", "active"), [(12, 6, 3), (8, 8, 2), (8, 8, 8), (8, 20, 3)]
)
def test_rates_against_a_known_minimiser(dim, atoms, active):
    z, dictionary, best = known_minimiser(dim, atoms, active, 0.3, dim + atoms + active)
    eta = 1 / lipschitz(dictionary)
    least = float(torch.linalg.svdvals(dictionary)[-1]) ** 2 if atoms <= dim else 0.0
    optimum = float(lasso_objective(best, z, dictionary, 0.3))
    torch.testing.assert_close(
        proximal_step(best, z, dictionary, eta, 0.3), best, rtol=0, atol=1e-12
    )
    codes = -torch.ones_like(best)  # an infeasible start: the rate holds from anywhere
    start = codes
    for k in range(1, 300):
        codes = proximal_step(codes, z, dictionary, eta, 0.3)
        gap = float(lasso_objective(codes, z, dictionary, 0.3)) - optimum
        assert (
            -1e-9 <= gap <= float((start - best).square().sum()) / (2 * eta * k) + 1e-9
        )
        assert (
            float((codes - best).norm())
            <= (1 - eta * least) ** k * float((start - best).norm()) + 1e-9
        )


@SETTINGS
@given(dim=dims, seed=seeds, eta=st.floats(0.001, 1), lambd=st.floats(0, 2))
def test_orthonormal_dictionary_step_from_the_token_beats_its_relu(
    dim, seed, eta, lambd
):
    g = generator(seed)
    dictionary, z = torch.linalg.qr(normal(dim, dim, g=g)).Q, normal(1, dim, g=g)
    after = float(
        lasso_objective(ista(z, dictionary, eta, lambd), z, dictionary, lambd)
    )
    assert after <= float(lasso_objective(F.relu(z), z, dictionary, lambd)) + 1e-12
    one_step = ista(z, dictionary, 1.0, lambd)
    torch.testing.assert_close(
        one_step, F.relu(z @ dictionary - lambd), rtol=0, atol=1e-12
    )
    torch.testing.assert_close(
        proximal_step(one_step, z, dictionary, 0.5, lambd), one_step, rtol=0, atol=1e-12
    )


def test_the_counterexample():
    dictionary = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    z = torch.tensor([[4.0, -4.0]], dtype=torch.float64)
    assert lipschitz(dictionary) == pytest.approx(4)
    after = ista(z, dictionary, eta=0.25, lambd=0.0)
    assert after.tolist() == [[2.0, 0.0]]
    assert float(lasso_objective(F.relu(z), z, dictionary, 0.0)) == 0.0
    assert float(lasso_objective(after, z, dictionary, 0.0)) == 4.0
    assert float(lasso_objective(z, z, dictionary, 0.0)) == math.inf


@SETTINGS
@given(
    dim=dims,
    n=st.integers(1, 6),
    batch=st.sampled_from([(), (2,), (2, 3)]),
    seed=seeds,
    eta=st.floats(0.01, 1),
    lambd=st.floats(0, 2),
)
def test_fused_step_is_the_proximal_step_from_the_tokens(
    dim, n, batch, seed, eta, lambd
):
    g = generator(seed)
    dictionary, z = normal(dim, dim, g=g), normal(*batch, n, dim, g=g)
    expected = proximal_step(z, z, dictionary, eta, lambd)
    torch.testing.assert_close(
        ista(z, dictionary, eta, lambd), expected, rtol=1e-10, atol=1e-11
    )
    low = ista(z.float(), dictionary.float(), eta, lambd)
    assert low.dtype == torch.float32
    size = (1 + eta * (1 + lipschitz(dictionary))) * float(z.abs().max()) * dim
    assert float((low.double() - expected).abs().max()) <= 1e-6 * size


def test_fused_matrix_is_its_formula_entry_by_entry():
    dictionary = normal(4, 4, g=generator(0))
    matrix = ista_matrix(dictionary, 0.3)
    for i in range(4):
        for j in range(4):
            inner = float(dictionary[:, i] @ dictionary[:, j])
            expected = float(i == j) + 0.3 * (float(dictionary[i, j]) - inner)
            assert float(matrix[i, j]) == pytest.approx(expected, abs=1e-12)


def test_gradcheck():
    g = generator(4)
    dictionary = normal(5, 5, g=g).requires_grad_()
    z = normal(2, 3, 5, g=g).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, d: ista(z, d, 0.2, 0.1), (z, dictionary))


def test_doubled_dictionary_solves_the_signed_lasso():
    g = generator(5)
    dictionary, z = normal(10, 6, g=g), normal(2, 10, g=g)
    eta = 1 / lipschitz(dictionary)
    doubled, split, signed = (
        torch.cat([dictionary, -dictionary], -1),
        torch.zeros(2, 12).double(),
        torch.zeros(2, 6).double(),
    )
    for _ in range(4000):
        split = proximal_step(split, z, doubled, eta / 2, 0.4)
        signed = F.softshrink(
            signed + eta * (z - signed @ dictionary.mT) @ dictionary, 0.4 * eta
        )
    torch.testing.assert_close(split[:, :6] - split[:, 6:], signed, rtol=0, atol=1e-8)


def test_module_is_the_function_and_learns():
    torch.manual_seed(0)
    module = ISTA(6, eta=0.2, lambd=0.1)
    z = torch.randn(2, 3, 6)
    torch.testing.assert_close(module(z), ista(z, module.weight, 0.2, 0.1))
    module(z).sum().backward()
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    assert bool(module.weight.grad.abs().sum() > 0)


def test_initial_weights_leave_the_published_step_just_inside_the_range():
    torch.manual_seed(0)
    for dim in (192, 384):
        constant = lipschitz(ISTA(dim).weight.detach())
        assert 7.2 < constant < 8.4
        assert 0.1 < 1 / constant < 0.14


@pytest.mark.parametrize(
    ("eta", "lambd"),
    [(0.0, 0.1), (-0.1, 0.1), (math.nan, 0.1), (0.1, -1.0), (0.1, math.nan)],
)
def test_step_size_and_penalty_are_checked(eta, lambd):
    z, dictionary = torch.zeros(2, 3), torch.eye(3)
    for call in (
        lambda: ista(z, dictionary, eta, lambd),
        lambda: proximal_step(z, z, dictionary, eta, lambd),
        lambda: ISTA(3, eta, lambd),
    ):
        with pytest.raises(ValueError, match="eta" if not eta > 0 else "lambd"):
            call()
    if not lambd >= 0:
        with pytest.raises(ValueError, match="lambd"):
            lasso_objective(z, z, dictionary, lambd)


def test_over_complete_dictionary_cannot_start_from_the_tokens():
    with pytest.raises(ValueError, match=r"square dictionary, got \(3, 5\)"):
        ista(torch.zeros(2, 3), torch.zeros(3, 5))


@pytest.mark.bad_input
@pytest.mark.parametrize("dictionary", [(4, 4), (3,), (2, 3, 3)])
def test_dictionaries_that_do_not_fit_are_named(dictionary):
    z, bad = torch.zeros(2, 3), torch.zeros(dictionary)
    for call in (
        lambda: ista(z, bad),
        lambda: proximal_step(z, z, bad, 0.1, 0.1),
        lambda: lasso_objective(z, z, bad, 0.1),
    ):
        with pytest.raises(ValueError, match="dictionary must be"):
            call()


@pytest.mark.bad_input
def test_codes_that_do_not_fit_are_named():
    z, dictionary = torch.zeros(2, 3), torch.zeros(3, 5)
    for codes in (torch.zeros(2, 4), torch.zeros(3, 5)):
        for call in (
            lambda codes=codes: proximal_step(codes, z, dictionary, 0.1, 0.1),
            lambda codes=codes: lasso_objective(codes, z, dictionary, 0.1),
        ):
            with pytest.raises(ValueError, match="codes must be"):
                call()
