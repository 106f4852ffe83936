r"""The authors' published checkpoints: their names of the weights in ours.

Book: :ref:`ch-crate-mae`.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from crate_core.model.files import StateDict

REFERENCE_HEADS = {384: 6, 576: 12, 768: 12, 1024: 16}
"""Heads of the authors' published sizes by token dimension; the weights themselves do
not tell.
"""

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
    (sizes, weights) : keyword arguments of ``CrateMAEConfig`` (image_size, patch_size,
        channels, dim, depth, heads)
        and the renamed tensors.

    Raises
    ------
    ValueError
        If the keys are not those of a CRATE-MAE checkpoint, or ``heads`` is needed and
        not given.

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
            "not an authors' CRATE-MAE checkpoint (mae_crate_tiny, _small, _base or "
            "_large): "
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
            f"the number of heads cannot be read from weights of dimension {dim}: "
            "pass heads="
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
