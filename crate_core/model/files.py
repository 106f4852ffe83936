r"""Safe loading and saving of weights.

Nothing here unpickles a stranger's objects: safetensors, or
``torch.load(weights_only=True)``.

Book: :ref:`ch-crate-mae`.
"""

import argparse
import hashlib
import json
import os
import pickle
import re
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize_tensors
from torch import Tensor

from crate_core.records import atomic_write

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

DAMAGED_FILE_ERRORS = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    ValueError,
    LookupError,
    struct.error,
)
"""What ``torch.load(weights_only=True)`` raises on files that are cut off, damaged, or
hold other objects.
"""

StateDict = dict[str, Tensor]


def weights_to_bytes(state: Mapping[str, Tensor]) -> bytes:
    """Tensors as the content of a safetensors file.

    ``safetensors.torch.save_file`` writes files that only their owner can read, and
    reports a full disk as an error of its own; bytes written by :func:`atomic_write`
    have neither trouble.
    """
    return serialize_tensors(
        {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    )


def load_weights(path: str | Path) -> StateDict:
    """Tensors of a ``.safetensors`` file, or of a PyTorch file read with
    ``weights_only=True``.

    A PyTorch file may hold the tensors directly or under ``model`` or ``state_dict``; a
    ``module.`` prefix, as DataParallel leaves it, is dropped.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged, holds objects other than tensors (it would have to
        execute code to load), or holds no tensors.

    Book: :ref:`ch-crate-mae`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(
                f"{path} is not a readable safetensors file: {error}"
            ) from error
    try:
        # MAE's training script, which the authors built on, saves its parsed arguments
        # beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED_FILE_ERRORS as error:
        # Torch's message also says how to load the file all the same, by executing it;
        # only the reason is passed on.
        parts = [
            part.strip()
            for part in re.split(r"\n\s*\n|WeightsUnpickler error:", str(error))
        ]
        reason = " ".join(
            part
            for part in parts
            if not part.startswith(("Weights only load failed", "Check the doc"))
        )
        reason = reason.partition(" Please use")[0]
        raise ValueError(
            f"{path} was refused: accepted are .safetensors files and PyTorch files "
            "that hold tensors only "
            f"(read with weights_only=True). {reason}"
        ) from error
    return unwrap_state_dict(content, source=str(path))


def unwrap_state_dict(content: object, source: str) -> StateDict:
    """The tensors in ``content``, from under ``model`` or ``state_dict`` if need be,
    without ``module.`` prefixes.

    Raises ``ValueError`` naming ``source`` if that is not a mapping from names to
    tensors.
    """
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{source} holds no state dict, got {type(content).__name__}")
    odd = [name for name, value in content.items() if not isinstance(value, Tensor)]
    if odd:
        raise ValueError(
            f"{source} is not a state dict of tensors: {odd[:3]} are something else"
        )
    return {name.removeprefix("module."): value for name, value in content.items()}


def check_fit(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str
) -> None:
    """Raise ``ValueError`` naming ``source`` unless ``weights`` has exactly the names
    and shapes of ``own``.
    """
    problems = {
        "missing": own.keys() - weights.keys(),
        "unexpected": weights.keys() - own.keys(),
        "of another shape": {
            name
            for name in own.keys() & weights.keys()
            if own[name].shape != weights[name].shape
        },
    }
    found = "; ".join(
        f"{len(names)} {what}, such as {min(names)}"
        for what, names in problems.items()
        if names
    )
    if found:
        raise ValueError(f"weights of {source} do not fit this configuration: {found}")


def read_config(directory: Path) -> dict[str, object]:
    """The ``config.json`` of a saved model.

    Raises ``FileNotFoundError`` if there is none, ``ValueError`` if it is not a JSON
    object.
    """
    path = directory / CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} holds no {CONFIG_FILE}; a saved model has {CONFIG_FILE} and "
            f"{WEIGHTS_FILE}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return config


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors and their names."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(name.encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_model(
    directory: Path, config: Mapping[str, object], weights: Mapping[str, Tensor]
) -> None:
    """Write ``config.json`` and ``model.safetensors``; neither is replaced before both
    are whole on disk.

    Raises ``OSError`` if the disk is full or not writable; files already there are then
    untouched.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as scratch:
        atomic_write(Path(scratch, WEIGHTS_FILE), weights_to_bytes(weights))
        atomic_write(
            Path(scratch, CONFIG_FILE), (json.dumps(config, indent=2) + "\n").encode()
        )
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            os.replace(Path(scratch, name), directory / name)
