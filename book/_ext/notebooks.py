"""Sphinx extension: each chapter as a Jupyter notebook, beside its page.

The notebook is made from the chapter's text (MyST-Markdown) when the page is written:
the same code cells in the same order, without outputs, after a first cell that says
what to install when `crate_core` is missing. What only MyST knows (theorems,
references, citations, labels) becomes Markdown that reads well in Jupyter. A link under
the title and an entry of the download menu lead to it; both are relative and work from
a disk.
"""

import re
from pathlib import Path

import jupytext
import nbformat
from depcache import is_notebook
from docutils import nodes
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from sphinx.application import Sphinx

TITLES = {
    "prf:theorem": "Theorem", "prf:lemma": "Lemma", "prf:proposition": "Proposition", "prf:proof": "Proof",
    "prf:definition": "Definition", "prf:corollary": "Corollary", "prf:remark": "Remark", "prf:example": "Example",
    "prf:algorithm": "Algorithm", "prf:assumption": "Assumption", "prf:conjecture": "Conjecture",
    "prf:observation": "Observation", "prf:property": "Property", "prf:axiom": "Axiom", "prf:criterion": "Criterion",
    "exercise": "Exercise", "exercise-start": "Exercise", "solution": "Solution", "solution-start": "Solution",
    "note": "Note", "tip": "Tip", "hint": "Hint", "important": "Important", "warning": "Warning",
    "caution": "Caution", "attention": "Attention", "seealso": "See also", "dropdown": "", "admonition": "",
    "table": "Table", "list-table": "Table", "figure": "Figure", "tested-claim": "Claim",
}  # fmt: skip
CODE = {"code", "code-block", "literalinclude", "mermaid"}
OPEN = re.compile(r"^(\s*)(`{3,}|:{3,}|~{3,})\{([\w:.-]+)\}\s*(.*)$")
FENCE = re.compile(r"^\s*(`{3,}|:{3,}|~{3,})\s*(.*)$")
NEEDS = """import importlib.util

if importlib.util.find_spec("crate_core") is None:
    raise ModuleNotFoundError('crate_core is missing: run  pip install -e ".[book]"  in the folder of the project')"""


def without_roles(line: str) -> str:
    """A line of MyST with its roles turned into plain Markdown."""
    line = re.sub(
        r"\{(?:ref|numref|prf:ref|doc)\}`([^`<]+?)\s*<([^`>]+)>`", r"[\1](#\2)", line
    )
    line = re.sub(r"\{(?:ref|numref|prf:ref)\}`([^`]+)`", r"[\1](#\1)", line)
    line = re.sub(r"\{eq\}`([^`]+)`", r"(\1)", line)
    line = re.sub(r"\{cite(?::\w+)?\}`([^`]+)`", r"[\1]", line)
    line = re.sub(r"\{math\}`([^`]+)`", r"$\1$", line)
    line = re.sub(r"\{glue(?::\w+)?\}`([^`]+)`", r"`\1`", line)
    line = re.sub(r"\{[\w:]+\}`([^`]+)`", r"\1", line)
    return re.sub(r"^\(([\w:.-]+)\)=\s*$", r'<a id="\1"></a>', line)


def plain_markdown(text: str) -> str:
    """MyST-Markdown as Markdown that reads well in Jupyter: directives become bold
    headings, roles links.
    """
    lines: list[str] = []
    # fences that are open, and what stands for their end
    closing: list[tuple[str, str]] = []
    in_options, in_code = False, ""
    for line in text.splitlines():
        fence = FENCE.match(line)
        if in_code:
            lines.append(
                "```"
                if fence and fence[1].startswith(in_code) and not fence[2]
                else line
            )
            if fence and fence[1].startswith(in_code) and not fence[2]:
                in_code = ""
            continue
        if in_options and re.match(r"^\s*:([\w-]+):", line):
            label = re.match(r"^\s*:(?:label|name):\s*(\S+)", line)
            if label:
                lines.insert(len(lines) - 1, f'<a id="{label[1]}"></a>\n')
            continue
        in_options = False
        opened = OPEN.match(line)
        if opened:
            _, mark, name, argument = opened.groups()
            if name in CODE:
                in_code = mark
                lines.append(f"```{argument}")
            elif name == "math":
                closing.append((mark, "$$"))
                lines += ["", "$$"]
            else:
                closing.append((mark, ""))
                if name in ("solution", "solution-start"):
                    argument = f"to [{argument}](#{argument})"
                words = (
                    TITLES.get(name, ""),
                    f"({argument})"
                    if argument and name.startswith("prf:")
                    else argument,
                )
                heading = " ".join(without_roles(word) for word in words if word)
                lines += ["", f"**{heading}.**" if heading else "", ""]
            in_options = True
        elif fence and closing and fence[1].startswith(closing[-1][0]) and not fence[2]:
            lines.append(closing.pop()[1])
        elif fence and not fence[1].startswith(":"):
            in_code = fence[1]
            lines.append(line)
        else:
            lines.append(without_roles(line))
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")


def macro_definitions(macros: dict[str, str | list]) -> str:
    """The book's TeX macros as definitions that Jupyter's MathJax takes."""
    result = []
    for name, value in macros.items():
        body, count = (
            (value, "")
            if isinstance(value, str)
            else (value[0], f"[{value[1]}]" if value[1] else "")
        )
        result.append(
            rf"\def\{name}{{{body}}}"
            if not count
            else rf"\newcommand{{\{name}}}{count}{{{body}}}"
        )
    return "$" + " ".join(result) + "$"


def with_chapter_links(text: str, chapters: dict[str, tuple[str, str]]) -> str:
    """The text with bare references to chapters (label -> notebook, title) as links to
    their notebooks.
    """

    def link(match: re.Match[str]) -> str:
        words, label = match.groups()
        if label not in chapters:
            return match[0]
        name, title = chapters[label]
        return f"[{words or title}]({name})"

    return re.sub(r"\{ref\}`(?:([^`<]+?)\s*<)?([\w-]+)>?`", link, text)


def make_notebook(
    text: str,
    title: str,
    macros: dict[str, str | list],
    chapters: dict[str, tuple[str, str]] | None = None,
) -> NotebookNode:
    """The notebook of a chapter, from its text; `chapters` gives other chapters'
    labels, notebooks and titles.
    """
    cells = [
        new_markdown_cell(
            f"*{title}*: a chapter of the CRATE-MAE book, as a notebook. It needs `crate_core` and what its "
            'chapters use: run `pip install -e ".[book]"` in the folder of the project. Numbers of theorems and '
            f"figures are in the page that this was made from.\n\n{macro_definitions(macros)}"
        ),
        new_code_cell(NEEDS),
    ]
    source = jupytext.reads(text, fmt="md:myst")
    for cell in source.cells:
        if cell.cell_type == "code":
            tags = cell.metadata.get("tags", [])
            cells.append(
                new_code_cell(cell.source, metadata={"tags": tags} if tags else {})
            )
            caption = cell.metadata.get("mystnb", {}).get("figure", {}).get("caption")
            if caption:
                cells.append(
                    new_markdown_cell(f"*Figure: {without_roles(str(caption))}*")
                )
        else:
            markdown = plain_markdown(with_chapter_links(cell.source, chapters or {}))
            if markdown:
                cells.append(new_markdown_cell(markdown))
    for index, cell in enumerate(cells):
        cell["id"] = f"cell-{index:03d}"  # the same notebook from the same text
    kernel = {
        "display_name": "Python 3 (ipykernel)",
        "language": "python",
        "name": "python3",
    }
    return new_notebook(
        cells=cells,
        metadata={"kernelspec": kernel, "language_info": {"name": "python"}},
    )


def page_text(app: Sphinx, docname: str) -> str | None:
    """The text of a page that is offered as a notebook, else None."""
    if docname in app.config.notebooks_without:
        return None
    text = Path(app.env.doc2path(docname)).read_text(encoding="utf8")
    return text if is_notebook(text) else None


def add_link(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Put a link to the notebook under the page's title."""
    if app.builder.name != "html" or page_text(app, docname) is None:
        return
    title = next(iter(doctree.findall(nodes.title)), None)
    if title is not None:
        name = f"{docname.rsplit('/', 1)[-1]}.ipynb"
        link = f'<a class="chapter-notebook" href="{name}" download>Download this chapter as a Jupyter notebook</a>'
        title.parent.insert(
            title.parent.index(title) + 1,
            nodes.raw("", f'<p class="chapter-tools">{link}</p>', format="html"),
        )


def write_notebook(
    app: Sphinx,
    pagename: str,
    templatename: str,
    context: dict,
    doctree: nodes.document | None,
) -> None:
    """As a page is written: write its notebook beside it, and add it to the download
    menu.
    """
    del templatename
    text = (
        page_text(app, pagename)
        if doctree is not None and app.builder.name == "html"
        else None
    )
    if text is None:
        return
    macros = (app.config.mathjax3_config or {}).get("tex", {}).get("macros", {})
    chapters = {
        label: (f"{place[0].rsplit('/', 1)[-1]}.ipynb", place[2])
        for label, place in app.env.get_domain("std").data["labels"].items()
        if label.startswith("ch-") and page_text(app, place[0]) is not None
    }
    target = Path(app.outdir) / f"{pagename}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(
        make_notebook(text, app.env.titles[pagename].astext(), macros, chapters), target
    )
    for button in context.get("header_buttons", []):
        if button.get("label") == "download-buttons":
            button["buttons"].insert(
                0,
                {
                    "type": "link",
                    "url": target.name,
                    "text": ".ipynb",
                    "icon": "fas fa-code",
                    "tooltip": "Download as a Jupyter notebook",
                    "label": "download-notebook-button",
                },
            )


def setup(app: Sphinx) -> dict[str, object]:
    """Register the extension."""
    app.add_config_value("notebooks_without", [], "html")
    app.connect("doctree-resolved", add_link)
    app.connect("html-page-context", write_notebook, priority=700)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
