"""What folds on the built pages: code below figures, claims as one element, each fold
with a name of its own.

Without a built site these tests skip.
"""

from collections import Counter
from pathlib import Path

import pytest
import yaml
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"
pytestmark = [pytest.mark.site, pytest.mark.repository]
FOLDS = "details.code-fold, details.claim-fold, details.claims-minor"
FIGURES = "figure, .cell_output img, .crate-player, [data-live-figure]"


def pages() -> list[str]:
    """All pages of the table of contents."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf8"))
    return [
        toc["root"],
        *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"]),
    ]


@pytest.fixture(params=pages())
def article(request: pytest.FixtureRequest) -> BeautifulSoup:
    """A built page's own content."""
    path = HTML / f"{request.param}.html"
    if not path.is_file():
        pytest.skip("the site is not built: make book")
    html = BeautifulSoup(path.read_text(encoding="utf8"), "html.parser")
    found = html.select_one("article.bd-article")
    assert found is not None
    return found


def test_no_fold_stands_above_a_figure(article: BeautifulSoup) -> None:
    for cell in article.select("div.cell"):
        figures = {id(figure) for figure in cell.select(FIGURES)}
        if not figures:
            continue
        for fold in cell.select("details.code-fold, details.hide"):
            assert figures & {id(tag) for tag in fold.find_all_previous()}, fold.summary


def test_folds_have_names_of_their_own(article: BeautifulSoup) -> None:
    names = Counter(
        " ".join(fold.summary.get_text().split()) for fold in article.select(FOLDS)
    )
    assert [name for name, count in names.items() if count > 1] == []
    for fold in article.select(FOLDS):
        # what is heard is what is seen, and more
        assert "aria-label" not in fold.summary.attrs


def test_claims_link_to_themselves_and_their_row(article: BeautifulSoup) -> None:
    rows: set[str] = set()
    if (ledger := HTML / "book" / "ledger.html").is_file():
        html = BeautifulSoup(ledger.read_text(encoding="utf8"), "html.parser")
        rows = {row["id"] for row in html.select("table.ledger tr[id]")}
    for box in article.select("div.claim"):
        assert box.select_one(f'a.claim-link[href="#{box["id"]}"]'), box["id"]
        (link,) = [
            a["href"] for a in box.select("dd a[href]") if "#ledger-" in a["href"]
        ]
        assert link.split("#")[1] in rows
