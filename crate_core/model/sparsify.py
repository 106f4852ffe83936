r"""Sparsification: the nonnegative lasso, proximal gradient steps, ISTA, and the
module.

Book: :ref:`ch-ista`.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from crate_core.checks import as_number, check_real, check_tensor
from crate_core.model.kernels import ISTAMatrix
from crate_core.shapes import Codes, Dictionary, Scalars, Tokens


def check_step(eta: float, lambd: float) -> None:
    """Raise ``ValueError`` unless step size eta > 0 and l1 weight lambd >= 0."""
    if not 0 < as_number(eta) < math.inf:
        raise ValueError(f"eta, the step size, must be positive, got {eta!r}")
    if not 0 <= as_number(lambd) < math.inf:
        raise ValueError(
            f"lambd, the weight of the l1 penalty, must be >= 0, got {lambd!r}"
        )


def check_dictionary(z: Tokens, dictionary: Dictionary) -> None:
    """Raise ``ValueError`` unless the dictionary is (d, m) for tokens (..., n, d)."""
    check_tensor("tokens", z)
    check_tensor("dictionary", dictionary)
    if dictionary.ndim != 2 or dictionary.shape[0] != z.shape[-1]:
        raise ValueError(
            f"dictionary must be ({z.shape[-1]}, m) for tokens {tuple(z.shape)}, got "
            f"{tuple(dictionary.shape)}"
        )


def check_codes(codes: Codes, z: Tokens, dictionary: Dictionary) -> None:
    """Raise ``ValueError`` unless codes are (..., n, m) for tokens (..., n, d) and a
    dictionary (d, m).
    """
    check_dictionary(z, dictionary)
    check_tensor("codes", codes)
    expected = (z.shape[-2], dictionary.shape[1])
    if codes.shape[-2:] != expected:
        raise ValueError(
            f"codes must be (..., {expected[0]}, {expected[1]}) here, got "
            f"{tuple(codes.shape)}"
        )


def lasso_objective(
    codes: Codes, z: Tokens, dictionary: Dictionary, lambd: float
) -> Scalars:
    r"""The nonnegative lasso

    .. math:: F(A) = \tfrac12 \|Z - D A\|_F^2 + \lambda \|A\|_1 + \iota_{A \ge 0},

    where the last term is infinite as soon as an entry of A is negative.

    Parameters
    ----------
    codes : tensor (..., n, m)
        Codes as rows.
    z : tensor (..., n, d)
        Tokens as rows.
    dictionary : tensor (d, m)
        Atoms as columns.
    lambd : float
        Weight of the l1 penalty, >= 0.

    Returns
    -------
    tensor (...)
        One value for each leading batch entry, summed over tokens; ``inf`` where codes
        are infeasible.

    Raises
    ------
    ValueError
        If the shapes do not fit or lambd is negative.

    Book: :ref:`ch-ista`, :eq:`eq-ista-lasso`.
    """
    check_codes(codes, z, dictionary)
    check_step(1.0, lambd)
    residual = z - codes @ dictionary.mT
    value = 0.5 * residual.square().sum((-2, -1)) + lambd * codes.sum((-2, -1))
    return torch.where((codes < 0).any(-1).any(-1), torch.inf, value)


def proximal_step(
    codes: Codes, z: Tokens, dictionary: Dictionary, eta: float, lambd: float
) -> Codes:
    r"""One proximal gradient step on the nonnegative lasso,

    .. math:: A^+ = \mathrm{ReLU}\big(A + \eta D^\top (Z - D A) - \eta\lambda\big).

    From feasible codes (:math:`A \ge 0`) the objective does not increase for
    :math:`\eta \le 2/\|D\|_2^2`; the rate of the iterates is proved for :math:`\eta \le
    1/\|D\|_2^2`, from any start.

    Parameters
    ----------
    codes : tensor (..., n, m)
        Codes as rows, feasible or not.
    z : tensor (..., n, d)
        Tokens as rows.
    dictionary : tensor (d, m)
        Any number m of atoms, as columns.
    eta : float
        Step size, > 0.
    lambd : float
        Weight of the l1 penalty, >= 0.

    Returns
    -------
    tensor (..., n, m)
        Nonnegative codes.

    Raises
    ------
    ValueError
        If the shapes do not fit, eta is not positive or lambd is negative.

    Book: :ref:`ch-ista`, :eq:`eq-ista-step`, :prf:ref:`thm-ista-step`.
    """
    check_codes(codes, z, dictionary)
    check_step(eta, lambd)
    residual = z - codes @ dictionary.mT
    return F.relu(codes + eta * (residual @ dictionary) - eta * lambd)


def ista_matrix(dictionary: Dictionary, eta: float) -> Dictionary:
    r"""The matrix :math:`M = I + \eta (D - D^\top D)` of the fused step, so that tokens
    as rows v give :math:`v M`.

    Parameters
    ----------
    dictionary : tensor (d, d)
        Atoms as columns.
    eta : float
        Step size.

    Returns
    -------
    tensor (d, d)

    Book: :ref:`ch-ista`, :eq:`eq-ista-fused`.  Its gradient is that of
    :class:`~crate_core.model.kernels.ISTAMatrix`.
    """
    check_tensor("dictionary", dictionary)
    check_real("eta", eta)
    return ISTAMatrix.apply(dictionary, eta)


def ista(
    z: Tokens, dictionary: Dictionary, eta: float = 0.1, lambd: float = 0.5
) -> Tokens:
    r"""The ISTA step of a CRATE layer: one proximal gradient step started from the
    tokens themselves,

    .. math:: \mathrm{ISTA}(Z \mid D) = \mathrm{ReLU}\big(Z + \eta D^\top (Z - D Z) -
              \eta\lambda\big).

    Affine before its ReLU, so the three products with the tokens are one: :math:`Z
    \mapsto M^\top Z` with :math:`M = I + \eta(D - D^\top D)`.

    Parameters
    ----------
    z : tensor (..., n, d)
        Tokens as rows.
    dictionary : tensor (d, d)
        Only a complete dictionary can start from the tokens.
    eta : float
        Step size, > 0.
    lambd : float
        Weight of the l1 penalty, >= 0.

    Returns
    -------
    tensor (..., n, d)
        Nonnegative.

    Raises
    ------
    ValueError
        If the dictionary is not (d, d), eta is not positive or lambd is negative.

    Notes
    -----
    Follows the published code of :cite:t:`pai2024masked`, which evaluates the three
    products one after the other. The chapter says what one such step decreases and when
    it does not.

    Book: :ref:`ch-ista`, :eq:`eq-ista-layer`, :eq:`eq-ista-fused`.
    """
    check_dictionary(z, dictionary)
    check_step(eta, lambd)
    if dictionary.shape[0] != dictionary.shape[1]:
        raise ValueError(
            "a step from the tokens needs a square dictionary, got "
            f"{tuple(dictionary.shape)}; "
            "use proximal_step with codes of your own for an over-complete one"
        )
    # in place: no copy of the tokens is written
    return (z @ ista_matrix(dictionary, eta)).sub_(eta * lambd).relu_()


class ISTA(nn.Module):
    r"""A learned ISTA step, :math:`\mathrm{ReLU}(Z + \eta D^\top(Z - DZ) -
    \eta\lambda)`, with D = ``weight`` (d, d).

    Initialised as in the published code of :cite:t:`pai2024masked` (Kaiming uniform),
    for which :math:`\|D\|_2^2` is near 8, so that eta = 0.1 is just inside 1/8 at the
    start.

    Parameters
    ----------
    dim : int
        Token dimension d.
    eta : float
        Step size, > 0.
    lambd : float
        Weight of the l1 penalty, >= 0.

    Raises
    ------
    ValueError
        If eta is not positive or lambd is negative.

    Book: :ref:`ch-ista`, :eq:`eq-ista-layer`.
    """

    def __init__(self, dim: int, eta: float = 0.1, lambd: float = 0.5) -> None:
        super().__init__()
        check_step(eta, lambd)
        self.eta = eta
        self.lambd = lambd
        self.weight = nn.Parameter(torch.empty(dim, dim))
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, z: Tokens) -> Tokens:
        """Tokens (..., n, d) to nonnegative tokens (..., n, d).

        Book: :ref:`ch-ista`.
        """
        return ista(z, self.weight, self.eta, self.lambd)


class OvercompleteISTA(nn.Module):
    r"""Two ISTA steps from zero on an over-complete dictionary, decoded by another one
    onto a residual path,

    .. math:: A^1 = \mathrm{ReLU}(\eta D^\top Z - \eta\lambda), \qquad
              A^2 = \mathrm{ReLU}\big(A^1 + \eta D^\top (Z - D A^1) - \eta\lambda\big),
              \qquad
              Z' = Z + \hat D A^2.

    An ablation, not part of CRATE-MAE: the code A cannot start from the tokens
    (dimensions), and cannot replace them either, so a decoupled dictionary brings it
    back.

    Parameters
    ----------
    dim : int
        Token dimension d.
    atoms : int
        Columns m of D (``weight``) and of :math:`\hat D` (``decode``).
    eta : float
        Step size, > 0.
    lambd : float
        Weight of the l1 penalty, >= 0.

    Raises
    ------
    ValueError
        If eta is not positive or lambd is negative.

    Notes
    -----
    After :cite:t:`yang2024scaling`, which also learns :math:`\hat D` apart from D and
    adds the residual path.  Both dictionaries are initialised Kaiming uniform.

    Book: :ref:`ch-open-questions`.
    """

    def __init__(
        self, dim: int, atoms: int, eta: float = 0.1, lambd: float = 0.5
    ) -> None:
        super().__init__()
        check_step(eta, lambd)
        self.eta = eta
        self.lambd = lambd
        self.weight = nn.Parameter(torch.empty(dim, atoms))
        self.decode = nn.Parameter(torch.empty(dim, atoms))
        for weight in (self.weight, self.decode):
            # Fan-in is the number of inputs: d for the analysis D^T Z, m for the
            # synthesis.
            nn.init.kaiming_uniform_(
                weight, mode="fan_out" if weight is self.weight else "fan_in"
            )

    def codes(self, z: Tokens) -> Codes:
        """The codes A^2 (..., n, m).  Book: :ref:`ch-open-questions`."""
        first = F.relu(self.eta * (z @ self.weight) - self.eta * self.lambd)
        return proximal_step(first, z, self.weight, self.eta, self.lambd)

    def forward(self, z: Tokens) -> Tokens:
        """Tokens (..., n, d) to tokens (..., n, d), of either sign."""
        return z + self.codes(z) @ self.decode.mT
