r"""Live figure *layer*: tokens through compress and sparsify, layer after layer, and
back through the decoder.

Tokens are :math:`Q a` plus noise, with nonnegative sparse codes a in the block of their
own subspace and Q = [U_1 ... U_K].  The layers have the true subspaces and the true
dictionary:
:math:`D = Q` in the first, the identity after it, step size 1.  The decoder takes the
same halves back: :math:`V = D Y`, :math:`(1 + \kappa\beta) V -
\kappa\,\mathrm{MSSA}(V)`.

Book: :ref:`ch-layers`.
"""

import math
from functools import cache
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from crate_core.companion import COLORS
from crate_core.live.parts import Choice, LiveFigure, Slider, State, as_tensor, rounded
from crate_core.model.attention import mssa_step
from crate_core.model.sparsify import ista
from crate_core.theory.denoise import noise_left
from crate_core.theory.mixture import random_bases
from crate_core.theory.rate import subspace_beta, subspace_coding_rate

HEADS, RANK, TOKENS, LAYERS = 4, 8, 24, 3
EPS, SCALE = 0.5, 16.0
ZERO = 1e-9
"""Entries below this count as zero: what rounding leaves of one."""

LATER = 0.1
"""The layers after the first have this share of its lambda: their tokens are codes."""


@cache
def inputs() -> dict[str, Any]:
    """Bases, codes (nonnegative, a quarter nonzero, of mean squared norm one) and
    noise; tokens sorted by subspace.
    """
    generator = torch.Generator().manual_seed(11)
    dim = HEADS * RANK
    # the same numbers whatever a chapter's default precision is
    single: dict[str, Any] = {"generator": generator, "dtype": torch.float32}
    bases = random_bases(dim, HEADS, RANK, **single)
    codes = torch.randn(TOKENS, RANK, **single).abs() / math.sqrt(RANK / 4)
    codes = codes * (torch.rand(TOKENS, RANK, **single) < 0.25)
    return {
        "bases": rounded(bases, 6),
        "codes": rounded(codes),
        "noise": rounded(torch.randn(TOKENS, dim, **single), 2),
        "layers": LAYERS,
        "eps": EPS,
        "scale": SCALE,
        "later": LATER,
        "zero": ZERO,
    }


def walk(state: State) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Tokens at every half step through encoder and decoder, the clean tokens in the
    same coordinates, and R^c there.
    """
    bases = as_tensor(inputs()["bases"])
    dim = HEADS * RANK
    dictionary = bases.permute(1, 0, 2).reshape(dim, dim)
    identity = torch.eye(dim, dtype=torch.float64)
    blocks = identity.reshape(dim, HEADS, RANK).permute(1, 0, 2)
    codes = torch.zeros(TOKENS, HEADS, RANK, dtype=torch.float64)
    labels = torch.arange(TOKENS) * HEADS // TOKENS
    codes[torch.arange(TOKENS), labels] = as_tensor(inputs()["codes"])
    codes = codes.flatten(1)
    clean = codes @ dictionary.mT
    z = clean + state["noise"] / math.sqrt(dim) * as_tensor(inputs()["noise"])
    beta = subspace_beta(TOKENS, RANK, EPS)

    def compressed(tokens: Tensor, own: Tensor, kappa: float) -> Tensor:
        exact = state["compression"] == "exact"
        return mssa_step(tokens, own, EPS, kappa, scale=SCALE, exact=exact)

    kappa = state["step"] / beta
    path, truths = [z], [clean]
    rates = [float(subspace_coding_rate(z, bases, EPS))]
    layers = [
        (bases, dictionary, state["lambd"]),
        *[(blocks, identity, LATER * state["lambd"])] * (LAYERS - 1),
    ]
    for own, atoms, lambd in layers:
        half = compressed(path[-1], own, kappa)
        path += [half, ista(half, atoms, 1.0, lambd)]
        truths += [truths[-1], codes]
        rates += [
            float(subspace_coding_rate(half, own, EPS)),
            float(subspace_coding_rate(path[-1], blocks, EPS)),
        ]
    for own, atoms, _ in reversed(layers):
        dense = path[-1] @ atoms.mT
        path += [dense, compressed(dense, own, -kappa)]
        truths += [codes if own is blocks else clean] * 2
        rates += [float(subspace_coding_rate(t, own, EPS)) for t in path[-2:]]
    return path, truths, rates


def numbers(state: State) -> dict[str, Any]:
    """Tokens at the chosen half step; noise left, nonzeros and R^c at every one."""
    path, truths, rates = walk(state)
    noise = path[0] - truths[0]
    return {
        "tokens": path[state["stage"]].tolist(),
        "truth": truths[state["stage"]].tolist(),
        "left": [
            noise_left(z, truth + noise, truth)
            for z, truth in zip(path, truths, strict=True)
        ],
        "nonzero": [float((z.abs() > ZERO).double().mean()) for z in path],
        "rate": rates,
    }


def still() -> Figure:
    """Before, in the first layer, after the encoder; and the three curves."""
    state = FIGURE.state
    path, _, _ = walk(state)
    seen = numbers(state)
    figure, axes = plt.subplots(2, 3, figsize=(7.2, 4.6))
    stages = {0: "noisy tokens", 1: "compressed", 2: "and sparsified"}
    for ax, (stage, title) in zip(axes[0], stages.items(), strict=True):
        ax.imshow(path[stage].numpy(), cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
        ax.set(title=title, xlabel="coordinate", xticks=[], yticks=[])
    axes[0, 0].set_ylabel("token")
    places = np.arange(len(seen["left"]))
    for ax, name, title, colour in (
        (axes[1, 0], "left", "noise left", COLORS["exact"]),
        (axes[1, 1], "nonzero", "nonzero entries", COLORS["ista"]),
        (axes[1, 2], "rate", "$R^c$", COLORS["mssa"]),
    ):
        ax.plot(places, seen[name], ".-", color=colour)
        ax.axvspan(2 * LAYERS, places[-1], color="#EEEEEE")
        ax.set(title=title, xlabel="half steps", ylim=(0, None))
    return figure


FIGURE = LiveFigure(
    name="layer",
    title="Encoder and decoder layers: take half steps",
    alt=(
        "A table of tokens by coordinates: dense and coloured at first; after "
        "the first "
        "compression and sparsification it holds few entries, each token's in "
        "the block "
        "of its own subspace. Below: noise left, nonzero entries and R^c at every half "
        "step through the encoder and, on grey, back through the decoder."
    ),
    script="layer.js",  # crate_core/live/layer.js
    controls=(
        Slider(
            *("stage", "Half steps taken", 0, 4 * LAYERS, 2, 4 * LAYERS),
            digits=3,
            whole=True,
            play=True,
        ),
        Choice(
            "compression",
            "Compression",
            (("exact", "exact gradient"), ("attention", "attention, α = 16")),
            "exact",
        ),
        Slider("step", "Step κβ", 0.0, 1.0, 0.1, 50),
        Slider("lambd", "λ (first layer; a tenth later)", 0.0, 0.5, 0.06, 50),
        Slider("noise", "Noise ν (its norm)", 0.02, 2.0, 0.3, 60, log=True),
    ),
    inputs=inputs,
    numbers=numbers,
    still=still,
)
