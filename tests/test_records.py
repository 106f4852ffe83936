"""Records: where those of longer runs are found, and what is said when they are not."""

import json
from pathlib import Path

import pytest

from crate_core import records
from crate_core.records import results_path

pytestmark = pytest.mark.repository
ROOT = Path(__file__).resolve().parents[1]


def test_records_of_the_clone_are_found() -> None:
    path = results_path("results/cifar10.json")
    assert path == ROOT / "results" / "cifar10.json"
    assert json.loads(path.read_text(encoding="utf8"))
    weights = results_path("results/weights/vit-seed0")
    assert (weights / "model.safetensors").is_file()


def test_the_installed_record_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, said in (
        (tmp_path / "site" / "crate_core", "own"),
        (tmp_path / "site", "other's"),
    ):
        (folder / "results").mkdir(parents=True)
        (folder / "results" / "a.json").write_text(said)
    package = tmp_path / "site" / "crate_core"
    monkeypatch.setattr(records, "__file__", str(package / "records.py"))
    assert results_path("results/a.json").read_text() == "own"
    (package / "results" / "weights" / "net").mkdir(parents=True)
    (package / "results" / "weights" / "net" / "config.json").write_text("{}")
    known = r"no record results/b\.json; there are: .*a\.json, results/weights/net$"
    with pytest.raises(FileNotFoundError, match=known):
        results_path("results/b.json")


@pytest.mark.parametrize("name", ["cifar10.json", "../results/cifar10.json", ""])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"a record is named results/\.\.\., got"):
        results_path(name)
