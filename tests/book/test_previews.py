"""Links to theorems, equations and claims show them, beside the link."""

from pathlib import Path

import previews
import pytest
from bs4 import BeautifulSoup

HTML = Path(__file__).resolve().parents[2] / "_build" / "html"
PAGE = """<article class="bd-article">
<div class="proof theorem admonition" id="thm-a"><p class="admonition-title">Theorem 1
<a class="headerlink" href="#thm-a">#</a></p><section class="theorem-content">
<p id="x">It is <a href="b.html#thm-b">so</a>.</p>
<details><summary>Proof</summary>long</details></section></div>
<div class="math" id="equation-a"><span class="eqno">(1)</span>x = y</div>
<div class="claim" id="clm-a"><p class="claim-statement">It holds. <a class="claim-link"
href="#clm-a">#</a></p><details>how</details></div>
<p id="p">See <a href="#thm-a">it</a>, <a href="../other/c.html#d">c</a>,
<a href="https://example.org/#e">out</a>, <a href="#p">this</a>.</p></article>"""


@pytest.mark.repository
def test_what_a_preview_holds() -> None:
    page = BeautifulSoup(PAGE, "html.parser")
    held = {
        place: BeautifulSoup(text, "html.parser").get_text(" ", strip=True)
        for place in ("thm-a", "equation-a", "clm-a")
        if (text := previews.preview(page.find(id=place))) is not None
    }
    assert held == {
        "thm-a": "Theorem 1 It is so.",
        "equation-a": "x = y",
        "clm-a": "It holds.",
    }
    assert "id=" not in previews.preview(page.find(id="thm-a"))
    assert previews.preview(page.find(id="p")) is None


@pytest.mark.repository
def test_links_are_followed_from_where_they_stand() -> None:
    page = BeautifulSoup(PAGE, "html.parser")
    places = {previews.place_of("book/a.html", *link) for link in previews.linked(page)}
    assert places == {
        "book/b.html#thm-b",
        "book/a.html#thm-a",
        "other/c.html#d",
        "book/a.html#p",
    }
    # only what some link leads to, and only where that is there
    pages = {"book/a.html": previews.links_and_previews(PAGE)}
    assert set(pages["book/a.html"]["previews"]) == {"thm-a", "equation-a", "clm-a"}
    assert set(previews.texts(pages)) == {"book/a.html#thm-a"}


@pytest.mark.site
def test_a_link_shows_what_it_leads_to(browser) -> None:
    """By pointer and by keyboard, from the disk; Escape closes; others show nothing."""
    if not (HTML / "_static" / "preview-texts.js").is_file():
        pytest.skip("the site is not built: make book")
    context = browser.new_context(viewport={"width": 1400, "height": 900}, offline=True)
    page = context.new_page()
    page.goto((HTML / "book" / "ten_questions.html").as_uri())
    box = page.locator(".link-preview")
    theorem = page.locator("article a[href*='html#thm-']").first
    theorem.scroll_into_view_if_needed()
    theorem.hover()
    box.wait_for()
    assert box.inner_text().startswith("Theorem")
    assert box.locator("mjx-math").count() > 0
    assert theorem.get_attribute("aria-describedby") == box.get_attribute("id")
    edges = box.bounding_box()
    assert edges["x"] >= 0
    assert edges["x"] + edges["width"] <= 1400
    page.keyboard.press("Escape")
    assert box.count() == 0
    claim = page.locator("article a[href*='#clm-']").first
    claim.focus()
    box.wait_for()
    claim.blur()
    assert box.count() == 0
    chapter = page.locator("article a[href*='#ch-']").first
    chapter.focus()
    page.wait_for_timeout(400)
    assert box.count() == 0
    context.close()
