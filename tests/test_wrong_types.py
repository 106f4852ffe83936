"""A value of a wrong type for any argument of a public function or configuration gets
an error that names the argument, or what is accepted.

Arguments are found by ``inspect.signature``: a new function, or a new argument, is
covered as soon as it is there.
"""

import dataclasses
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from crate_core.data.named import open_data
from crate_core.data.prepare import PrepareConfig, prepare
from crate_core.evaluation.evaluate import evaluate
from crate_core.evaluation.finetune import finetune, finetune_seeds
from crate_core.evaluation.finetune_recipe import FinetuneConfig
from crate_core.evaluation.linear_head import LinearHeadConfig
from crate_core.evaluation.probing import probe_checkpoint
from crate_core.model import attention, cost, patches, sparsify
from crate_core.model.config import CrateMAEConfig, ViTMAEConfig
from crate_core.theory.mixture import LowRankGaussianMixture
from crate_core.training.pretrain import pretrain
from crate_core.training.recipe import PretrainConfig

pytestmark = pytest.mark.bad_input
WRONG = (None, "5", [1], {})
MIX = LowRankGaussianMixture.random(dim=8, components=2, rank=2)
Z = torch.rand(12, 8)
UNIT = Z / Z.norm(dim=1, keepdim=True)
CONFIG = CrateMAEConfig.preset("digits")

VALID: dict[str, Any] = {
    **{name: Z for name in ("z", "x", "score", "estimate", "noisy", "clean")},
    "tokens": torch.rand(2, 5, 8),
    "bases": MIX.bases,
    "basis": MIX.bases[0],
    "labels": torch.tensor([0, 1] * 6),
    "mixture": MIX,
    "eps": 0.5,
    "lambd": 0.1,
    "eta": 0.1,
    "sigma": 0.3,
    "sigmas": [0.1, 0.2],
    "sigma_from": 1.0,
    "sigma_to": 0.1,
    "steps": 2,
    "times": [0.0, 1.0],
    "time": 0.001,
    "beta": 1.0,
    "c": 0.5,
    "singular": torch.rand(3),
    "field": lambda t, z: z,
    "n": 4,
    "dim": 8,
    "components": 2,
    "rank": 2,
    "v": torch.rand(2, 4, 2),
    "scale": 1.0,
    "kappa": 0.1,
    "images": torch.rand(2, 1, 8, 8),
    "patches": torch.rand(2, 4, 16),
    "patch_size": 4,
    "height": 8,
    "width": 8,
    "grid": (2, 2),
    "maps": torch.rand(2, 3, 4, 4),
    "size": (8, 8),
    "noise": torch.rand(2, 4),
    "mask_ratio": 0.5,
    "ids": torch.zeros(2, 2, dtype=torch.int64),
    "visible": torch.rand(2, 2, 8),
    "mask_token": torch.rand(8),
    "ids_restore": torch.tensor([[0, 1, 2, 3]] * 2),
    "dictionary": torch.eye(8),
    "codes": torch.rand(12, 8),
    "config": CONFIG,
    "batch": 2,
    "classes": 3,
    "pictures": 10,
    "epochs": 2,
    "peak": 1e15,
    "utilisation": 0.5,
    "gpus": 1,
    "spec": "digits",
    "checkpoint": "digits-tiny",
    "source": "nowhere",
    "output_dir": "nowhere",
}
"""A valid value by the name of an argument; others keep their default."""

OTHERS: dict[str, dict[str, Any]] = {
    "direction_surrogate": {"x": UNIT},
    "project": {"z": Z},
    **{
        name: {"patches": None}
        for name in ("token_counts", "operations", "saved_numbers")
    },
}
"""Values for one function where its argument means something else."""

FIRST_ALONE = {
    **{function: "config" for function in (pretrain, finetune, finetune_seeds)},
    prepare: "config",
    open_data: "spec",
    evaluate: "seeds",
    probe_checkpoint: "seeds",
}
"""Functions that start long work: the argument that they look at before it."""

CONFIGS = (
    CrateMAEConfig,
    ViTMAEConfig,
    PretrainConfig,
    FinetuneConfig,
    PrepareConfig,
    LinearHeadConfig,
)


def functions() -> Iterator[Callable[..., object]]:
    """The public functions of the theory, and of the model's formulas and costs; what
    checks arguments is met through them.
    """
    folder = importlib.import_module("crate_core.theory")
    found = [
        importlib.import_module(f"crate_core.theory.{module.name}")
        for module in pkgutil.iter_modules(folder.__path__)
    ]
    for module in (*found, attention, cost, patches, sparsify):
        for name, value in vars(module).items():
            own = inspect.isfunction(value) and value.__module__ == module.__name__
            if own and not name.startswith(("_", "check_")):
                yield value


def accepts(annotation: object, value: object) -> bool:
    """Whether an argument's annotation names the type of a value."""
    said = str(annotation)
    kinds = {
        type(None): r"\bNone\b",
        str: r"\bstr\b|Literal|Path",
        list: r"Sequence|Iterable|list\[|tuple\[float, \.\.\.",
        dict: r"Mapping|dict\[",
    }
    return "Any" in said or re.search(kinds[type(value)], said) is not None


def cases() -> Iterator[tuple[str, Callable[..., object], dict[str, Any], str, object]]:
    """A name, a function or configuration, its other arguments, one argument, and a
    value of a wrong type for it.
    """
    for called in (*functions(), *FIRST_ALONE, *CONFIGS):
        parameters = inspect.signature(called).parameters
        known = {**VALID, **OTHERS.get(called.__name__, {})}
        given = {
            name: known[name]
            for name, parameter in parameters.items()
            if parameter.default is parameter.empty
            and (called not in FIRST_ALONE or name in known)
        }
        for name, parameter in parameters.items():
            if FIRST_ALONE.get(called, name) != name:
                continue
            # flags: everything is true or false; generators are torch's to refuse
            if parameter.annotation in (bool, bool | None) or name == "generator":
                continue
            for wrong in WRONG:
                if not accepts(parameter.annotation, wrong):
                    label = f"{called.__name__}({name}={wrong!r})"
                    yield label, called, given, name, wrong


CASES = {label: rest for label, *rest in cases()}


@pytest.mark.parametrize("label", CASES)
def test_a_wrong_type_is_named(label: str) -> None:
    called, given, name, wrong = CASES[label]
    with pytest.raises((TypeError, ValueError)) as caught:
        called(**{**given, name: wrong})
    said = str(caught.value)
    # by the argument's name, or by the words that the chapters have for it
    words = {"z": "tokens", "x": "tokens", "v": "tokens", "n": "tokens"}
    words |= {"sigma_from": "noise levels", "sigma_to": "noise levels"}
    words |= {"spec": "data", "singular": "singular values"}
    assert name in said or words.get(name, "must be") in said, said


def test_every_field_of_a_configuration_is_tried() -> None:
    tried = {(case[0], case[2]) for case in CASES.values()}
    for config in CONFIGS:
        for field in dataclasses.fields(config):
            flag = field.type in (bool, "bool")
            assert flag or (config, field.name) in tried or field.type == "Any"


@pytest.mark.parametrize("wrong", [None, "5", [1], 5])
@pytest.mark.parametrize("config", [*CONFIGS[:4]])
def test_a_record_that_is_no_mapping_is_named(config: Any, wrong: object) -> None:
    with pytest.raises(TypeError, match="mapping from names to values, got"):
        config.from_dict(wrong)
