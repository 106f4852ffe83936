r"""Multi-head subspace self-attention (MSSA), its exact counterpart, and the module.

Book: :ref:`ch-attention`.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from crate_core.checks import check_real, check_tensor, is_count
from crate_core.model.kernels import ShortSharedAttention
from crate_core.shapes import AttentionWeights, Bases, Heads, Tokens
from crate_core.theory.rate import (
    head_coordinates,
    subspace_beta,
    subspace_coding_rate_grad,
)


def check_heads(v: Heads, scale: float) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless v are coordinates (..., K, n, p),
    and the scale is a number.
    """
    check_tensor("v", v)
    if v.ndim < 3:
        raise ValueError(f"v must be (..., K, n, p), got {tuple(v.shape)}")
    check_real("scale", scale)


def attention_weights(v: Heads, scale: float) -> AttentionWeights:
    r"""Softmax over tokens of scaled inner products in each subspace, as rows,

    .. math:: A_k = \mathrm{softmax}\big(\alpha\, V_k V_k^\top\big), \qquad
              A_k \mathbf{1} = \mathbf{1}.

    Parameters
    ----------
    v : tensor (..., K, n, p)
        Coordinates of the tokens in each subspace, tokens as rows.
    scale : float
        The factor alpha of the inner products.

    Returns
    -------
    tensor (..., K, n, n)
        Entry (i, j) is the weight of token j in the output of token i.

    Book: :ref:`ch-attention`, :eq:`eq-attention-mssa`.
    """
    check_heads(v, scale)
    return torch.softmax(scale * (v @ v.mT), dim=-1)


SHORT_ATTENTION = 256
"""Tokens up to which bfloat16 attention on a CPU keeps its weights for the backward
pass.
"""


def attend(v: Heads, scale: float, values: Heads | None = None) -> Heads:
    r"""Self-attention with one shared projection as query, key and value, :math:`A_k
    V_k` as rows.

    Equal to ``attention_weights(v, scale) @ v``, or ``@ values`` where these are given.
    Where PyTorch has a fused kernel (always on a CPU) the n x n weights are not stored,
    and memory grows linearly in n; the exception is
    :class:`~crate_core.model.kernels.ShortSharedAttention`.

    Parameters
    ----------
    v : tensor (..., K, n, p)
        Coordinates of the tokens in each subspace, tokens as rows.
    scale : float
        The factor alpha of the inner products.
    values : tensor (..., K, n, p), optional
        What to average instead of v itself: a departure from the paper, for ablation.

    Returns
    -------
    tensor (..., K, n, p)

    Book: :ref:`ch-attention`, :prf:ref:`thm-attention-gate`.
    """
    check_heads(v, scale)
    # the kernels that store no weights take one batch axis
    flat = v.reshape(math.prod(v.shape[:-3]), *v.shape[-3:])
    if values is not None:
        check_tensor("values", values)
    averaged = flat if values is None else values.reshape(flat.shape)
    short = (
        v.shape[-2] <= SHORT_ATTENTION
        and v.dtype == torch.bfloat16
        and v.device.type == "cpu"
    )
    if short and values is None and torch.is_grad_enabled():
        return ShortSharedAttention.apply(flat.flatten(0, 1), scale).reshape(v.shape)
    return F.scaled_dot_product_attention(flat, flat, averaged, scale=scale).reshape(
        v.shape
    )


def mssa(
    z: Tokens, bases: Bases, *, scale: float = 1.0, eps: float | None = None
) -> Tokens:
    r"""Multi-head subspace self-attention

    .. math:: \mathrm{MSSA}(Z \mid U_{[K]}) = \beta \sum_k U_k\, (U_k^\top Z)\,
              \mathrm{softmax}\big(\alpha\,(U_k^\top Z)^\top (U_k^\top Z)\big), \qquad
              \beta = \frac{p}{n\varepsilon^2}.

    Parameters
    ----------
    z : tensor (..., n, d)
        Tokens as rows.
    bases : tensor (K, d, p)
        Orthonormal or not.
    scale : float
        The factor alpha of the inner products; 1 is the literal formula, 1/sqrt(p) what
        trained models use on LayerNormed tokens.
    eps : float, optional
        Coding precision, > 0; ``None`` sets beta to 1, the attention operator alone.

    Returns
    -------
    tensor (..., n, d)

    Raises
    ------
    ValueError
        If the bases do not fit the tokens or eps is not positive.

    Notes
    -----
    Follows :cite:t:`yu2023white`.  The chapter shows that this is no expansion of
    :func:`exact_mssa`, and when it denoises all the same.

    Book: :ref:`ch-attention`, :eq:`eq-attention-mssa`.
    """
    v = head_coordinates(z, bases)
    beta = 1.0 if eps is None else subspace_beta(v.shape[-2], v.shape[-1], eps)
    return beta * (attend(v, scale) @ bases.mT).sum(-3)


def exact_mssa(z: Tokens, bases: Bases, eps: float) -> Tokens:
    r"""What the exact gradient of :math:`R^c` puts in the place of softmax attention,

    .. math:: \beta \sum_k U_k V_k\, \beta G_k (I + \beta G_k)^{-1}
              = \beta \sum_k U_k V_k - \nabla R^c(Z), \qquad
              V_k = U_k^\top Z,\; G_k = V_k^\top V_k.

    Each column of :math:`\beta G_k (I+\beta G_k)^{-1}` predicts a token from all tokens
    by ridge regression; softmax attention replaces these weights.

    Parameters
    ----------
    z : tensor (..., n, d)
        Tokens as rows.
    bases : tensor (K, d, p)
        Orthonormal or not.
    eps : float
        Coding precision, > 0.

    Returns
    -------
    tensor (..., n, d)

    Raises
    ------
    ValueError
        If the bases do not fit the tokens or eps is not positive.

    Notes
    -----
    Computed as the difference on the right: its rounding error is small against
    :math:`\beta \|Z\|` at any eps, where solving for the weights loses all digits in
    single precision once n < p and beta is large.

    Book: :ref:`ch-attention`, :prf:ref:`thm-attention-ridge`.
    """
    v = head_coordinates(z, bases)
    beta = subspace_beta(v.shape[-2], v.shape[-1], eps)
    return beta * (v @ bases.mT).sum(-3) - subspace_coding_rate_grad(z, bases, eps)


def mssa_step(
    z: Tokens,
    bases: Bases,
    eps: float,
    kappa: float,
    *,
    scale: float = 1.0,
    exact: bool = False,
) -> Tokens:
    r"""One unrolled compression step

    .. math:: Z' = (1 - \kappa\beta)\, Z + \kappa\, \mathrm{MSSA}(Z \mid U_{[K]}).

    Parameters
    ----------
    z : tensor (..., n, d)
        Tokens as rows.
    bases : tensor (K, d, p)
        Orthonormal or not.
    eps : float
        Coding precision, > 0; fixes beta.
    kappa : float
        Step size.
    scale : float
        The factor alpha of the inner products in :func:`mssa`.
    exact : bool
        Put :func:`exact_mssa` in the place of softmax attention (``scale`` then has no
        effect).  If the subspaces fill the space, :math:`\sum_k U_k U_k^\top = I`, that
        is the gradient step :math:`Z - \kappa \nabla R^c(Z)`; otherwise the part
        outside them is multiplied by :math:`1 - \kappa\beta` besides.

    Returns
    -------
    tensor (..., n, d)

    Raises
    ------
    ValueError
        If the bases do not fit the tokens or eps is not positive.

    Book: :ref:`ch-attention`, :eq:`eq-attention-exact`.
    """
    check_real("kappa", kappa)
    attended = (
        exact_mssa(z, bases, eps) if exact else mssa(z, bases, scale=scale, eps=eps)
    )
    beta = subspace_beta(z.shape[-2], bases.shape[-1], eps)
    return (1 - kappa * beta) * z + kappa * attended


class MSSA(nn.Module):
    r"""The MSSA operator as the published models learn it,

    .. math:: \mathrm{MSSA}(Z) = W_o \begin{bmatrix} V_1 A_1 \\ \vdots \\ V_K A_K
              \end{bmatrix} + b_o, \qquad
              V_k = U_k^\top Z, \quad A_k = \mathrm{softmax}\big(V_k^\top V_k /
              \sqrt{p}\big).

    One projection serves as query, key and value (``project``, no bias).  It differs
    from :func:`mssa` by the learned output projection with bias in the place of
    :math:`[U_1 \dots U_K]`, by the scale 1/sqrt(p), and by :math:`\beta = 1`; nothing
    keeps the learned bases orthonormal.  It has :math:`2d^2 + d` parameters.

    Parameters
    ----------
    dim : int
        Token dimension d.
    heads : int
        Number of subspaces K; must divide dim, p = d / K.
    separate_values : bool
        Ablation: average :math:`W_v Z`, a projection of its own (``values``, d^2
        parameters more), in the place of :math:`V_k`.

    Raises
    ------
    ValueError
        If heads does not divide dim.

    Notes
    -----
    Follows the published code of :cite:t:`pai2024masked`, with one difference: the
    output projection is there for a single head too.

    Book: :ref:`ch-attention`.
    """

    def __init__(self, dim: int, heads: int, separate_values: bool = False) -> None:
        super().__init__()
        if not is_count(dim) or not is_count(heads) or dim % heads:
            raise ValueError(f"heads must divide dim, got dim={dim!r}, heads={heads!r}")
        self.heads = heads
        self.scale = 1.0 / math.sqrt(dim // heads)
        self.project = nn.Linear(dim, dim, bias=False)
        self.values = nn.Linear(dim, dim, bias=False) if separate_values else None
        self.output = nn.Linear(dim, dim)

    @property
    def bases(self) -> Bases:
        """The learned U_k, (K, d, p), not orthonormal in general.

        Book: :ref:`ch-attention`.
        """
        return self.project.weight.unflatten(0, (self.heads, -1)).mT

    def head_coordinates(self, z: Tokens) -> Heads:
        r"""Coordinates :math:`V_k = U_k^\top Z` as rows, (..., K, n, p).

        Book: :ref:`ch-attention`.
        """
        return self.split_heads(self.project(z))

    def split_heads(self, z: Tokens) -> Heads:
        """Tokens (..., n, d) as heads (..., K, n, p)."""
        return z.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

    def weights(self, z: Tokens) -> AttentionWeights:
        """The weights (..., K, n, n) that ``forward`` does not store.

        Book: :ref:`ch-attention`.
        """
        return attention_weights(self.head_coordinates(z), self.scale)

    def forward(self, z: Tokens) -> Tokens:
        """Tokens (..., n, d) to tokens (..., n, d).  Book: :ref:`ch-attention`."""
        values = None if self.values is None else self.split_heads(self.values(z))
        # (..., K, n, p)
        attended = attend(self.head_coordinates(z), self.scale, values)
        return self.output(attended.transpose(-3, -2).flatten(-2))
