"""What all tests share: threads, repeatable hypothesis examples, and the order (the
book last).
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# the book's own Sphinx extensions are tested too, and the script that injects faults
sys.path[:0] = [str(ROOT / "book" / "_ext"), str(ROOT / "tests" / "faults")]

# The same examples in every run; a failure found once is found again.
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, print_blob=True
)
hypothesis.settings.load_profile("repeatable")

# Tests that run side by side take one thread each; small tensors gain nothing from
# more.
torch.set_num_threads(
    1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1)
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Unit tests first, then the book's build, then its pages."""
    items.sort(
        key=lambda item: [
            item.get_closest_marker(mark) is not None for mark in ("site", "book")
        ]
    )


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Each test starts from the same state of torch's global generator."""
    torch.manual_seed(0)


BUILT_FROM = (
    "pyproject.toml",
    "setup.py",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "LICENSE-CONTENT",
)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python of its own with the wheel in it, and beside it what this Python has."""
    root = tmp_path_factory.mktemp("installed")
    source = root / "source"
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("crate_core", "results"):
        shutil.copytree(ROOT / name, source / name, ignore=unwanted)
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, source)
    build = [
        *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"),
        *("--no-build-isolation", "--no-index", "--wheel-dir", str(root), str(source)),
    ]
    done = subprocess.run(build, capture_output=True, text=True)
    if "BackendUnavailable" in done.stderr or "No module named pip" in done.stderr:
        pytest.skip("pip or setuptools is not installed beside this Python")
    assert done.returncode == 0, done.stderr
    (wheel,) = root.glob("*.whl")
    venv.create(root / "venv", with_pip=False)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(root / "venv")}))
    into = ["--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "install", *into], check=True)
    (site / "beside.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return root
