r"""Live figure *denoise and compress*: the posterior mean and a step against the
gradient of R^c on the same tokens.

Tokens live near two lines of the plane, or near four subspaces of dimension 6 in 24
dimensions.  There each token is drawn in the plane of its own clean part and its noise:
along the ray of its subspace :math:`\|U_k U_k^\top z\|`, across it :math:`\|z - U_k
U_k^\top z\|`, and an arrow by its components in these two directions.

Book: :ref:`ch-compression-denoising`.
"""

import math
from functools import cache
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from torch import Tensor

from crate_core.companion import COLORS, SUBSPACE_COLORS, SUBSPACE_MARKERS
from crate_core.live.parts import Choice, LiveFigure, Slider, State, as_tensor, rounded
from crate_core.theory.denoise import noise_left
from crate_core.theory.law import denoising_cosine
from crate_core.theory.mixture import LowRankGaussianMixture
from crate_core.theory.rate import subspace_beta, subspace_coding_rate_grad

TOKENS = 72
SLANT = math.radians(40)


@cache
def inputs() -> dict[str, Any]:
    """Bases, clean tokens and noise of each space; memberships go round."""
    generator = torch.Generator().manual_seed(3)
    spaces = {}
    for name, bases in (
        ("plane", [[[1.0], [0.0]], [[0.0], [1.0]]]),
        ("slanted", [[[1.0], [0.0]], [[math.cos(SLANT)], [math.sin(SLANT)]]]),
        ("many", torch.eye(24).reshape(24, 4, 6).permute(1, 0, 2).tolist()),
    ):
        mix = LowRankGaussianMixture(as_tensor(bases))
        labels = torch.arange(TOKENS) % mix.components
        sample = mix.sample(TOKENS, 0.0, labels=labels, generator=generator)
        coordinates = (sample.clean[:, None, :] @ mix.bases[labels])[:, 0]
        noise = torch.randn(TOKENS, mix.dim, generator=generator, dtype=torch.float64)
        spaces[name] = {
            "bases": bases,
            "codes": rounded(coordinates, 2),
            "noise": rounded(noise, 2),
        }
    return spaces


def tokens_of(state: State) -> tuple[LowRankGaussianMixture, Tensor, Tensor, Tensor]:
    """Mixture, tokens (n, d), clean tokens and labels at a state of the controls; what
    the reader has dragged is where it was put.
    """
    space = inputs()[state["space"]]
    mix = LowRankGaussianMixture(as_tensor(space["bases"]))
    n = state["tokens"]
    labels = torch.arange(n) % mix.components
    codes = as_tensor(space["codes"])[:n]
    clean = (mix.bases[labels] @ codes[:, :, None])[..., 0]
    sigma = state["noise"] / math.sqrt(mix.dim)
    z = clean + sigma * as_tensor(space["noise"])[:n]
    for index, (along, across) in state["moved"].items():
        i = int(index)
        if i < n:
            own, normal = frame(z[i], mix.bases[labels[i]])
            z[i] = along * own + across * normal
    return mix, z, clean, labels


def frame(z: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors of a token's part in its own subspace and of the rest; in the plane
    the line's own direction and its normal.
    """
    if len(z) == 2:
        own = basis[:, 0]
        return own, torch.stack([-own[1], own[0]])
    inside = basis @ (basis.mT @ z)
    return inside / inside.norm(), (z - inside) / (z - inside).norm()


def numbers(state: State) -> dict[str, Any]:
    """Tokens, both arrows in the token's own plane, and their cosines."""
    mix, z, clean, labels = tokens_of(state)
    n = len(z)
    sigma, eps = state["noise"] / math.sqrt(mix.dim), state["eps"]
    beta = subspace_beta(n, mix.rank, eps)
    denoised = mix.denoise(z, sigma) - z
    compressed = -subspace_coding_rate_grad(z, mix.bases, eps) / beta
    frames = torch.stack(
        [torch.stack(frame(z[i], mix.bases[labels[i]])) for i in range(n)]
    )

    def seen(vectors: Tensor) -> list[list[float]]:
        return (frames @ vectors[..., None])[..., 0].tolist()

    return {
        "load": n / (mix.components * mix.rank),
        "tokens": seen(z),
        "denoised": seen(denoised),
        "compressed": seen(compressed),
        "cosine": torch.cosine_similarity(denoised, compressed, dim=-1).tolist(),
        "to_own_subspace": float(denoising_cosine(z, mix.bases, labels, eps).mean()),
        "left_denoised": noise_left(z + denoised, z, clean),
        "left_compressed": noise_left(z + compressed, z, clean),
    }


def still() -> Figure:
    """The first state."""
    seen = numbers(FIGURE.state)
    figure, ax = plt.subplots(figsize=(5.4, 4.2))
    rays = [(1, 0), (0, 1), (-1, 0), (0, -1)]
    for x, y in rays:
        ax.plot([0, 2 * x], [0, 2 * y], color="#BBBBBB", linewidth=1)
    for i, token in enumerate(seen["tokens"]):
        x, y = rays[i % 4]
        side = 1 if (i // 4) % 2 == 0 else -1
        turned = np.array([[x, y], [-side * y, side * x]])
        start = token @ turned
        for name, colour, width in (
            ("denoised", COLORS["tweedie"], 3.0),
            ("compressed", "black", 1.2),
        ):
            end = start + seen[name][i] @ turned
            props = {"arrowstyle": "->", "color": colour, "linewidth": width}
            props |= {"shrinkA": 0, "shrinkB": 0}
            ax.annotate("", xy=tuple(end), xytext=tuple(start), arrowprops=props)
        ax.plot(*start, SUBSPACE_MARKERS[i % 4], color=SUBSPACE_COLORS[i % 4])
    ax.set(aspect="equal", xlim=(-1.7, 1.7), ylim=(-1.5, 1.5))
    ax.axis("off")
    marks = [
        Line2D([], [], color=COLORS["tweedie"], linewidth=3.0),
        Line2D([], [], color="black", linewidth=1.2),
    ]
    words = ["to the posterior mean", "against the gradient of $R^c$"]
    figure.legend(marks, words, loc="outside lower center", ncols=2)
    return figure


FIGURE = LiveFigure(
    name="denoise-compress",
    title="Denoise and compress: tokens that you can drag",
    alt=(
        "Tokens near the rays of their subspaces. From each starts an arrow to its "
        "posterior mean, which leads to the ray, and an arrow against the gradient of "
        "the rate of compression, which leads there too while tokens are few."
    ),
    script="denoise_compress.js",  # crate_core/live/denoise_compress.js
    controls=(
        Choice(
            "space",
            "Where the tokens live",
            (
                ("plane", "2 lines at a right angle"),
                ("slanted", "2 lines at 40°"),
                ("many", "4 subspaces, 24 dimensions"),
            ),
            "many",
        ),
        Slider(
            "tokens",
            "Number of tokens n",
            1,
            TOKENS,
            8,
            TOKENS - 1,
            digits=3,
            whole=True,
        ),
        Slider("noise", "Noise ν (its norm)", 0.02, 2.0, 0.4, 60, log=True),
        Slider("eps", "Precision ε", 0.02, 5.0, 0.4, 60, log=True),
    ),
    inputs=inputs,
    numbers=numbers,
    still=still,
    moved=(("moved", {}), ("chosen", 0)),
)
