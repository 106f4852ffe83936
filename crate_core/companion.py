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
import math
import re
import textwrap
import uuid
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import display
from matplotlib.figure import Figure
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

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

CLAIM_KINDS = (
    "proved",
    "symbolic",
    "numerical",
    "counterexample",
    "small scale",
    "not reproduced",
)
"""How a claim of the book is known; see the page *Claims ledger*."""


def use_style() -> None:
    """Set the book's figure style: sizes, fonts, grids, the subspace colour cycle, a
    white background.
    """
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


class _Rendered:
    """Something with an HTML form for the page and a plain form for terminals and
    print.
    """

    def __init__(self, as_html: str, as_text: str) -> None:
        self.as_html = as_html
        self.as_text = as_text

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/html": self.as_html, "text/plain": self.as_text}

    def __repr__(self) -> str:
        return self.as_text


def math_to_html(text: str) -> str:
    r"""Escape text for HTML, turn ``$...$`` into ``\(...\)`` for MathJax and
    back-quoted words into ``<code>``.
    """
    pieces = re.split(r"(\$[^$]+\$|`[^`]+`)", text)
    rendered = []
    for piece in pieces:
        if piece.startswith("$"):
            rendered.append(rf"\({html.escape(piece[1:-1])}\)")
        elif piece.startswith("`"):
            rendered.append(f"<code>{html.escape(piece[1:-1])}</code>")
        else:
            rendered.append(html.escape(piece))
    return "".join(rendered)


Predicate = Callable[[Any], bool]
"""What a claim says of a measured value: true or false."""


def plain(value: Any) -> Any:
    """A value without its library: tensors and arrays of no dimension as Python numbers,
    also inside mappings, lists and tuples; anything else as it is.
    """
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(part) for part in value)
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and value.ndim == 0:
        return value.item()
    return value


def as_words(value: Any) -> str:
    """A plain value as a box shows it: numbers to three digits, few of them; what is
    long, or nothing, is left out (an empty string).
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, int | str):
        return str(value)
    if isinstance(value, Mapping):
        pairs = [(name, as_words(part)) for name, part in value.items()]
        if len(pairs) <= 6 and all(words for _, words in pairs):
            return ", ".join(f"{name} {words}" for name, words in pairs)
    elif isinstance(value, list | tuple) and len(value) <= 6:
        parts = [as_words(part) for part in value]
        if all(parts):
            return ", ".join(parts)
    return ""


def _named(value: Any) -> str:
    """A value in an error message."""
    return as_words(value) or repr(value)


def _has_nan(value: Any) -> bool:
    """Whether any number in a plain value is not a number."""
    if isinstance(value, Mapping):
        return any(_has_nan(part) for part in value.values())
    if isinstance(value, list | tuple):
        return any(_has_nan(part) for part in value)
    if isinstance(value, torch.Tensor):
        return bool(value.isnan().any())
    if isinstance(value, np.ndarray) and value.dtype.kind in "fc":
        return bool(np.isnan(value).any())
    return isinstance(value, float) and math.isnan(value)


def alternative_values(label: str, measured: Any, refuses: Mapping[str, Any]) -> dict:
    """What a claim's predicate is given for each alternative: its value, or, where a
    mapping was measured, the measured one with some entries replaced.

    Raises
    ------
    ValueError
        If an alternative of a mapping is not a mapping, replaces what was not measured,
        or holds a NaN (which every comparison refuses, so that it shows nothing).
    """
    values = {}
    for name, given in refuses.items():
        value = plain(given)
        if isinstance(measured, Mapping):
            if not isinstance(value, Mapping):
                raise ValueError(
                    f"{label}: {name!r} must be a mapping, since measured is one"
                )
            unknown = sorted(set(value) - set(measured))
            if unknown:
                raise ValueError(
                    f"{label}: {name!r} replaces {unknown}; measured are "
                    f"{sorted(measured)}"
                )
            value = {**measured, **value}
        if _has_nan(value):
            raise ValueError(f"{label}: {name!r} holds a NaN, which refutes nothing")
        values[name] = value
    return values


def _verdict(label: str, part: str, holds: Predicate, name: str, value: Any) -> bool:
    """The predicate's answer; what goes wrong inside it names the claim."""
    where = f"claim {label}{f', {part},' if part else ''} on {name!r}"
    try:
        answer = plain(holds(value))
    except Exception as error:
        raise ValueError(f"{where}: the predicate raised {error!r}") from error
    if not isinstance(answer, bool):
        raise ValueError(
            f"{where}: the predicate must answer true or false, got {answer!r}"
        )
    return answer


def check_claim(
    label: str,
    measured: Any,
    holds: Predicate | Mapping[str, Predicate],
    refuses: Mapping[str, Any],
) -> None:
    """Try a claim's predicate on what was measured and on each alternative.

    Parameters
    ----------
    label : the claim's name, for messages.
    measured : what the cell found; scalars of torch and NumPy become Python's.
    holds : the predicate, or a mapping from the parts of the sentence to a predicate
        each: then all must hold, and each part needs an alternative that it alone
        refuses.
    refuses : name -> value for which the sentence would be false.

    Raises
    ------
    AssertionError
        If the predicate does not hold for ``measured``, or holds for an alternative, or
        a part refuses no alternative alone.
    ValueError
        If there is no alternative, one is malformed (see ``alternative_values``), or the
        predicate raises or answers neither true nor false.

    Book: :ref:`ch-ledger`.
    """
    if not refuses:
        raise ValueError(
            f"{label}: refuses={{...}} must name at least one alternative, a value for "
            "which the sentence would be false"
        )
    parts = dict(holds) if isinstance(holds, Mapping) else {"": holds}
    measured = plain(measured)
    alternatives = alternative_values(label, measured, refuses)
    for part, predicate in parts.items():
        if not _verdict(label, part, predicate, "measured", measured):
            of = f", in its part {part!r}," if part else ""
            raise AssertionError(
                f"claim {label}{of} does not hold for what was measured "
                f"({_named(measured)})"
            )
    refusers = {
        name: {
            part
            for part, predicate in parts.items()
            if not _verdict(label, part, predicate, name, value)
        }
        for name, value in alternatives.items()
    }
    for name, by in refusers.items():
        if not by:
            value = alternatives[name]
            raise AssertionError(
                f"claim {label} does not refuse {name!r} ({_named(value)}):"
                " its check passes for that, too"
            )
    for part in parts:
        if {part} not in refusers.values():
            raise AssertionError(
                f"claim {label}: no alternative is refused by the part {part!r} alone"
            )


def _claim_box(
    label: str,
    statement: str,
    kind: str,
    details: Sequence[tuple[str, Sequence[str]]],
    data: Mapping[str, Any],
) -> _Rendered:
    """A claim as one element: the sentence with its kind, and a fold with the rest.

    The book's ledger extension adds the code of the check to the fold, and puts minor
    claims that follow each other into one box.
    """
    minor = " claim-minor" if data["minor"] else ""
    rows = "".join(
        f"<dt>{name}</dt>" + "".join(f"<dd>{math_to_html(line)}</dd>" for line in lines)
        for name, lines in details
    )
    name = html.escape(label)
    box = (
        f'<div class="claim claim-{kind.replace(" ", "-")}{minor}" id="{name}" '
        f'role="note" data-claim="{html.escape(json.dumps(data))}">'
        f'<p class="claim-statement"><span class="claim-kind">{kind}</span> '
        f"{math_to_html(statement)}</p>"
        f'<details class="claim-fold"><summary>When it holds, and how it is checked'
        f'<span class="claim-of"> ({name})</span></summary>'
        f"<dl>{rows}</dl></details></div>"
    )
    lines = [f"[{kind}] {statement}"]
    lines += [f"  {name.lower()}: {'; '.join(said)}" for name, said in details]
    return _Rendered(box, "\n".join(lines))


def claim(
    label: str,
    statement: str,
    *,
    conditions: str,
    kind: str,
    evidence: str,
    measured: Any = None,
    holds: Predicate | Mapping[str, Predicate] | bool | None = None,
    refuses: Mapping[str, Any] | None = None,
    recorded: str | None = None,
    minor: bool = False,
) -> None:
    """Assert a claim of the text and show it as a box; the claims ledger collects these
    from the pages.

    The check has to be able to fail: it runs on what was measured, and on each
    alternative named, for which it must not pass.

    Parameters
    ----------
    label : unique name, ``clm-<chapter>-<what>``.
    statement : the sentence, true as it stands, TeX between dollar signs.
    conditions : where it holds.
    kind : one of ``CLAIM_KINDS``.
    evidence : how it is checked, and where the tolerance comes from.
    measured : what the cell found: a number, a tensor, or a mapping of several.
    holds : the predicate on it, or a mapping from parts of the sentence to predicates
        (see ``check_claim``).  A bool is the first edition's form, which refuses
        nothing; it goes when the last chapter is rewritten.
    refuses : name of an alternative -> the value that it gives: the tokens unchanged, a
        term left out, untrained weights.  Where ``measured`` is a mapping, an
        alternative replaces some of its entries.
    recorded : the file of ``results/`` that ``measured`` was read from, when a build
        does not compute it again.
    minor : one line in a folded box of its cell, instead of a box in the open.

    Raises
    ------
    AssertionError
        If the predicate fails for what was measured, or passes for an alternative.
    ValueError
        For an unknown kind, a missing part, or a predicate that raises.

    Book: :ref:`ch-ledger`.
    """
    if kind not in CLAIM_KINDS:
        raise ValueError(f"kind must be one of {CLAIM_KINDS}, got {kind!r}")
    if recorded is not None and not recorded.startswith("results/"):
        raise ValueError(f"{label}: recorded must be results/..., got {recorded!r}")
    refuses = refuses or {}
    if kind == "not reproduced":
        if measured is not None or holds is not None or refuses:
            raise ValueError(
                f"{label}: a claim of kind 'not reproduced' has no check: leave out "
                "measured, holds and refuses"
            )
    elif holds is None:
        raise ValueError(
            f"{label}: a claim of kind {kind!r} needs its check, holds=..."
        )
    elif isinstance(holds, Mapping) or callable(holds):
        if measured is None:
            raise ValueError(f"{label}: measured=... is missing")
        check_claim(label, measured, holds, refuses)
    elif refuses or measured is not None:
        raise ValueError(
            f"{label}: with measured and refuses, holds must be a predicate, "
            "lambda value: ..."
        )
    elif not holds:
        raise AssertionError(
            f"claim {label} does not hold: {statement} (conditions: {conditions}; "
            f"check: {evidence})"
        )
    details = [("When", [conditions]), ("Checked", [evidence])]
    if words := as_words(plain(measured)):
        details.append(("Measured", [words]))
    if refuses:
        values = {name: as_words(plain(value)) for name, value in refuses.items()}
        lines = [f"{name} ({at})" if at else name for name, at in values.items()]
        details.append(("Refuses", lines))
    if recorded is not None:
        details.append(
            ("Recorded", [f"read from `{recorded}`; a build does not compute it again"])
        )
    data = {
        "alternatives": list(refuses),
        "recorded": recorded or "",
        "minor": minor,
    }
    display(_claim_box(label, statement, kind, details, data))


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
        _Rendered(
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
<input type="range" min="0" max="{last}" value="{start}" step="1" aria-label="Frame of the animation">
<output aria-live="off">{label}</output>
</div>
<script>(function () {{
  const root = document.getElementById("{id}"), frames = {frames}, labels = {labels};
  const image = root.querySelector("img"), button = root.querySelector("button");
  const slider = root.querySelector("input"), output = root.querySelector("output");
  let timer = null;
  function show(i) {{ image.src = frames[i]; output.textContent = labels[i]; slider.value = i; }}
  function stop() {{ clearInterval(timer); timer = null; button.textContent = "\\u25B6 play"; }}
  function next() {{ const i = Number(slider.value) + 1; if (i >= frames.length) stop(); else show(i); }}
  button.addEventListener("click", function () {{
    if (timer !== null) {{ stop(); return; }}
    if (Number(slider.value) === frames.length - 1) show(0);
    button.textContent = "\\u23F8 pause"; timer = setInterval(next, {interval});
  }});
  slider.addEventListener("input", function () {{ stop(); show(Number(slider.value)); }});
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
    display(_Rendered(code, f"[animation, {len(urls)} frames: {alt}]"))


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
    from sklearn.datasets import load_sample_image

    photographs = [
        Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")
    ]
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
