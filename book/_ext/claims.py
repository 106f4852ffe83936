"""What a claim of the book is, how it is read from a page's source, and what can be
wrong with it.

`ledger` (the Sphinx extension) and the tests use this; it needs no Sphinx.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from depcache import code_cells

KINDS = {
    "proved": "a proof stands in the page; the cell checks it on numbers",
    "symbolic": "computer algebra shows it exactly",
    "numerical": "a cell or a test checks it, on the cases named",
    "counterexample": "something commonly said fails; the cell shows the case",
    "small scale": "reproduced here with a small model on small data",
    "not reproduced": "not checked here; the entry says what it would take",
}
TEXTS = ("label", "statement", "conditions", "kind", "evidence")


@dataclass(frozen=True)
class Claim:
    """One claim: what is said, when it holds, how it is known, and where it stands."""

    label: str
    statement: str
    conditions: str
    kind: str
    evidence: str
    docname: str
    test: str = ""
    alternatives: tuple[str, ...] = ()
    recorded: str = ""


def claim_calls(code: str) -> Iterator[ast.Call]:
    """The calls of `claim` (or `companion.claim`) in a piece of code, in the order of
    the text.
    """
    calls = [
        node
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.Call)
        and (
            getattr(node.func, "id", None) == "claim"
            or getattr(node.func, "attr", None) == "claim"
        )
    ]
    yield from sorted(calls, key=lambda call: (call.lineno, call.col_offset))


def first_edition(text: str) -> list[str]:
    """The claims of a page that refuse nothing: calls without ``refuses``, and tested
    claims without alternatives; "not reproduced" has none to name.
    """
    found = []
    for _, code in code_cells(text):
        for call in claim_calls(code):
            given = {
                keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords
            }
            if "refuses" not in given and given.get("kind") != "'not reproduced'":
                found.append(ast.unparse(call.args[0]).strip("'"))
    for label, body in re.findall(
        r"(?m)^[`:]{3,}\{tested-claim\} *(\S+)\n((?::.*\n)*)", text
    ):
        if not re.search(r"(?m)^:refuses: *\S", body):
            found.append(label)
    return found


def read_claims(text: str, docname: str) -> tuple[list[Claim], list[str]]:
    """The claims that the code cells of a page make, and what is wrong with how they
    are written.
    """
    claims, problems = [], []
    for index, code in code_cells(text):
        try:
            calls = list(claim_calls(code))
        except SyntaxError:
            continue  # the cell fails when it executes, and that fails the build
        for call in calls:
            given = dict(zip(TEXTS, call.args, strict=False))
            given |= {
                keyword.arg: keyword.value
                for keyword in call.keywords
                if keyword.arg in TEXTS
            }
            values: dict[str, str] = {}
            for name in TEXTS:
                node = given.get(name)
                if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                    problems.append(
                        f"cell {index}: claim(...): {name} must be given as a literal string"
                    )
                else:
                    values[name] = node.value
            if len(values) == len(TEXTS):
                claims.append(Claim(docname=docname, **values))
    return claims, problems


def check_claim(claim: Claim, boxes: Counter[str], root: Path) -> list[str]:
    """What is wrong with a claim: its kind, its box in the executed page, its test."""
    problems = []
    if claim.kind not in KINDS:
        problems.append(
            f"{claim.label}: unknown kind {claim.kind!r}, not one of {', '.join(KINDS)}"
        )
    if not re.fullmatch(r"clm-[a-z0-9-]+", claim.label):
        problems.append(
            f"{claim.label}: a label is clm-<chapter>-<what>, in small letters, digits and hyphens"
        )
    if claim.test:
        if not test_exists(claim.test, root):
            problems.append(f"{claim.label}: there is no test {claim.test}")
    elif boxes[claim.label] != 1:
        problems.append(
            f"{claim.label}: its box is {boxes[claim.label]} times among the outputs of the page, not once: "
            "the cell did not run to it, ran it in a loop, or hides its output"
        )
    return problems


def test_exists(test: str, root: Path) -> bool:
    """Whether `tests/test_x.py::test_y` (or `::TestX::test_y`) names a test function."""
    path, *names = test.split("::")
    if not names or not (root / path).is_file():
        return False
    body: list[ast.stmt] = ast.parse((root / path).read_text(encoding="utf8")).body
    for name in names:
        found = [node for node in body if getattr(node, "name", None) == name]
        if not found:
            return False
        node = found[0]
        body = node.body if isinstance(node, ast.ClassDef) else []
    return isinstance(node, ast.FunctionDef) and node.name.startswith("test")
