r"""What the book's chapters share: checked claims, source listings, one figure style,
and a player for motion.

Needs the ``book`` extra (matplotlib, IPython).  Book: :ref:`ch-notation`.
"""

import ast
import base64
import html
import inspect
import io
import json
import textwrap
import uuid
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython import get_ipython
from IPython.display import display
from matplotlib.figure import Figure
from matplotlib_inline.backend_inline import set_matplotlib_formats
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from crate_core.claims import Rendered
from crate_core.claims import claim as claim
from crate_core.data.photographs import photograph_pixels
from crate_core.shapes import Images

SUBSPACE_COLORS = [
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8C6D31",
    "#5E4FA2",
]
"""Colour of subspace k, everywhere in the book (Okabe-Ito first: readable by
colour-blind readers).
"""

SUBSPACE_MARKERS = ["o", "s", "^", "D", "v", "P", "X", "*"]
"""Marker of subspace k, so that figures read in grey too."""

COLORS = {
    "clean": "#000000",
    "noise": "#999999",
    "noisy": "#777777",
    "exact": "#0072B2",
    "mssa": "#D55E00",
    "tweedie": "#009E73",
    "projection": "#000000",
    "theory": "#000000",
    "flow": "#CC79A7",
    "ista": "#E69F00",
    "trained": "#0072B2",
    "untrained": "#999999",
    "pixels": "#E69F00",
    "bad": "#B2182B",
}
"""One colour a meaning: the clean signal, noise, the exact gradient, softmax attention,
the posterior mean, ...
"""


def use_style() -> None:
    """Set the book's figure style: sizes, fonts, grids, the subspace colour cycle, a
    white background; in a notebook two dots for each of the page's, for dense screens
    and paper.
    """
    if get_ipython() is not None:
        set_matplotlib_formats("retina")
    plt.rcParams.update(
        {
            "figure.figsize": (7.0, 3.6),
            "figure.dpi": 110,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "savefig.facecolor": "white",
            "font.size": 10.0,
            "axes.titlesize": 10.5,
            "axes.grid": True,
            "axes.axisbelow": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.prop_cycle": plt.cycler(color=SUBSPACE_COLORS),
            "grid.color": "#E3E3E3",
            "grid.linewidth": 0.7,
            "legend.frameon": False,
            "legend.fontsize": 9.0,
            "lines.linewidth": 1.7,
            "lines.markersize": 4.5,
            "image.cmap": "gray",
            "image.interpolation": "nearest",
        }
    )


def source_without_docstring(thing: Callable[..., Any] | type | ModuleType) -> str:
    """The source of a function, class or module, its own docstring left out (the
    chapter says what it would).

    Book: :ref:`ch-notation`.
    """
    source = textwrap.dedent(inspect.getsource(thing))
    tree = ast.parse(source)
    owner = tree if isinstance(thing, ModuleType) else tree.body[0]
    lines = source.splitlines()
    documented = [
        node
        for node in ast.walk(owner)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and ast.get_docstring(node, clean=False) is not None
        and (len(node.body) > 1 or isinstance(node, ast.Module))
    ]
    for node in sorted(documented, key=lambda node: node.body[0].lineno, reverse=True):
        docstring = node.body[0]
        del lines[docstring.lineno - 1 : docstring.end_lineno]
    return "\n".join(lines).strip("\n")


def show_source(*things: Callable[..., Any] | type) -> None:
    """Show the package's own source of functions or classes, docstrings left out.
    Book: :ref:`ch-notation`.
    """
    code = "\n\n\n".join(source_without_docstring(thing) for thing in things)
    where = ", ".join(
        dict.fromkeys(f"{thing.__module__.replace('.', '/')}.py" for thing in things)
    )
    body = highlight(
        code, PythonLexer(), HtmlFormatter(cssclass="highlight crate-source")
    )
    display(
        Rendered(
            f'<p class="crate-source-file">{where}</p>{body}', f"# {where}\n{code}"
        )
    )


def figure_png(figure: Figure, dpi: int) -> bytes:
    """A figure as a PNG with a palette of at most 64 colours (small enough to embed
    many); the figure is closed.
    """
    from PIL import Image

    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=dpi)
    plt.close(figure)
    raw.seek(0)
    packed = io.BytesIO()
    Image.open(raw).convert("RGB").quantize(colors=64, dither=Image.Dither.NONE).save(
        packed, "PNG", optimize=True
    )
    return packed.getvalue()


_PLAYER = """<div class="crate-player" id="{id}">
<img alt="{alt}" src="{still}" width="{width}" style="max-width:100%;height:auto">
<div class="crate-player-controls">
<button type="button" aria-label="Play or pause the animation">&#9654; play</button>
<input type="range" min="0" max="{last}" value="{start}" step="1"
 aria-label="Frame of the animation">
<output aria-live="off">{label}</output>
</div>
<script>(function () {{
  const root = document.getElementById("{id}"), frames = {frames}, labels = {labels};
  const image = root.querySelector("img"), button = root.querySelector("button");
  const slider = root.querySelector("input"), output = root.querySelector("output");
  let timer = null;
  function show(i) {{
    image.src = frames[i]; output.textContent = labels[i]; slider.value = i;
    slider.setAttribute("aria-valuetext", labels[i]);
  }}
  function stop() {{
    clearInterval(timer); timer = null; button.textContent = "\\u25B6 play";
  }}
  function next() {{
    const i = Number(slider.value) + 1;
    if (i >= frames.length) stop(); else show(i);
  }}
  button.addEventListener("click", function () {{
    if (timer !== null) {{ stop(); return; }}
    if (Number(slider.value) === frames.length - 1) show(0);
    button.textContent = "\\u23F8 pause"; timer = setInterval(next, {interval});
  }});
  slider.addEventListener("input", function () {{
    stop(); show(Number(slider.value));
  }});
  slider.setAttribute("aria-valuetext", labels[slider.value]);
  // Jupyter listens to keys before the page does: ours move the slider
  window.addEventListener("keydown", function (event) {{
    if (root.contains(event.target)) event.stopPropagation();
  }}, true);
}})();</script></div>"""


def player(
    draw: Callable[[int], Figure],
    labels: Sequence[str],
    *,
    alt: str,
    fps: float = 8.0,
    still: int = -1,
    dpi: int = 90,
) -> None:
    """Show motion: a still picture with a play button and a slider, in one static piece
    of HTML, offline.

    Nothing moves until the reader asks for it; print and plain text show the still.

    Parameters
    ----------
    draw : ``draw(i)`` returns the figure of frame i, all of one size; figures are
        closed here.
    labels : what the reader sees beside the slider at each frame ("t = 0.10"); one
        frame a label.
    alt : text for readers who do not see the picture: what moves, and what comes of it.
    fps : frames a second.
    still : index of the frame shown first.
    dpi : resolution; 30 frames of 6 x 3 inches at 90 stay under half a megabyte.

    Raises
    ------
    ValueError
        If there are no frames, or ``alt`` is empty.

    Book: :ref:`ch-diffusion`.
    """
    if not labels or not alt:
        raise ValueError("a player needs at least one frame and an alt text")
    pictures = [figure_png(draw(index), dpi) for index in range(len(labels))]
    urls = [
        "data:image/png;base64," + base64.b64encode(picture).decode()
        for picture in pictures
    ]
    start = still % len(urls)
    # the PNG header's width field
    width = int.from_bytes(pictures[start][16:20], "big")
    code = _PLAYER.format(
        id=f"player-{uuid.uuid5(uuid.NAMESPACE_OID, alt).hex[:10]}",
        alt=html.escape(alt, quote=True),
        still=urls[start],
        width=width,
        last=len(urls) - 1,
        start=start,
        label=html.escape(labels[start]),
        frames=json.dumps(urls),
        labels=json.dumps(list(labels)).replace("</", "<\\/"),
        interval=round(1000 / fps),
    )
    display(Rendered(code, f"[animation, {len(urls)} frames: {alt}]"))


def photo_crops(count: int, size: int, seed: int = 0) -> Images:
    """Square crops of the two photographs that scikit-learn ships (a temple, a flower),
    brought to one size.

    The side of a crop is uniform between an eighth of the photograph's height and all
    of it.

    Parameters
    ----------
    count : how many, half of each photograph.
    size : side in pixels.
    seed : fixes the crops.

    Returns
    -------
    (count, 3, size, size) in [0, 1].

    Book: :ref:`ch-open-questions`.
    """
    from PIL import Image

    photographs = [Image.fromarray(pixels) for pixels in photograph_pixels().values()]
    generator = np.random.default_rng(seed)
    crops = []
    for index in range(count):
        photograph = photographs[index % 2]
        side = int(generator.integers(photograph.height // 8, photograph.height + 1))
        left, top = (
            int(generator.integers(0, length - side + 1)) for length in photograph.size
        )
        crop = photograph.crop((left, top, left + side, top + side)).resize(
            (size, size), Image.Resampling.BICUBIC
        )
        crops.append(np.asarray(crop, dtype=np.float32) / 255)
    return torch.from_numpy(np.stack(crops)).movedim(-1, 1).contiguous()
