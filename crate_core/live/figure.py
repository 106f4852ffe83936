"""``live_figure``: puts a figure that the reader moves into a chapter.

The piece of HTML holds everything: the still, the data, one small helper, the figure's
own script.  It runs from a disk, without a network or a kernel, and in JupyterLab;
where no script runs, the still stays.

Book: :ref:`ch-notation`.
"""

import base64
import html
import io
import json
from importlib.resources import files

import matplotlib.pyplot as plt
from IPython.display import display

from crate_core.claims import Rendered
from crate_core.companion import use_style
from crate_core.live import (
    attention,
    denoise_compress,
    flow,
    ista,
    layer,
    model,
    window,
)
from crate_core.live.parts import LiveFigure

FIGURES: dict[str, LiveFigure] = {
    module.FIGURE.name: module.FIGURE
    for module in (denoise_compress, attention, ista, flow, window, layer, model)
}
"""Every live figure of the book by its name."""


def own_file(name: str) -> str:
    """The text of a file beside this module.

    Every figure shares crate_core/live/helper.js and crate_core/live/live.css; a
    chapter's cache sees these change because their paths stand here.
    """
    return (files("crate_core.live") / name).read_text(encoding="utf8")


def still_image(figure: LiveFigure) -> str:
    """The still as an ``<img>`` with the SVG inside: a picture survives where Jupyter
    strips scripts and drawings of notebooks that it does not trust.
    """
    with plt.rc_context():
        use_style()
        plt.rcParams["svg.hashsalt"] = figure.name
        drawn = figure.still()
        raw = io.StringIO()
        drawn.savefig(raw, format="svg", metadata={"Date": None, "Creator": None})
        width, height = (round(96 * inches) for inches in drawn.get_size_inches())
        plt.close(drawn)
    coded = base64.b64encode(raw.getvalue().encode()).decode()
    return (
        f'<img src="data:image/svg+xml;base64,{coded}" width="{width}" '
        f'height="{height}" alt="{html.escape(figure.alt, quote=True)}">'
    )


def live_html(name: str) -> str:
    """The whole figure as one piece of HTML.

    Raises
    ------
    ValueError
        If there is no live figure of this name.

    Book: :ref:`ch-notation`.
    """
    if name not in FIGURES:
        raise ValueError(f"no live figure {name!r}; there are {sorted(FIGURES)}")
    figure = FIGURES[name]
    # "</" ends a script wherever it stands
    data = json.dumps(figure.data(), separators=(",", ":")).replace("</", "<\\/")
    return (
        f'<div class="crate-live" data-live-figure="{name}" id="live-{name}" '
        f'role="group" aria-label="{html.escape(figure.title, quote=True)}">'
        f"<style>{own_file('live.css')}</style>"
        f'<div class="live-still">{still_image(figure)}</div>'
        f'<script type="application/json" class="live-data">{data}</script>'
        f"<script>{own_file('helper.js')}\n{own_file(figure.script)}\n"
        "crateLive.start();</script></div>"
    )


def live_figure(name: str) -> None:
    """Show a live figure.

    Parameters
    ----------
    name : one of ``FIGURES``.

    Raises
    ------
    ValueError
        If there is no live figure of this name.

    Book: :ref:`ch-notation`.
    """
    piece = live_html(name)
    display(Rendered(piece, FIGURES[name].alt))
