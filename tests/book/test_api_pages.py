"""The package's reference: a page for each module, listed beside these pages alone."""

from pathlib import Path
from types import SimpleNamespace

import api_pages
import finish
import pytest

pytestmark = pytest.mark.repository

LISTING = """# API

## One

```{eval-rst}
.. autosummary::

   pkg.low
   pkg.part.high
```

```{code-cell} python
x
```

```{eval-rst}
.. autosummary::

   pkg.last
```
"""


def test_every_listed_module_gets_a_page(tmp_path: Path) -> None:
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "api.md").write_text(LISTING)
    app = SimpleNamespace(srcdir=tmp_path)
    config = SimpleNamespace(api_listing="book/api.md")
    folder = tmp_path / "book" / "api"
    folder.mkdir()
    (folder / "gone.md").write_text("# a module that is no more")
    api_pages.write_pages(app, config)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*.md")}
    assert names == {"low.md", "part/high.md", "last.md"}
    high = folder / "part" / "high.md"
    assert ".. automodule:: pkg.part.high\n" in high.read_text()
    before = high.stat().st_mtime_ns
    api_pages.write_pages(app, config)
    assert high.stat().st_mtime_ns == before  # Sphinx need not read it again


def test_other_pages_do_not_list_the_modules() -> None:
    modules = '<ul>\n<li class="toctree-l2"><a>a</a></li>\n</ul>'
    closed = f"<details><summary><span></span></summary>{modules}</details>"
    opened = closed.replace("<details>", '<details open="open">')
    folded = "<details><summary>Proof</summary><ul><li>a</li></ul></details>"
    page = f"<nav><li>{{}}</li></nav>{folded}"
    assert finish.without_modules(page.format(closed)) == page.format("")
    assert finish.without_modules(page.format(opened)) == page.format(opened)


def test_what_a_screen_reader_is_told() -> None:
    """The bar is a landmark and an empty corner no header; other headers stay."""
    page = (
        '<div id="bar" class="bd-sidebar-primary bd-sidebar"><img alt="logo"></div>'
        '<table><tr><th class="head"><p></p></th><th class="head"><p>rate</p></th>'
        '</tr></table><div class="citation" role="doc-biblioentry">A book.</div>'
    )
    told = finish.with_landmarks(page)
    assert 'bd-sidebar" role="navigation" aria-label="Book"><img' in told
    assert '<td class="head"></td><th class="head"><p>rate</p></th>' in told
    assert 'role="listitem">A book' in told
    assert finish.with_landmarks(told) == told


def test_paper_shows_a_chapters_number() -> None:
    page = (
        '<div id="jb-print-docs-body" class="onlyprint">\n<h1>Rate</h1></div>'
        '<h1><span class="section-number">3. </span>Rate</h1>'
    )
    printed = finish.with_printed_number(page)
    assert printed.count('<h1><span class="section-number">3. </span>Rate</h1>') == 2
    assert finish.with_printed_number(printed) == printed
    assert finish.with_printed_number("<h1>Index</h1>") == "<h1>Index</h1>"
