"""Sphinx extension: what is done to the built pages once all of them are there.

A browser then loads less and moves nothing while it does:

* icons are drawn in the page, from the theme's own script, which is not loaded (1.5 MB
  for a dozen icons);
* pictures carry their size, load when they come near, and lead to themselves in full
  size; those with few colours are stored with a palette;
* the search index is loaded by the search page alone;
* the list of the package's modules stands beside their pages alone;
* each page has one viewport and a description; `index.html`, which only leads on, has a
  title; a wrong address finds a page (`404.html`, for a server that uses it);
* boxes that scroll sideways can be reached by the keyboard and say at which edge there
  is more; the bar beside the text is a landmark; an empty corner of a table is no
  header.

Every step leaves a page that was finished before as it is.
"""

import html
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
from bs4 import BeautifulSoup
from PIL import Image
from sphinx.application import Sphinx

DRAWN_AT = 110.0
"""Dots per inch at which a figure is shown; one drawn with more has the finer dots that
dense screens and paper show."""

PALETTE_ERROR = 1.5
"""Largest root mean square error, in levels of 255, that a palette may cost a picture.
"""

FIRST = 100_000
"""Letters of a page's article in which its first sentences are looked for."""

EDGES = """
(function () {
  var wide = "div.math, mjx-container, p, pre, .output, table, .more-box";
  function mark(box) {
    var left = box.scrollLeft, more = box.scrollWidth - box.clientWidth;
    var scrolls = more > 0 && /auto|scroll/.test(getComputedStyle(box).overflowX);
    box.classList.toggle("more-left", scrolls && left > 2);
    box.classList.toggle("more-right", scrolls && left < more - 2);
    if (scrolls && !box.hasAttribute("tabindex")) {
      box.tabIndex = 0;
      box.dataset.scrolls = "";
    } else if (!scrolls && "scrolls" in box.dataset) {
      box.removeAttribute("tabindex");
      delete box.dataset.scrolls;
    }
  }
  function fit(formula) {
    formula.style.removeProperty("--fit");
    var share = 0.99 * formula.clientWidth / formula.scrollWidth;
    if (formula.scrollWidth > formula.clientWidth && share >= 0.75) {
      formula.style.setProperty("--fit", share.toFixed(2));
    }
  }
  function all() {
    document.querySelectorAll("div.math > mjx-container").forEach(fit);
    document.querySelectorAll("article.bd-article :is(" + wide + ")").forEach(mark);
  }
  document.addEventListener("scroll", function (event) {
    if (event.target.classList) mark(event.target);
  }, {capture: true, passive: true});
  window.addEventListener("resize", all, {passive: true});
  document.addEventListener("toggle", all, true);
  document.addEventListener("click", function (event) {
    if (event.target.closest(".toggle")) requestAnimationFrame(all);
  });
  window.addEventListener("load", function () {
    document.fonts.ready.then(all);
  });
})();
"""
"""Marks boxes that scroll sideways, for `book.css` to show at which edge there is more,
and lets the Tab key reach them, so that arrow keys can scroll them.  A formula that is
up to a third too wide for its place is set smaller first, which `book.css` does by
``--fit``.
"""

ICON = re.compile(
    r'[{,]"?([a-z0-9-]+)"?:\[(\d+),(\d+),\[[^\]]*\],"[0-9a-f]+",("[^"]*"|\[[^\]]*\])\]'
)


def icon_paths(script: str) -> dict[str, tuple[int, int, str]]:
    """Name -> width, height, path of the solid icons in Font Awesome's script.

    The script holds several families, some names in more than one: of equal names the
    one counts that stands nearest to the magnifying glass, which is only in the solid
    family.
    """
    entries = list(ICON.finditer(script))
    solid = [entry.start() for entry in entries if entry[1] == "magnifying-glass"]
    if len(solid) != 1:
        raise ValueError("fontawesome.js is not as this extension knows it")
    nearest: dict[str, re.Match[str]] = {}
    for entry in sorted(entries, key=lambda entry: abs(entry.start() - solid[0])):
        nearest.setdefault(entry[1], entry)
    return {
        name: (
            int(entry[2]),
            int(entry[3]),
            "".join(re.findall(r'"([^"]*)"', entry[4])),
        )
        for name, entry in nearest.items()
    }


def with_icons(page: str, paths: dict[str, tuple[int, int, str]]) -> str:
    """The page with each `<i class="fa-solid fa-NAME">` drawn, and
    without the script.
    """

    def drawn(match: re.Match[str]) -> str:
        classes, rest = match[1], match[2]
        names = [c.removeprefix("fa-") for c in classes.split() if c.startswith("fa-")]
        name = next((name for name in names if name in paths), None)
        if name is None:
            return match[0]
        width, height, path = paths[name]
        return (
            f'<svg class="svg-inline--fa {classes}"{rest} viewBox="0 0 {width} '
            f'{height}" '
            'aria-hidden="true" focusable="false" xmlns="http://www.w3.org/2000/svg">'
            f'<path fill="currentColor" d="{path}"></path></svg>'
        )

    page = re.sub(
        r'<(?:i|span) class="([^"]*\bfa-[^"]*)"([^>]*)>\s*</(?:i|span)>', drawn, page
    )
    page = re.sub(
        r'<script defer src="[^"]*fontawesome\.js[^"]*"></script>\s*', "", page
    )
    return re.sub(r'<link rel="preload"[^>]*fontawesome[^>]*/?>\s*', "", page)


def without_search_index(page: str) -> str:
    """The page without the scripts that only the search page needs."""
    names = r"(?:searchtools|language_data|searchindex)\.js"
    return re.sub(rf'<script src="[^"]*{names}[^"]*"></script>\s*', "", page)


@cache
def picture_size(path: Path) -> tuple[int, int]:
    """Width and height at which a picture is shown, in CSS pixels."""
    with Image.open(path) as picture:
        dots = picture.info.get("dpi", (DRAWN_AT, DRAWN_AT))[0]
        scale = DRAWN_AT / dots if dots > DRAWN_AT else 1.0
        return round(picture.width * scale), round(picture.height * scale)


def with_sized_pictures(page: str, folder: Path) -> str:
    """The page with sizes on its pictures, loaded late, each a link to itself."""

    def sized(match: re.Match[str]) -> str:
        tag = match[0]
        source = re.search(r'src="([^":?]+\.png)"', tag)
        if source is None or "loading=" in tag or not (folder / source[1]).is_file():
            return tag
        width, height = picture_size((folder / source[1]).resolve())
        # a notebook's size of a figure is fixed; here it shrinks with the page
        tag = re.sub(r'\sstyle="width: \d+px; height: \d+px;"', "", tag)
        tag = re.sub(r'\s(?:width|height)="[^"]*"', "", tag).rstrip("/> ")
        tag += f' width="{width}" height="{height}" loading="lazy" decoding="async"/>'
        before = page[max(0, match.start() - 200) : match.start()]
        if re.search(r"<a\b[^>]*>\s*$", before):  # it leads somewhere already
            return tag
        words = "This figure in full size"
        return f'<a class="full-size" href="{source[1]}" title="{words}">{tag}</a>'

    return re.sub(r"<img\b[^>]*>", sized, page)


MODULES = re.compile(
    r"<details><summary>(?:(?!</summary>).)*</summary>\s*<ul>\s*"
    r'(?:<li class="toctree-l2">(?:(?!</li>).)*</li>\s*)+</ul>\s*</details>',
    re.DOTALL,
)


def without_modules(page: str) -> str:
    """The page without the folded list of all modules beside it, which only the pages
    of the package's reference need open.
    """
    return MODULES.sub("", page)


def with_landmarks(page: str) -> str:
    """The page as a screen reader should be told of it: the bar beside the text, logo
    and all, is a landmark; the empty corner of a table is no header; the arrow that
    unfolds a list of pages has a name; entries of the bibliography are items of a list
    (`doc-biblioentry`, which Sphinx writes, is a deprecated role).
    """
    page = re.sub(
        r'<div((?: id="[^"]*")? class="bd-sidebar-primary[^"]*")>',
        r'<div\1 role="navigation" aria-label="Book">',
        page,
    )
    page = re.sub(
        r"<th(\s[^>]*)?>\s*(?:<p>\s*</p>)?\s*</th>",
        lambda corner: f"<td{corner[1] or ''}></td>",
        page,
    )
    page = page.replace(
        '<summary><span class="toctree-toggle"',
        '<summary aria-label="Its pages"><span class="toctree-toggle"',
    )
    return page.replace('role="doc-biblioentry"', 'role="listitem"')


def with_printed_number(page: str) -> str:
    """The page with its chapter's number in the title that paper shows in the place of
    the page's own.
    """
    number = re.search(r'<h1>(<span class="section-number">[^<]*</span>)', page)
    if number is None:
        return page
    return re.sub(
        r'(<div id="jb-print-docs-body"[^>]*>\s*<h1>)(?!<span)',
        lambda start: start[1] + number[1],
        page,
    )


def description(page: str) -> str:
    """The first sentences of the page's text, at most about 160 characters."""
    start = max(0, page.find('<article class="bd-article'))
    # a page's first sentences stand at its start; all of it takes a second to parse
    article = BeautifulSoup(page[start : start + FIRST], "html.parser")
    for paragraph in article.select("section > p"):
        words = re.sub(r"\\\(.*?\\\)", "…", " ".join(paragraph.get_text().split()))
        if len(words) > 60:
            return words if len(words) <= 160 else words[:157].rsplit(" ", 1)[0] + " …"
    return ""


def with_head(page: str) -> str:
    """The page with one viewport and, where its text gives one, a description."""
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
    if f"<head>\n{viewport}" in page:
        return page
    page = re.sub(r'\s*<meta name="viewport"[^>]*>', "", page)
    head = viewport
    if words := description(page):
        head += f'\n<meta name="description" content="{html.escape(words)}"/>'
    return page.replace("<head>", f"<head>\n{head}", 1)


def with_palette(path: Path) -> None:
    """Store a picture with 256 colours where that costs nothing that an eye sees."""
    with Image.open(path) as picture:
        if picture.mode not in ("RGB", "RGBA"):
            return
        dots = picture.info.get("dpi")
        whole = np.asarray(picture.convert("RGBA"))
        if whole[..., 3].min() < 255:
            return
        colours = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    error = np.asarray(colours.convert("RGB"), float) - whole[..., :3]
    if np.sqrt(np.mean(error**2)) <= PALETTE_ERROR:
        colours.save(path, optimize=True, **({"dpi": dots} if dots else {}))


def entry_page(target: str, title: str) -> str:
    """A page that leads on to another."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        f"<title>{html.escape(title)}</title>"
        f'<meta http-equiv="refresh" content="0; url={target}"/></head>'
        f'<body><main><h1><a href="{target}">{html.escape(title)}</a></h1></main>'
        "</body></html>\n"
    )


def wrong_address(title: str, first: str) -> str:
    """What a server shows for an address that is none of the site's.

    It is shown under that address, so its links start where the site does: at what
    stands before the first folder of the site's own in the address.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        "<script>var own = location.pathname.search(/\\/(book|_modules|_static)\\//);"
        "if (own >= 0) document.write('<base href=\"' + "
        "location.pathname.slice(0, own + 1) + '\">');</script>"
        f"<title>No such page: {html.escape(title)}</title>"
        "<style>body{font:1.1rem/1.6 sans-serif;margin:15vh auto;max-width:32rem;"
        "padding:0 1rem}</style></head><body><main><h1>No such page</h1>"
        f'<p>The address may be old. <a href="{first}">Start at the first page</a>, '
        'or <a href="search.html">search the book</a>.</p></main></body></html>\n'
    )


def pages(folder: Path) -> Iterator[Path]:
    """The pages that the theme made."""
    for path in folder.rglob("*.html"):
        if not {"_static", "reports"} & set(path.relative_to(folder).parts):
            yield path


def finish(app: Sphinx, exception: Exception | None) -> None:
    """Do all of it to the built site."""
    if exception is not None or app.builder.name != "html":
        return
    out = Path(app.outdir)
    for picture in (out / "_images").glob("*.png"):
        with_palette(picture)
    script = out / "_static" / "scripts" / "fontawesome.js"
    paths = icon_paths(script.read_text(encoding="utf8")) if script.is_file() else {}
    for path in pages(out):
        if path in (out / "index.html", out / "404.html"):
            continue
        before = path.read_text(encoding="utf8")
        page = with_icons(without_modules(before), paths)
        if path.name != "search.html":
            page = without_search_index(page)
        page = with_landmarks(with_sized_pictures(page, path.parent))
        page = with_head(with_printed_number(page))
        if page != before:
            path.write_text(page, encoding="utf8")
    first = f"{app.config.root_doc}.html"
    if first != "index.html":
        (out / "index.html").write_text(
            entry_page(first, app.config.html_title), encoding="utf8"
        )
    (out / "404.html").write_text(
        wrong_address(app.config.html_title, first), encoding="utf8"
    )


def setup(app: Sphinx) -> dict[str, object]:
    """Register the extension."""
    app.add_js_file(None, body=EDGES)
    # after the extensions that write into pages as the build ends
    app.connect("build-finished", finish, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
