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
