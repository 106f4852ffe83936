r"""The same function with fewer operations, for inference: what depends on the weights
alone is computed once.

Book: :ref:`ch-cost`.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_core.model.attention import MSSA
from crate_core.model.crate import CrateMAE
from crate_core.model.layers import DecoderLayer, EncoderLayer
from crate_core.model.sparsify import ISTA, ista_matrix
from crate_core.shapes import Tokens


class FoldedISTA(nn.Linear):
    r"""ISTA after a norm with gain g and shift b, on tokens z that the norm has
    standardised only,

    .. math:: \mathrm{ReLU}\big(z\, \mathrm{diag}(g)\, M + (b M - \eta\lambda)\big),
              \qquad M = I + \eta (D - D^\top D).

    Book: :ref:`ch-cost`, :eq:`eq-cost-fold`.
    """

    def forward(self, z: Tokens) -> Tokens:
        """Tokens (B, n, d) that the norm standardised, to the sparse tokens (B, n, d),
        which are not negative.
        """
        return F.relu(super().forward(z))


def take_affine(norm: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Take a norm's gain and shift out of it (``None`` where it has none)."""
    gain, shift = getattr(norm, "weight", None), getattr(norm, "bias", None)
    for name, value in (("weight", gain), ("bias", shift)):
        if value is not None:
            setattr(norm, name, None)
    return gain, shift


def fold_affine(
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor | None,
    shift: Tensor | None,
    kind: type[nn.Linear] = nn.Linear,
) -> nn.Linear:
    r"""One linear map for gain g and shift b of a norm and the map W, c after it,

    .. math:: W (g \odot z + b) + c = (W\, \mathrm{diag}(g))\, z + (W b + c).

    Book: :ref:`ch-cost`, :eq:`eq-cost-fold`.
    """
    if shift is not None:
        bias = weight @ shift if bias is None else weight @ shift + bias
    if gain is not None:
        weight = weight * gain
    with torch.device("meta"):
        folded = kind(weight.shape[1], weight.shape[0], bias=bias is not None)
    folded.weight = nn.Parameter(weight.contiguous())
    if bias is not None:
        folded.bias = nn.Parameter(bias)
    return folded


def fold_attention(norm: nn.Module, attention: MSSA) -> None:
    """Put the norm's gain and shift into the projections of the attention after it."""
    gain, shift = take_affine(norm)
    attention.project = fold_affine(attention.project.weight, None, gain, shift)
    if attention.values is not None:
        attention.values = fold_affine(attention.values.weight, None, gain, shift)


class FoldedCrateMAE(CrateMAE):
    r"""A trained CRATE-MAE for inference: the same outputs to rounding, not to be
    trained or saved.

    The matrix M of each ISTA step is computed once, not once a batch (for one image of
    197 tokens it costs three to four products with the tokens), and the gains and
    shifts of the norms inside layers are folded into the maps after them.  A copy; the
    given model stays as it is.

    Parameters
    ----------
    model : any CRATE-MAE, ablations included (an over-complete dictionary is left as it
        is).

    Book: :ref:`ch-cost`, :eq:`eq-cost-fold`.
    """

    def __init__(self, model: CrateMAE) -> None:
        # weights that are overwritten at once draw nothing from the caller
        with torch.random.fork_rng(devices=[]):
            super().__init__(model.config)
        config = model.config
        self.to(device=model.class_token.device, dtype=model.class_token.dtype)
        self.load_state_dict(model.state_dict())
        with torch.no_grad():
            for layer in self.encoder:
                assert isinstance(layer, EncoderLayer)
                fold_attention(layer.norm_attention, layer.attention)
                if isinstance(layer.sparsify, ISTA):
                    matrix = ista_matrix(layer.sparsify.weight, layer.sparsify.eta)
                    threshold = matrix.new_full(
                        (config.dim,), -config.eta * config.lambd
                    )
                    affine = take_affine(layer.norm_sparsify)
                    layer.sparsify = fold_affine(
                        matrix.T, threshold, *affine, FoldedISTA
                    )
            for reverse in self.decoder:
                assert isinstance(reverse, DecoderLayer)
                fold_attention(reverse.norm_attention, reverse.attention)
                reverse.densify = fold_affine(
                    reverse.densify.weight, None, *take_affine(reverse.norm_densify)
                )
        self.requires_grad_(False)
        self.eval()

    def save_pretrained(self, directory: str | Path) -> None:
        """Raises ``ValueError``: the folded weights are no checkpoint; save the model
        that was folded.
        """
        raise ValueError(
            f"a folded model is not saved (asked for {directory}); save the model "
            "that it was made from"
        )


def fold(model: CrateMAE) -> FoldedCrateMAE:
    """The model for inference, see :class:`FoldedCrateMAE`.  Book: :ref:`ch-cost`."""
    return FoldedCrateMAE(model)
