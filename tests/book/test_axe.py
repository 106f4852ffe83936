"""axe-core finds no fault of accessibility on any page, light and wide or dark and
narrow.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf8"))
PAGES = [
    TOC["root"],
    *(chapter["file"] for part in TOC["parts"] for chapter in part["chapters"]),
    *("book/api/theory/rate", "search", "404"),
]
pytestmark = [pytest.mark.site]
Axe = pytest.importorskip(
    "axe_playwright_python.sync_playwright", reason="needs the test extra"
).Axe


@pytest.fixture(scope="module", params=["light", "dark"])
def scheme(request: pytest.FixtureRequest) -> str:
    """What the reader's system asks for."""
    return request.param


def violations(page: Any) -> list[tuple[str, str, str]]:
    """What axe-core finds: rule, what it asks for, where.

    A table's header that is a formula counts as empty for axe, which does not read
    MathML; screen readers do.
    """
    page.evaluate("document.fonts.ready.then(() => new Promise(requestAnimationFrame))")
    return [
        (found["id"], found["help"], node["html"][:200])
        for found in Axe().run(page).response["violations"]
        for node in found["nodes"]
        if found["id"] != "empty-table-header"
        or not page.locator(f"css={node['target'][0]}").locator("math").count()
    ]


@pytest.mark.parametrize("name", PAGES)
def test_axe_finds_nothing(browser, scheme: str, name: str) -> None:
    if not (HTML / "index.html").is_file():
        pytest.skip("the site is not built: make book")
    # one width for each scheme: a page's parts are the same in both
    width = 1400 if scheme == "light" else 390
    context = browser.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
    )
    page = context.new_page()
    page.goto((HTML / f"{name}.html").as_uri())
    found = violations(page)
    context.close()
    assert not found


def test_axe_finds_what_is_wrong(browser) -> None:
    """The check can fail: a picture without words, grey on grey, headers of nothing."""
    page = browser.new_page()
    page.set_content(
        '<html lang="en"><title>x</title><main><h1>x</h1><img src="data:,">'
        '<p style="color:#aaa;background:#bbb">pale</p>'
        "<table><tr><th></th><th><math><mi>d</mi></math></th></tr>"
        "<tr><td>1</td><td>2</td></tr></table></main></html>"
    )
    found = [rule for rule, _, _ in violations(page)]
    page.close()
    assert {"image-alt", "color-contrast"} <= set(found)
    assert found.count("empty-table-header") == 1
