"""The integrators: orders by regression on a problem with a known solution, the
adaptive tolerance, paths, refusals.
"""

import math

import numpy as np
import pytest
import torch

from crate_core.theory.integrators import METHODS, integrate

ORDERS = {"euler": 1, "heun": 2, "rk4": 4}


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )


@pytest.mark.parametrize("method", ORDERS)
def test_order_on_a_problem_with_a_known_solution(method: str) -> None:
    z = normal(5, 3)

    def field(t: float, state: torch.Tensor) -> torch.Tensor:
        return -2 * t * state + math.exp(-(t**2))  # solved by (z + t) exp(-t^2)

    counts = [16, 32, 64, 128]
    exact = (z + 1.5) * math.exp(-(1.5**2))
    errors = [
        float(
            (integrate(field, z, torch.linspace(0, 1.5, n + 1), method)[-1] - exact)
            .abs()
            .max()
        )
        for n in counts
    ]
    assert abs(-np.polyfit(np.log(counts), np.log(errors), 1)[0] - ORDERS[method]) < 0.2


def test_adaptive_method_reaches_its_tolerance_at_every_reported_time() -> None:
    z, times = normal(2, 3), [0.0, 0.1, 1.0, 2.5]
    path = integrate(lambda t, state: -2 * t * state, z, times, "dop853")
    exact = torch.stack([z * math.exp(-(t**2)) for t in times])
    torch.testing.assert_close(path, exact, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_path_starts_at_the_state_and_has_one_entry_a_time(method: str) -> None:
    z = normal(2, 4, 3).float()
    path = integrate(lambda t, state: -state, z, [1.0, 0.5, 0.0], method)
    assert path.shape == (3, 2, 4, 3)
    assert path.dtype == torch.float32
    torch.testing.assert_close(path[0], z)
    # decreasing times: the decay runs backwards
    assert (path[-1].abs() > z.abs()).all()


def test_integrate_refuses_bad_times_and_methods() -> None:
    z = normal(2)
    for times in ([0.0], [], [0.0, 1.0, 1.0], [0.0, 1.0, 0.5]):
        with pytest.raises(ValueError, match="strictly increasing or decreasing"):
            integrate(lambda t, state: state, z, times)
    with pytest.raises(ValueError, match="'rk45'"):
        integrate(lambda t, state: state, z, [0.0, 1.0], "rk45")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_adaptive_method_says_where_it_stopped() -> None:
    with pytest.raises(RuntimeError, match="DOP853 stopped"):
        integrate(
            lambda t, state: state**2,
            torch.ones(1, dtype=torch.float64),
            [0.0, 2.0],
            "dop853",
        )
