r"""Measures of tokens and of weights: sparsity, effective rank, how orthogonal
subspaces are, cosines.

No measure here depends on the scale of what it measures.  Each docstring gives the
value for the zero vector and for equal entries.

Book: :ref:`ch-layer-by-layer`.
"""

import math

import torch
from torch import Tensor

from crate_core.shapes import Bases, PerToken, Scalars, Tokens, TokenVectors
from crate_core.theory.rate import check_tokens


def check_vectors(z: TokenVectors) -> None:
    """Raise ``ValueError`` unless z are floating-point vectors of at least
    two entries.
    """
    if z.ndim < 1 or z.shape[-1] < 2 or not z.is_floating_point():
        raise ValueError(
            "vectors must be floating point, (..., d) with d >= 2, got "
            f"{z.dtype} {tuple(z.shape)}"
        )


def nonzero_share(z: TokenVectors) -> PerToken:
    r"""Share of nonzero entries, :math:`\|z\|_0 / d`.

    0 for the zero vector, 1 for a vector without zeros, however small its entries.

    Parameters
    ----------
    z : tensor (..., d)

    Returns
    -------
    tensor (...)

    Raises
    ------
    ValueError
        If z is not floating point or d < 2.

    Book: :ref:`ch-layer-by-layer`.
    """
    check_vectors(z)
    return (z != 0).to(z.dtype).mean(dim=-1)


def hoyer(z: TokenVectors) -> PerToken:
    r"""Hoyer's sparsity,

    .. math:: \frac{\sqrt d - \|z\|_1 / \|z\|_2}{\sqrt d - 1},

    1 for a single nonzero entry, 0 when all magnitudes are equal; about :math:`(1 -
    \sqrt{2/\pi}) = 0.20` for Gaussian entries and large d.  The zero vector counts as
    1.

    Parameters
    ----------
    z : tensor (..., d)

    Returns
    -------
    tensor (...)
        In [0, 1].

    Raises
    ------
    ValueError
        If z is not floating point or d < 2.

    Book: :ref:`ch-layer-by-layer`.  After :cite:t:`hoyer2004non`.
    """
    check_vectors(z)
    root = math.sqrt(z.shape[-1])
    # Scaled first: squares of tiny entries would underflow.
    z = z / z.abs().amax(dim=-1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
    length = z.norm(dim=-1)
    ratio = z.abs().sum(dim=-1) / length.clamp_min(torch.finfo(z.dtype).tiny)
    return torch.where(length > 0, (root - ratio) / (root - 1), 1.0).clamp(0.0, 1.0)


def gini(z: TokenVectors) -> PerToken:
    r"""Gini index of the magnitudes sorted upwards, :math:`|z|_{(1)} \le \dots \le
    |z|_{(d)}`,

    .. math:: 1 - \frac{2}{d} \sum_{i=1}^{d} \frac{|z|_{(i)}}{\|z\|_1}\,\big(d - i +
              \tfrac12\big),

    0 when all magnitudes are equal, 1 - 1/d for a single nonzero entry; :math:`\sqrt2 -
    1 = 0.41` for Gaussian entries and large d.  The zero vector counts as 1.

    Parameters
    ----------
    z : tensor (..., d)

    Returns
    -------
    tensor (...)
        In [0, 1].

    Raises
    ------
    ValueError
        If z is not floating point or d < 2.

    Book: :ref:`ch-layer-by-layer`.  In the form of :cite:t:`hurley2009comparing`.
    """
    check_vectors(z)
    d = z.shape[-1]
    sizes = z.abs().sort(dim=-1).values
    sizes = sizes / sizes[..., -1:].clamp_min(torch.finfo(z.dtype).tiny)
    total = sizes.sum(dim=-1)
    behind = d - 0.5 - torch.arange(d, dtype=z.dtype, device=z.device)
    index = 1 - 2 / d * (sizes @ behind) / total.clamp_min(torch.finfo(z.dtype).tiny)
    return torch.where(total > 0, index, 1.0).clamp(0.0, 1.0)


def token_spectrum(z: Tokens) -> Tensor:
    r"""Eigenvalues, upwards, of the covariance of the tokens about their mean,
    :math:`\tfrac1n \sum_i (z_i - \bar z) (z_i - \bar z)^\top`: the min(n, d) of them
    that can be nonzero.

    The mean is taken out because it is one direction that says nothing about how tokens
    differ; tokens after a ReLU are mostly mean.

    Parameters
    ----------
    z : tensor (..., n, d)
        Tokens as rows.

    Returns
    -------
    tensor (..., min(n, d))
        In float64, not negative.

    Raises
    ------
    ValueError
        If z is not floating point or not (..., n, d).

    Book: :ref:`ch-layer-by-layer`.
    """
    check_tokens(z)
    centred = z.cpu().double() - z.cpu().double().mean(dim=-2, keepdim=True)
    n, d = z.shape[-2:]
    gram = centred @ centred.mT if n < d else centred.mT @ centred
    return torch.linalg.eigvalsh(gram / n).clamp_min(0.0)


def participation_ratio(spectrum: TokenVectors) -> PerToken:
    r"""Effective rank of a spectrum by its second moment, :math:`(\sum_i \lambda_i)^2 /
    \sum_i \lambda_i^2`.

    r when r eigenvalues are equal and the others zero; 0 for a spectrum of zeros.

    Parameters
    ----------
    spectrum : tensor (..., m)
        Eigenvalues, >= 0.

    Returns
    -------
    tensor (...)
        In [1, m], or 0.

    Book: :ref:`ch-layer-by-layer`.
    """
    shares = _shares(spectrum)
    squares = shares.square().sum(dim=-1)
    return torch.where(squares > 0, 1 / squares, 0.0)


def entropy_rank(spectrum: TokenVectors) -> PerToken:
    r"""Effective rank of a spectrum by its entropy, :math:`\exp(-\sum_i q_i \log q_i)`
    with :math:`q_i = \lambda_i / \sum_j \lambda_j`.

    At least the :func:`participation_ratio`, as it gives small eigenvalues more weight;
    equal to it when the nonzero ones are equal.

    Parameters
    ----------
    spectrum : tensor (..., m)
        Eigenvalues, >= 0.

    Returns
    -------
    tensor (...)
        In [1, m], or 0 for a spectrum of zeros.

    Book: :ref:`ch-layer-by-layer`.  The effective rank of :cite:t:`roy2007effective`,
    of variances.
    """
    shares = _shares(spectrum)
    rank = torch.exp(torch.special.entr(shares).sum(dim=-1))
    return torch.where(shares.sum(dim=-1) > 0, rank, 0.0)


def _shares(spectrum: Tensor) -> Tensor:
    """A spectrum divided by its sum; zeros stay zeros."""
    if not bool((spectrum >= 0).all()):
        raise ValueError("a spectrum must be >= 0")
    scaled = spectrum / spectrum.amax(dim=-1, keepdim=True).clamp_min(
        torch.finfo(spectrum.dtype).tiny
    )
    return scaled / scaled.sum(dim=-1, keepdim=True).clamp_min(
        torch.finfo(spectrum.dtype).tiny
    )


def orthonormal_bases(bases: Bases) -> Bases:
    r"""Each basis made orthonormal by QR, :math:`U_k = Q_k R_k`: the same subspaces,
    without the bases' own lengths.

    Different subspaces stay as they lie to each other.

    Parameters
    ----------
    bases : tensor (K, d, p)
        Of full column rank, p <= d.

    Returns
    -------
    tensor (K, d, p)

    Raises
    ------
    ValueError
        If p > d.

    Book: :ref:`ch-layer-by-layer`.
    """
    if bases.shape[2] > bases.shape[1]:
        raise ValueError(
            f"{bases.shape[2]} vectors in {bases.shape[1]} dimensions cannot "
            "be orthonormal"
        )
    return torch.linalg.qr(bases).Q


def subspace_cosines(bases: Bases) -> Tensor:
    r"""Largest cosine between every two different subspaces, :math:`\|Q_j^\top Q_k\|_2`
    for j < k.

    0 for orthogonal subspaces, 1 when they share a direction.  Random subspaces are not
    incoherent: for p/d = 1/4 the largest cosine tends to :math:`\sqrt{4 \cdot \tfrac14
    \cdot \tfrac34} = 0.87`.

    Parameters
    ----------
    bases : tensor (K, d, p)
        Orthonormal or not; K >= 2.

    Returns
    -------
    tensor (K (K - 1) / 2,)

    Raises
    ------
    ValueError
        If there is only one subspace.

    Book: :ref:`ch-layer-by-layer`.
    """
    if bases.shape[0] < 2:
        raise ValueError("subspaces are compared two by two: K >= 2, got K = 1")
    q = orthonormal_bases(bases)
    rows, columns = torch.triu_indices(
        bases.shape[0], bases.shape[0], offset=1, device=bases.device
    )
    return torch.linalg.matrix_norm(q[rows].mT @ q[columns], ord=2)


def gram_defect(matrix: Tensor) -> Scalars:
    r"""How far the columns of a matrix are from orthonormal at their best common scale,

    .. math:: \min_c \frac{\|c\,A^\top A - I\|_F}{\sqrt m}, \qquad A \in \mathbb{R}^{d
              \times m}.

    0 for orthogonal columns of equal length; :math:`\sqrt{m/(d + m)}` in the limit for
    independent Gaussian entries.

    Parameters
    ----------
    matrix : tensor (..., d, m)

    Returns
    -------
    tensor (...)
        In [0, 1].

    Book: :ref:`ch-layer-by-layer`.
    """
    squared = torch.linalg.svdvals(matrix.cpu().double()).square()
    # The best c is sum s^2 / sum s^4, at which the squared norm is m - (sum s^2)^2 /
    # sum s^4.
    columns = matrix.shape[-1]
    return (1 - participation_ratio(squared) / columns).clamp_min(0.0).sqrt()


def token_cosine(a: Tokens, b: Tokens) -> Scalars:
    r"""Mean over tokens of the cosine between partners, :math:`\tfrac1n \sum_i \langle
    a_i, b_i \rangle / (\|a_i\| \|b_i\|)`; a zero token counts as cosine 0.

    Parameters
    ----------
    a, b : tensor (..., n, d)

    Returns
    -------
    tensor (...)

    Book: :ref:`ch-layer-by-layer`.
    """
    return torch.nn.functional.cosine_similarity(a, b, dim=-1).mean(dim=-1)


def matrix_cosine(a: Tokens, b: Tokens) -> Scalars:
    r"""Cosine between two matrices, :math:`\langle A, B \rangle_F / (\|A\|_F \|B\|_F)`;
    0 if one is zero.

    The relative error at the best scalar is :math:`\min_c \|A - c B\|_F / \|A\|_F =
    \sqrt{1 - \cos^2}`.

    Parameters
    ----------
    a, b : tensor (..., n, d)

    Returns
    -------
    tensor (...)

    Book: :ref:`ch-layer-by-layer`.
    """
    return torch.nn.functional.cosine_similarity(a.flatten(-2), b.flatten(-2), dim=-1)
