"""What a step costs, counted: operations, kernels, bytes that are kept.  Never
seconds.
"""

import copy
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from crate_core.model.config import CrateMAEConfig
from crate_core.model.cost import (
    operation_counter,
    operations,
    saved_numbers,
    token_counts,
)
from crate_core.model.crate import CrateMAE
from crate_core.model.fold import fold
from crate_core.model.sparsify import ista, ista_matrix
from crate_core.theory.rate import head_coordinates, subspace_coding_rate

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from memory import saved_bytes  # the two scripts share their code with these tests
from plain import PlainCrateMAE, plain_ista

SMALL = {"image_size": 16, "patch_size": 4, "dim": 24, "depth": 2, "heads": 3}
PRODUCTS = {
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "_scaled_dot_product_flash_attention_for_cpu",
}


def small(**changes: object) -> CrateMAE:
    """A small model with gains and shifts that are not 1 and 0."""
    torch.manual_seed(0)
    model = CrateMAE(CrateMAEConfig(**{**SMALL, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def images_and_noise(
    model: CrateMAE, batch: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows, columns = model.config.grid
    size = model.config.patch_size
    images = torch.randn(
        batch, model.config.channels, rows * size, columns * size, generator=generator
    )
    return images, torch.rand(batch, rows * columns, generator=generator)


class Kernels(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    # PyTorch's signature
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        del types
        self.names.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


# ---- operations: formula = measured


@settings(max_examples=12, deadline=None)
@given(
    depth=st.integers(1, 3),
    decoder_depth=st.integers(1, 2),
    heads=st.sampled_from([1, 2, 4]),
    batch=st.integers(1, 3),
    visible_only=st.booleans(),
)
def test_predicted_operations_are_those_that_run(
    depth: int, decoder_depth: int, heads: int, batch: int, visible_only: bool
) -> None:
    model = CrateMAE(
        CrateMAEConfig(
            image_size=12,
            patch_size=4,
            dim=16,
            depth=depth,
            decoder_depth=decoder_depth,
            heads=heads,
            encode_visible_only=visible_only,
        )
    )
    images, noise = images_and_noise(model, batch)
    cost = operations(model.config, batch, mask_ratio=0.6)
    with operation_counter() as counter:
        loss = model(images, 0.6, noise).loss
    assert counter.get_total_flops() == sum(cost.forward.values())
    with operation_counter() as counter:
        loss.backward()
    assert counter.get_total_flops() == sum(cost.backward.values())


def test_the_plain_form_costs_what_its_formula_says_and_computes_the_same() -> None:
    model = small(normalize_targets=True)
    plain = PlainCrateMAE(copy.deepcopy(model))
    images, noise = images_and_noise(model)
    with operation_counter() as counter:
        loss, logits = plain(images, 0.6, noise)
        loss.backward()
    assert counter.get_total_flops() == operations(model.config, 2, fused=False).total
    out = model(images, 0.6, noise)
    out.loss.backward()
    assert torch.allclose(out.logits, logits, rtol=1e-4, atol=1e-5)
    theirs = dict(plain.model.named_parameters())
    for name, parameter in model.named_parameters():
        if not name.startswith("patch_embedding"):  # a convolution there
            assert torch.allclose(
                parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-6
            ), name


def test_counting_predicts_the_factor_of_the_published_sizes() -> None:
    for size, low, high in (("small", 1.2, 1.35), ("base", 1.2, 1.35)):
        config = CrateMAEConfig.preset(size)
        ours, plain = (
            operations(config, 32, fused=fused).total for fused in (True, False)
        )
        assert low < plain / ours < high


@pytest.mark.bad_input
@pytest.mark.parametrize("change", [{"expansion": 4}, {"separate_values": True}])
def test_ablations_with_other_products_are_not_counted(
    change: dict[str, object],
) -> None:
    with pytest.raises(ValueError, match="published layers"):
        operations(CrateMAEConfig(**{**SMALL, **change}), 1)
    with pytest.raises(ValueError, match="published layers"):
        saved_numbers(CrateMAEConfig(**{**SMALL, **change}), 1)


# ---- kernels


def test_number_of_matrix_products_in_a_layer() -> None:
    # Forward: project, attention, output, M, tokens times M.  Backward: two a linear
    # map, one attention, one for M.
    counts = []
    for depth in (1, 2):
        model = small(depth=depth, decoder_depth=1)
        images, noise = images_and_noise(model)
        with Kernels() as forward:
            loss = model(images, 0.6, noise).loss
        with Kernels() as backward:
            loss.backward()
        attention = "_scaled_dot_product_flash_attention_for_cpu_backward"
        counts.append(
            (
                sum(name in PRODUCTS for name in forward.names),
                sum(name in PRODUCTS or name == attention for name in backward.names),
            )
        )
    assert (counts[1][0] - counts[0][0], counts[1][1] - counts[0][1]) == (
        5,
        2 + 2 + 2 + 1 + 1,
    )


def test_folding_leaves_one_product_for_the_dictionary() -> None:
    counts = {}
    for name, make in (("ours", lambda m: m), ("folded", fold)):
        model = make(small())
        images, noise = images_and_noise(model)
        with torch.no_grad(), Kernels() as kernels:
            model(images, 0.6, noise)
        counts[name] = sum(kernel in PRODUCTS for kernel in kernels.names)
    assert counts["ours"] - counts["folded"] == SMALL["depth"]


# ---- bytes that are kept


def test_kept_numbers_are_those_of_the_formula_and_linear_in_tokens() -> None:
    def kept(side: int, depth: int) -> int:
        model = small(image_size=4 * side, depth=depth, decoder_depth=1)
        images, noise = images_and_noise(model, batch=1)
        return saved_bytes(lambda: model(images, 0.75, noise).loss, model)

    sides = (14, 28, 64)  # 196, 784 and 4,096 tokens
    for side in sides:
        sizes = {**SMALL, "image_size": 4 * side, "decoder_depth": 1}
        one, two = (
            saved_numbers(CrateMAEConfig(**{**sizes, "depth": depth}), 1)
            for depth in (1, 2)
        )
        assert kept(side, 2) - kept(side, 1) == 4 * (two - one)
    totals = [kept(side, 1) for side in sides]
    slopes = [
        (totals[i + 1] - totals[i]) / (sides[i + 1] ** 2 - sides[i] ** 2)
        for i in range(2)
    ]
    assert slopes[1] == pytest.approx(slopes[0], rel=1e-3)


def test_token_counts() -> None:
    assert token_counts(CrateMAEConfig.preset("base")) == (197, 197)
    assert token_counts(CrateMAEConfig.preset("base", encode_visible_only=True)) == (
        50,
        197,
    )


# ---- the same function


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 9),
    d=st.integers(1, 6),
    eta=st.floats(0.01, 0.5),
    seed=st.integers(0, 1000),
)
def test_the_closed_gradient_of_ista_is_that_of_its_steps(
    n: int, d: int, eta: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    z, dictionary, weight = (
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((2, n, d), (d, d), (2, n, d))
    )
    gradients = []
    for step in (ista, plain_ista):
        leaves = [z.clone().requires_grad_(), dictionary.clone().requires_grad_()]
        gradients.append(
            torch.autograd.grad((weight * step(*leaves, eta, 0.3)).sum(), leaves)
        )
    for ours, plain in zip(*gradients, strict=True):
        assert torch.allclose(ours, plain, rtol=1e-10, atol=1e-10)


def test_the_gradient_of_m_can_be_differentiated_again() -> None:
    dictionary = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: ista_matrix(d, 0.2), (dictionary,))
    assert torch.autograd.gradgradcheck(lambda d: ista_matrix(d, 0.2), (dictionary,))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"norm": "rms"},
        {"norm": "none"},
        {"expansion": 2},
        {"separate_values": True},
        {"depth": 1},
    ],
)
@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)],
)
def test_a_folded_model_is_the_same_function(
    change: dict[str, object], dtype: torch.dtype, limit: float
) -> None:
    model = small(**change).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images, noise = images_and_noise(model)
    images = images.to(dtype)
    with torch.no_grad():
        expected = model(images, 0.6, noise)
        folded = fold(model)
        out = folded(images, 0.6, noise, output_attentions=True)
        tokens = model.forward_features(images), folded.forward_features(images)
    assert torch.equal(out.mask, expected.mask)
    assert (
        float((out.logits - expected.logits).abs().max() / expected.logits.abs().max())
        < limit
    )
    assert float((tokens[1] - tokens[0]).abs().max() / tokens[0].abs().max()) < limit
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    # a copy
    assert all(
        torch.equal(value, before[name]) for name, value in model.state_dict().items()
    )


def test_a_folded_model_draws_nothing_and_is_not_saved(tmp_path: Path) -> None:
    model = small()
    state = torch.random.get_rng_state()
    folded = fold(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    with pytest.raises(ValueError, match="save the model that it was made from"):
        folded.save_pretrained(tmp_path)


# ---- rates


def test_rates_take_one_product_for_all_heads_and_factor_the_smaller_side() -> None:
    z, bases = torch.randn(5, 30, 24), torch.randn(4, 24, 6)
    with Kernels() as kernels:
        head_coordinates(z, bases)
    assert sum(name in PRODUCTS for name in kernels.names) == 1
    with Kernels() as kernels:
        subspace_coding_rate(z, bases, 0.5)
    assert kernels.names.count("linalg_cholesky_ex") == 1
    assert "linalg_qr" not in kernels.names


def test_rates_of_trained_like_tokens_stay_with_cholesky() -> None:
    # Squared in float32 these tokens would lose more than the limit; float64 serves,
    # and no QR is taken.
    z, bases = 40 * torch.randn(3, 50, 24), torch.randn(4, 24, 6)
    with Kernels() as kernels:
        rates = subspace_coding_rate(z, bases, 0.1)
    assert kernels.names.count("linalg_cholesky_ex") == 1
    assert "linalg_qr" not in kernels.names
    assert rates.dtype == torch.float32
    exact = subspace_coding_rate(z.double(), bases.double(), 0.1)
    assert torch.allclose(rates.double(), exact, rtol=1e-6)
