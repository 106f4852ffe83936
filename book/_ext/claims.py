"""What a claim of the book is, how it is read from a page's source and from its box,
and what can be wrong with it.

`ledger` and `cells` (the Sphinx extensions) and the tests use this; it needs no Sphinx.
"""

import ast
import html
import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from depcache import code_cells

KINDS = {
    "proved": "a proof stands in the page; the check tries it on numbers, since proofs "
    "and the code that uses them can have mistakes",
    "symbolic": "computer algebra shows it exactly, for the case named",
    "numerical": "a cell or a test checks it on the cases named: evidence, not proof",
    "counterexample": "what one might expect fails; the sentence says what is true",
    "small scale": "seen with a small model and little data; large ones may differ",
    "not reproduced": "not checked here; the entry says what it would take",
}
TEXTS = ("label", "statement", "conditions", "kind", "evidence")
CHECK = ("measured", "holds", "refuses")
BOX = re.compile(r'<div class="claim [^>]*\bid="([^"]+)"[^>]*>')


@dataclass(frozen=True)
class Claim:
    """One claim: what is said, when it holds, how it is known, where it stands, what
    its check refuses, and the test or the results file that it rests on.
    """

    label: str
    statement: str
    conditions: str
    kind: str
    evidence: str
    docname: str
    test: str = ""
    alternatives: tuple[str, ...] = ()
    recorded: str = ""

    @property
    def recomputed(self) -> bool:
        """Whether a build of the book computes it again."""
        return not (self.test or self.recorded or self.kind == "not reproduced")

    def entry(self) -> dict[str, object]:
        """The claim as `ledger.json` lists it."""
        return {
            "id": self.label,
            "chapter": self.docname.rsplit("/", 1)[-1],
            "claim": self.statement,
            "conditions": self.conditions,
            "kind": self.kind,
            "evidence": self.evidence,
            "alternatives": list(self.alternatives),
            "recomputed": self.recomputed,
        }


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


def read_boxes(as_html: str) -> list[tuple[str, dict]]:
    """(Label, data) of the claims' boxes in a piece of HTML; the data are
    ``alternatives``, ``recorded`` and ``minor``.
    """
    found = []
    for match in BOX.finditer(as_html):
        data = re.search(r'\bdata-claim="([^"]*)"', match[0])
        found.append((match[1], json.loads(html.unescape(data[1])) if data else {}))
    return found


def code_of_check(call: ast.Call, code: str) -> str:
    """What a call of `claim` asserts, its texts left out: ``measured =
    ...`` and so on.
    """
    lines = []
    for keyword in call.keywords:
        if keyword.arg not in CHECK:
            continue
        value = ast.get_source_segment(code, keyword.value) or ""
        first, *rest = value.split("\n")
        value = "\n".join(
            [first, *textwrap.dedent("\n".join(rest)).split("\n")]
        ).strip()
        if rest and not isinstance(keyword.value, ast.Dict | ast.List | ast.Call):
            value = "(\n" + textwrap.indent(value, "    ") + "\n)"
        lines.append(f"{keyword.arg} = {value}")
    return "\n".join(lines)


@dataclass(frozen=True)
class Split:
    """The code of a cell, taken apart: what it computes, and the checks
    of its claims.
    """

    rest: str
    checks: dict[str, str]


def split_code(code: str, hidden: bool) -> Split:
    """Take the claims out of a cell's code.

    Each claim's check goes by its label.  If the rest is hidden, it goes with the check
    of the first claim after it (what follows the last claim, with that), and the rest
    is empty.
    """
    source = code.split("\n")
    rest: list[str] = []
    checks: dict[str, str] = {}
    start, pending = 0, []
    for statement in ast.parse(code).body:
        end = statement.end_lineno or statement.lineno
        lines, start = source[start:end], end
        calls = (
            []
            if isinstance(statement, ast.FunctionDef | ast.ClassDef)
            else list(claim_calls(ast.unparse(statement)))
        )
        labels = [
            call.args[0].value
            for call in calls
            if call.args and isinstance(call.args[0], ast.Constant)
        ]
        if not labels:
            pending += lines
            continue
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            comments = [line for line in lines if line.startswith("#")]
            check = "\n".join([*comments, code_of_check(statement.value, code)])
        else:
            check = "\n".join(lines).strip("\n")
        if hidden:
            check = "\n".join([*pending, check]).strip("\n")
        else:
            rest += pending
        pending = []
        checks[labels[0]] = check
    pending += source[start:]
    if hidden and checks:
        last = list(checks)[-1]
        checks[last] = "\n".join([checks[last], *pending]).strip("\n")
        pending = []
    return Split("\n".join(rest + pending).strip("\n"), checks)


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
                        f"cell {index}: claim(...): {name} must be given as a "
                        "literal string"
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
            f"{claim.label}: a label is clm-<chapter>-<what>, in small "
            "letters, digits and hyphens"
        )
    if claim.recorded and not any(root.glob(claim.recorded)):
        problems.append(f"{claim.label}: there is no file {claim.recorded}")
    if claim.test:
        if not test_exists(claim.test, root):
            problems.append(f"{claim.label}: there is no test {claim.test}")
    elif boxes[claim.label] != 1:
        problems.append(
            f"{claim.label}: its box is {boxes[claim.label]} times among the "
            "outputs of the page, not once: "
            "the cell did not run to it, ran it in a loop, or hides its output"
        )
    return problems


def test_exists(test: str, root: Path) -> bool:
    """Whether `tests/test_x.py::test_y` (or `::TestX::test_y`) names a
    test function.
    """
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
