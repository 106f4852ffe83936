"""Sphinx extension: a search that finds sections, theorems and claims, best first, with
the words found.

When the site is built, every page is cut into records (chapter, section, theorem,
claim, entry of the package's reference), written as a script that also loads from a
disk; the search page ranks them (site_search.js).
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from bs4 import BeautifulSoup, Tag
from sphinx.application import Sphinx

TEXT = 1500
"""Letters of a record's text that are kept."""

NO_TEXT = (
    "script, style, pre, .headerlink, details, .eqno, .chapter-tools, .toctree-wrapper"
)


def plain(text: str) -> str:
    """Words and formulas in one line, TeX's marks taken out."""
    text = re.sub(
        r"\\[()\[\]]|\\(?:left|right|mathrm|operatorname|mathbb)\b", " ", text
    )
    text = re.sub(r"\\([a-zA-Z]+)", r"\1", text)
    return " ".join(re.sub(r"[{}$]", "", text).split())


def own_text(section: Tag) -> str:
    """A section's text without its title, its subsections and what has records of its
    own.
    """
    parts = []
    for child in section.find_all(True, recursive=False):
        if child.name in ("section", "h1", "h2", "h3", "h4"):
            continue
        if child.select_one(".claim") or "proof" in child.get("class", []):
            continue
        parts.append(child.get_text(" "))
    return plain(" ".join(parts))[:TEXT]


def heading(section: Tag) -> str:
    """A section's title without its number."""
    title = section.find(re.compile("h[1-6]"), recursive=False)
    words = plain(title.get_text(" ")) if title else ""
    return re.sub(r"^[\d.]+\s+", "", words).rstrip("# ")


def records(
    html: str, address: str, reference: bool = False, overview: bool = False
) -> Iterator[dict[str, str]]:
    """The records of a page: title `t`, chapter `c`, kind `k`, address
    `u`, text `x`, and `o` where the page tells what another chapter derives.
    """
    article = BeautifulSoup(html, "html.parser").select_one("article.bd-article")
    if article is None or (top := article.select_one("section")) is None:
        return
    for unwanted in article.select(NO_TEXT):
        if not unwanted.select_one(".claim"):
            unwanted.decompose()
    chapter = heading(top)

    def record(kind: str, title: str, place: str, text: str) -> dict[str, str]:
        kind = "reference" if reference else kind
        address_of = f"{address}#{place}" if place else address
        found = {"k": kind, "t": title, "c": chapter, "u": address_of, "x": text}
        return found | ({"o": "overview"} if overview else {})

    yield record("chapter", chapter, "", own_text(top))
    for section in top.select("section[id]"):
        if (title := heading(section)) and "proof-content" not in section["id"]:
            yield record("section", title, section["id"], own_text(section))
    for theorem in top.select("div.proof[id]"):
        title = theorem.select_one(".admonition-title")
        if title is None or plain(title.get_text(" ")).lower() == "proof":
            continue
        words = plain(theorem.get_text(" "))
        yield record("theorem", plain(title.get_text(" ")), theorem["id"], words[:TEXT])
    for claim in top.select(".claim[id]"):
        sentence = claim.select_one("p")
        words = plain(sentence.get_text(" ") if sentence else "")
        yield record("claim", words[:110], claim["id"], words[:TEXT])
    for entry in top.select("dl.py > dt[id]"):
        yield record(
            "reference", entry["id"], entry["id"], plain(entry.get_text(" "))[:300]
        )


def write_records(app: Sphinx, exception: Exception | None) -> None:
    """Write the records and the script, and put both into the search page."""
    if exception is not None or app.builder.name != "html":
        return
    out = Path(app.outdir)
    found = []
    for docname in sorted(app.env.found_docs):
        page = out / f"{docname}.html"
        if page.is_file() and docname not in app.config.search_without:
            reference = docname.startswith(tuple(app.config.search_reference))
            html = page.read_text(encoding="utf8")
            overview = docname in app.config.search_overview
            found += records(html, f"{docname}.html", reference, overview)
    script = f"window.bookRecords = {json.dumps(found, ensure_ascii=False)};\n"
    (out / "_static" / "records.js").write_text(script, encoding="utf8")
    own = Path(__file__).with_name("site_search.js").read_text(encoding="utf8")
    (out / "_static" / "search.js").write_text(own, encoding="utf8")
    page = out / "search.html"
    html = page.read_text(encoding="utf8")
    theirs = r"(?:searchtools|language_data|searchindex|records|search)\.js"
    html = re.sub(rf'\s*<script src="[^"]*{theirs}[^"]*"></script>', "", html)
    ours = "".join(
        f'<script src="_static/{name}.js"></script>\n' for name in ("records", "search")
    )
    page.write_text(html.replace("</head>", f"{ours}</head>", 1), encoding="utf8")


def setup(app: Sphinx) -> dict[str, object]:
    """Register the extension."""
    app.add_config_value("search_without", [], "")
    app.add_config_value("search_reference", [], "")
    app.add_config_value("search_overview", [], "")
    # before finish.py, which leaves the search page's scripts alone
    app.connect("build-finished", write_records, priority=850)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
