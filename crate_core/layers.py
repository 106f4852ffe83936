r"""Encoder and decoder layers of CRATE-MAE.

Book: :ref:`ch-layers`.
"""

from torch import nn

from crate_core.attention import MSSA
from crate_core.config import CrateMAEConfig
from crate_core.shapes import Tokens
from crate_core.sparsify import ISTA

LAYER_NORM_EPS = 1e-5
"""Added to the variance in the LayerNorms inside layers."""


class EncoderLayer(nn.Module):
    r"""One compression step, then one sparsification step,

    .. math:: U = X + \mathrm{MSSA}(\mathrm{LN}(X)), \qquad
              X' = \mathrm{ISTA}(\mathrm{LN}(U) \mid D),

    on tokens (B, n, d).  Book: :ref:`ch-layers`.  The authors' published code.
    """

    def __init__(self, config: CrateMAEConfig) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPS)
        self.attention = MSSA(config.dim, config.heads)
        self.norm_sparsify = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPS)
        self.sparsify = ISTA(config.dim, config.eta, config.lambd)

    def compress(self, x: Tokens) -> Tokens:
        """The half step U = X + MSSA(LN(X))."""
        return x + self.attention(self.norm_attention(x))

    def forward(self, x: Tokens) -> Tokens:
        return self.sparsify(self.norm_sparsify(self.compress(x)))


class DecoderLayer(nn.Module):
    r"""The reverse: leave the dictionary's coordinates, then take the compression step back,

    .. math:: V = E\, \mathrm{LN}(Y), \qquad Y' = V - \mathrm{MSSA}(\mathrm{LN}(V)),

    on tokens (B, n, d).  Book: :ref:`ch-layers`.  The authors' published code.
    """

    def __init__(self, config: CrateMAEConfig) -> None:
        super().__init__()
        self.norm_densify = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPS)
        self.densify = nn.Linear(config.dim, config.dim, bias=False)
        self.norm_attention = nn.LayerNorm(config.dim, eps=LAYER_NORM_EPS)
        self.attention = MSSA(config.dim, config.heads)

    def forward(self, y: Tokens) -> Tokens:
        v = self.densify(self.norm_densify(y))
        return v - self.attention(self.norm_attention(v))
