"""Sphinx extension: how code cells, their outputs and their claims stand on a page.

* The code of a figure (a cell tagged `hide-input`) folds below the figure, in one small
  line, not above it in a bar.  Likewise the hidden code of a table or of printed lines;
  hidden code without output leaves one small line in its place.
* A claim is one element: `claim(...)` never shows in a cell's code; its check goes into
  the fold of its box, with the hidden code before it.  A cell of claims alone shows no
  code.  Each box links to itself and to its row of the ledger.
* Minor claims that follow each other in a cell share one folded box; one is a line.

Folds have names of their own ("Code of this figure: fig-flow-time"), for those who hear
them in a list.  What Jupyter shows is not changed; neither is any other output format.
"""

import html
import re
from collections.abc import Iterator

from claims import BOX, read_boxes, split_code
from docutils import nodes
from ledger import store
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.writers.html5 import HTML5Translator

BOX_END = "</details></div>"
PICTURES = re.compile(r"<svg|<img|<canvas|data-live-figure|crate-player")


class Fold(nodes.General, nodes.Element):
    """A folded piece of the page: `summary` is seen, `of` is only heard."""


def visit_fold(self: HTML5Translator, node: Fold) -> None:
    """Open it."""
    self.body.append(
        f'<details class="code-fold"><summary>{html.escape(node["summary"])}'
        f'<span class="claim-of">{html.escape(node["of"])}</span></summary>\n'
    )


def depart_fold(self: HTML5Translator, node: Fold) -> None:
    """Close it."""
    del node
    self.body.append("</details>\n")


def raw(text: str) -> nodes.raw:
    """A piece of HTML."""
    return nodes.raw("", text, format="html")


def part(cell: nodes.Element, element: str) -> nodes.Element | None:
    """The source or the outputs of a cell."""
    for node in cell.children:
        if isinstance(node, nodes.Element) and node.get("nb_element") == element:
            return node
    return None


def html_of(node: nodes.Node) -> str:
    """The HTML that stands in a node as it is."""
    return "".join(piece.astext() for piece in node.findall(nodes.raw))


def is_claim(node: nodes.Node) -> bool:
    """Whether an output is a claim's box."""
    return bool(BOX.search(html_of(node)))


def kind_of(outputs: list[nodes.Node]) -> str:
    """What the outputs of a cell are, in one word."""
    text = "".join(html_of(node) for node in outputs)
    if any(next(iter(node.findall(nodes.image)), None) for node in outputs):
        return "figure"
    if PICTURES.search(text):
        return "figure"
    if "<table" in text:
        return "table"
    return "output"


def name_of(outputs: list[nodes.Node], cell: nodes.Element) -> str:
    """What tells a cell's fold from the others': the name of its figure,
    or its number.
    """
    for node in outputs:
        for figure in node.findall(nodes.figure):
            names = figure["names"] or figure["ids"]
            if names:
                return f": {names[0]}"
        if live := re.search(r'data-live-figure="([^"]+)"', html_of(node)):
            return f": {live[1]}"
    return f", cell {cell['cell_index'] + 1}"


def finish_box(node: nodes.raw, check: str, ledger: str | None) -> list[nodes.Node]:
    """A claim's box with the code of its check and its links."""
    text = node.astext()
    ((label, _),) = read_boxes(text)
    name = html.escape(label)
    link = (
        f' <a class="claim-link" href="#{name}" aria-label="Link to the claim {name}">'
        "#</a></p>"
    )
    text = text.replace("</p>", link, 1)
    if ledger is not None:
        row = (
            f'<dt>Ledger</dt><dd><a href="{ledger}#ledger-{name}">'
            f"its row: {name}</a></dd></dl>"
        )
        text = text.replace("</dl>", row, 1)
    head, end, tail = text.partition(BOX_END)
    if not end:
        return [raw(text)]
    if not check:
        return [raw(text)]
    listing = nodes.literal_block(check, check, language="python")
    return [
        raw(f"{head}<p>The check:</p>"),
        listing,
        raw(end + tail),
    ]


def boxes(node: nodes.Node) -> Iterator[nodes.raw]:
    """The claims' boxes in a part of the page."""
    for piece in list(node.findall(nodes.raw)):
        if len(read_boxes(piece.astext())) == 1:
            yield piece


def group_minor(outputs: nodes.Element) -> None:
    """Put minor claims that follow each other into one fold."""
    runs: list[list[nodes.Node]] = [[]]
    for node in outputs.children:
        data = [data for _, data in read_boxes(html_of(node))]
        if data and all(one.get("minor") for one in data):
            runs[-1].append(node)
        elif runs[-1]:
            runs.append([])
    for run in filter(None, runs):
        count = sum(len(read_boxes(html_of(node))) for node in run)
        if count == 1:
            continue  # one line as it is
        first = html.escape(read_boxes(html_of(run[0]))[0][0])
        opening = (
            f'<details class="claims-minor"><summary>Also checked here: {count} '
            f'statements<span class="claim-of"> ({first} and more)</span></summary>'
        )
        outputs.insert(outputs.index(run[0]), raw(opening))
        outputs.insert(outputs.index(run[-1]) + 1, raw("</details>"))


class ArrangeCells(SphinxPostTransform):
    """Arrange the cells of a page, before MyST-NB hides what is tagged as hidden."""

    default_priority = 198
    formats = ("html",)

    def run(self, **kwargs: object) -> None:
        """Cells first, then what is left: the boxes of tested claims."""
        del kwargs
        ledgers = sorted(store(self.env).pages)
        self.ledger = (
            self.app.builder.get_relative_uri(self.env.docname, ledgers[0])
            if ledgers
            else None
        )
        self.finished: set[int] = set()
        for cell in list(self.document.findall(nodes.container)):
            if cell.get("nb_element") == "cell_code":
                self.arrange(cell)
        for box in boxes(self.document):
            if id(box) not in self.finished:
                self.finish(box, "")

    def finish(self, box: nodes.raw, check: str) -> None:
        """Finish a box in its place."""
        pieces = finish_box(box, check, self.ledger)
        self.finished |= {id(piece) for piece in pieces}
        box.parent.replace(box, pieces)

    def arrange(self, cell: nodes.container) -> None:
        """One cell: claims' checks into their boxes, hidden code below the outputs."""
        source, outputs = part(cell, "cell_code_source"), part(cell, "cell_code_output")
        claims = list(boxes(outputs)) if outputs else []
        others = [
            node for node in (outputs.children if outputs else []) if not is_claim(node)
        ]
        block = (
            next(iter(source.findall(nodes.literal_block)), None) if source else None
        )
        hidden = cell.get("hide_mode") == "input"
        if outputs is not None:
            group_minor(outputs)
        if block is not None and claims:
            try:
                split = split_code(block.astext(), hidden=hidden and not others)
            except SyntaxError:
                split = None  # the cell has IPython's magics
            if split is not None:
                for box in claims:
                    ((label, _),) = read_boxes(box.astext())
                    self.finish(box, split.checks.get(label, ""))
                if split.rest:
                    new = nodes.literal_block(split.rest, split.rest)
                    new.attributes |= {
                        name: block[name] for name in ("language", "classes")
                    }
                    block.parent.replace(block, new)
                else:
                    cell.remove(source)
                    source = None
        if source is not None and hidden:
            cell.remove(source)
            del cell["hide_mode"]
            fold = Fold("", source, summary="", of=name_of(others, cell))
            if others:
                fold["summary"] = f"Code of this {kind_of(others)}"
                outputs.insert(outputs.index(others[-1]) + 1, fold)
            else:
                imports = re.match(r"(import|from) ", source.astext())
                fold["summary"] = "Imports and setup" if imports else "Code run here"
                cell.append(fold)
        if source is None:
            cell.attributes.pop("hide_mode", None)


def setup(app: Sphinx) -> dict[str, object]:
    """Register the extension."""
    app.add_node(Fold, html=(visit_fold, depart_fold))
    app.add_post_transform(ArrangeCells)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
