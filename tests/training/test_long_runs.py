"""Runs of days: checkpoints that are kept, evaluations on the way, signals that end a
run after its step, and runs that branch off another one.
"""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import ENVIRONMENT, FLAGS, ROOT, TINY, contents, tiny, train

import crate_core.training.devices as devices
from crate_core.data.batches import some_pictures
from crate_core.data.named import open_data
from crate_core.evaluation.neighbours import held_out_neighbours
from crate_core.model.crate import CrateMAE
from crate_core.training.recipe import Plan, PretrainConfig
from crate_core.training.run_directory import CheckpointError, RunDirectory
from crate_core.training.signals import NAMES, StopSignals
from crate_core.training.yardsticks import held_out_loss

STEP = 16 / 1438
"""Epochs in a step of the tiny run."""

NEIGHBOURS = "crate_core.evaluation.neighbours:held_out_neighbours"


@pytest.fixture(autouse=True)
def one_thread():
    """Bits are compared at one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def names(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder."""
    return sorted(int(path.name[5:]) for path in folder.glob("step-*"))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- every so many epochs


@given(
    batch=st.integers(1, 200),
    count=st.integers(1, 2000),
    every=st.floats(0.05, 5),
    steps=st.integers(1, 300),
)
def test_each_multiple_is_passed_once(
    batch: int, count: int, every: float, steps: int
) -> None:
    plan = Plan(PretrainConfig(batch_size=batch), count)
    passed = [step for step in range(1, steps + 1) if plan.passes(step, every)]
    multiples = math.floor(plan.epoch(steps) / every + 1e-9)
    steps_in_one = every / plan.epoch(1)
    assert len(passed) == multiples if steps_in_one >= 1 else passed
    for step in passed:
        # the first step at or beyond a multiple
        beyond = plan.epoch(step) - every * math.floor(plan.epoch(step) / every + 1e-9)
        assert -1e-6 < beyond < plan.epoch(1) + 1e-6
    assert not plan.passes(steps, None)


def test_milestones_and_evaluations_are_those_of_the_uncut_run(tmp_path: Path) -> None:
    asked = {
        "milestone_epochs": 5 * STEP,
        "evaluate_epochs": 5 * STEP,
        "evaluators": (NEIGHBOURS,),
        "log_every": 1,
    }
    said = train(tiny(tmp_path / "uncut", **asked))
    for stop in (3, 6, 11, None):
        train(tiny(tmp_path / "cut", **asked, max_steps=stop))
    both = ("model.safetensors", "metrics.jsonl", "evaluation.jsonl")
    assert contents(tmp_path / "cut", both) == contents(tmp_path / "uncut", both)
    assert names(tmp_path / "cut" / "checkpoints") == [12]
    data = open_data("digits")
    record = lines(tmp_path / "uncut" / "evaluation.jsonl")
    assert [line["step"] for line in record] == [5, 10]
    for name in ("cut", "uncut"):
        kept = tmp_path / name / "milestones"
        assert names(kept) == [5, 10]
        for line in record:
            model = CrateMAE.from_pretrained(kept / f"step-{line['step']:08d}")
            pictures = some_pictures(data.held_out, model.config)
            loss = held_out_loss(model, pictures, 0.75)
            assert line["held_out_loss"] == pytest.approx(loss, rel=1e-6)
            votes = held_out_neighbours(model, data)["neighbours"]
            assert line["neighbours"] == pytest.approx(votes)
            assert 0.1 < votes < 1
    assert any("step 5, epoch 0.05563: held out loss" in line for line in said)
    # Without them the run computes the same.
    train(tiny(tmp_path / "plain", log_every=1))
    assert contents(tmp_path / "plain") == contents(tmp_path / "uncut")
    assert not (tmp_path / "plain" / "milestones").exists()


def test_a_milestone_that_fails_is_made_when_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(tmp_path, milestone_epochs=5 * STEP)

    def full(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "keep", full)
        with pytest.raises(
            CheckpointError, match=r"step 5 could not.*disk full.*00004"
        ):
            train(config)
    train(config)
    assert names(tmp_path / "milestones") == [5, 10]
    assert not list((tmp_path / "milestones").glob(".*"))


def test_an_evaluator_that_is_not_there_is_named_before_the_work(
    tmp_path: Path,
) -> None:
    for name in ("crate_core.evaluation.neighbours:nothing", "nowhere:nothing"):
        with pytest.raises(ValueError, match=f"evaluators: '{name}' was not found"):
            train(tiny(tmp_path, evaluators=(name,)))
    assert not (tmp_path / "metrics.jsonl").exists()


# -- signals


def command(directory: Path, *more: str) -> list[str]:
    base = [sys.executable, "-m", "crate_core.cli", "pretrain", *FLAGS]
    base += ["--max-steps", "400", "--checkpoint-every", "1000", "--log-every", "5"]
    return [*base, *more, "--output-dir", str(directory)]


def start_and_signal(
    arguments: list[str], directory: Path, number: int, group: bool = False
) -> tuple[int, str]:
    """Start a run, signal it (or its whole group) when it has logged, wait for its end:
    exit status and what it said.
    """
    process = subprocess.Popen(
        arguments, env=ENVIRONMENT, cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    log = directory / "metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.002)
    (os.killpg if group else os.kill)(process.pid, number)
    said, _ = process.communicate(timeout=120)
    return process.returncode, said


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="signals need POSIX processes")
@pytest.mark.parametrize(
    ("name", "workers"), [("SIGTERM", 0), ("SIGUSR1", 1), ("SIGTERM", 1)]
)
def test_a_signal_ends_a_run_after_its_step_and_asks_for_another_start(
    tmp_path: Path, name: str, workers: int
) -> None:
    cut, uncut = tmp_path / "cut", tmp_path / "uncut"
    more = ("--workers", str(workers))
    number = getattr(signal, name)
    status, said = start_and_signal(command(cut, *more), cut, number, group=True)
    assert status == 75, said
    assert f"{name} ended the run after step" in said
    stopped = json.loads((cut / "stopped.json").read_text())
    assert 0 < stopped["step"] < stopped["steps"] == 400
    assert names(cut / "checkpoints") == [stopped["step"]]
    for arguments in (command(cut, *more), command(uncut)):
        done = subprocess.run(
            arguments, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert not (cut / "stopped.json").exists()
    assert contents(cut) == contents(uncut)


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(os, "killpg"), reason="signals need POSIX processes")
def test_a_launcher_that_is_ended_ends_its_processes_after_their_step(
    tmp_path: Path,
) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    arguments = command(tmp_path)
    arguments[1:2] = [*launcher, "-m"]
    status, said = start_and_signal(arguments, tmp_path, signal.SIGTERM)
    assert status != 0
    stopped = json.loads((tmp_path / "stopped.json").read_text())
    assert names(tmp_path / "checkpoints") == [stopped["step"]], said
    assert "ended the run after step" in said


def test_handlers_are_put_back_and_threads_have_none() -> None:
    before = [signal.getsignal(getattr(signal, name)) for name in NAMES]
    with StopSignals() as signals:
        assert not signals.agreed()
        for name in NAMES:
            signals.received = None
            signal.raise_signal(getattr(signal, name))
            assert signals.received == name
            assert signals.agreed()
    assert [signal.getsignal(getattr(signal, name)) for name in NAMES] == before

    def inside() -> None:
        with StopSignals() as signals:
            found.append(signals.agreed())

    found: list[bool] = []
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [False]


# -- branches


def test_a_branch_that_changes_nothing_ends_like_the_run(tmp_path: Path) -> None:
    train(tiny(tmp_path / "run", max_steps=4))
    said = train(tiny(tmp_path / "branch", branch_from=str(tmp_path / "run")))
    assert any("after step 4; changed: nothing" in line for line in said)
    train(tiny(tmp_path / "run"))
    weights = ("model.safetensors",)
    assert contents(tmp_path / "branch", weights) == contents(tmp_path / "run", weights)


def test_a_branch_with_another_rate_says_that_it_is_another_run(tmp_path: Path) -> None:
    source = tmp_path / "run"
    train(tiny(source, milestone_epochs=4 * STEP))
    milestone = source / "milestones" / "step-00000004"
    config = tiny(tmp_path / "branch", lr=0.003, branch_from=str(milestone))
    said = train(replace(config, max_steps=8))
    (line,) = [line for line in said if "branched off" in line]
    assert "lr 0.006 -> 0.003" in line
    assert "This is another run, not the continuation" in line
    starts = json.loads((tmp_path / "branch" / "run.json").read_text())["starts"]
    assert starts[0]["branched_from"] == {
        "run": "run",
        "step": 4,
        "changed": {"lr": [0.006, 0.003]},
    }
    rates = [line["lr"] for line in lines(tmp_path / "branch" / "metrics.jsonl")]
    plan = Plan(config, 1438)
    assert rates == [plan.lr(step - 1) for step in (6, 8)]
    # It goes on by itself, also where the source is gone, and is its own run.
    milestone.rename(tmp_path / "elsewhere")
    said = train(config)
    assert any("continuing after step 8" in line for line in said)
    with pytest.raises(ValueError, match=r"branch_from \(there"):
        train(replace(config, branch_from=str(source)))


def test_a_branch_that_cannot_be_is_refused_and_nothing_is_written(
    tmp_path: Path,
) -> None:
    source, target = tmp_path / "run", tmp_path / "branch"
    train(tiny(source))
    for fields, error, message in (
        (
            {"model": replace(TINY, lambd=0.1)},
            ValueError,
            r"model.lambd \(there 0.5, n",
        ),
        ({"batch_size": 32}, ValueError, r"batch_size \(there 16, now 32\)"),
        ({"branch_from": "nowhere"}, FileNotFoundError, "no run and no checkpoint"),
        ({"max_steps": 12}, ValueError, "step 12 of that run is not before the end"),
    ):
        given_fields = {"branch_from": str(source), "epochs": 1.0, **fields}
        with pytest.raises(error, match=message):
            train(tiny(target, **given_fields))
        assert not target.exists()


# -- company


def test_a_crowded_machine_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(os, "getloadavg"):
        pytest.skip("there is no load average here")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    for load, threads, crowded in (
        (0.1, 2, False),
        (1.9, 2, True),
        (0.3, 2, False),
        (1.2, 1, False),
        (3.0, 1, True),
    ):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        line = devices.company(threads)
        assert (line is not None) == crowded, (load, threads)
        assert line is None or f"{load} processes ran on its 2 cores" in line
