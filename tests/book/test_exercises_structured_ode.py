"""The numbers in the solutions of the chapter on the structured ODE, on random
instances."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_core.theory.diffusion import (
    exact_structured_flow,
    flow_singular_values,
    structured_flow,
)
from crate_core.theory.mixture import random_bases
from crate_core.theory.rate import subspace_coding_rate

F64 = torch.float64
seeds = st.integers(0, 2**31)


def problem(seed: int, n: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (n, 8) and three orthogonal planes of R^8."""
    g = torch.Generator().manual_seed(seed)
    bases = random_bases(8, 3, 2, generator=g).to(F64)
    bases = torch.linalg.qr(bases.permute(1, 0, 2).reshape(8, 6)).Q
    bases = bases.reshape(8, 3, 2).permute(1, 0, 2).contiguous()
    return torch.randn(n, 8, generator=g, dtype=F64), bases


@given(st.floats(0.1, 20), st.floats(0.05, 3), st.floats(0.01, 0.99))
def test_time_between_two_singular_values(beta, start, share):
    """ex-sode-time: beta t = log(s0 / s1) + beta (s0^2 - s1^2) / 2."""
    end = share * start
    time = (math.log(start / end) + beta * (start**2 - end**2) / 2) / beta
    found = flow_singular_values(torch.tensor(start, dtype=F64), beta, time)
    assert float(found) == pytest.approx(end, rel=1e-9)


def test_the_figures_of_the_time_exercise():
    above = 0.5 * math.log(100) + 0.5 * 99
    below = 5 + 0.5 * (1 - math.exp(-10))
    assert round(above, 1) == 51.8
    assert round(below, 1) == 5.5
    assert round(above / (above + below), 2) == 0.90
    stopped = flow_singular_values(torch.tensor(10.0, dtype=F64), 1.0, math.log(100))
    assert 0.085 < 1 - float(stopped) ** 2 / 100 < 0.095


@given(seeds, st.floats(0.05, 1.95))
def test_a_layer_below_two_lowers_the_rate(seed, c):
    """ex-sode-descent."""
    z, bases = problem(seed)
    beta = 2 / (6 * 0.5**2)
    after = structured_flow(z, bases, 0.5, c / beta, 1)
    assert subspace_coding_rate(after, bases, 0.5) < subspace_coding_rate(z, bases, 0.5)


@given(seeds, st.floats(2.1, 4))
def test_a_layer_above_two_raises_the_rate_of_small_tokens(seed, c):
    """ex-sode-descent: growth if beta s^2 < c / 2 - 1."""
    z, bases = problem(seed)
    beta = 2 / (6 * 0.5**2)
    largest = torch.linalg.matrix_norm(z, 2)
    z = z / largest * math.sqrt(0.9 * (c / 2 - 1) / beta)
    after = structured_flow(z, bases, 0.5, c / beta, 1)
    assert subspace_coding_rate(after, bases, 0.5) > subspace_coding_rate(z, bases, 0.5)


@given(st.floats(0.1, 20), st.floats(0.05, 3))
def test_a_precision_that_follows_raises_the_rate_at_the_current_precision(beta, s):
    """ex-sode-descent: along it beta s^2 grows, while s falls."""
    energies, sizes = [], []
    for fall in np.linspace(0, 2, 201):
        energies.append(beta * math.exp(2 * fall) * s**2)
        sizes.append(s)
        s *= math.exp(-0.01 / (1 + energies[-1]))
    assert np.all(np.diff(energies) > 0)
    assert np.all(np.diff(sizes) < 0)


@given(seeds, st.floats(0.01, 2))
def test_twins_halve_the_speed(seed, time):
    """ex-sode-duplicates."""
    z, bases = problem(seed)
    twins = exact_structured_flow(torch.cat([z, z]), bases, 0.5, 2 * time)
    alone = exact_structured_flow(z, bases, 0.5, time)
    torch.testing.assert_close(twins, torch.cat([alone, alone]))


@settings(deadline=None, max_examples=5)
@given(seeds)
def test_heun_closes_the_round_trip_faster(seed):
    """ex-sode-heun: at equal numbers of gradients."""
    z, bases = problem(seed)
    time = 4 * (6 * 0.5**2) / 2

    def error(method: str, steps: int) -> float:
        code = structured_flow(z, bases, 0.5, time, steps, method)
        back = structured_flow(code, bases, 0.5, -time, steps, method)
        return float((back - z).norm())

    assert error("heun", 32) < error("euler", 64)


@settings(deadline=None, max_examples=5)
@given(seeds)
def test_a_tilt_changes_the_flow_to_first_order(seed):
    """thm-sode-closed needs orthogonal subspaces: a tilt has an effect of order one."""
    z, bases = problem(seed)
    g = torch.Generator().manual_seed(seed + 1)
    nudge = torch.randn(bases.shape, generator=g, dtype=F64)
    still = structured_flow(z, bases, 0.5, 1.0, 1, "dop853")
    changes = [
        float(
            (
                structured_flow(
                    z, torch.linalg.qr(bases + t * nudge).Q, 0.5, 1.0, 1, "dop853"
                )
                - still
            ).norm()
        )
        for t in (1e-4, 2e-4)
    ]
    assert changes[1] / changes[0] == pytest.approx(2, rel=0.02)


def test_the_worst_error_over_the_decoders_step():
    """thm-sode-round-trip: no single step of the decoder serves all singular values."""

    def worst(own: float) -> tuple[float, float]:
        s = s0 = np.logspace(-4, 3, 4000)
        for _ in range(12):
            s = s * (1 - 1 / 3 / (1 + s * s))
        for _ in range(12):
            s = s * (1 + own / (1 + s * s))
        error = np.log(s / s0)
        return float(-error.min()), float(error.max())

    assert round(worst(1 / 3)[0], 2) == 1.41
    assert round(worst(1 / 2)[1], 2) == 0.29
    assert abs(worst(0.47)[0] - worst(0.47)[1]) < 0.01
    assert round(worst(0.47)[1], 2) == 0.24

    def worst_of_signal(own: float) -> float:
        s = s0 = np.logspace(0.5, 3, 4000)  # beta s^2 >= 10
        for _ in range(12):
            s = s * (1 - 1 / 3 / (1 + s * s))
        for _ in range(12):
            s = s * (1 + own / (1 + s * s))
        return float(np.abs(np.log(s / s0)).max())

    assert worst_of_signal(1 / 3) < worst_of_signal(0.47) < worst_of_signal(1 / 2)


@given(st.floats(0.01, 0.88), st.integers(1, 40), st.floats(-5, 4))
def test_a_step_of_its_own_restores_within_its_bound(c, depth, log_size):
    """thm-sode-round-trip, part 2: between the start and 3/4 L c c' above it."""
    own = c / (1 - c)
    s = start = 10 ** (log_size / 2)
    for _ in range(depth):
        s *= 1 - c / (1 + s * s)
    for _ in range(depth):
        s *= 1 + own / (1 + s * s)
    assert -1e-9 <= math.log(s / start) <= 0.75 * depth * c * own + 1e-9
