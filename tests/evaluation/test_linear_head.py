"""The probe by stochastic gradients: what it reads, what it refuses,
what it may see.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from crate_core.evaluation.linear_head import (
    LinearHead,
    LinearHeadConfig,
    batches,
    fit_linear_head,
    head_accuracy,
    train_head,
)
from crate_core.evaluation.probe import probe_accuracy
from crate_core.model.build import fresh_model
from crate_core.model.config import CrateMAEConfig

SHORT = LinearHeadConfig(
    epochs=20, warmup_ratio=0.1, batch_size=128, base_lrs=(0.01, 0.3), optimizer="sgd"
)


def blobs(count: int, seed: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Three Gaussians whose columns have very different units."""
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    rows = 2 * np.eye(5)[labels] + spread * generator.normal(size=(count, 5))
    return (rows * [1, 10, 0.1, 1, 100]).astype(np.float16), labels


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_it_reads_what_scikit_learns_probe_reads(optimizer: str) -> None:
    (train, labels), (test, answers) = blobs(3000, 0), blobs(3000, 1)
    config = replace(
        SHORT,
        optimizer=optimizer,
        base_lrs=(0.3, 3.0) if optimizer == "lars" else (0.3,),
    )
    fitted = fit_linear_head(train, labels, 3, config)
    ours = head_accuracy(fitted.head, test, answers)
    theirs = probe_accuracy(
        train.astype(np.float32), labels, test.astype(np.float32), answers, seed=0
    )
    # two fits of one model on 3,000 rows: within two standard errors of an accuracy
    assert abs(ours - theirs) < 2 * np.sqrt(0.25 / 3000)
    shuffled = np.random.default_rng(2).permutation(labels)
    blind = head_accuracy(
        fit_linear_head(train, shuffled, 3, config).head, test, answers
    )
    assert abs(blind - 1 / 3) < 0.1 < ours - 1 / 3


def test_the_rate_is_chosen_on_training_pictures_it_was_not_fitted_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import crate_core.evaluation.linear_head as module

    train, labels = blobs(400, 0)
    fitted_on, judged_on = [], []
    train_own, judge_own = module.train_head, module.head_accuracy

    def training(features, labels, rows, *rest):  # type: ignore[no-untyped-def]
        fitted_on.append(set(rows.tolist()))
        return train_own(features, labels, rows, *rest)

    def judging(head, features, labels, rows, *rest):  # type: ignore[no-untyped-def]
        judged_on.append(set(rows.tolist()))
        return judge_own(head, features, labels, rows, *rest)

    monkeypatch.setattr(module, "train_head", training)
    monkeypatch.setattr(module, "head_accuracy", judging)
    fitted = fit_linear_head(train, labels, 3, replace(SHORT, validation_share=0.25))
    assert len(judged_on) == 2
    assert all(len(rows) == 100 for rows in judged_on)
    assert all(not (a & b) for a, b in zip(fitted_on, judged_on, strict=False))
    assert fitted_on[-1] == set(range(400))
    assert fitted.base_lr == max(
        fitted.validation, key=lambda lr: fitted.validation[lr]
    )


def test_memory_maps_give_the_same_and_seeds_repeat(tmp_path: Path) -> None:
    train, labels = blobs(300, 0)
    np.save(tmp_path / "x.npy", train)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    rows = np.arange(300)
    state = torch.get_rng_state()
    one, same, other = (
        train_head(x, labels, rows, 3, 0.1, SHORT, seed, "cpu").state_dict()
        for x, seed in ((train, 0), (mapped, 0), (train, 1))
    )
    assert torch.equal(state, torch.get_rng_state())
    for name, value in one.items():
        assert torch.equal(value, same[name])
    assert not torch.equal(one["classify.weight"], other["classify.weight"])


def test_every_row_is_drawn_once_an_epoch() -> None:
    rows = np.arange(100, 164)
    drawn = list(batches(rows, 16, 3))
    assert sorted(np.concatenate(drawn)) == rows.tolist()
    assert all((np.diff(batch) > 0).all() for batch in drawn)
    assert [len(batch) for batch in batches(rows, 1000, 3)] == [64]


@pytest.mark.parametrize("epochs", [1, 5, 90])
def test_warm_up_is_a_ninth_of_the_epochs(epochs: int) -> None:
    assert LinearHeadConfig(epochs=epochs).warmup_epochs == pytest.approx(epochs / 9)


def test_the_head_normalises_without_learning_a_scale() -> None:
    head = LinearHead(4, 2)
    assert [name for name, _ in head.named_parameters()] == [
        "classify.weight",
        "classify.bias",
    ]
    x = torch.randn(50, 4) * 7 + 3
    normed = head.train().norm(x)
    torch.testing.assert_close(normed.mean(0), torch.zeros(4), atol=1e-5, rtol=0)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"epochs": 0}, "epochs=0"),
        ({"warmup_ratio": 1.0}, "warmup_ratio=1.0"),
        ({"base_lrs": ()}, "base_lrs"),
        ({"base_lrs": (-1.0,)}, "base_lrs"),
        ({"optimizer": "adam"}, "accepted is lars or sgd"),
        ({"validation_share": 1.0}, "validation_share"),
        ({"momentum": 1.0}, "momentum"),
    ],
)
def test_bad_settings_are_named(change: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LinearHeadConfig(**change)


def test_labels_that_do_not_fit_are_named() -> None:
    x, y = blobs(30, 0)
    with pytest.raises(ValueError, match="29 labels for 30 rows"):
        fit_linear_head(x, y[1:], 3, SHORT)
    with pytest.raises(ValueError, match="labels must be in 0 to 1"):
        fit_linear_head(x, y, 2, SHORT)


def test_a_checkpoint_is_probed_beside_its_controls(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    from crate_core.evaluation.probing import probe_checkpoint

    model = fresh_model(CrateMAEConfig.preset("digits", dim=16, depth=1, heads=2), 0)
    said: list[str] = []
    record = probe_checkpoint(
        model,
        "digits",
        cache=tmp_path / "features",
        solver="sgd",
        head=replace(SHORT, epochs=6),
        controls=True,
        seeds=2,
        device="cpu",
        report=said.append,
    )
    assert set(record["scores"]) == {
        "trained, class_token",
        "trained, patch_mean",
        "untrained, class_token",
        "untrained, patch_mean",
        "raw pixels",
    }
    assert record["scores"]["raw pixels"]["linear"]["mean"] > 0.8  # chance is .1
    for row, columns in record["scores"].items():
        assert len(columns["linear"]["accuracies"]) == 2
        voted = columns["20 neighbours"]["accuracies"]
        assert len(voted) == (2 if row.startswith("untrained") else 1)
    assert (record["train"], record["held_out"], record["classes"]) == (1438, 359, 10)
    assert any("base_lr" in line for line in said)
    with pytest.raises(ValueError, match="give data"):
        probe_checkpoint(model, device="cpu")


@pytest.mark.bad_input
def test_an_unknown_solver_is_named() -> None:
    pytest.importorskip("sklearn")
    from crate_core.evaluation.probing import probe_checkpoint

    with pytest.raises(ValueError, match="solver='newton'"):
        probe_checkpoint("cifar10-tiny", "digits", solver="newton")  # type: ignore[arg-type]


def test_the_command_probes_and_uses_its_features_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from crate_core.cli import main

    config = CrateMAEConfig.preset("digits", dim=16, depth=1, heads=2)
    fresh_model(config, 0).save_pretrained(tmp_path / "model")
    command = [
        *("probe", "--checkpoint", str(tmp_path / "model"), "--data", "digits"),
        *("--cache", str(tmp_path / "features"), "--solver", "sgd", "--epochs", "3"),
        *("--head-batch-size", "256", "--device", "cpu", "--features", "patch_mean"),
    ]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "data: scikit-learn" in said
    assert "trained, patch_mean: linear probe" in said
    record = json.loads((tmp_path / "model" / "probe.json").read_text())
    assert record["command"].startswith("crate probe")
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "features").rglob("*")}
    assert main(command) == 0
    again = json.loads((tmp_path / "model" / "probe.json").read_text())
    assert again["scores"] == record["scores"]
    assert {
        p: p.stat().st_mtime_ns for p in (tmp_path / "features").rglob("*")
    } == written
