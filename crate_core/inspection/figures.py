"""The figures of the report that ``crate inspect`` writes, and how one is put into a
page.

Book: :ref:`ch-layer-by-layer`.
"""

import base64
import io
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from crate_core.inspection.layer_measures import Inversion
from crate_core.inspection.layers import LayerInspection, WeightInspection

MODEL, CONTROL, MARK = "#0072B2", "#777777", "#000000"
"""Colours of the model, of its untrained control, and of reference lines."""

Measure = Callable[[LayerInspection], np.ndarray]
"""A measure (pictures, layers) of an inspection."""

Named = Sequence[tuple[str, Measure]]
"""Measures, each under the title of its panel."""


def png(figure: Figure) -> str:
    """A figure as a ``data:`` address of a PNG with 128 colours."""
    raw, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, format="png", dpi=110)
    raw.seek(0)
    Image.open(raw).convert("RGB").quantize(colors=128, dither=Image.Dither.NONE).save(
        packed, "PNG", optimize=True
    )
    return "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode()


def panels(count: int, height: float = 2.7) -> tuple[Figure, list[Axes]]:
    """A white figure with ``count`` axes in a row."""
    figure = Figure(
        figsize=(max(3.4, 2.75 * count), height),
        layout="constrained",
        facecolor="white",
    )
    axes = list(np.atleast_1d(figure.subplots(1, count)))
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#E3E3E3", linewidth=0.7)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=8)
    return figure, axes


def band(ax: Axes, x: np.ndarray, values: np.ndarray) -> None:
    """The controls' values (seeds, len(x)): their range as a band, their mean as a
    dashed curve.
    """
    ax.fill_between(
        x,
        values.min(axis=0),
        values.max(axis=0),
        color=CONTROL,
        alpha=0.3,
        linewidth=0,
    )
    ax.plot(
        x,
        values.mean(axis=0),
        color=CONTROL,
        marker="^",
        markersize=4,
        linestyle="--",
        label="untrained",
    )


def curves(
    ax: Axes,
    model: LayerInspection,
    controls: Sequence[LayerInspection],
    measure: Measure,
    first: int,
) -> None:
    """Mean over pictures with its spread (bars), and the range of the controls' means
    (band); layers from ``first``.
    """
    values = measure(model)
    x = np.arange(first, first + values.shape[1])
    band(ax, x, np.stack([measure(control).mean(axis=0) for control in controls]))
    ax.errorbar(
        x,
        values.mean(axis=0),
        yerr=values.std(axis=0),
        color=MODEL,
        marker="o",
        markersize=4,
        capsize=2,
        label="this model",
    )
    ax.set_xticks(x)


def rate_curves(model: LayerInspection, controls: Sequence[LayerInspection]) -> Figure:
    """R and R^c at each layer's attention, what a half-step does to R^c, and the
    published measure.
    """
    measures: list[tuple[str, Measure]] = [
        ("R at the attention's input, nats", lambda r: r.layers.attended.total),
        ("R^c there, orthonormalised, nats", lambda r: r.layers.attended.orthonormal),
        (
            "change of R^c by the half-step, nats",
            lambda r: r.layers.compressed.orthonormal - r.layers.tokens.orthonormal,
        ),
        ("R^c as published (directions), nats", lambda r: r.layers.directions),
    ]
    figure, axes = panels(len(measures))
    for ax, (title, measure) in zip(axes, measures, strict=True):
        curves(ax, model, controls, measure, first=1)
        ax.set_title(title, fontsize=8.5)
        ax.set_xlabel("layer", fontsize=8)
    axes[2].axhline(0, color=MARK, linewidth=1)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def between_layers(
    model: LayerInspection,
    controls: Sequence[LayerInspection],
    measures: Named,
    gaussian: Sequence[float | None],
) -> Figure:
    """Measures of the tokens between layers, with what Gaussian entries would give."""
    figure, axes = panels(len(measures))
    for ax, (title, measure), level in zip(axes, measures, gaussian, strict=True):
        curves(ax, model, controls, measure, first=0)
        if level is not None:
            ax.axhline(level, color=MARK, linewidth=1, linestyle=":")
        ax.set_title(title, fontsize=8.5)
        ax.set_xlabel("after layer (0: embedding)", fontsize=8)
        ax.set_ylim(bottom=0)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def readout(model: np.ndarray, controls: np.ndarray) -> Figure:
    """Shares (L + 1,) of removed patches that a linear map reads, and those (seeds, L +
    1) of the controls.
    """
    figure, (ax,) = panels(1)
    x = np.arange(len(model))
    band(ax, x, controls)
    ax.plot(x, model, color=MODEL, marker="o", markersize=4, label="this model")
    ax.axhline(0, color=MARK, linewidth=1, linestyle=":")
    ax.set_title("share of removed patches read", fontsize=8.5)
    ax.set_xlabel("after layer (0: embedding)", fontsize=8)
    ax.set_xticks(x)
    ax.set_ylim(min(-0.1, float(model.min())), 1)
    ax.legend(frameon=False, fontsize=8)
    return figure


def steps(
    model: LayerInspection,
    controls: Sequence[LayerInspection],
    directions: Named,
) -> Figure:
    """Cosines of each layer's attention step with directions, one panel a direction, on
    one scale.
    """
    figure, axes = panels(len(directions))
    for ax, (title, measure) in zip(axes, directions, strict=True):
        curves(ax, model, controls, measure, first=1)
        ax.axhline(0, color=MARK, linewidth=1)
        ax.set_title(title, fontsize=8.5)
        ax.set_xlabel("layer", fontsize=8)
        ax.set_ylim(-1, 1)
    axes[0].set_ylabel("cosine", fontsize=8)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def weights(model: WeightInspection, controls: Sequence[WeightInspection]) -> Figure:
    """Coherence, orthonormality, output projection and dictionaries, layer by layer."""
    shown = [
        ("largest cosine of two subspaces", "coherence_max", 0.0),
        ("basis: distance from orthonormal", "basis_defect", 0.0),
        ("cosine of W_o and [U_1 ... U_K]", "written_cosine", 1.0),
        ("largest eigenvalue of D^T D", "dictionary_norm", None),
        ("distance of D^T D from I", "dictionary_defect", 0.0),
    ]
    shown = [entry for entry in shown if getattr(model, entry[1]) is not None]
    figure, axes = panels(len(shown))
    for ax, (title, name, ideal) in zip(axes, shown, strict=True):
        values = getattr(model, name)
        x = np.arange(1, len(values) + 1)
        others = np.stack([getattr(control, name) for control in controls])
        band(ax, x, others)
        ax.plot(x, values, color=MODEL, marker="o", markersize=4, label="this model")
        if ideal is not None:
            ax.axhline(ideal, color=MARK, linewidth=1.2, linestyle=":", label="theory")
        elif model.eta is not None:
            for multiple, style in ((1, ":"), (2, "--")):
                ax.axhline(
                    multiple / model.eta,
                    color=MARK,
                    linewidth=1.2,
                    linestyle=style,
                    label=f"{multiple}/eta",
                )
            ax.legend(frameon=False, fontsize=7)
        ax.set_title(title, fontsize=8.5)
        ax.set_xlabel("layer", fontsize=8)
        ax.set_xticks(x)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def inversion(model: Inversion[np.ndarray], control: Inversion[np.ndarray]) -> Figure:
    """How well decoder layers bring encoder outputs back, and how alike the paths are:
    all pairs.
    """
    figure, axes = panels(4, height=3.0)
    shown = [
        (model.centred, "inversion, model"),
        (control.centred, "inversion, untrained"),
        (model.paths, "paths, model"),
        (control.paths, "paths, untrained"),
    ]
    for ax, (pairs, title) in zip(axes, shown, strict=True):
        matrix = pairs.mean(axis=0)
        ax.grid(visible=False)
        ax.imshow(matrix, cmap="RdBu_r", norm=TwoSlopeNorm(0.0, -1.0, 1.0))
        for row, column in np.ndindex(*matrix.shape):
            value = matrix[row, column]
            ink = "white" if abs(value) > 0.6 else "black"
            weight = "bold" if row + column == len(matrix) - 1 else "normal"
            if len(matrix) <= 8:
                ax.text(
                    column,
                    row,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color=ink,
                    weight=weight,
                )
        ax.set_title(title, fontsize=8.5)
        ax.set_xlabel("decoder layer", fontsize=8)
        ax.set_xticks(
            range(matrix.shape[1]), [str(k + 1) for k in range(matrix.shape[1])]
        )
        ax.set_yticks(
            range(matrix.shape[0]), [str(k + 1) for k in range(matrix.shape[0])]
        )
    axes[0].set_ylabel("encoder layer", fontsize=8)
    return figure


def picture_rows(
    rows: Sequence[tuple[str, Tensor]], side: float = 0.95, maps: bool = False
) -> Figure:
    """Pictures (B, C, H, W) in [0, 1] in labelled rows; ``maps``: the single channels
    from 0 to each one's largest.
    """
    columns = max(len(pictures) for _, pictures in rows)
    figure = Figure(
        figsize=(side * columns + 1.6, side * len(rows) + 0.1),
        layout="constrained",
        facecolor="white",
    )
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for line, (label, pictures) in zip(axes, rows, strict=True):
        line[0].set_axis_on()
        line[0].set(xticks=[], yticks=[])
        line[0].spines[:].set_visible(False)
        line[0].set_ylabel(label, fontsize=8, rotation=0, ha="right", va="center")
        for ax, picture in zip(
            line, pictures.movedim(1, -1).clamp(0, None).numpy(), strict=False
        ):
            if picture.shape[-1] == 3:
                ax.imshow(picture.clip(0, 1), interpolation="nearest")
            else:
                top = float(picture.max()) if maps else 1.0
                ax.imshow(
                    picture[..., 0],
                    cmap="gray",
                    vmin=0,
                    vmax=top or 1.0,
                    interpolation="nearest",
                )
    return figure
