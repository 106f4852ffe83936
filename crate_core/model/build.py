r"""A model of either architecture: CRATE-MAE, or the ViT-MAE it is compared with.

Book: :ref:`ch-comparison`.
"""

import os
from pathlib import Path
from typing import Any, cast

import torch

from crate_core.checks import check_mapping
from crate_core.keys import random_key
from crate_core.model.autoencoder import MaskedAutoencoder
from crate_core.model.config import (
    CLASSIFIER,
    CrateMAEConfig,
    FrameConfig,
    config_from_dict,
)
from crate_core.model.crate import CrateMAE
from crate_core.model.files import WEIGHTS_FILE, load_weights, read_config
from crate_core.model.saved import resolve_directory

INSIDE = "autoencoder."
"""What names of a classifier's encoder and decoder weights begin with."""


def architecture(config: FrameConfig) -> type[MaskedAutoencoder]:
    """The class of the models that a configuration describes."""
    if isinstance(config, CrateMAEConfig):
        return CrateMAE
    from crate_core.model.vit import ViTMAE  # timm is loaded only for the baseline

    return ViTMAE


def build_model(config: FrameConfig) -> MaskedAutoencoder:
    """A freshly initialised model of the architecture that the configuration is of."""
    return architecture(config).from_config(config)


def fresh_model(config: FrameConfig, seed: int) -> MaskedAutoencoder:
    """A model with weights drawn from a seed; the global random state is left as it
    was.

    What a training run of this seed starts from, and so the control of what it ends
    with.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(random_key(seed))
        return build_model(config)


def load_model(name: str | Path | MaskedAutoencoder) -> MaskedAutoencoder:
    """A saved model of either architecture, from a directory, a bundled name or a
    Hugging Face Hub id; a model is returned as it is.

    Of a saved classifier (:class:`crate_core.model.classifier.Classifier`), which
    ``Classifier.from_pretrained`` loads, this is the autoencoder inside: its encoder
    has learnt the classes, its decoder is that of the pretraining.

    Raises
    ------
    FileNotFoundError
        If it is none of these, or a file is missing.
    TypeError
        For anything but a name, a path or a model.
    ValueError
        If the directory holds another architecture or the weights do not fit the
        configuration.

    Book: :ref:`ch-comparison`.
    """
    if isinstance(name, MaskedAutoencoder):
        return name
    directory = resolve_directory(name)
    config = read_config(directory)
    if config.get("model_type") != CLASSIFIER:
        return architecture(config_from_dict(config)).from_pretrained(directory)
    inside = config.get("model")
    check_mapping(inside)
    model = build_model(config_from_dict(cast(dict[str, Any], inside)))
    whole = load_weights(directory / WEIGHTS_FILE)
    own = {
        name.removeprefix(INSIDE): value
        for name, value in whole.items()
        if name.startswith(INSIDE)
    }
    model.load_weights(own, source=str(directory))
    return model


def pick_device(device: str = "auto") -> str:
    """``auto`` as the best device there is; ``ValueError`` if the one asked for is not
    there.
    """
    available = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if device == "auto":
        return next(name for name in ("cuda", "mps", "cpu") if available[name])
    if not available.get(device.partition(":")[0], False):
        there = [name for name, found in available.items() if found]
        raise ValueError(f"device={device!r} is not there; this machine has {there}")
    return device


def processes_on_cpu(device: str = "auto") -> bool:
    """Whether processes that a launcher started (WORLD_SIZE) meet over the CPU: asked
    for, or several without a GPU, which accelerate would take for separate runs.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return device == "cpu" or (
        device == "auto" and several and not torch.cuda.is_available()
    )
