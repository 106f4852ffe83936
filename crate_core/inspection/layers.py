r"""What the layers of a trained encoder do, measured: rates, sparsity, ranks, steps
against gradients, inversion.

:func:`inspect_layers` measures on pictures, :func:`inspect_weights` on the weights
alone; both return frozen dataclasses of NumPy arrays, and :func:`summarize` means and
spreads ready for JSON.  They read the tokens that the model's own ``forward`` returns
and call the layers' own parts again (:mod:`crate_core.inspection.layer_measures`, which
says which bases and units); nothing is hooked into the model.

Book: :ref:`ch-layer-by-layer`.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crate_core.inspection.layer_measures import (
    attention_parts,
    inversion_measures,
    layer_measures,
    token_measures,
)
from crate_core.inspection.measures import (
    entropy_rank,
    gram_defect,
    matrix_cosine,
    participation_ratio,
    subspace_cosines,
)
from crate_core.keys import evaluation_noise, random_key
from crate_core.model.autoencoder import MaskedAutoencoder, evaluation_mode
from crate_core.model.config import CrateMAEConfig
from crate_core.shapes import Images
from crate_core.theory.rate import check_eps


@dataclass(frozen=True)
class Rates:
    """Rates of one kind of tokens in nats, arrays (pictures, layers): ``total`` is R,
    ``learned`` is R^c in the subspaces as learned, ``orthonormal`` R^c after each basis
    was made orthonormal.
    """

    total: np.ndarray
    learned: np.ndarray
    orthonormal: np.ndarray

    @property
    def reduction(self) -> np.ndarray:
        """R - R^c, in the orthonormalised subspaces, where both rates use the same
        lengths.
        """
        return self.total - self.orthonormal


@dataclass(frozen=True)
class LayerInspection:
    """Measures on pictures.  Arrays (pictures, L) have one column a layer, arrays
    (pictures, L + 1) one for the embedding and one for each layer's output.

    Rates: ``attended``, of the input as the layer's attention sees it, LN(x);
    ``attended_after``, of LN(u) with the same norm, u = x + attention(LN(x));
    ``tokens``, of x itself; ``compressed``, of u **in the units of x**. ``random_rate``
    is R^c of LN(x) in random orthonormal subspaces, the control of
    ``attended.orthonormal``; ``directions`` the authors' published measure: each head's
    coordinates of each token at norm one, eps = ``DIRECTIONS_EPS``.

    Steps: mean cosines between attention(LN(x)) and a direction, at the attention's
    input z = LN(x): ``step_gradient`` with :math:`-\\nabla R^c(z)` in the learned
    subspaces, ``step_exact`` with the operator that makes the step exact,
    ``step_formula`` with the formula MSSA(z | U), ``step_residual`` with minus the part
    of z outside its strongest subspace, ``step_shrink`` with -z; ``step_beyond`` is
    ``step_gradient`` with z's own direction taken out of both. Controls:
    ``step_random`` in random subspaces, ``step_swapped`` with the gradient of another
    token.

    Inversion, only where a decoder layer takes what an encoder layer gives: arrays
    (pictures, L, M), how well decoder layer m brings output l + 1 back to input l; a
    partner has m = L - 1 - l.  ``inverse_cosine`` between whole token matrices,
    ``inverse_centred`` after each picture's mean token is taken out, ``inverse_scale``
    the best scalar. ``path_similarity`` (pictures, L, M): between encoder input l and
    the decoder's own tokens after m + 1 layers, the cosine of their Gram matrices about
    the mean token (linear CKA), which no rotation of either changes.
    """

    eps: float
    mask_ratio: float
    attended: Rates
    attended_after: Rates
    tokens: Rates
    compressed: Rates
    directions: np.ndarray
    random_rate: np.ndarray
    norms: np.ndarray
    nonzeros: np.ndarray
    hoyer: np.ndarray
    gini: np.ndarray
    participation: np.ndarray
    entropy: np.ndarray
    normed_participation: np.ndarray
    normed_entropy: np.ndarray
    pooled_participation: np.ndarray
    pooled_entropy: np.ndarray
    step_gradient: np.ndarray
    step_exact: np.ndarray
    step_formula: np.ndarray
    step_residual: np.ndarray
    step_shrink: np.ndarray
    step_beyond: np.ndarray
    step_random: np.ndarray
    step_swapped: np.ndarray
    inverse_cosine: np.ndarray | None
    inverse_centred: np.ndarray | None
    inverse_scale: np.ndarray | None
    path_similarity: np.ndarray | None


@dataclass(frozen=True)
class WeightInspection:
    """Measures of weights, arrays (L,).

    ``coherence_max`` and ``coherence_mean``: largest and mean cosine between two
    subspaces of a layer. ``basis_defect``: how far the columns of a U_k are from
    orthonormal at their best scale, mean over heads; ``basis_condition`` its largest
    over smallest singular value.  ``written_cosine``: between the output projection and
    [U_1 ... U_K], which the theory puts in its place. For a dictionary D:
    ``dictionary_norm`` is :math:`\\|D\\|_2^2`, ``dictionary_condition`` its condition
    number, ``dictionary_defect`` :math:`\\|D^\\top D - I\\|_F / \\sqrt m`; ``eta`` the
    step size.  ``partner_cosine``: between D and the matrix E of the partner in the
    decoder.  ``None`` where there is no dictionary or no partner.
    """

    coherence_max: np.ndarray
    coherence_mean: np.ndarray
    basis_defect: np.ndarray
    basis_condition: np.ndarray
    written_cosine: np.ndarray
    dictionary_norm: np.ndarray | None
    dictionary_condition: np.ndarray | None
    dictionary_defect: np.ndarray | None
    eta: float | None
    partner_cosine: np.ndarray | None


class _Pooled:
    """Mean and covariance of all tokens of all pictures, gathered batch by batch in
    float64.
    """

    def __init__(self) -> None:
        self.count, self.total, self.gram = 0, cast(Any, 0.0), cast(Any, 0.0)

    def add(self, x: Tensor) -> None:
        rows = x.flatten(0, -2).cpu().double()
        self.count, self.total, self.gram = (
            self.count + len(rows),
            self.total + rows.sum(0),
            self.gram + rows.mT @ rows,
        )

    def spectrum(self) -> Tensor:
        mean = self.total / self.count
        return torch.linalg.eigvalsh(
            self.gram / self.count - torch.outer(mean, mean)
        ).clamp_min(0.0)


@torch.no_grad()
def inspect_layers(
    model: MaskedAutoencoder,
    images: Images,
    *,
    eps: float = 0.5,
    mask_ratio: float = 0.0,
    seed: int = 0,
    batch_size: int = 64,
) -> LayerInspection:
    r"""Measure every encoder layer on pictures.

    Parameters
    ----------
    model : of either architecture; used in evaluation mode, on its device.
    images : (B, C, H, W) in [0, 1].
    eps : coding precision, > 0, as a share of the tokens' root mean square norm: the
        error allowed per token.  Half of the norm counts only directions that hold a
        good part of the energy; the chapter shows what other values change.
    mask_ratio : share of patches removed, in [0, 1); 0 as in evaluation, where whole
        pictures are encoded.
    seed : fixes masks and the random subspaces of the control.
    batch_size : pictures at a time.

    Raises
    ------
    ValueError
        If there is no picture, or they, eps or the mask ratio do not fit.

    Book: :ref:`ch-layer-by-layer`.
    """
    check_eps(eps)
    if len(images) == 0:
        raise ValueError("there is no picture to inspect the layers on")
    with evaluation_mode(model):
        device = next(model.parameters()).device
        noise = evaluation_noise(seed, len(images), math.prod(model.config.grid))
        invertible = (
            isinstance(model.config, CrateMAEConfig)
            and not model.config.encode_visible_only
        )
        pooled = [_Pooled() for _ in range(len(model.encoder) + 1)]
        batches = []
        for rows in torch.arange(len(images)).split(batch_size):
            pictures = model.standardize(images[rows].to(device))
            out = model(
                pictures, mask_ratio, noise[rows].to(device), output_hidden_states=True
            )
            hidden, decoded = out.hidden_states, out.decoder_hidden_states
            keys = [random_key(seed, index) for index in range(len(model.encoder))]
            layers = [
                layer_measures(*arguments, eps)
                for arguments in zip(model.encoder, hidden[:-1], keys, strict=True)
            ]
            measures = {
                name: torch.stack([found[name] for found in layers], dim=1)
                for name in layers[0]
            }
            between = [token_measures(x) for x in hidden]
            measures |= {
                name: torch.stack([found[name] for found in between], dim=1)
                for name in between[0]
            }
            if invertible:
                measures |= inversion_measures(model, hidden, decoded)
            for gathered, x in zip(pooled, hidden, strict=True):
                gathered.add(F.layer_norm(x, x.shape[-1:]))
            batches.append(
                {name: value.cpu().double().numpy() for name, value in measures.items()}
            )
    arrays: dict[str, Any] = {
        name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]
    }
    for stream in ("attended", "attended_after", "tokens", "compressed"):
        arrays[stream] = Rates(
            **{kind.name: arrays.pop(f"{stream}.{kind.name}") for kind in fields(Rates)}
        )
    for name, rank in (
        ("participation", participation_ratio),
        ("entropy", entropy_rank),
    ):
        arrays[f"pooled_{name}"] = np.array(
            [float(rank(gathered.spectrum())) for gathered in pooled]
        )
    absent = {field.name: None for field in fields(LayerInspection)}
    return LayerInspection(**{**absent, **arrays, "eps": eps, "mask_ratio": mask_ratio})


@torch.no_grad()
def inspect_weights(model: MaskedAutoencoder) -> WeightInspection:
    """Measure the weights of every encoder layer against what the theorems assume.

    Parameters
    ----------
    model : of either architecture.

    Book: :ref:`ch-layer-by-layer`.
    """
    found: dict[str, list[float]] = {}
    config = model.config
    crate = config if isinstance(config, CrateMAEConfig) else None
    for index, layer in enumerate(model.encoder):
        parts = attention_parts(layer)
        bases = parts.bases.cpu().double()
        values = torch.linalg.svdvals(bases)
        cosines = subspace_cosines(bases) if len(bases) > 1 else torch.zeros(1)
        measures = {
            "coherence_max": cosines.max(),
            "coherence_mean": cosines.mean(),
            "basis_defect": gram_defect(bases).mean(),
            "basis_condition": (values[:, 0] / values[:, -1]).mean(),
            "written_cosine": matrix_cosine(
                parts.written.flatten(0, 1), parts.bases.flatten(0, 1)
            ),
        }
        if crate is not None:
            dictionary = cast(Any, layer).sparsify.weight.cpu().double()
            spectrum = torch.linalg.svdvals(dictionary)
            identity = torch.eye(
                dictionary.shape[1], dtype=dictionary.dtype, device=dictionary.device
            )
            distance = torch.linalg.matrix_norm(dictionary.mT @ dictionary - identity)
            measures |= {
                "dictionary_norm": spectrum[0] ** 2,
                "dictionary_condition": spectrum[0] / spectrum[-1],
                "dictionary_defect": distance / math.sqrt(len(identity)),
            }
            if crate.decoder_layers == crate.depth and crate.expansion == 1:
                partner = cast(
                    Any, model.decoder[crate.depth - 1 - index]
                ).densify.weight
                measures["partner_cosine"] = matrix_cosine(
                    dictionary, partner.cpu().double()
                )
        for name, value in measures.items():
            found.setdefault(name, []).append(float(value))
    arrays = {name: np.array(values) for name, values in found.items()}
    absent = {field.name: None for field in fields(WeightInspection)}
    return WeightInspection(
        **cast(Any, {**absent, **arrays, "eta": None if crate is None else crate.eta})
    )


def partner_scores(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores (pictures, L, M = L) of decoder layers on encoder layers, as (pictures, L)
    each: those of the partners m = L - 1 - l, and the mean of those of the other
    decoder layers, the control.

    Raises ``ValueError`` unless there are as many decoder as encoder layers, and two at
    least.

    Book: :ref:`ch-layer-by-layer`.
    """
    depth = matrix.shape[1]
    if matrix.shape[2] != depth or depth < 2:
        raise ValueError(
            f"partners need as many decoder as encoder layers, two or more, got {matrix.shape[1:]}"
        )
    rows = np.arange(depth)
    partners = matrix[:, rows, depth - 1 - rows]
    return partners, (matrix.sum(axis=2) - partners) / (depth - 1)


def summarize(inspection: LayerInspection | WeightInspection) -> dict[str, Any]:
    """An inspection ready for JSON: for arrays with a picture axis their ``mean`` and
    ``std`` over pictures, other arrays as lists; rates under "tokens.total" and so on.

    Book: :ref:`ch-layer-by-layer`.
    """
    summary: dict[str, Any] = {}
    for field in fields(inspection):
        value = getattr(inspection, field.name)
        parts = (
            {f".{kind.name}": getattr(value, kind.name) for kind in fields(Rates)}
            if isinstance(value, Rates)
            else {"": value}
        )
        for suffix, array in parts.items():
            if isinstance(array, np.ndarray) and array.ndim > 1:
                spread = array.std(axis=0, ddof=1 if len(array) > 1 else 0)
                summary[field.name + suffix] = {
                    "mean": array.mean(axis=0).tolist(),
                    "std": spread.tolist(),
                }
            elif array is not None:
                summary[field.name + suffix] = (
                    array.tolist() if isinstance(array, np.ndarray) else array
                )
    return summary
