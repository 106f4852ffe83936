"""Run a chapter's cells without a kernel and say what became of each claim:

    python tests/faults/run_cells.py book/coding_rate.md out.json

Nothing is drawn or displayed.  A cell that fails is noted, and the next one is run, so
that one fault can be noticed by more than one claim.
"""

import inspect
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "book" / "_ext"))

from depcache import code_cells  # noqa: E402  # the book's extensions are no package


def silence() -> None:
    """Figures are made, but never drawn; displays go nowhere."""
    import IPython.display
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def nothing(*args: Any, **options: Any) -> None:
        del args, options

    for module in (IPython.display, IPython.core.display_functions):
        module.display = nothing
    plt.show = lambda *args, **options: plt.close("all")
    from crate_core import companion

    companion.player = nothing
    companion.display = nothing


def record_claims(outcomes: dict[str, str]) -> None:
    """Have `claim` note its outcome instead of stopping the cell."""
    from crate_core import claims, companion

    assert_claim = claims.claim
    signature = inspect.signature(assert_claim)

    def claim(*args: Any, **options: Any) -> None:
        label = signature.bind(*args, **options).arguments["label"]
        try:
            assert_claim(*args, **options)
        except (AssertionError, ValueError) as error:
            outcomes[label] = f"refused: {error}"[:300]
        else:
            outcomes.setdefault(label, "holds")

    claims.show = lambda thing: None
    claims.claim = companion.claim = claim


def run(page: Path) -> dict[str, Any]:
    """The claims' outcomes, the cells' errors, and the seconds."""
    silence()
    outcomes: dict[str, str] = {}
    errors: list[str] = []
    record_claims(outcomes)
    names: dict[str, Any] = {"__name__": "__main__"}
    start = time.monotonic()
    for index, code in code_cells(page.read_text(encoding="utf8")):
        try:
            exec(compile(code, f"{page.name}, cell {index}", "exec"), names)
        except Exception as error:
            errors.append(f"cell {index}: {type(error).__name__}: {error}"[:300])
    seconds = time.monotonic() - start
    return {"claims": outcomes, "errors": errors, "seconds": round(seconds, 1)}


if __name__ == "__main__":
    chapter, out = sys.argv[1:]
    result = run(Path(chapter).resolve())
    Path(out).write_text(json.dumps(result), encoding="utf8")
