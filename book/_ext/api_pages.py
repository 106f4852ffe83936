"""Sphinx extension: one page for each module that `book/api.md` lists.

The list stands in tables of `autosummary`, which say in a sentence what a module is;
the pages are written below `book/api/` before Sphinx looks for pages, and are not
committed. Each has the module's docstrings by `automodule`.
"""

import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

PAGE = """# `{module}`

```{{eval-rst}}
.. automodule:: {module}
   :members:
```

{{doc}}`All modules </{listing}>`
"""


def listed_modules(text: str) -> list[str]:
    """The modules that stand in the tables of `autosummary` of a page, in order."""
    found: list[str] = []
    for block in re.findall(r"(?ms)^\.\. autosummary::\n\n(.*?)^```", text):
        found += re.findall(r"(?m)^ +([\w.]+)$", block)
    return found


def page_of(module: str, folder: Path) -> Path:
    """Where a module's page is: `theory/rate.md` for `crate_core.theory.rate`."""
    return folder.joinpath(*module.split(".")[1:]).with_suffix(".md")


def write_pages(app: Sphinx, config: Config) -> None:
    """Write the pages of the listed modules; pages of others go."""
    listing = Path(app.srcdir, config.api_listing)
    folder = listing.with_suffix("")
    name = config.api_listing.removesuffix(".md")
    wanted = {
        page_of(module, folder): PAGE.format(module=module, listing=name)
        for module in listed_modules(listing.read_text(encoding="utf8"))
    }
    for path in set(folder.rglob("*.md")) - set(wanted):
        path.unlink()
    for path, text in wanted.items():
        # Sphinx reads a page again when its file is newer
        if not path.is_file() or path.read_text(encoding="utf8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf8")


def setup(app: Sphinx) -> dict[str, object]:
    """Register the extension."""
    app.add_config_value("api_listing", "book/api.md", "env")
    # before sphinx-external-toc looks which files there are
    app.connect("config-inited", write_pages, priority=100)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
