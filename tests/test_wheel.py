"""What a user gets: the wheel, installed outside the clone, runs README's lines, and
type checkers see its types.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = [pytest.mark.repository, pytest.mark.processes]
ROOT = Path(__file__).resolve().parents[1]

TYPED = """
from typing import assert_type

import torch
from crate_core import (
    CrateMAE,
    CrateMAEConfig,
    CrateMAEOutput,
    FinetuneConfig,
    LowRankGaussianMixture,
    PretrainConfig,
    ViTMAE,
    coding_rate,
    load_model,
    pretrain,
)

model = CrateMAE.from_preset("digits")
assert_type(model, CrateMAE)
assert_type(model.config, CrateMAEConfig)
images = torch.rand(2, 1, 8, 8)
assert_type(model.encoder[0].attention.bases, torch.Tensor)
assert_type(model.decoder[0].densify.weight, torch.Tensor)
assert_type([layer.attention.scale for layer in model.encoder], list[float])
assert_type(model(images), CrateMAEOutput)
assert_type(model(images, 0.5).loss, torch.Tensor)
assert_type(model.forward_features(images), torch.Tensor)
assert_type(model.reconstruct(images).pasted, torch.Tensor)
assert_type(CrateMAE.from_pretrained("cifar10-tiny"), CrateMAE)
assert_type(load_model("cifar10-tiny").config.image_shape, tuple[int, int])
vit = ViTMAE.from_preset("cifar10-tiny")
assert_type(vit(torch.rand(1, 3, 32, 32)).loss, torch.Tensor)
mixture = LowRankGaussianMixture.random(dim=8, components=2, rank=2)
assert_type(mixture.bases, torch.Tensor)
assert_type(coding_rate(torch.rand(5, 8), 0.5), torch.Tensor)
assert_type(PretrainConfig.from_preset("digits"), PretrainConfig)
FinetuneConfig(epochs=1.0)
"""

WRONG = """
from crate_core import CrateMAE

model = CrateMAE.from_preset("digits")
model.encoder[0].attention.bases.shapes
model(5)
"""
"""An attribute that tensors do not have, and a number for pictures."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python of its own with the wheel in it, and beside it what this Python has."""
    root = tmp_path_factory.mktemp("installed")
    source = root / "source"
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "crate_core", source / "crate_core", ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE", "LICENSE-CONTENT"):
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


def run(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [str(installed / "venv" / "bin" / "python"), *arguments],
        cwd=installed,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_wheel_carries_types_weights_and_licences(installed: Path) -> None:
    found = run(installed, "-c", "import crate_core; print(crate_core.__file__)")
    package = Path(found.stdout.strip()).parent
    assert package.is_relative_to(installed), found.stderr
    for name in ("py.typed", "training/expected_loss.json"):
        assert (package / name).is_file()
    assert list((package / "weights").glob("*/model.safetensors"))


def test_readme_lines_run_from_the_wheel(installed: Path) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf8")
    (script,) = re.findall(r"```python\n(.*?)```", readme, re.S)
    (installed / "readme.py").write_text(script)
    done = run(installed, "readme.py")
    assert done.returncode == 0, done.stderr


CHECKERS = {
    "mypy": ["--strict", "--python-executable"],
    "basedpyright": ["--pythonpath"],
}


@pytest.mark.parametrize("checker", CHECKERS)
def test_a_users_script_is_typed(installed: Path, checker: str) -> None:
    pytest.importorskip(checker, reason=f"{checker} is not installed")
    python = str(installed / "venv" / "bin" / "python")
    (installed / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}')

    def check(text: str) -> subprocess.CompletedProcess[str]:
        (installed / "script.py").write_text(text)
        return subprocess.run(
            [sys.executable, "-m", checker, *CHECKERS[checker], python, "script.py"],
            cwd=installed,
            capture_output=True,
            text=True,
            timeout=600,
        )

    done = check(TYPED)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = check(WRONG)
    assert wrong.returncode == 1
    assert "shapes" in wrong.stdout
    assert len(re.findall(r"script\.py:\d+.* error", wrong.stdout)) == 2, wrong.stdout
