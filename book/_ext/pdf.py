"""The whole book as one PDF: `python book/_ext/pdf.py`, what `make pdf` runs.

The built pages are put one after the other into one page, behind a list of contents;
links between them become links inside it.  A Chromium that is installed prints it, with
the site's own style for paper: live figures and players show their stills, proofs are
open, the code of figures is left out.  It prints twice, since only then the numbers of
pages are known that the contents name.  The pages of the package's modules stay out.
"""

import html
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urldefrag

import yaml
from bs4 import BeautifulSoup, Tag

ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
LEFT_OUT = (
    "script, style, .headerlink, .chapter-tools, .code-fold, .claim-fold, .claim-link, "
    ".crate-player-controls, .ledger-filters, .toctree-wrapper, noscript"
)
STYLE = """
body { background: white; padding: 0; }
.page { break-before: page; }
.title { margin-top: 30vh; text-align: center; }
.contents li { display: flex; list-style: none; }
.contents li a { flex: 1; }
.contents .part { font-weight: 600; margin-top: 0.6rem; }
.contents ul { padding-left: 1.2rem; }
img, svg { max-width: 100%; }
"""
FOOTER = (
    '<div style="font-size:8px;width:100%;text-align:center">'
    '<span class="pageNumber"></span></div>'
)


def find_browser() -> str | None:
    """The Chromium that is installed."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def parts(toc: dict) -> list[tuple[str, list[str]]]:
    """The parts of the book with their pages, from the table of contents."""
    first = [("", [toc["root"]])]
    return first + [
        (part["caption"], [chapter["file"] for chapter in part["chapters"]])
        for part in toc["parts"]
    ]


def slug(name: str) -> str:
    """What stands before the names of places of a page."""
    return name.rsplit("/", 1)[-1]


def inside(page: Tag, name: str, known: Iterable[str], folder: Path) -> None:
    """Give a page's places and links names that hold in the whole book.

    `folder` is the site's; pictures are found by their whole address.
    """
    at = (folder / f"{name}.html").parent
    pages = {(folder / f"{other}.html").resolve(): slug(other) for other in known}
    for tag in page.select("[id]"):
        tag["id"] = f"{slug(name)}--{tag['id']}"
    for link in page.select("a[href]"):
        address, place = urldefrag(link["href"])
        if re.match(r"[a-z]+:", address):
            continue
        target = (at / address).resolve() if address else at / f"{slug(name)}.html"
        if (found := pages.get(target.resolve())) is None:
            del link["href"]  # what is not in the book: notebooks, sources
        else:
            link["href"] = f"#{found}--{place}" if place else f"#{found}"
    for picture in page.select("img[src]"):
        if not re.match(r"[a-z]+:", picture["src"]):
            picture["src"] = (at / picture["src"]).resolve().as_uri()
        picture.attrs.pop("loading", None)


def article(folder: Path, name: str, known: Iterable[str]) -> tuple[str, list[str]]:
    """A page's text as it stands in the book, and the titles in it: its own first."""
    text = (folder / f"{name}.html").read_text(encoding="utf8")
    page = BeautifulSoup(text, "html.parser").select_one("article.bd-article")
    for fold in page.select(".claim-fold"):  # of what it says, the conditions stay
        when = fold.find("dt", string="When")
        if when is not None:
            conditions = when.find_next_sibling("dd").extract()
            conditions.name = "p"
            conditions.insert(0, "When: ")
            fold.insert_before(conditions)
    for unwanted in page.select(LEFT_OUT):
        unwanted.decompose()
    for fold in page.select("details"):
        fold["open"] = ""
    inside(page, name, known, folder)
    titles = [" ".join(title.get_text().split()) for title in page.select("h1, h2")]
    body = f'<div class="page" id="{slug(name)}">{page.decode()}</div>'
    return body, titles


def styles(folder: Path, name: str) -> str:
    """The style sheets of the site, by their whole address."""
    text = (folder / f"{name}.html").read_text(encoding="utf8")
    found = BeautifulSoup(text, "html.parser").select('link[rel="stylesheet"][href]')
    sheets = [
        (folder / f"{name}.html").parent.joinpath(link["href"].split("?")[0])
        for link in found
    ]
    math = folder / "_static" / "math.css"  # a first page without formulas lacks it
    unique = dict.fromkeys(sheet.resolve() for sheet in [*sheets, math])
    return "\n".join(
        f'<link rel="stylesheet" href="{sheet.as_uri()}">'
        for sheet in unique
        if sheet.is_file()
    )


def whole_book(
    folder: Path,
    toc: dict,
    title: str,
    numbers: dict[str, int] | None = None,
) -> str:
    """The book as one page; `numbers` gives the pages of paper that parts begin on."""
    names = [name for _, inner in parts(toc) for name in inner]
    bodies = []
    lines = []
    for caption, inner in parts(toc):
        if caption:
            lines.append(f'<li class="part">{html.escape(caption)}</li>')
        for name in inner:
            body, titles = article(folder, name, names)
            bodies.append(body)
            number = (numbers or {}).get(slug(name), "")
            said = html.escape(titles[0] if titles else slug(name))
            lines.append(
                f'<li><a href="#{slug(name)}">{said}</a><span>{number}</span></li>'
            )
    contents = (
        '<div class="page contents"><h1>Contents</h1><ul>'
        + "\n".join(lines)
        + "</ul></div>"
    )
    return (
        '<!DOCTYPE html>\n<html lang="en" data-theme="light"><head>'
        f'<meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"{styles(folder, names[0])}<style>{STYLE}</style></head><body>"
        f'<div class="title"><h1>{html.escape(title)}</h1></div>'
        + contents
        + "\n".join(bodies)
        + "</body></html>"
    )


def destinations(pdf: bytes) -> dict[str, int]:
    """Name of a place that links lead to -> its page of paper, from 1.

    Chromium writes the tree of pages and the named places as plain text.
    """
    objects = {
        int(number): body
        for number, body in re.findall(
            rb"(?s)(?:^|\n)(\d+) 0 obj\s*(.*?)\s*endobj", pdf
        )
    }

    def leaves(number: int) -> list[int]:
        kids = re.search(rb"/Kids\s*\[(.*?)\]", objects[number], re.DOTALL)
        if kids is None:
            return [number]
        return [
            leaf
            for kid in re.findall(rb"(\d+) 0 R", kids[1])
            for leaf in leaves(int(kid))
        ]

    root = next(body for body in objects.values() if b"/Type /Catalog" in body)
    top = re.search(rb"/Pages (\d+) 0 R", root)
    assert top is not None
    place = {leaf: at for at, leaf in enumerate(leaves(int(top[1])), start=1)}
    named = rb"/([^\s/\[\]<>()]+) \[(\d+) 0 R /XYZ"
    return {
        re.sub(
            r"#([0-9A-Fa-f]{2})", lambda m: chr(int(m[1], 16)), name.decode()
        ): place[int(page)]
        for body in objects.values()
        for name, page in re.findall(named, body)
        if int(page) in place
    }


def print_page(browser: str, source: Path) -> bytes:
    """The page at `source` as a PDF, printed by a Chromium without a network."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=browser, args=["--no-sandbox", "--disable-gpu"]
        )
        page = chromium.new_context(offline=True).new_page()
        page.set_default_timeout(600_000)
        page.goto(source.as_uri(), wait_until="load")
        page.evaluate("document.fonts.ready.then(() => true)")
        pdf = page.pdf(
            format="A4",
            margin={"top": "18mm", "bottom": "18mm", "left": "17mm", "right": "17mm"},
            display_header_footer=True,
            header_template="<span></span>",
            footer_template=FOOTER,
            outline=True,
            tagged=True,
            print_background=True,
        )
        chromium.close()
    return pdf


def write_pdf(folder: Path, toc: dict, title: str, target: Path) -> None:
    """Print the site at `folder` into the file `target`.

    Raises
    ------
    FileNotFoundError
        If there is no Chromium, or the site is not built.
    """
    browser = find_browser()
    if browser is None:
        raise FileNotFoundError(
            f"no Chromium to print with: none of {', '.join(BROWSERS)} is on the PATH "
            "(Debian: apt-get install chromium)"
        )
    for _, inner in parts(toc):
        for name in inner:
            if not (folder / f"{name}.html").is_file():
                raise FileNotFoundError(f"{name} is not built: make book")
    target.parent.mkdir(parents=True, exist_ok=True)
    source = target.with_suffix(".html")
    source.write_text(whole_book(folder, toc, title), encoding="utf8")
    numbers = destinations(print_page(browser, source))
    source.write_text(whole_book(folder, toc, title, numbers), encoding="utf8")
    target.write_bytes(print_page(browser, source))
    source.unlink()


def main() -> int:
    """Print the book, and say where it is."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf8"))
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf8"))
    target = ROOT / "_build" / "pdf" / "book.pdf"
    try:
        write_pdf(ROOT / "_build" / "html", toc, config["title"], target)
    except FileNotFoundError as error:
        print(f"make pdf: {error}", file=sys.stderr)
        return 1
    print(f"The book as a PDF: {target} ({target.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
