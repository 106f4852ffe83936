"""One symbol, one meaning: chapters use the letters of the notation table, and letters
of their own only inside one section.

What is compared are base letters: indices, primes, hats and bars are left out (an index
does not make a new letter, `\\mathcal X` does).  Meanings no program can compare; but a
letter that has no entry, and stands in two sections of a chapter, is a letter whose
meaning nobody can look up.  Exercises, each on its own, may have letters of theirs.
"""

import re
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.repository
ROOT = Path(__file__).resolve().parents[2]
GREEK = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "varepsilon",
    "zeta",
    "eta",
    "theta",
    "vartheta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "xi",
    "pi",
    "rho",
    "sigma",
    "tau",
    "upsilon",
    "phi",
    "varphi",
    "chi",
    "psi",
    "omega",
    "Gamma",
    "Delta",
    "Theta",
    "Lambda",
    "Xi",
    "Pi",
    "Sigma",
    "Upsilon",
    "Phi",
    "Psi",
    "Omega",
    "ell",
]
LEFT = {
    "coding_rate": {r"\delta", r"\mathcal R", "S"},
    "ista": {"S", "u"},
}
"""What chapters that are not rewritten yet still have; only ever fewer."""
LEFT_FIRST = 3
LEFT_EARLY = {
    "coding_rate": {r"\alpha", r"\lambda", "D", "H", "r"},
}
"""Likewise, letters that mean something else later in the book."""
FREE = {"f"}
"""Any function, wherever it stands; the table has it with an index."""
INDICES = {"i", "j", "k", "l", r"\ell"}
"""Letters that count things wherever they stand."""
CONSTANTS = {"e", "I", "O", r"\mathcal N", r"\pi"}
"""Euler's number, the identity, Landau's O, the normal law, the circle's number."""
WORDS = re.compile(
    r"\\(?:text|textbf|textit|mathrm|mathtt|texttt|operatorname\*?|begin|end|label|tag)"
    r"\s*\{(?:[^{}]|\{[^{}]*\})*\}(?:\{[^{}]*\})?"
)
GROUP = r"(?:\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\}|\\[A-Za-z]+|.)"
SYMBOL = re.compile(
    r"(?P<cal>\\(?:mathcal|mathfrak|mathscr|mathbf|mathbb)\s*\{?\s*[A-Za-z]\}?)"
    r"|\\(?P<command>[A-Za-z]+)|(?P<letter>[A-Za-z])"
)


def symbols(tex: str) -> set[str]:
    """The base letters of a piece of TeX: Latin letters, Greek ones,
    calligraphic ones.
    """
    tex = WORDS.sub(" ", tex)
    tex = re.sub(rf"_\s*{GROUP}", " ", tex)  # an index is no symbol
    found = set()
    for match in SYMBOL.finditer(tex):
        if match["cal"]:
            kind, letter = re.findall(r"\\(\w+)\s*\{?\s*(\w)", match["cal"])[0]
            found.add(letter if kind == "mathbf" else rf"\{kind} {letter}")
        elif match["letter"]:
            found.add(match["letter"])
        elif match["command"] in GREEK:
            found.add("\\" + match["command"])
    return found - INDICES - CONSTANTS


def formulas(text: str) -> list[str]:
    """The TeX of a piece of MyST: between dollar signs, in math
    directives and roles.
    """
    text = re.sub(r"(?m)^\s*\$\$\s*\([^)]*\)\s*$", "$$", text)  # labels of equations
    found = re.findall(r"(?ms)^\s*[`:]{3,}\{math\}.*?\n(.*?)^\s*[`:]{3,}\s*$", text)
    found += re.findall(r"(?s)\$\$(.+?)\$\$", text)
    text = re.sub(r"(?s)\$\$.+?\$\$", " ", text)
    found += re.findall(r"\{math\}`([^`]+)`", text)
    text = re.sub(r"`[^`]*`", " ", text)
    return found + re.findall(r"(?<![\\$])\$([^$]+)\$", text)


def prose(text: str) -> str:
    """A page without its front matter and its code cells."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    return re.sub(r"(?ms)^(`{3,})\{code-cell\}.*?^\1\s*$", "", text)


def sections(text: str) -> dict[str, str]:
    """Heading -> text of each section of the second level; before the first, the
    chapter's introduction.
    """
    pieces = re.split(r"(?m)^## +(.+)$", prose(text))
    return {"": pieces[0]} | dict(zip(pieces[1::2], pieces[2::2], strict=True))


def used(text: str) -> set[str]:
    """All symbols of a piece of text."""
    return {symbol for tex in formulas(text) for symbol in symbols(tex)}


def table() -> list[tuple[str, str, str, str]]:
    """The rows of the notation page: symbol, meaning, name in code, first chapter."""
    text = (ROOT / "book" / "notation.md").read_text(encoding="utf8")
    rows = []
    for body in re.findall(r"(?ms)^```\{list-table\} .*?\n\n(.*?)^```\s*$", text):
        for row in re.split(r"(?m)^\* - ", body)[1:]:
            cells = [cell.strip() for cell in re.split(r"(?m)^  -", row)]
            if cells[0] != "symbol":
                rows.append(tuple(cells))
    return rows


def chapters() -> list[str]:
    """The pages of the numbered parts, in order."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf8"))
    return [
        chapter["file"].removeprefix("book/")
        for part in toc["parts"]
        if part.get("numbered")
        for chapter in part["chapters"]
    ]


def first_chapter(cell: str) -> str:
    """The page that a cell of the last column links to, by its number."""
    (label,) = re.findall(r"^\{numref\}`\{number\} <ch-([a-z-]+)>`$", cell)
    return label.replace("-", "_")


ENTRIES = {symbol for row in table() for symbol in used(row[0])}


def strangers(text: str) -> dict[str, list[str]]:
    """Symbols without an entry that stand in more than one section, and in which."""
    places: dict[str, list[str]] = {}
    for heading, section in sections(text).items():
        if heading.startswith("Exercise"):
            continue  # each exercise is on its own
        for symbol in used(section) - ENTRIES:
            places.setdefault(symbol, []).append(heading or "introduction")
    return {symbol: where for symbol, where in places.items() if len(where) > 1}


@pytest.mark.parametrize("chapter", chapters())
def test_letters_have_an_entry_or_stay_in_their_section(chapter: str) -> None:
    path = ROOT / "book" / f"{chapter}.md"
    if not path.is_file():
        pytest.skip("the chapter is not there yet")
    found = strangers(path.read_text(encoding="utf8"))
    left = LEFT.get(chapter, set())
    assert {name: where for name, where in found.items() if name not in left} == {}


def test_table_has_four_columns_and_names_chapters() -> None:
    rows = table()
    assert len(rows) > 20
    for row in rows:
        assert len(row) == 4, row
        assert formulas(row[0]), row
        assert row[1], row
        assert first_chapter(row[3]) in chapters(), row


def test_symbols_of_the_table_occur_in_their_first_chapter() -> None:
    missing = []
    for symbol, _, _, where in table():
        chapter = first_chapter(where)
        path = ROOT / "book" / f"{chapter}.md"
        if path.is_file():
            text = prose(path.read_text(encoding="utf8"))
            absent = used(symbol) - used(text)
            missing += [f"{name} in {chapter}" for name in sorted(absent)]
    assert len(missing) <= LEFT_FIRST, missing


def intruders(chapter: str, first: dict[str, int]) -> dict[str, list[str]]:
    """Symbols of the table that a chapter uses though they come later in the book, and
    in which sections: they must mean something else there.
    """
    text = (ROOT / "book" / f"{chapter}.md").read_text(encoding="utf8")
    here = chapters().index(chapter)
    found: dict[str, list[str]] = {}
    for heading, section in sections(text).items():
        for symbol in used(section) - FREE:
            if first.get(symbol, -1) > here and not heading.startswith("Exercise"):
                found.setdefault(symbol, []).append(heading or "introduction")
    return found


@pytest.mark.parametrize("chapter", chapters())
def test_letters_of_the_table_do_not_come_early(chapter: str) -> None:
    if not (ROOT / "book" / f"{chapter}.md").is_file():
        pytest.skip("the chapter is not there yet")
    first: dict[str, int] = {}
    for symbol, _, _, where in table():
        place = chapters().index(first_chapter(where))
        for name in used(symbol):
            first[name] = min(place, first.get(name, place))
    found, left = intruders(chapter, first), LEFT_EARLY.get(chapter, set())
    assert {name: where for name, where in found.items() if name not in left} == {}


def test_names_in_code_are_the_package_s() -> None:
    words = set()
    for path in (ROOT / "crate_core").rglob("*.py"):
        words |= set(re.findall(r"\w+", path.read_text(encoding="utf8")))
    named = {
        word
        for _, _, code, _ in table()
        for name in re.findall(r"`([A-Za-z_.]+)", code)
        for word in name.split(".")
    }
    assert named <= words


@pytest.mark.parametrize(
    ("tex", "found"),
    [
        (r"Z \in \RR^{d\times n}", {"Z", "d", "n"}),
        (r"\hat x_{ij} = U_kU_k^\T z", {"x", "U", "z"}),
        (r"\softmax_k(\alpha \norm{U_k^\T z}^2)", {r"\alpha", "U", "z"}),
        (r"\mathcal I_k,\ \mathcal{N}(0, \sigma^2 I)", {r"\mathcal I", r"\sigma"}),
        (r"\text{if } q = \frac12 e^{-2\beta t}", {"q", r"\beta", "t"}),
        (r"\sum_{k=1}^K \log\det", {"K"}),
        (r"Z^{\ell+1/2}_{\mathrm{own}}", {"Z"}),
    ],
)
def test_letters_are_found(tex: str, found: set[str]) -> None:
    assert symbols(tex) == found


def test_a_letter_without_entry_stays_in_one_section() -> None:
    text = (
        "# T\n\nHere $Z$.\n\n## One\n\n$q = Z$ and `$y$`\n\n## Two\n\n$$\nq y\n$$ "
        "(eq-x)\n"
    )
    assert strangers(text) == {"q": ["One", "Two"]}
