r"""Mixtures of low-rank Gaussians: sampling, log-density, posterior, exact score and
exact denoiser.

Book: :ref:`ch-mixture` and :ref:`ch-denoising`.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from crate_core.checks import as_number, check_tensor, is_count
from crate_core.shapes import Bases, Labels, PerToken, Posterior, TokenVectors

ORTHONORMALITY_TOLERANCE = 1e-4
"""Largest entry of ``|U_k^T U_k - I|`` accepted as orthonormal; loose enough for
float32 QR at d = 1024.
"""


def orthonormality_error(bases: Bases) -> float:
    r"""Largest entry of :math:`|U_k^\top U_k - I|` over all subspaces.

    Book: :ref:`ch-mixture`.
    """
    check_tensor("bases", bases)
    gram = bases.mT @ bases
    return float(
        (gram - torch.eye(bases.shape[-1], dtype=bases.dtype, device=bases.device))
        .abs()
        .max()
    )


def check_orthonormal(bases: Bases) -> None:
    """Raise ``ValueError`` unless the columns of every basis are orthonormal (to
    ``ORTHONORMALITY_TOLERANCE``).
    """
    check_tensor("bases", bases)
    if bases.ndim != 3:
        raise ValueError(f"bases must have shape (K, d, p), got {tuple(bases.shape)}")
    error = orthonormality_error(bases)
    if not error <= ORTHONORMALITY_TOLERANCE:
        raise ValueError(
            "the columns of each basis must be orthonormal: the largest entry of "
            f"|U_k^T U_k - I| is {error:.3g}, "
            f"accepted up to {ORTHONORMALITY_TOLERANCE:g}; orthonormalise with "
            "torch.linalg.qr"
        )


def coherence(bases: Bases) -> float:
    r"""Largest cosine between two different subspaces, :math:`\max_{j \ne k} \|U_j^\top
    U_k\|_2`.

    Zero when the subspaces are mutually orthogonal, one when two of them share a
    direction.

    Parameters
    ----------
    bases : (K, d, p), orthonormal columns; K >= 2.

    Raises
    ------
    ValueError
        If there is only one subspace or a basis is not orthonormal.

    Book: :ref:`ch-mixture`.
    """
    check_orthonormal(bases)
    components = bases.shape[0]
    if components < 2:
        raise ValueError("coherence compares subspaces: it needs K >= 2, got K = 1")
    cross = torch.einsum("jdp,kdq->jkpq", bases, bases)
    norms = torch.linalg.matrix_norm(cross, ord=2)
    off_diagonal = ~torch.eye(components, dtype=torch.bool, device=bases.device)
    return float(norms[off_diagonal].max())


def check_orthogonal_subspaces(bases: Bases) -> None:
    """Raise ``ValueError`` unless every basis is orthonormal and every two subspaces
    are orthogonal (both to ``ORTHONORMALITY_TOLERANCE``).
    """
    check_orthonormal(bases)
    cosine = coherence(bases) if len(bases) > 1 else 0.0
    if not cosine <= ORTHONORMALITY_TOLERANCE:
        raise ValueError(
            "the subspaces must be mutually orthogonal: the largest cosine between "
            f"two of them is {cosine:.3g}, accepted up to "
            f"{ORTHONORMALITY_TOLERANCE:g}"
        )


def random_bases(
    dim: int,
    components: int,
    rank: int,
    *,
    orthogonal: bool | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
) -> Bases:
    r"""Uniformly random orthonormal bases :math:`U_1, \dots, U_K \in \mathbb{R}^{d
    \times p}`.

    With ``orthogonal=True`` the subspaces are mutually orthogonal, which needs
    :math:`Kp \le d`; with ``False`` they are drawn independently; ``None`` makes them
    mutually orthogonal whenever they fit.

    Raises
    ------
    ValueError
        If ``rank`` exceeds ``dim``, a size is not positive, or mutual orthogonality is
        asked for and impossible.

    Book: :ref:`ch-mixture`.
    """
    if not all(map(is_count, (dim, components, rank))) or rank > dim:
        raise ValueError(
            f"need 1 <= rank <= dim and components >= 1, got dim={dim!r}, "
            f"components={components!r}, rank={rank!r}"
        )
    fits = components * rank <= dim
    if orthogonal and not fits:
        raise ValueError(
            f"{components} mutually orthogonal subspaces of rank {rank} need dim >= "
            f"{components * rank}, got {dim}"
        )
    options: dict[str, Any] = {
        "generator": generator,
        "dtype": dtype,
        "device": generator.device if generator else None,
    }
    if fits if orthogonal is None else orthogonal:
        frame = torch.linalg.qr(torch.randn(dim, components * rank, **options)).Q
        return frame.reshape(dim, components, rank).permute(1, 0, 2).contiguous()
    return torch.linalg.qr(torch.randn(components, dim, rank, **options)).Q


def check_members(labels: Labels, n: int, components: int) -> None:
    """Raise ``ValueError`` unless each of n tokens has a label in [0, K)."""
    check_tensor("labels", labels)
    fits = labels.shape == (n,)
    if not fits or int(labels.min()) < 0 or int(labels.max()) >= components:
        raise ValueError(
            f"labels must be {n} integers in [0, {components}), got shape "
            f"{tuple(labels.shape)}"
        )


@dataclass(frozen=True)
class MixtureSample:
    """Tokens drawn from a mixture: ``tokens = clean + noise`` (n, d), ``clean`` (n, d),
    ``labels`` (n,).
    """

    tokens: Tensor
    clean: Tensor
    labels: Labels


class LowRankGaussianMixture:
    r"""Tokens near a union of subspaces.

    .. math::

        z = U_k a + \sigma w, \qquad k \sim \pi, \quad a \sim \mathcal{N}(0,
        \mathrm{diag}(\tau_k^2)), \quad w \sim \mathcal{N}(0, I_d),

    so that component k is :math:`\mathcal{N}(0, C_k)` with
    :math:`C_k = U_k \mathrm{diag}(\tau_k^2) U_k^\top + \sigma^2 I`.

    Parameters
    ----------
    bases : (K, d, p), orthonormal columns.
    weights : (K,), positive, summing to one; ``None`` means uniform.
    scales : standard deviation of each coordinate of a: a number, (K,) or (K, p), not
        negative; ``None`` means 1/sqrt(p), which gives the clean signal unit mean
        squared norm.  A zero drops that direction, so subspaces of different ranks are
        written with the largest rank and zeros.

    ``sigma`` in every method is the noise's standard deviation per coordinate (the
    noise has norm about sigma * sqrt(d)): a positive number, or a tensor that
    broadcasts with the leading shape of ``z``.

    Raises
    ------
    ValueError
        For bases that are not orthonormal, weights that are not positive or do not sum
        to one, negative scales, or wrong shapes.  Methods raise it for tokens of
        another dimension or dtype, and for a sigma that is not finite, not positive, or
        so small that its square underflows.

    Book: :ref:`ch-mixture`; the score and the denoiser are derived in
    :ref:`ch-denoising`.
    """

    def __init__(
        self,
        bases: Bases,
        weights: Tensor | None = None,
        scales: Tensor | float | None = None,
    ) -> None:
        check_orthonormal(bases)
        components, _, rank = bases.shape
        like: dict[str, Any] = {"dtype": bases.dtype, "device": bases.device}
        self.bases = bases
        self.weights = (
            torch.full((components,), 1.0 / components, **like)
            if weights is None
            else torch.as_tensor(weights, **like)
        )
        if (
            self.weights.shape != (components,)
            or not bool((self.weights > 0).all())
            or abs(float(self.weights.sum()) - 1) > 1e-5
        ):
            raise ValueError(
                f"weights must be {components} positive numbers that sum to one, got "
                f"{weights}"
            )
        scales = torch.as_tensor(
            1.0 / math.sqrt(rank) if scales is None else scales, **like
        )
        accepted = {0: (), 1: (components,), 2: (components, rank)}
        valid = bool(((scales >= 0) & scales.isfinite()).all())
        if scales.shape != accepted.get(scales.ndim) or not valid:
            raise ValueError(
                f"scales must be finite, not negative, of shape (), ({components},) "
                f"or ({components}, {rank}), "
                f"got {scales}"
            )
        per_component = scales[:, None] if scales.ndim == 1 else scales
        self.scales = per_component.expand(components, rank)

    @classmethod
    def random(
        cls,
        dim: int,
        components: int,
        rank: int,
        *,
        orthogonal: bool | None = None,
        generator: torch.Generator | None = None,
        dtype: torch.dtype | None = None,
    ) -> "LowRankGaussianMixture":
        """A mixture with :func:`random_bases`, uniform weights and unit-norm clean
        signal on average.
        """
        return cls(
            random_bases(
                dim,
                components,
                rank,
                orthogonal=orthogonal,
                generator=generator,
                dtype=dtype,
            ),
        )

    @property
    def dim(self) -> int:
        """Token dimension d."""
        return self.bases.shape[1]

    @property
    def components(self) -> int:
        """Number of subspaces K."""
        return self.bases.shape[0]

    @property
    def rank(self) -> int:
        """Dimension p of each subspace."""
        return self.bases.shape[2]

    def to(self, target: torch.dtype | torch.device | str) -> "LowRankGaussianMixture":
        """The same mixture in another dtype or on another device."""
        moved = (part.to(target) for part in (self.bases, self.weights, self.scales))  # type: ignore[call-overload]
        return LowRankGaussianMixture(*moved)

    def sample(
        self,
        n: int,
        sigma: float,
        *,
        labels: Labels | None = None,
        generator: torch.Generator | None = None,
    ) -> MixtureSample:
        r"""Draw n tokens :math:`z_i = U_{k_i} a_i + \sigma w_i`.

        ``labels`` (n,) fixes the memberships :math:`k_i`; otherwise they are drawn from
        the weights.  ``sigma = 0`` returns the clean signal.

        Raises
        ------
        ValueError
            If n is not positive, sigma is negative, or the labels do not fit.

        Book: :ref:`ch-mixture`.
        """
        if not is_count(n):
            raise ValueError(f"the number of tokens must be positive, got {n!r}")
        if not as_number(sigma) >= 0:
            raise ValueError(f"sigma must be >= 0, got {sigma!r}")
        if labels is None:
            labels = torch.multinomial(
                self.weights, n, replacement=True, generator=generator
            )
        else:
            check_members(labels, n, self.components)
        options: dict[str, Any] = {
            "generator": generator,
            "dtype": self.bases.dtype,
            "device": self.bases.device,
        }
        # Coordinates in all subspaces, zero but for the own one: one product, where
        # bases[labels] would be n x d x p.
        coordinates = self.bases.new_zeros(n, self.components, self.rank)
        coordinates[torch.arange(n), labels] = (
            torch.randn(n, self.rank, **options) * self.scales[labels]
        )
        clean = torch.einsum("nkp,kdp->nd", coordinates, self.bases)
        noise = torch.randn(n, self.dim, **options)
        return MixtureSample(tokens=clean + sigma * noise, clean=clean, labels=labels)

    def _split(
        self, z: TokenVectors, sigma: float | Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Coordinates U_k^T z (..., K, p), residuals z - U_k U_k^T z (..., K, d),
        variance sigma^2 (..., 1, 1).
        """
        check_tensor("tokens", z)
        if z.shape[-1] != self.dim:
            raise ValueError(
                f"tokens must have dimension d = {self.dim}, got shape {tuple(z.shape)}"
            )
        if z.dtype != self.bases.dtype:
            raise ValueError(
                f"tokens are {z.dtype} and the bases {self.bases.dtype}: convert one "
                "of them with .to"
            )
        sigma = torch.as_tensor(sigma, dtype=z.dtype, device=z.device)
        smallest = math.sqrt(torch.finfo(z.dtype).tiny)
        if not bool(((sigma >= smallest) & sigma.isfinite()).all()):
            raise ValueError(
                "sigma must be finite and > 0, and its square representable in "
                f"{z.dtype} (sigma >= {smallest:.2g}): "
                "without noise the mixture has no density on R^d"
            )
        coordinates = torch.einsum("...d,kdp->...kp", z, self.bases)
        # The residual vector itself, not |z|^2 - |U^T z|^2: that difference loses all
        # digits when sigma is tiny.
        residuals = z[..., None, :] - torch.einsum(
            "...kp,kdp->...kd", coordinates, self.bases
        )
        return coordinates, residuals, (sigma**2)[..., None, None]

    def _log_joint(
        self, coordinates: Tensor, residuals: Tensor, variance: Tensor
    ) -> Tensor:
        """log pi_k + log N(z; 0, C_k), shape (..., K)."""
        spectrum = self.scales**2 + variance  # (..., K, p)
        quadratic = (coordinates**2 / spectrum).sum(-1) + (residuals**2).sum(
            -1
        ) / variance[..., 0]
        log_det = (
            spectrum.log().sum(-1) + (self.dim - self.rank) * variance[..., 0].log()
        )
        return self.weights.log() - 0.5 * (
            quadratic + log_det + self.dim * math.log(2 * math.pi)
        )

    def log_joint(self, z: TokenVectors, sigma: float | Tensor) -> Posterior:
        r""":math:`\log \pi_k + \log \mathcal{N}(z; 0, C_k)`, shape (..., K).

        Its logsumexp over k is the log-density, its softmax the posterior.  Raises
        ``ValueError`` for a wrong token dimension or sigma <= 0.  Book:
        :ref:`ch-mixture`.
        """
        return self._log_joint(*self._split(z, sigma))

    def log_density(self, z: TokenVectors, sigma: float | Tensor) -> PerToken:
        r""":math:`\log p_\sigma(z) = \log \sum_k \pi_k \, \mathcal{N}(z; 0, C_k)`,
        shape (...).

        Raises ``ValueError`` for a wrong token dimension or sigma <= 0.  Book:
        :ref:`ch-mixture`.
        """
        return torch.logsumexp(self.log_joint(z, sigma), dim=-1)

    def posterior(self, z: TokenVectors, sigma: float | Tensor) -> Posterior:
        r""":math:`\gamma_k(z) = \pi_k \mathcal{N}(z; 0, C_k) / p_\sigma(z)`, shape
        (..., K): a softmax over subspaces.

        Raises ``ValueError`` for a wrong token dimension or sigma <= 0.  Book:
        :ref:`ch-denoising`.
        """
        return torch.softmax(self.log_joint(z, sigma), dim=-1)

    def score(self, z: TokenVectors, sigma: float | Tensor) -> TokenVectors:
        r""":math:`\nabla_z \log p_\sigma(z) = -\sum_k \gamma_k(z)\, C_k^{-1} z`, same
        shape as z.

        Raises ``ValueError`` for a wrong token dimension or sigma <= 0.  Book:
        :ref:`ch-denoising`.
        """
        coordinates, residuals, variance = self._split(z, sigma)
        gamma = torch.softmax(self._log_joint(coordinates, residuals, variance), dim=-1)
        inside = torch.einsum(
            "...k,...kp,kdp->...d",
            gamma,
            coordinates / (self.scales**2 + variance),
            self.bases,
        )
        outside = torch.einsum("...k,...kd->...d", gamma, residuals / variance)
        return -(inside + outside)

    def denoise(self, z: TokenVectors, sigma: float | Tensor) -> TokenVectors:
        r"""The posterior mean :math:`\mathbb{E}[x \mid z] = \sum_k \gamma_k U_k
        \mathrm{diag}\big(\tfrac{\tau_k^2} {\tau_k^2+\sigma^2}\big) U_k^\top z`, same
        shape as z.

        Equal to Tweedie's formula :math:`z + \sigma^2 \nabla \log p_\sigma(z)`.

        Raises ``ValueError`` for a wrong token dimension or sigma <= 0.  Book:
        :ref:`ch-denoising`.
        """
        coordinates, residuals, variance = self._split(z, sigma)
        gamma = torch.softmax(self._log_joint(coordinates, residuals, variance), dim=-1)
        shrinkage = self.scales**2 / (self.scales**2 + variance)
        return torch.einsum(
            "...k,...kp,kdp->...d", gamma, shrinkage * coordinates, self.bases
        )
