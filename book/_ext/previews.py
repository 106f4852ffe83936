"""Sphinx extension: links to theorems, definitions, equations and claims show them.

What is linked to stands in one script, `_static/preview-texts.js`, as it stands in its
page; a page loads it when the pointer or the keyboard first rests on such a link
(`previews.js`), from a disk as from a server.  Links to the glossary and to the
bibliography have titles, which browsers show (`glossary_hover.py`).
"""

import json
import posixpath
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urldefrag

from bs4 import BeautifulSoup, Tag
from sphinx.application import Sphinx

SHOWN = {
    "proof": "p.admonition-title, section",
    "math": "",
    "claim": "p.claim-statement",
}
"""Class of what is previewed -> which of its parts; all of it if that is empty."""

LEFT_OUT = ".headerlink, .claim-link, .eqno, script, details, div.solution"


def linked(page: BeautifulSoup, name: str) -> Iterator[tuple[str, str]]:
    """Page and id that the text of the page `name` links to."""
    for link in page.select("article.bd-article a[href*='#']"):
        address, place = urldefrag(link["href"])
        if ":" not in address and {"headerlink", "claim-link"}.isdisjoint(
            link.get("class", [])
        ):
            there = posixpath.join(posixpath.dirname(name), unquote(address))
            yield (posixpath.normpath(there) if address else name), place


def preview(target: Tag) -> str | None:
    """The HTML of what a preview shows; None if the target is no theorem, definition,
    equation or claim.
    """
    kind = next((c for c in target.get("class", []) if c in SHOWN), None)
    if kind is None:
        return None
    copy = BeautifulSoup(str(target), "html.parser")
    for unwanted in copy.select(LEFT_OUT):
        unwanted.decompose()
    for tag in copy.find_all(True):
        tag.attrs.pop("id", None)
        if tag.name == "a":
            tag.unwrap()
    parts = copy.select(SHOWN[kind]) if SHOWN[kind] else [copy]
    return "".join(str(part) for part in parts).strip() or None


def texts(folder: Path) -> dict[str, str]:
    """Each preview that some page of the built book links to, by page and id."""
    parsed = {
        path.relative_to(folder).as_posix(): BeautifulSoup(
            path.read_text(encoding="utf8"), "html.parser"
        )
        for path in sorted((folder / "book").glob("*.html"))
    }
    places = {
        (name, tag["id"]): tag
        for name, page in parsed.items()
        for tag in page.select("div[id]")
    }
    asked = {link for name, page in parsed.items() for link in linked(page, name)}
    found = {
        f"{there}#{place}": preview(places[there, place])
        for there, place in sorted(asked & places.keys())
    }
    return {key: shown for key, shown in found.items() if shown is not None}


def write_previews(app: Sphinx, exception: Exception | None) -> None:
    """Write the texts, and the script that shows them."""
    if exception is not None or app.builder.name != "html":
        return
    out = Path(app.outdir)
    told = json.dumps(texts(out), ensure_ascii=False).replace("</", "<\\/")
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
