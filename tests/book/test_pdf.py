"""The book as one PDF: what is put together, and what comes out of the browser."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pdf
import pytest
from bs4 import BeautifulSoup

pytestmark = [pytest.mark.repository, pytest.mark.processes]

TOC = {
    "root": "book/index",
    "parts": [{"caption": "One & only", "chapters": [{"file": "book/a"}]}],
}
INDEX = """<html><head><link rel="stylesheet" href="../_static/own.css?v=1"></head>
<body><article class="bd-article"><h1>Start<a class="headerlink" href="#s">#</a></h1>
<p id="p">Go to <a href="a.html#eq">one</a>, <a href="a.ipynb">no</a>,
<a href="https://example.org">out</a>.</p><script>x</script></article></body></html>"""
CHAPTER = """<html><head></head><body><article class="bd-article"><h1>1. First</h1>
<div data-live-figure="f"><svg width="20" height="20"></svg></div>
<details class="code-fold"><summary>Code</summary>x</details>
<div class="claim"><p>It holds.</p><details class="claim-fold"><summary>Check</summary>
<dl><dt>When</dt><dd>n &lt; 9, <em>d</em> = 2</dd><dt>Checked</dt><dd>by hand</dd></dl>
</details></div>
<details><summary>Proof</summary>So <a href="#eq">it is</a>,
<a href="index.html">see</a>.</details>
<div style="break-before: page" id="eq">far <img src="../_images/i.png" alt="i"></div>
</article></body></html>"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A built site of two pages."""
    for name in ("book", "_static", "_images"):
        (tmp_path / name).mkdir()
    (tmp_path / "_static" / "own.css").write_text("p { color: red }")
    (tmp_path / "book" / "index.html").write_text(INDEX)
    (tmp_path / "book" / "a.html").write_text(CHAPTER)
    return tmp_path


def test_pages_become_one(site: Path) -> None:
    text = pdf.whole_book(site, TOC, "T & U", {"index": 3, "a": 4})
    page = BeautifulSoup(text, "html.parser")
    assert page.title.get_text() == "T & U"
    assert page.select_one("link")["href"] == (site / "_static/own.css").as_uri()
    lines = [line.get_text("|") for line in page.select(".contents li")]
    assert lines == ["Start|3", "One & only", "1. First|4"]
    links = [link.get("href") for link in page.select(".page:not(.contents) a")]
    assert links == ["#a--eq", None, "https://example.org", "#a--eq", "#index"]
    ids = {tag["id"] for tag in page.select("[id]")}
    assert {"index", "a", "index--p", "a--eq"} <= ids
    assert page.select_one("img")["src"] == (site / "_images/i.png").as_uri()
    assert page.select_one("[data-live-figure] svg") is not None
    assert [fold.summary.get_text() for fold in page.select("details[open]")] == [
        "Proof"
    ]
    assert not page.select("script, .code-fold, .headerlink")
    claim = [line.get_text() for line in page.select(".claim > *")]
    assert claim == ["It holds.", "When: n < 9, d = 2"]


def test_without_a_browser_it_is_said(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pdf, "find_browser", lambda: None)
    with pytest.raises(FileNotFoundError, match="no Chromium to print with"):
        pdf.write_pdf(site, TOC, "T", site / "out" / "book.pdf")


def test_a_page_that_is_not_built_is_named(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pdf, "find_browser", lambda: "chromium")
    (site / "book" / "a.html").unlink()
    with pytest.raises(FileNotFoundError, match="book/a is not built: make book"):
        pdf.write_pdf(site, TOC, "T", site / "out" / "book.pdf")


def test_the_book_is_printed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if pdf.find_browser() is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    pytest.importorskip("playwright.sync_api", reason="needs the test extra")
    printed: list[str] = []
    real = pdf.print_page

    def noted(browser: str, source: Path) -> bytes:
        printed.append(source.read_text(encoding="utf8"))
        return real(browser, source)

    monkeypatch.setattr(pdf, "print_page", noted)
    target = site / "out" / "book.pdf"
    # in a thread of its own: the browser that other tests share keeps this one's loop
    with ThreadPoolExecutor(1) as thread:
        thread.submit(pdf.write_pdf, site, TOC, "T", target).result()
    content = target.read_bytes()
    # title, contents, index, the chapter on two pages
    assert len(re.findall(rb"/Type /Page\b(?!s)", content)) == 5
    places = pdf.destinations(content)
    assert (places["index"], places["a"], places["a--eq"]) == (3, 4, 5)
    assert "</a><span>3</span>" in printed[1]
    assert "</a><span>4</span>" in printed[1]
    assert b"/Outlines" in content
    assert content.count(b"/Subtype /Link") >= 5
    assert list(target.parent.iterdir()) == [target]
