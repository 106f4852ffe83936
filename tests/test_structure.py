"""The shape of the package: who imports whom, what a light import costs, what is
committed.
"""

import ast
import importlib
import json
import os
import re
import runpy
import subprocess
import sys
import typing
from pathlib import Path

import pytest
from api_pages import listed_modules

pytestmark = pytest.mark.repository
ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "crate_core"

MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
)


def module_path(module: str) -> Path:
    """The file of a module, given by its name inside the package."""
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


def test_who_imports_whom() -> None:
    # The contracts of pyproject.toml, which `make lint` runs too.
    lint = Path(sys.executable).with_name("lint-imports")
    if not lint.is_file():
        pytest.skip("import-linter is not installed beside this Python")
    done = subprocess.run(
        [lint, "--no-cache"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_the_whole_package(module: str) -> None:
    # The package's own __init__ imports modules when their names are first used.
    for node in ast.walk(ast.parse(module_path(module).read_text(encoding="utf8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.module != "crate_core"
        elif isinstance(node, ast.Import):
            assert all(alias.name != "crate_core" for alias in node.names)


def test_the_api_page_documents_every_module() -> None:
    page = (ROOT / "book" / "api.md").read_text(encoding="utf8")
    documented = [name.removeprefix("crate_core.") for name in listed_modules(page)]
    private = {"cli", "options", *(m for m in MODULES if m.startswith("live."))}
    assert len(documented) == len(set(documented))
    assert set(documented) == set(MODULES) - private


def exported() -> dict[str, str]:
    """Name -> module of everything that the package gives at its top."""
    import crate_core

    return {
        name: f"crate_core.{module}"
        for exports in (crate_core.EXPORTS, crate_core.TRAIN_EXPORTS)
        for module, names in exports.items()
        for name in names
    }


def test_type_checkers_see_the_names_that_the_package_gives(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The package imports a name's module when the name is first used; a type checker
    # follows the imports under TYPE_CHECKING instead.
    import crate_core

    given = {name: getattr(crate_core, name) for name in exported()}
    for name, module in exported().items():
        assert given[name] is getattr(importlib.import_module(module), name)
    before = set(runpy.run_path(str(PACKAGE / "__init__.py")))
    monkeypatch.setattr(typing, "TYPE_CHECKING", True)
    seen = runpy.run_path(str(PACKAGE / "__init__.py"))
    assert {name: seen[name] for name in set(seen) - before} == given
    assert {*given, *crate_core.FOLDERS} <= set(dir(crate_core))


def test_the_package_refuses_names_that_it_does_not_have() -> None:
    import crate_core

    with pytest.raises(AttributeError, match="no attribute 'CrateMEA'"):
        crate_core.CrateMEA  # noqa: B018  # reading it is the test
    with pytest.raises(ImportError, match="cannot import name 'CrateMEA'"):
        exec("from crate_core import CrateMEA")
    assert (
        crate_core.theory.rate.coding_rate is crate_core.coding_rate
    )  # a module of a re-exported name, not imported itself


def loaded_after(code: str, wanted: list[str]) -> list[str]:
    """Those of the wanted modules that a fresh Python has loaded after this code."""
    listed = f"[m for m in {wanted!r} if m in sys.modules]"
    code = f"{code}; import json, sys; print(json.dumps({listed}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_a_star_import_brings_all_names_that_need_no_extra() -> None:
    import crate_core

    names: dict[str, object] = {}
    exec("from crate_core import *", names)
    extra = {name for names in crate_core.TRAIN_EXPORTS.values() for name in names}
    assert set(exported()) - extra == set(names) - {"__builtins__"}


def test_a_missing_extra_is_named() -> None:
    code = """
import sys
sys.modules["timm"] = None  # as if it were not installed
import crate_core
try:
    crate_core.ViTMAE
except ImportError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert "crate_core.ViTMAE needs timm" in done.stdout, done.stderr
    assert "crate-core[train]" in done.stdout


@pytest.mark.parametrize("module", MODULES)
def test_no_postponed_annotations(module: str) -> None:
    # Shape annotations are checked by their values, so they must be there when a
    # function is defined.
    assert "from __future__ import annotations" not in (module_path(module)).read_text(
        encoding="utf8"
    )


def test_import_is_light() -> None:
    heavy = [
        *("scipy", "sklearn", "torchvision", "matplotlib", "accelerate", "timm"),
        *("datasets", "huggingface_hub", "IPython", "tyro", "tensorboard", "PIL"),
    ]
    everything = "from crate_core import *; import crate_core.cli"
    assert loaded_after(everything, heavy) == []


def test_the_command_line_answers_without_torch() -> None:
    # Seconds are benchmarks/startup.py's; what costs them is counted here.
    heavy = ["torch", "numpy", "einops", "jaxtyping", "safetensors", "tyro"]
    for code in (
        "import crate_core",
        "import crate_core.cli",
        "from crate_core.cli import main; main(['--help'])",
        "from crate_core.cli import main; main(['pretend'])",
    ):
        assert loaded_after(code, heavy) == [], code


def test_fixed_names_are_exported() -> None:
    import crate_core

    names = [
        "LowRankGaussianMixture",
        "coding_rate",
        "subspace_coding_rate",
        "subspace_coding_rate_grad",
        "structured_flow",
        "exact_structured_flow",
        "mssa",
        "ista",
        "CrateMAE",
        "CrateMAEConfig",
        "ViTMAE",
        "load_model",
        "open_data",
        "PretrainConfig",
        "pretrain",
        "FinetuneConfig",
        "finetune",
        "evaluate",
    ]
    assert [name for name in names if not hasattr(crate_core, name)] == []


def committed_files() -> list[Path]:
    """Files that git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (FileNotFoundError, subprocess.CalledProcessError):
        pytest.skip("not a git clone, or no git")
    return [
        ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()
    ]


def test_nothing_machine_specific_is_committed() -> None:
    # Each pattern is split so that this file does not contain it.
    folders = [
        "/ro" + "ot/",
        "/ho" + "me/[a-z]",
        "/wo" + "rk/",
        "/Us" + "ers/",
        r"[A-Z]:\\U" + "sers",
    ]
    registries = [
        "py" + r"pi\.org",
        "python" + r"hosted\.org",
        "registry" + r"\.npmjs",
        "deb" + r"\.debian\.org",
    ]
    unwanted = re.compile("|".join(folders + registries))
    found = []
    for path in committed_files():
        try:
            text = path.read_text(encoding="utf8")
        except UnicodeDecodeError:
            continue  # pictures and weights
        found += [
            f"{path.relative_to(ROOT)}: {match[0]}" for match in unwanted.finditer(text)
        ]
    assert not found


def test_no_notebooks_with_outputs_and_no_third_party_scripts_are_committed() -> None:
    names = [path.relative_to(ROOT).as_posix() for path in committed_files()]
    assert [
        name
        for name in names
        if name.endswith((".ipynb", ".js", ".woff", ".woff2", ".ttf"))
        # ours: the live figures, the search page, and what asks MathJax
        and not re.fullmatch(r"crate_core/live/\w+\.js|book/_ext/\w+\.js", name)
    ] == []
    # Jupyter Book would inject it everywhere
    assert [name for name in names if name.startswith("_static/")] == []
