r"""Two pieces of a layer with their gradients written out, in fewer products than
differentiating step by step takes.

Book: :ref:`ch-cost`.
"""

from typing import Any

import torch
from torch import Tensor


class ISTAMatrix(torch.autograd.Function):
    r"""The matrix of the fused step with its gradient in closed form,

    .. math:: M = I + \eta\,(D - D^\top D), \qquad
              \nabla_D = \eta\,\big(G - D\,(G + G^\top)\big),

    for a gradient G of M: two products of d x d matrices in all, where differentiating
    step by step takes three.

    Book: :ref:`ch-cost`.
    """

    @staticmethod
    def forward(ctx: Any, dictionary: Tensor, eta: float) -> Tensor:
        """M (d, d) of a dictionary D (d, d)."""
        gram = dictionary.mT @ dictionary
        ctx.save_for_backward(dictionary)
        # Under autocast the product is in half precision, and so is the one of the
        # backward pass.
        ctx.eta, ctx.product_dtype = eta, gram.dtype
        matrix = eta * (dictionary - gram)
        # Not in place on a view of the diagonal, which torch.onnx.export does not take.
        return matrix + torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient (d, d) of D for one of M; eta has none."""
        (dictionary,) = ctx.saved_tensors
        symmetric = (gradient + gradient.mT).to(ctx.product_dtype)
        return ctx.eta * (gradient - dictionary.to(ctx.product_dtype) @ symmetric), None


class ShortSharedAttention(torch.autograd.Function):
    r"""Attention with one shared projection that keeps its weights, with its gradient
    in closed form,

    .. math:: O = A V, \quad A = \mathrm{softmax}(\alpha V V^\top), \qquad
              \nabla_V = A^\top G + \alpha\,(S + S^\top) V, \quad
              S = A \odot \big(G V^\top - (G V^\top \odot
              A)\,\mathbf{1}\mathbf{1}^\top\big),

    for a gradient G of the output.  Six matrix products in all.  PyTorch's fused
    attention on a CPU stores no weights, but its backward pass in bfloat16 is many
    times slower than these products; for few tokens the weights are small.

    Book: :ref:`ch-cost`.
    """

    @staticmethod
    def forward(ctx: Any, v: Tensor, scale: float) -> Tensor:
        """O (B, n, p) of projections V (B, n, p); ``scale`` is alpha."""
        weights = torch.softmax(torch.bmm(v, v.mT) * scale, dim=-1)
        ctx.save_for_backward(v, weights)
        ctx.scale = scale
        return torch.bmm(weights, v)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient (B, n, p) of V for one of O; the scale has none."""
        v, weights = ctx.saved_tensors
        to_weights = torch.bmm(gradient, v.mT)
        to_scores = weights * (
            to_weights - (to_weights * weights).sum(-1, keepdim=True)
        )
        to_values = torch.bmm(weights.mT, gradient)
        return torch.baddbmm(
            to_values, to_scores + to_scores.mT, v, alpha=ctx.scale
        ), None
