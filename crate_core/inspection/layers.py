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
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crate_core.inspection.layer_measures import (
    Inversion,
    LayerMeasures,
    TokenMeasures,
    attention_parts,
    gathered,
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
class PooledRanks:
    """Effective ranks of all pictures' tokens together, standardised,
    arrays (L + 1,).
    """

    participation: np.ndarray
    entropy: np.ndarray


@dataclass(frozen=True)
class LayerInspection:
    """Measures of every layer on pictures, at the precision ``eps`` with a share
    ``mask_ratio`` of patches removed.

    ``layers``: arrays (pictures, L), one column a layer.  ``between``: arrays
    (pictures, L + 1), one column for the embedding and one for each layer's output.
    ``pooled``: ranks of all pictures' tokens together.  ``inversion``: arrays
    (pictures, L, M), only where a decoder layer takes what an encoder layer gives.
    """

    eps: float
    mask_ratio: float
    layers: LayerMeasures[np.ndarray]
    between: TokenMeasures[np.ndarray]
    pooled: PooledRanks
    inversion: Inversion[np.ndarray] | None


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


def _columns(layers: list[Tensor]) -> Tensor:
    """One column a layer."""
    return torch.stack(layers, dim=1)


def _rows(batches: list[Tensor]) -> np.ndarray:
    """One row a picture, batch after batch."""
    return torch.cat([batch.cpu().double() for batch in batches]).numpy()


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
        pools = [_Pooled() for _ in range(len(model.encoder) + 1)]
        keys = [random_key(seed, index) for index in range(len(model.encoder))]
        layers, between, inversion = [], [], []
        for rows in torch.arange(len(images)).split(batch_size):
            pictures = model.standardize(images[rows].to(device))
            out = model(
                pictures, mask_ratio, noise[rows].to(device), output_hidden_states=True
            )
            hidden, decoded = out.hidden_states, out.decoder_hidden_states
            assert hidden is not None  # asked for
            assert decoded is not None
            measured = [
                layer_measures(layer, x, key, eps)
                for layer, x, key in zip(model.encoder, hidden[:-1], keys, strict=True)
            ]
            layers.append(gathered(measured, _columns))
            between.append(gathered([token_measures(x) for x in hidden], _columns))
            if invertible:
                inversion.append(inversion_measures(model, hidden, decoded))
            for pool, x in zip(pools, hidden, strict=True):
                pool.add(F.layer_norm(x, x.shape[-1:]))
    spectra = [pool.spectrum() for pool in pools]
    return LayerInspection(
        eps=eps,
        mask_ratio=mask_ratio,
        layers=cast(Any, gathered(layers, _rows)),
        between=cast(Any, gathered(between, _rows)),
        pooled=PooledRanks(
            participation=np.array([float(participation_ratio(s)) for s in spectra]),
            entropy=np.array([float(entropy_rank(s)) for s in spectra]),
        ),
        inversion=cast(Any, gathered(inversion, _rows)) if invertible else None,
    )


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
            "partners need as many decoder as encoder layers, two or more, "
            f"got {matrix.shape[1:]}"
        )
    rows = np.arange(depth)
    partners = matrix[:, rows, depth - 1 - rows]
    return partners, (matrix.sum(axis=2) - partners) / (depth - 1)


def summarize(inspection: LayerInspection | WeightInspection) -> dict[str, Any]:
    """An inspection ready for JSON: for arrays with a picture axis their ``mean`` and
    ``std`` over pictures, other arrays as lists; under dotted names, such as
    "layers.tokens.total".

    Book: :ref:`ch-layer-by-layer`.
    """
    return dict(_summaries("", inspection))


def _summaries(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The entries of :func:`summarize` under a name."""
    if is_dataclass(value):
        for field in fields(value):
            yield from _summaries(
                f"{name}.{field.name}".lstrip("."), getattr(value, field.name)
            )
    elif isinstance(value, np.ndarray) and value.ndim > 1:
        spread = value.std(axis=0, ddof=1 if len(value) > 1 else 0)
        yield name, {"mean": value.mean(axis=0).tolist(), "std": spread.tolist()}
    elif value is not None:
        yield name, value.tolist() if isinstance(value, np.ndarray) else value
