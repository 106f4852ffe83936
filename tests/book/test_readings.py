"""What was read out of a page is read again when, and only when, the page changed."""

from pathlib import Path

import pytest
from readings import Readings

asked: list[str] = []


def length(html: str) -> int:
    """A reader that says what it was asked."""
    asked.append(html)
    return len(html)


@pytest.mark.repository
def test_pages_are_read_once(tmp_path: Path) -> None:
    asked.clear()
    page, file = tmp_path / "a.html", tmp_path / "readings.json"
    page.write_text("formula")
    first = Readings(tmp_path, file)
    assert first.of("a.html", length) == 7
    page.write_text("formula, set")  # a later step of the same build
    first.save()
    again = Readings(tmp_path, file)
    assert again.of("a.html", length) == 7
    again.save()
    assert Readings(tmp_path, file).of("a.html", length) == 7
    assert asked == ["formula"]
    page.write_text("new")
    assert Readings(tmp_path, file).of("a.html", length) == 3
    assert asked == ["formula", "new"]


@pytest.mark.repository
def test_other_code_reads_again(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("page")
    first = Readings(tmp_path, tmp_path / "readings.json")
    first.of("a.html", length)
    first.save()
    kept = Readings(tmp_path, tmp_path / "readings.json")
    (known,) = kept.kept["a.html"]["readings"]
    kept.kept["a.html"]["readings"] = {known[:-1] + "?": 0}
    assert kept.of("a.html", length) == 4
