r"""Multi-head subspace self-attention (MSSA), its exact counterpart, and the module.

Book: :ref:`ch-attention`.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from crate_core.rate import head_coordinates, subspace_beta, subspace_coding_rate_grad
from crate_core.shapes import AttentionWeights, Bases, Heads, Tokens


def attention_weights(v: Heads, scale: float) -> AttentionWeights:
    r"""Softmax over tokens of scaled inner products in each subspace, as rows,

    .. math:: A_k = \mathrm{softmax}\big(\alpha\, V_k V_k^\top\big), \qquad A_k \mathbf{1} = \mathbf{1},

    for v of shape (..., K, n, p); the result is (..., K, n, n).  Book: :ref:`ch-attention`.
    """
    return torch.softmax(scale * (v @ v.mT), dim=-1)


def attend(v: Heads, scale: float) -> Heads:
    r"""Self-attention with one shared projection as query, key and value, :math:`A_k V_k` as rows.

    Equal to ``attention_weights(v, scale) @ v`` without storing the n x n weights, so memory grows linearly in n.
    Book: :ref:`ch-attention`.
    """
    flat = v.reshape(math.prod(v.shape[:-3]), *v.shape[-3:])  # the kernels that store no weights take one batch axis
    return F.scaled_dot_product_attention(flat, flat, flat, scale=scale).reshape(v.shape)


def mssa(z: Tokens, bases: Bases, *, scale: float = 1.0, eps: float | None = None) -> Tokens:
    r"""Multi-head subspace self-attention

    .. math:: \mathrm{MSSA}(Z \mid U_{[K]}) = \beta \sum_k U_k\, (U_k^\top Z)\,
              \mathrm{softmax}\big(\alpha\,(U_k^\top Z)^\top (U_k^\top Z)\big), \qquad
              \beta = \frac{p}{n\varepsilon^2}.

    Parameters
    ----------
    z : (..., n, d) tokens as rows.
    bases : (K, d, p), orthonormal or not.
    scale : alpha, multiplies the inner products; 1 is the literal formula, 1/sqrt(p) what trained models use on
        LayerNormed tokens.
    eps : coding precision, > 0; ``None`` sets beta to 1, the attention operator alone.

    Returns
    -------
    (..., n, d).

    Raises
    ------
    ValueError
        If the bases do not fit the tokens or eps <= 0.

    Book: :ref:`ch-attention`, which says when this denoises and that it is no expansion of the exact gradient.
    """
    v = head_coordinates(z, bases)
    beta = 1.0 if eps is None else subspace_beta(v.shape[-2], v.shape[-1], eps)
    return beta * (attend(v, scale) @ bases.mT).sum(-3)


def exact_mssa(z: Tokens, bases: Bases, eps: float) -> Tokens:
    r"""What the exact gradient of :math:`R^c` puts in the place of softmax attention,

    .. math:: \beta \sum_k U_k V_k\, \beta G_k (I + \beta G_k)^{-1}
              = \beta \sum_k U_k V_k - \nabla R^c(Z), \qquad V_k = U_k^\top Z,\; G_k = V_k^\top V_k.

    Each column of :math:`\beta G_k (I+\beta G_k)^{-1}` predicts a token from all tokens by ridge regression; softmax
    attention replaces these weights.

    Raises ``ValueError`` if the bases do not fit the tokens or eps <= 0.  Book: :ref:`ch-attention`.
    """
    v = head_coordinates(z, bases)
    beta = subspace_beta(v.shape[-2], v.shape[-1], eps)
    return beta * (v @ bases.mT).sum(-3) - subspace_coding_rate_grad(z, bases, eps)


def mssa_step(
    z: Tokens, bases: Bases, eps: float, kappa: float, *, scale: float = 1.0, exact: bool = False
) -> Tokens:
    r"""One unrolled compression step

    .. math:: Z' = (1 - \kappa\beta)\, Z + \kappa\, \mathrm{MSSA}(Z \mid U_{[K]}).

    With ``exact=True``, :func:`exact_mssa` stands in the place of softmax attention (``scale`` is then not used); if
    the subspaces fill the space (:math:`\sum_k U_k U_k^\top = I`) that is the gradient step
    :math:`Z - \kappa \nabla R^c(Z)`.

    Raises ``ValueError`` if the bases do not fit the tokens or eps <= 0.  Book: :ref:`ch-attention`.
    """
    beta = subspace_beta(z.shape[-2], bases.shape[-1], eps)
    attended = exact_mssa(z, bases, eps) if exact else mssa(z, bases, scale=scale, eps=eps)
    return (1 - kappa * beta) * z + kappa * attended


class MSSA(nn.Module):
    r"""The MSSA operator as the published models learn it,

    .. math:: \mathrm{MSSA}(Z) = W_o \begin{bmatrix} V_1 A_1 \\ \vdots \\ V_K A_K \end{bmatrix} + b_o, \qquad
              V_k = U_k^\top Z, \quad A_k = \mathrm{softmax}\big(V_k^\top V_k / \sqrt{p}\big).

    One projection serves as query, key and value (``project``, no bias).  It differs from :func:`mssa` by the learned
    output projection with bias in the place of :math:`[U_1 \dots U_K]`, by the scale 1/sqrt(p), and by
    :math:`\beta = 1`.

    Parameters
    ----------
    dim : token dimension d.
    heads : number of subspaces K; must divide dim, p = d / K.

    Raises
    ------
    ValueError
        If heads does not divide dim.

    Book: :ref:`ch-attention`; the authors' published code, with one difference: the output projection is there for a
    single head too.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if heads < 1 or dim % heads:
            raise ValueError(f"heads must divide dim, got dim={dim}, heads={heads}")
        self.heads = heads
        self.scale = 1.0 / math.sqrt(dim // heads)
        self.project = nn.Linear(dim, dim, bias=False)
        self.output = nn.Linear(dim, dim)

    @property
    def bases(self) -> Bases:
        """The learned U_k as (K, d, p); not orthonormal in general."""
        return self.project.weight.unflatten(0, (self.heads, -1)).mT

    def head_coordinates(self, z: Tokens) -> Heads:
        """V_k = U_k^T Z as rows, (..., K, n, p)."""
        return self.project(z).unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def weights(self, z: Tokens) -> AttentionWeights:
        """The attention weights (..., K, n, n) that ``forward`` uses without storing them."""
        return attention_weights(self.head_coordinates(z), self.scale)

    def forward(self, z: Tokens) -> Tokens:
        attended = attend(self.head_coordinates(z), self.scale)  # (..., K, n, p)
        return self.output(attended.transpose(-3, -2).flatten(-2))
