r"""Live figure *attention*: softmax attention as a gate, beside the exact step.

Tokens near four mutually orthogonal subspaces of dimension 16 that fill 64 dimensions,
and one full step: against the gradient, :math:`Z - \nabla R^c(Z)/\beta`, or by
attention,
:math:`\sum_k U_k V_k A_k`.

Book: :ref:`ch-attention`.
"""

from functools import cache
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from crate_core.companion import COLORS
from crate_core.live.parts import (
    LiveFigure,
    Slider,
    State,
    drawn_tokens,
    placed_tokens,
    rounded,
)
from crate_core.model.attention import attention_weights, mssa_step
from crate_core.theory.denoise import noise_left
from crate_core.theory.mixture import LowRankGaussianMixture
from crate_core.theory.rate import head_coordinates, subspace_beta

TOKENS = 128
HEADS, RANK = 4, 16


@cache
def inputs() -> dict[str, Any]:
    """Coordinates of each token in its own subspace, and noise; the bases are columns
    of the identity, memberships go round.
    """
    generator = torch.Generator().manual_seed(5)
    # a type of its own: a page may have set another default, which draws other numbers
    codes, noise = drawn_tokens(TOKENS, HEADS, RANK, generator, dtype=torch.float32)
    return {
        "heads": HEADS,
        "rank": RANK,
        "codes": rounded(codes, 2),
        "noise": rounded(noise, 2),
    }


def tokens_of(state: State) -> tuple[LowRankGaussianMixture, Tensor, Tensor, Tensor]:
    """Mixture, tokens, clean tokens and labels, sorted by subspace."""
    mix, z, clean, labels = placed_tokens(inputs(), state)
    order = labels.argsort(stable=True)
    return mix, z[order], clean[order], labels[order]


def numbers(state: State) -> dict[str, Any]:
    """Weights of head 1, and of both steps the gains and the noise left."""
    mix, z, clean, labels = tokens_of(state)
    n = len(z)
    beta = subspace_beta(n, RANK, state["eps"])
    v = head_coordinates(z, mix.bases)
    own = labels == torch.arange(HEADS)[:, None]  # (K, n)
    steps = {
        name: mssa_step(
            z,
            mix.bases,
            state["eps"],
            1 / beta,
            scale=state["scale"],
            exact=name == "exact",
        )
        for name in ("exact", "attention")
    }

    def gains(after: Tensor) -> list[float]:
        kept = (head_coordinates(after, mix.bases) * v).sum(-1)
        present = v.square().sum(-1)
        return [
            float(kept[heads].sum() / present[heads].sum()) for heads in (own, ~own)
        ]

    return {
        "load": n / (HEADS * RANK),
        "weights": attention_weights(v, state["scale"])[0].tolist(),
        "gains": {name: gains(after) for name, after in steps.items()},
        "left": {name: noise_left(after, z, clean) for name, after in steps.items()},
    }


def still() -> Figure:
    """The first state."""
    seen = numbers(FIGURE.state)
    figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.7), width_ratios=[1.1, 1, 1])
    axes[0].imshow(np.cbrt(seen["weights"]), cmap="Blues", vmin=0)
    axes[0].set(title="weights of head 1 (cube root)", xlabel="averaged token")
    axes[0].grid(False)
    names = ("unchanged", "exact", "attention")
    colours = (COLORS["noise"], COLORS["exact"], COLORS["mssa"])
    gains = [[1.0, 1.0], seen["gains"]["exact"], seen["gains"]["attention"]]
    left = [1.0, seen["left"]["exact"], seen["left"]["attention"]]
    for i, (name, colour) in enumerate(zip(names, colours, strict=True)):
        places = [i / 4 - 0.25, i / 4 + 0.75]
        axes[1].bar(places, gains[i], width=0.22, color=colour, label=name)
        axes[2].bar(i, left[i], width=0.6, color=colour)
    axes[1].set_xticks([0, 1], ["own head", "other heads"])
    axes[1].set(title="kept of a token's part in")
    axes[2].set_xticks(range(3), names)
    axes[2].set(title="noise left")
    return figure


FIGURE = LiveFigure(
    name="attention",
    title="Attention as a gate: move its scale and the number of tokens",
    alt=(
        "Left: the attention weights of one head, a bright diagonal for the tokens of "
        "its own subspace and even weights for all others. Middle: attention keeps "
        "most of a token's part in its own head and little of the parts in other "
        "heads. Right: the noise left by the exact step and by attention, beside "
        "unchanged tokens."
    ),
    script="attention.js",  # crate_core/live/attention.js
    controls=(
        Slider("scale", "Scale α of the softmax", 0.25, 256.0, 12.0, 60, log=True),
        Slider(
            "tokens",
            "Number of tokens n",
            4,
            TOKENS,
            96,
            TOKENS - 4,
            digits=3,
            whole=True,
        ),
        Slider("noise", "Noise ν (its norm)", 0.02, 2.0, 0.4, 60, log=True),
        Slider("eps", "Precision ε (exact step)", 0.02, 5.0, 0.4, 60, log=True),
    ),
    inputs=inputs,
    numbers=numbers,
    still=still,
)
