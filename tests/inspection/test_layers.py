"""Layers measured: against formulas written out, on layers built to obey the theory,
and against a hand-made model.
"""

import json
from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from crate_core.inspection.layer_measures import (
    attention_parts,
    direction_rate,
    residual_direction,
    unit_tokens,
)
from crate_core.inspection.layers import (
    inspect_layers,
    inspect_weights,
    partner_scores,
    summarize,
)
from crate_core.inspection.measures import gini, hoyer
from crate_core.model.build import fresh_model
from crate_core.model.config import CrateMAEConfig, FrameConfig, ViTMAEConfig
from crate_core.model.crate import CrateMAE
from crate_core.model.vit import ViTMAE
from crate_core.theory.law import noise_direction
from crate_core.theory.mixture import LowRankGaussianMixture, random_bases
from crate_core.theory.rate import coding_rate, subspace_coding_rate

TINY = CrateMAEConfig.preset("digits", dim=16, depth=3, heads=2)
VIT = ViTMAEConfig(
    **{
        name: getattr(TINY, name)
        for name in ("image_size", "patch_size", "channels", "pixel_mean", "pixel_std")
    },
    dim=16,
    depth=2,
    heads=2,
    decoder_dim=8,
    decoder_depth=1,
    decoder_heads=2,
)
ABLATED = replace(TINY, separate_values=True, expansion=2, norm="none")
PICTURES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))


def arrays_of(inspection: object, name: str = "") -> dict[str, np.ndarray]:
    found = {}
    for field in fields(inspection):
        value = getattr(inspection, field.name)
        inner = f"{name}.{field.name}".lstrip(".")
        if is_dataclass(value):
            found |= arrays_of(value, inner)
        elif isinstance(value, np.ndarray):
            found[inner] = value
    return found


@pytest.mark.parametrize(
    "config", [TINY, VIT, ABLATED], ids=["crate", "vit", "ablated"]
)
def test_every_array_has_its_shape_and_is_finite(config: FrameConfig) -> None:
    model = fresh_model(config, 0)
    for mask_ratio in (0.0, 0.75):
        found = arrays_of(inspect_layers(model, PICTURES, mask_ratio=mask_ratio))
        depth = config.depth
        for name, array in found.items():
            if name.startswith("pooled"):
                expected: tuple[int, ...] = (depth + 1,)
            elif name.startswith("inversion"):
                expected = (5, depth, depth)
            else:
                expected = (5, depth + name.startswith("between"))
            assert array.shape == expected, name
            assert np.isfinite(array).all(), name
    assert all(
        array.shape == (config.depth,)
        for array in arrays_of(inspect_weights(model)).values()
    )


def test_batches_do_not_matter_and_nothing_is_left_changed() -> None:
    model = fresh_model(TINY, 0).train()
    whole = arrays_of(inspect_layers(model, PICTURES, mask_ratio=0.5))
    parts = arrays_of(inspect_layers(model, PICTURES, mask_ratio=0.5, batch_size=2))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, array in whole.items():
        np.testing.assert_allclose(
            parts[name], array, rtol=2e-3, atol=2e-4, err_msg=name
        )


def test_measures_are_the_formulas_on_the_models_own_tokens() -> None:
    model, eps = fresh_model(TINY, 1), 0.3
    found = inspect_layers(model, PICTURES, eps=eps)
    with torch.no_grad():
        out = model(model.standardize(PICTURES), 0.0, output_hidden_states=True)
        picture, layer = 2, 1
        x = out.hidden_states[layer][picture]
        block = model.encoder[layer]
        u, bases = block.compress(x[None])[0], block.attention.bases
        scale = x.square().sum(-1).mean().sqrt()
        np.testing.assert_allclose(
            found.layers.tokens.total[picture, layer],
            coding_rate(x / scale, eps),
            rtol=1e-4,
        )
        np.testing.assert_allclose(
            found.layers.compressed.learned[picture, layer],
            subspace_coding_rate(u / scale, bases, eps),
            rtol=1e-4,
        )
        z = unit_tokens(block.norm_attention(x))
        orthonormal = torch.stack([torch.linalg.qr(basis).Q for basis in bases])
        np.testing.assert_allclose(
            found.layers.attended.orthonormal[picture, layer],
            subspace_coding_rate(z, orthonormal, eps),
            rtol=1e-4,
        )
        output = out.hidden_states[layer + 1][picture]
        np.testing.assert_allclose(
            found.between.hoyer[picture, layer + 1], hoyer(output).mean(), rtol=1e-4
        )
        np.testing.assert_allclose(
            found.between.gini[picture, layer + 1], gini(output).mean(), rtol=1e-4
        )
        np.testing.assert_allclose(
            found.between.nonzeros[picture, layer + 1],
            (output > 0).float().mean(),
            rtol=1e-4,
        )
        back = model.decoder[0](output[None])[0]
        cosine = F.cosine_similarity(back.flatten(), x.flatten(), dim=0)
        np.testing.assert_allclose(
            found.inversion.cosine[picture, layer, 0], cosine, rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("model", [CrateMAE(TINY), ViTMAE(VIT)], ids=["crate", "vit"])
def test_attention_parts_make_up_the_half_step(model: nn.Module) -> None:
    x, layer = torch.randn(2, 7, 16), model.encoder[0]
    parts = attention_parts(layer)
    with torch.no_grad():
        half = x + parts.attend(parts.norm(x))
        if isinstance(model, CrateMAE):
            torch.testing.assert_close(half, layer.compress(x))
            torch.testing.assert_close(
                layer(x), layer.sparsify(layer.norm_sparsify(half))
            )
        else:
            torch.testing.assert_close(layer(x), half + layer.mlp(layer.norm2(half)))
            # With attention that only looks at itself, what is read is what is written:
            # values, then the output.
            layer.attn.qkv.weight[:16] = 0
            z = torch.randn(2, 1, 16)  # a single token attends to itself alone
            one = sum(
                z @ u @ w.T for u, w in zip(parts.bases, parts.written, strict=True)
            )
            torch.testing.assert_close(layer.attn(z), one, atol=1e-5, rtol=1e-4)


def test_attention_parts_refuse_another_module() -> None:
    with pytest.raises(ValueError, match="got Linear"):
        attention_parts(nn.Linear(2, 2))


# -- layers that obey the theory


def theory_model() -> CrateMAE:
    """A model whose weights are what the derivation asks for: orthogonal subspaces, W_o
    = -kappa [U_1 ... U_K] (a step that shrinks), an orthogonal dictionary, and a
    decoder that holds its transpose.
    """
    model = CrateMAE(TINY)
    with torch.no_grad():
        for layer, partner in zip(model.encoder, reversed(model.decoder), strict=True):
            rotation = torch.linalg.qr(torch.randn(16, 16)).Q
            layer.attention.project.weight.copy_(rotation)
            layer.attention.output.weight.copy_(-0.5 * rotation.T)
            layer.sparsify.weight.copy_(torch.linalg.qr(torch.randn(16, 16)).Q)
            partner.densify.weight.copy_(layer.sparsify.weight)
    return model


def test_weights_that_obey_the_theory_are_seen_to() -> None:
    found = inspect_weights(theory_model())
    for name in (
        "coherence_max",
        "coherence_mean",
        "basis_defect",
        "dictionary_defect",
    ):
        np.testing.assert_allclose(getattr(found, name), 0.0, atol=1e-3, err_msg=name)
    for name in (
        "basis_condition",
        "dictionary_norm",
        "dictionary_condition",
        "partner_cosine",
    ):
        np.testing.assert_allclose(getattr(found, name), 1.0, atol=1e-3, err_msg=name)
    np.testing.assert_allclose(found.written_cosine, -1.0, atol=1e-5)
    assert found.eta == TINY.eta
    random = inspect_weights(fresh_model(TINY, 0))
    assert (random.coherence_max > 0.5).all()
    assert (np.abs(random.written_cosine) < 0.5).all()


def test_a_shrinking_step_is_along_the_negative_gradient_and_controls_tell_why() -> (
    None
):
    found = inspect_layers(theory_model(), PICTURES)
    assert (found.layers.steps.formula < -0.999).all()  # W_o is minus the formula's
    assert (found.layers.steps.gradient > found.layers.steps.swapped).all()
    # Most of the agreement is plain shrinkage, which the control beside it shows.
    assert (found.layers.steps.shrink > 0.5).all()
    assert (found.layers.compressed.learned < found.layers.tokens.learned)[
        :, 1:
    ].mean() > 0.5


def test_rate_in_random_subspaces_is_that_of_tokens_without_structure() -> None:
    model = fresh_model(CrateMAEConfig.preset("digits", dim=64, depth=1, heads=4), 0)
    found = inspect_layers(model, PICTURES)
    # Random weights know nothing of the tokens: their subspaces are as good as any.
    np.testing.assert_allclose(
        found.layers.random_rate.mean(),
        found.layers.attended.orthonormal.mean(),
        rtol=0.1,
    )
    # heads that read the directions which all tokens share: one head holds nearly all
    with torch.no_grad():
        x = model(
            model.standardize(PICTURES), 0.0, output_hidden_states=True
        ).hidden_states[0]
        z = model.encoder[0].norm_attention(x).flatten(0, 1)
        model.encoder[0].attention.project.weight.copy_(
            torch.linalg.svd(z, full_matrices=True).Vh
        )
    sorted_heads = inspect_layers(model, PICTURES)
    assert (
        sorted_heads.layers.attended.orthonormal < sorted_heads.layers.random_rate
    ).all()


def test_residual_direction_is_that_of_the_theorem_where_labels_are_known() -> None:
    mix = LowRankGaussianMixture.random(
        48, 3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    s = mix.sample(40, sigma=0.01, generator=torch.Generator().manual_seed(1))
    known = noise_direction(s.tokens, mix.bases, s.labels, within_span=True)
    torch.testing.assert_close(residual_direction(s.tokens, mix.bases), known)


def test_direction_rate_is_blind_to_lengths_and_to_which_head_holds_a_token() -> None:
    bases = random_bases(16, 2, 8)
    z = torch.randn(9, 16)
    in_head = z @ bases @ bases.mT  # (2, 9, 16): each token's part in each head
    longer = (torch.rand(2, 9, 1) + 0.1) * in_head
    torch.testing.assert_close(
        direction_rate(longer.sum(0), bases),
        direction_rate(z, bases),
        rtol=1e-4,
        atol=1e-3,
    )
    # Against the published formula, with eps squared 0.01: 1/2 logdet(I + p / (n 0.01)
    # W^T W), summed over heads.
    v = F.normalize(z @ bases, dim=-1).double()
    plain = sum(
        0.5 * torch.logdet(torch.eye(9, dtype=torch.float64) + 8 / (9 * 0.01) * w @ w.T)
        for w in v
    )
    np.testing.assert_allclose(direction_rate(z, bases), plain, rtol=1e-4)


def test_rates_do_not_see_that_tokens_grow() -> None:
    model = fresh_model(TINY, 0)
    before = inspect_layers(model, PICTURES)
    # everything that makes the embedding, tripled: LayerNorm sees nearly the same
    with torch.no_grad():
        for parameter in (
            model.patch_embedding.weight,
            model.patch_embedding.bias,
            model.class_token,
            model.mask_token,
        ):
            parameter.mul_(3)
        model.positions.mul_(3)
    after = inspect_layers(model, PICTURES)
    np.testing.assert_allclose(
        after.layers.tokens.total[:, 0], before.layers.tokens.total[:, 0], rtol=1e-4
    )
    np.testing.assert_allclose(
        after.between.norms[:, 0], 3 * before.between.norms[:, 0], rtol=1e-4
    )
    # in the units of x: a smaller step
    assert (
        after.layers.compressed.total[:, 0] != before.layers.compressed.total[:, 0]
    ).all()


# -- inversion


def test_a_decoder_layer_that_inverts_is_found_among_the_others() -> None:
    class Inverse(nn.Module):
        """Gives back what its encoder layer had, and counts how often it is asked."""

        def __init__(self, answer: torch.Tensor) -> None:
            super().__init__()
            self.answer = answer

        def forward(self, y: torch.Tensor) -> torch.Tensor:
            return 2 * self.answer.expand_as(y)

    model = fresh_model(TINY, 0)
    with torch.no_grad():
        hidden = model(
            model.standardize(PICTURES), 0.0, output_hidden_states=True
        ).hidden_states
    model.decoder = nn.ModuleList(Inverse(x) for x in reversed(hidden[:-1]))
    found = inspect_layers(model, PICTURES)
    partners, others = partner_scores(found.inversion.cosine)
    np.testing.assert_allclose(partners, 1.0, atol=1e-5)
    assert (others < 0.999).all()
    scales, _ = partner_scores(found.inversion.scale)
    np.testing.assert_allclose(scales, 0.5, atol=1e-5)
    partners, others = partner_scores(found.inversion.paths)
    np.testing.assert_allclose(partners, 1.0, atol=1e-5)
    assert (others < 0.9999).all()


def test_path_similarity_does_not_see_rotations() -> None:
    class Turned(nn.Module):
        """An encoder layer's input, turned and moved."""

        def __init__(self, x: torch.Tensor) -> None:
            super().__init__()
            self.turned = x @ torch.linalg.qr(torch.randn(16, 16)).Q + torch.randn(16)

        def forward(self, y: torch.Tensor) -> torch.Tensor:
            return self.turned.expand_as(y)

    model = fresh_model(TINY, 0)
    with torch.no_grad():
        hidden = model(
            model.standardize(PICTURES), 0.0, output_hidden_states=True
        ).hidden_states
    model.decoder = nn.ModuleList(Turned(x) for x in reversed(hidden[:-1]))
    found = inspect_layers(model, PICTURES)
    np.testing.assert_allclose(partner_scores(found.inversion.paths)[0], 1.0, atol=1e-4)
    assert (np.abs(partner_scores(found.inversion.cosine)[0]) < 0.9).all()


def test_partner_scores_pick_the_antidiagonal() -> None:
    matrix = np.arange(9.0).reshape(1, 3, 3)
    partners, others = partner_scores(matrix)
    assert partners.tolist() == [[2.0, 4.0, 6.0]]
    assert others.tolist() == [[0.5, 4.0, 7.5]]
    for shape in ((1, 3, 2), (1, 1, 1)):
        with pytest.raises(ValueError, match="as many decoder as encoder layers"):
            partner_scores(np.zeros(shape))


def test_the_baseline_has_no_inversion_and_no_dictionary() -> None:
    model = fresh_model(VIT, 0)
    found, weights = inspect_layers(model, PICTURES), inspect_weights(model)
    missing = (
        found.inversion,
        weights.dictionary_norm,
        weights.eta,
        weights.partner_cosine,
    )
    assert all(value is None for value in missing)


# -- summaries and errors


def test_summary_is_json_with_means_and_spreads_over_pictures() -> None:
    found = inspect_layers(fresh_model(TINY, 0), PICTURES)
    summary = json.loads(json.dumps(summarize(found)))
    np.testing.assert_allclose(
        summary["layers.tokens.learned"]["mean"],
        found.layers.tokens.learned.mean(axis=0),
    )
    np.testing.assert_allclose(
        summary["between.gini"]["std"], found.between.gini.std(axis=0, ddof=1)
    )
    assert summary["eps"] == 0.5
    assert len(summary["pooled.entropy"]) == TINY.depth + 1
    one = summarize(inspect_layers(fresh_model(TINY, 0), PICTURES[:1]))
    assert one["between.gini"]["std"] == [0.0] * (TINY.depth + 1)
    weights = summarize(inspect_weights(fresh_model(VIT, 0)))
    assert "dictionary_norm" not in weights
    assert len(weights["coherence_max"]) == VIT.depth
    assert found.layers.tokens.reduction == pytest.approx(
        found.layers.tokens.total - found.layers.tokens.orthonormal
    )


@pytest.mark.parametrize(
    ("change", "said"), [({"eps": 0.0}, "eps"), ({"mask_ratio": 1.0}, "mask_ratio")]
)
def test_bad_settings_are_named(change: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        inspect_layers(fresh_model(TINY, 0), PICTURES, **change)


def test_no_picture_is_an_error() -> None:
    with pytest.raises(ValueError, match="no picture"):
        inspect_layers(fresh_model(TINY, 0), PICTURES[:0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same() -> None:
    model = fresh_model(TINY, 0)
    here = arrays_of(inspect_layers(model, PICTURES))
    there = arrays_of(inspect_layers(model.to("cuda"), PICTURES))
    for name, array in here.items():
        np.testing.assert_allclose(
            there[name], array, rtol=1e-2, atol=1e-3, err_msg=name
        )
