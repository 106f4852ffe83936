"""Coding rates: closed forms against loops, autograd and finite differences;
invariances; precision; bad input.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_core.theory.mixture import random_bases
from crate_core.theory.rate import (
    CHOLESKY_LIMIT,
    class_coding_rate,
    coding_rate,
    coding_rate_grad,
    head_coordinates,
    rate_reduction,
    sparse_rate_reduction,
    subspace_beta,
    subspace_coding_rate,
    subspace_coding_rate_grad,
)

F64 = torch.float64


def make_generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def naive_rate(z: torch.Tensor, eps: float) -> torch.Tensor:
    """The definition, d x d, for one set of tokens."""
    n, d = z.shape
    return (
        0.5
        * torch.linalg.slogdet(
            torch.eye(d, dtype=z.dtype) + d / (n * eps**2) * z.T @ z
        ).logabsdet
    )


def naive_subspace_rate(
    z: torch.Tensor, bases: torch.Tensor, eps: float
) -> torch.Tensor:
    """The definition, n x n per head, for one set of tokens."""
    n, p = z.shape[0], bases.shape[2]
    total = torch.zeros((), dtype=z.dtype)
    for basis in bases:
        v = z @ basis
        total = (
            total
            + 0.5
            * torch.linalg.slogdet(
                torch.eye(n, dtype=z.dtype) + p / (n * eps**2) * v @ v.T
            ).logabsdet
        )
    return total


@st.composite
def problems(draw, max_batch: int = 2):
    """Tokens (..., n, d) with any leading batch, bases (K, d, p), orthonormal or not,
    and a precision.
    """
    n, d, k = (draw(st.integers(1, 9)) for _ in range(3))
    p = draw(st.integers(1, d))
    batch = tuple(draw(st.lists(st.integers(1, 3), max_size=max_batch)))
    generator = make_generator(draw(st.integers(0, 2**31 - 1)))
    scale = 10 ** draw(st.floats(-2, 1))
    z = scale * torch.randn(*batch, n, d, generator=generator, dtype=F64)
    if draw(st.booleans()):
        bases = random_bases(d, k, p, generator=generator, dtype=F64)
    else:
        bases = torch.randn(k, d, p, generator=generator, dtype=F64)
    return z, bases, 10 ** draw(st.floats(-2, 1))


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).norm() / reference.norm().clamp_min(1e-300))


@given(problems())
@settings(max_examples=40)
def test_rates_equal_their_definitions_for_every_batch_entry(problem):
    z, bases, eps = problem
    rate, subspace_rate = coding_rate(z, eps), subspace_coding_rate(z, bases, eps)
    assert rate.shape == subspace_rate.shape == z.shape[:-2]
    for index, tokens in enumerate(z.reshape(-1, *z.shape[-2:])):
        torch.testing.assert_close(
            rate.reshape(-1)[index], naive_rate(tokens, eps), rtol=1e-9, atol=1e-9
        )
        expected = naive_subspace_rate(tokens, bases, eps)
        torch.testing.assert_close(
            subspace_rate.reshape(-1)[index], expected, rtol=1e-9, atol=1e-9
        )


@given(problems())
@settings(max_examples=40)
def test_gradients_equal_automatic_differentiation_of_the_definitions(problem):
    z, bases, eps = problem
    grad, subspace_grad = (
        coding_rate_grad(z, eps),
        subspace_coding_rate_grad(z, bases, eps),
    )
    assert grad.shape == subspace_grad.shape == z.shape
    flat = z.reshape(-1, *z.shape[-2:])
    for index, tokens in enumerate(flat):
        leaf = tokens.clone().requires_grad_(True)
        (auto,) = torch.autograd.grad(naive_rate(leaf, eps), leaf)
        (auto_subspace,) = torch.autograd.grad(
            naive_subspace_rate(leaf, bases, eps), leaf
        )
        assert relative_error(grad.reshape(flat.shape)[index], auto) < 1e-8
        assert (
            relative_error(subspace_grad.reshape(flat.shape)[index], auto_subspace)
            < 1e-8
        )


@given(problems())
@settings(max_examples=40)
def test_the_package_functions_differentiate_to_their_closed_forms(problem):
    z, bases, eps = problem
    leaf = z.clone().requires_grad_(True)
    (auto,) = torch.autograd.grad(coding_rate(leaf, eps).sum(), leaf)
    (auto_subspace,) = torch.autograd.grad(
        subspace_coding_rate(leaf, bases, eps).sum(), leaf
    )
    assert relative_error(auto, coding_rate_grad(z, eps)) < 1e-8
    assert (
        relative_error(auto_subspace, subspace_coding_rate_grad(z, bases, eps)) < 1e-8
    )


@given(problems(), st.integers(0, 2**31 - 1))
@settings(max_examples=40)
def test_gradients_equal_finite_differences(problem, seed):
    z, bases, eps = problem
    direction = torch.randn(z.shape, generator=make_generator(seed), dtype=F64)
    # The function varies on the scale eps sqrt(n/d) of a singular value; central
    # differences are of second order.
    step = (
        1e-4
        * eps
        / float(direction.norm())
        / max(1.0, float(torch.linalg.matrix_norm(bases, ord=2).max()))
    )
    for rate, grad in (
        (lambda x: coding_rate(x, eps), coding_rate_grad(z, eps)),
        (
            lambda x: subspace_coding_rate(x, bases, eps),
            subspace_coding_rate_grad(z, bases, eps),
        ),
    ):
        slope = (
            rate(z + step * direction).sum() - rate(z - step * direction).sum()
        ) / (2 * step)
        rounding = 1e-15 * float(rate(z).abs().sum()) / step
        tolerance = 1e-5 * float(grad.norm() * direction.norm()) + 10 * rounding
        assert abs(float(slope - (grad * direction).sum())) < tolerance


def test_finite_differences_converge_with_order_two():
    generator = make_generator(0)
    z = torch.randn(7, 5, generator=generator, dtype=F64)
    bases = torch.randn(2, 5, 3, generator=generator, dtype=F64)
    direction = torch.randn(7, 5, generator=generator, dtype=F64)
    exact = (subspace_coding_rate_grad(z, bases, 0.7) * direction).sum()
    steps = 2.0 ** -torch.arange(4, 9, dtype=F64)
    errors = torch.stack(
        [
            (
                (
                    subspace_coding_rate(z + h * direction, bases, 0.7)
                    - subspace_coding_rate(z - h * direction, bases, 0.7)
                )
                / (2 * h)
                - exact
            ).abs()
            for h in steps
        ]
    )
    slope = (errors.log()[0] - errors.log()[-1]) / (steps.log()[0] - steps.log()[-1])
    assert abs(float(slope) - 2) < 0.05


@pytest.mark.parametrize("limit", [CHOLESKY_LIMIT, 0.0], ids=["cholesky", "qr"])
def test_both_factorisations_agree_and_differentiate(limit, monkeypatch):
    """Once through the rates and once through the gradients; a limit of zero sends
    everything through QR.
    """
    generator = make_generator(0)
    bases = torch.randn(2, 4, 2, generator=generator, dtype=F64)
    for shape in ((5, 4), (3, 4), (2, 3, 4)):
        z = torch.randn(shape, generator=generator, dtype=F64).requires_grad_(True)
        functions = (
            lambda x: coding_rate(x, 0.5),
            lambda x: subspace_coding_rate(x, bases, 0.5),
            lambda x: coding_rate_grad(x, 0.5),
            lambda x: subspace_coding_rate_grad(x, bases, 0.5),
        )
        expected = [function(z.detach()) for function in functions]
        with monkeypatch.context() as patch:
            patch.setattr("crate_core.theory.rate.CHOLESKY_LIMIT", limit)
            for function, value in zip(functions, expected, strict=True):
                torch.testing.assert_close(function(z.detach()), value)
                assert torch.autograd.gradcheck(function, (z,), fast_mode=True)


@given(problems(max_batch=0), st.integers(0, 2**31 - 1), st.floats(0.1, 10))
@settings(max_examples=40)
def test_invariances(problem, seed, scale):
    z, bases, eps = problem
    n, d = z.shape
    generator = make_generator(seed)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=F64)).Q
    mixing = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64)).Q
    rank = bases.shape[2]
    inside = torch.linalg.qr(
        torch.randn(len(bases), rank, rank, generator=generator, dtype=F64)
    ).Q
    same = [
        (z @ rotation.T, rotation @ bases, eps),
        (mixing @ z, bases, eps),
        (z[torch.randperm(n, generator=generator)], bases, eps),
        (scale * z, bases, scale * eps),
        (torch.cat([z, z]), bases, eps),
    ]
    for tokens, frames, precision in same:
        torch.testing.assert_close(
            coding_rate(tokens, precision), coding_rate(z, eps), rtol=1e-8, atol=1e-8
        )
        value = subspace_coding_rate(tokens, frames, precision)
        torch.testing.assert_close(
            value, subspace_coding_rate(z, bases, eps), rtol=1e-8, atol=1e-8
        )
    torch.testing.assert_close(
        subspace_coding_rate(z, bases @ inside, eps),
        subspace_coding_rate(z, bases, eps),
        rtol=1e-8,
        atol=1e-8,
    )
    gradient = subspace_coding_rate_grad(z, bases, eps)
    torch.testing.assert_close(
        subspace_coding_rate_grad(mixing @ z, bases, eps),
        mixing @ gradient,
        rtol=1e-6,
        atol=1e-8,
    )


@given(problems(max_batch=0))
@settings(max_examples=40)
def test_translation_costs_what_the_formula_says(problem):
    z, _, eps = problem
    n, d = z.shape
    centred = z - z.mean(0)
    shift = torch.ones(d, dtype=F64)
    metric = eps**2 / d * torch.eye(d, dtype=F64) + centred.T @ centred / n
    expected = coding_rate(centred, eps) + 0.5 * torch.log1p(
        shift @ torch.linalg.solve(metric, shift)
    )
    torch.testing.assert_close(
        coding_rate(centred + shift, eps), expected, rtol=1e-7, atol=1e-7
    )
    assert coding_rate(centred + shift, eps) > coding_rate(centred, eps)


@given(st.integers(0, 2**31 - 1), st.floats(0.05, 2))
@settings(max_examples=40)
def test_rate_reduction_is_never_positive_at_equal_error_per_coordinate(seed, eps):
    generator = make_generator(seed)
    bases = random_bases(12, 3, 4, generator=generator, dtype=F64)
    z = torch.randn(7, 12, generator=generator, dtype=F64)
    assert (
        coding_rate(z, eps) <= subspace_coding_rate(z, bases, eps / math.sqrt(3)) + 1e-9
    )
    white = 0.5 * 12 * math.log((1 + 1 / eps**2) / (1 + 1 / (3 * eps**2)))
    energy_one = z * (7 / z.square().sum()).sqrt()
    assert rate_reduction(energy_one, bases, eps) <= white + 1e-9


@given(problems())
@settings(max_examples=20)
def test_rate_reduction_is_the_whole_s_rate_minus_the_subspaces(problem):
    z, bases, eps = problem
    reduction = rate_reduction(z, bases, eps).flatten()
    for one, found in zip(z.reshape(-1, *z.shape[-2:]), reduction, strict=True):
        whole, apart = naive_rate(one, eps), naive_subspace_rate(one, bases, eps)
        # the rounding of each rate, not of their difference
        error = 1e-7 * float(1 + whole + apart)
        torch.testing.assert_close(found, whole - apart, rtol=0, atol=error)


@given(problems())
@settings(max_examples=40)
def test_class_rate_is_the_weighted_sum_and_never_exceeds_the_whole(problem):
    z, _, eps = problem
    n = z.shape[-2]
    labels = torch.arange(n) % 2
    parts = [z[..., labels == k, :] for k in range(min(2, n))]
    expected = sum(part.shape[-2] / n * coding_rate(part, eps) for part in parts)
    value = class_coding_rate(z, labels, eps)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    assert bool((value <= coding_rate(z, eps) + 1e-9).all())


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
def test_dtypes(dtype):
    generator = make_generator(0)
    z = torch.randn(2, 20, 12, generator=generator, dtype=F64).to(dtype)
    bases = random_bases(12, 3, 4, generator=generator, dtype=F64).to(dtype)
    exact = z.double(), bases.double()
    tolerance = {
        "rtol": max(1e-6, 4 * torch.finfo(dtype).eps),
        "atol": max(1e-6, 4 * torch.finfo(dtype).eps),
    }
    expected_dtype = (
        torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    )
    for rate, reference in (
        (coding_rate(z, 0.5), coding_rate(exact[0], 0.5)),
        (subspace_coding_rate(z, bases, 0.5), subspace_coding_rate(*exact, 0.5)),
    ):
        assert rate.dtype == expected_dtype
        torch.testing.assert_close(rate.double(), reference, rtol=1e-5, atol=1e-5)
    for grad, reference in (
        (coding_rate_grad(z, 0.5), coding_rate_grad(exact[0], 0.5)),
        (
            subspace_coding_rate_grad(z, bases, 0.5),
            subspace_coding_rate_grad(*exact, 0.5),
        ),
    ):
        assert grad.dtype == dtype
        torch.testing.assert_close(grad.double(), reference, **tolerance)


@pytest.mark.parametrize("eps", [1.0, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("shape", [(40, 24), (10, 24)])
def test_float32_stays_close_to_float64_where_squaring_would_lose_the_free_directions(
    eps, shape
):
    """Tokens of rank 4: the other directions must cost nothing, whatever the
    precision.
    """
    generator = make_generator(0)
    n, d = shape
    z = (
        torch.randn(n, 4, generator=generator, dtype=F64)
        @ torch.randn(4, d, generator=generator, dtype=F64)
    ).float()
    singular = torch.linalg.svdvals(z.double())
    weight = d / (n * eps**2)
    reference = 0.5 * torch.log1p(weight * singular**2).sum()
    # Rounding of the tokens themselves is part of both values; CHOLESKY_LIMIT nats a
    # direction is what is promised.
    noise_floor = (
        0.5
        * torch.log1p(weight * (torch.finfo(torch.float32).eps * singular[0]) ** 2)
        * min(shape)
    )
    assert abs(
        float(coding_rate(z, eps)) - float(reference)
    ) < 2 * CHOLESKY_LIMIT * min(shape) + float(noise_floor)


@pytest.mark.parametrize("weight_exponent", [2, 6, 10, 14])
def test_shrinkage_of_singular_values_at_extreme_weights(weight_exponent):
    """s becomes a s/(1 + a s^2) for singular values over many orders, in float64, by
    whichever factorisation.
    """
    generator = make_generator(0)
    left = torch.linalg.qr(torch.randn(6, 4, generator=generator, dtype=F64)).Q
    right = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=F64)).Q
    s = torch.tensor([1.0, 1e-1, 1e-3, 0.0], dtype=F64)
    eps = math.sqrt(4 / 6 / 10**weight_exponent)
    alpha = 4 / (6 * eps**2)
    for z, wanted in (
        ((left * s) @ right, (left * (alpha * s / (1 + alpha * s**2))) @ right),
        (((left * s) @ right).T, ((left * (alpha * s / (1 + alpha * s**2))) @ right).T),
    ):
        n, d = z.shape
        precision = math.sqrt(d / (n * alpha))
        scale = math.sqrt(alpha) / 2  # the largest gradient there can be
        assert (
            float((coding_rate_grad(z, precision) - wanted).abs().max()) < 1e-5 * scale
        )
        exact = 0.5 * torch.log1p(alpha * s**2).sum()
        assert abs(float(coding_rate(z, precision) - exact)) < 4 * CHOLESKY_LIMIT


@given(problems())
@settings(max_examples=40)
def test_gradient_is_bounded(problem):
    z, _, eps = problem
    n, d = z.shape[-2:]
    norms = torch.linalg.matrix_norm(coding_rate_grad(z, eps), ord=2)
    assert float(norms.max()) <= math.sqrt(d / (n * eps**2)) / 2 * (1 + 1e-9)


def test_sparse_rate_reduction_counts_nonzeros():
    generator = make_generator(0)
    bases = random_bases(6, 2, 3, generator=generator, dtype=F64)
    z = torch.randn(4, 5, 6, generator=generator, dtype=F64).relu()
    counts = (z != 0).sum((-1, -2))
    difference = rate_reduction(z, bases, 0.5) - sparse_rate_reduction(
        z, bases, 0.5, 0.25
    )
    torch.testing.assert_close(difference, 0.25 * counts.double())
    assert 0 < int(counts.min()) < 30


def test_limits():
    """No tokens' energy, no rate; no room for error, ever more rate; eps enters as eps,
    not as its square.
    """
    z = torch.randn(5, 3, generator=make_generator(0), dtype=F64)
    assert float(coding_rate(torch.zeros(5, 3, dtype=F64), 0.1)) == 0
    assert float(coding_rate_grad(torch.zeros(5, 3, dtype=F64), 0.1).abs().max()) == 0
    assert (
        abs(float(coding_rate(z, 1e-6) - coding_rate(z, 1e-3)) - 3 * math.log(1e3))
        < 1e-3
    )
    assert subspace_beta(10, 4, 0.5) == pytest.approx(1.6)


def test_tokens_that_are_not_finite_give_a_rate_that_is_not_finite():
    z = torch.randn(2, 5, 3, dtype=F64)
    z[0, 1, 2] = math.nan
    assert bool(coding_rate(z, 0.5)[0].isnan())
    assert bool(coding_rate_grad(z, 0.5)[0].isnan().any())
    assert bool(coding_rate(z, 0.5)[1].isfinite())


@pytest.mark.bad_input
@pytest.mark.parametrize("eps", [0.0, -1.0, math.nan, math.inf, 1e-200])
def test_bad_eps(eps):
    z = torch.randn(5, 4)
    bases = random_bases(4, 2, 2)
    for call in (
        lambda: coding_rate(z, eps),
        lambda: coding_rate_grad(z, eps),
        lambda: subspace_coding_rate(z, bases, eps),
        lambda: subspace_coding_rate_grad(z, bases, eps),
        lambda: class_coding_rate(z, torch.zeros(5, dtype=torch.long), eps),
    ):
        with pytest.raises(ValueError, match="eps"):
            call()


@pytest.mark.bad_input
def test_bad_tokens_and_bases():
    bases = random_bases(4, 2, 2)
    for z in (torch.randn(4), torch.randn(0, 4), torch.ones(5, 4, dtype=torch.long)):
        with pytest.raises(ValueError, match="tokens"):
            coding_rate(z, 0.5)
        with pytest.raises(ValueError, match="tokens"):
            subspace_coding_rate(z, bases, 0.5)
    with pytest.raises(ValueError, match=r"bases must be \(K, 5, p\)"):
        head_coordinates(torch.randn(3, 5), bases)
    with pytest.raises(ValueError, match="bases"):
        subspace_coding_rate_grad(torch.randn(3, 4), bases[0], 0.5)
    with pytest.raises(ValueError, match="labels"):
        class_coding_rate(torch.randn(3, 4), torch.zeros(2, dtype=torch.long), 0.5)
    with pytest.raises(ValueError, match="lambd"):
        sparse_rate_reduction(torch.randn(3, 4), bases, 0.5, -1.0)
    with pytest.raises(ValueError, match="number of tokens"):
        subspace_beta(0, 2, 0.5)
