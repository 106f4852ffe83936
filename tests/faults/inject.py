"""Break the package on purpose, one fault at a time, and see who notices:

    python tests/faults/inject.py                 every fault; goes on where it stopped
    python tests/faults/inject.py theory/rate.py  the faults of one file
    python tests/faults/inject.py --report        the table, from what has run

Each fault (faults.py) goes into a copy of the repository.  There its file's unit tests
run, then the chapters about the file until a claim notices; with `--every`, all of them
and every other chapter that imports it.  A claim notices a fault when it is refused
with it and holds without it.  A cell notices when it stops with an error of its own, or
the chapter runs out of time.

The state, one JSON file, keeps what has run, under a digest of what it ran on: after an
edit of a chapter, of a test or of the faulted file only what depends on it runs again.
"""

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "book" / "_ext"))

import run_cells  # noqa: E402
from claims import first_edition  # noqa: E402  # the book's extensions are no package
from depcache import Package, direct_imports, is_notebook, page_code  # noqa: E402
from faults import FAULTS, Fault  # noqa: E402

PRELOADED = [
    *("torch", "numpy", "scipy.integrate", "scipy.special", "scipy.stats", "sympy"),
    *(
        "matplotlib.pyplot",
        "IPython.display",
        "sklearn.datasets",
        "einops",
        "jaxtyping",
    ),
    *("safetensors.torch", "hypothesis", "beartype", "myst_nb", "PIL.Image"),
]
STATE = ROOT / "_build" / "faults.json"
HOME = {
    "theory/mixture.py": ["mixture", "denoising"],
    "theory/denoise.py": ["denoising", "mixture"],
    "theory/em.py": ["mixture", "denoising"],
    "theory/rate.py": ["coding_rate", "compression_denoising", "attention"],
    "theory/law.py": ["compression_denoising"],
    "theory/integrators.py": ["diffusion", "structured_ode"],
    "theory/diffusion.py": ["structured_ode", "diffusion"],
    "model/attention.py": ["attention", "layers"],
    "model/kernels.py": ["ista", "layers"],
    "model/sparsify.py": ["ista", "layers"],
    "model/layers.py": ["layers", "crate_mae"],
    "model/patches.py": ["crate_mae", "first_training"],
    "model/autoencoder.py": ["crate_mae"],
    "model/fold.py": ["cost"],
    "model/reference.py": ["crate_mae"],
}
"""The chapters about a file, which run first."""
TESTS = {
    "model/kernels.py": ["model/test_attention.py", "model/test_sparsify.py"],
    "model/layers.py": ["model/test_crate.py", "model/test_reference.py"],
    "model/autoencoder.py": ["model/test_crate.py", "model/test_patches.py"],
    "model/fold.py": ["model/test_speed.py"],
    "model/sparsify.py": ["model/test_sparsify.py", "model/test_variants.py"],
}
"""Unit tests of a file, where they are not those of its name."""


def tests_of(file: str) -> list[str]:
    """The unit tests of a file."""
    folder, name = file.split("/")
    return [f"tests/{test}" for test in TESTS.get(file, [f"{folder}/test_{name}"])]


@cache
def chapters_of(file: str, every: bool) -> list[str]:
    """The chapters about a file, and with `every` those that import it after them."""
    home = [name for name in HOME.get(file, []) if (ROOT / f"book/{name}.md").is_file()]
    if home and not every:
        return home
    package = Package("crate_core", ROOT / "crate_core")
    module = "crate_core." + file.removesuffix(".py").replace("/", ".")
    found = []
    for page in sorted((ROOT / "book").glob("*.md")):
        text = page.read_text(encoding="utf8")
        if is_notebook(text) and module in direct_imports(page_code(text), package):
            found.append(page.stem)
    return list(dict.fromkeys(home + found))


def digest(*paths: Path) -> str:
    """Of what these files hold."""
    content = b"\0".join(path.read_bytes() for path in paths)
    return hashlib.sha256(content).hexdigest()[:12]


@contextmanager
def copy_of_repository() -> Iterator[Path]:
    """What chapters and unit tests need, to be broken."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        copy = Path(folder)
        for name in ("crate_core", "book", "tests"):
            shutil.copytree(
                ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__")
            )
        for name in ("results", "pyproject.toml", "README.md", "benchmarks"):
            (copy / name).symlink_to(ROOT / name)
        yield copy


def preload() -> None:
    """Import what chapters and tests import, but the package: a fork then starts at
    once.
    """
    matplotlib.use("Agg")
    for name in PRELOADED:
        importlib.import_module(name)
    assert "crate_core" not in sys.modules


def call(copy: Path, work: Callable[[], None], limit: float) -> tuple[bool, str]:
    """Do some work in a fork that imports the package from the copy; whether it ended
    in time, and what it said.
    """
    said = copy / "said.txt"

    def there() -> None:
        with said.open("w", encoding="utf8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.path[:] = [str(copy)] + [
                path for path in sys.path if Path(path or ".").resolve() != ROOT
            ]
            os.chdir(copy / "book")
            work()
            sys.stdout.flush()

    process = multiprocessing.get_context("fork").Process(target=there)
    process.start()
    process.join(limit)
    in_time = not process.is_alive()
    if not in_time:
        process.kill()
        process.join()
    return in_time, said.read_text(encoding="utf8")


def run_tests(copy: Path, file: str, limit: float) -> dict[str, Any]:
    """The first unit test of a file that fails, if one does."""
    options = ["-q", "-x", "-p", "no:cacheprovider", "--rootdir", str(copy)]
    paths = [str(copy / path) for path in tests_of(file)]
    in_time, said = call(copy, lambda: pytest.main([*options, *paths]) and None, limit)
    failed = re.findall(r"(?m)^(?:FAILED|ERROR) (\S+)", said)
    passed = bool(re.search(r"(?m)^\d+ passed", said)) and not failed
    return {"passed": passed, "in_time": in_time, "failed": failed[:1]}


def run_chapter(copy: Path, name: str, limit: float) -> dict[str, Any]:
    """What became of a chapter's claims; see run_cells.py."""
    out = copy / "outcome.json"
    out.unlink(missing_ok=True)

    def work() -> None:
        outcome = run_cells.run(copy / "book" / f"{name}.md")
        out.write_text(json.dumps(outcome), encoding="utf8")

    in_time, said = call(copy, work, limit)
    if not out.is_file():
        why = said[-300:] if in_time else "out of time"
        return {"claims": {}, "errors": [why], "seconds": limit}
    return json.loads(out.read_text(encoding="utf8"))


def noticed_by(outcome: dict[str, Any], sound: dict[str, Any]) -> list[str]:
    """The claims that hold without the fault and are refused with it."""
    return sorted(
        label
        for label, said in outcome["claims"].items()
        if said != "holds" and sound["claims"].get(label) == "holds"
    )


class Injection:
    """The runs so far, and those to come."""

    def __init__(self, state: Path, limit: float) -> None:
        self.path, self.limit = state, limit
        self.state: dict[str, dict[str, Any]] = (
            json.loads(state.read_text(encoding="utf8")) if state.is_file() else {}
        )

    def remember(self, key: str, mark: str, run: Any) -> Any:
        """The outcome under this key, from the state if it is of the same files."""
        known = self.state.get(key)
        if known is None or known["digest"] != mark:
            self.state[key] = {"digest": mark, "outcome": run()}
            self.path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = self.path.with_suffix(".new")
            unfinished.write_text(json.dumps(self.state, indent=1), encoding="utf8")
            unfinished.replace(self.path)
        return self.state[key]["outcome"]

    def sound(self, copy: Path, name: str) -> dict[str, Any]:
        """A chapter without a fault."""
        page = ROOT / "book" / f"{name}.md"
        return self.remember(
            f"sound | {name}", digest(page), lambda: run_chapter(copy, name, self.limit)
        )

    def try_fault(self, copy: Path, fault: Fault, every: bool) -> None:
        """Put one fault in, run tests and chapters, take it out."""
        target, original = copy / "crate_core" / fault.file, ROOT / "crate_core"
        source = (original / fault.file).read_text(encoding="utf8")
        sound = {
            name: self.sound(copy, name) for name in chapters_of(fault.file, every)[:1]
        }
        target.write_text(fault.break_source(source), encoding="utf8")
        try:
            tests = [ROOT / path for path in tests_of(fault.file)]
            self.remember(
                f"{fault.name} | tests",
                digest(original / fault.file, *tests),
                lambda: run_tests(copy, fault.file, self.limit),
            )
            for name in chapters_of(fault.file, every):
                if name not in sound:
                    target.write_text(source, encoding="utf8")
                    sound[name] = self.sound(copy, name)
                    target.write_text(fault.break_source(source), encoding="utf8")
                page = ROOT / "book" / f"{name}.md"
                # three times the sound run, and a little: a fault may loop for ever
                limit = min(self.limit, 60 + 3 * sound[name]["seconds"])
                outcome = self.remember(
                    f"{fault.name} | {name}",
                    digest(original / fault.file, page),
                    lambda name=name, limit=limit: run_chapter(copy, name, limit),
                )
                if noticed_by(outcome, sound[name]) and not every:
                    break
        finally:
            target.write_text(source, encoding="utf8")

    def rows(self) -> list[dict[str, Any]]:
        """What is known of each fault that has run."""
        found = []
        for fault in FAULTS:
            tests = self.state.get(f"{fault.name} | tests")
            if tests is None:
                continue
            by, stopped, ran = [], [], []
            for name in chapters_of(fault.file, every=True):
                run = self.state.get(f"{fault.name} | {name}")
                sound = self.state.get(f"sound | {name}")
                if run is None or sound is None:
                    continue
                ran.append(name)
                by += noticed_by(run["outcome"], sound["outcome"])
                more = len(run["outcome"]["errors"]) - len(sound["outcome"]["errors"])
                stopped += [name] if more > 0 else []
            found.append(
                {
                    "fault": fault.name,
                    "test": tests["outcome"]["failed"],
                    "claims": by,
                    "stopped": stopped,
                    "chapters": ran,
                }
            )
        return found

    def report(self) -> str:
        """The table in Markdown, its sums, and the claims that nothing has moved."""
        rows = self.rows()
        lines = [
            "| fault | unit test | claims | cells stopped | chapters run |",
            "|---|---|---|---|---|",
        ]
        for row in rows:
            test = row["test"][0].split("::")[-1] if row["test"] else "none"
            claims = ", ".join(row["claims"][:4]) or "none"
            more = f" and {len(row['claims']) - 4} more" if row["claims"][4:] else ""
            lines.append(
                f"| {row['fault']} | {test} | {claims}{more} | "
                f"{', '.join(row['stopped']) or 'none'} | "
                f"{', '.join(row['chapters'])} |"
            )
        of = len(rows)
        claim, test = [bool(r["claims"]) for r in rows], [bool(r["test"]) for r in rows]
        stop = [bool(r["stopped"]) for r in rows]
        neither = [
            r["fault"]
            for r, c, t, s in zip(rows, claim, test, stop, strict=True)
            if not (c or t or s)
        ]
        lines += [
            "",
            f"Faults run: {of} of {len(FAULTS)}. Noticed by a claim: "
            f"{sum(claim)}; by a "
            f"unit test: {sum(test)}; by a cell that stops: {sum(stop)}; by none of "
            f"them: {len(neither)}{': ' if neither else ''}{'; '.join(neither)}.",
        ]
        moved = {label for row in rows for label in row["claims"]}
        lines += ["", "Claims of the chapters run, without an alternative and unmoved:"]
        for page in sorted({name for row in rows for name in row["chapters"]}):
            text = (ROOT / "book" / f"{page}.md").read_text(encoding="utf8")
            still = [label for label in first_edition(text) if label not in moved]
            lines.append(f"- {page}: {', '.join(still) or 'none'}")
        return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("only", nargs="*", help="words: faults whose name has one")
    parser.add_argument("--every", action="store_true", help="run every chapter")
    parser.add_argument("--report", action="store_true", help="show, run nothing")
    parser.add_argument("--state", type=Path, default=STATE)
    parser.add_argument("--limit", type=float, default=600, help="seconds a run")
    options = parser.parse_args()
    injection = Injection(options.state, options.limit)
    if not options.report:
        chosen = [
            fault
            for fault in FAULTS
            if not options.only or any(word in fault.name for word in options.only)
        ]
        preload()
        with copy_of_repository() as copy:
            for number, fault in enumerate(chosen, start=1):
                injection.try_fault(copy, fault, options.every)
                (row,) = [r for r in injection.rows() if r["fault"] == fault.name]
                print(
                    f"[{number}/{len(chosen)}] {fault.name}: "
                    f"claims {len(row['claims'])}, unit test {bool(row['test'])}, "
                    f"cells {bool(row['stopped'])}",
                    flush=True,
                )
    print(injection.report())


if __name__ == "__main__":
    main()
