r"""Live figure *ISTA*: one proximal step on the nonnegative lasso, in the plane of two
codes.

.. math:: F(a) = \tfrac12 \|z - D a\|^2 + \lambda \|a\|_1, \quad a \ge 0, \qquad
          a^+ = \mathrm{ReLU}\big(a + \eta D^\top (z - D a) - \eta\lambda\big)

for a dictionary of two unit atoms at an angle.

Book: :ref:`ch-ista`.
"""

import math
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

from crate_core.companion import COLORS
from crate_core.live.parts import LiveFigure, Slider, State, as_tensor
from crate_core.model.sparsify import lasso_objective, proximal_step

STEPS = 12


def inputs() -> dict[str, Any]:
    """The token, and how many steps are followed."""
    return {"token": [1.3, 0.9], "steps": STEPS}


def dictionary_of(state: State) -> torch.Tensor:
    """Two unit atoms as columns, the first along the first axis."""
    angle = math.radians(state["angle"])
    return as_tensor([[1.0, math.cos(angle)], [0.0, math.sin(angle)]])


def numbers(state: State) -> dict[str, Any]:
    """The steps from the start, the objective at each, and the largest eta that is
    sure to go down, 2 / |D|^2.
    """
    dictionary = dictionary_of(state)
    z = as_tensor([inputs()["token"]])
    path = [as_tensor([state["start"]])]
    for _ in range(STEPS):
        path.append(
            proximal_step(path[-1], z, dictionary, state["eta"], state["lambd"])
        )
    largest = float(torch.linalg.matrix_norm(dictionary, ord=2) ** 2)
    sizes = [0.05 * k for k in range(1, 61)]
    after = [
        proximal_step(path[0], z, dictionary, eta, state["lambd"]) for eta in sizes
    ]
    return {
        "along": [
            [eta, float(lasso_objective(codes, z, dictionary, state["lambd"]))]
            for eta, codes in zip(sizes, after, strict=True)
        ],
        "path": [codes[0].tolist() for codes in path],
        "objective": [
            float(lasso_objective(codes, z, dictionary, state["lambd"]))
            for codes in path
        ],
        "safe": 2 / largest,
        "residual": float((z - path[1] @ dictionary.mT).norm()),
    }


def still() -> Figure:
    """The first state."""
    state = FIGURE.state
    seen = numbers(state)
    figure, (ax, along) = plt.subplots(1, 2, figsize=(7.2, 3.6), width_ratios=[1.2, 1])
    axis = np.linspace(0, 2.2, 120)
    codes = as_tensor(np.stack(np.meshgrid(axis, axis), axis=-1).tolist())
    z = as_tensor([inputs()["token"]])
    height = lasso_objective(codes[..., None, :], z, dictionary_of(state), 0.2)
    ax.contour(axis, axis, height, levels=14, colors="#999999", linewidths=0.8)
    path = np.array(seen["path"])
    ax.plot(*path.T, ".--", color=COLORS["ista"], linewidth=1)
    ax.annotate(
        "",
        xy=tuple(path[1]),
        xytext=tuple(path[0]),
        arrowprops={"arrowstyle": "->", "linewidth": 2.4, "shrinkA": 0, "shrinkB": 0},
    )
    ax.plot(*path[0], "o", color="black")
    ax.axvspan(-0.5, 0, color="#DDDDDD")
    ax.axhspan(-0.5, 0, color="#DDDDDD")
    ax.set(xlim=(-0.5, 2.2), ylim=(-0.5, 2.2), aspect="equal")
    ax.set(xlabel="code of atom 1", ylabel="code of atom 2")
    ax.grid(False)
    sizes, heights = zip(*seen["along"], strict=True)
    along.plot(sizes, heights, color=COLORS["exact"])
    along.axhline(seen["objective"][0], color="black", linewidth=1, linestyle="--")
    along.axvline(seen["safe"], color=COLORS["bad"], linestyle=":")
    along.plot(state["eta"], seen["objective"][1], "o", color=COLORS["exact"])
    along.set(xlabel="step size η", ylabel="objective after one step", ylim=(0, 3))
    return figure


FIGURE = LiveFigure(
    name="ista",
    title="One ISTA step in the plane: move eta, lambda and the start",
    alt=(
        "Contours of the lasso objective over two nonnegative codes. A step leads from "
        "the start down to a point nearer to the minimum; further steps follow it. "
        "The region of negative codes is shaded: there the objective is infinite. "
        "Right: the objective after one step against the step size; it falls, then "
        "rises, and is sure to be lower only up to a dotted line."
    ),
    script="ista.js",  # crate_core/live/ista.js
    controls=(
        Slider("eta", "Step size η", 0.02, 3.0, 0.3, 149),
        Slider("lambd", "Weight λ of the penalty", 0.0, 2.0, 0.2, 100),
        Slider(
            "angle", "Angle between the atoms", 10, 170, 60, 160, digits=3, unit="°"
        ),
    ),
    inputs=inputs,
    numbers=numbers,
    still=still,
    moved=(("start", [0.3, 1.8]),),
)
