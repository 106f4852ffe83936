r"""Encoder and decoder layers of CRATE-MAE.

Book: :ref:`ch-layers`.
"""

from torch import nn

from crate_core.model.attention import MSSA
from crate_core.model.config import CrateMAEConfig
from crate_core.model.sparsify import ISTA, OvercompleteISTA
from crate_core.shapes import AttentionWeights, Tokens

LAYER_NORM_EPS = 1e-5
"""Added to the variance in the norms inside layers."""


def make_norm(config: CrateMAEConfig) -> nn.Module:
    """The norm inside layers that the configuration names: LayerNorm as published,
    RMSNorm, or none.
    """
    if config.norm == "none":
        return nn.Identity()
    return (nn.LayerNorm if config.norm == "layer" else nn.RMSNorm)(
        config.dim, eps=LAYER_NORM_EPS
    )


def make_sparsify(config: CrateMAEConfig) -> nn.Module:
    """ISTA as published, or over-complete for an ``expansion`` above 1."""
    if config.expansion == 1:
        return ISTA(config.dim, config.eta, config.lambd)
    return OvercompleteISTA(
        config.dim, config.expansion * config.dim, config.eta, config.lambd
    )


class EncoderLayer(nn.Module):
    r"""One compression step, then one sparsification step,

    .. math:: U = X + \mathrm{MSSA}(\mathrm{LN}(X)), \qquad
              X' = \mathrm{ISTA}(\mathrm{LN}(U) \mid D),

    on tokens (B, n, d).  Book: :ref:`ch-layers`.  The authors' published code; the
    configuration's ablations put another norm, attention or dictionary in its place;
    ``drop_path`` is the identity but in a classifier that trains with stochastic depth.
    """

    def __init__(self, config: CrateMAEConfig) -> None:
        super().__init__()
        self.norm_attention = make_norm(config)
        self.attention = MSSA(config.dim, config.heads, config.separate_values)
        self.drop_path: nn.Module = nn.Identity()
        self.norm_sparsify = make_norm(config)
        self.sparsify = make_sparsify(config)

    def compress(self, x: Tokens) -> Tokens:
        """The half step U = X + MSSA(LN(X))."""
        return x + self.drop_path(self.attention(self.norm_attention(x)))

    def attention_weights(self, x: Tokens) -> AttentionWeights:
        """The weights (B, K, n, n) of the layer's attention at its input x."""
        return self.attention.weights(self.norm_attention(x))

    def forward(self, x: Tokens) -> Tokens:
        """Tokens (B, n, d) to :math:`X'` (B, n, d)."""
        return self.sparsify(self.norm_sparsify(self.compress(x)))


class DecoderLayer(nn.Module):
    r"""The reverse: leave the dictionary's coordinates, then take the compression step
    back,

    .. math:: V = E\, \mathrm{LN}(Y), \qquad Y' = V - \mathrm{MSSA}(\mathrm{LN}(V)),

    on tokens (B, n, d).  Book: :ref:`ch-layers`.  The authors' published code.
    """

    def __init__(self, config: CrateMAEConfig) -> None:
        super().__init__()
        self.norm_densify = make_norm(config)
        self.densify = nn.Linear(config.dim, config.dim, bias=False)
        self.norm_attention = make_norm(config)
        self.attention = MSSA(config.dim, config.heads, config.separate_values)

    def forward(self, y: Tokens) -> Tokens:
        """Tokens (B, n, d) to :math:`Y'` (B, n, d)."""
        v = self.densify(self.norm_densify(y))
        return v - self.attention(self.norm_attention(v))
