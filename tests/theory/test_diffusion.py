"""Flows and integrators: solutions known in closed form, orders by regression,
conservation laws, bounds.
"""

import math

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_core.theory.diffusion import (
    exact_structured_flow,
    flow_derivative,
    flow_singular_values,
    forward_noising,
    invert_euler,
    noise_levels,
    probability_flow,
    probability_flow_field,
    reverse_sde,
    round_trip_bound,
    structured_field,
    structured_flow,
)
from crate_core.theory.integrators import integrate
from crate_core.theory.mixture import LowRankGaussianMixture, random_bases
from crate_core.theory.rate import (
    subspace_beta,
    subspace_coding_rate,
    subspace_coding_rate_grad,
)

ORDERS = {"euler": 1, "heun": 2, "rk4": 4}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def bases_of(
    dim: int, components: int, rank: int, seed: int = 0, orthogonal: bool = True
) -> torch.Tensor:
    return random_bases(
        dim,
        components,
        rank,
        orthogonal=orthogonal,
        generator=seeded(seed),
        dtype=torch.float64,
    )


def order_of(errors: list[float], counts: list[int]) -> float:
    return float(-np.polyfit(np.log(counts), np.log(errors), 1)[0])


# A token set with the subspaces it flows in: K p <= d, any n, at least one batch
# dimension sometimes.
token_sets = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 10_000),
        "components": st.integers(1, 4),
        "rank": st.integers(1, 4),
        "spare": st.integers(0, 3),
        "n": st.integers(1, 8),
        "batch": st.sampled_from([(), (2,), (2, 1)]),
        "eps": st.floats(0.2, 3.0),
    }
)


def build(case: dict) -> tuple[torch.Tensor, torch.Tensor, float, float]:
    dim = case["components"] * case["rank"] + case["spare"]
    bases = bases_of(dim, case["components"], case["rank"], case["seed"])
    z = normal(*case["batch"], case["n"], dim, seed=case["seed"] + 1)
    return z, bases, case["eps"], subspace_beta(case["n"], case["rank"], case["eps"])


# noise, forwards and backwards


@given(st.floats(1e-4, 10), st.floats(1e-4, 10), st.integers(1, 50))
def test_noise_levels_are_geometric_with_exact_ends(
    high: float, low: float, steps: int
) -> None:
    if high == low:
        return
    levels = noise_levels(high, low, steps)
    assert levels.shape == (steps + 1,)
    assert (float(levels[0]), float(levels[-1])) == (high, low)
    ratios = levels[1:] / levels[:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand(steps), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("high", "low", "steps"),
    [(0.0, 1.0, 3), (1.0, -1.0, 3), (1.0, 1.0, 3), (1.0, 0.5, 0)],
)
def test_noise_levels_refuse(high: float, low: float, steps: int) -> None:
    with pytest.raises(ValueError):
        noise_levels(high, low, steps)


def test_forward_noising_has_independent_increments_of_the_right_variance() -> None:
    x = normal(20_000, 4)
    sigmas = torch.tensor([0.0, 0.5, 0.5, 2.0], dtype=torch.float64)
    path = forward_noising(x, sigmas, seeded(5))
    assert path.shape == (4, 20_000, 4)
    assert torch.equal(path[0], x)
    assert torch.equal(path[1], path[2])
    first, second = path[1] - x, path[3] - path[2]
    assert abs(float(first.var()) / 0.25 - 1) < 0.02
    assert abs(float(second.var()) / 3.75 - 1) < 0.02
    assert abs(float((first * second).mean())) / math.sqrt(0.25 * 3.75) < 0.02


@pytest.mark.parametrize("sigmas", [[1.0, 0.5], [-0.1, 0.5]])
def test_forward_noising_refuses(sigmas: list[float]) -> None:
    with pytest.raises(ValueError, match="nondecreasing"):
        forward_noising(normal(3, 2), sigmas)


@settings(deadline=None, max_examples=6)
@given(
    st.integers(0, 1000),
    st.integers(1, 6),
    st.integers(0, 4),
    st.floats(0.05, 3),
    st.floats(0.05, 3),
)
def test_probability_flow_of_one_gaussian(
    seed: int, rank: int, spare: int, high: float, low: float
) -> None:
    if abs(high - low) < 1e-3:
        return
    bases = bases_of(rank + spare, 1, rank, seed)
    scales = 0.2 + torch.rand(1, rank, generator=seeded(seed), dtype=torch.float64)
    mixture = LowRankGaussianMixture(bases, scales=scales)
    z = normal(3, 2, rank + spare, seed=seed)
    inside = z @ bases[0]
    shrunk = inside * ((scales[0] ** 2 + low**2) / (scales[0] ** 2 + high**2)).sqrt()
    exact = shrunk @ bases[0].mT + (z - inside @ bases[0].mT) * low / high
    torch.testing.assert_close(
        probability_flow(mixture, z, high, low, 1, "dop853"),
        exact,
        rtol=1e-9,
        atol=1e-10,
    )


def mixture_in_the_plane() -> LowRankGaussianMixture:
    angle = torch.tensor([0.0, math.pi / 3, 2 * math.pi / 3], dtype=torch.float64)
    return LowRankGaussianMixture(
        torch.stack([angle.cos(), angle.sin()], -1)[..., None]
    )


def test_euler_step_of_the_probability_flow_is_a_partial_denoising() -> None:
    mixture, z = mixture_in_the_plane(), normal(20, 2)
    step = probability_flow(mixture, z, 0.8, 0.6, 1, "euler")
    torch.testing.assert_close(
        step, 0.75 * z + 0.25 * mixture.denoise(z, 0.8), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("method", ORDERS)
def test_order_on_the_probability_flow(method: str) -> None:
    mixture, z, counts = mixture_in_the_plane(), normal(30, 2), [16, 32, 64]
    reference = integrate(probability_flow_field(mixture), z, [1.0, 0.4], "dop853")[-1]
    errors = [
        float((probability_flow(mixture, z, 1.0, 0.4, n, method) - reference).norm())
        for n in counts
    ]
    assert abs(order_of(errors, counts) - ORDERS[method]) < 0.25


def test_probability_flow_runs_back() -> None:
    mixture, z = mixture_in_the_plane(), normal(20, 2)
    there = probability_flow(mixture, z, 1.0, 0.3, 60, "rk4")
    torch.testing.assert_close(
        probability_flow(mixture, there, 0.3, 1.0, 60, "rk4"), z, rtol=0, atol=1e-5
    )


def test_reverse_sde_keeps_the_marginals_of_one_gaussian() -> None:
    mixture = LowRankGaussianMixture(bases_of(6, 1, 2), scales=0.7)
    start = mixture.sample(8_000, 1.0, generator=seeded(1)).tokens
    inside_of = mixture.bases[0]
    one = reverse_sde(mixture, start, 1.0, 0.4, 1, seeded(2))
    outside = one - one @ inside_of @ inside_of.mT
    # exact outside in a single step
    assert abs(float(outside.square().sum(-1).mean()) / (4 * 0.4**2) - 1) < 0.03
    many = reverse_sde(mixture, start, 1.0, 0.4, 40, seeded(3))
    assert abs(float((many @ inside_of).var()) / (0.49 + 0.16) - 1) < 0.04


def test_reverse_sde_only_goes_down() -> None:
    with pytest.raises(ValueError, match="sigma_to < sigma_from"):
        reverse_sde(mixture_in_the_plane(), normal(3, 2), 0.5, 0.5, 10)


# the scalar law


@settings(deadline=None)
@given(st.floats(-6, 3), st.floats(-3, 5), st.floats(-5, 100))
def test_scalar_law_against_fifty_digits(
    log_s: float, log_beta: float, units: float
) -> None:
    s, beta = 10**log_s, 10**log_beta
    time = units / beta
    with mpmath.workdps(50):
        start = mpmath.mpf(beta) * mpmath.mpf(s) ** 2
        omega = mpmath.lambertw(
            mpmath.exp(
                mpmath.log(start) + start - 2 * mpmath.mpf(beta) * mpmath.mpf(time)
            )
        )
        exact = float(mpmath.sqrt(omega / beta))
    got = float(flow_singular_values(torch.tensor(s, dtype=torch.float64), beta, time))
    assert math.isclose(got, exact, rel_tol=2e-13)


@given(st.floats(-3, 1.5), st.floats(0.1, 10), st.floats(0, 30))
def test_scalar_law_stays_between_its_rates(
    log_size: float, beta: float, units: float
) -> None:
    """prop-sode-rates: s0^2 - 2 t <= s^2, and s0 e^(-beta t) <= s <= that times
    e^(beta s0^2 / 2).
    """
    start, time = 10**log_size, units / beta
    first = torch.tensor(start, dtype=torch.float64)
    end = float(flow_singular_values(first, beta, time))
    assert start**2 - 2 * time <= end**2 * (1 + 1e-12) + 1e-12 * start**2
    share = math.log(end / start)
    assert -units - 1e-9 <= share <= -units + beta * start**2 / 2 + 1e-9


def test_scalar_law_at_extreme_sizes() -> None:
    s = torch.tensor([0.0, 1e-250, 1e-200, 1e-5, 1.0, 1e8, 1e200], dtype=torch.float64)
    for time in (-50.0, 0.0, 50.0):
        end = flow_singular_values(s, 10.0, time)
        assert end.isfinite().all()
        assert end[0] == 0
        assert end[-1] == 1e200
        assert (end.diff() >= 0).all()  # order is kept
    # omega = beta s^2 is below the smallest float here, s is not
    assert math.isclose(
        float(flow_singular_values(s[3], 10.0, 60.0)),
        1e-5 * math.exp(-600),
        rel_tol=1e-8,
    )
    assert torch.allclose(
        flow_singular_values(s[:-1], 10.0, 0.0), s[:-1], rtol=1e-12, atol=0
    )


def test_scalar_law_refuses() -> None:
    s = torch.ones(2, dtype=torch.float64)
    for beta, time in ((0.0, 1.0), (-1.0, 1.0), (1.0, math.inf), (1.0, math.nan)):
        with pytest.raises(ValueError, match="beta > 0 and a finite time"):
            flow_singular_values(s, beta, time)
    with pytest.raises(ValueError, match="nonnegative"):
        flow_singular_values(-s, 1.0, 1.0)
    with pytest.raises(ValueError, match="positive"):
        flow_derivative(0 * s, 1.0, 1.0)


@pytest.mark.parametrize("time", [-0.3, 0.5, 4.0])
def test_derivative_of_the_flow(time: float) -> None:
    s, beta, h = torch.logspace(-3, 1, 40, dtype=torch.float64), 2.0, 1e-6
    ends = [flow_singular_values(s * factor, beta, time) for factor in (1 + h, 1 - h)]
    slope = flow_derivative(s, beta, time)
    torch.testing.assert_close(
        (ends[0] - ends[1]) / (2 * h * s), slope, rtol=1e-7, atol=0
    )
    if time > 0:
        assert (1 / slope <= math.exp(beta * time) * (1 + 1e-12)).all()


# the structured flow


@settings(deadline=None, max_examples=10)
@given(token_sets, st.floats(-1.5, 3.0))
def test_closed_form_against_dop853(case: dict, units: float) -> None:
    z, bases, eps, beta = build(case)
    numerical = structured_flow(z, bases, eps, units / beta, 1, "dop853")
    torch.testing.assert_close(
        exact_structured_flow(z, bases, eps, units / beta),
        numerical,
        rtol=0,
        atol=1e-10,
    )


@settings(deadline=None, max_examples=15)
@given(token_sets, st.floats(0, 4), st.floats(0, 4))
def test_closed_form_composes_reverses_and_batches(
    case: dict, first: float, second: float
) -> None:
    z, bases, eps, beta = build(case)
    one = exact_structured_flow(z, bases, eps, first / beta)
    both = exact_structured_flow(one, bases, eps, second / beta)
    torch.testing.assert_close(
        both,
        exact_structured_flow(z, bases, eps, (first + second) / beta),
        rtol=0,
        atol=1e-11,
    )
    torch.testing.assert_close(
        exact_structured_flow(one, bases, eps, -first / beta), z, rtol=0, atol=1e-11
    )
    if case["batch"]:
        alone = torch.stack(
            [exact_structured_flow(s, bases, eps, first / beta) for s in z]
        )
        torch.testing.assert_close(one, alone, rtol=0, atol=1e-13)


@settings(deadline=None, max_examples=15)
@given(token_sets)
def test_closed_form_leaves_the_outside_and_lowers_the_rate(case: dict) -> None:
    z, bases, eps, beta = build(case)
    moved = exact_structured_flow(z, bases, eps, 1 / beta)
    projection = (bases @ bases.mT).sum(0)
    torch.testing.assert_close(
        moved - moved @ projection, z - z @ projection, rtol=0, atol=1e-12
    )
    assert (
        subspace_coding_rate(moved, bases, eps) < subspace_coding_rate(z, bases, eps)
    ).all()
    h = 1e-5 / beta
    slope = (
        exact_structured_flow(z, bases, eps, h)
        - exact_structured_flow(z, bases, eps, -h)
    ) / (2 * h)
    torch.testing.assert_close(
        slope, -subspace_coding_rate_grad(z, bases, eps), rtol=1e-6, atol=1e-6 * beta
    )


def test_closed_form_keeps_zeros_dtype_and_has_no_gradient() -> None:
    bases = bases_of(8, 2, 3)
    z = torch.zeros(4, 8, dtype=torch.float64)
    for time in (-3.0, 3.0):
        assert torch.equal(exact_structured_flow(z, bases, 0.5, time), z)
    tokens = normal(5, 8)
    exact = exact_structured_flow(tokens, bases, 0.5, 0.2)
    single = exact_structured_flow(tokens.float(), bases.float(), 0.5, 0.2)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=1e-5)
    assert not exact_structured_flow(
        tokens.requires_grad_(), bases, 0.5, 0.2
    ).requires_grad


def test_closed_form_refuses_bases_with_the_figure() -> None:
    z, bases = normal(5, 8), bases_of(8, 2, 3)
    angle = 0.3
    tilted = bases.clone()
    tilted[1, :, 0] = (
        math.cos(angle) * bases[1, :, 0] + math.sin(angle) * bases[0, :, 0]
    )
    with pytest.raises(ValueError, match=r"mutually orthogonal.* is 0\.296"):
        exact_structured_flow(z, tilted, 0.5, 0.1)
    with pytest.raises(ValueError, match=r"orthonormal.* is 3"):
        exact_structured_flow(z, 2 * bases, 0.5, 0.1)
    with pytest.raises(ValueError, match="eps"):
        exact_structured_flow(z, bases, 0.0, 0.1)


@pytest.mark.bad_input
def test_flows_refuse_bases_that_do_not_fit() -> None:
    z, bases = normal(5, 7), bases_of(8, 2, 3)
    for flow in (
        lambda: exact_structured_flow(z, bases, 0.5, 0.1),
        lambda: structured_flow(z, bases, 0.5, 0.1, 3),
        lambda: structured_flow(z, bases, 0.5, 0.0, 3),
        lambda: invert_euler(z, bases, 0.5, 0.1, 3),
    ):
        with pytest.raises(ValueError, match=r"bases must be \(K, 7, p\)"):
            flow()


@pytest.mark.parametrize("method", ORDERS)
def test_order_on_the_structured_flow(method: str) -> None:
    z, bases, eps = normal(6, 12), bases_of(12, 3, 4), 0.5
    time = 2 / subspace_beta(6, 4, eps)
    exact, counts = exact_structured_flow(z, bases, eps, time), [32, 64, 128]
    errors = [
        float((structured_flow(z, bases, eps, time, n, method) - exact).norm())
        for n in counts
    ]
    assert abs(order_of(errors, counts) - ORDERS[method]) < 0.15


def test_steps_are_layers() -> None:
    z, bases, eps = normal(2, 6, 5), bases_of(5, 3, 2, orthogonal=False), 0.5
    encoded = structured_flow(z, bases, eps, 0.2, 2)
    by_hand = z
    for _ in range(2):
        by_hand = by_hand - 0.1 * subspace_coding_rate_grad(by_hand, bases, eps)
    torch.testing.assert_close(encoded, by_hand)
    decoded = structured_flow(encoded, bases, eps, -0.1, 1)
    torch.testing.assert_close(
        decoded, encoded + 0.1 * subspace_coding_rate_grad(encoded, bases, eps)
    )
    assert torch.equal(structured_flow(z, bases, eps, 0.0, 3), z)
    torch.testing.assert_close(
        structured_field(bases, eps)(7.0, z), -subspace_coding_rate_grad(z, bases, eps)
    )


def test_structured_flow_reverses_for_any_bases() -> None:
    z, bases, eps = normal(6, 5), bases_of(5, 3, 2, orthogonal=False), 0.5
    there = structured_flow(z, bases, eps, 0.3, 1, "dop853")
    torch.testing.assert_close(
        structured_flow(there, bases, eps, -0.3, 1, "dop853"), z, rtol=0, atol=1e-10
    )


def test_structured_flow_refuses() -> None:
    z, bases = normal(5, 8), bases_of(8, 2, 3)
    with pytest.raises(ValueError, match="steps"):
        structured_flow(z, bases, 0.5, 0.1, 0)
    with pytest.raises(ValueError, match="method"):
        structured_flow(z, bases, 0.5, 0.1, 3, "midpoint")
    with pytest.raises(ValueError, match="eps"):
        structured_flow(z, bases, -1.0, 0.1, 3)


# there and back with layers


@settings(deadline=None, max_examples=10)
@given(token_sets, st.floats(0.05, 0.6), st.integers(1, 6))
def test_implicit_decoding_inverts_the_layers(case: dict, c: float, steps: int) -> None:
    z, bases, eps, beta = build(case)
    time = c * steps / beta
    code = structured_flow(z, bases, eps, time, steps)
    # each layer may amplify rounding by 1 / (1 - c) on the way back
    tolerance = 1e-14 * (1 - c) ** -steps + 1e-12
    torch.testing.assert_close(
        invert_euler(code, bases, eps, time, steps), z, rtol=0, atol=tolerance
    )


def test_implicit_decoding_needs_no_orthogonality_but_a_contraction() -> None:
    z, bases, eps = normal(6, 5), bases_of(5, 3, 2, orthogonal=False), 0.5
    beta = subspace_beta(6, 2, eps)
    time = 4 * 0.3 / beta
    code = structured_flow(z, bases, eps, time, 4)
    torch.testing.assert_close(
        invert_euler(code, bases, eps, time, 4), z, rtol=0, atol=1e-12
    )
    with pytest.raises(ValueError, match="contraction"):
        invert_euler(code, bases, eps, 4 * 1.0 / beta, 4)
    for time, steps in ((0.0, 3), (-1.0, 3), (1.0, 0)):
        with pytest.raises(ValueError, match="time > 0 and steps >= 1"):
            invert_euler(code, bases, eps, time, steps)


@settings(deadline=None, max_examples=20)
@given(token_sets, st.floats(0.01, 0.95), st.integers(1, 20), st.floats(-4, 1))
def test_round_trip_bound(case: dict, c: float, steps: int, log_size: float) -> None:
    z, bases, eps, beta = build(case)
    z = z * 10**log_size
    time = c * steps / beta
    back = structured_flow(
        structured_flow(z, bases, eps, time, steps), bases, eps, -time, steps
    )
    inside = z @ (bases @ bases.mT).sum(0)
    assert float((back - z).norm()) <= (round_trip_bound(c, steps) + 1e-12) * float(
        inside.norm()
    )


def test_vanishing_singular_values_attain_the_round_trip_bound() -> None:
    bases, eps, c, steps = bases_of(4, 1, 2), 0.5, 0.4, 6
    z = 1e-7 * (normal(3, 2) @ bases[0].mT)
    time = c * steps / subspace_beta(3, 2, eps)
    back = structured_flow(
        structured_flow(z, bases, eps, time, steps), bases, eps, -time, steps
    )
    attained = -math.log(float(back.norm() / z.norm()))
    assert math.isclose(attained, math.log1p(round_trip_bound(c, steps)), rel_tol=1e-9)


@pytest.mark.parametrize(("c", "steps"), [(1.0, 3), (-0.1, 3), (0.5, 0)])
def test_round_trip_bound_refuses(c: float, steps: int) -> None:
    with pytest.raises(ValueError):
        round_trip_bound(c, steps)
