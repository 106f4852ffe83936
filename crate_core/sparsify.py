r"""Sparsification: the nonnegative lasso, proximal gradient steps, ISTA, and the module.

Book: :ref:`ch-ista`.
"""

import torch
import torch.nn.functional as F
from torch import nn

from crate_core.shapes import Codes, Dictionary, Scalars, Tokens


def check_step(eta: float, lambd: float) -> None:
    """Raise ``ValueError`` unless eta > 0 (step size) and lambd >= 0 (weight of the l1 penalty)."""
    if not eta > 0:
        raise ValueError(f"eta, the step size, must be positive, got {eta}")
    if not lambd >= 0:
        raise ValueError(f"lambd, the weight of the l1 penalty, must be >= 0, got {lambd}")


def check_dictionary(z: Tokens, dictionary: Dictionary) -> None:
    """Raise ``ValueError`` unless the dictionary is (d, m) for tokens (..., n, d)."""
    if dictionary.ndim != 2 or dictionary.shape[0] != z.shape[-1]:
        raise ValueError(
            f"dictionary must be ({z.shape[-1]}, m) for tokens {tuple(z.shape)}, got {tuple(dictionary.shape)}"
        )


def lasso_objective(codes: Codes, z: Tokens, dictionary: Dictionary, lambd: float) -> Scalars:
    r"""The nonnegative lasso

    .. math:: F(A) = \tfrac12 \|Z - D A\|_F^2 + \lambda \|A\|_1 + \iota_{A \ge 0},

    where the last term is infinite as soon as an entry of A is negative.

    Parameters
    ----------
    codes : (..., n, m), z : (..., n, d), dictionary : (d, m), lambd >= 0.

    Returns
    -------
    (...) one value per batch entry, ``inf`` where codes are infeasible.

    Raises
    ------
    ValueError
        If the dictionary does not fit or lambd < 0.

    Book: :ref:`ch-ista`.
    """
    check_dictionary(z, dictionary)
    check_step(1.0, lambd)
    residual = z - codes @ dictionary.mT
    value = 0.5 * residual.square().sum((-2, -1)) + lambd * codes.sum((-2, -1))
    return torch.where((codes < 0).any(-1).any(-1), torch.inf, value)


def proximal_step(codes: Codes, z: Tokens, dictionary: Dictionary, eta: float, lambd: float) -> Codes:
    r"""One proximal gradient step on the nonnegative lasso,

    .. math:: A^+ = \mathrm{ReLU}\big(A + \eta D^\top (Z - D A) - \eta\lambda\big).

    The dictionary may have any number m of atoms.  For :math:`\eta \le 1/\|D\|_2^2` the objective does not increase
    from a feasible start.

    Raises ``ValueError`` if the dictionary does not fit, eta <= 0 or lambd < 0.  Book: :ref:`ch-ista`.
    """
    check_dictionary(z, dictionary)
    check_step(eta, lambd)
    residual = z - codes @ dictionary.mT
    return F.relu(codes + eta * (residual @ dictionary) - eta * lambd)


def ista_matrix(dictionary: Dictionary, eta: float) -> Dictionary:
    r"""The matrix :math:`M = I + \eta (D - D^\top D)` of the fused step, so that rows give :math:`v M`.

    Book: :ref:`ch-ista`.
    """
    identity = torch.eye(dictionary.shape[-1], dtype=dictionary.dtype, device=dictionary.device)
    return identity + eta * (dictionary - dictionary.mT @ dictionary)


def ista(z: Tokens, dictionary: Dictionary, eta: float = 0.1, lambd: float = 0.5) -> Tokens:
    r"""The ISTA step of a CRATE layer: one proximal gradient step started from the tokens themselves,

    .. math:: \mathrm{ISTA}(Z \mid D) = \mathrm{ReLU}\big(Z + \eta D^\top (Z - D Z) - \eta\lambda\big).

    Affine before its ReLU, so the three products with the tokens are one: :math:`Z \mapsto M^\top Z` with
    :math:`M = I + \eta(D - D^\top D)`.

    Parameters
    ----------
    z : (..., n, d) tokens as rows.
    dictionary : (d, d); only a complete dictionary can start from the tokens.
    eta : step size, > 0.
    lambd : weight of the l1 penalty, >= 0.

    Raises
    ------
    ValueError
        If the dictionary is not (d, d), eta <= 0 or lambd < 0.

    Book: :ref:`ch-ista`, which says what one such step decreases and when it does not.  The authors' published code,
    which evaluates the three products one after the other.
    """
    check_dictionary(z, dictionary)
    check_step(eta, lambd)
    if dictionary.shape[0] != dictionary.shape[1]:
        raise ValueError(
            f"a step from the tokens needs a square dictionary, got {tuple(dictionary.shape)}; "
            "use proximal_step with codes of your own for an over-complete one"
        )
    return F.relu(z @ ista_matrix(dictionary, eta) - eta * lambd)


class ISTA(nn.Module):
    r"""A learned ISTA step, :math:`\mathrm{ReLU}(Z + \eta D^\top(Z - DZ) - \eta\lambda)`, with D = ``weight`` (d, d).

    Initialised as in the authors' published code (Kaiming uniform), for which :math:`\|D\|_2^2` is near 8, so that
    eta = 0.1 is just inside the stable range 1/8.

    Raises ``ValueError`` if eta <= 0 or lambd < 0.  Book: :ref:`ch-ista`.
    """

    def __init__(self, dim: int, eta: float = 0.1, lambd: float = 0.5) -> None:
        super().__init__()
        check_step(eta, lambd)
        self.eta = eta
        self.lambd = lambd
        self.weight = nn.Parameter(torch.empty(dim, dim))
        nn.init.kaiming_uniform_(self.weight)

    def forward(self, z: Tokens) -> Tokens:
        return ista(z, self.weight, self.eta, self.lambd)
