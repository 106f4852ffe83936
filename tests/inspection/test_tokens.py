"""Traces, principal components, linearity, attention maps, and pictures decoded from
blended and swapped tokens.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from crate_core.inspection.heads import all_attention_maps, attention_maps
from crate_core.inspection.token_blends import (
    decode_tokens,
    interpolate_tokens,
    swap_tokens,
)
from crate_core.inspection.tokens import (
    BATCH,
    midpoint_nonlinearity,
    signed_components,
    token_pca,
    trace_tokens,
)
from crate_core.model.autoencoder import MaskedAutoencoder
from crate_core.model.build import build_model
from crate_core.model.config import CrateMAEConfig, ViTMAEConfig
from crate_core.model.patches import upsample

SIZES = {"image_size": 16, "patch_size": 4, "dim": 16, "depth": 2, "heads": 2}
CONFIGS = {
    "crate": CrateMAEConfig(**SIZES),
    "crate, visible only": CrateMAEConfig(**SIZES, encode_visible_only=True),
    "vit": ViTMAEConfig(
        **SIZES,
        decoder_dim=8,
        decoder_depth=1,
        decoder_heads=2,
        encode_visible_only=True,
    ),
}


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return build_model(CONFIGS[request.param])


def pictures(count: int, seed: int, side: int = 16) -> Tensor:
    return torch.rand(
        count, 3, side, side, generator=torch.Generator().manual_seed(seed)
    )


def noise(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 16, generator=torch.Generator().manual_seed(seed))


# ---- traces ----


def test_trace_ends_at_the_encoders_features_in_raster_order(
    model: MaskedAutoencoder,
) -> None:
    images = pictures(3, 1)
    model.train()
    trace = trace_tokens(model, images, attentions=True)
    assert model.training
    with torch.no_grad():
        features = model.forward_features(model.standardize(images))
        torch.testing.assert_close(
            model.encoder_norm(trace.hidden_states[-1]), features
        )
        for layer, x, weights in zip(
            model.encoder, trace.hidden_states, trace.attentions, strict=False
        ):
            torch.testing.assert_close(layer.attention_weights(x), weights)
    assert len(trace.hidden_states) == 3
    assert len(trace.attentions) == 2
    assert trace.grid == (4, 4)


def test_batches_do_not_matter(model: MaskedAutoencoder) -> None:
    images = pictures(BATCH + 2, 2)
    whole = trace_tokens(model, images)
    alone = trace_tokens(model, images[-1:])
    torch.testing.assert_close(
        whole.hidden_states[-1][-1:], alone.hidden_states[-1], rtol=1e-4, atol=1e-5
    )
    maps = attention_maps(model, images).class_token
    torch.testing.assert_close(
        maps[-1:], attention_maps(model, images[-1:]).class_token, rtol=1e-4, atol=1e-5
    )


def test_trace_says_what_is_wrong(model: MaskedAutoencoder) -> None:
    with pytest.raises(ValueError, match="no picture"):
        trace_tokens(model, torch.zeros(0, 3, 16, 16))
    with pytest.raises(ValueError, match="needs noise"):
        trace_tokens(model, pictures(1, 0), mask_ratio=0.5)
    with pytest.raises(ValueError, match=r"layer must be in -2 \.\. 1, got 2"):
        attention_maps(model, pictures(1, 0), layer=2)


# ---- attention maps ----


def test_maps_are_the_rows_and_means_of_the_attention_weights(
    model: MaskedAutoencoder,
) -> None:
    images = pictures(2, 3)
    trace = trace_tokens(model, images, attentions=True)
    for index, maps in enumerate(all_attention_maps(model, images)):
        weights = trace.attentions[index]
        for head in range(2):
            for j in range(16):
                row, column = divmod(j, 4)
                torch.testing.assert_close(
                    maps.class_token[:, head, row, column], weights[:, head, 0, 1 + j]
                )
                torch.testing.assert_close(
                    maps.mean_token[:, head, row, column],
                    weights[:, head, 1:, 1 + j].mean(1),
                    rtol=1e-4,
                    atol=1e-6,
                )
        # What is missing to 1 went to the class token.
        torch.testing.assert_close(
            maps.class_token.sum((-2, -1)) + weights[:, :, 0, 0], torch.ones(2, 2)
        )
        assert (maps.mean_token.sum((-2, -1)) < 1).all()
    last = attention_maps(model, images, layer=-1)
    torch.testing.assert_close(last.class_token, maps.class_token)


def test_a_larger_picture_gives_a_finer_grid(model: MaskedAutoencoder) -> None:
    maps = attention_maps(model, pictures(1, 4, side=32))
    assert maps.class_token.shape == (1, 2, 8, 8)


def test_upsampling_keeps_each_patchs_value_or_interpolates() -> None:
    maps = torch.rand(2, 3, 4, 4)
    blocks = upsample(maps, (16, 16))
    torch.testing.assert_close(blocks[..., ::4, ::4], maps)
    torch.testing.assert_close(blocks[..., 3::4, 3::4], maps)
    smooth = upsample(maps, (16, 16), smooth=True)
    assert smooth.amax() <= maps.amax() + 1e-6
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    torch.testing.assert_close(
        upsample(ramp, (4, 16), smooth=True)[0, 0, 0, 2:-2].diff(),
        torch.full((11,), 0.25),
    )


# ---- principal components ----


@given(st.integers(1, 4), st.integers(2, 12), st.integers(3, 6), st.integers(0, 99))
def test_components_are_a_rotation_of_the_centred_tokens(
    batch: int, length: int, dim: int, seed: int
) -> None:
    tokens = torch.randn(
        batch, length, dim, generator=torch.Generator().manual_seed(seed)
    ).double()
    components = min(batch * length, dim)
    pca = token_pca(tokens, components)
    rebuilt = pca.coordinates @ pca.directions.mT + pca.mean
    torch.testing.assert_close(rebuilt, tokens)
    torch.testing.assert_close(
        pca.directions.mT @ pca.directions, torch.eye(components).double()
    )
    variance = (tokens - pca.mean).square().sum()
    torch.testing.assert_close(
        pca.coordinates.square().sum((0, 1)) / variance, pca.explained
    )
    assert (pca.explained.diff() <= 1e-12).all()
    assert (pca.coordinates.pow(3).sum((0, 1)) >= -1e-9 * variance**1.5).all()


def test_planted_directions_are_found_jointly() -> None:
    # A direction that varies between pictures but not inside any is invisible to a PCA
    # of each picture alone.
    generator = torch.Generator().manual_seed(0)
    tokens = 0.01 * torch.randn(4, 16, 8, generator=generator)
    tokens[..., 0] += torch.tensor([0.0, 0.0, 0.0, 5.0])[:, None]
    pca = token_pca(tokens, 1)
    assert abs(float(pca.directions[0, 0])) > 0.999
    assert float(pca.coordinates[3].mean()) > 3.0
    assert float(pca.explained[0]) > 0.99


def test_colours_mean_the_same_in_every_picture() -> None:
    tokens = torch.randn(3, 16, 5, generator=torch.Generator().manual_seed(1))
    tokens[2] = tokens[0]
    pca = token_pca(tokens)
    colors = pca.colors((4, 4))
    assert colors.shape == (3, 3, 4, 4)
    torch.testing.assert_close(colors[0], colors[2])
    assert colors.amin() == 0
    assert colors.amax() == 1
    order = pca.coordinates[..., 0].flatten().argsort()
    assert (colors[:, 0].flatten()[order].diff() >= 0).all()
    with pytest.raises(ValueError, match="3 components"):
        token_pca(tokens, 2).colors((4, 4))
    with pytest.raises(ValueError, match="16 tokens"):
        pca.colors((4, 5))
    with pytest.raises(ValueError, match=r"1 \.\. 5"):
        token_pca(tokens, 6)


def test_signed_components_are_a_map_and_its_mirror() -> None:
    pca = token_pca(torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(2)))
    maps = signed_components(pca, (4, 4))
    assert maps.shape == (2, 6, 4, 4)
    assert (maps.amin((-2, -1)) == 0).all()
    total = maps[:, :3] + maps[:, 3:]
    torch.testing.assert_close(total, total[..., :1, :1].expand_as(total))
    torch.testing.assert_close(
        maps[0, 0].flatten().argsort(), pca.coordinates[0, :, 0].argsort()
    )


# ---- linearity ----


def test_nonlinearity_is_zero_at_the_embedding_and_for_equal_tokens(
    model: MaskedAutoencoder,
) -> None:
    first, second = pictures(3, 5), pictures(3, 6)
    measured = midpoint_nonlinearity(model, first, second)
    assert measured.shape == (3, 3)
    assert measured[0].max() < 1e-5
    assert measured[1:].min() > 1e-3
    trace = [
        trace_tokens(model, x).hidden_states[2][:, 1:]
        for x in (first, second, (first + second) / 2)
    ]
    by_hand = (trace[2] - (trace[0] + trace[1]) / 2).flatten(1).norm(dim=1)
    by_hand = by_hand / ((trace[0] - trace[1]).flatten(1).norm(dim=1) / 2)
    torch.testing.assert_close(measured[2].float(), by_hand, rtol=1e-4, atol=1e-5)


@pytest.mark.bad_input
def test_pairs_must_match(model: MaskedAutoencoder) -> None:
    for function in (midpoint_nonlinearity, interpolate_tokens):
        with pytest.raises(ValueError, match="one shape"):
            function(model, pictures(3, 0), pictures(2, 0))
    with pytest.raises(ValueError, match="16 entries"):
        swap_tokens(
            model, pictures(1, 0), pictures(1, 1), torch.zeros(9, dtype=torch.bool)
        )


# ---- pictures from tokens ----


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("mask_ratio", [0.0, 0.75])
def test_decoding_a_trace_is_the_models_own_prediction(
    model: MaskedAutoencoder, layer: int, mask_ratio: float
) -> None:
    images = pictures(3, 7)
    order = noise(3)
    trace = trace_tokens(model, images, mask_ratio=mask_ratio, noise=order)
    decoded = decode_tokens(
        model, trace.hidden_states[layer], trace.ids_restore, trace.grid, layer=layer
    )
    predicted = model.unstandardize(
        model.reconstruct(model.standardize(images), mask_ratio, order).predicted
    )
    torch.testing.assert_close(decoded, predicted, rtol=1e-4, atol=1e-5)


def test_normalised_targets_need_pictures_to_be_like() -> None:
    torch.manual_seed(0)
    model = build_model(CrateMAEConfig(**SIZES, normalize_targets=True))
    images = pictures(2, 8)
    trace = trace_tokens(model, images)
    with pytest.raises(ValueError, match="like="):
        decode_tokens(model, trace.hidden_states[2], trace.ids_restore, trace.grid)
    decoded = decode_tokens(
        model, trace.hidden_states[2], trace.ids_restore, trace.grid, like=images
    )
    predicted = model.unstandardize(
        model.reconstruct(model.standardize(images), 0.0, noise(2)).predicted
    )
    torch.testing.assert_close(decoded, predicted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"layer must be in 0 \.\. 2, got 3"):
        decode_tokens(
            model,
            trace.hidden_states[2],
            trace.ids_restore,
            trace.grid,
            layer=3,
            like=images,
        )


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
def test_blends_at_the_embedding_are_blends_of_pixels(
    model: MaskedAutoencoder, mask_ratio: float
) -> None:
    first, second = pictures(2, 9), pictures(2, 10)
    between = interpolate_tokens(
        model, first, second, layer=0, mask_ratio=mask_ratio, noise=noise(2)
    )
    torch.testing.assert_close(between.tokens, between.pixels, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(between.blend[2], (first + second) / 2)


def test_blends_end_at_the_two_pictures_and_differ_between(
    model: MaskedAutoencoder,
) -> None:
    first, second = pictures(2, 11), pictures(2, 12)
    between = interpolate_tokens(model, first, second, (0.0, 0.5, 1.0))
    for end in (0, 2):
        torch.testing.assert_close(
            between.tokens[end], between.pixels[end], rtol=1e-4, atol=1e-5
        )
    assert (between.tokens[1] - between.pixels[1]).abs().max() > 1e-4


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5])
def test_swapping_nothing_everything_and_at_the_embedding(
    model: MaskedAutoencoder, mask_ratio: float
) -> None:
    first, second, masks = (
        pictures(2, 13),
        pictures(2, 14),
        {"mask_ratio": mask_ratio, "noise": noise(2)},
    )
    none, every = torch.zeros(16, dtype=torch.bool), torch.ones(16, dtype=torch.bool)
    torch.testing.assert_close(
        swap_tokens(model, first, second, none, **masks),
        swap_tokens(model, first, first, every, **masks),
    )
    # At the embedding a token holds its own patch and nothing else, so swapping tokens
    # is swapping patches.
    left = (torch.arange(16) % 4) < 2
    pasted = first.clone()
    pasted[..., :8] = second[..., :8]
    torch.testing.assert_close(
        swap_tokens(model, first, second, left, layer=0, **masks),
        swap_tokens(model, pasted, pasted, none, layer=0, **masks),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    # After the layers it is not: tokens hold something of the whole picture.
    late = swap_tokens(model, first, second, left, **masks)
    assert (late - swap_tokens(model, pasted, pasted, none, **masks)).abs().max() > 1e-4
