"""Sphinx extension: each chapter as a Jupyter notebook, beside its page.

The notebook is made from the chapter's text (MyST-Markdown) when the page is written:
the same code cells in the same order, without outputs, after a first cell that says
what to install when `crate_core` is missing.  It runs wherever the package is
installed.  What only MyST knows becomes Markdown that reads well in Jupyter: theorems
and equations have the numbers of the page, references lead to the place in this
notebook or in another chapter's (or are words, where there is none), citations name
authors and year, and a last cell lists them.  A link under the title and an entry of
the download menu lead to the notebook; both are relative and work from a disk.

With an address in `repository: {url: ...}` of `_config.yml` the page also offers the
notebook in Colab (from the branch `notebooks_branch`, which holds the built site) and
the chapter in Binder (which reads `.binder/`).
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import jupytext
import nbformat
from depcache import is_notebook
from docutils import nodes
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from pybtex.database import Entry
from pybtex.plugin import find_plugin
from sphinx.application import Sphinx

PROOFS = (
    "theorem lemma proposition proof definition corollary remark example algorithm "
    "assumption conjecture observation property axiom criterion"
)
ADMONITIONS = "note tip hint important warning caution attention"
TITLES = {
    **{f"prf:{name}": name.capitalize() for name in PROOFS.split()},
    **{name: name.capitalize() for name in ADMONITIONS.split()},
    "exercise": "Exercise",
    "exercise-start": "Exercise",
    "solution": "Solution",
    "solution-start": "Solution",
    "seealso": "See also",
    "dropdown": "",
    "admonition": "",
    "table": "Table",
    "list-table": "Table",
    "figure": "Figure",
    "tested-claim": "Claim",
}
CODE = {"code", "code-block", "literalinclude", "mermaid"}
OPEN = re.compile(r"^(\s*)(`{3,}|:{3,}|~{3,})\{([\w:.-]+)\}\s*(.*)$")
FENCE = re.compile(r"^\s*(`{3,}|:{3,}|~{3,})\s*(.*)$")
OPTION = re.compile(r"^\s*:([\w-]+):\s*(.*)$")
ROLE = re.compile(r"\{([\w:]+)\}`([^`]+)`")
CLAIM = re.compile(r"""\bclaim\(\s*["'](clm-[\w-]+)["']""")
NEEDS = """import importlib.util

if importlib.util.find_spec("crate_core") is None:
    raise ModuleNotFoundError(
        "crate_core is missing: install its wheel with the extra [book], or run  "
        'pip install -e ".[book]"  in the folder of the project'
    )"""
NEEDS_AT = """import importlib.util

if importlib.util.find_spec("crate_core") is None:
    %pip install --quiet "crate-core[book] @ git+{url}\""""


@dataclass(frozen=True)
class Place:
    """Where a label leads: words that name the place, and the page that it is on."""

    words: str
    docname: str
    number: str = ""


@dataclass
class Links:
    """What the references of one chapter mean, in its notebook."""

    docname: str = ""
    places: Mapping[str, Place] = field(default_factory=dict)
    """Label, or name of a page, -> what it leads to."""
    notebooks: frozenset[str] = frozenset()
    """Pages that are offered as notebooks."""
    entries: Mapping[str, Entry] = field(default_factory=dict)
    """Key -> entry of the bibliography."""
    glued: Iterator[str] = field(default_factory=lambda: iter(()))
    """The values that stand in the page's text, in their order."""
    cited: list[str] = field(default_factory=list)
    """Keys of what has been cited so far."""

    def link(self, label: str, words: str = "") -> str:
        """A reference as a link to a notebook, or as words where none has the place."""
        place = self.places.get(label)
        if place is None:
            return words or label
        words = words.replace("{number}", place.number) or place.words
        if place.docname not in self.notebooks:
            return words
        page = "" if place.docname == self.docname else notebook_name(place.docname)
        if label == place.docname:  # a page as such
            return f"[{words}]({page})" if page else words
        return f"[{words}]({page}#{label})"

    def cite(self, keys: str, in_text: bool) -> str:
        """A citation: "Pai et al. (2024)" in a sentence, "(Pai et al., 2024)" else."""
        said = []
        for key in re.split(r"\s*,\s*", keys.strip()):
            if key not in self.entries:
                said.append(key)
                continue
            if key not in self.cited:
                self.cited.append(key)
            who, year = authors(self.entries[key]), self.entries[key].fields["year"]
            if in_text:
                said.append(f"[{who} ({year})](#cite-{key})")
            else:
                said.append(f"[{who}, {year}](#cite-{key})")
        return " and ".join(said) if in_text else f"({'; '.join(said)})"

    def role(self, match: re.Match[str]) -> str:
        """A role of MyST as plain Markdown."""
        name, text = match.groups()
        name = name.removeprefix("py:")
        titled = re.fullmatch(r"(.*?)\s*<([^>]+)>", text, re.DOTALL)
        words, target = titled.groups() if titled else ("", text)
        if name == "doc":
            target = target.removeprefix("/")
            folder = self.docname.rpartition("/")[0]
            inside = f"{folder}/{target}" if folder else target
            return self.link(inside if inside in self.places else target, words)
        if name in ("ref", "numref", "prf:ref"):
            return self.link(target, words)
        if name == "eq":
            place = self.places.get(target)
            return self.link(target, f"({place.number if place else target})")
        if name.startswith("cite"):
            return self.cite(target, in_text=name.endswith(("t", "ts")))
        if name == "math":
            return f"${text}$"
        if name.startswith("glue"):
            return next(self.glued, f"`{text}`")
        if name in ("func", "class", "meth", "mod", "attr", "data", "obj", "exc"):
            short = target.rpartition(".")[2] if target.startswith("~") else target
            return f"`{words or short.removeprefix('~')}`"
        return words or text


def notebook_name(docname: str) -> str:
    """The file of a page's notebook, as other pages name it: all lie in one folder."""
    return f"{docname.rsplit('/', 1)[-1]}.ipynb"


def authors(entry: Entry) -> str:
    """The authors of a work, as a citation names them."""
    people = entry.persons.get("author") or entry.persons.get("editor") or []
    names = [
        " ".join([*person.prelast_names, *person.last_names]).strip("{}")
        for person in people
    ]
    if not names:
        return entry.fields.get("title", entry.key)
    if len(names) > 2:
        return f"{names[0]} et al."
    return " and ".join(names)


def anchor(label: str) -> str:
    """A place that links lead to."""
    return f'<a id="{label}"></a>'


def plain_markdown(text: str, links: Links) -> str:
    """MyST-Markdown as Markdown that reads well in Jupyter: directives become bold
    headings, roles links.
    """
    # (line, whether it is text, where roles count)
    lines: list[tuple[str, bool]] = []
    # fences that are open, and what stands for their end
    closing: list[tuple[str, str]] = []
    in_code = ""
    source = text.splitlines()
    index = 0

    def say(*said: str, words: bool = True) -> None:
        lines.extend((line, words) for line in said)

    while index < len(source):
        line = source[index]
        index += 1
        fence = FENCE.match(line)
        if in_code:
            ends = fence and fence[1].startswith(in_code) and not fence[2]
            say("```" if ends else line, words=False)
            in_code = "" if ends else in_code
            continue
        opened = OPEN.match(line)
        if opened:
            _, mark, name, argument = opened.groups()
            options = {}
            while index < len(source) and (option := OPTION.match(source[index])):
                options[option[1]] = option[2]
                index += 1
            label = options.get("label") or options.get("name") or ""
            if name == "tested-claim":
                label, argument = argument.strip(), ""
            if name in CODE:
                in_code = mark
                say(f"```{argument}", words=False)
            elif name == "math":
                number = equation_number(label, links)
                closing.append((mark, f"{number}$$"))
                say(*([anchor(label), ""] if label else []), "$$")
            else:
                closing.append((mark, ""))
                say("", *([anchor(label), ""] if label else []))
                say(directive_heading(name, argument, label, links), "")
        elif label_line := re.match(r"^\(([\w:.-]+)\)=\s*$", line):
            # with an empty line after it, for a heading is none in a piece of HTML
            say(anchor(label_line[1]), "")
        elif numbered := re.match(r"^(\s*)\$\$\s*\(([\w:.-]+)\)\s*$", line):
            indent, label = numbered.groups()
            opening = next(
                at
                for at in range(len(lines) - 1, -1, -1)
                if lines[at][0].strip().startswith("$$")
            )
            lines[opening:opening] = [(f"{indent}{anchor(label)}", True), ("", True)]
            say(f"{indent}{equation_number(label, links)}$$")
        elif fence and closing and fence[1].startswith(closing[-1][0]) and not fence[2]:
            say(closing.pop()[1])
        elif fence and not fence[1].startswith(":"):
            in_code = fence[1]
            say(line, words=False)
        else:
            say(line)
    pieces: list[str] = []
    for at, (line, words) in enumerate(lines):
        if words and at and lines[at - 1][1]:
            pieces[-1] += f"\n{line}"
        else:
            pieces.append(line)
    kinds = [
        words
        for at, (_, words) in enumerate(lines)
        if not (words and at and lines[at - 1][1])
    ]
    said = [
        ROLE.sub(links.role, piece) if words else piece
        for piece, words in zip(pieces, kinds, strict=True)
    ]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(said)).strip("\n")


def equation_number(label: str, links: Links) -> str:
    """The number of an equation, as TeX says it."""
    place = links.places.get(label)
    return rf"\tag{{{place.number}}}" if place and place.number else ""


def directive_heading(name: str, argument: str, label: str, links: Links) -> str:
    """The bold line that stands for a directive."""
    words = TITLES.get(name, "")
    number = links.places[label].number if label in links.places else ""
    if name in ("solution", "solution-start"):
        return f"**Solution to** {links.link(argument.strip())}**.**"
    if name.startswith("prf:") and argument:
        argument = f"({argument})"
    if words and number:
        words += f" {number}"
        argument = argument if argument.startswith("(") else f"({argument})"
        argument = argument.replace("()", "")
    heading = " ".join(part for part in (words, argument) if part)
    return f"**{heading.rstrip('.')}.**" if heading else ""


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


def make_notebook(
    text: str,
    title: str,
    macros: dict[str, str | list],
    links: Links | None = None,
    url: str = "",
) -> NotebookNode:
    """The notebook of a chapter, from its text; `links` says what its references mean,
    and `url` is the project's address.
    """
    links = links or Links()
    cells = [
        new_markdown_cell(
            f"*{title}*: a chapter of the CRATE-MAE book, as a notebook. It runs "
            "where `crate_core` is installed with its extra `book`. Values in the "
            "text are those of the book's own run.\n\n" + macro_definitions(macros)
        ),
        new_code_cell(NEEDS_AT.format(url=url) if url else NEEDS),
    ]

    def place_claims(source: str) -> None:
        """Links to claims lead to the text before the cell that checks them."""
        if labels := CLAIM.findall(source):
            before = next(cell for cell in reversed(cells) if cell.cell_type != "code")
            before.source += "\n\n" + "".join(map(anchor, labels))

    for cell in jupytext.reads(text, fmt="md:myst").cells:
        if cell.cell_type == "code":
            place_claims(cell.source)
            tags = cell.metadata.get("tags", [])
            cells.append(
                new_code_cell(cell.source, metadata={"tags": tags} if tags else {})
            )
            figure = cell.metadata.get("mystnb", {}).get("figure", {})
            if caption := figure.get("caption"):
                label = figure.get("name", "")
                place = links.places.get(label)
                said = plain_markdown(str(caption), links)
                called = place.words if place and place.number else "Figure"
                cells.append(new_markdown_cell(f"{anchor(label)}*{called}: {said}*"))
        elif markdown := plain_markdown(cell.source, links):
            cells.append(new_markdown_cell(markdown))
    if links.cited:
        listed = (
            f"- {anchor(f'cite-{key}')}{reference(links.entries[key])}"
            for key in sorted(links.cited)
        )
        cells.append(new_markdown_cell("**References**\n\n" + "\n".join(listed)))
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


def reference(entry: Entry) -> str:
    """A work of the bibliography, in one line."""
    style = find_plugin("pybtex.style.formatting", "unsrt")()
    formatted = next(iter(style.format_entries([entry])))
    return formatted.text.render(find_plugin("pybtex.backends", "plaintext")())


def find_places(app: Sphinx) -> dict[str, Place]:
    """What every label of the book leads to, with the numbers that its pages show."""
    env = app.env
    found: dict[str, Place] = {}

    def fignumber(kind: str, docname: str, ident: str) -> str:
        numbers = env.toc_fignumbers.get(docname, {}).get(kind, {}).get(ident, ())
        return ".".join(map(str, numbers))

    for docname, title in env.titles.items():
        section = env.toc_secnumbers.get(docname, {}).get("", ())
        number = ".".join(map(str, section))
        found[docname] = Place(title.astext(), docname, number)
    standard = env.get_domain("std").data
    for label, (docname, ident) in standard["anonlabels"].items():
        found[label] = Place(label, docname, "")
        for kind, words in app.config.numfig_format.items():
            if number := fignumber(kind, docname, ident):
                found[label] = Place(words.replace("%s", number), docname, number)
    for label, (docname, ident, title) in standard["labels"].items():
        if not (known := found.get(label)) or not known.number:
            numbers = env.toc_secnumbers.get(docname, {})
            section = numbers.get(f"#{ident}", ())
            if label.startswith("ch-"):
                section = numbers.get("", ())
            number = ".".join(map(str, section))
            found[label] = Place(title, docname, number)
    for label, entry in getattr(env, "proof_list", {}).items():
        docname = entry["docname"]
        number = fignumber(entry["countertype"], docname, label)
        words = f"{entry['realtype'].title()} {number}".strip()
        found[label] = Place(words, docname, number)
    for label, entry in getattr(env, "sphinx_exercise_registry", {}).items():
        docname = entry["docname"]
        number = fignumber("exercise", docname, label)
        if number:
            found[label] = Place(f"Exercise {number}", docname, number)
    for label, (docname, count) in env.get_domain("math").equations.items():
        number = fignumber("displaymath", docname, f"equation-{label}") or str(count)
        found[label] = Place(f"({number})", docname, number)
    return found


def find_entries(app: Sphinx) -> dict[str, Entry]:
    """Key -> entry of the bibliography, for everything that the book cites."""
    return {one.key: one.entry for one in app.env.get_domain("cite").citations}


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
        name = notebook_name(docname)
        link = (
            f'<a class="chapter-notebook" href="{name}" download>'
            "Download this chapter as a Jupyter notebook</a>"
        )
        title.parent.insert(
            title.parent.index(title) + 1,
            nodes.raw("", f'<p class="chapter-tools">{link}</p>', format="html"),
        )


def once_a_build(app: Sphinx, what: Callable[[Sphinx], dict]) -> dict:
    """What is the same for all pages that this build writes."""
    kept = app.env.temp_data.setdefault("notebooks", {})
    if what.__name__ not in kept:
        kept[what.__name__] = what(app)
    return kept[what.__name__]


def glued_values(doctree: nodes.document) -> list[str]:
    """The values that cells gave to the page's text, in their order."""
    return [
        node.astext()
        for node in doctree.findall(nodes.inline)
        if "pasted-text" in node["classes"]
    ]


def launch_buttons(url: str, docname: str, branch: str, site: str) -> list[dict]:
    """The chapter in Colab and in Binder, if the project is where they can find it.

    ``branch`` holds the project, ``site`` the built pages and their notebooks.
    """
    address = urlsplit(url)
    name = address.path.strip("/").removesuffix(".git")
    if address.hostname != "github.com" or name.count("/") != 1:
        return []
    notebook = f"{docname}.ipynb"
    opened = {
        "Colab": "https://colab.research.google.com/github/"
        f"{name}/blob/{site}/{notebook}",
        "Binder": f"https://mybinder.org/v2/gh/{name}/{branch}"
        f"?urlpath=lab/tree/{docname}.md",
    }
    return [
        {
            "type": "link",
            "url": to,
            "text": host,
            "icon": "fas fa-rocket",
            "tooltip": f"Run this chapter in {host}",
            "label": f"launch-{host.lower()}-button",
        }
        for host, to in opened.items()
    ]


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
    if doctree is None or app.builder.name != "html":
        return
    text = page_text(app, pagename)
    if text is None:
        return
    macros = (app.config.mathjax3_config or {}).get("tex", {}).get("macros", {})
    glued = glued_values(doctree)
    same = len(glued) == len(re.findall(r"\{glue(?::\w+)?\}`", text))
    links = Links(
        docname=pagename,
        places=once_a_build(app, find_places),
        notebooks=frozenset(
            name for name in app.env.found_docs if page_text(app, name) is not None
        ),
        entries=once_a_build(app, find_entries),
        glued=iter(glued if same else ()),
    )
    target = Path(app.outdir) / f"{pagename}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    options = app.config.html_theme_options
    url = options.get("repository_url", "")
    title = app.env.titles[pagename].astext()
    nbformat.write(make_notebook(text, title, macros, links, url), target)
    branch = options.get("repository_branch") or "main"
    launch = launch_buttons(url, pagename, branch, app.config.notebooks_branch)
    for button in context.get("header_buttons", []):
        if button.get("label") == "download-buttons":
            button["buttons"][:0] = [
                {
                    "type": "link",
                    "url": target.name,
                    "text": ".ipynb",
                    "icon": "fas fa-code",
                    "tooltip": "Download as a Jupyter notebook",
                    "label": "download-notebook-button",
                },
                *launch,
            ]


def setup(app: Sphinx) -> dict[str, object]:
    """Register the extension."""
    app.add_config_value("notebooks_without", [], "html")
    app.add_config_value("notebooks_branch", "gh-pages", "html")
    app.connect("doctree-resolved", add_link)
    app.connect("html-page-context", write_notebook, priority=700)
    return {"version": "2", "parallel_read_safe": True, "parallel_write_safe": True}
