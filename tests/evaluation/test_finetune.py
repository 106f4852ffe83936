"""Fine-tuning: what is trained and how fast, exact resume, parts of a batch, what it
learns and saves, and what it refuses.
"""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform
from tiny_runs import ENVIRONMENT, ROOT

from crate_core.cli import main
from crate_core.data.sources import ArrayImages, ImageData
from crate_core.evaluation.finetune import (
    FinetuneResult,
    FinetuneTrainer,
    LabelledPictures,
    accuracy,
    finetune,
    finetune_seeds,
    layer_groups,
    paired_rows,
    picture_transform,
)
from crate_core.evaluation.finetune_recipe import FINETUNE_PRESETS, FinetuneConfig
from crate_core.evaluation.labels import class_count
from crate_core.keys import seeded
from crate_core.model.build import build_model, fresh_model, load_model
from crate_core.model.classifier import Classifier, ClassifierConfig, DropPath, pool
from crate_core.model.config import CrateMAEConfig, FrameConfig, ViTMAEConfig
from crate_core.training.devices import make_accelerator
from crate_core.training.loop import TrainingDivergedError
from crate_core.training.recipe import FROM_PRESET, Schedule, warmup_cosine
from crate_core.training.run_directory import RunDirectory
from crate_core.training.signals import TrainingStoppedError

CRATE = CrateMAEConfig.preset("digits", dim=16, depth=2, heads=2)
VIT = ViTMAEConfig(
    image_size=8, patch_size=2, channels=1, dim=16, depth=2, heads=2,
    decoder_dim=8, decoder_depth=1, decoder_heads=2,
)  # fmt: skip
BOTH = pytest.mark.parametrize("architecture", [CRATE, VIT], ids=["crate", "vit"])

QUICK: dict[str, Any] = {
    "epochs": 6.0,
    "batch_size": 20,
    "lr": 0.1,
    "layer_decay": 1.0,
    "augmentation": "none",
    "label_smoothing": 0.0,
    "device": "cpu",
}
WHOLE: dict[str, Any] = {
    "epochs": 3.0,
    "batch_size": 20,
    "drop_path": 0.3,
    "mixup": 0.8,
    "cutmix": 1.0,
    "augmentation": "crop_flip",
    "rand_augment": "rand-m9-mstd0.5-inc1",
    "erasing": 0.5,
    "log_every": 2,
    "checkpoint_every": 2,
    "device": "cpu",
}
"""All that is random in MAE's recipe, in nine steps."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bits are compared at one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def stripes(count: int, seed: int) -> ArrayImages:
    """Two classes that are told apart by where the bright rows are, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = 0.3 * torch.rand(count, 1, 8, 8, generator=generator)
    images[labels == 0, :, :4] += 0.5
    images[labels == 1, :, 4:] += 0.5
    return ArrayImages(images, labels.numpy().astype(np.int64))


STRIPES = ImageData(stripes(60, 0), stripes(40, 1), ("top", "bottom"), "stripes")


def config_of(directory: Path, **changes: Any) -> FinetuneConfig:
    return FinetuneConfig(
        "digits", **{**QUICK, "output_dir": str(directory), **changes}
    )


def run(
    directory: Path,
    architecture: FrameConfig = CRATE,
    data: ImageData = STRIPES,
    said: list[str] | None = None,
    **changes: Any,
) -> FinetuneResult:
    config = config_of(directory, **changes)
    lines: list[str] = [] if said is None else said
    model = fresh_model(architecture, 0)
    return finetune(config, False, lines.append, model=model, data=data)


# -- what it learns, and what is left on disk


@BOTH
def test_fine_tuning_learns_and_is_saved(
    architecture: FrameConfig, tmp_path: Path
) -> None:
    said: list[str] = []
    result = run(tmp_path, architecture, said=said)
    assert result.accuracy == result.best_accuracy == 1.0
    assert [record["epoch"] for record in result.curve] == [1, 2, 3, 4, 5, 6]
    assert result.curve[-1]["held_out_loss"] < 0.5 * result.curve[0]["held_out_loss"]
    assert "held-out accuracy   1.0000   on 40 pictures after the last step" in said
    loaded = Classifier.from_pretrained(tmp_path).eval()
    assert accuracy(loaded, STRIPES.held_out) == 1.0
    assert loaded.config.class_names == ("top", "bottom")
    # the best is the first epoch that nothing later was better than
    curve = [record["held_out_accuracy"] for record in result.curve]
    assert result.best_epoch == 1 + curve.index(max(curve))
    best = Classifier.from_pretrained(tmp_path / "best").eval()
    assert accuracy(best, STRIPES.held_out) == max(curve)
    # every tool opens the encoder; the decoder is what it was
    opened = load_model(tmp_path)
    images = opened.standardize(STRIPES.held_out.images)
    with torch.no_grad():
        logits = loaded.head(opened.forward_features(images)[:, 1:].mean(dim=1))
        assert torch.equal(logits, loaded(images))
    fresh = fresh_model(architecture, 0).state_dict()
    kept = [n for n in fresh if "decoder" in n or "prediction" in n]
    assert kept
    assert all(torch.equal(opened.state_dict()[name], fresh[name]) for name in kept)


@BOTH
@pytest.mark.parametrize("pooling", ["patch_mean", "class_token"])
def test_a_saved_classifier_gives_the_same_logits(
    architecture: FrameConfig, pooling: Any, tmp_path: Path
) -> None:
    model = Classifier(fresh_model(architecture, 0), 3, pooling, ("a", "b", "c")).eval()
    torch.nn.init.normal_(model.head.weight)
    model.save_pretrained(tmp_path)
    loaded = Classifier.from_pretrained(tmp_path).eval()
    images = torch.randn(5, 1, 8, 8)
    assert torch.equal(loaded(images), model(images))
    assert loaded.config == model.config
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_from_another_number_of_classes(tmp_path: Path) -> None:
    run(tmp_path / "two")
    labels = np.arange(60) % 3
    three = ImageData(
        ArrayImages(STRIPES.train.images, labels),
        ArrayImages(STRIPES.held_out.images, labels[:40]),
        (),
        "three",
    )
    config = config_of(
        tmp_path / "three", checkpoint=str(tmp_path / "two"), max_steps=2
    )
    finetune(config, False, str, data=three)
    loaded = Classifier.from_pretrained(tmp_path / "three")
    assert loaded.config.classes == 3
    assert loaded.head.weight.shape == (3, 16)
    # it went on from the first run's encoder
    before, after = load_model(tmp_path / "two"), loaded.autoencoder
    fresh = fresh_model(CRATE, 0)
    moved, far = (
        float((after.patch_embedding.weight - m.patch_embedding.weight).detach().norm())
        for m in (before, fresh)
    )
    assert moved < far


def test_from_scratch_is_the_seeds_network_at_one_rate(tmp_path: Path) -> None:
    fresh = fresh_model(CRATE, 3)
    other = fresh_model(CRATE, 0)
    scratch = config_of(tmp_path / "a", seed=3, from_scratch=True, layer_decay=0.5)
    plain = config_of(tmp_path / "b", seed=3, layer_decay=1.0)
    a = finetune(scratch, False, str, model=other, data=STRIPES)
    b = finetune(plain, False, str, model=fresh, data=STRIPES)
    assert a.curve == b.curve


def test_the_model_that_is_given_is_left_as_it_is(tmp_path: Path) -> None:
    model = fresh_model(CRATE, 0)
    finetune(config_of(tmp_path), False, str, model=model, data=STRIPES)
    fresh = fresh_model(CRATE, 0).state_dict()
    assert all(torch.equal(v, fresh[n]) for n, v in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_several_seeds_have_folders_of_their_own(tmp_path: Path) -> None:
    said: list[str] = []
    config = config_of(tmp_path, seeds=2, seed=4, epochs=1.0, warmup_ratio=0.3)
    model = fresh_model(CRATE, 0)
    results = finetune_seeds(config, False, said.append, model=model, data=STRIPES)
    assert [r.output_dir.name for r in results] == ["seed-4", "seed-5"]
    assert results[0].curve != results[1].curve
    assert said[-1].endswith("over 2 seeds")


# -- a step


@BOTH
@pytest.mark.parametrize("pooling", ["patch_mean", "class_token"])
def test_every_parameter_that_learns_gets_a_gradient_and_no_other(
    architecture: FrameConfig, pooling: Any
) -> None:
    model = Classifier(fresh_model(architecture, 0), 3, pooling)
    torch.nn.init.normal_(model.head.weight)  # at zero it would stop the gradient
    logits = model(torch.randn(6, 1, 8, 8))
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 0, 1, 2])).backward()
    with_gradient = {
        name
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }
    trained = {
        id(p) for group in layer_groups(model, 0.05, 0.75) for p in group["params"]
    }
    named = {name for name, p in model.named_parameters() if id(p) in trained}
    assert with_gradient == named
    assert {name.split(".")[1] for name in named - {"head.weight", "head.bias"}} == {
        "patch_embedding", "class_token", "encoder", "encoder_norm",
    }  # fmt: skip


def test_the_classifier_starts_at_chance_and_reads_what_it_says() -> None:
    tokens = torch.randn(2, 5, 3)
    torch.testing.assert_close(pool(tokens, "class_token"), tokens[:, 0])
    torch.testing.assert_close(pool(tokens, "patch_mean"), tokens[:, 1:].sum(dim=1) / 4)
    model = Classifier(fresh_model(CRATE, 0), 7)
    loss = F.cross_entropy(model(torch.randn(4, 1, 8, 8)), torch.tensor([0, 3, 5, 6]))
    assert float(loss.detach()) == pytest.approx(math.log(7))


@BOTH
def test_learning_rates_fall_by_layer_and_vectors_do_not_decay(
    architecture: FrameConfig,
) -> None:
    model = Classifier(fresh_model(architecture, 0), 2)
    names = {id(p): name for name, p in model.named_parameters()}
    by_name = {
        names[id(p)]: group
        for group in layer_groups(model, 0.05, 0.5)
        for p in group["params"]
    }
    # Depth 2: the embedding is three layers below the classifier.
    for name, group in by_name.items():
        first, _, rest = name.removeprefix("autoencoder.").partition(".")
        depth = {"patch_embedding": 0, "class_token": 0}.get(first, 3)
        depth = int(rest[0]) + 1 if first == "encoder" else depth
        assert group["lr_scale"] == 0.5 ** (3 - depth)
        vector = dict(model.named_parameters())[name].ndim == 1
        decays = not vector and first != "class_token"
        assert group["weight_decay"] == (0.05 if decays else 0.0)


def test_one_step_is_adamws_at_the_scheduled_rate(tmp_path: Path) -> None:
    # Two steps on all pictures, the first at rate zero: both have the same gradient.
    changes = {
        "batch_size": 60,
        "epochs": 2.0,
        "warmup_ratio": 0.75,
        "layer_decay": 0.5,
        "weight_decay": 0.3,
    }
    before = fresh_model(CRATE, 0)
    run(tmp_path, **changes)
    after = Classifier.from_pretrained(tmp_path)
    rate = warmup_cosine(1.0, 0.1 * 60 / 256, 1.5, 2.0)
    # With equal gradients AdamW moves every number by the rate.
    head = after.head.weight.detach()
    torch.testing.assert_close(
        head.abs(), torch.full_like(head, rate), rtol=1e-3, atol=0
    )
    # The classifier was zero, so the embedding has no gradient: its weight only decays,
    # its bias does not.
    embedding = after.autoencoder.patch_embedding
    decayed = before.patch_embedding.weight * (1 - 0.5**3 * rate * 0.3)
    torch.testing.assert_close(embedding.weight, decayed)
    assert not torch.equal(embedding.weight, before.patch_embedding.weight)
    assert torch.equal(embedding.bias, before.patch_embedding.bias)


def test_bfloat16_and_compilation_stay_close(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain")
    half = run(tmp_path / "half", precision="bf16")
    assert half.accuracy == plain.accuracy == 1.0
    assert half.train_loss == pytest.approx(plain.train_loss, abs=0.02)
    assert half.curve != plain.curve
    loaded = Classifier.from_pretrained(tmp_path / "half")
    assert all(p.dtype == torch.float32 for p in loaded.parameters())


@pytest.mark.processes
def test_a_compiled_run_drops_and_mixes_as_the_plain_one(tmp_path: Path) -> None:
    losses = []
    for compiled in (False, True):
        run(tmp_path / str(compiled), **{**WHOLE, "compile": compiled, "max_steps": 4})
        losses.append([line["loss"] for line in log(tmp_path / str(compiled))])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


# -- stochastic depth


@given(rate=st.floats(0.0, 0.9))
@settings(max_examples=25, deadline=None)
def test_dropped_branches_are_zero_and_the_mean_is_kept(rate: float) -> None:
    layer = DropPath(rate).train()
    layer.noise = (torch.arange(4000) + 0.5) / 4000
    x = torch.randn(1, 3, 2).expand(4000, 3, 2)
    y = layer(x)
    dropped = (y == 0).all(dim=(1, 2))
    assert torch.equal(dropped, (layer.noise < rate) & (x[0] != 0).any())
    torch.testing.assert_close(y.mean(dim=0), x[0], rtol=1e-2, atol=1e-5)
    assert torch.equal(layer.eval()(x), x)


@BOTH
def test_stochastic_depth_is_a_classifiers_and_in_training_alone(
    architecture: FrameConfig,
) -> None:
    model = Classifier(fresh_model(architecture, 0), 2)
    images = torch.randn(3, 1, 8, 8)
    names = list(model.state_dict())
    before = model.eval().autoencoder.forward_features(images)
    model.set_drop_path(0.5)
    per_layer = len(model.drop_paths()) // 2
    assert [m.rate for m in model.drop_paths()] == [0.0] * per_layer + [0.5] * per_layer
    assert list(model.state_dict()) == names
    assert torch.equal(model.autoencoder.forward_features(images), before)
    # the picture whose branches stay is scaled, the one whose branches go keeps the
    # rest: neither is what it was; a rate of zero changes nothing
    model.train()
    model.set_drop_noise(torch.tensor([[0.1, 0.9, 0.9]] * (2 * per_layer)))
    after = model.autoencoder.forward_features(images)
    assert not torch.allclose(after[0], before[0])
    model.set_drop_noise(torch.tensor([[0.9, 0.9, 0.9]] * (2 * per_layer)))
    kept = model.autoencoder.forward_features(images)
    assert torch.equal(kept[1:], after[1:])
    assert not torch.allclose(kept[0], after[0])
    assert not any(
        isinstance(m, DropPath) for m in fresh_model(architecture, 0).modules()
    )


# -- pictures


class Coloured(ArrayImages):
    """Pictures as PIL has them."""

    def decode(self, index: int) -> Image.Image:
        pixels = (255 * self.images[index]).byte().permute(1, 2, 0).numpy()
        return Image.fromarray(pixels)


def test_maes_augmentation_is_what_timm_makes_of_it() -> None:
    model = CrateMAEConfig.preset("cifar10-tiny")
    config = FinetuneConfig("imagenet-base")
    ours = picture_transform(config, model)
    theirs = create_transform(
        (3, 32, 32),
        is_training=True,
        color_jitter=None,
        auto_augment=config.rand_augment,
        interpolation="bicubic",
        re_prob=config.erasing,
        re_mode="pixel",
        mean=model.pixel_mean,
        std=model.pixel_std,
    )
    for operation in theirs.transforms[2].ops:  # Pillow refuses what ten asks for
        operation.magnitude_max = 9.99
    generator = torch.Generator().manual_seed(0)
    source = Coloured(torch.rand(20, 3, 40, 48, generator=generator))
    erased = 0
    for index in range(20):
        picture = source.read(index)
        with seeded(index):
            own = ours(picture)
        with seeded(index):
            expected = theirs(picture)
        torch.testing.assert_close(own, expected, rtol=1e-5, atol=1e-5)
        erased += float(own.abs().max()) > 2.5  # noise reaches further than pixels
    assert 0 < erased < 20


@pytest.mark.parametrize("augmentation", ["shift", "shift_flip"])
def test_shifted_pictures_are_shifts_and_flips(augmentation: Any) -> None:
    frame = CrateMAEConfig.preset(
        "digits", image_size=16, pixel_mean=(0.0,), pixel_std=(1.0,)
    )
    config = FinetuneConfig("digits", augmentation=augmentation, **{
        k: v for k, v in QUICK.items() if k != "augmentation"
    })  # fmt: skip
    image = torch.arange(256.0).reshape(1, 16, 16) / 255
    pictures = LabelledPictures(ArrayImages(image[None]), frame, config)
    seen = set()
    for epoch in range(250 if augmentation == "shift" else 400):
        moved = pictures.transform(image, epoch, 0)
        assert torch.equal(moved, pictures.transform(image, epoch, 0))
        found = [
            (down, right, flipped)
            for flipped, candidate in ((0, moved), (1, moved.flip(-1)))
            for down in range(-2, 3)
            for right in range(-2, 3)
            if torch.allclose(
                candidate[:, 2:-2, 2:-2],
                image[:, 2 + down : 14 + down, 2 + right : 14 + right],
            )
        ]
        assert len(found) == 1
        seen.update(found)
    assert len(seen) == (25 if augmentation == "shift" else 50)


def test_labels_follow_their_pictures(tmp_path: Path) -> None:
    config = config_of(tmp_path, augmentation="shift")
    pictures = LabelledPictures(STRIPES.train, CRATE, config)
    batch = pictures.__getitems__([(0, i) for i in range(60)])
    upper = batch.images[:, 0, :4].mean(dim=(1, 2)) > batch.images.mean(dim=(1, 2, 3))
    assert (upper.numpy() == (STRIPES.train.labels[batch.indices] == 0)).all()


@given(half=st.integers(1, 6), parts=st.sampled_from([1, 2, 3, 4]))
def test_parts_of_a_batch_hold_both_of_every_pair(half: int, parts: int) -> None:
    size = 2 * half * parts
    rows = [paired_rows(size, part, parts) for part in range(parts)]
    assert sorted(row for part in rows for row in part) == list(range(size))
    for part in rows:
        assert [size - 1 - row for row in part] == part[::-1]


# -- one run in parts, cut off, ended


def log(directory: Path) -> list[dict[str, Any]]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def first_gradient(directory: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """The gradient of the first step of a classifier that is not zero, by parameter."""
    config = config_of(directory, **{**WHOLE, **changes})
    trainer = FinetuneTrainer(
        config, STRIPES, RunDirectory(directory), make_accelerator(config), str, str,
        fresh_model(CRATE, 0),
    )  # fmt: skip
    with seeded(0):
        torch.nn.init.normal_(trainer.model.head.weight)
    taken: dict[str, torch.Tensor] = {}

    def take() -> None:
        own = trainer.model.named_parameters()
        taken.update({n: p.grad.clone() for n, p in own if p.grad is not None})

    trainer.optimizer.step = take  # type: ignore[method-assign, assignment]
    trainer.update(iter(trainer.batches()))
    return taken


@pytest.mark.parametrize("accumulate", [2, 5])
def test_micro_batches_are_the_whole_batch(tmp_path: Path, accumulate: int) -> None:
    one, many = (first_gradient(tmp_path, accumulate=n) for n in (1, accumulate))
    assert len(one) == len([n for n in one if Classifier.uses(n)]) > 10
    same_gradients(one, many)
    # pairs, weights and what is dropped matter: another seed's are another gradient
    other = first_gradient(tmp_path, seed=1)
    assert not torch.allclose(other["head.weight"], one["head.weight"], rtol=0.1)


def same_gradients(one: Any, many: Any) -> None:
    """Equal up to the order of sums."""
    assert one.keys() == many.keys()
    for name in one:
        scale = float(one[name].abs().max())
        torch.testing.assert_close(many[name], one[name], rtol=1e-4, atol=1e-5 * scale)


def test_a_run_is_a_function_of_its_seed(tmp_path: Path) -> None:
    def weights(name: str, seed: int, workers: int = 0) -> bytes:
        torch.rand(seed + 3)  # the global generator has no say
        np.random.rand(seed + 3)  # noqa: NPY002
        changes = {**WHOLE, "seed": seed, "workers": workers, "max_steps": 4}
        run(tmp_path / name, **changes)
        return (tmp_path / name / "model.safetensors").read_bytes()

    first = weights("a", 0)
    assert first == weights("b", 0)
    assert first == weights("c", 0, workers=1)
    assert first != weights("d", 1)


SAME = (
    "model.safetensors",
    "metrics.jsonl",
    "evaluation.jsonl",
    "best/model.safetensors",
)
"""Files that are equal for a cut and an uncut run."""


def contents(directory: Path) -> dict[str, bytes]:
    return {name: (directory / name).read_bytes() for name in SAME}


DRIVER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, "tests/evaluation")
import torch
import test_finetune as t
from crate_core.evaluation import finetune as tune
from crate_core.training import run_directory as runs

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def arm(moment):
    what, _, step = moment.partition("@")
    if what == "step":          # in the middle of a step
        original = tune.FinetuneTrainer.update
        def update(self, batch):
            return die() if self.step == int(step) else original(self, batch)
        tune.FinetuneTrainer.update = update
    elif what == "best":        # the best model is written, its checkpoint is not
        original = runs.RunDirectory.keep_best
        def keep_best(self, at, model):
            original(self, at, model)
            return die() if at == int(step) else None
        runs.RunDirectory.keep_best = keep_best
    elif what == "shown":       # the checkpoint is written, the folder not renewed
        runs.RunDirectory.show_best = die
    elif what == "finish":
        tune.write_json = die

for moment in sys.argv[2:]:
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        arm(moment)
        t.run(Path(sys.argv[1]), **t.WHOLE)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    print(moment, "killed" if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))
"""


@pytest.mark.processes
@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills need POSIX processes")
def test_a_killed_run_ends_with_the_bits_of_the_uncut_one(tmp_path: Path) -> None:
    run(tmp_path / "uncut", **WHOLE)
    moments = ["step@1", "best@3", "shown", "step@5", "step@8", "finish"]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path / "cut"), *moments, "none"],
        env={**ENVIRONMENT, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = [f"{moment} killed" for moment in moments]
    assert done.stdout.splitlines() == [*expected, "none 0"], done.stderr
    assert contents(tmp_path / "cut") == contents(tmp_path / "uncut")
    assert [p.name for p in (tmp_path / "cut" / "best").glob("step-*")] == [
        p.name for p in (tmp_path / "uncut" / "best").glob("step-*")
    ]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_ends_a_run_after_its_step_and_it_goes_on(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not hasattr(signal, name):
        pytest.skip(f"no {name} here")
    run(tmp_path / "uncut", **WHOLE)
    original = FinetuneTrainer.update

    def update(self: FinetuneTrainer, batch: Any) -> Any:
        if self.step == 4:
            signal.raise_signal(getattr(signal, name))
        return original(self, batch)

    with monkeypatch.context() as patched:
        patched.setattr(FinetuneTrainer, "update", update)
        with pytest.raises(
            TrainingStoppedError, match=f"{name} ended the run after step 5 of 9"
        ):
            run(tmp_path / "cut", **WHOLE)
    said: list[str] = []
    run(tmp_path / "cut", said=said, **WHOLE)
    assert "continuing after step 5 of 9" in said
    assert contents(tmp_path / "cut") == contents(tmp_path / "uncut")


TWO = """
import os, sys
from pathlib import Path
sys.path.insert(0, "tests/evaluation")
import torch
import test_finetune as t

from safetensors.torch import save_file

torch.set_num_threads(1)
directory = Path(sys.argv[1])
taken = t.first_gradient(directory / "gradient")
if os.environ["RANK"] == "0":
    save_file(taken, directory.parent / "gradient.safetensors")
t.run(directory, **t.WHOLE)
"""


@pytest.mark.processes
def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    one = run(tmp_path / "one", **WHOLE)
    script = tmp_path / "two.py"
    script.write_text(TWO)
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run(
        [sys.executable, *command, str(script), str(tmp_path / "two")],
        env={**ENVIRONMENT, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    same_gradients(
        first_gradient(tmp_path / "gradient"),
        load_file(tmp_path / "gradient.safetensors"),
    )
    # Of a classifier that starts at zero the first gradients of the layers are nothing
    # but rounding, which AdamW makes large.
    for a, b in zip(log(tmp_path / "one"), log(tmp_path / "two"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-2)
    lines = (tmp_path / "two" / "evaluation.jsonl").read_text().splitlines()
    assert [json.loads(x)["held_out_loss"] for x in lines] == pytest.approx(
        [record["held_out_loss"] for record in one.curve], rel=1e-2
    )
    # and one process goes on where two are: the run is the same
    said: list[str] = []
    run(tmp_path / "two", said=said, **WHOLE)
    assert any("9 steps are done; nothing was trained" in line for line in said)


# -- the command


def test_the_command_trains_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fresh_model(CRATE, 0).save_pretrained(tmp_path / "model")
    command = ["finetune", "--checkpoint", "model", "--preset", "digits"]
    command += ["--data", "digits", "--output-dir", "out", "--device", "cpu"]
    assert main([*command, "--max-steps", "3"]) == 0
    assert main([*command, "--max-steps", "5"]) == 0
    said = capsys.readouterr().out
    assert "classifier: 10 classes, 1,994 parameters that learn" in said
    assert "continuing after step 3 of 5" in said
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"] == 5
    assert summary["command"].startswith("crate finetune --checkpoint model")
    assert main([*command, "--max-steps", "5", "--lr", "0.5"]) == 2
    assert "lr (there 0.008, now 0.5)" in capsys.readouterr().err
    # another checkpoint's weights are another run, whatever the name
    fresh_model(CRATE, 1).save_pretrained(tmp_path / "model")
    assert main([*command, "--max-steps", "5"]) == 2
    assert "starting weights" in capsys.readouterr().err


# -- recipes


def test_presets_say_every_field_that_they_fix() -> None:
    wanted = {f.name for f in fields(FinetuneConfig) if f.default is FROM_PRESET}
    for name, preset in FINETUNE_PRESETS.items():
        assert set(preset.fields) == wanted, name
        config = FinetuneConfig(name)
        assert FinetuneConfig.from_preset(name) == config
        assert FinetuneConfig.from_dict(config.to_dict()) == config
        assert config.output_dir == f"runs/{name}-finetuned"


def test_the_imagenet_recipes_are_maes() -> None:
    base, large = (FinetuneConfig(f"imagenet-{size}") for size in ("base", "large"))
    for config in (base, large):
        assert (config.mixup, config.cutmix, config.erasing) == (0.8, 1.0, 0.25)
        assert config.rand_augment == "rand-m9-mstd0.5-inc1"
        assert (config.weight_decay, config.label_smoothing) == (0.05, 0.1)
        assert config.warmup_epochs == pytest.approx(5)
        assert config.batch_size == 1024
    assert (base.epochs, base.peak_lr) == (100, pytest.approx(2e-3))
    assert (base.layer_decay, base.drop_path) == (0.65, 0.1)
    assert (large.epochs, large.peak_lr) == (50, pytest.approx(4e-3))
    assert (large.layer_decay, large.drop_path) == (0.75, 0.2)
    steps = Schedule(base, 1_281_167).steps
    assert steps == math.ceil(100 * 1_281_167 / 1024)


# -- what cannot be


class Damaged(ArrayImages):
    """One picture in thirty cannot be read."""

    def decode(self, index: int) -> torch.Tensor:
        if index % 30 == 7:
            raise OSError("damaged")
        return super().decode(index)


def test_pictures_that_cannot_be_read_are_named_and_leave_the_denominator(
    tmp_path: Path,
) -> None:
    train, held_out = (
        Damaged(part.images, part.labels) for part in (STRIPES.train, STRIPES.held_out)
    )
    data = replace(STRIPES, train=train, held_out=held_out)
    said: list[str] = []
    result = run(tmp_path, data=data, said=said)
    assert (result.held_out, result.unreadable) == (38, 2)
    assert any("on 38 pictures after the last step" in line for line in said)
    assert [n.split(":")[0] for n in result.held_out_unreadable] == [
        "picture 7",
        "picture 37",
    ]
    assert sum("skipped an unreadable picture" in line for line in said) == 2
    with pytest.warns(UserWarning, match="2 of 40"):
        share = accuracy(Classifier.from_pretrained(tmp_path), held_out)
    assert share == result.accuracy
    with pytest.raises(ValueError, match="2 of 40 held-out pictures cannot be read"):
        run(tmp_path / "strict", data=replace(data, train=STRIPES.train),
            max_unreadable=0.02)  # fmt: skip


def test_compiling_without_a_compiler_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder = pytest.importorskip("torch._inductor.cpp_builder")
    error = pytest.importorskip("torch._inductor.exc").InvalidCxxCompiler

    def none() -> str:
        raise error

    monkeypatch.setattr(builder, "get_cpp_compiler", none)
    with pytest.raises(ValueError, match="C\\+\\+ compiler"):
        run(tmp_path, compile=True)


def test_a_loss_that_is_not_finite_stops(tmp_path: Path) -> None:
    pictures = torch.full_like(STRIPES.train.images, math.nan)
    broken = replace(STRIPES, train=ArrayImages(pictures, STRIPES.train.labels))
    with pytest.raises(
        TrainingDivergedError, match=r"the loss is nan at step 1 .*lear"
    ):
        run(tmp_path, data=broken)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"epochs": 0.0}, "epochs=0.0"),
        ({"lr": math.inf}, "lr=inf"),
        ({"warmup_ratio": 1.0}, r"warmup_ratio=1.0: accepted is a share in \[0, 1\)"),
        ({"layer_decay": 1.5}, "layer_decay=1.5"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"drop_path": 1.0}, "drop_path=1.0"),
        ({"mixup": -0.1}, "mixup=-0.1"),
        ({"erasing": 1.5}, "erasing=1.5"),
        (
            {"rand_augment": "strong"},
            "rand_augment='strong': accepted is None, or a na",
        ),
        ({"mixup": 0.8, "batch_size": 5}, "batch_size=5: accepted is a multiple of 2"),
        ({"cutmix": 1.0, "batch_size": 10, "accumulate": 5}, None),
        ({"cutmix": 1.0, "batch_size": 6, "accumulate": 2}, "a multiple of 4"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"seeds": 0}, "seeds=0"),
        ({"max_unreadable": 1.5}, "max_unreadable=1.5"),
    ],
)
def test_values_out_of_range_are_named(
    changes: dict[str, Any], message: str | None
) -> None:
    if message is None:
        assert FinetuneConfig("digits", **changes).mixes
        return
    with pytest.raises(ValueError, match=message):
        FinetuneConfig("digits", **changes)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "imagenet"}, "accepted is digits, cifar10, imagenet-small"),
        ({"pooling": "max"}, "patch_mean or class_token"),
        ({"augmentation": "mixup"}, "none, shift, shift_flip or crop_flip"),
        ({"precision": "fp8"}, "fp32, bf16 or fp16"),
        ({"from_scratch": "yes"}, "True or False"),
    ],
)
def test_choices_that_do_not_exist_are_named(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**changes)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": 1}, "classes=1"),
        ({"pooling": "max"}, "pooling='max'"),
        ({"class_names": ("a",)}, "accepted is 3 names, or none"),
        ({"model_type": "crate-mae"}, "of type 'crate-mae', accepted: 'classifier'"),
        ({"heads": 3}, "a classifier's are"),
    ],
)
def test_a_classifiers_configuration_is_checked(
    changes: dict[str, Any], message: str
) -> None:
    plain = {"model": CRATE.to_dict(), "classes": 3}
    assert ClassifierConfig.from_dict(plain).to_dict()["classes"] == 3
    with pytest.raises(ValueError, match=message):
        ClassifierConfig.from_dict({**plain, **changes})


def test_a_directory_of_another_kind_is_named(tmp_path: Path) -> None:
    build_model(CRATE).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'crate-mae', accepted: 'classifier'"):
        Classifier.from_pretrained(tmp_path)


def with_labels(
    train: list[int] | None, held_out: list[int] | None, classes: tuple[str, ...] = ()
) -> ImageData:
    def part(labels: list[int] | None) -> ArrayImages:
        return ArrayImages(
            torch.zeros(len(labels or [0]), 1, 8, 8),
            None if labels is None else np.array(labels),
        )

    return ImageData(part(train), part(held_out), classes, "")


def test_classes_are_counted() -> None:
    assert class_count(with_labels([0, 1, 2], [2, 2])) == 3
    assert class_count(with_labels([0, 2], [2], ("a", "b", "c", "d"))) == 4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (with_labels(None, [0]), "these training pictures have none"),
        (with_labels([0, 1], None), "these held-out pictures have none"),
        (with_labels([0, 1], [-1, -1]), "label -1 of a held-out picture"),
        (
            with_labels([0, 1], [0, 2, 3]),
            "2 classes that no training picture has, such as 2: 3 classes held "
            "out, 2 to",
        ),
        (with_labels([0, 0], [0]), "at least two classes"),
        (
            with_labels([0, 5], [0], ("a", "b")),
            "label 5 is out of range: the data names 2 classes",
        ),
    ],
)
def test_labels_that_cannot_be_learned(
    tmp_path: Path, data: ImageData, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, data=data)
