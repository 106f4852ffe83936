"""One run on several micro-batches, processes and shares of a model; what it shows
meanwhile; compiling it.
"""

import functools
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_runs import ENVIRONMENT, FLAGS, ROOT, TINY, contents, tiny, train
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

import crate_core.training.expected as expected
import crate_core.training.recipe as recipe
from crate_core.data.named import open_data
from crate_core.model.autoencoder import MaskedAutoencoder
from crate_core.model.config import CrateMAEConfig, ViTMAEConfig
from crate_core.model.crate import CrateMAE
from crate_core.training.devices import make_accelerator
from crate_core.training.expected import band_at
from crate_core.training.presets import PRESETS
from crate_core.training.pretrain import Trainer
from crate_core.training.recipe import Plan, PretrainConfig
from crate_core.training.run_directory import RunDirectory


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bits are compared at one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on one process in one piece."""
    path = tmp_path_factory.mktemp("whole")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train(tiny(path))
    torch.set_num_threads(threads)
    return path


def first_gradient(config: PretrainConfig) -> dict[str, Tensor]:
    """The gradient that the first step takes, by parameter."""
    accelerator = make_accelerator(config)
    trainer = Trainer(
        config,
        open_data("digits"),
        RunDirectory(config.output_dir),
        accelerator,
        str,
        str,
    )
    taken: dict[str, Tensor] = {}
    trainer.optimizer.step = lambda: taken.update(
        {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    )
    trainer.update(iter(trainer.batches()))
    return taken


# -- micro-batches


@pytest.mark.parametrize("accumulate", [2, 4, 16])
def test_accumulated_gradient_is_the_whole_batchs(
    tmp_path: Path, accumulate: int
) -> None:
    one, many = (
        first_gradient(tiny(tmp_path)),
        first_gradient(tiny(tmp_path, accumulate=accumulate)),
    )
    assert one.keys() == many.keys()
    for name in one:
        torch.testing.assert_close(
            many[name],
            one[name],
            rtol=1e-5,
            atol=1e-6 * float(one[name].abs().max()) + 1e-8,
        )


def test_a_run_in_micro_batches_logs_what_the_whole_one_does(
    tmp_path: Path, whole: Path
) -> None:
    train(tiny(tmp_path, accumulate=4))
    for one, many in zip(lines(whole), lines(tmp_path), strict=True):
        assert many == pytest.approx(one, rel=1e-5)


def test_accumulate_may_change_when_a_run_goes_on(tmp_path: Path) -> None:
    train(tiny(tmp_path, max_steps=6))
    assert any(
        "continuing after step 6" in line
        for line in train(tiny(tmp_path, accumulate=2))
    )


def lines(run: Path) -> list[dict]:
    return [
        json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"accumulate": 3}, r"accumulate=3: accepted is a divisor of batch_size=16"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"shard": True, "precision": "fp16"}, "shard=True"),
        ({"picture_every": 0}, "picture_every=0"),
        ({"streaming": True}, "streaming=True: accepted is only with data=hf:"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    tmp_path: Path, fields: dict, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(tmp_path, **fields)


# -- processes

DRIVER = """
import functools, json, os, sys
from pathlib import Path
import torch
import crate_core.model.files as pretrained, crate_core.records as records
import crate_core.training.run_directory as runs
from crate_core.data.named import open_data
from crate_core.training.devices import make_accelerator
from crate_core.training.pretrain import Trainer
from crate_core.training.recipe import PretrainConfig
from crate_core.training.pretrain import pretrain
from safetensors.torch import save_file

torch.set_num_threads(1)
root, base = Path(sys.argv[1]), json.loads(sys.argv[2])
first = os.environ["RANK"] == "0"

def run(name, **fields):
    own = {**base, "output_dir": str(root / name), **fields}
    config = PretrainConfig.from_dict(own)
    if name.startswith("gradient"):
        place, devices = runs.RunDirectory(root / name), make_accelerator(config)
        trainer = Trainer(config, open_data("digits"), place, devices, str, str)
        taken = {}
        def step():
            for parameter_name, p in trainer.wrapped.named_parameters():
                gradient = p.grad.full_tensor() if trainer.sharded else p.grad
                taken[parameter_name.removeprefix("module.")] = gradient.clone()
        trainer.optimizer.step = step
        trainer.update(iter(trainer.batches()))
        if first:
            save_file(taken, root / f"{name}.safetensors")
    else:
        pretrain(config, progress=False, report=str)

def forbidden(*_, **__):
    raise AssertionError("a process other than the first writes")

# traced as ever, and no code is made; the compiler keeps files of its own, so before
# the disk is closed
compiler = torch.compile
torch.compile = functools.partial(compiler, backend="eager")
run("shares-compiled", shard=True, compile=True)
torch.compile = compiler

if not first:   # every way in which a run touches the disk
    pretrained.atomic_write = runs.atomic_write = records.atomic_write = forbidden
    os.mkdir = Path.mkdir = Path.write_text = torch.save = forbidden
    Path.rename = runs.RunDirectory.log = runs.RunDirectory.log_timing = forbidden

run("gradient-copies")
run("gradient-shares", shard=True)
run("gradient-shares-accumulated", shard=True, accumulate=2)
run("copies")
run("copies-accumulated", accumulate=2)
# the last checkpoint of six steps is that of step 6
run("shares", shard=True, max_steps=6)
run("shares", shard=True, tensorboard=True, picture_every=6)
# copies first, shares after, and the other way round
run("mixed", max_steps=6)
run("mixed", shard=True)
run("mixed-back", shard=True, max_steps=6)
run("mixed-back")
run("bf16", shard=True, precision="bf16")
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two processes over gloo, each on half of every batch."""
    root = tmp_path_factory.mktemp("two")
    (root / "driver.py").write_text(DRIVER)
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    base = json.dumps(tiny(root).to_dict())
    done = subprocess.run(
        [*launch, str(root / "driver.py"), str(root), base],
        env=ENVIRONMENT,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["copies", "shares", "shares-accumulated"])
def test_two_processes_take_the_gradient_of_one(
    tmp_path: Path, two: Path, kind: str
) -> None:
    one, joined = (
        first_gradient(tiny(tmp_path)),
        load_file(two / f"gradient-{kind}.safetensors"),
    )
    assert one.keys() == joined.keys()
    for name in one:
        torch.testing.assert_close(
            joined[name],
            one[name],
            rtol=1e-5,
            atol=1e-6 * float(one[name].abs().max()) + 1e-8,
        )


@pytest.mark.parametrize(
    "kind",
    [
        "copies",
        "copies-accumulated",
        "shares",
        "shares-compiled",
        "mixed",
        "mixed-back",
    ],
)
def test_two_processes_end_where_one_ends(two: Path, whole: Path, kind: str) -> None:
    # Twelve steps of AdamW, whose first steps divide gradients by their own size:
    # rounding is enlarged most there.
    for one, joined in zip(lines(whole), lines(two / kind), strict=True):
        assert joined == pytest.approx(one, rel=1e-4)
    weights, others = (
        CrateMAE.from_pretrained(run).state_dict() for run in (whole, two / kind)
    )
    for name in weights:
        torch.testing.assert_close(others[name], weights[name], rtol=1e-3, atol=1e-4)
    one, other = (
        json.loads((run / "summary.json").read_text()) for run in (whole, two / kind)
    )
    assert other["held_out_loss"] == pytest.approx(one["held_out_loss"], rel=1e-4)


def test_a_sharded_run_shows_what_others_show(two: Path) -> None:
    assert (two / "shares" / "pictures" / "step-00000012.png").is_file()
    assert list((two / "shares" / "tensorboard").iterdir())
    assert lines(two / "bf16") != lines(two / "shares")
    assert lines(two / "bf16")[-1]["loss"] == pytest.approx(
        lines(two / "shares")[-1]["loss"], rel=0.05
    )


@pytest.mark.parametrize(
    "launcher",
    [
        ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        [
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--main_process_port",
            "0",
        ],
    ],
    ids=["torchrun", "accelerate"],
)
@pytest.mark.processes
def test_the_same_command_under_both_launchers(
    tmp_path: Path, launcher: list[str]
) -> None:
    # without a GPU several processes meet on the CPU, asked for or not
    asked = launcher[0].startswith("accelerate") or torch.cuda.is_available()
    command = [
        sys.executable,
        "-m",
        *launcher,
        "-m",
        "crate_core.cli",
        "pretrain",
        *(FLAGS if asked else FLAGS[2:]),
    ]
    command += ["--max-steps", "2", "--output-dir", str(tmp_path / "run")]
    done = subprocess.run(
        command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 processes") == 1  # said once, by the first
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 2
    assert len(json.loads((tmp_path / "run" / "run.json").read_text())["starts"]) == 1


def test_one_process_has_nothing_to_share(tmp_path: Path, whole: Path) -> None:
    config = tiny(tmp_path, shard=True)
    train(config)
    assert contents(tmp_path) == contents(whole)
    trainer = Trainer(
        config,
        open_data("digits"),
        RunDirectory(tmp_path / "x"),
        make_accelerator(config),
        str,
        str,
    )
    assert not isinstance(trainer.wrapped, FSDPModule)


# -- what a run shows


def test_showing_more_does_not_change_a_run(tmp_path: Path, whole: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tiny(tmp_path, tensorboard=True, picture_every=5, max_steps=6))
    train(tiny(tmp_path, tensorboard=True, picture_every=5))
    assert contents(tmp_path) == contents(whole)
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == [
        "step-00000005.png",
        "step-00000010.png",
    ]
    with Image.open(tmp_path / "pictures" / "step-00000010.png") as picture:
        picture.load()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    logged = lines(tmp_path)
    for name in ("loss", "gradient_norm", "lr", "epoch"):
        shown = events.Scalars(name)
        assert [event.step for event in shown] == [3, 6, 9, 12]
        assert [event.value for event in shown] == pytest.approx(
            [line[name] for line in logged]
        )
    assert [event.step for event in events.Images("reconstructions")] == [5, 10]
    timing = [
        json.loads(line)
        for line in (tmp_path / "timing.jsonl").read_text().splitlines()
    ]
    assert [line["step"] for line in timing] == [3, 6, 9, 12]
    for line in timing:
        assert line["images_per_second"] == pytest.approx(
            3 * 16 / line["seconds"], rel=0.01
        )


# -- the loss that is normal


def test_a_band_holds_its_own_lines_and_not_others() -> None:
    generator = torch.Generator().manual_seed(0)
    epochs = [0.1 * (i + 1) for i in range(400)]

    def log(offset: float) -> list[dict]:
        noise = 0.01 * torch.randn(len(epochs), generator=generator)
        return [
            {"epoch": e, "loss": 1 / (1 + e) + offset + float(z)}
            for e, z in zip(epochs, noise, strict=True)
        ]

    band = expected.loss_band([log(0.0), log(0.005), log(-0.005)])
    assert band[-1]["epoch"] == pytest.approx(epochs[-1])
    assert [point["epoch"] for point in band] == sorted(
        point["epoch"] for point in band
    )
    for point in band:
        normal = 1 / (1 + point["epoch"])
        assert point["low"] < normal < point["high"]
        assert point["low"] < point["mean"] < point["high"]
        assert not point["low"] < normal + 0.5 < point["high"]
    with pytest.raises(ValueError, match="at least two lines"):
        expected.loss_band([log(0.0)[:1]])


def test_what_is_normal_is_said_for_the_unchanged_preset_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    points = [
        {"epoch": e, "mean": m, "low": m - 0.1, "high": m + 0.1}
        for e, m in ((1.0, 1.0), (4.0, 0.5), (8.0, 0.3))
    ]
    bands = {"digits": {"pictures": 1438, "points": points}}
    monkeypatch.setattr(recipe, "measured", lambda: bands)
    config = PretrainConfig(seed=7, data="hf:elsewhere", batch_size=128)
    plan = Plan(config, 1438)
    steps = [point["epoch"] * 1438 / 128 for point in points]
    for exact, low in zip(steps, (0.9, 0.4, 0.2), strict=True):
        step = math.ceil(exact)
        near = plan.expected(step)
        assert near is not None
        assert near == pytest.approx((low, low + 0.2), abs=0.03)
        assert near == band_at(points, plan.epoch(step))
    # half-way in the logarithm
    assert band_at(points, 2.0) == pytest.approx((0.65, 0.85))
    assert band_at(points, 0.5) is None
    assert band_at(points, 9.0) is None
    middle = round(2 * 1438 / 128)
    assert plan.expected(middle) is not None
    assert plan.expected(5) is None
    assert Plan(config, 1437).expected(middle) is None
    assert Plan(replace(config, lr=1e-3), 1438).expected(middle) is None
    assert Plan(PretrainConfig("imagenet-base"), 1438).expected(middle) is None


def test_shipped_bands_belong_to_presets() -> None:
    for name, band in expected.measured().items():
        assert name in PRESETS
        assert len(band["seeds"]) >= 1
        final = PRESETS[name].loss
        last = band["points"][-1]
        assert final is None or last["low"] < final[1]
        assert final is None or final[0] < last["high"]


def test_a_run_says_whether_its_loss_is_normal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Plan, "expected", lambda *_: (0.0, 0.1))
    said = [
        line
        for line in train(tiny(tmp_path))
        if "normal at this point: 0.000 to 0.100  <- outside" in line
    ]
    assert [line.partition(",")[0] for line in said] == [
        "step 3",
        "step 6",
        "step 9",
        "step 12",
    ]


# -- torch.compile


@pytest.mark.processes
@pytest.mark.parametrize(
    "config",
    [
        CrateMAEConfig.preset("digits", dim=16, depth=1, heads=2),
        CrateMAEConfig.preset(
            "digits",
            dim=16,
            depth=1,
            heads=2,
            encode_visible_only=True,
            normalize_targets=True,
        ),
        ViTMAEConfig.preset(
            "cifar10-tiny", image_size=8, dim=16, depth=1, heads=2, decoder_dim=16
        ),
    ],
    ids=["crate", "visible-only", "vit"],
)
def test_the_training_step_compiles_without_a_graph_break(
    config: CrateMAEConfig | ViTMAEConfig,
) -> None:
    from crate_core.model.build import build_model

    model = build_model(config)
    images, noise = (
        torch.rand(2, config.channels, 8, 8),
        torch.rand(2, model.positions.shape[0] - 1),
    )
    torch._dynamo.reset()
    # raises at a graph break
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    loss = compiled(images, 0.75, noise).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    plain = model(images, 0.75, noise).loss
    plain.backward()
    torch.testing.assert_close(loss, plain)
    assert isinstance(model, MaskedAutoencoder)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


@pytest.mark.processes
def test_runs_of_one_process_may_remove_different_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A number that changed between runs is taken as unknown by torch.compile, and with
    # it the encoder's tokens.
    torch.compiler.reset()
    monkeypatch.setattr(
        torch, "compile", functools.partial(torch.compile, backend="eager")
    )
    model = replace(TINY, encode_visible_only=True)
    for ratio in (0.75, 0.5, 0.25):
        train(
            tiny(
                tmp_path / str(ratio),
                model=model,
                mask_ratio=ratio,
                precision="bf16",
                compile=True,
                max_steps=2,
            )
        )
