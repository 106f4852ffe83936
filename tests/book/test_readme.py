"""What README tells a newcomer to type works as written."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def run(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    # The clone's own package, whether or not it is installed.
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.processes
def test_python_script_runs_as_printed(tmp_path: Path) -> None:
    (script,) = code_blocks("python")
    assert len(script.strip().splitlines()) <= 12
    path = tmp_path / "script.py"
    path.write_text(script)
    finished = run([sys.executable, str(path)], tmp_path)
    assert finished.returncode == 0, finished.stderr
    assert {file.name for file in (tmp_path / "my-crate").iterdir()} == {
        "config.json",
        "model.safetensors",
    }


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(code_blocks("bash")), re.M):
        assert re.search(rf"^{target}\s*:", makefile, re.M), target


@pytest.mark.processes
def test_crate_commands_run_as_printed(tmp_path: Path) -> None:
    """The commands themselves, cut to a few steps and seeds: a fresh run, its
    evaluation, its report.
    """
    pytest.importorskip("sklearn", reason="the [train] extra is not installed")
    commands = re.findall(r"^(crate .*)$", "\n".join(code_blocks("bash")), re.M)
    assert [shlex.split(command)[1] for command in commands] == [
        "pretrain",
        "evaluate",
        "inspect",
    ]
    shortened = {
        "pretrain": ["--max-steps", "3"],
        "evaluate": ["--seeds", "1"],
        "inspect": [],
    }
    for command in commands:
        arguments = shlex.split(command)[1:]
        finished = run(
            [
                sys.executable,
                "-m",
                "crate_core.cli",
                *arguments,
                *shortened[arguments[0]],
            ],
            tmp_path,
        )
        assert finished.returncode == 0, finished.stderr
    made = {file.name for file in (tmp_path / "runs" / "digits").iterdir()}
    assert made >= {"model.safetensors", "evaluation.json", "report.html"}


def test_named_files_exist() -> None:
    for module in set(re.findall(r"`([\w/]+\.py)`", README)):
        assert (ROOT / "crate_core" / module).is_file(), module
    for name in re.findall(r"\((book/_static/[^)]+)\)", README):
        assert (ROOT / name).is_file(), name
    for name in ("LICENSE", "LICENSE-CONTENT", "CITATION.cff"):
        assert (ROOT / name).is_file(), name
