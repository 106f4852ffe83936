r"""Live figure *window*: where compression denoises, by the random-matrix law.

The law's cosine between the gradient of R^c and the noise against the load n/(Kp), and
two maps of it, over load and noise and over load and precision, with the reader's
point.

Book: :ref:`ch-compression-denoising`.
"""

import math
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from crate_core.companion import COLORS
from crate_core.live.parts import Choice, LiveFigure, Slider, State
from crate_core.theory.law import denoising_cosine_law

SIZES = {"base": (768, 12, 64), "small": (192, 12, 16), "first": (24, 4, 6)}
LOADS = (1 / 64, 8.0)
NOISES = (1e-3, 10.0)
PRECISIONS = (1e-3, 10.0)
CURVE, COLUMNS, ROWS = 60, 28, 24


def inputs() -> dict[str, Any]:
    """Sizes d, K, p, and the ranges of the three axes."""
    return {
        "sizes": {name: list(size) for name, size in SIZES.items()},
        "loads": list(LOADS),
        "noises": list(NOISES),
        "precisions": list(PRECISIONS),
        "curve": CURVE,
        "columns": COLUMNS,
        "rows": ROWS,
    }


def even_ratio(ends: tuple[float, float], count: int) -> list[float]:
    """``count`` numbers of even ratio, in the middle of as many intervals."""
    low, high = ends
    return [low * (high / low) ** ((i + 0.5) / count) for i in range(count)]


def numbers(state: State) -> dict[str, Any]:
    """The law at the reader's point, along the load, and on both maps."""
    dim, heads, rank = SIZES[state["size"]]

    def law(n: int, noise: float, eps: float) -> float:
        return denoising_cosine_law(n, dim, heads, rank, noise / math.sqrt(dim), eps)

    def tokens(load: float) -> int:
        return max(1, math.floor(load * heads * rank + 0.5))

    n, noise, eps = state["tokens"], state["noise"], state["eps"]
    loads = even_ratio(LOADS, COLUMNS)
    return {
        "load": n / (heads * rank),
        "law": law(n, noise, eps),
        "curve": [law(tokens(x), noise, eps) for x in even_ratio(LOADS, CURVE)],
        "noise_map": [
            [law(tokens(x), y, eps) for x in loads] for y in even_ratio(NOISES, ROWS)
        ],
        "eps_map": [
            [law(tokens(x), noise, y) for x in loads]
            for y in even_ratio(PRECISIONS, ROWS)
        ],
        "window": [noise, rank * noise / n],
    }


def still() -> Figure:
    """The first state."""
    state = FIGURE.state
    seen = numbers(state)
    figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.8))
    loads = even_ratio(LOADS, CURVE)
    axes[0].semilogx(loads, seen["curve"], color=COLORS["exact"])
    ceiling = [math.sqrt(max(0.0, 1 - load)) for load in loads]
    axes[0].semilogx(loads, ceiling, "--", color="black", linewidth=1)
    axes[0].plot(seen["load"], seen["law"], "o", color=COLORS["mssa"])
    axes[0].set(xlabel="load n/(Kp)", title="cosine, by the law", ylim=(0, 1))
    for ax, name, ends in (
        (axes[1], "noise", NOISES),
        (axes[2], "eps", PRECISIONS),
    ):
        x, y = np.array(even_ratio(LOADS, COLUMNS)), np.array(even_ratio(ends, ROWS))
        shown = np.array(seen[f"{name}_map"])
        ax.pcolormesh(
            *(x, y, shown),
            cmap="Blues",
            vmin=0,
            vmax=1,
            shading="nearest",
            rasterized=True,
        )
        lines = ax.contour(x, y, shown, levels=[0.5, 0.9], colors="black")
        ax.clabel(lines, fontsize=8)
        ax.plot(seen["load"], state[name], "o", color=COLORS["mssa"])
        ax.set(xscale="log", yscale="log", xlabel="load n/(Kp)")
        ax.set_title("noise ν" if name == "noise" else "precision ε")
    return figure


FIGURE = LiveFigure(
    name="window",
    title="The window: where compression denoises",
    alt=(
        "Left: the cosine between gradient and noise falls with the load, from near 1 "
        "with few tokens to near 0 above one token per dimension. Middle and "
        "right: maps "
        "of the cosine over load and noise, and over load and precision: a dark region "
        "at small load, between too little and too much, with your point in it."
    ),
    script="window.js",  # crate_core/live/window.js
    controls=(
        Choice(
            "size",
            "Sizes d, K, p",
            (
                ("base", "768, 12, 64 (Base)"),
                ("small", "192, 12, 16"),
                ("first", "24, 4, 6"),
            ),
            "base",
        ),
        Slider("tokens", "Number of tokens n", 1, 6144, 196, 120, True, 4, whole=True),
        Slider("noise", "Noise ν (its norm)", 1e-3, 10.0, 0.1, 80, log=True),
        Slider("eps", "Precision ε", 1e-3, 10.0, 0.1, 80, log=True),
    ),
    inputs=inputs,
    numbers=numbers,
    still=still,
)
