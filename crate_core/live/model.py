r"""Live figure *model*: the trained ``cifar10-tiny`` in the page, completing pictures.

The weights, half precision as they are installed, travel with the page; the script runs
the whole network.  The network before training has weights that page and package draw
alike, uniform with the bounds (for the two tokens: the standard deviation) of
:class:`crate_core.model.crate.CrateMAE`.

Book: :ref:`ch-first-hour` and :ref:`ch-crate-mae`.
"""

import base64
import math
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from crate_core.data.photographs import photograph_pixels
from crate_core.inspection.layer_measures import unit_tokens
from crate_core.inspection.measures import nonzero_share, orthonormal_bases
from crate_core.live.parts import Choice, LiveFigure, Slider, State, Switch
from crate_core.model.crate import CrateMAE
from crate_core.model.layers import EncoderLayer
from crate_core.model.patches import patchify
from crate_core.theory.rate import subspace_coding_rate

SIDE = 32
EPS = 0.5
"""Precision of the rates shown, for tokens of norm one, as in the chapter on layers."""

FIRST_HIDDEN = [
    *(0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 0, 1),
    *(1, 1, 1, 0, 1, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1),
    *(1, 1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0),
    *(1, 1, 1, 1, 0, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1, 0),
]
"""The patches hidden at first: 48 of 64."""


@cache
def pictures() -> dict[str, np.ndarray]:
    """Photographs that installed packages carry, the middle square at 32 x 32 pixels,
    (32, 32, 3) uint8.
    """
    from PIL import Image

    found = photograph_pixels()
    if find_spec("skimage"):
        from skimage import data

        found |= {name: getattr(data, name)() for name in ("chelsea", "astronaut")}
    small = {}
    for name, photo in found.items():
        short = min(photo.shape[:2])
        top, left = ((side - short) // 2 for side in photo.shape[:2])
        square = Image.fromarray(photo[top : top + short, left : left + short])
        small[name] = np.array(
            square.resize((SIDE, SIDE), Image.Resampling.BICUBIC), dtype=np.uint8
        )
    return small


def initial_values(model: CrateMAE) -> Iterator[tuple[str, list[int], float, float]]:
    """Name, shape, middle and half-width of the uniform initial values of each
    parameter; half-width 0: constant.
    """
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        shape = list(parameter.shape)
        if "norm" in module:
            yield name, shape, float(leaf == "weight"), 0.0
        elif name.endswith("_token"):
            yield name, shape, 0.0, 0.02 * math.sqrt(3)
        elif leaf == "bias":
            embeds = module == "patch_embedding"
            fan_in = model.patch_embedding.in_features
            yield name, shape, 0.0, 1 / math.sqrt(fan_in) if embeds else 0.0
        elif module.endswith((".densify", ".sparsify")):
            yield name, shape, 0.0, math.sqrt(6 / shape[1])
        else:
            yield name, shape, 0.0, math.sqrt(6 / sum(shape))


def scattered(count: int, start: int) -> np.ndarray:
    """Numbers in [-1, 1) from the integers ``start``, ``start + 1``, ...: a mixing
    function of 32 bits that a script computes alike.
    """
    x = np.arange(start, start + count, dtype=np.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = (x ^ (x >> np.uint32(shift))) * np.uint32(factor)
    return x.astype(np.float64) / 2**31 - 1


@cache
def network(trained: bool) -> CrateMAE:
    """The trained network as installed, or the one before training."""
    model = CrateMAE.from_pretrained("cifar10-tiny").eval().requires_grad_(False)
    if not trained:
        start, values = 1, {}
        for name, shape, middle, width in list(initial_values(model)):
            count = math.prod(shape)
            drawn = middle + width * scattered(count, start).reshape(shape)
            values[name] = torch.from_numpy(drawn).float()
            start += count
        model.load_weights(values, source="initial values")
    return model


@cache
def inputs() -> dict[str, Any]:
    """Weights (half precision) and pictures (bytes) in base 64, and the sizes."""
    model = network(True)
    halves = b"".join(
        parameter.detach().half().numpy().tobytes() for parameter in model.parameters()
    )
    config = model.config
    assert config.pixel_mean is not None
    assert config.pixel_std is not None
    return {
        "weights": base64.b64encode(halves).decode(),
        "parameters": [list(row) for row in initial_values(model)],
        "pictures": {
            name: base64.b64encode(picture.tobytes()).decode()
            for name, picture in pictures().items()
        },
        "depth": config.depth,
        "heads": config.heads,
        "dim": config.dim,
        "eta": config.eta,
        "lambd": config.lambd,
        "mean": list(config.pixel_mean),
        "std": list(config.pixel_std),
        "eps": EPS,
    }


@torch.no_grad()
def run(state: State) -> tuple[CrateMAE, Tensor, Any]:
    """The network, the picture in model units and the output, hidden patches as in the
    state.
    """
    model = network(state["trained"])
    pixels = torch.from_numpy(pictures()[state["picture"]]).permute(2, 0, 1)[None]
    images = model.standardize(pixels)
    hidden = torch.tensor([state["hidden"]], dtype=torch.float32)
    ratio = float(hidden.mean())
    out = model(
        images,
        ratio,
        0.9 * hidden,
        output_hidden_states=True,
        output_attentions=True,
    )
    return model, images, out


@torch.no_grad()
def numbers(state: State) -> dict[str, Any]:
    """Predicted patches, one row of attention, rates and nonzeros of each layer, and
    the error on hidden patches (0 when none is hidden).
    """
    model, images, out = run(state)
    before: list[float] = []
    after: list[float] = []
    for layer, x in zip(model.encoder, out.hidden_states, strict=False):
        assert isinstance(layer, EncoderLayer)
        bases = orthonormal_bases(layer.attention.bases)
        for found, tokens in ((before, x), (after, layer.compress(x))):
            z = unit_tokens(layer.norm_attention(tokens))
            found.append(float(subspace_coding_rate(z, bases, EPS)))
    hidden = torch.tensor(state["hidden"], dtype=torch.bool)
    errors = (out.logits - patchify(images, 4))[0].square().mean(-1)[hidden]
    yardstick = patchify(images, 4)[0].square().mean(-1)[hidden]
    weights = out.attentions[int(state["layer"]) - 1][0, int(state["head"]) - 1]
    return {
        "predicted": out.logits[0].tolist(),
        "attention": weights[1 + state["patch"]].tolist(),
        "rate_before": before,
        "rate_after": after,
        "nonzeros": [float(nonzero_share(x).mean()) for x in out.hidden_states[1:]],
        "error": float(errors.mean()) if len(errors) else 0.0,
        "error_mean": float(yardstick.mean()) if len(errors) else 0.0,
    }


def still() -> Figure:
    """The first state."""
    with torch.no_grad():
        state = FIGURE.state
        model, images, _ = run(state)
        filled = model.reconstruct(
            images, 0.75, 0.9 * torch.tensor([state["hidden"]], dtype=torch.float32)
        )
    figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.7))
    for ax, (title, picture) in zip(
        axes,
        {
            "what it sees": filled.masked,
            "completed": filled.pasted,
            "original": images,
        }.items(),
        strict=True,
    ):
        shown = model.unstandardize(picture)[0].permute(1, 2, 0).clamp(0, 1)
        ax.imshow(shown.numpy())
        ax.set(title=title)
        ax.axis("off")
    return figure


FIGURE = LiveFigure(
    name="model",
    title="The trained model: hide patches and see them completed",
    alt=(
        "Three pictures of 32 by 32 pixels: a photograph with three quarters of its 64 "
        "patches hidden, its completion by the trained network, blurred but of the "
        "right colours and shapes, and the original."
    ),
    script="model.js",  # crate_core/live/model.js
    controls=(
        Choice(
            "picture", "Picture", tuple((name, name) for name in pictures()), "temple"
        ),
        Slider("ratio", "Share of patches hidden", 0.0, 60 / 64, 0.75, 60),
        Choice(
            "layer",
            "Attention of layer",
            tuple((str(i), str(i)) for i in range(1, 5)),
            "4",
        ),
        Choice("head", "and head", tuple((str(i), str(i)) for i in range(1, 5)), "1"),
        Switch("trained", "Trained (off: before training)", True),
    ),
    inputs=inputs,
    numbers=numbers,
    still=still,
    moved=(("hidden", FIRST_HIDDEN), ("patch", 27), ("draw", 0)),
)
