"""Linear probes with their controls, reconstruction by masking ratio, pictures, and the
record of an evaluation.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import crate_core.evaluation.evaluate
import crate_core.evaluation.probe
from crate_core.cli import main
from crate_core.data.batches import UnreadablePictureWarning, some_pictures
from crate_core.data.named import open_data
from crate_core.data.sources import ArrayImages, FileImages, ImageData, SelectedImages
from crate_core.evaluation.evaluate import (
    EVALUATION_FILE,
    evaluate,
    run_data,
    save_evaluation,
    table,
)
from crate_core.evaluation.features import PIXEL_SIDE, encode, small_pixels
from crate_core.evaluation.finetune import finetune
from crate_core.evaluation.finetune_recipe import FinetuneConfig
from crate_core.evaluation.labels import few_labels
from crate_core.evaluation.probe import (
    INVERSE_REGULARIZATION,
    Score,
    fit_probe,
    linear_probes,
    probe_accuracy,
    probe_pipeline,
)
from crate_core.keys import evaluation_noise, mask_noise
from crate_core.model.build import build_model, fresh_model
from crate_core.model.config import CrateMAEConfig, ViTMAEConfig
from crate_core.model.crate import CrateMAE
from crate_core.training.yardsticks import (
    held_out_loss,
    reconstruction_by_ratio,
    reconstruction_rows,
    removed_pixels,
    save_reconstructions,
)

ROOT = Path(__file__).resolve().parents[2]
TINY = CrateMAEConfig.preset("digits", dim=16, depth=1, heads=2)


@pytest.fixture
def model() -> CrateMAE:
    torch.manual_seed(0)
    return CrateMAE(TINY)


def stripes(count: int, seed: int) -> ArrayImages:
    """Two classes that are told apart by where the bright rows are, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    images = 0.3 * torch.rand(count, 1, 8, 8, generator=generator)
    images[labels == 0, :, :4] += 0.5
    images[labels == 1, :, 4:] += 0.5
    return ArrayImages(images, labels.numpy().astype(np.int64))


STRIPES = ImageData(stripes(60, 0), stripes(40, 1), ("top", "bottom"), "stripes")


# -- features and probes


def test_features_are_the_encoders_whatever_the_batch_size(model: CrateMAE) -> None:
    source = stripes(11, 0)
    model.train()
    features = encode(model, source, batch_size=4)
    assert model.training
    with torch.no_grad():
        tokens = model.forward_features(model.standardize(source.images)).numpy()
    np.testing.assert_allclose(features.class_token, tokens[:, 0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        features.patch_mean, tokens[:, 1:].mean(axis=1), rtol=1e-4, atol=1e-6
    )
    np.testing.assert_array_equal(features.pixels, source.images.flatten(1).numpy())
    np.testing.assert_array_equal(features.labels, source.labels)


def test_unreadable_pictures_leave_the_features_with_their_labels(
    model: CrateMAE, tmp_path: Path
) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(paths):
        Image.new("L", (8, 8), 50 * i).save(path)
    paths[2].write_bytes(b"x")
    source = FileImages(paths, np.arange(5))
    with pytest.warns(UnreadablePictureWarning, match=r"1 of 5 .*left out.*2\.png"):
        features = encode(model, source, max_unreadable=0.2)
    assert len(features.unreadable) == 1
    assert str(paths[2]) in features.unreadable[0]
    assert features.indices.tolist() == [0, 1, 3, 4]
    assert features.labels.tolist() == [0, 1, 3, 4]
    np.testing.assert_allclose(
        features.pixels[:, 0], [0, 50 / 255, 150 / 255, 200 / 255]
    )
    with pytest.raises(ValueError, match=r"1 of 5 pictures \(20\.0%\).*max_unreadable"):
        encode(model, source, max_unreadable=0.19)
    with pytest.raises(ValueError, match="none of 1 pictures can be read"):
        encode(model, SelectedImages(source, np.array([2])), max_unreadable=1.0)


def test_probes_judge_what_can_be_read_and_name_the_rest(model: CrateMAE) -> None:
    class Damaged(ArrayImages):
        def decode(self, index: int) -> torch.Tensor:
            if index % 25 == 0:
                raise OSError("damaged")
            return super().decode(index)

    data = replace(STRIPES, held_out=Damaged(*vars(STRIPES.held_out).values()))
    with pytest.warns(UnreadablePictureWarning, match=r"2 of 40 held-out") as caught:
        scores = linear_probes(model, data, seeds=[0])
    assert sum(w.category is UnreadablePictureWarning for w in caught) == 1
    kept = SelectedImages(
        STRIPES.held_out, np.array([i for i in range(40) if i % 25 != 0])
    )
    expected = linear_probes(model, replace(STRIPES, held_out=kept), seeds=[0])
    assert scores == expected
    with pytest.raises(ValueError, match=r"held-out pictures.*max_unreadable"):
        linear_probes(model, data, seeds=[0], max_unreadable=0.01)


def test_pixels_of_large_pictures_are_averaged() -> None:
    images = torch.rand(2, 3, 64, 96)
    expected = (
        images.reshape(2, 3, PIXEL_SIDE, 2, PIXEL_SIDE, 3).mean(dim=(3, 5)).flatten(1)
    )
    torch.testing.assert_close(small_pixels(images), expected)


def test_few_labels_are_a_draw_of_each_class() -> None:
    labels = np.repeat([3, 5, 9], [8, 20, 6])
    chosen = few_labels(labels, 5, seed=0)
    assert len(set(chosen)) == 15
    assert np.unique(labels[chosen], return_counts=True)[1].tolist() == [5, 5, 5]
    assert (
        chosen.tolist()
        == few_labels(labels, 5, seed=0).tolist()
        != few_labels(labels, 5, seed=1).tolist()
    )
    with pytest.raises(ValueError, match="class 9 has 6 training pictures, 7 labels"):
        few_labels(labels, 7, seed=0)


def test_a_probe_separates_what_is_separable_and_nothing_else() -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(600) % 3
    centres = 4 * np.eye(3)[labels]
    separable = centres + generator.normal(size=(600, 3))
    noise = generator.normal(size=(600, 3))
    good = probe_accuracy(
        separable[:300], labels[:300], separable[300:], labels[300:], seed=0
    )
    none = probe_accuracy(noise[:300], labels[:300], noise[300:], labels[300:], seed=0)
    # Bayes accuracy of three unit Gaussians at distance 4 sqrt(2) is above 0.99; chance
    # is 1/3 +- 0.027.
    assert good > 0.97
    assert abs(none - 1 / 3) < 0.1


def test_regularisation_is_chosen_by_validation() -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(80) % 2
    # Many columns of noise and one that tells a little: weak regularisation overfits.
    noisy = generator.normal(size=(80, 400))
    noisy[:, 0] += 2 * labels
    assert fit_probe(noisy, labels, seed=0)[1] < max(INVERSE_REGULARIZATION)
    # A boundary that needs large weights: two columns whose small difference is the
    # class.
    base = generator.normal(size=(600, 1))
    classes = np.arange(600) % 2
    fine = np.hstack([base, base + 0.005 * (2 * classes[:, None] - 1)])
    assert fit_probe(fine, classes, seed=0)[1] == max(INVERSE_REGULARIZATION)


def test_probes_stand_beside_their_controls(model: CrateMAE) -> None:
    scores = linear_probes(model, STRIPES, seeds=[0, 1], labels_per_class=4)
    assert list(scores) == [
        "trained, class token",
        "trained, mean of patches",
        "untrained, class token",
        "untrained, mean of patches",
        "raw pixels",
    ]
    for columns in scores.values():
        assert list(columns) == ["all labels", "4 labels a class"]
        assert all(len(score.accuracies) == 2 for score in columns.values())
    assert scores["raw pixels"]["all labels"].mean == 1.0
    own = probe_accuracy(
        encode(model, STRIPES.train).class_token,
        STRIPES.train.labels,
        encode(model, STRIPES.held_out).class_token,
        STRIPES.held_out.labels,
        seed=1,
        labels_per_class=4,
    )
    assert scores["trained, class token"]["4 labels a class"].accuracies[1] == own


def test_the_untrained_control_has_fresh_weights_and_leaves_the_random_state(
    model: CrateMAE,
) -> None:
    before = torch.get_rng_state()
    one, same, other = fresh_model(TINY, 0), fresh_model(TINY, 0), fresh_model(TINY, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.patch_embedding.weight, same.patch_embedding.weight)
    assert not torch.equal(one.patch_embedding.weight, other.patch_embedding.weight)
    assert not torch.equal(one.patch_embedding.weight, model.patch_embedding.weight)


@pytest.mark.parametrize(
    ("labels", "per_class", "message"),
    [
        (None, 5, "labels are needed"),
        ([0] * 60, 5, "at least two classes"),
        ([0] * 57 + [1] * 3, 5, "class 1 has 3 training pictures, labels_per_class=5"),
        ([0, 1] * 30, 1, "labels_per_class=1"),
    ],
)
def test_labels_that_cannot_be_probed(
    model: CrateMAE, labels: list[int] | None, per_class: int, message: str
) -> None:
    train = ArrayImages(
        STRIPES.train.images, None if labels is None else np.array(labels)
    )
    with pytest.raises(ValueError, match=message):
        linear_probes(model, ImageData(train, STRIPES.held_out, (), ""), [0], per_class)


def test_score_spread_is_the_sample_standard_deviation() -> None:
    assert Score((0.5, 0.7, 0.9)).std == pytest.approx(0.2)
    assert Score((0.5,)).std == 0.0
    assert json.loads(json.dumps(Score((0.5, 1.0)).to_dict())) == {
        "mean": 0.75,
        "std": pytest.approx(math.sqrt(0.125)),
        "accuracies": [0.5, 1.0],
    }


# -- reconstruction


@pytest.mark.parametrize("normalize", [False, True])
def test_reconstruction_scores_are_their_definitions(normalize: bool) -> None:
    torch.manual_seed(1)
    model = CrateMAE(
        CrateMAEConfig.preset(
            "digits", dim=16, depth=1, heads=2, normalize_targets=normalize
        )
    )
    images = stripes(30, 3).images
    mean = images.mean(dim=0)
    (score,) = reconstruction_by_ratio(model, images, mean, [0.5], seed=2, batch_size=7)
    noise = evaluation_noise(2, 30, 16)
    with torch.no_grad():
        out = model(model.standardize(images), 0.5, noise)
        predicted = model.unstandardize(
            model.reconstruct(model.standardize(images), 0.5, noise).predicted
        )
    mask = removed_pixels(out.mask, model.config).bool()
    error = (predicted.clamp(0, 1) - images)[mask].double().square().mean()
    assert score.psnr == pytest.approx(-10 * math.log10(error), abs=1e-4)
    trivial = (mean.expand_as(images) - images)[mask].double().square().mean()
    assert score.mean_picture_psnr == pytest.approx(-10 * math.log10(trivial), abs=1e-4)
    assert score.loss == pytest.approx(float(out.loss), rel=1e-5)
    assert held_out_loss(model, images, 0.5, seed=2, batch_size=11) == pytest.approx(
        score.loss, rel=1e-5
    )
    # batches that come one after the other have the masks of the whole
    by_sizes = images.split([1, 13, 16])
    assert held_out_loss(model, iter(by_sizes), 0.5, seed=2) == pytest.approx(
        score.loss, rel=1e-5
    )
    (again,) = reconstruction_by_ratio(model, iter(by_sizes), mean, [0.5], seed=2)
    assert again.psnr == pytest.approx(score.psnr, abs=1e-4)


def test_removed_pixels_are_those_of_removed_patches() -> None:
    config = CrateMAEConfig.preset("digits", image_size=(4, 6))
    mask = torch.tensor([[1.0, 0, 0, 0, 0, 1]])
    expected = torch.zeros(1, 1, 4, 6)
    expected[..., :2, :2] = expected[..., 2:, 4:] = 1
    assert torch.equal(removed_pixels(mask, config), expected)


@pytest.mark.parametrize("ratio", [0.0, 0.97, 1.0])
def test_a_ratio_that_removes_nothing_or_all_is_refused(
    model: CrateMAE, ratio: float
) -> None:
    images = stripes(4, 0).images
    with pytest.raises(
        ValueError, match="must leave some of 16 patches visible and remove some"
    ):
        reconstruction_by_ratio(model, images, images.mean(dim=0), [ratio])


@pytest.mark.parametrize("normalize", [False, True])
def test_pictures_show_input_prediction_and_original(
    normalize: bool, tmp_path: Path
) -> None:
    torch.manual_seed(1)
    model = CrateMAE(
        CrateMAEConfig.preset(
            "digits", dim=16, depth=1, heads=2, normalize_targets=normalize
        )
    )
    images = stripes(3, 0).images
    noise = mask_noise(0, 0, 3, 16)
    masked, predicted, pasted, original = reconstruction_rows(
        model, images, 0.75, noise
    ).unbind(dim=1)
    with torch.no_grad():
        removed = removed_pixels(
            model(model.standardize(images), 0.75, noise).mask, model.config
        ).bool()
    assert removed.float().mean() == 0.75
    assert torch.equal(original, images)
    assert torch.equal(masked[~removed], images[~removed])
    assert (masked[removed] == 0.5).all()
    torch.testing.assert_close(pasted[~removed], images[~removed])
    torch.testing.assert_close(pasted[removed], predicted[removed])
    if normalize:
        # De-normalised predictions have their patch's own mean, as far as nothing was
        # cut off at 0 or 1.
        close = (predicted.mean(dim=(1, 2, 3)) - images.mean(dim=(1, 2, 3))).abs()
        assert close.max() < 0.1
    save_reconstructions(tmp_path / "p.png", model, images, 0.75, noise)
    with Image.open(tmp_path / "p.png") as png:
        assert np.asarray(png.convert("L")).std() > 10
    with pytest.raises(ValueError, match="no picture"):
        save_reconstructions(tmp_path / "q.png", model, images[:0], 0.75, noise[:0])


def test_some_pictures_are_spread_and_readable(tmp_path: Path) -> None:
    source = ArrayImages(
        torch.linspace(0, 1, 11).reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8)
    )
    torch.testing.assert_close(
        some_pictures(source, TINY, 3)[:, 0, 0, 0], torch.tensor([0.0, 0.5, 1.0])
    )
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(
        ValueError, match=r"none of 1 pictures can be read, the first: .*a\.png"
    ):
        some_pictures(FileImages([tmp_path / "a.png"]), TINY)


# -- the whole


def test_the_choice_of_regularisation_sees_no_held_out_picture(model: CrateMAE) -> None:
    # Nor does anything else that is fitted: other held-out pictures, the same probe.
    generator = np.random.default_rng(0)
    train, labels = generator.normal(size=(600, 6)), generator.integers(0, 2, 600)
    seen: list[np.ndarray] = []

    def recorded(c: float) -> Any:
        pipeline = probe_pipeline(c)
        fit, score = pipeline.fit, pipeline.score
        pipeline.fit = lambda x, y: (seen.append(x), fit(x, y))[1]
        pipeline.score = lambda x, y: (seen.append(x), score(x, y))[1]
        return pipeline

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(crate_core.evaluation.probe, "probe_pipeline", recorded)
        fitted, c = fit_probe(train, labels, seed=0)
    rows = {tuple(row) for row in train}
    assert all({tuple(row) for row in x} <= rows for x in seen)
    # Each C is judged on rows that it was not fitted on; the last fit is on all.
    pairs = list(zip(seen[:-1:2], seen[1:-1:2], strict=True))
    assert 2 <= len(pairs) <= len(INVERSE_REGULARIZATION)
    assert all(not {tuple(r) for r in a} & {tuple(r) for r in b} for a, b in pairs)
    assert len(seen[-1]) == 600
    assert c in INVERSE_REGULARIZATION
    assert fitted.score(train, labels) > 0.5


def test_a_probe_does_not_notice_the_scale_and_place_of_columns() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(200, 5)), np.arange(200) % 2
    x[:, 0] += y
    other = x * np.array([100, 1, 0.01, 5, 3]) + np.array([7, -3, 0, 1, 100])
    assert probe_accuracy(x[:150], y[:150], x[150:], y[150:], 0) == probe_accuracy(
        other[:150], y[:150], other[150:], y[150:], 0
    )


def test_many_labels_choose_on_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(900) % 3
    x = generator.normal(size=(900, 4)) + 2 * np.eye(4)[labels]
    sizes: list[int] = []

    def recorded(c: float) -> Any:
        pipeline = probe_pipeline(c)
        fit = pipeline.fit
        pipeline.fit = lambda x, y: (sizes.append(len(x)), fit(x, y))[1]
        return pipeline

    monkeypatch.setattr(crate_core.evaluation.probe, "CHOOSING", 600)
    monkeypatch.setattr(crate_core.evaluation.probe, "probe_pipeline", recorded)
    fit_probe(x, labels, seed=0)
    assert set(sizes[:-1]) == {480}
    assert sizes[-1] == 900


@pytest.fixture
def checkpoint(
    model: CrateMAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A saved model whose run's data are the stripes."""
    model.save_pretrained(tmp_path)
    (tmp_path / "run.json").write_text(
        json.dumps({"config": {"data": "stripes", "data_root": "data"}})
    )
    monkeypatch.setattr(
        crate_core.evaluation.evaluate,
        "open_data",
        lambda spec, root, **options: STRIPES,
    )
    return tmp_path


def test_evaluation_of_a_checkpoint(model: CrateMAE, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no run.json.*give --data"):
        evaluate(tmp_path)
    (tmp_path / "run.json").write_text(
        json.dumps({"config": {"data": "digits", "data_root": "data"}})
    )
    assert run_data(tmp_path) == ("digits", "data")
    with pytest.raises(ValueError, match="seeds=0"):
        evaluate(tmp_path, seeds=0)
    record = evaluate(
        tmp_path,
        seeds=1,
        labels_per_class=3,
        mask_ratios=[0.5, 0.75],
        command="crate evaluate",
    )
    save_evaluation(record, tmp_path / EVALUATION_FILE)
    assert json.loads((tmp_path / EVALUATION_FILE).read_text()) == record
    assert record["held_out"] == len(open_data("digits").held_out)
    assert record["command"] == "crate evaluate"
    assert {"commit", "device", "versions", "seeds"} <= record.keys()
    lines = table(record)
    for part in ("linear_probe", "neighbours"):
        for row, columns in record[part].items():
            for score in columns.values():
                assert f"{100 * score['mean']:.1f}" in next(
                    line for line in lines if line.strip().startswith(row)
                )
    head = next(line for line in lines if "all labels" in line)
    assert "3 labels a class" in head
    assert "20 neighbours" in head
    assert lines[-1].startswith("seconds: features, probes and neighbours")
    # Digits: pixels are far above chance, and above an untrained encoder.
    pixels, fresh = (
        record["linear_probe"][row]["all labels"]["mean"]
        for row in ("raw pixels", "untrained, class token")
    )
    assert pixels > 0.9 > fresh > 0.2
    assert record["neighbours"]["raw pixels"]["20 neighbours"]["mean"] > 0.9


def test_each_part_can_be_left_out(checkpoint: Path) -> None:
    record = evaluate(
        checkpoint, seeds=1, labels_per_class=4, mask_ratios=[], probe=False
    )
    assert record["linear_probe"] is None
    assert list(record["neighbours"]["raw pixels"]) == ["20 neighbours"]
    assert record["reconstruction"] == []
    assert "reconstruction of removed patches by masking ratio" not in table(record)
    record = evaluate(
        checkpoint, seeds=1, labels_per_class=4, mask_ratios=[], neighbours=False
    )
    assert record["neighbours"] is None
    assert list(record["linear_probe"]["raw pixels"]) == [
        "all labels",
        "4 labels a class",
    ]
    record = evaluate(
        checkpoint,
        seeds=1,
        labels_per_class=4,
        mask_ratios=[0.5],
        probe=False,
        neighbours=False,
    )
    assert (record["linear_probe"], record["neighbours"], record["fine_tuning"]) == (
        None,
        None,
        None,
    )
    assert "linear probes and nearest neighbours: left out, or no labels" in table(
        record
    )


def test_fine_tuning_stands_beside_the_same_network_from_scratch(
    checkpoint: Path, model: CrateMAE, tmp_path: Path
) -> None:
    config = FinetuneConfig(
        epochs=3.0, batch_size=20, lr=0.1, augmentation="none", layer_decay=0.5,
        seeds=2, device="cpu",
    )  # fmt: skip
    record = evaluate(
        checkpoint,
        seeds=2,
        labels_per_class=4,
        mask_ratios=[],
        probe=False,
        neighbours=False,
        fine_tuning=config,
    )
    scores = record["fine_tuning"]["scores"]
    assert {row: len(score["accuracies"]) for row, score in scores.items()} == {
        "pretrained": 2,
        "from scratch": 2,
    }
    assert record["fine_tuning"]["config"]["layer_decay"] == 0.5
    save_evaluation(record, checkpoint / EVALUATION_FILE)
    assert f"{100 * scores['from scratch']['mean']:.1f}" in next(
        line for line in table(record) if "scratch" in line
    )
    # The second seed's runs, by hand; from scratch every layer learns at the full rate.
    second = replace(config, seed=1, seeds=1)
    own = finetune(
        replace(second, output_dir=str(tmp_path / "own")),
        False, str, model=model, data=STRIPES,
    )  # fmt: skip
    fresh = finetune(
        replace(second, layer_decay=1.0, output_dir=str(tmp_path / "fresh")),
        False, str, model=fresh_model(TINY, 1), data=STRIPES,
    )  # fmt: skip
    assert [scores[row]["accuracies"][1] for row in ("pretrained", "from scratch")] == [
        own.accuracy,
        fresh.accuracy,
    ]


def test_the_command_line_passes_every_option_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: dict[str, Any] = {}

    def recorded(*arguments: Any, **options: Any) -> dict[str, Any]:
        given.update(options, arguments=arguments)
        return {
            "seeds": [],
            "description": "",
            "held_out": 0,
            "linear_probe": None,
            "neighbours": None,
            "fine_tuning": None,
            "reconstruction": [],
            "seconds": {},
            "labelled": None,
            "unreadable": {},
        }

    monkeypatch.setattr(crate_core.evaluation.evaluate, "evaluate", recorded)
    output = tmp_path / "record.json"
    command = [
        "evaluate",
        "--checkpoint",
        "somewhere",
        "--output",
        str(output),
        "--device",
        "cpu",
        "--no-probe",
    ]
    assert (
        main([*command, "--seeds", "2", "--mask-ratios", "0.5", "--no-neighbours"]) == 0
    )
    assert given["arguments"] == ("somewhere", None)
    assert (given["seeds"], given["labels_per_class"]) == (2, 5)
    assert given["mask_ratios"] == (0.5,)
    assert (given["probe"], given["neighbours"], given["fine_tuning"]) == (
        False,
        False,
        None,
    )
    assert json.loads(output.read_text())["seeds"] == []
    tuning = ["--finetune", "digits", "--finetune-epochs", "4", "--finetune-seeds", "3"]
    assert main([*command, *tuning]) == 0
    assert given["neighbours"] is True
    assert given["fine_tuning"] == FinetuneConfig(
        "digits", epochs=4.0, seeds=3, device="cpu"
    )
    assert main([*command, "--finetune", "no-such-preset"]) == 2
    assert main([*command, "--finetune-epochs", "4"]) == 2


def test_a_vit_is_evaluated_alike(checkpoint: Path) -> None:
    config = ViTMAEConfig(
        image_size=8,
        patch_size=2,
        channels=1,
        dim=16,
        depth=1,
        heads=2,
        decoder_dim=8,
        decoder_depth=1,
        decoder_heads=2,
    )
    vit = build_model(config)
    vit.save_pretrained(checkpoint)
    record = evaluate(checkpoint, seeds=1, labels_per_class=4, mask_ratios=[0.5])
    own = probe_accuracy(
        encode(vit, STRIPES.train).patch_mean,
        STRIPES.train.labels,
        encode(vit, STRIPES.held_out).patch_mean,
        STRIPES.held_out.labels,
        0,
    )
    assert record["linear_probe"]["trained, mean of patches"]["all labels"][
        "accuracies"
    ] == [own]


def test_evaluation_without_labels_is_reconstruction_alone(
    model: CrateMAE, tmp_path: Path
) -> None:
    for i in range(12):
        Image.new("L", (8, 8), 20 * i).save(tmp_path / f"{i:02d}.png")
    model.save_pretrained(tmp_path / "model")
    for path in (tmp_path / "model").iterdir():
        assert path.suffix != ".png"
    record = evaluate(tmp_path / "model", data=f"folder:{tmp_path}", mask_ratios=[0.75])
    assert record["linear_probe"] is None
    assert "linear probes and nearest neighbours: left out, or no labels" in table(
        record
    )
    assert len(record["reconstruction"]) == 1
    with pytest.raises(ValueError, match="fine-tuning needs labels"):
        evaluate(
            tmp_path / "model", data=f"folder:{tmp_path}", fine_tuning=FinetuneConfig()
        )


def test_labels_that_do_not_fit_are_refused(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = ArrayImages(STRIPES.held_out.images, np.arange(40) % 3)
    monkeypatch.setattr(
        crate_core.evaluation.evaluate,
        "open_data",
        lambda spec, root, **options: replace(STRIPES, held_out=held_out),
    )
    with pytest.raises(
        ValueError,
        match="1 classes that no training picture has, such as 2: 3 classes held "
        "out, 2 to",
    ):
        evaluate(checkpoint)


# -- the committed figures


def test_the_recorded_digits_runs_beat_their_untrained_controls() -> None:
    path = ROOT / "results" / "digits-pretrain.json"
    if not path.exists():
        pytest.skip(
            "results/digits-pretrain.json is not there: python "
            "benchmarks/digits.py writes it"
        )
    results = json.loads(path.read_text())
    assert {"command", "commit", "device", "seeds", "versions"} <= results.keys()
    probes = results["linear_probe"]
    for column in probes["raw pixels"]:
        trained, fresh, pixels = (
            np.array(probes[row][column]["values"])
            for row in (
                "trained, mean of patches",
                "untrained, mean of patches",
                "raw pixels",
            )
        )
        assert len(trained) >= 3
        assert (trained > fresh + 0.05).all()
        assert pixels.mean() > trained.mean()
    assert (
        max(results["held_out_loss"]["values"])
        < 0.8 * results["trivial_loss"]["mean_picture"]
    )
