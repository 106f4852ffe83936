"""The fields of CrateMAEConfig that change one thing: values, norm, dictionary, decoder
depth; and short attention.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_core.model.attention import MSSA, SHORT_ATTENTION, attend, attention_weights
from crate_core.model.config import CrateMAEConfig, ViTMAEConfig, config_from_dict
from crate_core.model.crate import CrateMAE
from crate_core.model.kernels import ShortSharedAttention
from crate_core.model.sparsify import OvercompleteISTA, proximal_step

SMALL = {"image_size": 8, "patch_size": 2, "dim": 16, "depth": 2, "heads": 4}
CHANGES = [
    {"separate_values": True},
    {"norm": "rms"},
    {"norm": "none"},
    {"expansion": 3},
    {"decoder_depth": 1},
]


def build(**changes) -> CrateMAE:
    torch.manual_seed(0)
    return CrateMAE(CrateMAEConfig(**{**SMALL, **changes})).double()


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("changes", CHANGES, ids=str)
def test_each_change_trains_every_parameter_and_survives_saving(changes, tmp_path):
    model = build(**changes)
    images, noise = (
        draw(3, 3, 8, 8),
        torch.rand(3, 16, generator=torch.Generator().manual_seed(2)).double(),
    )
    out = model(images, 0.5, noise, output_attentions=True)
    out.loss.backward()
    assert [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not p.grad.abs().max() > 0
    ] == []
    torch.testing.assert_close(
        out.attentions[0].sum(-1), torch.ones(3, 4, 17, dtype=torch.float64)
    )
    model.save_pretrained(tmp_path)
    again = CrateMAE.from_pretrained(tmp_path).double()
    assert again.config == model.config
    assert torch.allclose(again(images, 0.5, noise).loss, out.loss, atol=1e-6)


def test_parameter_counts_of_the_changes():
    d, plain = 16, count(build())
    # one matrix for each of two plus two layers
    assert count(build(separate_values=True)) - plain == 4 * d * d
    # two wide dictionaries for a square one
    assert count(build(expansion=3)) - plain == 2 * (2 * 3 * d * d - d * d)
    # a bias for each of two norms in four layers
    assert plain - count(build(norm="rms")) == 8 * d
    assert plain - count(build(norm="none")) == 16 * d
    assert plain - count(build(decoder_depth=1)) == 3 * d * d + 5 * d


def test_values_of_their_own_are_what_is_averaged():
    torch.manual_seed(0)
    attention = MSSA(16, 4, separate_values=True).double()
    z = draw(2, 5, 16)
    v = attention.head_coordinates(z)
    expected = attention_weights(v, attention.scale) @ attention.split_heads(
        z @ attention.values.weight.mT
    )
    torch.testing.assert_close(
        attention(z), attention.output(expected.transpose(-3, -2).flatten(-2))
    )
    with torch.no_grad():
        attention.values.weight.copy_(attention.project.weight)
    shared = MSSA(16, 4).double()
    shared.load_state_dict(
        {k: w for k, w in attention.state_dict().items() if not k.startswith("values")}
    )
    torch.testing.assert_close(attention(z), shared(z))


@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 4),
    st.floats(0.01, 0.5),
    st.floats(0, 2),
)
@settings(max_examples=20)
def test_wide_dictionary_takes_two_proximal_steps_from_zero(
    batch, tokens, wider, eta, lambd
):
    torch.manual_seed(0)
    step = OvercompleteISTA(8, 8 * wider, eta, lambd).double()
    z = draw(batch, tokens, 8)
    codes = torch.zeros(batch, tokens, 8 * wider, dtype=torch.float64)
    for _ in range(2):
        codes = proximal_step(codes, z, step.weight, eta, lambd)
    torch.testing.assert_close(step.codes(z), codes)
    torch.testing.assert_close(step(z), z + codes @ step.decode.mT)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "batch"}, "norm must be one of layer, rms, none"),
        ({"expansion": 0}, "expansion must be a positive integer"),
        ({"decoder_depth": 0}, "decoder_depth must be a positive integer"),
    ],
)
def test_wrong_changes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CrateMAEConfig(**{**SMALL, **changes})


def test_configurations_tell_their_architecture():
    crate, vit = (
        CrateMAEConfig.preset("cifar10-tiny"),
        ViTMAEConfig.preset("cifar10-tiny"),
    )
    assert config_from_dict(crate.to_dict()) == crate
    assert config_from_dict(vit.to_dict()) == vit
    with pytest.raises(
        ValueError, match="model of type 'vit-mae', accepted: 'crate-mae'"
    ):
        CrateMAEConfig.from_dict(vit.to_dict())
    with pytest.raises(ValueError, match="'resnet', accepted: crate-mae, vit-mae"):
        config_from_dict({"model_type": "resnet"})


@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.floats(0.05, 2))
@settings(max_examples=20)
def test_short_attention_is_attention_with_its_gradient(heads, tokens, rank, scale):
    v = draw(heads, tokens, rank).requires_grad_()
    expected = attention_weights(v, scale) @ v
    torch.testing.assert_close(ShortSharedAttention.apply(v, scale), expected)
    assert torch.autograd.gradcheck(
        lambda x: ShortSharedAttention.apply(x, scale), (v,)
    )


def largest_kept(v: torch.Tensor) -> int:
    """Numbers in the largest array that attention keeps for its backward pass."""
    sizes = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        sizes.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        attend(v, 0.5)
    return max(sizes)


def test_bfloat16_attention_on_a_cpu_keeps_its_weights_for_few_tokens_and_agrees():
    v = draw(2, 4, 65, 32).float().bfloat16().requires_grad_()
    attend(v, 32**-0.5).float().square().sum().backward()
    exact = v.detach().double().requires_grad_()
    attend(exact, 32**-0.5).square().sum().backward()
    error = (v.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert error < 0.02  # bfloat16 has eight bits
    few, many = (
        torch.zeros(1, 1, n, 4, dtype=torch.bfloat16, requires_grad=True)
        for n in (SHORT_ATTENTION, SHORT_ATTENTION + 1)
    )
    assert largest_kept(few) == SHORT_ATTENTION**2
    assert largest_kept(many) < SHORT_ATTENTION**2 / 10
