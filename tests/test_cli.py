"""The ``crate`` command: each subcommand end to end, and bad input answered in one
line.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from crate_core.cli import COMMANDS, box_text, main
from crate_core.model.build import pick_device
from crate_core.model.config import CrateMAEConfig
from crate_core.model.crate import CrateMAE
from crate_core.training.recipe import PretrainConfig

ROOT = Path(__file__).resolve().parents[1]
TINY = CrateMAEConfig.preset("digits", dim=16, depth=1, heads=2)
TINY_OPTIONS = [
    "--model.dim",
    "16",
    "--model.depth",
    "1",
    "--model.heads",
    "2",
    "--batch-size",
    "16",
]


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    said = capsys.readouterr()
    assert f"usage: crate {name}" in said.out
    assert said.err == ""


def test_help_imports_nothing_heavy() -> None:
    heavy = [
        "accelerate",
        "torchvision",
        "sklearn",
        "matplotlib",
        "tyro",
        "datasets",
        "PIL",
    ]
    code = "import sys; from crate_core.cli import main; main(['--help']); "
    code += f"print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert done.stdout.splitlines()[-1] == "[]"


BAD = [
    (
        [],
        f"give a command: {', '.join(COMMANDS)}",
    ),
    (["train"], "unknown command 'train'"),
    (["pretrain", "--epochs", "many"], "--epochs"),
    (["pretrain", "--epoch", "3"], "--epoch"),
    (["pretrain", "--preset", "mnist"], "digits, cifar10, "),
    (["pretrain", "--preset"], "Missing value for argument '--preset'"),
    (["pretrain", "--device", "gpu"], "'auto', 'cpu', 'cuda', 'mps'"),
    (["pretrain", "--mask-ratio", "1.5"], "mask_ratio=1.5"),
    (["pretrain", "--model.dim", "66"], "dim=66"),
    (["pretrain", "--data", "folder:nowhere"], "nowhere"),
    (["pretrain", "--data", "folder:empty"], ".jpg"),
    (["pretrain", "--data", "digit"], "folder:PATH"),
    (["evaluate"], "--checkpoint"),
    (["evaluate", "--checkpoint", "nowhere"], "nowhere"),
    (["evaluate", "--checkpoint", "model"], "--data"),
    (["evaluate", "--checkpoint", "other", "--data", "digits"], "vit_mae"),
    (["reconstruct", "--checkpoint", "model"], "either --images FILE ... or --data"),
    (
        ["reconstruct", "--checkpoint", "model", "--images", "a.png"],
        "there is no file a.png",
    ),
    (
        [
            "reconstruct",
            "--checkpoint",
            "model",
            "--data",
            "digits",
            "--mask-ratio",
            "2",
        ],
        "mask_ratio",
    ),
    (["convert", "reference.pth"], "OUTDIR"),
    (["convert", "nowhere.pth", "out"], "nowhere.pth"),
    (["convert", "text.pth", "out"], "text.pth was refused"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), BAD, ids=[" ".join(a) for a, _ in BAD]
)
def test_bad_input_is_one_line_and_exit_code_two(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    Path("text.pth").write_text("no weights")
    CrateMAE(TINY).save_pretrained("model")
    Path("other").mkdir()
    Path("other/config.json").write_text(json.dumps({"model_type": "vit_mae"}))
    before = sorted(Path().rglob("*"))
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert said.err.startswith("crate")
    assert message in said.err
    assert sorted(Path().rglob("*")) == before


def test_from_pretraining_to_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "pretrain",
        *TINY_OPTIONS,
        "--output-dir",
        "run",
        "--max-steps",
        "3",
        "--seed",
        "7",
        "--lr",
        "0.02",
    ]
    assert main(command) == 0
    said = capsys.readouterr()
    assert "loss to beat" in said.out
    assert "saved in run: model.safetensors, config.json" in said.out
    # no terminal, so lines instead of a bar
    assert "step 3 of 3" in said.out
    assert said.err == ""
    record = json.loads(Path("run/run.json").read_text())
    assert record["starts"][0]["command"] == "crate " + " ".join(command)
    assert (
        record["config"]["seed"],
        record["config"]["lr"],
        record["config"]["model"]["dim"],
    ) == (7, 0.02, 16)
    assert main(command) == 0
    assert "is finished: 3 steps are done" in capsys.readouterr().out
    assert main([*command, "--lr", "0.01"]) == 2
    assert "lr (there 0.02, now 0.01)" in capsys.readouterr().err

    for i in range(24):
        folder = Path("pictures") / ("dark", "light")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 100 * (i % 2) + 4 * i).save(folder / f"{i}.png")
    evaluation_command = [
        "evaluate",
        "--checkpoint",
        "run",
        "--data",
        "folder:pictures",
        "--seeds",
        "1",
    ]
    assert main([*evaluation_command, "--device", "cpu", "--mask-ratios", "0.5"]) == 0
    said = capsys.readouterr()
    assert "raw pixels" in said.out
    assert "5 labels a class" in said.out
    evaluation = json.loads(Path("run/evaluation.json").read_text())
    assert evaluation["command"].startswith("crate evaluate --checkpoint run")
    assert [score["mask_ratio"] for score in evaluation["reconstruction"]] == [0.5]

    Image.new("RGB", (30, 20), (200, 10, 10)).save("photo.jpg")
    assert (
        main(
            [
                "reconstruct",
                "--checkpoint",
                "run",
                "--images",
                "photo.jpg",
                "--output",
                "one.png",
            ]
        )
        == 0
    )
    assert (
        main(
            [
                "reconstruct",
                "--checkpoint",
                "run",
                "--data",
                "digits",
                "--count",
                "3",
                "--output",
                "three.png",
            ]
        )
        == 0
    )
    with Image.open("one.png") as one, Image.open("three.png") as three:
        assert one.width == three.width
        assert one.height < three.height


def reference_state(model: CrateMAE) -> dict[str, Tensor]:
    """A model's weights under the names of the authors' code."""
    size, channels = model.config.patch_size, model.config.channels
    ours = model.state_dict()
    kernel = (
        ours["patch_embedding.weight"]
        .unflatten(1, (size, size, channels))
        .permute(0, 3, 1, 2)
    )
    theirs = {
        "patch_embed.proj.weight": kernel,
        "patch_embed.proj.bias": ours["patch_embedding.bias"],
        "cls_token": ours["class_token"],
        "mask_token": ours["mask_token"],
        "decoder_pos_embed": model.positions[None],
        "decoder_pred.weight": ours["prediction.weight"],
        "decoder_pred.bias": ours["prediction.bias"],
    }
    names = {"encoder_norm": "norm", "decoder_norm": "decoder_norm"}
    for mine, name in names.items():
        theirs |= {
            f"{name}.{part}": ours[f"{mine}.{part}"] for part in ("weight", "bias")
        }
    attention = {
        "project.weight": "fn.qkv.weight",
        "output.weight": "fn.to_out.0.weight",
        "output.bias": "fn.to_out.0.bias",
    }
    for side, prefix, first, second in (
        ("encoder", "", "attention", "sparsify"),
        ("decoder", "decoder_", "densify", "attention"),
    ):
        for layer in range(model.config.depth):
            for place, part in enumerate((first, second)):
                start, own = (
                    f"{prefix}blocks.{layer}.layers.0.{place}.",
                    f"{side}.{layer}.",
                )
                theirs |= {
                    f"{start}norm.{p}": ours[f"{own}norm_{part}.{p}"]
                    for p in ("weight", "bias")
                }
                if part == "attention":
                    theirs |= {
                        start + name: ours[f"{own}attention.{mine}"]
                        for mine, name in attention.items()
                    }
                else:
                    theirs[f"{start}fn.weight"] = ours[f"{own}{part}.weight"]
    return theirs


def test_convert_writes_a_model_that_loads(capsys: pytest.CaptureFixture[str]) -> None:
    model = CrateMAE(TINY)
    torch.save({"model": reference_state(model)}, "reference.pth")
    assert main(["convert", "reference.pth", "converted", "--heads", "2"]) == 0
    assert "parameters saved in converted" in capsys.readouterr().out
    converted = CrateMAE.from_pretrained("converted").state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(converted[name], tensor), name


def test_a_run_that_fails_on_its_way_is_exit_code_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (
        main(
            [
                "pretrain",
                *TINY_OPTIONS,
                "--output-dir",
                "run",
                "--max-steps",
                "8",
                "--lr",
                "1e30",
            ]
        )
        == 1
    )
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("crate pretrain:")
    assert "learning rate" in last
    assert "there is no checkpoint yet" in last


def test_the_installed_entry_is_this_function() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "crate_core.cli", "nothing"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 2
    assert (
        done.stderr
        == f"crate: unknown command 'nothing'; accepted are {', '.join(COMMANDS)}\n"
    )


def test_the_preset_is_found_in_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    import crate_core.training.pretrain as training

    seen: list[PretrainConfig] = []
    monkeypatch.setattr(
        training, "pretrain", lambda config, command: seen.append(config)
    )
    for arguments in (
        ["--preset", "cifar10", "--seed", "1"],
        ["--seed=1", "--preset=cifar10"],
        ["--preset", "digits", "--seed", "1", "--preset", "cifar10"],
    ):
        assert main(["pretrain", *arguments]) == 0
    assert seen == [PretrainConfig("cifar10", seed=1)] * 3


def test_a_box_becomes_its_first_paragraph() -> None:
    lines = ["╭─ Error ─╮", "│ Wrong     │", "│ number.   │", "│ ───────── │"]
    box = "\n".join([*lines, "│ See help. │", "╰─────────╯", ""])
    assert box_text(box) == "Wrong number."
    assert box_text("plain\ntext") == "plain text"


def test_a_device_that_is_not_there_is_refused() -> None:
    assert pick_device("cpu") == "cpu"
    assert pick_device("auto") in ("cpu", "cuda", "mps")
    missing = "mps" if torch.cuda.is_available() else "cuda"
    with pytest.raises(ValueError, match=f"'{missing}' is not there"):
        pick_device(missing)
