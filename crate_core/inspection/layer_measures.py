r"""What one layer does to tokens, measured: its rates, its step against gradients, what
its partner gives back.

The pieces of :mod:`crate_core.inspection.layers`, on tensors.

**Which bases.**  In a CRATE layer :math:`U_k` is the shared projection of head k.  A
vision transformer has three projections; its :math:`U_k` here is the *value* projection
of head k, the one whose image is averaged and passed on.

**Which units.**  A rate changes when tokens merely grow, so tokens are scaled to root
mean square norm one, picture by picture, and ``eps`` is the error allowed per token as
a share of that norm.

Book: :ref:`ch-layer-by-layer`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Generic, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_core.inspection.measures import (
    entropy_rank,
    gini,
    hoyer,
    matrix_cosine,
    nonzero_share,
    orthonormal_bases,
    participation_ratio,
    token_cosine,
    token_spectrum,
)
from crate_core.model.attention import exact_mssa, mssa
from crate_core.model.autoencoder import MaskedAutoencoder
from crate_core.model.layers import DecoderLayer, EncoderLayer
from crate_core.shapes import Bases, Scalars, Tokens
from crate_core.theory.rate import (
    coding_rate,
    head_coordinates,
    subspace_coding_rate,
    subspace_coding_rate_grad,
)

DIRECTIONS_EPS = 0.1
"""Coding precision of the authors' published measure, for coordinates of norm one
(their code gives its square).
"""


Array = TypeVar("Array")
"""Tensors (B,) of one layer and batch while measuring, arrays (pictures, layers) after.
"""

Part = TypeVar("Part")


@dataclass(frozen=True)
class Rates(Generic[Array]):
    """Rates of one kind of tokens in nats: ``total`` is R, ``learned`` is R^c in the
    subspaces as learned, ``orthonormal`` R^c after each basis was made orthonormal.
    """

    total: Array
    learned: Array
    orthonormal: Array

    @property
    def reduction(self) -> Array:
        """R - R^c, in the orthonormalised subspaces, where both rates use the same
        lengths.
        """
        return cast(Any, self.total) - self.orthonormal


@dataclass(frozen=True)
class Steps(Generic[Array]):
    """Mean cosines, token by token, between what attention adds, attention(LN(x)), and
    a direction at its input z = LN(x).

    ``gradient`` is :math:`-\\nabla R^c(z)` in the learned subspaces; ``exact`` the
    operator that makes the step exact; ``formula`` MSSA(z | U); ``residual`` minus the
    part of z outside its strongest subspace; ``shrink`` -z.  ``beyond`` is ``gradient``
    where the part along z is taken out of both vectors, since two vectors that shrink z
    agree for that reason alone.  Controls: ``random``, the gradient in random
    subspaces; ``swapped``, the gradient of another token.
    """

    gradient: Array
    exact: Array
    formula: Array
    residual: Array
    shrink: Array
    beyond: Array
    random: Array
    swapped: Array


@dataclass(frozen=True)
class LayerMeasures(Generic[Array]):
    """What one layer does to its input x, with u = x + attention(LN(x)).

    Rates: ``attended``, of LN(x); ``attended_after``, of LN(u) with the same norm;
    ``tokens``, of x itself; ``compressed``, of u *in the units of x*.
    ``random_rate`` is R^c of LN(x) in random orthonormal subspaces, the control of
    ``attended.orthonormal``; ``directions`` the authors' published measure
    (:func:`direction_rate`).  ``steps``: the attention step against directions.
    """

    attended: Rates[Array]
    attended_after: Rates[Array]
    tokens: Rates[Array]
    compressed: Rates[Array]
    directions: Array
    random_rate: Array
    steps: Steps[Array]


@dataclass(frozen=True)
class TokenMeasures(Generic[Array]):
    """Measures of the tokens between layers: ``norms`` (root mean square), share of
    ``nonzeros``, ``hoyer`` and ``gini`` sparsity, effective rank by ``participation``
    ratio and by ``entropy``, and both of the standardised tokens.
    """

    norms: Array
    nonzeros: Array
    hoyer: Array
    gini: Array
    participation: Array
    entropy: Array
    normed_participation: Array
    normed_entropy: Array


@dataclass(frozen=True)
class Inversion(Generic[Array]):
    """How well decoder layer m brings output l + 1 of the encoder back to input l, for
    all pairs (L, M); a partner has m = L - 1 - l.

    ``cosine`` between whole token matrices; ``centred`` after each picture's mean token
    is taken out; ``scale`` the best scalar.  ``paths``: between encoder input l and the
    decoder's own tokens after m + 1 layers, the cosine of their Gram matrices about the
    mean token (linear CKA), which no rotation of either changes.
    """

    cosine: Array
    centred: Array
    scale: Array
    paths: Array


def gathered(parts: Sequence[Part], join: Callable[[list[Any]], Any]) -> Part:
    """Measures of the same kind joined field by field; ``None`` stays ``None``."""
    first = parts[0]
    if first is None:
        return first
    if not is_dataclass(first):
        return join(list(parts))
    joined = {
        field.name: gathered([getattr(part, field.name) for part in parts], join)
        for field in fields(first)
    }
    return cast(Any, type(first))(**joined)


@dataclass(frozen=True)
class AttentionParts:
    """The attention half of a layer: its ``norm``, the operator ``attend`` on normed
    tokens, and per head what is read (``bases``, (K, d, p)) and what is written
    (``written``, (K, d, p); the theory says that it equals the bases).
    """

    norm: nn.Module
    attend: nn.Module
    bases: Bases
    written: Bases


def attention_parts(layer: nn.Module) -> AttentionParts:
    """The attention half of an encoder or decoder layer of either architecture.

    Raises ``ValueError`` for another module.  Book: :ref:`ch-layer-by-layer`.
    """
    if isinstance(layer, EncoderLayer | DecoderLayer):
        attention = layer.attention
        written = attention.output.weight.unflatten(1, (attention.heads, -1)).movedim(
            1, 0
        )
        return AttentionParts(layer.norm_attention, attention, attention.bases, written)
    if not (hasattr(layer, "norm1") and hasattr(layer, "attn")):
        raise ValueError(
            "a layer of CRATE-MAE or a transformer block of timm is needed, "
            f"got {type(layer).__name__}"
        )
    block = cast(Any, layer)
    heads = block.attn.num_heads
    values = block.attn.qkv.weight.chunk(3)[2]
    written = block.attn.proj.weight.unflatten(1, (heads, -1)).movedim(1, 0)
    return AttentionParts(
        block.norm1, block.attn, values.unflatten(0, (heads, -1)).mT, written
    )


def unit_tokens(z: Tokens, like: Tokens | None = None) -> Tokens:
    """Tokens divided by the root mean square norm of their picture's tokens, or of the
    tokens ``like``.
    """
    scale = (z if like is None else like).square().sum(dim=-1).mean(dim=-1).sqrt()
    return z / scale.clamp_min(torch.finfo(z.dtype).tiny)[..., None, None]


def residual_direction(z: Tokens, bases: Bases) -> Tokens:
    r"""What lies in subspaces other than a token's strongest one, :math:`r_i = \sum_{k
    \ne s_i} U_k U_k^\top z_i` with :math:`s_i = \arg\max_k \|U_k^\top z_i\|`.

    The direction of :func:`crate_core.theory.law.noise_direction` where nobody says
    which subspace is a token's own.

    Parameters
    ----------
    z : tensor (..., n, d)
    bases : tensor (K, d, p), orthonormal each.

    Returns
    -------
    tensor (..., n, d)

    Book: :ref:`ch-layer-by-layer`, :eq:`eq-cd-target`.
    """
    v = head_coordinates(z, bases)
    energy = v.square().sum(dim=-1, keepdim=True)  # (..., K, n, 1)
    own = energy == energy.amax(dim=-3, keepdim=True)
    return (v.masked_fill(own, 0.0) @ bases.mT).sum(dim=-3)


def direction_rate(z: Tokens, bases: Bases) -> Scalars:
    r"""The authors' published measure of :math:`R^c`: head coordinates of norm one,

    .. math:: \tfrac12 \sum_k \log\det\Big(I + \frac{p}{n \varepsilon^2} \hat V_k \hat
              V_k^\top\Big), \qquad
              \hat v_{ki} = \frac{U_k^\top z_i}{\|U_k^\top z_i\|}, \quad \varepsilon =
              0.1 .

    It sees how parallel tokens are inside each head, and neither how long they are nor
    which head holds them.

    Parameters
    ----------
    z : tensor (..., n, d)
    bases : tensor (K, d, p)

    Returns
    -------
    tensor (...)
        In nats.

    Book: :ref:`ch-layer-by-layer`.
    """
    return coding_rate(
        F.normalize(head_coordinates(z, bases), dim=-1), DIRECTIONS_EPS
    ).sum(dim=-1)


def token_rates(
    z: Tokens, bases: Bases, orthonormal: Bases, eps: float
) -> Rates[Scalars]:
    """R of the tokens, and R^c in bases as learned and made orthonormal."""
    return Rates(
        total=coding_rate(z, eps),
        learned=subspace_coding_rate(z, bases, eps),
        orthonormal=subspace_coding_rate(z, orthonormal, eps),
    )


def without(a: Tokens, z: Tokens) -> Tokens:
    """Each row of a without its part along that row of z."""
    direction = F.normalize(z, dim=-1)
    return a - (a * direction).sum(dim=-1, keepdim=True) * direction


def layer_measures(
    layer: nn.Module, x: Tokens, key: int, eps: float
) -> LayerMeasures[Scalars]:
    """All measures of one encoder layer at its input x (B, n, d), each (B,); ``key``
    fixes the random subspaces of the control.
    """
    parts = attention_parts(layer)
    normed = parts.norm(x)
    step = parts.attend(normed)
    half, z = x + step, unit_tokens(normed)
    bases, orthonormal = parts.bases, orthonormal_bases(parts.bases)
    generator = torch.Generator().manual_seed(key)
    random = orthonormal_bases(torch.randn(bases.shape, generator=generator).to(bases))

    def rates(tokens: Tokens) -> Rates[Scalars]:
        return token_rates(tokens, bases, orthonormal, eps)

    against = -subspace_coding_rate_grad(z, bases, eps)
    formula = mssa(normed, bases, scale=1 / math.sqrt(bases.shape[-1]))
    in_random = -subspace_coding_rate_grad(z, random, eps)
    steps: Steps[Scalars] = Steps(
        gradient=token_cosine(step, against),
        exact=token_cosine(step, exact_mssa(z, bases, eps)),
        formula=token_cosine(step, formula),
        residual=token_cosine(step, -residual_direction(z, orthonormal)),
        shrink=token_cosine(step, -z),
        beyond=token_cosine(without(step, z), without(against, z)),
        random=token_cosine(step, in_random),
        swapped=token_cosine(step, against.roll(1, dims=-2)),
    )
    return LayerMeasures(
        attended=rates(z),
        attended_after=rates(unit_tokens(parts.norm(half))),
        tokens=rates(unit_tokens(x)),
        compressed=rates(unit_tokens(half, like=x)),
        directions=direction_rate(normed, bases),
        random_rate=subspace_coding_rate(z, random, eps),
        steps=steps,
    )


def token_measures(x: Tokens) -> TokenMeasures[Scalars]:
    """Measures of the tokens (B, n, d) between layers, each (B,)."""
    spectrum, normed = token_spectrum(x), token_spectrum(F.layer_norm(x, x.shape[-1:]))
    return TokenMeasures(
        norms=x.square().sum(dim=-1).mean(dim=-1).sqrt(),
        nonzeros=nonzero_share(x).mean(dim=-1),
        hoyer=hoyer(x).mean(dim=-1),
        gini=gini(x).mean(dim=-1),
        participation=participation_ratio(spectrum),
        entropy=entropy_rank(spectrum),
        normed_participation=participation_ratio(normed),
        normed_entropy=entropy_rank(normed),
    )


def centred(z: Tokens) -> Tokens:
    """Tokens without their picture's mean token."""
    return z - z.mean(dim=-2, keepdim=True)


def _token_gram(z: Tokens) -> Tensor:
    """Inner products (..., n, n) of the tokens about their mean: all of them but their
    orientation in space.
    """
    return centred(z) @ centred(z).mT


def inversion_measures(
    model: MaskedAutoencoder, hidden: Sequence[Tensor], decoded: Sequence[Tensor]
) -> Inversion[Tensor]:
    """How decoder layers invert encoder layers, and how alike the paths of the two are;
    each (B, L, M).
    """
    whole, about_mean, scales = [], [], []
    for x, output in itertools.pairwise(hidden):
        # (B, M, n, d)
        back = torch.stack([cast(Any, layer)(output) for layer in model.decoder], dim=1)
        target = x[:, None].expand_as(back)
        whole.append(matrix_cosine(back, target))
        about_mean.append(matrix_cosine(centred(back), centred(target)))
        scales.append(
            (back * target).sum(dim=(-2, -1)) / back.square().sum(dim=(-2, -1))
        )
    grams = [[_token_gram(z) for z in tokens] for tokens in (hidden[:-1], decoded[1:])]
    alike = torch.stack(
        [torch.stack([matrix_cosine(x, y) for y in grams[1]], dim=1) for x in grams[0]],
        dim=1,
    )
    return Inversion(
        cosine=torch.stack(whole, dim=1),
        centred=torch.stack(about_mean, dim=1),
        scale=torch.stack(scales, dim=1),
        paths=alike,
    )
