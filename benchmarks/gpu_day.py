r"""Everything that waits for a GPU, in the order of its worth, between calls of ten
minutes.

    python benchmarks/gpu_day.py --imagenet folder:PATH --cifar10 hf:PATH --plan
    python benchmarks/gpu_day.py --imagenet folder:PATH --cifar10 hf:PATH --minutes 9.5
    python benchmarks/gpu_day.py --scale miniature --device cpu

Each step is a command of its own with a budget of minutes.  A call works steps off in
their order until its minutes are over; what it cut off (by SIGTERM, so that a training
writes a checkpoint) goes on in the next call, and what is over its budget is left with
what it has.  After every step all records are in one file, ``results/gpu-day.json``.

Steps: a full-size training step by batch, beside the plain transcription and
transformers' ViT-MAE (seconds, memory, share of the peak); a few hundred steps of
``imagenet-base`` with the loss going down; CIFAR-10 for 200 epochs at some million
parameters, both architectures, each probed and fine-tuned beside the same network from
scratch; the study at its large scale.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from crate_core.records import device_name, provenance, write_json

ROOT = Path(__file__).resolve().parents[1]
GRACE = 30.0
"""Seconds between SIGTERM, after which a training writes its checkpoint,
and SIGKILL.
"""

Record = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """One command, the minutes it may take over all calls, and the file it leaves."""

    name: str
    command: tuple[str, ...]
    minutes: float
    record: Path

    def read(self) -> Any:
        """What it recorded, of a folder how many records; ``None`` while
        there is none.
        """
        if self.record.is_dir():
            return {"records": len(list(self.record.rglob("*.json")))}
        return json.loads(self.record.read_text()) if self.record.is_file() else None


def steps(options: argparse.Namespace) -> list[Step]:
    """Every step, the more worth first."""
    runs: Path = options.runs
    small = options.scale == "miniature"
    python = (sys.executable,)
    device = ("--device", options.device)
    crate = (*python, "-m", "crate_core.cli")
    precision = "fp32" if small else "bf16"

    def speed(batch: int) -> Step:
        record = runs / f"speed-{batch}.json"
        size = "tiny" if small else "base"
        given = ("--transformers",) if options.transformers else ()
        compiled = () if small else ("--compile",)
        command = (
            *(*python, "benchmarks/speed.py", "--sizes", size, "--modes", "training"),
            *("--precisions", precision, "--batch", str(batch), *device),
            *("--repeats", "1" if small else "7", *compiled, *given),
            *("--output", str(record)),
        )
        return Step(f"training step, batch {batch}", command, 3.0, record)

    def pretraining(name: str, preset: str, *fields: str) -> Step:
        directory = runs / name
        whole = ("--epochs", "200", "--precision", precision, "--compile")
        length = ("--max-steps", "6") if small else whole
        command = (
            *(*crate, "pretrain", "--preset", preset, "--data", options.cifar10),
            *(*device, *length, *fields, "--output-dir", str(directory)),
        )
        return Step(f"pretraining {name}", command, 25.0, directory / "summary.json")

    def probing(name: str) -> Step:
        record = runs / f"{name}-probe.json"
        command = (
            *(*crate, "probe", "--checkpoint", str(runs / name), "--controls"),
            *("--data", options.cifar10, "--cache", str(runs / "features"), *device),
            *("--precision", precision, "--output", str(record)),
        )
        return Step(f"probe of {name}", command, 5.0, record)

    def tuning(name: str, *fields: str, suffix: str = "") -> Step:
        directory = runs / f"{name}-finetuned{suffix}"
        length = ("--max-steps", "4", "--batch-size", "32") if small else ()
        command = (
            *(*crate, "finetune", "--preset", "digits" if small else "cifar10"),
            *("--checkpoint", str(runs / name), "--data", options.cifar10, *device),
            *(*length, *fields, "--output-dir", str(directory)),
        )
        what = f"fine-tuning {name}{suffix.replace('-', ' ')}"
        return Step(what, command, 8.0, directory / "summary.json")

    proof = runs / "imagenet-proof.json"
    proving = (
        *(*python, "benchmarks/imagenet_proof.py", "--data", options.imagenet),
        *("--steps", "300", "--batch-size", "256", "--precision", "bf16"),
        *(*device, "--compile", "--workers", str(options.workers)),
        *("--output", str(proof)),
    )
    study = (
        *(*python, "benchmarks/study.py", "--data", options.cifar10, *device),
        *("--scale", "large", "--workers", "4", "--runs", str(runs / "study")),
        *("--records", str(ROOT / "results" / "study" / "large")),
    )
    # some million parameters, alike to a few per cent
    wide = {
        "crate": ("cifar10", "--model.dim", "384"),
        "vit": ("cifar10-vit", "--model.dim", "288", "--model.decoder-dim", "192"),
    }
    listed = [speed(2 if small else 256)]
    if not small:
        listed.append(Step("imagenet-base", proving, 6.0, proof))
    for name, how in ({"crate": ("digits",)} if small else wide).items():
        listed += [
            pretraining(name, *how),
            probing(name),
            tuning(name),
            tuning(name, "--from-scratch", suffix="-from-scratch"),
        ]
    if not small:
        large = Step("study, large", study, 240.0, ROOT / "results" / "study" / "large")
        listed += [speed(64), speed(512), large]
    return listed


def attempt(step: Step, seconds: float, log: Path) -> tuple[str, float]:
    """Run a step for at most so many seconds: "done", "cut" or "failed", and how long
    it took.
    """
    start = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf8") as file:
        print("$", shlex.join(step.command), file=file, flush=True)
        running = subprocess.Popen(
            step.command,
            cwd=ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = running.wait(timeout=seconds)
            ended = "done" if status == 0 and step.read() is not None else "failed"
        except subprocess.TimeoutExpired:
            ended = "cut"
            os.killpg(running.pid, signal.SIGTERM)
            try:
                running.wait(timeout=GRACE)
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)
                running.wait()
    return ended, time.monotonic() - start


def work(
    listed: Sequence[Step],
    state_file: Path,
    minutes: float,
    say: Callable[[str], None] = print,
) -> dict[str, Record]:
    """Work steps off until the call's minutes are over; the state after each is on
    disk.

    A step that failed is tried again by a later call, after the others.
    """
    state: dict[str, Record] = (
        json.loads(state_file.read_text()) if state_file.is_file() else {}
    )
    end = time.monotonic() + 60 * minutes
    fresh = [
        step for step in listed if state.get(step.name, {}).get("status") != "failed"
    ]
    for step in [*fresh, *(step for step in listed if step not in fresh)]:
        known = state.get(step.name, {"status": "waiting", "seconds": 0.0})
        budget = 60 * step.minutes - known["seconds"]
        left = min(budget, end - time.monotonic() - GRACE)
        if known["status"] == "done" or budget <= 0 or left <= 0:
            continue
        ended, took = attempt(
            step,
            left,
            state_file.parent / "logs" / f"{step.name.replace(' ', '-')}.txt",
        )
        seconds = known["seconds"] + took
        if ended == "cut" and seconds >= 60 * step.minutes:
            ended = "over budget"
        state[step.name] = {"status": ended, "seconds": seconds}
        write_json(state_file, state)
        say(f"{step.name}: {ended} after {seconds:.0f} s")
    return state


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when every step is done or over its budget, 75 (call again) otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--imagenet", default="folder:imagenet", help="as --data takes")
    parser.add_argument("--cifar10", default="torchvision:CIFAR10", help="likewise")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--scale", choices=("full", "miniature"), default="full")
    parser.add_argument("--minutes", type=float, default=9.5, help="of this call")
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--transformers", action="store_true", help="is installed")
    parser.add_argument("--runs", type=Path, default=Path("runs/gpu-day"))
    parser.add_argument("--output", type=Path, default=Path("results/gpu-day.json"))
    parser.add_argument("--plan", action="store_true", help="print the steps")
    options = parser.parse_args(arguments)
    options.runs = options.runs.resolve()
    if options.scale == "miniature":
        options.cifar10 = "digits"
    listed = steps(options)
    if options.plan:
        for step in listed:
            print(f"{step.minutes:6.1f} min  {step.name}: {shlex.join(step.command)}")
        return 0
    state = work(listed, options.runs / "state.json", options.minutes)
    told = sys.argv[1:] if arguments is None else arguments
    shown = [Path(word).name if "/" in word else word for word in told]
    write_json(
        options.output,
        {
            "steps": {
                step.name: state.get(step.name, {"status": "waiting", "seconds": 0.0})
                | {"record": step.read()}
                for step in listed
            },
            **provenance(
                shlex.join(["python", "benchmarks/gpu_day.py", *shown]),
                device_name(torch.device(options.device)),
            ),
        },
    )
    ended = {"done", "over budget"}
    return (
        0 if all(state.get(s.name, {}).get("status") in ended for s in listed) else 75
    )


if __name__ == "__main__":
    sys.exit(main())
