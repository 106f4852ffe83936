"""Softmax and exact subspace attention: the formulas, the identities behind them, and
what they must refuse.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_core.model.attention import (
    MSSA,
    attend,
    attention_weights,
    exact_mssa,
    mssa,
    mssa_step,
)
from crate_core.theory.mixture import random_bases
from crate_core.theory.rate import subspace_beta, subspace_coding_rate_grad

sizes = st.tuples(
    st.integers(1, 3),  # K
    st.integers(1, 5),  # p
    st.integers(1, 9),  # n
    st.sampled_from([(), (1,), (2,), (2, 3)]),  # batch
    st.integers(0, 2**31 - 1),  # seed
)
SETTINGS = settings(max_examples=40, deadline=None)


def draw(size, dtype=torch.float64):
    """Tokens (*batch, n, d) and orthonormal bases (K, d, p), not mutually orthogonal in
    general.
    """
    heads, rank, n, batch, seed = size
    g = torch.Generator().manual_seed(seed)
    dim = rank + seed % 5
    bases = random_bases(dim, heads, rank, orthogonal=False, generator=g, dtype=dtype)
    return torch.randn(*batch, n, dim, generator=g, dtype=dtype), bases


def mssa_by_loops(z, bases, scale):
    """Columns, one head and one output token at a time, as the formula is written."""
    out = torch.zeros_like(z)
    for index in (
        torch.cartesian_prod(*[torch.arange(b) for b in z.shape[:-2]])
        if z.ndim > 2
        else [()]
    ):
        index = tuple(torch.as_tensor(index).reshape(-1).tolist())
        columns = z[index].T
        for basis in bases:
            v = basis.T @ columns
            for i in range(v.shape[1]):
                scores = scale * (v.T @ v[:, i])
                exponentials = torch.exp(scores - scores.max())
                out[index][i] += basis @ (v @ (exponentials / exponentials.sum()))
    return out


@SETTINGS
@given(size=sizes, scale=st.floats(0.01, 30), eps=st.floats(0.05, 5))
def test_mssa_is_the_loop_over_heads_and_tokens(size, scale, eps):
    z, bases = draw(size)
    expected = mssa_by_loops(z, bases, scale)
    torch.testing.assert_close(
        mssa(z, bases, scale=scale), expected, rtol=1e-11, atol=1e-12
    )
    beta = bases.shape[-1] / (z.shape[-2] * eps**2)
    torch.testing.assert_close(
        mssa(z, bases, scale=scale, eps=eps),
        beta * expected,
        rtol=1e-11,
        atol=1e-12 * beta,
    )


@SETTINGS
@given(size=sizes, eps=st.floats(0.05, 5))
def test_exact_operator_is_ridge_regression_of_each_token_on_all(size, eps):
    z, bases = draw(size)
    n = z.shape[-2]
    beta = bases.shape[-1] / (n * eps**2)
    expected = torch.zeros_like(z)
    for basis in bases:
        v = (z @ basis).mT  # (..., p, n)
        penalty = torch.eye(n, dtype=z.dtype).expand(*z.shape[:-2], n, n) / math.sqrt(
            beta
        )
        target = torch.cat([v, torch.zeros_like(penalty)], dim=-2)
        weights = torch.linalg.lstsq(torch.cat([v, penalty], dim=-2), target).solution
        expected += beta * (basis @ (v @ weights)).mT
    scale = float(expected.abs().max()) + beta
    torch.testing.assert_close(
        exact_mssa(z, bases, eps), expected, rtol=1e-9, atol=1e-11 * scale
    )


@pytest.mark.parametrize("n", [5, 16, 100])
@pytest.mark.parametrize("eps", [1e-4, 1e-2, 1.0, 100.0])
def test_exact_operator_in_float32_at_any_precision(n, eps):
    """Its error stays at rounding relative to beta |Z|, also where n < p and beta is
    huge.
    """
    g = torch.Generator().manual_seed(n)
    bases = random_bases(64, 4, 16, generator=g, dtype=torch.float64)
    z = torch.randn(n, 64, generator=g, dtype=torch.float64)
    beta = subspace_beta(n, 16, eps)
    error = exact_mssa(z.float(), bases.float(), eps).double() - exact_mssa(
        z, bases, eps
    )
    assert float(error.norm() / (beta * z.norm())) < 2e-6


@SETTINGS
@given(size=sizes, eps=st.floats(0.1, 5), kappa=st.floats(-2, 2))
def test_exact_step_is_a_gradient_step_when_the_subspaces_fill_the_space(
    size, eps, kappa
):
    heads, rank, n, batch, seed = size
    g = torch.Generator().manual_seed(seed)
    bases = random_bases(heads * rank, heads, rank, generator=g, dtype=torch.float64)
    z = torch.randn(*batch, n, heads * rank, generator=g, dtype=torch.float64)
    step = mssa_step(z, bases, eps, kappa, exact=True)
    expected = z - kappa * subspace_coding_rate_grad(z, bases, eps)
    beta = subspace_beta(n, rank, eps)
    torch.testing.assert_close(
        step,
        expected,
        rtol=1e-10,
        atol=1e-12 * (1 + abs(kappa) * beta) * float(z.abs().max()),
    )


@SETTINGS
@given(
    size=sizes,
    eps=st.floats(0.3, 5),
    kappa=st.floats(-1, 1),
    scale=st.floats(0.1, 20),
    exact=st.booleans(),
)
def test_step_shrinks_what_lies_outside_the_subspaces(size, eps, kappa, scale, exact):
    heads, rank, n, batch, seed = size
    g = torch.Generator().manual_seed(seed)
    dim = heads * rank + 3
    bases = random_bases(dim, heads, rank, generator=g, dtype=torch.float64)
    z = torch.randn(*batch, n, dim, generator=g, dtype=torch.float64)
    outside = torch.eye(dim, dtype=z.dtype) - (bases @ bases.mT).sum(0)
    factor = 1 - kappa * subspace_beta(n, rank, eps)
    step = mssa_step(z, bases, eps, kappa, scale=scale, exact=exact)
    torch.testing.assert_close(
        step @ outside, factor * z @ outside, rtol=1e-9, atol=1e-10
    )


def test_neumann_error_is_exact_along_singular_directions():
    g = torch.Generator().manual_seed(0)
    bases = random_bases(12, 1, 5, generator=g, dtype=torch.float64)
    z = torch.randn(20, 12, generator=g, dtype=torch.float64)
    v = z @ bases[0]  # (n, p)
    for eps in (0.3, 1.0, 3.0):
        beta = subspace_beta(20, 5, eps)
        exact = subspace_coding_rate_grad(z, bases, eps) @ bases[0] / beta
        first = v - beta * v @ v.mT @ v
        left, singular, right = torch.linalg.svd(v, full_matrices=False)

        def along(x, left=left, right=right):
            return torch.einsum("nr,np,rp->r", left, x, right)

        torch.testing.assert_close(
            along(first - exact) / along(exact),
            -((beta * singular**2) ** 2),
            rtol=1e-9,
            atol=1e-12,
        )


def test_neumann_is_second_order_in_beta():
    g = torch.Generator().manual_seed(1)
    bases = random_bases(8, 2, 4, generator=g, dtype=torch.float64)
    z = torch.randn(6, 8, generator=g, dtype=torch.float64)
    v = z[None] @ bases
    log_beta, log_error = [], []
    for eps in (20.0, 30.0, 45.0, 70.0):
        beta = subspace_beta(6, 4, eps)
        # first order of the exact operator
        linear = beta * ((beta * v @ v.mT @ v) @ bases.mT).sum(0)
        log_beta.append(math.log(beta))
        log_error.append(
            math.log(float((linear - exact_mssa(z, bases, eps)).norm() / beta))
        )
    x, y = torch.tensor(log_beta), torch.tensor(log_error)
    slope = float(
        ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    )
    assert slope == pytest.approx(2, abs=0.05)


@SETTINGS
@given(
    n=st.integers(2, 30),
    p=st.integers(1, 12),
    spread=st.floats(0.01, 5),
    alpha=st.floats(0.05, 20),
    seed=st.integers(0, 2**31 - 1),
)
def test_gate_inequalities(n, p, spread, alpha, seed):
    v = spread * torch.randn(
        n, p, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    out, weights, scores = (
        attend(v[None], alpha)[0],
        attention_weights(v[None], alpha)[0],
        v @ v.mT,
    )
    others = (
        scores.masked_fill(torch.eye(n, dtype=torch.bool), -math.inf).max(-1).values
    )
    delta = (n - 1) * torch.exp(-alpha * (scores.diagonal() - others))
    assert bool((weights.diagonal() >= 1 - delta - 1e-12).all())
    norms = v.norm(dim=-1)
    assert bool(
        ((out - v).norm(dim=-1) <= 2 * delta * norms.max() + 1e-12 * norms.max()).all()
    )
    rho = alpha * scores.abs().max(-1).values
    bound = torch.expm1(2 * rho) * norms.mean()
    assert bool(
        (
            (out - v.mean(0)).norm(dim=-1) <= bound * (1 + 1e-12) + 1e-12 * norms.max()
        ).all()
    )


def test_a_strong_scale_returns_the_tokens_and_a_weak_one_their_mean():
    v = torch.eye(4, dtype=torch.float64)[None]
    torch.testing.assert_close(attend(v, 1e3), v)
    torch.testing.assert_close(attend(v, 0.0), v.mean(-2, keepdim=True).expand_as(v))


@SETTINGS
@given(size=sizes, scale=st.floats(0.01, 10))
def test_attend_equals_the_explicit_softmax_values_and_gradients(size, scale):
    z, bases = draw(size)
    v = (z[..., None, :, :] @ bases).requires_grad_()
    weights = attention_weights(v, scale)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    fused, explicit = attend(v, scale), weights @ v
    torch.testing.assert_close(fused, explicit, rtol=1e-11, atol=1e-12)
    direction = torch.linspace(-1, 1, v.numel(), dtype=v.dtype).reshape(v.shape)
    gradients = [
        torch.autograd.grad((out * direction).sum(), v)[0] for out in (fused, explicit)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-11)


def test_gradcheck_of_both_operators():
    g = torch.Generator().manual_seed(3)
    bases = random_bases(4, 2, 2, generator=g, dtype=torch.float64).requires_grad_()
    z = torch.randn(1, 3, 4, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z, u: mssa(z, u, scale=0.7, eps=0.8), (z, bases)
    )
    assert torch.autograd.gradcheck(lambda z, u: exact_mssa(z, u, 0.8), (z, bases))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_near_float64(dtype):
    z, bases = draw((2, 4, 7, (2,), 11))
    low = mssa(z.to(dtype), bases.to(dtype), scale=0.5)
    assert low.dtype == dtype
    error = float((low.double() - mssa(z, bases, scale=0.5)).norm() / z.norm())
    assert error < (1e-6 if dtype == torch.float32 else 3e-2)


def bytes_saved(function, v):
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(v)
    return sum(kept.values())


@pytest.mark.parametrize("batch", [(), (1,), (2,), (2, 3)])
def test_memory_for_the_backward_pass_is_linear_in_the_tokens(batch):
    saved = {}
    for n in (256, 512):
        v = torch.randn(*batch, 2, n, 16, requires_grad=True)
        saved[n] = bytes_saved(lambda v: attend(v, 0.3), v)
        assert saved[n] < bytes_saved(lambda v: attention_weights(v, 0.3) @ v, v)
    assert saved[512] <= 2.1 * saved[256]


def filled_module(dim, heads, bases, bias=None):
    module = MSSA(dim, heads).double()
    stacked = torch.cat(list(bases), dim=-1)
    with torch.no_grad():
        module.project.weight.copy_(stacked.mT)
        module.output.weight.copy_(stacked)
        module.output.bias.copy_(
            torch.zeros(dim, dtype=torch.float64) if bias is None else bias
        )
    return module


@SETTINGS
@given(
    heads=st.integers(1, 4),
    rank=st.integers(1, 5),
    n=st.integers(1, 8),
    seed=st.integers(0, 2**31 - 1),
)
def test_module_is_the_function_at_its_scale(heads, rank, n, seed):
    g = torch.Generator().manual_seed(seed)
    dim = heads * rank
    bases = torch.randn(heads, dim, rank, generator=g, dtype=torch.float64)
    bias = torch.randn(dim, generator=g, dtype=torch.float64)
    z = torch.randn(2, n, dim, generator=g, dtype=torch.float64)
    module = filled_module(dim, heads, bases, bias)
    torch.testing.assert_close(module.bases, bases)
    expected = mssa(z, bases, scale=rank**-0.5) + bias
    torch.testing.assert_close(module(z), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        module.weights(z) @ module.head_coordinates(z),
        attend(z[:, None] @ bases, rank**-0.5),
    )


def test_module_parameters_all_count_and_receive_gradients():
    module = MSSA(24, 3)
    assert sum(w.numel() for w in module.parameters()) == 2 * 24**2 + 24
    module(torch.randn(2, 5, 24)).square().sum().backward()
    assert all(
        w.grad is not None and bool(w.grad.abs().sum() > 0) for w in module.parameters()
    )


def test_permuting_tokens_permutes_the_output():
    z, bases = draw((3, 4, 9, (), 5))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        mssa(z[order], bases, scale=2.0), mssa(z, bases, scale=2.0)[order]
    )
    torch.testing.assert_close(
        exact_mssa(z[order], bases, 0.5), exact_mssa(z, bases, 0.5)[order]
    )


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "operator",
    [mssa, lambda z, u: exact_mssa(z, u, 0.5), lambda z, u: mssa_step(z, u, 0.5, 0.1)],
)
@pytest.mark.parametrize(
    ("tokens", "bases"),
    [((5, 6), (2, 7, 3)), ((5, 6), (6, 3)), ((6,), (2, 6, 3))],
    ids=["dim", "bases", "one token"],
)
def test_shapes_that_do_not_fit_are_named(operator, tokens, bases):
    with pytest.raises(ValueError, match=r"\("):
        operator(torch.zeros(tokens), torch.zeros(bases))


@pytest.mark.parametrize("eps", [0.0, -1.0, math.nan])
def test_precision_must_be_positive(eps):
    z, bases = draw((2, 3, 4, (), 0))
    for call in (mssa, mssa_step, exact_mssa):
        arguments = (
            {"eps": eps} if call is not mssa_step else {"eps": eps, "kappa": 0.1}
        )
        with pytest.raises(ValueError, match="eps"):
            call(z, bases, **arguments)


@pytest.mark.parametrize(("dim", "heads"), [(10, 3), (10, 0), (10, -2), (4, 8)])
def test_heads_must_divide_the_dimension(dim, heads):
    with pytest.raises(ValueError, match=f"dim={dim}, heads={heads}"):
        MSSA(dim, heads)
