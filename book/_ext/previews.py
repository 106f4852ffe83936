"""Sphinx extension: links to theorems, definitions, equations and claims show them.

What is linked to stands in one script, `_static/preview-texts.js`, as it stands in its
page; a page loads it when the pointer or the keyboard first rests on such a link
(`previews.js`), from a disk as from a server.  Links to the glossary and to the
bibliography have titles, which browsers show (`glossary_hover.py`).
"""

import json
import posixpath
import shutil
from collections.abc import Iterator, Mapping
from copy import copy
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

from bs4 import BeautifulSoup, SoupStrainer, Tag
from readings import readings
from sphinx.application import Sphinx

SHOWN = {
    "proof": "p.admonition-title, section",
    "math": "",
    "claim": "p.claim-statement",
}
"""Class of what is previewed -> which of its parts; all of it if that is empty."""

LEFT_OUT = ".headerlink, .claim-link, .eqno, script, details, div.solution"


def linked(page: BeautifulSoup) -> Iterator[tuple[str, str]]:
    """Address and id of what the page's text links to in the book."""
    for link in page.find_all("a", href=lambda address: address and "#" in address):
        address, place = urldefrag(link["href"])
        if ":" not in address and {"headerlink", "claim-link"}.isdisjoint(
            link.get("class", [])
        ):
            yield address, place


def place_of(name: str, address: str, place: str) -> str:
    """Where a link in the page `name` leads to."""
    there = posixpath.join(posixpath.dirname(name), unquote(address))
    return f"{posixpath.normpath(there) if address else name}#{place}"


def preview(target: Tag) -> str | None:
    """The HTML of what a preview shows; None if the target is no theorem, definition,
    equation or claim.
    """
    kind = next((c for c in target.get("class", []) if c in SHOWN), None)
    if kind is None:
        return None
    shown = copy(target)
    for unwanted in shown.select(LEFT_OUT):
        unwanted.decompose()
    for tag in [shown, *shown.find_all(True)]:
        tag.attrs.pop("id", None)
        if tag.name == "a":
            tag.unwrap()
    parts = shown.select(SHOWN[kind]) if SHOWN[kind] else [shown]
    return "".join(str(part) for part in parts).strip() or None


def links_and_previews(html: str) -> dict[str, Any]:
    """What the text of a page links to, as the page writes it, and the preview of each
    of its places that has one.
    """
    article = SoupStrainer("article", class_="bd-article")
    page = BeautifulSoup(html, "html.parser", parse_only=article)
    previews = {
        target["id"]: text
        for target in page.find_all("div", id=True, class_=list(SHOWN))
        if (text := preview(target)) is not None
    }
    return {"links": sorted(set(linked(page))), "previews": previews}


def texts(pages: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Each preview that some page links to, by page and id; pages by their names."""
    asked = {
        place_of(name, *link) for name, page in pages.items() for link in page["links"]
    }
    found = {
        f"{name}#{place}": text
        for name, page in pages.items()
        for place, text in page["previews"].items()
    }
    return {key: found[key] for key in sorted(asked & found.keys())}


def write_previews(app: Sphinx, exception: Exception | None) -> None:
    """Write the texts, and the script that shows them."""
    if exception is not None or app.builder.name != "html":
        return
    out = Path(app.outdir)
    pages = sorted(path.name for path in (out / "book").glob("*.html"))
    found = {
        f"book/{name}": readings(app).of(f"book/{name}", links_and_previews)
        for name in pages
    }
    told = json.dumps(texts(found), ensure_ascii=False).replace("</", "<\\/")
    (out / "_static" / "preview-texts.js").write_text(
        f"window.cratePreviews = {told};\n", encoding="utf8"
    )
    shutil.copy(Path(__file__).with_suffix(".js"), out / "_static" / "previews.js")


def setup(app: Sphinx) -> dict[str, object]:
    """Register the extension."""
    app.add_js_file("previews.js", loading_method="defer")
    # after finish.py: previews show what the pages show in the end
    app.connect("build-finished", write_previews, priority=920)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
