"""What a run is: presets that are whole in every constructor, fields that are named
when they are wrong, and the plan of a run.
"""

import json
import math
import subprocess
import sys
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import ENVIRONMENT, ROOT, TINY

from crate_core.evaluation.finetune_recipe import FinetuneConfig
from crate_core.model.crate import CrateMAE
from crate_core.training.devices import make_optimizer
from crate_core.training.presets import PRESETS
from crate_core.training.published import (
    READINGS,
    SOURCES,
    markdown_table,
    recipe_table,
)
from crate_core.training.recipe import FROM_PRESET, OPERATIONAL, Plan, PretrainConfig

PRESET_FIELDS = {f.name for f in fields(PretrainConfig) if f.default is FROM_PRESET}

FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "seed": st.integers(0, 9),
    "epochs": st.floats(0.5, 1000),
    "max_steps": st.none() | st.integers(1, 99),
    "lr": st.floats(1e-6, 1),
    "warmup_ratio": st.floats(0, 0.99),
    "weight_decay": st.floats(0, 1),
    "betas": st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
    "clip_gradient": st.none() | st.floats(0.1, 10),
    "augmentation": st.sampled_from(["none", "crop_flip", "crop_blur_solarize"]),
    "output_dir": st.sampled_from(["here", "there"]),
    "workers": st.integers(0, 3),
}

overrides = st.fixed_dictionaries({}, optional=FIELDS)


# -- presets


@given(name=st.sampled_from(sorted(PRESETS)), given_fields=overrides)
def test_every_constructor_gives_the_whole_preset(
    name: str, given_fields: dict[str, Any]
) -> None:
    config = PretrainConfig(preset=name, **given_fields)
    whole = {**PRESETS[name].fields, "output_dir": f"runs/{name}", **given_fields}
    assert {field: getattr(config, field) for field in whole} == whole
    assert config == PretrainConfig.from_preset(name, **given_fields)
    assert config == PretrainConfig.from_dict({"preset": name, **given_fields})
    assert PretrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert replace(config, seed=config.seed) == config


def test_presets_say_every_field_that_is_left_to_them() -> None:
    for name, preset in PRESETS.items():
        assert set(preset.fields) == PRESET_FIELDS, name


def test_without_a_preset_it_is_the_digits() -> None:
    assert PretrainConfig() == PretrainConfig(preset="digits")
    assert PretrainConfig(epochs=10) == PretrainConfig.from_preset("digits", epochs=10)


@given(
    name=st.sampled_from(sorted(PRESETS)),
    epochs=st.floats(1e-3, 1e4),
    count=st.integers(1, 10**6),
)
def test_any_length_warms_up_for_the_same_share(
    name: str, epochs: float, count: int
) -> None:
    config = PretrainConfig(preset=name, epochs=epochs)
    share = PretrainConfig(preset=name).warmup_ratio
    assert config.warmup_epochs == pytest.approx(share * epochs)
    assert 0 <= config.warmup_epochs < epochs
    rates = [Plan(config, count).lr(step) for step in range(3)]
    assert all(0 <= rate <= config.peak_lr for rate in rates)


@given(epochs=st.floats(1e-3, 1e4))
def test_fine_tuning_of_any_length_warms_up(epochs: float) -> None:
    assert FinetuneConfig(epochs=epochs).warmup_ratio < 1
    assert FinetuneConfig(epochs=1).epochs == 1


@pytest.mark.parametrize("size", ["small", "base"])
def test_imagenet_presets_are_what_their_sources_say(size: str) -> None:
    authors, mae = (PretrainConfig(f"imagenet-{size}{end}") for end in ("", "-mae"))
    baseline = PretrainConfig(f"imagenet-{size}-vit")
    for config, lr, decay in ((authors, 3e-5, 0.1), (mae, 1.5e-4, 0.05)):
        assert (config.lr, config.weight_decay) == (lr, decay)
        assert config.peak_lr == pytest.approx(16 * lr)
        assert (config.epochs, config.batch_size) == (800, 4096)
        assert config.warmup_epochs == pytest.approx(40)
        assert config.mask_ratio == 0.75
    assert (authors.model.eta, authors.model.lambd) == (1.0, 0.1)
    assert (mae.model.eta, mae.model.lambd) == (0.1, 0.5)
    assert replace(authors.model, eta=0.1, lambd=0.5) == mae.model
    # the baseline is trained in the same way
    same = replace(authors, model=baseline.model, preset=baseline.preset)
    assert replace(same, output_dir=baseline.output_dir) == baseline


def test_the_table_of_sources_has_every_field_that_a_source_names() -> None:
    rows = {row["field"]: row for row in recipe_table("imagenet-base", "digits")}
    assert {field for source in SOURCES for field in source.says} == rows.keys()
    for field, row in rows.items():
        for source in SOURCES:
            assert row[source.title] == source.says.get(field, "not said")
    assert rows["lr"]["imagenet-base"] == "3e-05, times batch / 256: 0.00048"
    assert rows["model.lambd"]["imagenet-base"] == "0.1"
    assert rows["betas"]["digits"] == "0.9, 0.95"
    first, second = READINGS.values()
    peaks = [PretrainConfig("imagenet-base", lr=lr).peak_lr for lr in (first, second)]
    assert peaks == pytest.approx([4.8e-4, 3e-5])
    drawn = markdown_table(list(rows.values())).splitlines()
    assert len(drawn) == len(rows) + 2
    assert {line.count("|") for line in drawn} == {len(rows["lr"]) + 1}


# -- what is accepted

BAD_VALUES = [
    ({"mask_ratio": 1.0}, r"mask_ratio=1.0.*16 patches"),
    ({"mask_ratio": 0.0}, r"mask_ratio=0.0"),
    ({"mask_ratio": 0.99}, r"mask_ratio=0.99"),
    ({"batch_size": 0}, "batch_size=0"),
    ({"accumulate": 3}, "a divisor of batch_size=128"),
    ({"lr": -1.0}, "lr=-1.0"),
    ({"lr": math.nan}, "lr=nan"),
    ({"epochs": math.inf}, "epochs=inf"),
    ({"warmup_ratio": 1.0}, r"warmup_ratio=1.0: accepted is a share in \[0, 1\)"),
    ({"max_steps": 0}, "max_steps=0"),
    ({"betas": (0.9, 1.0)}, "betas"),
    ({"clip_gradient": 0.0}, "clip_gradient"),
    ({"max_unreadable": 1.5}, "max_unreadable"),
    ({"epoch": 3}, r"unknown fields \['epoch'\]"),
    ({"preset": "mnist"}, "digits, cifar10"),
    ({"precision": "int8"}, "fp32, bf16 or fp16"),
    ({"device": "gpu"}, "auto, cpu, cuda or mps"),
    ({"augmentation": "mixup"}, "none, crop_flip or crop_blur_solarize"),
]

BAD_TYPES = [
    ({"preset": 3}, "preset=3: accepted is digits"),
    ({"model": "base"}, "model='base': accepted is a CrateMAEConfig"),
    ({"epochs": "10"}, "epochs='10': accepted is a positive number"),
    ({"epochs": None}, "epochs=None: accepted is a positive number"),
    ({"batch_size": 12.5}, "batch_size=12.5: accepted is an integer"),
    ({"batch_size": True}, "batch_size=True: accepted is an integer"),
    ({"seed": "0"}, "seed='0': accepted is zero or a positive integer"),
    ({"betas": 0.9}, "betas=0.9: accepted is two numbers"),
    ({"data": 7}, "data=7: accepted is text"),
    ({"device": None}, "device=None: accepted is auto"),
    ({"compile": "yes"}, "compile='yes': accepted is True or False"),
    ({"mask_ratio": [0.75]}, "mask_ratio=.*: accepted is a share"),
]


@pytest.mark.bad_input
@pytest.mark.parametrize(("given_fields", "message"), BAD_VALUES + BAD_TYPES)
def test_a_field_that_is_wrong_is_named(
    given_fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainConfig.from_dict(given_fields)


@pytest.mark.bad_input
@pytest.mark.parametrize("count", [0, -1, 2.5, None])
def test_a_plan_needs_pictures(count: Any) -> None:
    with pytest.raises(ValueError, match=f"count={count}: accepted is an integer >= 1"):
        Plan(PretrainConfig(), count)


def test_the_command_takes_a_shorter_run() -> None:
    # The first thing that anyone varies.
    code = (
        "import crate_core.training.pretrain as p; seen = []; "
        "p.pretrain = lambda c, command: print(c.epochs, c.warmup_epochs); "
        "from crate_core.cli import main; "
        "main(['pretrain', '--preset', 'digits', '--epochs', '10'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=True, env=ENVIRONMENT, cwd=ROOT,
    )  # fmt: skip
    assert done.stdout.split() == ["10.0", "0.5"]


def test_identity_leaves_out_operational_fields_only() -> None:
    config = PretrainConfig()
    names = {name.partition(".")[0] for name in config.identity()}
    assert names == set(config.to_dict()) - OPERATIONAL - {"preset"}
    assert json.loads(json.dumps(config.identity())) == config.identity()


# -- the plan


@given(
    batch=st.integers(1, 512),
    count=st.integers(1, 5000),
    epochs=st.floats(1, 300),
    warm=st.floats(0, 0.9),
)
def test_a_plan_follows_its_formulas(
    batch: int, count: int, epochs: float, warm: float
) -> None:
    config = PretrainConfig(batch_size=batch, epochs=epochs, warmup_ratio=warm, lr=1e-3)
    plan = Plan(config, count)
    steps = plan.steps
    assert (steps - 1) * batch < epochs * count * (1 + 1e-12)
    assert steps * batch >= epochs * count * (1 - 1e-12)
    assert (plan.steps_per_epoch - 1) * batch < count <= plan.steps_per_epoch * batch
    for step in (0, steps // 3, steps - 1, steps, 2 * steps):
        epoch = step * batch / count
        assert plan.epoch(step) == epoch
        if epoch < warm * epochs:
            expected = epoch / (warm * epochs)
        else:
            done = min(1, (epoch - warm * epochs) / (epochs - warm * epochs))
            expected = math.cos(math.pi / 2 * done) ** 2
        assert plan.lr(step) == pytest.approx(1e-3 * batch / 256 * expected, abs=1e-12)


@given(stop=st.integers(1, 10**4))
def test_max_steps_shortens_a_run_and_keeps_its_schedule(stop: int) -> None:
    whole = Plan(PretrainConfig(), 1438)
    short = Plan(PretrainConfig(max_steps=stop), 1438)
    assert short.steps == min(stop, whole.steps)
    rates = [[plan.lr(step) for step in range(0, stop, 97)] for plan in (short, whole)]
    assert rates[0] == rates[1]


def test_expected_loss_is_for_the_unchanged_preset() -> None:
    config = PretrainConfig()
    assert Plan(config, 1438).expected_final == PRESETS["digits"].loss is not None
    same = replace(config, seed=5, workers=2)
    assert Plan(same, 1438).expected_final == PRESETS["digits"].loss
    assert Plan(replace(config, lr=1e-3), 1438).expected_final is None
    assert Plan(replace(config, max_steps=3), 1438).expected_final is None


def test_every_parameter_is_in_one_group_and_vectors_do_not_decay() -> None:
    model = CrateMAE(TINY)
    config = PretrainConfig(weight_decay=0.3)
    groups = make_optimizer(model, config, torch.device("cpu")).param_groups
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    assert sum(len(group["params"]) for group in groups) == len(decay)
    assert decay == {id(p): 0.3 * (p.ndim > 1) for p in model.parameters()}
