"""Every page of the built site, opened from the disk in headless Chromium without a
network.

`make test` builds the site first (tests/book/test_book.py). Without a built site, or
without Chromium, these tests skip.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urldefrag

import nbformat
import pytest
import yaml
from api_pages import listed_modules
from bs4 import BeautifulSoup
from depcache import code_cells, is_notebook

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"
WIDTHS = {"wide": 1400, "narrow": 390}
pytestmark = [pytest.mark.site]

_toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf8"))
PAGES = [
    _toc["root"],
    *(chapter["file"] for part in _toc["parts"] for chapter in part["chapters"]),
]
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf8"))
NOTEBOOKS = [
    page
    for page in PAGES
    if page not in CONFIG["sphinx"]["config"]["notebooks_without"]
    and (ROOT / f"{page}.md").is_file()
    and is_notebook((ROOT / f"{page}.md").read_text(encoding="utf8"))
]


@pytest.fixture(scope="module", autouse=True)
def site() -> Path:
    """The built site."""
    if not (HTML / "index.html").is_file():
        pytest.skip("the site is not built: make book")
    return HTML


def modules() -> list[str]:
    """The pages of the package's modules, in order; the build writes them."""
    return sorted(
        path.relative_to(HTML).with_suffix("").as_posix()
        for path in (HTML / "book" / "api").rglob("*.html")
    )


@pytest.mark.parametrize("name", ["index", "404"])
def test_pages_beside_the_book_have_its_title(name: str) -> None:
    text = (HTML / f"{name}.html").read_text(encoding="utf8")
    title = re.search(r"<title>(?:No such page: )?(.*?)</title>", text)
    assert title is not None
    assert title[1] == CONFIG["title"]


@dataclass
class Visit:
    """A page in the browser, and what went wrong while it loaded."""

    page: object
    errors: list[str] = field(default_factory=list)


def look_for_trouble(page) -> Visit:
    """Record console errors, script errors, failed requests and requests that leave the
    disk.
    """
    visit = Visit(page)
    page.on(
        "console",
        lambda said: (
            visit.errors.append(f"console: {said.text}")
            if said.type == "error"
            else None
        ),
    )
    page.on("pageerror", lambda error: visit.errors.append(f"script: {error}"))
    page.on(
        "requestfailed",
        lambda request: (
            visit.errors.append(f"failed: {request.url} ({request.failure})")
            # what was still loading when the test left the page before
            if request.failure != "net::ERR_ABORTED"
            else None
        ),
    )
    page.on(
        "request",
        lambda request: (
            visit.errors.append(f"external: {request.url[:200]}")
            if not request.url.startswith(("file:", "data:", "blob:", "about:"))
            else None
        ),
    )
    return visit


@pytest.fixture(scope="module", params=WIDTHS)
def tab(request: pytest.FixtureRequest, browser) -> Iterator[Visit]:
    """One tab of a given width, offline, for all pages."""
    context = browser.new_context(
        viewport={"width": WIDTHS[request.param], "height": 900}, offline=True
    )
    context.set_default_timeout(30_000)
    visit = look_for_trouble(context.new_page())
    yield visit
    context.close()


MEASURE = r"""async () => {
  // pictures load when they come near: here all of them are wanted
  document.querySelectorAll("img[loading=lazy]").forEach(e => { e.loading = "eager"; });
  await Promise.all(Array.from(document.images, e => e.decode().catch(() => null)));
  // unfold what is folded: what is hidden must fit and be rendered too
  document.querySelectorAll("details").forEach(d => { d.open = true; });
  const folded = document.querySelectorAll(".toggle-hidden");
  folded.forEach(d => d.classList.remove("toggle-hidden"));
  dispatchEvent(new Event("resize"));
  await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
  const all = (css, root = document) => Array.from(root.querySelectorAll(css));
  const scrolls = e => ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
  const article = document.querySelector("article.bd-article");
  const outside = all("*", article).filter(e => {
    const box = e.getBoundingClientRect();
    if (box.width === 0 || box.right <= innerWidth + 1) return false;
    if (e.closest("mjx-assistive-mml")) return false;
    for (let up = e.parentElement; up && up !== article; up = up.parentElement)
      if (scrolls(up)) return false;
    return !scrolls(e);
  });
  return {
    width: document.documentElement.scrollWidth,
    outside: outside.slice(0, 5).map(e => e.outerHTML.slice(0, 160)),
    mathErrors: all("mjx-merror, mjx-container [style*='red']")
      .map(e => e.textContent.slice(0, 100)),
    unrendered: all("span.math, div.math", article)
      .filter(e => !e.querySelector("mjx-container")).length,
    rawTex: all("p, li, td, figcaption, dd, div.claim", article)
      .filter(e => !e.querySelector("pre, code"))
      .filter(e => /\\\(|\\\[|\$\$/.test(e.textContent))
      .map(e => e.textContent.slice(0, 100)),
    scrolling: all("div.math > mjx-container", article).filter(e => {
      const share = e.clientWidth / e.scrollWidth;
      return share < 0.99 && share > 0.78;
    }).map(e => e.parentElement.id || e.textContent.slice(0, 80)),
    pictures: all("img").map(e => ({
      src: e.getAttribute("src").slice(0, 80),
      alt: e.getAttribute("alt"),
      loaded: e.complete && e.naturalWidth > 0,
    })),
    stretched: all("img", article).filter(e => e.clientWidth > 20).filter(e => {
      const shown = e.clientWidth / e.clientHeight;
      return Math.abs(shown / (e.naturalWidth / e.naturalHeight) - 1) > 0.05;
    }).map(e => e.outerHTML.slice(0, 160)),
    previous: document.querySelector("a.left-prev")?.getAttribute("href"),
    next: document.querySelector("a.right-next")?.getAttribute("href"),
  };
}"""


@pytest.mark.parametrize("name", PAGES)
def test_page_works_from_disk(tab: Visit, name: str) -> None:
    tab.errors.clear()
    tab.page.goto((HTML / f"{name}.html").as_uri(), wait_until="load")
    seen = tab.page.evaluate(MEASURE)
    width = tab.page.viewport_size["width"]
    assert tab.errors == []
    assert seen["width"] <= width, "the page scrolls sideways"
    assert seen["outside"] == [], "something is wider than the screen"
    assert seen["mathErrors"] == []
    assert seen["unrendered"] == 0
    assert seen["rawTex"] == []
    assert seen["scrolling"] == [], "a formula scrolls that would fit a little smaller"
    assert [
        picture for picture in seen["pictures"] if not (picture["alt"] or "").strip()
    ] == []
    assert [picture for picture in seen["pictures"] if not picture["loaded"]] == []
    assert seen["stretched"] == [], "pictures keep their shape"
    after = PAGES.index("book/api") + 1
    order = [*PAGES[:after], *modules(), *PAGES[after:]]
    index = order.index(name)
    for link, neighbour in (("previous", index - 1), ("next", index + 1)):
        if 0 <= neighbour < len(order):
            assert seen[link] is not None, f"no link to the {link} page"
            target = (HTML / name).parent / seen[link]
            assert target.resolve() == (HTML / f"{order[neighbour]}.html").resolve()


def test_every_module_has_a_page_that_works(tab: Visit) -> None:
    listing = (ROOT / "book" / "api.md").read_text(encoding="utf8")
    assert len(modules()) == len(listed_modules(listing))
    for name in modules():
        test_page_works_from_disk(tab, name)


def test_index_leads_to_the_first_page(tab: Visit) -> None:
    tab.errors.clear()
    tab.page.goto((HTML / "index.html").as_uri())
    tab.page.wait_for_url(f"**/{PAGES[0]}.html", wait_until="load")
    assert tab.errors == []


# What a reader looks for, and the page that has to come first.
SEARCHES = {
    "coding rate": "coding_rate",
    "rate distortion": "coding_rate",
    "attention": "attention",
    "softmax": "attention",
    "ISTA": "ista",
    "proximal": "ista",
    "sparsify": "ista",
    "Tweedie": "denoising",
    "posterior mean": "denoising",
    "mixture": "mixture",
    "structured flow": "structured_ode",
    "reverse SDE": "diffusion",
    "decoder layer": "layers",
    "mask token": "crate_mae",
    "linear probe": "evaluation",
    "fine-tuning": "evaluation",
    "ImageNet": "pretraining evaluation",  # both titles end in it
    "notation": "notation",
    "layer by layer": "layer_by_layer",
    "heads": "tokens_and_heads",
}


@pytest.mark.parametrize("words", SEARCHES)
def test_search_finds_its_chapter_first(browser, words: str) -> None:
    context = browser.new_context(offline=True)
    visit = look_for_trouble(context.new_page())
    visit.page.goto((HTML / "search.html").as_uri() + "?q=" + words.replace(" ", "+"))
    visit.page.wait_for_selector("#search-results ul.search li a")
    found = visit.page.eval_on_selector_all(
        "#search-results ul.search li a", "links => links.map(a => a.href)"
    )
    for link in found:
        assert Path(
            unquote(urldefrag(link.removeprefix("file://").split("?")[0])[0])
        ).is_file(), link
    assert visit.errors == []
    context.close()
    assert Path(urldefrag(found[0])[0]).stem in SEARCHES[words].split(), found[:3]


def test_search_box_leads_to_the_search_page(tab: Visit) -> None:
    tab.errors.clear()
    tab.page.goto((HTML / f"{PAGES[0]}.html").as_uri())
    tab.page.keyboard.press("Control+k")
    tab.page.keyboard.type("attention")
    tab.page.keyboard.press("Enter")
    tab.page.wait_for_url("**/search.html?q=attention*")
    tab.page.wait_for_selector("#search-results ul.search li a")
    assert tab.errors == []


CONTRAST = r"""() => {
  const parse = text => {
    const parts = text.match(/[\d.]+/g).map(Number);
    return parts.length < 4 ? [...parts.slice(0, 3), 1] : parts;
  };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const colour = parse(getComputedStyle(e).backgroundColor);
      if (colour[3] > 0.99) return colour;
    }
    return [255, 255, 255, 1];
  };
  const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = colour => {
    const [r, g, b] = colour.slice(0, 3).map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ours = ".claim p, .claim-kind, .claim a, .chapter-tools a, figcaption span, " +
    ".crate-source-file, .crate-player-controls *, .admonition a, div.proof a, " +
    "table.ledger td p, table.ledger a";
  const shown = Array.from(document.querySelectorAll(ours))
    .filter(e => e.offsetParent && e.textContent.trim());
  return shown.map(e => {
    const a = light(parse(getComputedStyle(e).color)), b = light(behind(e));
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    return [contrast, e.outerHTML.slice(0, 120)];
  }).filter(pair => pair[0] < 4.5);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_of_our_own_boxes_has_contrast(browser, scheme: str) -> None:
    context = browser.new_context(color_scheme=scheme, offline=True)
    page = context.new_page()
    for name in PAGES:
        page.goto((HTML / f"{name}.html").as_uri())
        assert page.evaluate("document.documentElement.dataset.theme") == scheme
        assert page.evaluate(CONTRAST) == [], name
    context.close()


def test_players_play(browser) -> None:
    pages = [
        name
        for name in PAGES
        if 'class="crate-player"' in (HTML / f"{name}.html").read_text(encoding="utf8")
    ]
    if not pages:
        pytest.skip("no page has motion yet")
    context = browser.new_context(offline=True)
    page = context.new_page()
    for name in pages:
        page.goto((HTML / f"{name}.html").as_uri())
        for player in page.query_selector_all(".crate-player"):
            slider, picture = (
                player.query_selector("input[type=range]"),
                player.query_selector("img"),
            )
            shown = picture.get_attribute("src")
            move = (
                "(e, to) => { e.value = to; e.dispatchEvent(new Event('input', "
                "{bubbles: true})); }"
            )
            slider.evaluate(move, "0")
            first = picture.get_attribute("src")
            slider.evaluate(move, slider.get_attribute("max"))
            assert picture.get_attribute("src") != first
            assert shown.startswith("data:image/png")
            player.query_selector("button").evaluate("e => e.click()")
            page.wait_for_function("e => Number(e.value) > 0", arg=slider)
            player.query_selector("button").evaluate("e => e.click()")
    context.close()


# ---- what needs no browser ----


def soup(path: Path) -> BeautifulSoup:
    """A built page, parsed."""
    return BeautifulSoup(path.read_text(encoding="utf8"), "html.parser")


def test_links_within_the_site_lead_somewhere() -> None:
    parsed = {path: soup(path) for path in HTML.rglob("*.html")}
    ids = {
        path: {tag["id"] for tag in page.select("[id]")}
        | {tag["name"] for tag in page.select("a[name]")}
        for path, page in parsed.items()
    }
    dead = []
    for path, page in parsed.items():
        for link in page.select("a[href]"):
            address, fragment = urldefrag(link["href"])
            if re.match(r"[a-z]+:", address):
                continue
            target = (
                (path.parent / unquote(address.split("?")[0])).resolve()
                if address
                else path
            )
            if not target.exists():
                dead.append(f"{path.relative_to(HTML)}: {link['href']}")
            elif fragment and target in ids and unquote(fragment) not in ids[target]:
                dead.append(f"{path.relative_to(HTML)}: {link['href']} (no such place)")
    assert not dead


def test_tables_that_cells_display_are_tables() -> None:
    text = []
    for name in PAGES:
        page = soup(HTML / f"{name}.html")
        for code in page.select("pre, code"):
            code.decompose()
        text += [name for row in (r"|---", r"| ---") if row in page.get_text()]
    assert not text


def test_nothing_is_asked_of_the_network() -> None:
    asked = []
    for path in HTML.rglob("*.html"):
        for tag in soup(path).select(
            "script[src], link[href], img[src], iframe[src], source[src], video[src]"
        ):
            address = tag.get("src") or tag.get("href")
            if address.startswith(("http:", "https:", "//")) and tag.get("rel") != [
                "canonical"
            ]:
                asked.append(f"{path.relative_to(HTML)}: {address}")
    assert not asked


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_chapter_downloads_as_a_notebook(name: str) -> None:
    page = HTML / f"{name}.html"
    links = soup(page).select("a.chapter-notebook[href]")
    assert len(links) == 1
    target = (page.parent / links[0]["href"]).resolve()
    notebook = nbformat.read(target, as_version=4)
    nbformat.validate(notebook)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    written = [
        source
        for _, source in code_cells((ROOT / f"{name}.md").read_text(encoding="utf8"))
    ]
    assert len(code) == len(written) + 1  # and the cell that says what to install
    assert 'pip install -e ".[book]"' in code[0]
    text = target.read_text(encoding="utf8")
    assert str(ROOT) not in text
    assert not re.search(r"(?<![\w.])/(?:home|root|tmp|Users)/", text)
    assert not any(cell.get("outputs") for cell in notebook.cells)
