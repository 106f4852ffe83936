"""The book's own Sphinx extensions: what a page depends on, which claims it makes, what
its notebook holds.
"""

import ast
import json
import os
import re
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import claims
import depcache
import nbformat
import notebooks
import pytest
from bs4 import BeautifulSoup
from pybtex.database import Entry, Person

pytestmark = pytest.mark.repository
ROOT = Path(__file__).resolve().parents[2]
FRONT = """---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3 (ipykernel)
  language: python
  name: python3
---

"""


def page(*cells: str, text: str = "# Title\n") -> str:
    """A page with these code cells."""
    return (
        FRONT
        + text
        + "".join(
            f"\n```{{code-cell}} python\n{textwrap.dedent(cell).strip()}\n```\n"
            for cell in cells
        )
    )


# ---- depcache: the digest ----


@pytest.fixture
def package(tmp_path: Path) -> depcache.Package:
    """A package whose modules import each other in every way that ours do."""
    folder = tmp_path / "pkg"
    folder.mkdir()
    modules = {
        "__init__": "from pkg.low import f as f\nfrom pkg.high import g as g\n",
        "low": "def f():\n    return 1\n",
        "middle": "from pkg.low import f\n",
        "late": "def h():\n    from pkg.low import f\n    return f()\n",
        "high": "from pkg import middle\ndef g():\n    return 2\n",
        "relative": "from . import low\nfrom .late import h\n",
        "data": "PATH = 'results/run.json'\n",
        "alone": "x = 1\n",
    }
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    return depcache.Package("pkg", folder)


@pytest.mark.parametrize(
    ("code", "modules"),
    [
        ("from pkg.low import f", {"low"}),
        # followed through the re-export, not everything
        ("from pkg import f", {"low"}),
        ("from pkg import g", {"high", "middle", "low"}),
        ("from pkg import alone", {"alone"}),
        ("import pkg.middle as m", {"middle", "low"}),
        ("from pkg.late import h", {"late", "low"}),  # imports inside functions count
        ("from pkg.relative import low", {"relative", "low", "late"}),
        ("def f():\n    from pkg.alone import x", {"alone"}),
        ("import numpy", set()),
        ("import pkg", {"low", "middle", "late", "high", "relative", "data", "alone"}),
        (
            "from pkg import *",
            {"low", "middle", "late", "high", "relative", "data", "alone"},
        ),
    ],
)
def test_imports_are_followed(
    package: depcache.Package, code: str, modules: set[str]
) -> None:
    assert depcache.transitive_imports(ast.parse(code), package) == {
        f"pkg.{name}" for name in modules
    }


def digest(package: depcache.Package, text: str) -> str:
    return depcache.page_digest(text, package.folder.parent, ["pkg"], ["results"])


@pytest.mark.parametrize(
    ("edited", "changes"),
    [("low", True), ("middle", True), ("alone", False), ("late", False)],
)
def test_digest_changes_with_dependencies_only(
    package: depcache.Package, edited: str, changes: bool
) -> None:
    text = page("from pkg import g")
    before = digest(package, text)
    path = package.folder / f"{edited}.py"
    original = path.read_text()
    path.write_text(original + "# edited\n")
    assert (digest(package, text) != before) is changes
    path.write_text(original)
    assert digest(package, text) == before  # and the old outputs are found again


def test_digest_changes_with_named_results(package: depcache.Package) -> None:
    results = package.folder.parent / "results"
    results.mkdir()
    direct, through_module = (
        page('path = "../results/run.json"'),
        page("from pkg.data import PATH"),
    )
    other = page("x = 1")
    before = [digest(package, text) for text in (direct, through_module, other)]
    (results / "run.json").write_text("{}")
    after = [digest(package, text) for text in (direct, through_module, other)]
    assert [a != b for a, b in zip(after, before, strict=True)] == [True, True, False]


def test_digest_moves_no_line() -> None:
    marked = depcache.with_digest(page("x = 1"), "0123")
    assert marked.count("\n") == page("x = 1").count("\n")
    assert "display_name: Python 3 (ipykernel) [0123]" in marked
    assert (
        depcache.with_digest("# a page without cells", "0123")
        == "# a page without cells"
    )


def test_magics_do_not_hide_imports() -> None:
    tree = depcache.page_code(page("%matplotlib inline\nfrom pkg.low import f\n!ls"))
    assert "from pkg.low import f" in ast.unparse(tree)
    # a line of plain Python that begins as a magic does
    plain = "x = (\n    5\n    % 3\n)"
    assert [code for _, code in depcache.code_cells(page(plain))] == [plain]


# ---- ledger: reading and checking claims ----

CLAIM = """
claim("clm-a-b", r"It is $x$ " "and so on.",
      conditions="always", kind="numerical",
      evidence="a check", measured=1,
      holds=lambda x: x == 1, refuses={"zero": 0})
"""


def test_claims_are_read() -> None:
    found, problems = claims.read_claims(page(CLAIM), "book/a")
    assert problems == []
    assert found == [
        claims.Claim(
            "clm-a-b",
            "It is $x$ and so on.",
            "always",
            "numerical",
            "a check",
            "book/a",
        )
    ]


@pytest.mark.parametrize("bad", ['f"always"', "conditions", '"a" + b'])
def test_arguments_must_be_literal(bad: str) -> None:
    found, problems = claims.read_claims(page(CLAIM.replace('"always"', bad)), "book/a")
    assert found == []
    assert len(problems) == 1
    assert "conditions" in problems[0]


@pytest.mark.parametrize(
    ("change", "boxes", "said"),
    [
        ({}, 1, None),
        ({}, 0, "its box is 0 times"),
        ({}, 2, "its box is 2 times"),
        ({"kind": "obvious"}, 1, "unknown kind"),
        ({"label": "rate-x"}, 1, "a label is clm-"),
        ({"test": "tests/book/test_extensions.py::test_claims_are_read"}, 0, None),
        (
            {"test": "tests/book/test_extensions.py::test_nothing"},
            0,
            "there is no test",
        ),
        (
            {"test": "tests/test_nothing.py::test_claims_are_read"},
            0,
            "there is no test",
        ),
    ],
)
def test_claims_are_checked(
    change: dict[str, str], boxes: int, said: str | None
) -> None:
    values = {
        "label": "clm-a",
        "statement": "s",
        "conditions": "c",
        "kind": "proved",
        "evidence": "e",
        "docname": "d",
    }
    claim = claims.Claim(**(values | change))
    problems = claims.check_claim(claim, Counter({claim.label: boxes}), ROOT)
    assert len(problems) == (said is not None)
    assert said is None or said in problems[0]


@pytest.mark.parametrize(
    ("change", "recomputed"),
    [
        ({}, True),
        ({"kind": "not reproduced"}, False),
        ({"recorded": "results/rates.json"}, False),
        ({"test": "tests/book/test_extensions.py::test_claims_are_read"}, False),
    ],
)
def test_entries_say_what_a_build_computes_again(
    change: dict[str, str], recomputed: bool
) -> None:
    values = {"label": "clm-a", "statement": "s", "conditions": "c", "kind": "proved",
              "evidence": "e", "docname": "book/d"} | change  # fmt: skip
    claim = claims.Claim(**values, alternatives=("zero",))
    assert claim.entry() == {
        "id": "clm-a",
        "chapter": "d",
        "claim": "s",
        "conditions": "c",
        "kind": values["kind"],
        "evidence": "e",
        "alternatives": ["zero"],
        "recomputed": recomputed,
    }


def test_a_recorded_file_must_exist() -> None:
    claim = claims.Claim("clm-a", "s", "c", "proved", "e", "d", recorded="results/x")
    problems = claims.check_claim(claim, Counter({"clm-a": 1}), ROOT)
    assert problems == ["clm-a: there is no file results/x"]


def test_claims_that_refuse_nothing_are_found() -> None:
    new = SmallBook.claim("clm-new")
    old = CLAIM.replace(', refuses={"zero": 0}', "")
    never = (
        'claim("clm-never", "s", conditions="c", kind="not reproduced", evidence="e")'
    )
    tested = "\n```{tested-claim} clm-tested\n:conditions: c\n"
    text = page(new, old, never, text=tested + "Said.\n```\n")
    assert claims.first_edition(text) == ["clm-a-b", "clm-tested"]
    text = page(new, text=tested + ":refuses: nothing\nSaid.\n```\n")
    assert claims.first_edition(text) == []


CELL = """
# computed first
x = f(1)

# why this bound
claim(
    "clm-a-b",
    "Said.",
    conditions="c",
    kind="numerical",
    evidence="e",
    measured=x
    + 1,
    holds=lambda x: x == 1,
    refuses={
        "zero": 0,
    },
)
print(x)
for label in (1, 2):
    claim("clm-a-c", "Said.", conditions="c", kind="proved", evidence="e", holds=x)
y = 2
"""
CHECK = """# why this bound
measured = (
    x
    + 1
)
holds = lambda x: x == 1
refuses = {
    "zero": 0,
}"""


def test_claims_are_taken_out_of_a_cell() -> None:
    shown = claims.split_code(CELL.strip(), hidden=False)
    assert shown.checks["clm-a-b"] == CHECK
    assert shown.checks["clm-a-c"].startswith("for label in")
    assert shown.rest == "# computed first\nx = f(1)\nprint(x)\ny = 2"
    compile(shown.rest, "rest", "exec")
    hidden = claims.split_code(CELL.strip(), hidden=True)
    assert hidden.rest == ""
    assert hidden.checks["clm-a-b"] == f"# computed first\nx = f(1)\n{CHECK}"
    assert hidden.checks["clm-a-c"].startswith("print(x)\nfor label in")
    assert hidden.checks["clm-a-c"].endswith("\ny = 2")


def test_a_cell_without_claims_is_left_alone() -> None:
    code = "def claim_it():\n    claim('clm-a')\n\nx = 1"
    assert claims.split_code(code, hidden=True) == claims.Split(code, {})


# ---- notebooks ----

MYST = r"""(ch-a)=
# Title

See {prf:ref}`thm-a`, {eq}`eq-a`, {ref}`the chapter <ch-b>` and
{cite:t}`pai2024masked`; {glue:text}`n` of {glue:text}`m` tokens
{cite:p}`ho,pai2024masked`.
As in {ref}`ch-c`, {doc}`c`, {ref}`all
of them <ch-none>`, {numref}`chapter {number} <ch-c>` and {eq}`eq-c`; {py:func}`~a.b.f`
and {ref}`a claim <clm-x>`.

:::{prf:theorem} Name
:label: thm-a
It holds that $x$, by {math}`y`.
:::

```{code-block} python
{ref}`stays`
```

```{math}
:label: eq-a
x = y
```

$$
u = v
$$ (eq-b)

```{exercise} By hand
:label: ex-a
Do it.
```

```{solution} ex-a
Done.
```

"""


def cited(first: str, *others: str, title: str) -> Entry:
    """A work in the bibliography."""
    people = [Person(name) for name in (first, *others)]
    fields = {"title": title, "year": "2024", "publisher": "P"}
    return Entry("book", fields=fields, persons={"author": people})


def test_notebook_is_plain_and_complete() -> None:
    macros: dict[str, str | list] = {"RR": r"\mathbb{R}", "n": ["|#1|", 1]}
    figure = 'claim("clm-x", "Said.")\ny = 2'
    text_of_page = page("x = 1", figure, text=MYST)
    text_of_page = text_of_page.replace(
        "claim(",
        "---\nmystnb:\n  figure: {caption: 'By {eq}`eq-b`.', name: fig-a}\n---\nclaim(",
    )
    place = notebooks.Place
    links = notebooks.Links(
        docname="book/a",
        places={
            "thm-a": place("Theorem 1.2", "book/a", "1.2"),
            "eq-a": place("(1.1)", "book/a", "1.1"),
            "eq-b": place("(1.3)", "book/a", "1.3"),
            "eq-c": place("(2.1)", "book/c", "2.1"),
            "ex-a": place("Exercise 1.1", "book/a", "1.1"),
            "fig-a": place("Fig. 1.1", "book/a", "1.1"),
            "ch-b": place("Chapter B", "book/b", "1"),
            "ch-c": place("Chapter C", "book/c", "2"),
            "clm-x": place("clm-x", "book/a"),
            "book/c": place("Chapter C", "book/c", "2"),
        },
        notebooks=frozenset({"book/a", "book/c"}),
        entries={
            "pai2024masked": cited("Pai, D.", "Wu, Z.", "Ma, Y.", title="Masked"),
            "ho": cited("Ho, J.", "Jain, A.", title="Noise"),
        },
        glued=iter(["12", "196"]),
    )
    notebook = notebooks.make_notebook(text_of_page, "Title", macros, links)
    nbformat.validate(notebook)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert code[1:] == ["x = 1", figure]
    assert 'pip install -e ".[book]"' in code[0]
    text = "\n".join(
        cell.source for cell in notebook.cells if cell.cell_type == "markdown"
    )
    for said in (
        r"\def\RR{\mathbb{R}}",
        r"\newcommand{\n}[1]{|#1|}",
        "**Theorem 1.2 (Name).**",
        "[Theorem 1.2](#thm-a)",
        "[(1.1)](#eq-a), the chapter and\n",  # no notebook has that chapter
        "[Pai et al. (2024)](#cite-pai2024masked); 12 of 196 tokens\n([Ho and Jain, ",
        "[Chapter C](c.ipynb#ch-c), [Chapter C](c.ipynb), all\nof them, ",
        "[chapter 2](c.ipynb#ch-c) and [(2.1)](c.ipynb#eq-c); `f`",
        "[a claim](#clm-x)",
        "$y$",
        "{ref}`stays`",  # code is left alone
        '<a id="eq-b"></a>\n\n$$\nu = v\n\\tag{1.3}$$',
        "**Exercise 1.1 (By hand).**",
        "**Solution to** [Exercise 1.1](#ex-a)**.**",
        "*Fig. 1.1: By [(1.3)](#eq-b).*",
        '<a id="cite-ho"></a>J. Ho and A. Jain',
    ):
        assert said in text
    for label in re.findall(r"\]\(#([\w-]+)\)", text):
        assert text.count(f'<a id="{label}"></a>') == 1, label
    assert re.search(r"\$\$\s+x = y\s+\\tag\{1.1\}\$\$", text)
    assert ":::" not in text
    assert "{prf:" not in text


@pytest.mark.parametrize(
    ("url", "hosts"),
    [
        ("", []),
        ("https://example.org/a/b", []),
        ("https://github.com/a/b.git", ["Colab", "Binder"]),
    ],
)
def test_notebooks_open_elsewhere_once_the_project_has_an_address(
    url: str, hosts: list[str]
) -> None:
    buttons = notebooks.launch_buttons(url, "book/c", "main", "pages")
    assert [button["text"] for button in buttons] == hosts
    assert all("/a/b/" in button["url"] for button in buttons)
    needs = notebooks.make_notebook(page("x = 1"), "T", {}, url=url).cells[1].source
    assert ("%pip" in needs) is bool(url)


def test_notebook_is_repeatable() -> None:
    first, second = (
        notebooks.make_notebook(page("x = 1"), "Title", {}) for _ in range(2)
    )
    assert nbformat.writes(first) == nbformat.writes(second)


# ---- all of it, in a small book ----

CONFIG = """
import sys
sys.path.insert(0, {ext!r})
extensions = ["myst_nb", "depcache", "ledger", "cells"]
depcache_packages = ["pkg"]
nb_execution_mode = "cache"
nb_execution_show_tb = True
myst_enable_extensions = ["dollarmath", "colon_fence"]
exclude_patterns = ["_build"]
"""


class SmallBook:
    """A book of three pages over a package of two modules."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "pkg").mkdir()
        self.write(
            "pkg/__init__.py",
            "from pkg.one import f as f\nfrom pkg.two import g as g\n",
        )
        self.write("pkg/one.py", "def f():\n    return 1\n")
        self.write("pkg/two.py", "def g():\n    return 2\n")
        self.write("pkg/show.py", "from crate_core.claims import claim as claim\n")
        self.write("conf.py", CONFIG.format(ext=str(ROOT / "book" / "_ext")))
        self.write("index.md", "# Index\n\n```{toctree}\na\nb\nledger\n```\n")
        self.write(
            "a.md",
            page(
                "from pkg import f\nfrom pkg.show import claim\nprint(f())",
                self.claim("clm-a"),
            ),
        )
        self.write("b.md", page("from pkg import g\nprint(g())"))
        self.write("ledger.md", "# Ledger\n\n```{claims-ledger}\n```\n")

    @staticmethod
    def claim(label: str, kind: str = "proved") -> str:
        return (
            f'claim("{label}", "Said.", conditions="c", kind="{kind}", evidence="e", '
            'measured=1, holds=lambda x: x == 1, refuses={"zero": 0})'
        )

    def write(self, name: str, text: str) -> None:
        (self.root / name).write_text(text)

    def build(self) -> tuple[set[str], list[str]]:
        """Build; the pages that executed, and the warnings."""
        done = subprocess.run(
            [sys.executable, "-m", "sphinx", "-b", "html", ".", "_build/html"],
            cwd=self.root,
            capture_output=True,
            text=True,
            check=True,
            env=os.environ
            | {
                "PYTHONPATH": os.pathsep.join([str(self.root), str(ROOT)]),
                "NO_COLOR": "1",
                "PYTHONDONTWRITEBYTECODE": "1",
            },
        )
        executed = set(
            re.findall(r"(\w+)\.md: Executing notebook", done.stdout + done.stderr)
        )
        return executed, [
            line for line in done.stderr.splitlines() if "WARNING: " in line
        ]

    def shown(self, name: str) -> str:
        return (self.root / "_build" / "html" / f"{name}.html").read_text()


@pytest.fixture(scope="module")
def small_book(tmp_path_factory: pytest.TempPathFactory) -> SmallBook:
    pytest.importorskip("myst_nb", reason="needs the book extra")
    book = SmallBook(tmp_path_factory.mktemp("book"))
    executed, warnings = book.build()
    assert executed == {"a", "b"}
    assert warnings == []
    return book


def test_editing_a_module_executes_its_dependents_only(small_book: SmallBook) -> None:
    small_book.write("pkg/two.py", "def g():\n    return 'edited'\n")
    assert small_book.build() == ({"b"}, [])
    assert "edited" in small_book.shown("b")
    small_book.write("pkg/two.py", "def g():\n    return 2\n")
    assert small_book.build() == (set(), [])  # the old outputs come from the cache
    assert "edited" not in small_book.shown("b")
    assert small_book.build() == (set(), [])


def test_ledger_follows_the_pages(small_book: SmallBook) -> None:
    original = (small_book.root / "b.md").read_text()
    assert "clm-b" not in small_book.shown("ledger")
    small_book.write(
        "b.md", page("from pkg.show import claim", small_book.claim("clm-b"))
    )
    assert small_book.build() == ({"b"}, [])
    assert "b.html#clm-b" in small_book.shown("ledger")
    assert "2 claims" in small_book.shown("ledger")
    small_book.write("b.md", original)
    assert small_book.build() == (set(), [])
    assert "clm-b" not in small_book.shown("ledger")
    assert "1 claim<" in small_book.shown("ledger")


def test_build_warns_until_a_claim_is_mended(small_book: SmallBook) -> None:
    original = (small_book.root / "b.md").read_text()
    cells = [
        "from pkg.show import claim",
        small_book.claim("clm-a"),
        f"if False:\n    {small_book.claim('clm-never')}",
    ]
    small_book.write("b.md", page(*cells))
    for _ in range(2):  # the second build reads no page, and says it again
        _, warnings = small_book.build()
        assert len(warnings) == 2
        assert any("clm-a: used 2 times" in warning for warning in warnings)
        assert any("clm-never: its box is 0 times" in warning for warning in warnings)
    small_book.write("b.md", original)
    assert small_book.build()[1] == []


FIGURE = """
from IPython.display import HTML, display
display(HTML('<svg data-live-figure="rise"></svg>'))
"""


def hidden(text: str) -> str:
    """The page with all its cells tagged `hide-input`."""
    return text.replace(
        "{code-cell} python\n", "{code-cell} python\n:tags: [hide-input]\n\n"
    )


def test_cells_are_arranged(small_book: SmallBook) -> None:
    original = (small_book.root / "b.md").read_text()
    minor = [
        small_book.claim(f"clm-m{number}")[:-1] + ", minor=True)" for number in (1, 2)
    ]
    cells = [
        "from pkg.show import claim",
        FIGURE,
        "x = 1\n" + small_book.claim("clm-b"),
        "\n".join(minor),
    ]
    text = hidden(page(*cells))
    test = "tests/book/test_x.py::test_y"
    (small_book.root / "tests" / "book").mkdir(parents=True)
    small_book.write(test.split(":")[0], "def test_y():\n    pass\n")
    text += (
        "\n```{tested-claim} clm-t\n:conditions: c\n:kind: numerical\n"
        f":test: {test}\n:refuses: zero; one\nSaid.\n```\n\nAfterwards.\n"
    )
    small_book.write("b.md", text)
    assert small_book.build()[1] == []
    html = BeautifulSoup(small_book.shown("b"), "html.parser")
    folds = [fold.summary.get_text() for fold in html.select("details.code-fold")]
    assert folds == ["Imports and setup, cell 2", "Code of this figure: rise"]
    assert not html.select("details.hide")
    figure = html.select_one("[data-live-figure]")
    assert figure.find_previous("details")["class"] == ["code-fold"]
    assert "data-live-figure" in figure.find_next("details", "code-fold").get_text()
    boxes = html.select("div.claim")
    assert [box["id"] for box in boxes] == ["clm-b", "clm-m1", "clm-m2", "clm-t"]
    for box in boxes:
        assert box.select_one(f'a.claim-link[href="#{box["id"]}"]')
        assert box.select_one(f'a[href="ledger.html#ledger-{box["id"]}"]')
    assert (
        boxes[0].select_one(".highlight").get_text().startswith("x = 1\nmeasured = 1")
    )
    (group,) = html.select("details.claims-minor")
    assert [box["id"] for box in group.select("div.claim")] == ["clm-m1", "clm-m2"]
    assert "2 statements" in group.summary.get_text()
    # every fold is closed where it should be: the text after it stands in none
    after = html.find("p", string="Afterwards.")
    assert after is not None
    assert after.parent.name == "section"
    small_book.write("b.md", original)
    assert small_book.build()[1] == []


def test_ledger_is_written_for_programs_too(small_book: SmallBook) -> None:
    listed = json.loads((small_book.root / "_build/html/ledger.json").read_text())
    assert listed == [
        {
            "id": "clm-a",
            "chapter": "a",
            "claim": "Said.",
            "conditions": "c",
            "kind": "proved",
            "evidence": "e",
            "alternatives": ["zero"],
            "recomputed": True,
        }
    ]
    ledger = BeautifulSoup(small_book.shown("ledger"), "html.parser")
    assert (
        ledger.select_one("tr#ledger-clm-a.ledger-kind-proved li").get_text() == "zero"
    )
