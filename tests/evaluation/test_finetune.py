"""Fine-tuning: what is trained and how fast, determinism, what it learns, and what it
refuses.
"""

import copy
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_core.data.batches import StepBatches, UnreadablePictureWarning
from crate_core.data.sources import ArrayImages, ImageData
from crate_core.data.transforms import augmented
from crate_core.evaluation.finetune import (
    Classifier,
    FinetuneConfig,
    LabelledPictures,
    accuracy,
    finetune,
    layer_groups,
    pool,
    shifted,
)
from crate_core.evaluation.labels import class_count
from crate_core.keys import Stream, random_key
from crate_core.model.build import fresh_model, load_model
from crate_core.model.config import CrateMAEConfig, FrameConfig, ViTMAEConfig
from crate_core.training.pretrain import TrainingDivergedError
from crate_core.training.recipe import warmup_cosine

CRATE = CrateMAEConfig.preset("digits", dim=16, depth=2, heads=2)
VIT = ViTMAEConfig(
    image_size=8,
    patch_size=2,
    channels=1,
    dim=16,
    depth=2,
    heads=2,
    decoder_dim=8,
    decoder_depth=1,
    decoder_heads=2,
)
BOTH = pytest.mark.parametrize("architecture", [CRATE, VIT], ids=["crate", "vit"])
QUICK = FinetuneConfig(
    epochs=6.0,
    batch_size=20,
    lr=0.1,
    layer_decay=1.0,
    augmentation="none",
    label_smoothing=0.0,
)


def stripes(count: int, seed: int) -> ArrayImages:
    """Two classes that are told apart by where the bright rows are, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = 0.3 * torch.rand(count, 1, 8, 8, generator=generator)
    images[labels == 0, :, :4] += 0.5
    images[labels == 1, :, 4:] += 0.5
    return ArrayImages(images, labels.numpy().astype(np.int64))


STRIPES = ImageData(stripes(60, 0), stripes(40, 1), ("top", "bottom"), "stripes")


@BOTH
def test_fine_tuning_learns_and_is_saved(
    architecture: FrameConfig, tmp_path: Any
) -> None:
    lines: list[str] = []
    model = fresh_model(architecture, 0)
    decoder = {
        k: v.clone()
        for k, v in model.state_dict().items()
        if "decoder" in k or "prediction" in k
    }
    result = finetune(model, STRIPES, QUICK, lines.append)
    assert result.accuracy == 1.0 == accuracy(result.classifier, STRIPES.held_out)
    assert [record["epoch"] for record in result.curve] == [1, 2, 3, 4, 5, 6]
    assert result.curve[-1]["loss"] < 0.5 * result.curve[0]["loss"]
    assert len(lines) == 7
    assert "held-out accuracy 1.0000 on 40 pictures" in lines[-1]
    # The encoder can be opened as a model, and its decoder is what it was.
    model.save_pretrained(tmp_path)
    opened = load_model(tmp_path)
    images = opened.standardize(STRIPES.held_out.images)
    with torch.no_grad():
        logits = result.classifier.head(
            opened.forward_features(images)[:, 1:].mean(dim=1)
        )
    torch.testing.assert_close(logits, result.classifier.eval()(images))
    assert all(
        torch.equal(opened.state_dict()[name], value) for name, value in decoder.items()
    )


@BOTH
@pytest.mark.parametrize("pooling", ["patch_mean", "class_token"])
def test_every_parameter_that_is_trained_gets_a_gradient_and_no_other(
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


def test_learning_rates_fall_by_layer_and_vectors_do_not_decay() -> None:
    model = Classifier(fresh_model(CRATE, 0), 2)
    names = {id(p): name for name, p in model.named_parameters()}
    by_name = {
        names[id(p)]: group
        for group in layer_groups(model, 0.05, 0.5)
        for p in group["params"]
    }
    # Depth 2: the embedding is three layers below the classifier.
    assert by_name["autoencoder.patch_embedding.weight"]["scale"] == 0.5**3
    assert by_name["autoencoder.class_token"]["scale"] == 0.5**3
    assert by_name["autoencoder.encoder.0.sparsify.weight"]["scale"] == 0.5**2
    assert by_name["autoencoder.encoder.1.sparsify.weight"]["scale"] == 0.5
    assert (
        by_name["autoencoder.encoder_norm.weight"]["scale"]
        == by_name["head.weight"]["scale"]
        == 1.0
    )
    for name, parameter in model.named_parameters():
        if name in by_name:
            assert by_name[name]["weight_decay"] == (
                0.05 if parameter.ndim > 1 else 0.0
            )


def test_one_step_is_adamws_at_the_scheduled_rate() -> None:
    # Two steps on all pictures, the first at rate zero: both have the same gradient.
    config = replace(
        QUICK,
        batch_size=60,
        epochs=2.0,
        warmup_ratio=0.75,
        layer_decay=0.5,
        weight_decay=0.3,
    )
    model = fresh_model(CRATE, 0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    head = finetune(model, STRIPES, config).classifier.head.weight.detach()
    rate = warmup_cosine(1.0, config.lr * config.batch_size / 256, 1.5, 2.0)
    # With equal gradients AdamW moves every number by the rate.
    torch.testing.assert_close(
        head.abs(), torch.full_like(head, rate), rtol=1e-3, atol=0
    )
    # The classifier was zero, so the embedding has no gradient: its weight only decays,
    # its bias does not.
    embedding = model.patch_embedding
    decayed = before["patch_embedding.weight"] * (1 - 0.5**3 * rate * 0.3)
    torch.testing.assert_close(embedding.weight.detach(), decayed)
    assert not torch.equal(embedding.weight, before["patch_embedding.weight"])
    assert torch.equal(embedding.bias, before["patch_embedding.bias"])


def test_a_run_is_a_function_of_its_seed() -> None:
    def weights(seed: int, workers: int = 0) -> torch.Tensor:
        model = fresh_model(CRATE, 0)
        config = replace(
            QUICK,
            epochs=1.5,
            warmup_ratio=1 / 3,
            augmentation="shift_flip",
            seed=seed,
            workers=workers,
        )
        torch.rand(seed + 3)  # the global generator has no say
        return finetune(model, STRIPES, config).classifier.head.weight.detach()

    assert torch.equal(weights(0), weights(0))
    assert torch.equal(weights(0), weights(0, workers=1))
    assert not torch.equal(weights(0), weights(1))


def test_bfloat16_and_compilation_stay_close() -> None:
    plain = finetune(fresh_model(CRATE, 0), STRIPES, QUICK)
    half = finetune(fresh_model(CRATE, 0), STRIPES, replace(QUICK, precision="bf16"))
    assert half.accuracy == plain.accuracy == 1.0
    assert half.curve[0]["loss"] == pytest.approx(plain.curve[0]["loss"], rel=0.05)
    assert half.curve != plain.curve
    assert all(p.dtype == torch.float32 for p in half.classifier.parameters())


@given(key=st.integers(0, 2**62))
@settings(max_examples=25)
def test_shifted_pictures_are_shifts_and_flips(key: int) -> None:
    image = torch.arange(3 * 16 * 24, dtype=torch.float32).reshape(3, 16, 24)
    moved = shifted(image, key)
    assert moved.shape == image.shape
    assert torch.equal(moved, shifted(image, key))
    for candidate in (moved, moved.flip(-1)):
        # Two rows and three columns at most: the middle of the result is a window of
        # the original.
        middle = candidate[:, 2:-2, 3:-3]
        for down in range(-2, 3):
            for right in range(-3, 4):
                if torch.equal(
                    middle, image[:, 2 + down : 14 + down, 3 + right : 21 + right]
                ):
                    return
    pytest.fail("not a shift")


def test_all_shifts_and_both_flips_come_up() -> None:
    image = torch.arange(64.0).reshape(1, 8, 8)
    seen = {tuple(shifted(image, key)[0, 3, 3:5].tolist()) for key in range(400)}
    assert len(seen) == 18  # three rows, three columns, two flips


@pytest.mark.parametrize("augmentation", ["none", "crop_flip", "shift_flip"])
def test_augmentation_is_what_it_says(augmentation: Any) -> None:
    config = replace(QUICK, augmentation=augmentation, seed=3)
    pictures = LabelledPictures(STRIPES.train, fresh_model(CRATE, 0), config)
    (image,) = pictures.__getitems__([(2, 5)]).images
    key = random_key(3, Stream.AUGMENT, 2, 5)
    original = STRIPES.train.images[5]
    expected = {
        "none": original,
        "crop_flip": augmented(original, (8, 8), 1, key),
        "shift_flip": shifted(original, key),
    }[augmentation]
    assert torch.equal(image, expected)


def test_labels_follow_their_pictures() -> None:
    # One class's pictures are unreadable in name only: order and labels come from the
    # same indices.
    batches = list(StepBatches(60, 20, 0, 0, 3))
    seen = LabelledPictures(STRIPES.train, fresh_model(CRATE, 0), QUICK).__getitems__(
        batches[0]
    )
    labels = STRIPES.train.labels[seen.indices]
    assert (
        (seen.images[:, 0, :4].mean(dim=(1, 2)) > 0.4).numpy() == (labels == 0)
    ).all()


class Damaged(ArrayImages):
    """One picture in thirty cannot be read."""

    def decode(self, index: int) -> torch.Tensor:
        if index % 30 == 7:
            raise OSError("damaged")
        return super().decode(index)


def test_pictures_that_cannot_be_read_are_named_and_leave_the_denominator() -> None:
    train, held_out = (
        Damaged(part.images, part.labels) for part in (STRIPES.train, STRIPES.held_out)
    )
    data = replace(STRIPES, train=train, held_out=held_out)
    lines: list[str] = []
    with pytest.warns(UnreadablePictureWarning) as caught:
        result = finetune(fresh_model(CRATE, 0), data, QUICK, lines.append)
    said = [str(w.message) for w in caught if w.category is UnreadablePictureWarning]
    assert [line.split(" cannot")[0] for line in said] == [
        "2 of 40 held-out pictures",
        "2 of 60 training pictures",
    ]
    assert result.held_out == 38
    assert lines[-1].endswith("on 38 pictures")
    # both parts have a picture 7 and a picture 37
    assert [name.split(":")[0] for name in result.unreadable] == 2 * [
        "picture 7",
        "picture 37",
    ]
    assert result.to_dict()["held_out"] == 38
    with pytest.warns(UnreadablePictureWarning, match="2 of 40"):
        share = accuracy(result.classifier, held_out)
    assert (share * 38) % 1 == pytest.approx(0, abs=1e-9)


def test_too_many_that_cannot_be_read_are_found_before_the_first_step() -> None:
    data = replace(
        STRIPES, held_out=Damaged(STRIPES.held_out.images, STRIPES.held_out.labels)
    )
    model = fresh_model(CRATE, 0)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"held-out pictures .* cannot be read"):
        finetune(model, data, replace(QUICK, max_unreadable=0.02))
    assert all(torch.equal(model.state_dict()[n], before[n]) for n in before)


def test_compiling_without_a_compiler_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    builder = pytest.importorskip("torch._inductor.cpp_builder")
    error = pytest.importorskip("torch._inductor.exc").InvalidCxxCompiler

    def none() -> str:
        raise error

    monkeypatch.setattr(builder, "get_cpp_compiler", none)
    with pytest.raises(ValueError, match="C\\+\\+ compiler"):
        finetune(fresh_model(CRATE, 0), STRIPES, replace(QUICK, compile=True))


def test_a_loss_that_is_not_finite_stops() -> None:
    pictures = STRIPES.train.images.clone()
    pictures[:] = math.nan
    broken = ImageData(
        ArrayImages(pictures, STRIPES.train.labels), STRIPES.held_out, (), ""
    )
    with pytest.raises(TrainingDivergedError, match=r"nan at step 1 \(learning rate"):
        finetune(fresh_model(CRATE, 0), broken, QUICK)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"epochs": 0.0}, "epochs=0.0"),
        ({"lr": math.inf}, "lr=inf"),
        ({"warmup_ratio": 1.0}, r"warmup_ratio=1.0: accepted is a share in \[0, 1\)"),
        ({"layer_decay": 1.5}, "layer_decay=1.5"),
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"betas": (0.9, 1.0)}, "betas="),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"max_unreadable": 1.5}, "max_unreadable=1.5"),
    ],
)
def test_values_out_of_range_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**fields)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pooling": "max"}, "patch_mean or class_token"),
        ({"augmentation": "mixup"}, "none, crop_flip or shift_flip"),
        ({"precision": "fp16"}, "fp32 or bf16"),
    ],
)
def test_choices_that_do_not_exist_are_named(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        FinetuneConfig(**fields)


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
            "2 classes that no training picture has, such as 2: 3 classes held out, 2 to",
        ),
        (with_labels([0, 0], [0]), "at least two classes"),
        (
            with_labels([0, 5], [0], ("a", "b")),
            "label 5 is out of range: the data names 2 classes",
        ),
    ],
)
def test_labels_that_cannot_be_learned(data: ImageData, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        finetune(fresh_model(CRATE, 0), data, QUICK)
