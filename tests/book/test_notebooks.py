"""The downloaded notebooks: their links lead somewhere, and they run in an empty folder
where nothing but the wheel is installed.

`make test` runs those that take seconds.  `ALL_NOTEBOOKS=1 make test` runs all of them;
the same cells run anyway when the book is built.
"""

import os
import re
import subprocess
from pathlib import Path

import nbformat
import pytest
import yaml
from depcache import is_notebook

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html" / "book"
pytestmark = [pytest.mark.site]

CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf8"))
TOC = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf8"))
PAGES = [
    TOC["root"],
    *(chapter["file"] for part in TOC["parts"] for chapter in part["chapters"]),
]
NAMES = [
    page.removeprefix("book/")
    for page in PAGES
    if page not in CONFIG["sphinx"]["config"]["notebooks_without"]
    and is_notebook((ROOT / f"{page}.md").read_text(encoding="utf8"))
]
FAST = {"notation", "cost"}
"""Notebooks that run within seconds; the second reads records of longer runs."""


@pytest.fixture(autouse=True)
def built() -> None:
    """The site is there."""
    if not HTML.is_dir():
        pytest.skip("the site is not built: make book")


EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient

notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(
    notebook, timeout=1800, startup_timeout=300, kernel_name="python3"
).execute()
nbformat.write(notebook, sys.argv[1])
"""


def markdown(name: str) -> str:
    """The text of a notebook."""
    notebook = nbformat.read(HTML / f"{name}.ipynb", as_version=4)
    return "\n\n".join(
        cell.source for cell in notebook.cells if cell.cell_type == "markdown"
    )


def test_the_fast_ones_are_there() -> None:
    assert set(NAMES) >= FAST


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_places_in_notebooks(name: str) -> None:
    dead = []
    for page, label in re.findall(
        r"\]\(([\w-]+\.ipynb)?(?:#([\w:.-]+))?\)", markdown(name)
    ):
        target = page.removesuffix(".ipynb") or name
        if target not in NAMES:
            dead.append(page)
        elif label and f'<a id="{label}"></a>' not in markdown(target):
            dead.append(f"{page}#{label}")
    assert not dead


@pytest.mark.parametrize("name", NAMES)
def test_text_is_plain_markdown(name: str) -> None:
    text = re.sub(r"(?s)```.*?```", "", markdown(name))
    assert re.findall(r"\{[\w:]+\}`[^`]*`|^[:`]{3,}.*$|\$\$ *\(.*", text, re.M) == []
    # labels of equations and keys of citations are no words
    assert re.findall(r"\[\(?(?:eq|thm|prop|cite)-[\w-]+\)?\]", text) == []
    anchors = re.findall(r'<a id="([^"]+)">', text)
    assert len(anchors) == len(set(anchors))


@pytest.mark.parametrize("name", NAMES)
def test_notebook_runs_from_the_wheel(
    name: str, installed: Path, tmp_path: Path
) -> None:
    if name not in FAST and "ALL_NOTEBOOKS" not in os.environ:
        pytest.skip("takes long; ALL_NOTEBOOKS=1 runs it")
    notebook = nbformat.read(HTML / f"{name}.ipynb", as_version=4)
    notebook.cells.append(
        nbformat.v4.new_code_cell("import crate_core\nprint(crate_core.__file__)")
    )
    path = tmp_path / f"{name}.ipynb"
    nbformat.write(notebook, path)
    environment = {
        key: value for key, value in os.environ.items() if key != "PYTHONPATH"
    }
    done = subprocess.run(
        [installed / "venv" / "bin" / "python", "-c", EXECUTE, path],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    last = nbformat.read(path, as_version=4).cells[-1]
    where = Path(last.outputs[0]["text"].strip())
    assert where.is_relative_to(installed / "venv")
    # where libraries are imported they may warn of what they lack, on the page as well
    errors = [
        output["text"]
        for cell in nbformat.read(path, as_version=4).cells
        if "remove-stderr" not in cell.metadata.get("tags", [])
        for output in cell.get("outputs", [])
        if output.get("name") == "stderr"
    ]
    assert errors == []
