"""Each fault can be put in, and the run notices what it should."""

import json
import subprocess
import sys
from pathlib import Path

import inject
import pytest
from faults import FAULTS, Fault

pytestmark = pytest.mark.repository
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_fault_can_be_put_in(fault: Fault) -> None:
    source = (ROOT / "crate_core" / fault.file).read_text(encoding="utf8")
    broken = fault.break_source(source)
    assert broken != source
    compile(broken, fault.file, "exec")


def test_a_line_that_is_gone_or_there_twice_is_refused() -> None:
    fault = Fault("theory/rate.py", "a = 1\n", "a = 2\n", "another number")
    assert fault.break_source("a = 1\nb = 1\n") == "a = 2\nb = 1\n"
    for source in ("b = 1\n", "a = 1\na = 1\n"):
        with pytest.raises(ValueError, match=r"theory/rate\.py: another number"):
            fault.break_source(source)


def test_faults_are_told_apart_and_have_tests_and_chapters() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    for file in {fault.file for fault in FAULTS}:
        assert inject.chapters_of(file, every=False), file
        assert set(inject.chapters_of(file, every=False)) <= set(
            inject.chapters_of(file, every=True)
        )
        assert [
            path for path in inject.tests_of(file) if not (ROOT / path).is_file()
        ] == []


CHAPTER = """---
kernelspec:
  display_name: Python 3
  name: python3
---

```{code-cell} python
from crate_core.companion import claim

texts = {"conditions": "c", "kind": "numerical", "evidence": "e"}
check = {"holds": lambda x: x < 1, "refuses": {"two": 2}}
claim("clm-holds", "s", **texts, measured=0.5, **check)
claim("clm-false", "s", **texts, measured=3.0, **check)
claim("clm-after", "s", **texts, measured=0.5, **check)
```

```{code-cell} python
raise RuntimeError("stops here")
claim("clm-never", "s", **texts, measured=0.5, **check)
```

```{code-cell} python
claim("clm-last", "s", **texts, measured=0.5, **check)
```
"""


def test_all_claims_of_a_chapter_are_tried(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the book extra")
    page, out = tmp_path / "page.md", tmp_path / "out.json"
    page.write_text(CHAPTER)
    script = ROOT / "tests" / "faults" / "run_cells.py"
    subprocess.run([sys.executable, script, page, out], check=True, cwd=ROOT)
    result = json.loads(out.read_text())
    claims = {label: said.split(":")[0] for label, said in result["claims"].items()}
    assert claims == {
        "clm-holds": "holds",
        "clm-false": "refused",
        "clm-after": "holds",
        "clm-last": "holds",
    }
    (error,) = result["errors"]
    assert error.endswith("RuntimeError: stops here")


def test_a_claim_notices_only_what_it_did_not_refuse_before() -> None:
    sound = {"claims": {"clm-a": "holds", "clm-b": "refused: x", "clm-c": "holds"}}
    outcome = {
        "claims": {"clm-a": "refused: y", "clm-b": "refused: x", "clm-c": "holds"}
    }
    assert inject.noticed_by(outcome, sound) == ["clm-a"]


def test_what_has_run_is_kept_until_its_files_change(tmp_path: Path) -> None:
    state = tmp_path / "deep" / "state.json"
    runs: list[str] = []
    for mark in ("one", "one", "two"):
        injection = inject.Injection(state, 1.0)
        said = injection.remember(
            "key", mark, lambda mark=mark: runs.append(mark) or mark
        )
        assert said == mark
    assert runs == ["one", "two"]
