"""crate_core.model.crate and crate_core.model.config: counts, sizes, masking, features,
reconstruction, initialisation.
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_core.model.autoencoder import evaluation_mode
from crate_core.model.config import PRESETS, CrateMAEConfig
from crate_core.model.crate import CrateMAE
from crate_core.model.patches import patchify

PUBLISHED = {
    "tiny": 11_256_192,
    "small": 24_846_528,
    "base": 43_745_280,
    "large": 152_821_504,
}
SMALL = {"image_size": 8, "patch_size": 2, "dim": 16, "depth": 2, "heads": 4}


def build(seed: int = 0, **fields) -> CrateMAE:
    torch.manual_seed(seed)
    return CrateMAE(CrateMAEConfig(**{**SMALL, **fields})).double()


def draw(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def uniform(*shape: int, seed: int = 2) -> torch.Tensor:
    return torch.rand(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


# -- counts and presets


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_of_the_published_sizes(name):
    with torch.device("meta"):
        model = CrateMAE.from_preset(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name]
    assert all(parameter.requires_grad for parameter in model.parameters())


@given(
    st.integers(1, 6),
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 4),
)
@settings(deadline=None, max_examples=25)
def test_parameter_count_by_formula(quarter, depth, patch_size, channels, grid):
    dim, pixels = 4 * quarter, patch_size**2 * channels
    config = CrateMAEConfig(
        grid * patch_size, patch_size, channels, dim, depth, heads=quarter
    )
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in CrateMAE(config).parameters())
    assert (
        count
        == 2 * depth * (3 * dim**2 + 5 * dim) + 2 * dim * pixels + 7 * dim + pixels
    )


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_takes_a_training_step(name):
    """At its own width, patch and channels, with two layers and four patches."""
    config = CrateMAEConfig.preset(
        name, depth=2, image_size=2 * CrateMAEConfig.preset(name).patch_size
    )
    torch.manual_seed(0)
    model = CrateMAE(config)
    images = torch.randn(2, config.channels, config.image_size, config.image_size)
    noise = torch.rand(2, 4)
    before = model(images, 0.5, noise).loss
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad / parameter.grad.norm()
    assert model(images, 0.5, noise).loss < before


@pytest.mark.parametrize("visible_only", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
def test_every_parameter_receives_a_gradient(visible_only, normalize):
    model = build(encode_visible_only=visible_only, normalize_targets=normalize)
    model(draw(3, 3, 8, 8), 0.75, uniform(3, 16)).loss.backward()
    silent = [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not p.grad.abs().max() > 0
    ]
    assert silent == []


def test_initial_weights_are_drawn_from_the_published_distributions():
    torch.manual_seed(0)
    model = CrateMAE.from_preset("tiny", depth=1)
    dim, pixels = 384, 768
    xavier = {
        model.patch_embedding.weight: math.sqrt(6 / (dim + pixels)),
        model.prediction.weight: math.sqrt(6 / (dim + pixels)),
        model.encoder[0].attention.project.weight: math.sqrt(6 / (2 * dim)),
        model.decoder[0].attention.output.weight: math.sqrt(6 / (2 * dim)),
    }
    kaiming = {
        model.encoder[0].sparsify.weight: math.sqrt(6 / dim),
        model.decoder[0].densify.weight: math.sqrt(6 / dim),
    }
    for weight, bound in {**xavier, **kaiming}.items():
        assert 0.99 * bound < weight.abs().max() <= bound
        assert abs(weight.std() / (bound / math.sqrt(3)) - 1) < 0.02
    for token in (model.class_token, model.mask_token):
        assert abs(token.std() / 0.02 - 1) < 0.2
    assert model.prediction.bias.abs().max() == 0
    assert model.encoder[0].attention.output.bias.abs().max() == 0
    assert 0 < model.patch_embedding.bias.abs().max() <= 1 / math.sqrt(pixels)


# -- sizes


@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([1, 3, 4]),
    st.booleans(),
    st.booleans(),
)
@settings(deadline=None, max_examples=30)
def test_any_size_divisible_by_the_patch(
    rows, columns, batch, channels, visible_only, normalize
):
    model = build(
        channels=channels, encode_visible_only=visible_only, normalize_targets=normalize
    )
    height, width, length = 2 * rows, 2 * columns, rows * columns
    images = draw(batch, channels, height, width)
    assert model.forward_features(images).shape == (batch, 1 + length, 16)
    ratio = 0.0 if length == 1 else 0.5
    out = model(images, ratio, uniform(batch, length))
    assert out.logits.shape == (batch, length, 4 * channels)
    assert out.mask.shape == out.ids_restore.shape == (batch, length)
    assert out.mask.sum() == batch * (length - int(length * (1 - ratio)))
    assert out.loss.isfinite() if length > 1 else out.loss.isnan()
    assert model.reconstruct(images, ratio).pasted.shape == images.shape


def test_rectangular_configuration():
    model = build(image_size=(4, 12), channels=1)
    assert model.config.grid == (2, 6)
    assert model.positions.shape == (13, 16)
    assert model(draw(1, 1, 4, 12), 0.5).logits.shape == (1, 12, 4)


def test_position_table_of_another_size_covers_the_same_range():
    model = build()
    assert torch.equal(model.position_table((4, 4)), model.positions)
    twice = model.position_table((8, 8))[1:].reshape(8, 8, 16)
    # The fastest sine along the columns, at half-patch steps that start a quarter patch
    # before the first patch.
    expected = torch.sin((torch.arange(8, dtype=torch.float64) + 0.5) / 2 - 0.5)
    torch.testing.assert_close(twice[3, :, 0], expected, atol=1e-6, rtol=0)


# -- masking


@pytest.mark.parametrize("visible_only", [False, True])
def test_removed_pixels_do_not_reach_the_model(visible_only):
    model = build(encode_visible_only=visible_only)
    images, noise = draw(2, 3, 8, 8), uniform(2, 16)
    out = model(images, 0.75, noise, output_hidden_states=True)
    pixel_mask = (
        out.mask.reshape(2, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
    )
    other = torch.where(pixel_mask > 0, draw(2, 3, 8, 8, seed=9), images)
    again = model(other, 0.75, noise, output_hidden_states=True)
    assert all(
        torch.equal(a, b)
        for a, b in zip(out.hidden_states, again.hidden_states, strict=True)
    )
    assert torch.equal(out.logits, again.logits)
    assert not torch.equal(out.loss, again.loss)  # they are the targets
    visible_changed = torch.where(pixel_mask > 0, images, draw(2, 3, 8, 8, seed=9))
    assert not torch.allclose(model(visible_changed, 0.75, noise).logits, out.logits)


def test_visible_only_encodes_fewer_tokens_and_equals_an_assembly_by_hand():
    model = build(encode_visible_only=True)
    images, noise = draw(1, 3, 8, 8), uniform(1, 16)
    out = model(images, 0.75, noise, output_hidden_states=True)
    assert {state.shape for state in out.hidden_states} == {(1, 5, 16)}
    assert {state.shape for state in out.decoder_hidden_states} == {(1, 17, 16)}
    visible = sorted(range(16), key=lambda i: noise[0, i].item())[:4]
    patches = patchify(images, 2)[0]
    tokens = [model.class_token[0, 0]]
    tokens += [
        model.patch_embedding(patches[i]) + model.positions[1 + i] for i in visible
    ]
    x = torch.stack(tokens)[None]
    for layer in model.encoder:
        x = layer(x)
    x = model.encoder_norm(x)
    full = [x[0, 0]]
    for i in range(16):
        token = x[0, 1 + visible.index(i)] if i in visible else model.mask_token[0, 0]
        full.append(token + model.positions[1 + i])
    y = torch.stack(full)[None]
    for layer in model.decoder:
        y = layer(y)
    torch.testing.assert_close(
        out.logits, model.prediction(model.decoder_norm(y))[:, 1:]
    )


def test_the_loss_counts_removed_patches_only():
    model = build()
    images = draw(2, 3, 8, 8)
    out = model(images, 0.5, uniform(2, 16))
    errors = [
        ((out.logits[b, i] - patchify(images, 2)[b, i]) ** 2).mean()
        for b in range(2)
        for i in range(16)
        if out.mask[b, i] == 1
    ]
    torch.testing.assert_close(out.loss, sum(errors) / len(errors))


def test_noise_is_drawn_from_torchs_generator_and_differs_per_image():
    model, images = build(), draw(4, 3, 8, 8)
    torch.manual_seed(3)
    first = model(images).mask
    torch.manual_seed(3)
    assert torch.equal(model(images).mask, first)
    assert not torch.equal(model(images).mask, first)
    assert len({tuple(row.tolist()) for row in first}) > 1


# -- features, intermediates


@pytest.mark.parametrize("visible_only", [False, True])
def test_features_are_the_last_hidden_state_normed_when_nothing_is_masked(visible_only):
    model, images = build(encode_visible_only=visible_only), draw(2, 3, 8, 8)
    # keeps the order of patches where only visible ones are encoded
    ascending = torch.arange(16.0).expand(2, -1) / 16
    out = model(images, 0.0, ascending, output_hidden_states=True)
    assert (
        len(out.hidden_states)
        == len(out.decoder_hidden_states)
        == model.config.depth + 1
    )
    torch.testing.assert_close(
        model.forward_features(images), model.encoder_norm(out.hidden_states[-1])
    )
    assert all((state >= 0).all() for state in out.hidden_states[1:])


@pytest.mark.parametrize("visible_only", [False, True])
def test_attention_weights_reproduce_the_layers(visible_only):
    model, images = build(encode_visible_only=visible_only), draw(2, 3, 8, 8)
    out = model(
        images, 0.5, uniform(2, 16), output_hidden_states=True, output_attentions=True
    )
    tokens = 9 if visible_only else 17
    assert [weights.shape for weights in out.attentions] == [(2, 4, tokens, tokens)] * 2
    states = zip(
        model.encoder,
        out.attentions,
        out.hidden_states[:-1],
        out.hidden_states[1:],
        strict=True,
    )
    for layer, weights, before, after in states:
        torch.testing.assert_close(
            weights.sum(-1), torch.ones(2, 4, tokens, dtype=torch.float64)
        )
        values = layer.attention.head_coordinates(layer.norm_attention(before))
        attended = layer.attention.output(
            torch.cat((weights @ values).unbind(1), dim=-1)
        )
        torch.testing.assert_close(
            layer.sparsify(layer.norm_sparsify(before + attended)), after
        )


def test_intermediates_come_only_when_asked_for_and_change_nothing():
    model, images, noise = build(), draw(2, 3, 8, 8), uniform(2, 16)
    plain = model(images, 0.5, noise)
    assert (
        plain.hidden_states is plain.attentions is plain.decoder_hidden_states is None
    )
    asked = model(images, 0.5, noise, output_hidden_states=True, output_attentions=True)
    assert torch.equal(plain.logits, asked.logits)
    torch.testing.assert_close(
        model.prediction(model.decoder_norm(asked.decoder_hidden_states[-1]))[:, 1:],
        plain.logits,
    )


# -- pictures


@pytest.mark.parametrize("normalize", [False, True])
def test_a_perfect_prediction_gives_the_picture_back(normalize, monkeypatch):
    model, images, noise = (
        build(normalize_targets=normalize),
        draw(2, 3, 8, 12),
        uniform(2, 24),
    )
    real = model.forward

    def perfect(images, mask_ratio, noise):
        return dataclasses.replace(
            real(images, mask_ratio, noise), logits=model.targets(images)
        )

    monkeypatch.setattr(model, "forward", perfect)
    pictures = model.reconstruct(images, 0.75, noise)
    torch.testing.assert_close(pictures.predicted, images)
    torch.testing.assert_close(pictures.pasted, images)


@pytest.mark.parametrize("normalize", [False, True])
def test_reconstruction_pastes_predictions_where_patches_were_removed(normalize):
    model, images, noise = (
        build(normalize_targets=normalize),
        draw(2, 3, 8, 8),
        uniform(2, 16),
    )
    pictures, out = model.reconstruct(images, 0.5, noise), model(images, 0.5, noise)
    removed = (
        out.mask.reshape(2, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3) > 0
    )
    removed = removed.expand_as(images)
    assert torch.equal(pictures.mask, out.mask)
    assert torch.equal(pictures.masked, images.masked_fill(removed, 0))
    assert torch.equal(pictures.pasted[~removed], images[~removed])
    assert torch.equal(pictures.pasted[removed], pictures.predicted[removed])
    targets, predicted = model.targets(images), out.logits
    if normalize:
        # De-normalised by hand: each predicted patch gets its original's mean and
        # standard deviation.
        originals = patchify(images, 2)
        predicted = predicted * (
            originals.var(-1, keepdim=True) + 1e-6
        ).sqrt() + originals.mean(-1, keepdim=True)
        torch.testing.assert_close(
            targets.mean(-1),
            torch.zeros(2, 16, dtype=torch.float64),
            atol=1e-12,
            rtol=0,
        )
    torch.testing.assert_close(patchify(pictures.predicted, 2), predicted)
    assert not pictures.predicted.requires_grad


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_standardize_and_back(channels):
    model = build(channels=channels)
    bytes_ = torch.randint(
        0,
        256,
        (2, channels, 8, 8),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )
    pixels = bytes_.double() / 255
    units = model.standardize(bytes_)
    torch.testing.assert_close(units, model.standardize(pixels))
    torch.testing.assert_close(model.unstandardize(units), pixels)
    for channel in range(channels):
        mean, std = model.config.pixel_mean[channel], model.config.pixel_std[channel]
        torch.testing.assert_close(units[:, channel], (pixels[:, channel] - mean) / std)


def test_imagenet_statistics_are_the_default_for_colour():
    config = CrateMAEConfig()
    assert config.pixel_mean == (0.485, 0.456, 0.406)
    assert config.pixel_std == (0.229, 0.224, 0.225)
    assert CrateMAEConfig(channels=1).pixel_mean == pytest.approx((0.449,))


# -- precision


def test_autocast_runs_and_stays_near(recwarn):
    torch.manual_seed(0)
    model = CrateMAE(CrateMAEConfig(**SMALL))
    images, noise = torch.randn(2, 3, 8, 8), torch.rand(2, 16)
    full = model(images, 0.5, noise)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(images, 0.5, noise)
    assert half.loss.dtype == torch.float32
    assert abs(half.loss / full.loss - 1) < 0.05


# -- bad input


@pytest.mark.bad_input
@pytest.mark.parametrize("method", ["forward", "forward_features", "reconstruct"])
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (
            torch.zeros(2, 1, 8, 8).double(),
            r"images must be \(B, 3, H, W\), got \(2, 1, 8, 8\)",
        ),
        (
            torch.zeros(3, 8, 8).double(),
            r"images must be \(B, 3, H, W\), got \(3, 8, 8\)",
        ),
        (torch.zeros(2, 3, 9, 8).double(), r"multiples of the patch size 2, got 9x8"),
        (torch.zeros(2, 3, 8, 0).double(), r"got 8x0"),
        (
            torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
            r"floating point, got torch\.uint8; model\.standardize",
        ),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), r"got torch\.int64"),
        (
            torch.zeros(2, 3, 8, 8),
            r"must be torch\.float64 like the weights, got torch\.float32",
        ),
    ],
)
def test_images_that_do_not_fit_are_named(method, images, message):
    with pytest.raises(ValueError, match=message):
        getattr(build(), method)(images)


@pytest.mark.bad_input
@pytest.mark.parametrize("shape", [(2, 15), (1, 16), (16,), (2, 17)])
def test_noise_of_another_token_count_is_named(shape):
    with pytest.raises(ValueError, match=r"noise must be \(2, 16\)"):
        build()(draw(2, 3, 8, 8), 0.5, torch.rand(shape))


@pytest.mark.bad_input
@pytest.mark.parametrize("ratio", [-0.5, 1.0, 2.0, math.nan])
def test_mask_ratio_is_checked(ratio):
    with pytest.raises(ValueError, match="mask_ratio"):
        build()(draw(1, 3, 8, 8), ratio)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(1, 3, 8, 8, dtype=torch.int32), r"got torch\.int32"),
        (torch.zeros(1, 1, 8, 8), r"got \(1, 1, 8, 8\)"),
    ],
)
def test_standardize_checks_its_pictures(images, message):
    with pytest.raises(ValueError, match=message):
        build().standardize(images)
    with pytest.raises(ValueError, match=message):
        build().unstandardize(images)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 18}, "dim=18, heads=4"),
        ({"heads": 3}, "dim=16, heads=3"),
        ({"dim": 6, "heads": 3}, "dim=6"),
        ({"depth": 0}, "depth must be a positive integer, got 0"),
        ({"heads": -1}, "heads .*got -1"),
        ({"channels": 2.0}, r"channels .*got 2\.0"),
        ({"patch_size": True}, "patch_size .*got True"),
        ({"image_size": 9}, "got 9x9"),
        ({"image_size": (8, 9)}, "got 8x9"),
        ({"image_size": "8"}, "image_size .*got '8'"),
        ({"image_size": 8.0}, r"image_size .*got 8\.0"),
        ({"image_size": (8, 8, 8)}, r"image_size .*got \(8, 8, 8\)"),
        ({"eta": 0.0}, "eta"),
        ({"eta": math.nan}, "eta"),
        ({"lambd": -0.1}, "lambd"),
        ({"pixel_mean": (0.5,)}, "pixel_mean .*3 channels"),
        ({"pixel_std": (0.5, 0.5, 0.0)}, "pixel_std must be positive"),
        ({"normalize_targets": True, "patch_size": 1, "channels": 1}, "no variance"),
    ],
)
def test_configurations_that_do_not_fit_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        CrateMAEConfig(**{**SMALL, **fields})


@pytest.mark.bad_input
def test_unknown_presets_and_fields_are_named():
    with pytest.raises(
        ValueError, match=r"unknown preset 'giant', accepted: tiny, small, base, large"
    ):
        CrateMAE.from_preset("giant")
    with pytest.raises(ValueError, match=r"unknown configuration fields \['width'\]"):
        CrateMAE.from_preset("tiny", width=3)


def test_the_configuration_is_frozen_and_survives_json():
    import json

    config = CrateMAEConfig(**SMALL, normalize_targets=True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dim = 3
    assert CrateMAEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    rectangular = CrateMAEConfig(image_size=(8, 16), patch_size=4, dim=8, heads=2)
    assert (
        CrateMAEConfig.from_dict(json.loads(json.dumps(rectangular.to_dict())))
        == rectangular
    )


# -- encode, decode, modes


@pytest.mark.parametrize("visible_only", [False, True])
@pytest.mark.parametrize("start", [0, 1, 2])
def test_encode_and_decode_continue_a_forward_pass_from_any_layer(visible_only, start):
    model = build(encode_visible_only=visible_only)
    out = model(draw(2, 3, 8, 8), 0.5, uniform(2, 16), output_hidden_states=True)
    encoded = model.encode(out.hidden_states[start], start=start)
    logits = model.decode(encoded, out.ids_restore, model.config.grid)
    assert torch.equal(logits, out.logits)


def test_encode_stops_where_asked_and_shows_each_layer():
    model, images = build(), draw(2, 3, 8, 8)
    states = [model.embed(images)]

    def visit(index, before, after):
        assert index == len(states) - 1
        assert torch.equal(before, states[-1])
        states.append(after)

    stopped = model.encode(states[0], stop=1, visit=visit)
    assert len(states) == 2
    assert torch.equal(stopped, model.encoder_norm(states[-1]))


@pytest.mark.parametrize("raised", [None, KeyboardInterrupt, ValueError])
def test_evaluation_mode_gives_every_part_its_mode_back(raised):
    model = build().train()
    model.encoder[0].eval()
    before = [part.training for part in model.modules()]
    try:
        with evaluation_mode(model):
            assert not any(part.training for part in model.modules())
            if raised is not None:
                raise raised
    except (KeyboardInterrupt, ValueError):
        pass
    assert [part.training for part in model.modules()] == before
