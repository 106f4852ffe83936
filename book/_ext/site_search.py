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
from readings import readings
from sphinx.application import Sphinx
from sphinx.config import Config

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


def records(html: str) -> Iterator[dict[str, str]]:
    """The records of a page: title `t`, chapter `c`, kind `k`, place in the page `u`,
    text `x`.
    """
    article = BeautifulSoup(html, "html.parser").select_one("article.bd-article")
    if article is None or (top := article.select_one("section")) is None:
        return
    for unwanted in article.select(NO_TEXT):
        if not unwanted.select_one(".claim"):
            unwanted.decompose()
    chapter = heading(top)

    def record(kind: str, title: str, place: str, text: str) -> dict[str, str]:
        return {"k": kind, "t": title, "c": chapter, "u": place, "x": text}

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


def all_records(html: str) -> list[dict[str, str]]:
    """The records of a page, as they are kept."""
    return list(records(html))


def addressed(record: dict[str, str], docname: str, config: Config) -> dict[str, str]:
    """A page's record with its address, as a record of the package's reference if the
    page belongs to it, and with `o` where it tells what another chapter derives.
    """
    place = f"#{record['u']}" if record["u"] else ""
    found = record | {"u": f"{docname}.html{place}"}
    if docname.startswith(tuple(config.search_reference)):
        found["k"] = "reference"
    return found | ({"o": "overview"} if docname in config.search_overview else {})


def write_records(app: Sphinx, exception: Exception | None) -> None:
    """Write the records and the script, and put both into the search page."""
    if exception is not None or app.builder.name != "html":
        return
    out = Path(app.outdir)
    found = []
    for docname in sorted(app.env.found_docs):
        page = out / f"{docname}.html"
        if page.is_file() and docname not in app.config.search_without:
            found += [
                addressed(record, docname, app.config)
                for record in readings(app).of(f"{docname}.html", all_records)
            ]
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
