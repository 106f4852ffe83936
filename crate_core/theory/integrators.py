"""One interface for solving ordinary differential equations: fixed steps of order 1, 2
and 4, and an adaptive method.

Book: :ref:`ch-diffusion`.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from crate_core.checks import check_numbers, check_tensor

Field = Callable[[float, Tensor], Tensor]
"""Right-hand side of an ODE, ``field(t, z) = dz/dt``, with the shape of z."""


def _euler_step(field: Field, t: float, z: Tensor, h: float) -> Tensor:
    return z + h * field(t, z)


def _heun_step(field: Field, t: float, z: Tensor, h: float) -> Tensor:
    first = field(t, z)
    return z + h / 2 * (first + field(t + h, z + h * first))


def _rk4_step(field: Field, t: float, z: Tensor, h: float) -> Tensor:
    k1 = field(t, z)
    k2 = field(t + h / 2, z + h / 2 * k1)
    k3 = field(t + h / 2, z + h / 2 * k2)
    k4 = field(t + h, z + h * k3)
    return z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


_STEPS = {"euler": _euler_step, "heun": _heun_step, "rk4": _rk4_step}

METHODS = (*_STEPS, "dop853")
"""Names that :func:`integrate` accepts; the fixed-step ones have order 1, 2 and 4."""


def _dop853(field: Field, z: Tensor, times: list[float]) -> Tensor:
    """SciPy's DOP853, reported at every time; tolerances near the rounding of z's dtype
    (else it chases noise).
    """

    def flat_field(t: float, flat: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(flat).reshape(z.shape).to(z)
        return field(t, state).double().cpu().numpy().ravel()

    tolerance = 450 * torch.finfo(z.dtype).eps
    start = z.detach().double().cpu().numpy().ravel()
    # here, because scipy would double the time of `import crate_core`
    from scipy.integrate import solve_ivp

    solution = solve_ivp(
        flat_field,
        (times[0], times[-1]),
        start,
        method="DOP853",
        t_eval=times,
        rtol=tolerance,
        atol=tolerance,
    )
    if not solution.success:
        raise RuntimeError(
            "DOP853 stopped at t = "
            f"{solution.t[-1] if solution.t.size else times[0]}: {solution.message}"
        )
    return torch.from_numpy(solution.y.T.copy()).reshape(len(times), *z.shape).to(z)


def check_method(method: str) -> None:
    """Raise ``ValueError`` unless a method of :func:`integrate` has this name."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")


def integrate(
    field: Field, z: Tensor, times: Sequence[float] | Tensor, method: str = "euler"
) -> Tensor:
    r"""Solve :math:`\dot z = f(t, z)` from ``times[0]`` on and return the whole path.

    Parameters
    ----------
    field : callable, ``field(t, z)`` returns dz/dt with the shape of z.
    z : tensor of any shape, the state at ``times[0]``.
    times : T >= 2 numbers, strictly increasing or strictly decreasing; decreasing times
        integrate backwards.
    method : ``"euler"`` (order 1), ``"heun"`` (2) or ``"rk4"`` (4), one step from each
        time to the next; or ``"dop853"``, SciPy's adaptive method of order 8, for which
        ``times`` is only where the path is reported; both its tolerances are 450
        machine epsilons of z's dtype, 1e-13 in float64.

    Returns
    -------
    tensor (T, ...), the state at each time, ``z`` itself first.

    Raises
    ------
    ValueError
        For an unknown method or times that are not strictly monotone.
    RuntimeError
        If the adaptive method cannot keep its tolerance.

    Book: :ref:`ch-diffusion`.
    """
    check_method(method)
    check_tensor("z", z)
    if not callable(field):
        raise TypeError(f"field must be a function of t and z, got {field!r}")
    check_numbers("times", times)
    times = [float(t) for t in times]
    steps = [after - before for before, after in pairwise(times)]
    if not steps or not (all(h > 0 for h in steps) or all(h < 0 for h in steps)):
        raise ValueError(
            "times must be at least two numbers, strictly increasing or decreasing, "
            f"got {times}"
        )
    if method == "dop853":
        return _dop853(field, z, times)
    path = [z]
    for t, h in zip(times, steps, strict=False):
        path.append(_STEPS[method](field, t, path[-1], h))
    return torch.stack(path)
