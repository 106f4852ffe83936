"""The shape of the package: who imports whom, how long files are, what a light import costs, what is committed."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.repository
ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "crate_core"

# The book's order. A module imports only from modules above it.
ORDER = [
    "shapes", "mixture", "denoise", "fitting", "rate", "law", "integrators", "diffusion", "attention", "sparsify",
    "patches", "config", "layers", "outputs", "pretrained", "frame", "model", "baseline", "architectures", "sources", "recipes", "stream", "data",
    "probe", "reconstruction", "runs", "train", "evaluate", "inspect_layers", "cli", "companion",
]  # fmt: skip
LONGEST = 350
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imported_modules(path: Path) -> set[str]:
    """The modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            if node.module == "crate_core":
                found |= {alias.name for alias in node.names}
            elif node.module and node.module.startswith("crate_core."):
                found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("crate_core.")}
            assert all(alias.name != "crate_core" for alias in node.names), f"{path.name}: imports its own package"
    return found


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_from_above(module: str) -> None:
    assert module in ORDER, f"{module}.py has no place in ORDER"
    late = {name for name in imported_modules(PACKAGE / f"{module}.py") if ORDER.index(name) >= ORDER.index(module)}
    assert not late, f"{module} imports {sorted(late)}, which come after it"


@pytest.mark.parametrize(
    "path", [*PACKAGE.glob("*.py"), *(ROOT / "book" / "_ext").glob("*.py")], ids=lambda path: path.name
)
def test_file_is_one_idea(path: Path) -> None:
    lines = len(path.read_text(encoding="utf8").splitlines())
    assert lines <= LONGEST, f"{path.name} has {lines} lines: its idea is two ideas"


def test_init_only_reexports_explicitly() -> None:
    for node in ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf8")).body:
        if isinstance(node, ast.Expr):
            assert isinstance(node.value, ast.Constant)  # the docstring
            continue
        assert isinstance(node, ast.ImportFrom), f"line {node.lineno}: nothing but re-exports"
        assert all(alias.asname == alias.name for alias in node.names), f"line {node.lineno}: from x import X as X"


@pytest.mark.parametrize("module", MODULES)
def test_no_postponed_annotations(module: str) -> None:
    # Shape annotations are checked by their values, so they must be there when a function is defined.
    assert "from __future__ import annotations" not in (PACKAGE / f"{module}.py").read_text(encoding="utf8")


def test_import_is_light() -> None:
    heavy = [
        *("scipy", "sklearn", "torchvision", "matplotlib", "accelerate", "timm"),
        *("datasets", "huggingface_hub", "IPython", "tyro", "tensorboard", "PIL"),
    ]
    code = f"import crate_core, json, sys; print(json.dumps([m for m in {heavy!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_fixed_names_are_exported() -> None:
    import crate_core

    names = ["LowRankGaussianMixture", "coding_rate", "subspace_coding_rate", "subspace_coding_rate_grad",
             "structured_flow", "exact_structured_flow", "mssa", "ista", "CrateMAE", "CrateMAEConfig"]  # fmt: skip
    assert [name for name in names if not hasattr(crate_core, name)] == []


def committed_files() -> list[Path]:
    """Files that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git clone, or no git")
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_nothing_machine_specific_is_committed() -> None:
    # Each pattern is split so that this file does not contain it.
    folders = ["/ro" + "ot/", "/ho" + "me/[a-z]", "/wo" + "rk/", "/Us" + "ers/", r"[A-Z]:\\U" + "sers"]
    registries = ["py" + r"pi\.org", "python" + r"hosted\.org", "registry" + r"\.npmjs", "deb" + r"\.debian\.org"]
    unwanted = re.compile("|".join(folders + registries))
    found = []
    for path in committed_files():
        try:
            text = path.read_text(encoding="utf8")
        except UnicodeDecodeError:
            continue  # pictures and weights
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in unwanted.finditer(text)]
    assert not found


def test_no_notebooks_with_outputs_and_no_third_party_scripts_are_committed() -> None:
    names = [path.relative_to(ROOT).as_posix() for path in committed_files()]
    assert [name for name in names if name.endswith((".ipynb", ".js", ".woff", ".woff2", ".ttf"))] == []
    assert [name for name in names if name.startswith("_static/")] == []  # Jupyter Book would inject it everywhere
