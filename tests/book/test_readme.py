"""What README tells a newcomer to type works as written."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from crate_core.cli import COMMANDS

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


def test_every_command_is_in_the_table() -> None:
    (table,) = re.findall(r"^\| `crate` with .*?\n\n", README, re.M | re.S)
    rows = re.findall(r"^\| `(\w+)[^`]*` \|", table, re.M)
    assert sorted(rows) == sorted(COMMANDS)


def test_named_files_exist() -> None:
    for module in set(re.findall(r"`([\w/]+\.py)`", README)):
        assert (ROOT / "crate_core" / module).is_file(), module
    for name in re.findall(r"\((book/_static/[^)]+)\)", README):
        assert (ROOT / name).is_file(), name
    for name in ("LICENSE", "LICENSE-CONTENT", "CITATION.cff"):
        assert (ROOT / name).is_file(), name


def chapters() -> list[str]:
    """The pages of the book that the maps list, in its order: the opening, the numbered
    parts, the questions.
    """
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf8"))
    numbered = [
        chapter["file"].removeprefix("book/")
        for part in toc["parts"]
        if part.get("numbered")
        for chapter in part["chapters"]
    ]
    return ["first_hour", *numbered, "ten_questions"]


def test_the_maps_list_every_chapter_once_and_in_order() -> None:
    in_readme = [
        name
        for row in re.findall(r"(?m)^\| (`.+?) \|", README)
        for name in re.findall(r"`(\w+)`", row)
    ]
    assert [name for name in in_readme if name in chapters()] == chapters()
    index = (ROOT / "book" / "index.md").read_text(encoding="utf8")
    table = index[index.index("## The map") :].split("\n## ")[0]
    assert re.findall(r"\{doc\}`(\w+)`", table) == chapters()


def package_folders() -> set[str]:
    """Names of the folders of the package that hold modules."""
    return {path.parent.name for path in (ROOT / "crate_core").glob("*/__init__.py")}


def test_the_map_lists_every_folder_above_those_that_import_it() -> None:
    (table,) = re.findall(
        r"^\| `crate_core/` \| holds \|\n(.*?)\n\n", README, re.M | re.S
    )
    listed = re.findall(r"^\| `(\w+)/` \|", table, re.M)
    assert sorted(listed) == sorted(package_folders())
    for place, folder in enumerate(listed):
        for path in (ROOT / "crate_core" / folder).glob("*.py"):
            imported = re.findall(
                r"^\s*from crate_core\.(\w+)", path.read_text(encoding="utf8"), re.M
            )
            assert not set(imported) & set(listed[place + 1 :]), path.name


def test_every_folder_has_its_tests() -> None:
    tested = {path.parent.name for path in (ROOT / "tests").glob("*/test_*.py")}
    assert package_folders() - {"live"} <= tested
