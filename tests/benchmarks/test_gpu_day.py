"""The GPU day in miniature on a CPU: its budgets, what is cut off and goes on, and that
its real commands are ones that the command line takes.
"""

import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_day.py"
SPEC = importlib.util.spec_from_file_location("gpu_day", FILE)
assert SPEC is not None
assert SPEC.loader is not None
gpu_day = importlib.util.module_from_spec(SPEC)
sys.modules["gpu_day"] = gpu_day
SPEC.loader.exec_module(gpu_day)

WRITES = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('{}')"
COUNTS = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
mark, record = map(pathlib.Path, sys.argv[1:])
if mark.exists():
    record.write_text('{"resumed": true}')
else:
    mark.write_text("begun")
    time.sleep(60)
"""


def step(name: str, code: str, *arguments: Path, minutes: float = 1.0) -> Any:
    """A step that runs some Python; its record is the last argument."""
    command = (sys.executable, "-c", code, *map(str, arguments))
    return gpu_day.Step(name, command, minutes, arguments[-1])


@pytest.fixture(autouse=True)
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_day, "GRACE", 2.0)


@pytest.mark.processes
def test_what_a_call_cuts_off_goes_on_in_the_next(tmp_path: Path) -> None:
    quick = step("quick", WRITES, tmp_path / "quick.json")
    slow = step("slow", COUNTS, tmp_path / "mark", tmp_path / "slow.json")
    state_file = tmp_path / "state.json"
    first = gpu_day.work([quick, slow], state_file, 10 / 60)
    assert first["quick"]["status"] == "done"
    assert first["slow"]["status"] == "cut"
    assert slow.read() is None
    (tmp_path / "quick.json").unlink()  # a step that is done does not run again
    second = gpu_day.work([quick, slow], state_file, 1.0)
    assert second["slow"]["status"] == "done"
    assert second["slow"]["seconds"] > first["slow"]["seconds"]
    assert slow.read() == {"resumed": True}
    assert not (tmp_path / "quick.json").exists()


@pytest.mark.processes
def test_a_step_keeps_to_its_budget_and_a_failure_to_itself(tmp_path: Path) -> None:
    fails = step("fails", "raise SystemExit(3)", tmp_path / "none.json")
    endless = step(
        "endless",
        "import time; time.sleep(60)",
        tmp_path / "endless.json",
        minutes=2 / 60,
    )
    after = step("after", WRITES, tmp_path / "after.json")
    state_file = tmp_path / "state.json"
    start = time.monotonic()
    state = gpu_day.work([fails, endless, after], state_file, 1.0)
    assert time.monotonic() - start < 30
    assert [state[name]["status"] for name in ("fails", "endless", "after")] == [
        "failed",
        "over budget",
        "done",
    ]
    assert json.loads(state_file.read_text()) == state
    log = (tmp_path / "logs" / "fails.txt").read_text()
    assert gpu_day.work([fails], state_file, 1.0)["fails"]["status"] == "failed"
    assert (tmp_path / "logs" / "fails.txt").read_text() == 2 * log


@pytest.mark.processes
def test_miniature_runs_on_a_cpu(tmp_path: Path) -> None:
    arguments = ["--scale", "miniature", "--device", "cpu", "--minutes", "20"]
    output = tmp_path / "day.json"
    status = gpu_day.main(
        [*arguments, "--runs", str(tmp_path / "runs"), "--output", str(output)]
    )
    told = json.loads(output.read_text())["steps"]
    logs = [file.read_text() for file in (tmp_path / "runs" / "logs").iterdir()]
    assert status == 0, logs
    assert {entry["status"] for entry in told.values()} == {"done"}, told
    assert all(entry["record"] for entry in told.values())
    assert "linear" in told["probe of crate"]["record"]["scores"]["raw pixels"]


def test_full_commands_are_ones_that_parse(tmp_path: Path) -> None:
    import argparse

    options = argparse.Namespace(
        imagenet="folder:imagenet",
        cifar10="hf:cifar10",
        device="cuda",
        scale="full",
        workers=2,
        transformers=False,
        runs=tmp_path,
    )
    listed = gpu_day.steps(options)
    assert len({step.name for step in listed}) == len(listed)
    crate = [
        s.command[3:] for s in listed if s.command[1:3] == ("-m", "crate_core.cli")
    ]
    assert {command[0] for command in crate} == {"pretrain", "probe", "finetune"}
    for command in crate:
        words = [word for word in command if word.startswith("--")]
        assert known_options(*command[:3]).issuperset(words), command


def known_options(*command: str) -> set[str]:
    """The options that a command's help lists with a preset."""
    import contextlib
    import io
    import re

    from crate_core.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return set(re.findall(r"--[a-z0-9.-]+", said.getvalue()))
