"""Sphinx extension: the claims of the book, collected from its pages and checked to
have run.

A page makes a claim in a code cell, by `crate_core.companion.claim(label, statement,
conditions=..., kind=..., evidence=..., measured=..., holds=..., refuses=...)` with
literal strings, or, where the
check is a test of the package, with

    ```{tested-claim} clm-model-parity
    :conditions: float32, the same images and mask noise
    :kind: numerical
    :test: tests/model/test_crate.py::test_parity
    :refuses: the residual left out; another mask
    Loss and predictions agree with the reference to $10^{-5}$.
    ```

The directive `{claims-ledger}` shows all of them, page by page, with links to the very
boxes, and their number by kind; `ledger.json`, beside the built pages, lists them for
programs. The build warns (and so fails under -W) about a label
used twice, an argument that is not a literal, an unknown kind, a claim whose box is not
among its page's outputs, and a test that does not exist. The warnings are repeated in
every build until they are mended. `{ref}` works with a claim's label, given a text.

The label of a theorem in the evidence (`thm-rate-grad`) becomes a link to it, "Theorem
3.1", in the ledger and in the box; the build warns when there is no such theorem.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

from claims import KINDS, Claim, check_claim, read_boxes, read_claims
from depcache import is_notebook
from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

from crate_core.claims import claim_box

logger = logging.getLogger(__name__)

PROOF_LABEL = re.compile(r"\b(?:thm|prop|prp|lem|cor|def)-[a-z0-9]+(?:-[a-z0-9]+)*")


FILTER_SCRIPT = """(function () {
  const fields = document.currentScript.previousElementSibling;
  fields.hidden = false;
  fields.addEventListener("change", function () {
    const off = Array.from(fields.querySelectorAll("input:not(:checked)"),
                           function (box) { return "ledger-kind-" + box.value; });
    document.querySelectorAll(".ledger-chapter").forEach(function (chapter) {
      const rows = Array.from(chapter.querySelectorAll("tbody tr"));
      rows.forEach(function (row) {
        row.hidden = off.some(function (kind) { return row.classList.contains(kind); });
      });
      chapter.hidden = rows.every(function (row) { return row.hidden; });
    });
  });
})();"""


def inline_nodes(text: str) -> list[nodes.Node]:
    """Text with TeX between dollar signs and code between back quotes, as document
    nodes.
    """
    result: list[nodes.Node] = []
    for piece in re.split(r"(\$[^$]+\$|`[^`]+`)", text):
        if piece.startswith("$") and len(piece) > 2:
            result.append(nodes.math(piece[1:-1], piece[1:-1]))
        elif piece.startswith("`") and len(piece) > 2:
            result.append(nodes.literal(piece[1:-1], piece[1:-1]))
        elif piece:
            result.append(nodes.Text(piece))
    return result


def theorem(app: Sphinx, label: str, docname: str) -> tuple[str, str]:
    """What sphinx-proof calls the theorem of this label ("Theorem 3.1"), and where it
    is, seen from a page.
    """
    entry = app.env.proof_list[label]  # type: ignore[attr-defined]
    numbers = app.env.toc_fignumbers.get(entry["docname"], {}).get(
        entry["countertype"], {}
    )
    number = ".".join(str(part) for part in numbers.get(entry["ids"][0], ()))
    uri = app.builder.get_relative_uri(docname, entry["docname"])
    return f"{entry['realtype'].title()} {number}".strip(), f"{uri}#{entry['ids'][0]}"


def link_theorems(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """When a page is written: the labels of theorems in its claims become links."""
    known = getattr(app.env, "proof_list", {})

    def as_html(match: re.Match[str]) -> str:
        name, uri = theorem(app, match[0], docname)
        return f'<a class="reference internal" href="{uri}">{name}</a>'

    for node in list(doctree.findall(nodes.raw)):
        if '<div class="claim ' in node.astext():
            head, mark, detail = node.astext().partition('<details class="claim-fold">')
            linked = PROOF_LABEL.sub(
                lambda match: as_html(match) if match[0] in known else match[0], detail
            )
            node.replace_self(
                nodes.raw("", head + mark + linked, format=node["format"])
            )
    for node in list(doctree.findall(nodes.Text)):
        inside = (
            node.parent.parent["classes"]
            if isinstance(node.parent, nodes.paragraph)
            else []
        )
        if "ledger-when-and-how-it-is-checked" not in inside:
            continue
        pieces: list[nodes.Node] = []
        for piece in re.split(f"({PROOF_LABEL.pattern})", node):
            if piece in known:
                name, uri = theorem(app, piece, docname)
                pieces.append(nodes.reference("", name, refuri=uri, internal=True))
            elif piece:
                pieces.append(nodes.Text(piece))
        node.parent.replace(node, pieces)


def kind_node(kind: str) -> nodes.inline:
    """The small tag that says how a claim is known."""
    return nodes.inline(
        kind, kind, classes=["claim-kind", f"claim-kind-{kind.replace(' ', '-')}"]
    )


class TestedClaim(SphinxDirective):
    """A claim that a test of the package checks: the same box as `claim` makes, and a
    line in the ledger.
    """

    required_arguments = 1
    has_content = True
    option_spec = {  # noqa: RUF012 - docutils' interface
        "conditions": directives.unchanged_required,
        "kind": directives.unchanged_required,
        "test": directives.unchanged_required,
        "evidence": directives.unchanged,
        "refuses": directives.unchanged,
    }

    def run(self) -> list[nodes.Node]:
        """Record the claim and return its box."""
        missing = [
            name for name in ("conditions", "kind", "test") if name not in self.options
        ]
        if missing:
            raise self.error(
                f"tested-claim {self.arguments[0]}: needs the options {missing}"
            )
        test = self.options["test"].strip()
        evidence = self.options.get("evidence", "").strip()
        refused = [
            name.strip()
            for name in self.options.get("refuses", "").split(";")
            if name.strip()
        ]
        claim = Claim(
            label=self.arguments[0].strip(),
            statement=" ".join(self.content).strip(),
            conditions=self.options["conditions"].strip(),
            kind=self.options["kind"].strip(),
            evidence=f"{evidence}; `{test}`" if evidence else f"`{test}`",
            docname=self.env.docname,
            test=test,
            alternatives=tuple(refused),
        )
        store(self.env).tested.setdefault(self.env.docname, []).append(claim)
        details = {"When": [claim.conditions], "Checked": [claim.evidence]}
        if refused:
            details["Refuses"] = refused
        box = claim_box(
            claim.label, claim.statement, claim.kind, details, alternatives=refused
        )
        return [nodes.raw("", box.as_html, format="html")]


class LedgerNode(nodes.General, nodes.Element):
    """Where the ledger goes; filled in when all pages are known."""


class ClaimsLedger(SphinxDirective):
    """All claims of the book."""

    def run(self) -> list[nodes.Node]:
        """Leave a place for the ledger."""
        store(self.env).pages.add(self.env.docname)
        return [LedgerNode("")]


class Store:
    """What the extension keeps with Sphinx's environment, by page."""

    def __init__(self) -> None:
        self.claims: dict[str, list[Claim]] = {}
        self.tested: dict[str, list[Claim]] = {}
        self.problems: dict[str, list[str]] = {}
        self.pages: set[str] = set()  # that show the ledger
        self.written = ""  # what they showed when they were last written

    def forget(self, docname: str) -> None:
        """Drop a page."""
        for table in (self.claims, self.tested, self.problems):
            table.pop(docname, None)
        self.pages.discard(docname)

    def ordered(self, docnames: Iterable[str]) -> list[Claim]:
        """All claims, in the order of these pages."""
        return [claim for docname in docnames for claim in self.claims.get(docname, [])]


def store(env: BuildEnvironment) -> Store:
    """The extension's store in this environment."""
    if not hasattr(env, "claims_store"):
        env.claims_store = Store()  # type: ignore[attr-defined]
    return env.claims_store  # type: ignore[attr-defined]


def reading_order(env: BuildEnvironment) -> list[str]:
    """Pages in the order of the table of contents."""
    order: list[str] = []

    def visit(docname: str) -> None:
        if docname not in order:
            order.append(docname)
            for child in env.toctree_includes.get(docname, []):
                visit(child)

    visit(env.config.root_doc)
    return order


def collect(app: Sphinx, doctree: nodes.document) -> None:
    """After a page is read and executed: its claims, and whether their
    boxes are there.
    """
    docname, kept = app.env.docname, store(app.env)
    text = Path(app.env.doc2path(docname)).read_text(encoding="utf8")
    claims, problems = read_claims(text, docname) if is_notebook(text) else ([], [])
    claims += kept.tested.get(docname, [])
    boxes: Counter[str] = Counter()
    shown: dict[str, dict] = {}
    for node in doctree.findall(nodes.raw):
        for label, data in read_boxes(node.astext()):
            boxes[label] += 1
            shown[label] = data
    claims = [
        replace(
            claim,
            alternatives=tuple(shown.get(claim.label, {}).get("alternatives", ())),
            recorded=shown.get(claim.label, {}).get("recorded", ""),
        )
        for claim in claims
    ]
    for claim in claims:
        problems += check_claim(claim, boxes, Path(app.srcdir))
        for table in ("labels", "anonlabels"):
            entry = (
                (docname, claim.label, claim.label)
                if table == "labels"
                else (docname, claim.label)
            )
            app.env.get_domain("std").data[table][claim.label] = entry
    kept.claims[docname], kept.problems[docname] = claims, problems


def check_all(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """When all pages are read: warn of what is wrong, and name the pages whose ledger
    has changed.
    """
    kept = store(env)
    claims = kept.ordered(reading_order(env))
    for docname, problems in kept.problems.items():
        for problem in problems:
            logger.warning(problem, location=docname, type="ledger")
    known = getattr(env, "proof_list", {})
    for claim in claims:
        for label in PROOF_LABEL.findall(claim.evidence):
            if label not in known:
                logger.warning(
                    f"{claim.label}: there is no theorem {label}",
                    location=claim.docname,
                    type="ledger",
                )
    places: dict[str, list[str]] = {}
    for claim in claims:
        places.setdefault(claim.label, []).append(claim.docname)
    for label, docnames in places.items():
        if len(docnames) > 1:
            logger.warning(
                f"{label}: used {len(docnames)} times",
                location=docnames[-1],
                type="ledger",
            )
    for docname in {claim.docname for claim in claims} | kept.pages:
        # boxes and tables have TeX of their own
        env.get_domain("math").data["has_equations"][docname] = True
    content = json.dumps([asdict(claim) for claim in claims])
    if content == kept.written:
        return []
    kept.written = content
    return sorted(kept.pages)


def table_of(
    header: list[str], rows: list[list[nodes.Element]], widths: list[int], css: str
) -> nodes.table:
    """A table node; each cell carries its column's name as a class."""
    group = nodes.tgroup(cols=len(header))
    group += [nodes.colspec(colwidth=width) for width in widths]

    def line(cells: list[nodes.Element]) -> nodes.row:
        names = [f"{css}-{re.sub('[^a-z]+', '-', name.lower())}" for name in header]
        return nodes.row(
            "",
            *(
                nodes.entry("", cell, classes=[name])
                for cell, name in zip(cells, names, strict=True)
            ),
        )

    group += nodes.thead("", line([nodes.paragraph("", name) for name in header]))
    group += nodes.tbody("", *(line(row) for row in rows))
    return nodes.table("", group, classes=[css])


def section_id(page: str) -> str:
    """The id of a page's section in the ledger."""
    return f"ledger-{page.rsplit('/', 1)[-1].replace('_', '-')}"


def is_body_row(node: nodes.Node) -> bool:
    """Whether a node is a row below a table's head."""
    return isinstance(node, nodes.row) and isinstance(node.parent, nodes.tbody)


def filters(counts: Counter[str]) -> str:
    """Check boxes that hide the rows of a kind; without scripts they are not there."""
    boxes = "".join(
        f'<label><input type="checkbox" value="{kind.replace(" ", "-")}" checked> '
        f"{kind} ({counts[kind]})</label>"
        for kind in KINDS
        if counts[kind]
    )
    return (
        '<fieldset class="ledger-filters" hidden><legend>Show the claims that are'
        f"</legend>{boxes}</fieldset><script>{FILTER_SCRIPT}</script>"
    )


def ledger_row(claim: Claim, uri: str) -> list[nodes.Element]:
    """A claim's cells: the sentence with its kind and its place, the check, and what
    the check refuses.
    """
    sentence = nodes.paragraph("", "", kind_node(claim.kind), nodes.Text(" "))
    sentence += inline_nodes(claim.statement)
    link = nodes.reference(
        "",
        "",
        refuri=f"{uri}#{claim.label}",
        internal=True,
        classes=["ledger-link"],
    )
    link += nodes.literal("", claim.label)
    said = nodes.container("", sentence, nodes.paragraph("", "", link))
    checked = nodes.container(
        "",
        nodes.paragraph("", "", *inline_nodes(claim.conditions)),
        nodes.paragraph(
            "",
            "",
            nodes.emphasis("", "Checked:"),
            nodes.Text(" "),
            *inline_nodes(claim.evidence),
        ),
    )
    if not claim.recomputed:
        where = (
            "by the test named, not by a build"
            if claim.test
            else f"read from `{claim.recorded}`, not computed again by a build"
            if claim.recorded
            else "no check"
        )
        checked += nodes.paragraph(
            "", "", *inline_nodes(f"({where})"), classes=["ledger-not-recomputed"]
        )
    names: nodes.Element = nodes.bullet_list(
        "",
        *(
            nodes.list_item("", nodes.paragraph("", "", *inline_nodes(name)))
            for name in claim.alternatives
        ),
    )
    if not claim.alternatives:
        names = nodes.paragraph("", "nothing named")
    return [said, checked, names]


def ledger_nodes(app: Sphinx, claims: list[Claim], docname: str) -> list[nodes.Node]:
    """The ledger: numbers by kind, then a table a page."""
    counts = Counter(claim.kind for claim in claims)
    summary = [
        [
            nodes.paragraph("", "", kind_node(kind)),
            nodes.paragraph("", meaning),
            nodes.paragraph("", str(counts[kind])),
        ]
        for kind, meaning in KINDS.items()
    ]
    total = nodes.paragraph(
        "",
        "",
        nodes.strong("", f"{len(claims)} claim{'' if len(claims) == 1 else 's'}"),
        classes=["ledger-total"],
    )
    total += nodes.Text(
        f", pages with claims: {len({claim.docname for claim in claims})}."
    )
    result: list[nodes.Node] = [
        total,
        table_of(
            ["Kind", "How it is known", "Claims"],
            summary,
            [20, 65, 15],
            "ledger-summary",
        ),
    ]
    pages = list(dict.fromkeys(claim.docname for claim in claims))
    contents = nodes.paragraph(classes=["ledger-contents"])
    for page in pages:
        number = sum(claim.docname == page for claim in claims)
        contents += nodes.reference(
            "",
            f"{app.env.titles[page].astext()} ({number})",
            refid=section_id(page),
            internal=True,
        )
        contents += nodes.Text(" ")
    result += [contents, nodes.raw("", filters(counts), format="html")]
    for page in pages:
        uri = app.builder.get_relative_uri(docname, page)
        section = nodes.section(ids=[section_id(page)], classes=["ledger-chapter"])
        title = nodes.reference(
            "", app.env.titles[page].astext(), refuri=uri, internal=True
        )
        section += nodes.title("", "", title)
        found = [claim for claim in claims if claim.docname == page]
        table = table_of(
            ["Claim", "When, and how it is checked", "What it refuses"],
            [ledger_row(claim, uri) for claim in found],
            [40, 38, 22],
            "ledger",
        )
        for row, claim in zip(
            table.findall(lambda node: is_body_row(node)), found, strict=True
        ):
            row["ids"] = [f"ledger-{claim.label}"]
            row["classes"] = [f"ledger-kind-{claim.kind.replace(' ', '-')}"]
        section += table
        result.append(section)
    return result


def fill_in(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """When a page that shows the ledger is written: put it there."""
    for place in list(doctree.findall(LedgerNode)):
        place.replace_self(
            ledger_nodes(app, store(app.env).ordered(reading_order(app.env)), docname)
        )


def write_json(app: Sphinx, exception: Exception | None) -> None:
    """When the pages are written: `ledger.json` beside them, for programs."""
    if exception is None and app.builder.format == "html" and store(app.env).pages:
        claims = store(app.env).ordered(reading_order(app.env))
        text = json.dumps([claim.entry() for claim in claims], indent=1)
        Path(app.outdir, "ledger.json").write_text(text + "\n", encoding="utf8")


def forget_page(app: Sphinx, env: BuildEnvironment, docname: str) -> None:
    """Drop what is known of a page that is read again or gone."""
    del app
    store(env).forget(docname)


def merge_pages(
    app: Sphinx, env: BuildEnvironment, docnames: Iterable[str], other: BuildEnvironment
) -> None:
    """Take over what a parallel reader has found."""
    del app
    kept, read = store(env), store(other)
    for docname in docnames:
        for mine, theirs in ((kept.claims, read.claims), (kept.tested, read.tested)):
            if docname in theirs:
                mine[docname] = theirs[docname]
        if docname in read.problems:
            kept.problems[docname] = read.problems[docname]
        if docname in read.pages:
            kept.pages.add(docname)


def setup(app: Sphinx) -> dict[str, object]:
    """Register the extension."""
    app.add_node(LedgerNode)
    app.add_directive("tested-claim", TestedClaim)
    app.add_directive("claims-ledger", ClaimsLedger)
    app.connect("doctree-read", collect)
    app.connect("env-updated", check_all)
    app.connect("doctree-resolved", fill_in)
    app.connect("doctree-resolved", link_theorems, priority=600)
    app.connect("env-purge-doc", forget_page)
    app.connect("env-merge-info", merge_pages)
    app.connect("build-finished", write_json)
    return {
        "version": "1",
        "env_version": 2,
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
