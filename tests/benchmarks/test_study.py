"""The study: arms that differ in nothing but what they are to, a queue that follows
from its records, and runs that are the same whether or not they were cut off.
"""

import argparse
import importlib.util
import json
import math
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_core.data.named import open_data
from crate_core.model.build import build_model
from crate_core.training.pretrain import pretrain

pytest.importorskip("pyarrow", reason="the study keeps its pictures in parquet files")

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "study.py"
SPEC = importlib.util.spec_from_file_location("study", FILE)
assert SPEC is not None
assert SPEC.loader is not None
study = importlib.util.module_from_spec(SPEC)
sys.modules["study"] = study
SPEC.loader.exec_module(study)

STANDARD, MINIATURE = study.SCALES["standard"], study.SCALES["miniature"]


def record(run: Any, loss: float, **more: Any) -> dict[str, Any]:
    """What the queue reads of a finished run."""
    scores = [{"validation": {"own_loss": loss}}]
    base = {"name": run.name, "stage": run.stage, "arm": run.arm, "seed": run.seed}
    base |= {"peak_lr": run.peak_lr, "diverged": False, "processor_seconds": 60.0}
    return {**base, "scores": scores, **more}


def worked_off(scale: Any, optimum: dict[str, float]) -> dict[str, Any]:
    """Every record, in the queue's order, of arms whose loss is a parabola in the
    logarithm of the rate."""
    records: dict[str, Any] = {}
    while left := [r for r in study.queue(scale, records) if r.name not in records]:
        run = left[0]
        records[run.name] = record(run, math.log2(run.peak_lr / optimum[run.arm]) ** 2)
    return records


# --- the arms ------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["standard", "large"])
@pytest.mark.parametrize("depth", [2, 4, 6])
def test_arms_have_as_many_parameters_by_width_alone(scale: str, depth: int) -> None:
    chosen = replace(study.SCALES[scale], depth=depth)

    def count(scale: Any, arm: str) -> int:
        with torch.device("meta"):
            model = build_model(study.model_of(scale, study.ARMS[arm]))
        return sum(p.numel() for p in model.parameters())

    counts = [count(chosen, arm) for arm in study.ARMS]
    assert max(counts) / min(counts) < 1.01
    # one step of width to either side is further away than that
    crate, vit = chosen.widths
    for width in (vit - 4, vit + 4):
        other = count(replace(chosen, widths=(crate, width)), "vit-all")
        assert abs(other / counts[0] - 1) > 0.05


def test_arms_differ_in_nothing_else() -> None:
    models = {name: study.model_of(STANDARD, arm) for name, arm in study.ARMS.items()}
    crate, vit = models["crate-all"], models["vit-all"]
    assert (crate.depth, crate.decoder_layers) == (vit.depth, vit.decoder_depth)
    assert vit.decoder_dim == vit.dim
    assert (crate.heads, crate.heads) == (vit.heads, vit.decoder_heads)
    for layers in ("crate", "vit"):
        seen = models[f"{layers}-visible"]
        assert models[f"{layers}-all"] == replace(seen, encode_visible_only=False)
        assert seen.encode_visible_only


def test_a_variant_changes_what_it_is_called_after() -> None:
    for name, arm in study.VARIANTS.items():
        base = study.model_of(STANDARD, study.ARMS[arm.base])
        changed = study.model_of(STANDARD, arm)
        differing = {
            field: value
            for field, value in changed.to_dict().items()
            if value != base.to_dict()[field]
        }
        wanted = {k: v for k, v in arm.changes.items() if k != "mask_ratio"}
        if arm.layers == "vit" and "depth" in wanted:
            wanted["decoder_depth"] = wanted["depth"]
        assert differing == wanted, name
        assert (study.mask_ratio_of(arm) != 0.75) == ("mask_ratio" in arm.changes)


# --- the queue -----------------------------------------------------------------------


@given(exponents=st.lists(st.floats(-14, -3), min_size=4, max_size=4))
@settings(max_examples=25)
def test_the_best_rate_is_inside_its_grid_or_the_grid_at_its_limit(
    exponents: list[float],
) -> None:
    optimum = dict(zip(study.ARMS, (2**e for e in exponents), strict=True))
    optimum |= {name: optimum[arm.base] for name, arm in study.VARIANTS.items()}
    scale = replace(STANDARD, seeds=(1,), few_seeds=(1,))
    records = worked_off(scale, optimum)
    lowest = STANDARD.rates[0] / 2**STANDARD.furthest
    highest = STANDARD.rates[-1] * 2**STANDARD.furthest
    for arm in study.ARMS:
        tried, best = study.best_rate(scale, arm, records)
        assert len(tried) >= 5
        assert best is not None
        inside = tried[0] < best < tried[-1]
        assert inside or best == pytest.approx(lowest) or best == pytest.approx(highest)
        if lowest < optimum[arm] < highest:
            assert abs(math.log2(best / optimum[arm])) <= 0.5 + 1e-9


def test_every_arm_has_every_seed_at_its_own_rate() -> None:
    optimum = {name: 2e-3 for name in study.EVERY_ARM} | {"vit-all": 32e-3}
    records = worked_off(STANDARD, optimum)
    for arm in study.ARMS:
        runs = [r for r in records.values() if (r["stage"], r["arm"]) == (2, arm)]
        assert [r["seed"] for r in runs] == list(STANDARD.seeds)
        assert {r["peak_lr"] for r in runs} == {optimum[arm]}
    assert len(STANDARD.seeds) >= 6
    assert STANDARD.tuning_seed not in STANDARD.seeds + STANDARD.few_seeds
    assert set(STANDARD.few_seeds) <= set(STANDARD.seeds)
    for arm in study.VARIANTS:
        seeds = {
            r["seed"]
            for r in records.values()
            if (r["stage"], r["arm"]) == (3, arm) and r["seed"] != STANDARD.tuning_seed
        }
        assert seeds == set(STANDARD.few_seeds)


def test_stage_two_waits_for_its_arms_rate_alone() -> None:
    records: dict[str, Any] = {}
    for run in study.queue(STANDARD, {}):
        assert run.stage == 1
        if run.arm == "crate-all":
            records[run.name] = record(run, abs(math.log(run.peak_lr / 2e-3)))
    second = [r for r in study.queue(STANDARD, records) if r.stage == 2]
    assert {r.arm for r in second} == {"crate-all"}


def test_a_diverged_run_is_no_candidate() -> None:
    assert study.choosing_loss({"diverged": True, "scores": []}) == math.inf
    losses = {1e-3: 0.4, 2e-3: 0.3, 4e-3: math.inf}
    assert study.grid(STANDARD, (1e-3, 2e-3, 4e-3), losses)[1] == 2e-3


def test_the_plan_foresees_every_run() -> None:
    optimum = dict.fromkeys(study.EVERY_ARM, 2e-3)
    whole = len(worked_off(STANDARD, optimum))
    foreseen = study.queue(STANDARD, {}) + study.unknown_yet(STANDARD, {})
    assert len(foreseen) == whole


# --- the queue's process -------------------------------------------------------------


def options(folder: Path, *more: str) -> argparse.Namespace:
    """Options of a miniature on scikit-learn's digits."""
    return study.parsed(
        [
            "--data",
            "digits",
            "--scale",
            "miniature",
            "--poll-seconds",
            "0",
            "--runs",
            str(folder / "runs"),
            "--records",
            str(folder / "records"),
            *more,
        ]
    )


class Stub:
    """A process that ends at its second look, with a record unless it is to fail."""

    def __init__(self, run: Any, chosen: argparse.Namespace, fails: bool) -> None:
        self.run, self.chosen, self.fails = run, chosen, fails
        self.looks, self.signals = 0, list[int]()

    def poll(self) -> int | None:
        self.looks += 1
        if self.looks < 2 or (self.signals and self.signals[-1] == signal.SIGSTOP):
            return None
        if self.fails:
            return 1
        loss = math.log2(self.run.peak_lr / 4e-3) ** 2
        self.chosen.records.mkdir(exist_ok=True)
        path = self.chosen.records / f"{self.run.name}.json"
        path.write_text(json.dumps(record(self.run, loss, scale="miniature")))
        return 0

    def send_signal(self, number: int) -> None:
        self.signals.append(number)

    def terminate(self) -> None:
        self.signals.append(signal.SIGTERM)

    def wait(self) -> None: ...


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> list[Stub]:
    """Processes in the order they are started; those of vit-visible fail."""
    started: list[Stub] = []

    def start(run: Any, chosen: argparse.Namespace) -> Stub:
        started.append(Stub(run, chosen, run.arm == "vit-visible"))
        return started[-1]

    monkeypatch.setattr(study, "start", start)
    return started


def test_the_queue_is_worked_off_and_failures_are_tried_twice(
    tmp_path: Path, stubs: list[Stub]
) -> None:
    chosen = options(tmp_path, "--workers", "2", "--stage", "1", "2")
    failed = study.work(MINIATURE, chosen)
    names = [stub.run.name for stub in stubs]
    good = [n for n in names if "vit-visible" not in n]
    assert failed == 3
    assert len(good) == len(set(good)) == 3 * (3 + 2)
    assert all(names.count(n) == 2 for n in set(names) - set(good))
    again = len(stubs)
    assert study.work(MINIATURE, options(tmp_path, "--stage", "2")) == 0
    assert len(stubs) == again, "what is done is not done again"


def test_some_arms_can_be_worked_off_before_the_others(
    tmp_path: Path, stubs: list[Stub]
) -> None:
    two = ["crate-all", "vit-all"]
    assert study.work(MINIATURE, options(tmp_path, "--arms", *two)) == 0
    # three rates and two seeds each
    assert sorted(stub.run.arm for stub in stubs) == sorted(two * (3 + 2))
    study.work(MINIATURE, options(tmp_path, "--stage", "1"))
    assert {stub.run.arm for stub in stubs[10:]} == {"crate-visible", "vit-visible"}


def test_a_pause_file_stops_runs_where_they_are(
    tmp_path: Path, stubs: list[Stub], monkeypatch: pytest.MonkeyPatch
) -> None:
    pause = tmp_path / "pause"
    turns = 0

    def sleep(seconds: float) -> None:
        nonlocal turns
        turns += 1
        if turns == 1:
            pause.touch()
        if turns == 6:
            assert len(stubs) == 1, "nothing is started meanwhile"
            assert stubs[0].signals == [signal.SIGSTOP]
            pause.unlink()

    monkeypatch.setattr(study.time, "sleep", sleep)
    chosen = options(tmp_path, "--stage", "1", "--pause-file", str(pause))
    study.work(MINIATURE, chosen)
    assert stubs[0].signals == [signal.SIGSTOP, signal.SIGCONT]
    assert len(stubs) > 1


def test_the_limit_ends_what_runs(tmp_path: Path, stubs: list[Stub]) -> None:
    study.work(MINIATURE, options(tmp_path, "--limit-hours", "0"))
    assert stubs == []

    class Never(Stub):
        def poll(self) -> int | None:
            return None

    chosen = options(tmp_path, "--limit-hours", "1e-6")
    never = Never(study.queue(MINIATURE, {})[0], chosen, False)
    study.start = lambda run, chosen: never  # undone by the fixture's monkeypatch
    study.work(MINIATURE, chosen)
    assert never.signals == [signal.SIGTERM, signal.SIGCONT]


def test_one_queue_works_in_a_folder(tmp_path: Path) -> None:
    with (
        study.only_queue(tmp_path),
        pytest.raises(SystemExit, match=f"process {os.getpid()}"),
        study.only_queue(tmp_path),
    ):
        pass
    with study.only_queue(tmp_path):
        pass


def test_records_of_another_scale_are_refused(tmp_path: Path) -> None:
    chosen = options(tmp_path)
    run = study.queue(MINIATURE, {})[0]
    chosen.records.mkdir()
    text = json.dumps(record(run, 1.0, scale="large"))
    (chosen.records / f"{run.name}.json").write_text(text)
    with pytest.raises(SystemExit, match="scale large"):
        study.finished(chosen)


# --- runs ----------------------------------------------------------------------------


def test_parts_share_no_picture_and_are_the_same_again(tmp_path: Path) -> None:
    data = open_data("digits")
    scale = replace(MINIATURE, pictures=1300, validation=138)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        study.prepare(scale, data, folder)
    first, second = (open_data(f"hf:{folder}") for folder in folders)
    assert (len(first.train), len(first.held_out)) == (1300, 138)
    seen = [
        sorted(np.asarray(source.read(i)).tobytes() for i in range(len(source)))
        for source in (first.train, first.held_out)
    ]
    # together they are the whole training part, once each
    pixels = [
        (255 * data.train.read(i)[0]).byte().numpy() for i in range(len(data.train))
    ]
    assert sorted(seen[0] + seen[1]) == sorted(p.tobytes() for p in pixels)
    assert study.digest(first.train) == study.digest(second.train)
    assert study.digest(first.train) != study.digest(first.held_out)
    with pytest.raises(ValueError, match=r"1,438 training pictures: 1,300 .* 200"):
        study.prepare(replace(scale, validation=200), data, tmp_path / "c")


def test_runs_in_miniature(tmp_path: Path) -> None:
    runs = [study.Run(2, arm, 4e-3, 1) for arm in ("crate-all", "vit-visible")]
    records = [study.execute(MINIATURE, run, options(tmp_path)) for run in runs]
    assert study.finished(options(tmp_path)) == {r["name"]: r for r in records}
    for done in records:
        assert [score["epoch"] for score in done["scores"]] == [0, 1, 2]
        shown = [set(s) & {"validation", "test"} for s in done["scores"]]
        assert shown == [{"test"}, {"test"}, {"test", "validation"}]
        losses = [score["test"]["loss"] for score in done["scores"]]
        assert losses[-1] < losses[0]
        assert done["processor_seconds"] > 0
        assert str(tmp_path) not in json.dumps(done)
    assert records[0]["digests"] == records[1]["digests"]
    assert None not in records[0]["digests"].values()


def test_a_tuning_run_sees_no_test_picture(tmp_path: Path) -> None:
    run = study.Run(1, "crate-all", 4e-3, MINIATURE.tuning_seed)
    done = study.execute(MINIATURE, run, options(tmp_path))
    assert [set(s) & {"validation", "test"} for s in done["scores"]] == [{"validation"}]
    assert done["digests"]["test"] is None


def test_a_run_cut_off_ends_as_the_uncut_one(tmp_path: Path) -> None:
    run = study.Run(2, "vit-all", 4e-3, 1)
    whole = study.execute(MINIATURE, run, options(tmp_path / "whole"))
    chosen = options(tmp_path / "cut")
    study.prepare(MINIATURE, open_data("digits"), chosen.runs / "pictures")
    # two of the six steps to the first mark
    config = replace(study.config_of(MINIATURE, run, chosen), max_steps=2)
    pretrain(config, progress=False, report=lambda line: None)
    cut = study.execute(MINIATURE, run, chosen)
    seconds = ("processor_seconds", "evaluation_seconds")
    kept = [
        [{k: v for k, v in s.items() if k not in seconds} for s in done["scores"]]
        for done in (whole, cut)
    ]
    assert kept[0] == kept[1]
    assert cut["scores"][1]["processor_seconds"] is None, "its time is not all known"
    assert cut["processor_seconds"] is None


def test_a_diverged_run_has_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(*given: Any, **named: Any) -> None:
        raise study.TrainingDivergedError("the loss is nan at step 3; no checkpoint")

    monkeypatch.setattr(study, "pretrain", diverges)
    run = study.Run(1, "crate-all", 4e-3, MINIATURE.tuning_seed)
    done = study.execute(MINIATURE, run, options(tmp_path))
    assert done["diverged"]
    assert done["why_diverged"] == "the loss is nan at step 3"
    assert study.choosing_loss(done) == math.inf


@pytest.mark.processes
def test_a_process_of_the_queue(tmp_path: Path) -> None:
    chosen = options(tmp_path)
    run = study.queue(MINIATURE, {})[0]
    assert study.start(run, chosen).wait() == 0, (
        chosen.runs / f"{run.name}.txt"
    ).read_text()
    assert set(study.finished(chosen)) == {run.name}


@pytest.mark.bad_input
def test_what_the_command_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        options(tmp_path, "--workers", "0")
    assert "--workers 0: at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--only nothing: the queue has stage1-"):
        study.main(
            [
                "--data",
                "digits",
                "--scale",
                "miniature",
                "--only",
                "nothing",
                "--records",
                str(tmp_path),
            ]
        )
