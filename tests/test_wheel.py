"""What a user gets: the wheel, installed outside the clone, runs README's lines, and
type checkers see its types.
"""

import os
import re
import subprocess
import sys
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


def test_the_wheel_carries_every_record_that_a_chapter_reads(installed: Path) -> None:
    chapters = [
        path.read_text(encoding="utf8") for path in (ROOT / "book").glob("*.md")
    ]
    names = sorted(
        {
            name
            for text in chapters
            for name in re.findall(r"""results_path\(["']([^"']+)["']\)""", text)
        }
    )
    assert "results/cifar10.json" in names
    script = (
        "import sys; from crate_core.records import results_path; "
        "print(*map(results_path, sys.argv[1:]), sep='\\n')"
    )
    found = run(installed, "-c", script, *names)
    assert found.returncode == 0, found.stderr
    for name, path in zip(names, found.stdout.splitlines(), strict=True):
        assert Path(path).is_relative_to(installed / "venv"), path
        own, theirs = ROOT / name, Path(path)
        for file in [own] if own.is_file() else own.iterdir():
            copy = theirs if own.is_file() else theirs / file.name
            assert copy.read_bytes() == file.read_bytes(), copy
    (wheel,) = installed.glob("*.whl")
    assert wheel.stat().st_size < 10_000_000


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
