r"""The drawing of the whole: from tokens near subspaces to one layer and the masked
autoencoder, with the parts that a chapter is about filled.

Needs nothing but Python.  Book: :ref:`ch-first-hour`.
"""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SERIF = "'STIX Two Text','Times New Roman',Times,'Liberation Serif',serif"
SANS = "system-ui,'Segoe UI',Helvetica,Arial,sans-serif"


@dataclass(frozen=True)
class Part:
    """One box: its title and the lines below it, when the drawing is wide and when it
    is narrow (the title first), and what it says to those who do not see it."""

    wide: tuple[str, ...]
    narrow: tuple[str, ...]
    heard: str


PARTS = {
    "mixture": Part(
        ("Tokens near subspaces", "z = U_{k}a + σw"),
        ("Near subspaces", "z = U_{k}a + σw"),
        "tokens lie near one of K subspaces",
    ),
    "denoising": Part(
        ("The best denoiser", "x̂ = z + σ^{2}∇{log} p_{σ}(z)"),
        ("The best denoiser", "x̂ = z + σ^{2}∇{log} p_{σ}(z)"),
        "the best denoiser moves a token along the score",
    ),
    "diffusion": Part(
        ("Step by step: diffusion", "{d}z/{d}σ = −σ∇{log} p_{σ}(z)"),
        ("Diffusion, in steps", "{d}z/{d}σ = −σ∇{log} p_{σ}(z)"),
        "many small denoising steps are a deterministic diffusion",
    ),
    "rate": Part(
        ("Count the bits", "R^{c}(Z | U_{[K]})"),
        ("Count the bits", "R^{c}(Z | U_{[K]})"),
        "the coding rate counts the bits of the tokens",
    ),
    "compression": Part(
        ("Spend fewer bits", "Z − κ∇R^{c}(Z)"),
        ("Spend fewer bits", "Z − κ∇R^{c}(Z)"),
        "a step down the coding rate compresses",
    ),
    "flow": Part(
        ("Step by step: a flow", "{d}Z/{d}t = −∇R^{c}(Z)"),
        ("A flow, in steps", "{d}Z/{d}t = −∇R^{c}(Z)"),
        "many small compression steps are a flow",
    ),
    "mask": Part(
        ("Hide", "{patches → tokens,}", "{3 in 4 left blank}"),
        ("Hide", "{patches → tokens,}", "{3 in 4 left blank}"),
        "patches become tokens, three in four left blank",
    ),
    "attention": Part(
        (
            "Compress: attention",
            "Z^{ℓ+1/2} = Z^{ℓ} + {MSSA}({LN}(Z^{ℓ}))",
            "{in head} k, U_{k}^{⊤}{LN}(Z^{ℓ}) {is} p × n",
        ),
        (
            "Compress",
            "Z^{ℓ+1/2} = Z^{ℓ}",
            "+ {MSSA}({LN}(Z^{ℓ}))",
            "{(in each head} p × n)",
        ),
        "one compression step with softmax is attention",
    ),
    "ista": Part(
        (
            "Sparsify: ISTA",
            "H = {LN}(Z^{ℓ+1/2})",
            "Z^{ℓ+1} = {ReLU}(H − ηλ",
            "+ ηD^{⊤}(H − DH))",
        ),
        (
            "Sparsify",
            "H = {LN}(Z^{ℓ+1/2})",
            "Z^{ℓ+1} = {ReLU}(H − ηλ",
            "+ ηD^{⊤}(H − DH))",
        ),
        "one step towards sparse coefficients, ISTA",
    ),
    "uncompress": Part(
        (
            "Compression undone",
            "Y^{ℓ+1} = Y^{ℓ+1/2}",
            "− {MSSA}({LN}(Y^{ℓ+1/2}))",
        ),
        ("Decompress", "Y^{ℓ+1} = Y^{ℓ+1/2}", "− {MSSA}({LN}(Y^{ℓ+1/2}))"),
        "the decoder takes the compression step back",
    ),
    "densify": Part(
        ("Sparsity undone", "Y^{ℓ+1/2} = E {LN}(Y^{ℓ})"),
        ("Densify", "Y^{ℓ+1/2} = E {LN}(Y^{ℓ})"),
        "the decoder leaves the sparse coefficients by a linear map",
    ),
    "loss": Part(
        ("Fill in", "{tokens → patches,}", "{loss where blank}"),
        ("Fill in", "{tokens → patches,}", "{loss where blank}"),
        "tokens become patches, with the loss on the blank ones",
    ),
}
"""The boxes by name."""

GROUPS = {
    "layer": ("attention", "ista"),
    "decoder": ("densify", "uncompress"),
    "model": ("mask", "attention", "ista", "densify", "uncompress", "loss"),
    "whole": tuple(PARTS),
}
"""Names of several boxes at once."""


def formula(text: str) -> str:
    """A line of plain Unicode mathematics as SVG ``tspan`` elements: letters slanted,
    ``{...}`` upright, ``_{...}`` and ``^{...}`` lowered and raised."""
    pieces, drop = [], 0.0
    for token in re.findall(r"[_^]?\{[^}]*\}|x̂|.", text):
        shift = {"_": 0.22, "^": -0.36}.get(token[0], 0.0)
        body = token.lstrip("_^").strip("{}")
        size = 0.74 if shift else 1.0
        letter = len(body.replace("̂", "")) == 1 and body[0].isalpha()
        style = ' font-style="italic"' if letter and token != "{d}" else ""
        style += f' font-size="{size}em"' if shift else ""
        # dy counts in the size of the piece that it moves
        if shift != drop:
            style += f' dy="{(shift - drop) / size:.3f}em"'
        drop = shift
        pieces.append(f"<tspan{style}>{html.escape(body)}</tspan>")
    return "".join(pieces)


def _text(
    x: float, y: float, body: str, size: float, family: str = SANS, style: str = ""
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" font-family="{family}" font-size="{size:g}" '
        f'text-anchor="middle" fill="currentColor" {style}>{body}</text>'
    )


def _arrow(x0: float, y0: float, x1: float, y1: float) -> str:
    """A straight arrow along an axis."""
    ahead = 1 if (x1 > x0 or y1 > y0) else -1
    head = f"l{-7 * ahead} -4v8z" if x0 != x1 else f"l-4 {-7 * ahead}h8z"
    return (
        f'<path d="M{x0:g} {y0:g}L{x1:g} {y1:g}" stroke="currentColor" '
        f'stroke-width="1.3"/><path d="M{x1:g} {y1:g}{head}" fill="currentColor"/>'
    )


@dataclass(frozen=True)
class Canvas:
    """One arrangement: its size, its letters and where each box and frame lies.

    ``boxes`` and ``frames`` give (x, y, width, height); ``arrows`` (x0, y0, x1, y1);
    ``notes`` (x, y, words)."""

    name: str
    width: float
    height: float
    letters: float
    boxes: dict[str, tuple[float, float, float, float]]
    frames: dict[str, tuple[float, float, float, float]]
    arrows: tuple[tuple[float, float, float, float], ...]
    notes: tuple[tuple[float, float, str], ...]

    def svg(self, filled: set[str], heard: str) -> str:
        """The SVG text with the boxes named in ``filled`` filled."""
        size = self.letters
        pieces = [_arrow(*arrow) for arrow in self.arrows]
        pieces += [
            _text(x, y, formula(words), size, SERIF) for x, y, words in self.notes
        ]
        for label, (x, y, width, height) in self.frames.items():
            pieces.append(
                f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
                'rx="9" fill="none" stroke="currentColor" stroke-dasharray="5 4"/>'
            )
            pieces.append(_text(x + width / 2, y + 1.5 * size, label, size))
        for name in PARTS:
            pieces.append(self._box(name, name in filled))
        # the style sheet that swaps the two may be stripped: then one is shown
        hidden = "" if self.name == "wide" else "display:none;"
        return (
            f'<svg class="drawing-{self.name}" xmlns="http://www.w3.org/2000/svg" '
            f'viewBox="0 0 {self.width:g} {self.height:g}" role="img" '
            f'aria-label="{html.escape(heard)}" style="{hidden}width:100%;'
            f'max-width:{self.width:g}px;height:auto">{"".join(pieces)}</svg>'
        )

    def _box(self, name: str, filled: bool) -> str:
        x, y, width, height = self.boxes[name]
        part, size = PARTS[name], self.letters
        lines = part.wide if self.name == "wide" else part.narrow
        leading = 1.45 * size
        top = y + height / 2 - leading * (len(lines) - 1) / 2 + 0.35 * size
        middle = x + width / 2
        look = (
            'fill="#F0A000" fill-opacity="0.4" stroke-width="2.6" data-filled=""'
            if filled
            else 'fill="none" stroke-width="1.2"'
        )
        pieces = [
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" '
            f'stroke="currentColor" data-part="{name}" {look}/>',
            _text(middle, top, lines[0], size, style='font-weight="600"'),
        ]
        for index, line in enumerate(lines[1:], 1):
            pieces.append(
                _text(middle, top + leading * index, formula(line), size + 0.5, SERIF)
            )
        return "".join(pieces)


WIDE = Canvas(
    name="wide",
    width=892,
    height=438,
    letters=14,
    boxes={
        "mixture": (2, 2, 270, 54),
        "denoising": (311, 2, 270, 54),
        "diffusion": (620, 2, 270, 54),
        "rate": (2, 90, 270, 54),
        "compression": (311, 90, 270, 54),
        "flow": (620, 90, 270, 54),
        "mask": (2, 218, 148, 88),
        "attention": (198, 218, 238, 88),
        "ista": (198, 340, 238, 88),
        "densify": (490, 340, 204, 88),
        "uncompress": (490, 218, 204, 88),
        "loss": (742, 218, 148, 88),
    },
    frames={
        "encoder layer, × L": (191, 188, 252, 248),
        "decoder layer, × L": (483, 188, 218, 248),
    },
    arrows=(
        (275, 29, 308, 29),
        (584, 29, 617, 29),
        (275, 117, 308, 117),
        (584, 117, 617, 117),
        (340, 147, 340, 185),
        (690, 147, 690, 185),
        (153, 262, 195, 262),
        (317, 309, 317, 337),
        (439, 384, 487, 384),
        (592, 337, 592, 309),
        (697, 262, 739, 262),
    ),
    notes=(
        (446, 78, "{the same move?}"),
        (755, 78, "{the same motion?}"),
        (430, 171, "{one step, with softmax}"),
        (756, 171, "{steps taken back}"),
        (171, 253, "d × n"),
        (344, 328, "d × n"),
        (463, 376, "d × n"),
        (619, 328, "d × n"),
        (721, 253, "d × n"),
    ),
)
"""For a page: two rows of ideas above the network."""

NARROW = Canvas(
    name="narrow",
    width=342,
    height=566,
    letters=12,
    boxes={
        "mixture": (1.5, 1.5, 160, 46),
        "denoising": (1.5, 68, 160, 46),
        "diffusion": (1.5, 134.5, 160, 46),
        "rate": (180.5, 1.5, 160, 46),
        "compression": (180.5, 68, 160, 46),
        "flow": (180.5, 134.5, 160, 46),
        "mask": (1.5, 220, 160, 60),
        "attention": (7.5, 330, 148, 84),
        "ista": (7.5, 440, 148, 84),
        "densify": (186.5, 440, 148, 84),
        "uncompress": (186.5, 330, 148, 84),
        "loss": (180.5, 220, 160, 60),
    },
    frames={
        "encoder layer, × L": (1.5, 304, 160, 228),
        "decoder layer, × L": (180.5, 304, 160, 228),
    },
    arrows=(
        (81, 49, 81, 66),
        (81, 116, 81, 133),
        (260, 49, 260, 66),
        (260, 116, 260, 133),
        (81, 282, 81, 302),
        (81, 416, 81, 438),
        (157, 482, 185, 482),
        (260, 438, 260, 416),
        (260, 302, 260, 282),
    ),
    notes=(
        (171, 95, "≈?"),
        (171, 162, "≈?"),
        (171, 205, "{one compression step, with softmax, in a layer:}"),
        (103, 297, "d × n"),
        (103, 431, "d × n"),
        (171, 552, "{tokens:} d × n {between all boxes}"),
        (282, 431, "d × n"),
        (282, 297, "d × n"),
    ),
)
"""For a telephone: the same in two columns."""

STYLE = (
    "<style>.layer-drawing{container-type:inline-size;margin:1rem 0}"
    ".layer-drawing svg{display:block;margin:auto}"
    "@container (max-width:600px){.layer-drawing svg.drawing-wide"
    "{display:none!important}.layer-drawing svg.drawing-narrow"
    "{display:block!important}}</style>"
)


class Drawing:
    """The drawing, as a notebook shows it: HTML on a page, words in a terminal."""

    def __init__(self, filled: set[str]) -> None:
        self.filled = filled
        lit = "; ".join(part.heard for name, part in PARTS.items() if name in filled)
        self.heard = (
            "The whole in one drawing: "
            + "; ".join(part.heard for part in PARTS.values())
            + (f". Filled here: {lit}." if lit else ".")
        )

    def svg(self, canvas: Canvas = WIDE) -> str:
        """One arrangement as SVG text."""
        return canvas.svg(self.filled, self.heard)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        pictures = self.svg(WIDE) + self.svg(NARROW)
        return {
            "text/html": f'{STYLE}<div class="layer-drawing">{pictures}</div>',
            "text/plain": self.heard,
        }

    def __repr__(self) -> str:
        return self.heard


def layer_drawing(fill: str | Sequence[str] = ()) -> Drawing:
    """The drawing of the whole with some parts filled; a notebook cell that ends with
    it shows it.

    Parameters
    ----------
    fill : names of ``PARTS`` or ``GROUPS``, one or several; none leaves all empty.

    Raises
    ------
    ValueError
        For a name that is neither.

    Book: :ref:`ch-first-hour`.
    """
    names = (fill,) if isinstance(fill, str) else tuple(fill)
    if unknown := [name for name in names if name not in PARTS | GROUPS]:
        raise ValueError(
            f"the drawing has no part {unknown[0]!r}; "
            f"it has {', '.join((*PARTS, *GROUPS))}"
        )
    return Drawing({part for name in names for part in GROUPS.get(name, (name,))})
