"""Links to the glossary carry the entry's text."""

import subprocess
import sys
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.repository

GLOSSARY = """# Glossary

:::{glossary}
token
  A vector that describes
  a {term}`patch`. {doc}`index`

patch
  A small square.
:::
"""


def test_links_to_terms_say_what_the_term_means(tmp_path: Path) -> None:
    (tmp_path / "conf.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT / 'book' / '_ext')!r})\n"
        'extensions = ["myst_parser", "glossary_hover"]\n'
        'myst_enable_extensions = ["colon_fence"]\n'
    )
    (tmp_path / "index.md").write_text(
        "# Index\n\nA {term}`token`, {term}`squares <patch>`, a {doc}`glossary`.\n\n"
        "```{toctree}\nglossary\n```\n"
    )
    (tmp_path / "glossary.md").write_text(GLOSSARY)
    subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", ".", "built"],
        cwd=tmp_path,
        check=True,
    )
    page = BeautifulSoup((tmp_path / "built" / "index.html").read_text(), "html.parser")
    titles = {
        link.get_text(): link.get("title") for link in page.select("p a.reference")
    }
    assert titles == {
        "token": "A vector that describes a patch.",
        "squares": "A small square.",
        "Glossary": None,
    }
