r"""Safe loading and saving of weights, and the key map from the authors' published
checkpoints.

Nothing here unpickles a stranger's objects: safetensors, or
``torch.load(weights_only=True)``.

Book: :ref:`ch-crate-mae`.
"""

import argparse
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

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

REFERENCE_HEADS = {384: 6, 576: 12, 768: 12, 1024: 16}
"""Heads of the authors' published sizes by token dimension; the weights themselves do
not tell.
"""

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


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: under a temporary name beside it, flushed to
    disk, then renamed.

    Raises ``OSError`` if the disk is full or not writable; the previous file is then
    untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
    ValueError If the file is damaged, holds objects other than tensors (it would have
        to execute code to load), or holds no tensors.

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
            f"{path} was refused: accepted are .safetensors files and PyTorch files that hold tensors only "
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
            f"{directory} holds no {CONFIG_FILE}; a saved model has {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object")
    return config


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


_LAYER_KEYS = {
    "encoder": {
        "0.0.norm": "norm_attention",
        "0.0.fn.qkv.weight": "attention.project.weight",
        "0.0.fn.to_out.0": "attention.output",
        "0.1.norm": "norm_sparsify",
        "0.1.fn.weight": "sparsify.weight",
    },
    "decoder": {
        "0.0.norm": "norm_densify",
        "0.0.fn.weight": "densify.weight",
        "0.1.norm": "norm_attention",
        "0.1.fn.qkv.weight": "attention.project.weight",
        "0.1.fn.to_out.0": "attention.output",
    },
}

_TOP_KEYS = {
    "cls_token": "class_token",
    "mask_token": "mask_token",
    "patch_embed.proj.bias": "patch_embedding.bias",
    "norm.weight": "encoder_norm.weight",
    "norm.bias": "encoder_norm.bias",
    "decoder_norm.weight": "decoder_norm.weight",
    "decoder_norm.bias": "decoder_norm.bias",
    "decoder_pred.weight": "prediction.weight",
    "decoder_pred.bias": "prediction.bias",
}

REFERENCE_UNUSED = frozenset(
    {"pos_embed", "decoder_pos_embed", "decoder_embed.weight", "decoder_embed.bias"}
)
"""In the authors' checkpoints and not here: two fixed position tables and a linear map
that forward never uses.
"""


def _layer_key(name: str) -> str | None:
    match = re.fullmatch(r"(decoder_)?blocks\.(\d+)\.layers\.(.+)", name)
    if match is None:
        return None
    side = "decoder" if match[1] else "encoder"
    for theirs, ours in _LAYER_KEYS[side].items():
        if match[3] == theirs or match[3].startswith(theirs + "."):
            return f"{side}.{match[2]}.{ours}{match[3][len(theirs) :]}"
    return None


def convert_reference(
    state: Mapping[str, Tensor], heads: int | None = None
) -> tuple[dict[str, object], StateDict]:
    """Sizes and weights of this package's model from an authors' ``mae_crate_*`` state
    dict.

    Parameters
    ----------
    state : the authors' state dict.
    heads : number of heads; ``None`` takes it from the published sizes by token
        dimension.

    Returns
    -------
    (sizes, weights) : keyword arguments of ``CrateMAEConfig`` (image_size, patch_size, channels, dim, depth, heads)
        and the renamed tensors.

    Raises
    ------
    ValueError
        If the keys are not those of a CRATE-MAE checkpoint, or ``heads`` is needed and not given.

    Book: :ref:`ch-crate-mae`.
    """
    weights: StateDict = {}
    unknown = []
    for name, tensor in state.items():
        ours = _TOP_KEYS.get(name) or _layer_key(name)
        if ours is not None:
            weights[ours] = tensor
        elif name == "patch_embed.proj.weight":
            # A convolution's (d, C, P, P) kernel as a matrix on patches flattened rows,
            # columns, channels.
            weights["patch_embedding.weight"] = tensor.permute(0, 2, 3, 1).flatten(1)
        elif name not in REFERENCE_UNUSED:
            unknown.append(name)
    required = {
        "patch_embed.proj.weight",
        "cls_token",
        "mask_token",
        "decoder_pos_embed",
        "decoder_pred.weight",
    }
    missing = sorted(required - state.keys())
    if unknown or missing:
        raise ValueError(
            "not an authors' CRATE-MAE checkpoint (mae_crate_tiny, _small, _base or _large): "
            f"missing {missing}, unexpected {sorted(unknown)[:5]}"
        )
    dim, channels, patch_size, _ = state["patch_embed.proj.weight"].shape
    side = round((state["decoder_pos_embed"].shape[1] - 1) ** 0.5)
    depth = 1 + max(
        (int(name.split(".")[1]) for name in weights if name.startswith("encoder.")),
        default=-1,
    )
    heads = heads or REFERENCE_HEADS.get(dim)
    if heads is None:
        raise ValueError(
            f"the number of heads cannot be read from weights of dimension {dim}: pass heads="
        )
    sizes: dict[str, object] = {
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "channels": channels,
        "dim": dim,
        "depth": depth,
        "heads": heads,
    }
    return sizes, weights
