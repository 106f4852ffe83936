r"""Live figure *flow*: the structured flow beside the probability flow, on the same
tokens.

Structured: :math:`\dot Z = -\nabla R^c(Z)` in closed form, up to :math:`\beta t = 4`.
Probability flow: down from the noise level of the tokens to a hundredth of it, by
Heun's steps with the exact score.  A token is drawn by the norms of its part in its own
subspace and of the rest.

Book: :ref:`ch-structured-ode`.
"""

import math
from functools import cache
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from crate_core.companion import COLORS, SUBSPACE_COLORS, SUBSPACE_MARKERS
from crate_core.live.parts import (
    LiveFigure,
    Slider,
    State,
    drawn_tokens,
    placed_tokens,
    rounded,
)
from crate_core.theory.denoise import noise_left
from crate_core.theory.diffusion import (
    exact_structured_flow,
    flow_singular_values,
    noise_levels,
    probability_flow_field,
)
from crate_core.theory.integrators import integrate
from crate_core.theory.rate import head_coordinates, subspace_beta

TOKENS = 24
HEADS, RANK = 4, 6
STEPS = 40
LONGEST = 4.0
LOWEST = 0.01


@cache
def inputs() -> dict[str, Any]:
    """Coordinates of each token in its own subspace, and noise; the bases are columns
    of the identity, memberships go round.
    """
    generator = torch.Generator().manual_seed(7)
    # a type of its own: a page may have set another default, which draws other numbers
    codes, noise = drawn_tokens(TOKENS, HEADS, RANK, generator, dtype=torch.float64)
    return {
        "heads": HEADS,
        "rank": RANK,
        "codes": rounded(codes),
        "noise": rounded(noise),
        "steps": STEPS,
        "longest": LONGEST,
        "lowest": LOWEST,
    }


def numbers(state: State) -> dict[str, Any]:
    """Tokens under both flows, singular values and whose they are, noise left."""
    mix, z, clean, labels = placed_tokens(inputs(), state)
    n, dim = z.shape
    beta = subspace_beta(n, RANK, state["eps"])
    sigma = state["noise"] / math.sqrt(dim)
    now = round(STEPS * state["time"])
    levels = noise_levels(sigma, LOWEST * sigma, STEPS)
    path = integrate(probability_flow_field(mix), z, levels, "heun")
    flowed = [
        exact_structured_flow(z, mix.bases, state["eps"], LONGEST * k / STEPS / beta)
        for k in range(STEPS + 1)
    ]
    own = labels == torch.arange(HEADS)[:, None]  # (K, n)
    left, singular, _ = torch.linalg.svd(
        head_coordinates(z, mix.bases), full_matrices=False
    )
    share = (left.square() * own[..., None]).sum(-2)

    def seen(tokens: Tensor) -> list[list[float]]:
        inside = head_coordinates(tokens, mix.bases)[labels, torch.arange(n)].norm(
            dim=-1
        )
        rest = (tokens.square().sum(-1) - inside.square()).clamp_min(0).sqrt()
        return torch.stack([inside, rest], dim=-1).tolist()

    return {
        "beta_time": LONGEST * now / STEPS,
        "sigma": float(levels[now]),
        "start": seen(z),
        "structured": seen(flowed[now]),
        "probability": seen(path[now]),
        "singular": singular.tolist(),
        "singular_now": flow_singular_values(
            singular, beta, LONGEST * now / STEPS / beta
        ).tolist(),
        "own_share": share.tolist(),
        "left_structured": [noise_left(after, z, clean) for after in flowed],
        "left_probability": [noise_left(after, z, clean) for after in path],
    }


def still() -> Figure:
    """The first state."""
    seen = numbers(FIGURE.state)
    figure, axes = plt.subplots(2, 2, figsize=(7.2, 5.6))
    rays = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])
    for ax, name in zip(axes[0], ("structured", "probability"), strict=True):
        for ray in rays:
            ax.plot(*np.stack([0 * ray, 1.6 * ray]).T, color="#BBBBBB", linewidth=1)
        for i, (start, end) in enumerate(zip(seen["start"], seen[name], strict=True)):
            side = 1 if (i // 4) % 2 == 0 else -1
            turned = np.array([rays[i % 4], side * rays[(i + 1) % 4]])
            ax.plot(*(np.array([start, end]) @ turned).T, color="#777777", linewidth=1)
            mark, colour = SUBSPACE_MARKERS[i % 4], SUBSPACE_COLORS[i % 4]
            ax.plot(*(end @ turned), mark, color=colour)
        ax.set(aspect="equal", xlim=(-1.6, 1.6), ylim=(-1.4, 1.4))
        ax.set_title(f"{name} flow")
        ax.axis("off")
    order = np.argsort(-np.ravel(seen["singular"]))
    shares = np.ravel(seen["own_share"])[order]
    places = np.arange(len(order))
    for mine, colour, words in (
        (shares > 0.5, COLORS["exact"], "own signal"),
        (shares <= 0.5, COLORS["mssa"], "noise of others"),
    ):
        before = np.ravel(seen["singular"])[order][mine]
        after = np.ravel(seen["singular_now"])[order][mine]
        axes[1, 0].bar(places[mine], before, color=colour, alpha=0.25)
        axes[1, 0].bar(places[mine], after, color=colour, label=words)
    axes[1, 0].set(title="singular values, structured flow", xticks=[])
    axes[1, 0].legend()
    clock = np.linspace(0, 1, STEPS + 1)
    for name, line, colour in (
        ("structured", "-", COLORS["exact"]),
        ("probability", "--", COLORS["tweedie"]),
    ):
        axes[1, 1].plot(clock, seen[f"left_{name}"], line, color=colour, label=name)
    axes[1, 1].axvline(FIGURE.state["time"], color="black", linewidth=0.8)
    axes[1, 1].set(title="noise left", xlabel="share of the way", ylim=(0, 1.5))
    axes[1, 1].legend()
    return figure


FIGURE = LiveFigure(
    name="flow",
    title="Structured flow beside probability flow: move the time",
    alt=(
        "Two pictures of tokens moving: under the structured flow they come nearer to "
        "the rays of their subspaces and also slide towards the origin; under the "
        "probability flow they come to rest on the rays. Below: singular values of "
        "noise shrink before those of the signal; the noise left under the structured "
        "flow falls, then rises, under the probability flow it falls and stays."
    ),
    script="flow.js",  # crate_core/live/flow.js
    controls=(
        Slider("time", "Time (share of the way)", 0.0, 1.0, 0.2, STEPS, play=True),
        Slider("tokens", "Number of tokens n", 1, TOKENS, 8, TOKENS - 1, whole=True),
        Slider("noise", "Noise ν (its norm)", 0.02, 2.0, 0.4, 60, log=True),
        Slider("eps", "Precision ε", 0.02, 5.0, 0.4, 60, log=True),
    ),
    inputs=inputs,
    numbers=numbers,
    still=still,
)
