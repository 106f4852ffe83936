"""Chapters run several at a time before Sphinx: what runs, what is cached under which
key, what fails.
"""

from pathlib import Path

import depcache
import execute
import pytest
from jupyter_cache import get_cache

pytestmark = pytest.mark.repository
FRONT = (
    "---\njupytext:\n  text_representation:\n    extension: .md\n    format_name: "
    "myst\n"
)
FRONT += (
    "kernelspec:\n  display_name: Python 3 (ipykernel)\n  language: python\n  "
    "name: python3\n---\n\n# Title\n"
)


def page(code: str) -> str:
    return f"{FRONT}\n```{{code-cell}} python\n{code}\n```\n"


@pytest.fixture
def book(tmp_path: Path) -> Path:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("")
    (tmp_path / "pkg" / "value.py").write_text("X = 1\n")
    (tmp_path / "_config.yml").write_text(
        "execute: {timeout: 60}\nsphinx:\n  config:\n    depcache_packages: "
        "[pkg]\n    depcache_data: [results]\n"
    )
    (tmp_path / "_toc.yml").write_text(
        "root: index\nparts:\n- chapters:\n  - file: good\n  - file: bad\n  - "
        "file: other\n"
    )
    (tmp_path / "index.md").write_text("# No cells\n")
    (tmp_path / "good.md").write_text(
        page("import sys\nsys.path.insert(0, '.')\nfrom pkg.value import X\nprint(X)")
    )
    (tmp_path / "bad.md").write_text(page("raise RuntimeError('of no use')"))
    (tmp_path / "other.md").write_text(page("print(2)"))
    return tmp_path


def test_what_is_not_cached_runs_once_and_failures_are_told(
    book: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert [path.stem for path in execute.pages(book)] == ["good", "bad", "other"]
    failed = execute.execute_pages(book, execute.pages(book), workers=2)
    assert [done.path.stem for done in failed] == ["bad"]
    assert "of no use" in str(failed[0].error)
    told = capfd.readouterr().out
    assert "good.md executed in" in told
    assert "bad.md FAILED" in told

    # Sphinx gives MyST-NB the text with the digest; the cache has an entry for exactly
    # that.
    cache = get_cache(book / "_build" / ".jupyter_cache")
    text = (book / "good.md").read_text()
    digest = depcache.page_digest(text, book, ["pkg"], ["results"])
    notebook = execute.read_myst_markdown_notebook(
        depcache.with_digest(text, digest),
        config=execute.MdParserConfig(),
        add_source_map=True,
        path=book / "good.md",
    )
    record, merged = cache.merge_match_into_notebook(notebook)
    assert merged.cells[-1].outputs[0].text == "1\n"
    assert record

    # Nothing has changed: only the failed one runs again.  A changed module runs the
    # page that imports it.
    assert not execute.execute_pages(
        book, [book / "good.md", book / "other.md"], workers=2
    )
    assert "executed in" not in capfd.readouterr().out
    (book / "pkg" / "value.py").write_text("X = 5\n")
    assert not execute.execute_pages(
        book, [book / "good.md", book / "other.md"], workers=2
    )
    told = capfd.readouterr().out
    assert "good.md executed in" in told
    assert "other.md" not in told
