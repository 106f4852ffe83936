"""The book: it builds without a warning, every claim in it ran, and its chapters keep
the book's form.
"""

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import claims
import pytest
import yaml
from bs4 import BeautifulSoup
from depcache import code_cells, is_notebook

pytestmark = pytest.mark.repository
ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"


def toc() -> dict:
    """The table of contents."""
    return yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf8"))


def pages() -> list[str]:
    """All pages, in order."""
    contents = toc()
    return [
        contents["root"],
        *(
            chapter["file"]
            for part in contents["parts"]
            for chapter in part["chapters"]
        ),
    ]


def chapters() -> list[str]:
    """The pages of the numbered parts."""
    return [
        chapter["file"]
        for part in toc()["parts"]
        if part.get("numbered")
        for chapter in part["chapters"]
    ]


def text_of(page: str) -> str:
    """The source of a page."""
    return (ROOT / f"{page}.md").read_text(encoding="utf8")


def claims_written(page: str) -> int:
    """How many claims a page's source makes: calls in its cells, and directives."""
    text = text_of(page)
    names = ("claim", "companion.claim")
    cells = code_cells(text) if is_notebook(text) else []
    calls = sum(
        isinstance(node, ast.Call) and ast.unparse(node.func) in names
        for _, code in cells
        for node in ast.walk(ast.parse(code))
    )
    return calls + len(re.findall(r"(?m)^\s*[`:]{3,}\{tested-claim\}", text))


OLD_CLAIMS: dict[str, int] = {}
"""How many claims of a chapter still refuse nothing: delete its line when it is
rewritten.
"""


@pytest.mark.parametrize("page", pages())
def test_claims_refuse_something(page: str) -> None:
    old = claims.first_edition(text_of(page))
    assert len(old) <= OLD_CLAIMS.get(page.removeprefix("book/"), 0), old


# ---- the build ----


@pytest.fixture(scope="session")
def build_log() -> str:
    """Build the book as `make book` does, warnings being errors."""
    done = subprocess.run(
        [sys.executable, ROOT / "book" / "_ext" / "build.py"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"the book does not build:\n{done.stdout[-20000:]}"
    return done.stdout


@pytest.mark.book
def test_book_builds_without_a_warning(build_log: str) -> None:
    assert "WARNING:" not in build_log
    for page in pages():
        assert (HTML / f"{page}.html").is_file(), page
    assert (HTML / "index.html").is_file()


@pytest.mark.book
@pytest.mark.usefixtures("build_log")
def test_ledger_has_every_claim_once() -> None:
    page = BeautifulSoup(
        (HTML / "book" / "ledger.html").read_text(encoding="utf8"), "html.parser"
    )
    labels = [link.get_text() for link in page.select("table.ledger a.ledger-link")]
    written = {name: claims_written(name) for name in pages()}
    assert len(labels) == len(set(labels)) == sum(written.values())
    total = page.select_one(".ledger-total strong")
    assert total is not None
    assert total.get_text() == f"{len(labels)} claims"
    rows = page.select("table.ledger-summary tbody tr")
    by_kind = {
        row.select("td")[0].get_text(strip=True): int(row.select("td")[2].get_text())
        for row in rows
    }
    verdicts = Counter(
        tag.get_text(strip=True)
        for tag in page.select("table.ledger tbody .claim-kind")
    )
    assert {kind: number for kind, number in by_kind.items() if number} == dict(
        verdicts
    )


@pytest.mark.book
@pytest.mark.usefixtures("build_log")
def test_ledger_for_programs_has_the_same_claims() -> None:
    listed = json.loads((HTML / "ledger.json").read_text(encoding="utf8"))
    page = BeautifulSoup(
        (HTML / "book" / "ledger.html").read_text(encoding="utf8"), "html.parser"
    )
    labels = [link.get_text() for link in page.select("table.ledger a.ledger-link")]
    assert [entry["id"] for entry in listed] == labels
    fields = ("id", "chapter", "claim", "conditions", "kind", "evidence")
    for entry in listed:
        assert set(entry) == {*fields, "alternatives", "recomputed"}
        assert all(isinstance(entry[name], str) and entry[name] for name in fields)
        assert (ROOT / "book" / f"{entry['chapter']}.md").is_file()
        if entry["kind"] != "not reproduced" and entry["chapter"] not in OLD_CLAIMS:
            assert entry["alternatives"], entry["id"]


@pytest.mark.book
@pytest.mark.usefixtures("build_log")
@pytest.mark.parametrize("page", pages())
def test_every_claim_of_a_page_ran(page: str) -> None:
    html = BeautifulSoup(
        (HTML / f"{page}.html").read_text(encoding="utf8"), "html.parser"
    )
    boxes = html.select("div.claim[id^=clm-]")
    assert len(boxes) == claims_written(page)


@pytest.mark.book
@pytest.mark.usefixtures("build_log")
def test_second_build_executes_nothing() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "book" / "_ext" / "build.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Executing notebook" not in done.stdout + done.stderr
    assert " executed in " not in done.stdout


# ---- the form of the chapters, read from their sources ----


def prose(text: str) -> str:
    """A page without its front matter and its code cells."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    return re.sub(r"(?ms)^(`{3,})\{code-cell\}.*?^\1\s*$", "", text)


@pytest.mark.parametrize("page", pages())
def test_page_opens_with_its_question(page: str) -> None:
    if page.endswith(("bibliography",)):
        pytest.skip("a list")
    body = prose(text_of(page))
    label, title = (
        re.search(r"(?m)^\((ch-[a-z0-9-]+)\)=\n", body),
        re.search(r"(?m)^# .+$", body),
    )
    assert label, "the page has no (ch-...)= label"
    assert title, "the page has no title"
    assert "?" in body[title.end() :][:900], "no question in the first paragraphs"


@pytest.mark.parametrize("page", chapters())
def test_chapter_has_claims(page: str) -> None:
    assert claims_written(page) >= 1


@pytest.mark.parametrize("page", chapters())
def test_exercises_have_solutions_and_one_is_code(page: str) -> None:
    text = text_of(page)
    exercises = re.findall(
        r"(?m)^\s*[`:]{3,}\{exercise(?:-start)?\}.*\n(?:\s*:class:.*\n)?\s*:label:\s*(\S+)",
        text,
    )
    solutions = re.findall(r"(?m)^\s*[`:]{3,}\{solution(?:-start)?\}\s*(\S+)", text)
    assert 3 <= len(exercises) <= 6
    assert sorted(exercises) == sorted(solutions)
    gated = re.findall(r"(?ms)\{solution-start\}.*?\{solution-end\}", text)
    assert any("{code-cell}" in solution for solution in gated), "no solution is code"


@pytest.mark.parametrize("page", chapters())
def test_chapter_ends_as_all_do(page: str) -> None:
    headings = re.findall(r"(?m)^##+ (.+)$", prose(text_of(page)))
    assert "In `crate_core`" in headings


@pytest.mark.parametrize("page", chapters())
def test_figures_have_alt_text_and_caption(page: str) -> None:
    for block in re.findall(
        r"(?ms)^```\{code-cell\}[^\n]*\n---\n(.*?)\n---\n", text_of(page)
    ):
        options = (yaml.safe_load(block) or {}).get("mystnb") or {}
        if "figure" in options:
            assert options["figure"].get("caption"), block
            assert re.fullmatch(r"fig-[a-z0-9-]+", options["figure"].get("name", "")), (
                block
            )
            assert len((options.get("image") or {}).get("alt") or "") > 20, block


def bare_comparisons(code: str) -> Iterator[int]:
    """Lines of statements that compare and throw the answer away, or only print it."""
    compares = ("allclose", "array_equal", "array_equiv", "isclose", "equal")
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Expr):
            continue
        value = node.value
        while (
            isinstance(value, ast.Call)
            and ast.unparse(value.func) == "print"
            and len(value.args) == 1
        ):
            value = value.args[0]
        name = (
            value.func.attr
            if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute)
            else ""
        )
        if (
            isinstance(value, ast.Compare)
            or name in compares
            or (name in ("all", "any") and "==" in ast.unparse(value))
        ):
            yield node.lineno


@pytest.mark.parametrize("page", pages())
def test_no_check_is_only_shown(page: str) -> None:
    text = text_of(page)
    if is_notebook(text):
        assert [
            (cell, line)
            for cell, code in code_cells(text)
            for line in bare_comparisons(code)
        ] == []


def test_bare_comparisons_are_found() -> None:
    assert list(bare_comparisons("x = 1\nx == 1\nassert x == 1")) == [2]
    assert list(
        bare_comparisons("torch.allclose(a, b)\nassert torch.allclose(a, b)")
    ) == [1]
    assert list(bare_comparisons("print(np.allclose(a, b))\nprint('a', 1)")) == [1]


@pytest.mark.parametrize("page", chapters())
def test_chapter_imports_from_defining_modules(page: str) -> None:
    for cell, code in code_cells(text_of(page)):
        for node in ast.walk(ast.parse(code)):
            plain = isinstance(node, ast.Import) and any(
                alias.name == "crate_core" for alias in node.names
            )
            assert not plain, (
                f"cell {cell}: `import crate_core` makes the page depend on "
                "every module"
            )


@pytest.mark.parametrize("page", pages())
def test_code_is_at_most_88_columns_wide(page: str) -> None:
    for cell, code in code_cells(text_of(page)) if is_notebook(text_of(page)) else ():
        wide = [line for line in code.splitlines() if len(line) > 88]
        assert not wide, f"cell {cell}: {wide}"


@pytest.mark.parametrize("page", pages())
def test_cells_run_in_any_folder(page: str) -> None:
    # The downloaded notebook has the package beside it, and no clone.
    for cell, code in code_cells(text_of(page)) if is_notebook(text_of(page)) else ():
        assert "../" not in code, (
            f"cell {cell} names a path of the clone; records are found anywhere by "
            'crate_core.records.results_path("results/NAME")'
        )


# ---- references from docstrings to the book ----


def book_labels() -> set[str]:
    """Every label a page defines."""
    found: set[str] = set()
    for page in pages():
        text = text_of(page)
        found |= set(re.findall(r"(?m)^\(([\w:-]+)\)=", text))
        found |= set(re.findall(r"(?m)^\s*:label:\s*(\S+)", text))
        found |= set(re.findall(r"\$\$\s*\(([\w:-]+)\)", text))
        found |= set(re.findall(r"(?m)^\s*name:\s*(\S+)", text))
        found |= set(re.findall(r"""["'](clm-[a-z0-9-]+)["']""", text))
    return found


def test_labels_in_docstrings_resolve() -> None:
    labels, missing = book_labels(), []
    for path in sorted((ROOT / "crate_core").rglob("*.py")):
        for target in re.findall(
            r":(?:ref|eq|numref|prf:ref):`(?:[^`<]*<)?([^`>]+)>?`",
            path.read_text(encoding="utf8"),
        ):
            if target not in labels:
                missing.append(f"{path.name}: {target}")
    assert not missing


def test_citations_have_entries() -> None:
    keys = set(
        re.findall(
            r"@\w+\{([^,\s]+),",
            (ROOT / "book" / "references.bib").read_text(encoding="utf8"),
        )
    )
    sources = [
        *(ROOT / "crate_core").rglob("*.py"),
        *(ROOT / f"{page}.md" for page in pages()),
    ]
    cited = set()
    for source in sources:
        for group in re.findall(
            r"cite(?::[a-z]+)?[}:]`([^`]+)`", source.read_text(encoding="utf8")
        ):
            cited |= {key.strip() for key in group.split(",")}
    assert not cited - keys


def test_kinds_are_those_of_the_package() -> None:
    from crate_core.claims import CLAIM_KINDS

    assert tuple(claims.KINDS) == CLAIM_KINDS
