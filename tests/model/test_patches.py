"""crate_core.model.patches: order of pixels and patches, positions, masking."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from crate_core.model.patches import (
    TARGET_VARIANCE_FLOOR,
    gather_tokens,
    normalize_patches,
    patch_grid,
    patchify,
    random_masking,
    restore_tokens,
    sincos_positions,
    unpatchify,
)

# first calls load libraries; nothing here is timed
timeless = settings(deadline=None, max_examples=50)
sizes = st.integers(1, 4)
seeds = st.integers(0, 2**31 - 1)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


# -- patches and back


@timeless
@given(sizes, sizes, sizes, sizes, sizes, seeds)
def test_patchify_order_and_round_trip(batch, channels, rows, columns, size, seed):
    images = draw(seed, batch, channels, rows * size, columns * size)
    patches = patchify(images, size)
    assert patches.shape == (batch, rows * columns, size * size * channels)
    expected = torch.empty_like(patches)
    for b in range(batch):
        for r in range(rows):
            for c in range(columns):
                position = 0
                for i in range(size):
                    for j in range(size):
                        for channel in range(channels):
                            pixel = images[b, channel, r * size + i, c * size + j]
                            expected[b, r * columns + c, position] = pixel
                            position += 1
    assert torch.equal(patches, expected)
    assert torch.equal(unpatchify(patches, size, (rows, columns)), images)


@timeless
@given(sizes, sizes, sizes, seeds)
def test_patch_embedding_as_a_matrix_is_a_strided_convolution(
    channels, grid, size, seed
):
    images = draw(seed, 2, channels, grid * size, grid * size)
    kernel = draw(seed + 1, 5, channels, size, size)
    convolved = F.conv2d(images, kernel, stride=size).flatten(2).mT
    torch.testing.assert_close(
        patchify(images, size) @ kernel.permute(0, 2, 3, 1).flatten(1).mT, convolved
    )


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("height", "width", "size"), [(9, 8, 4), (8, 9, 4), (0, 8, 4), (3, 8, 4), (8, 8, 0)]
)
def test_patch_grid_names_the_sizes(height, width, size):
    with pytest.raises(ValueError, match=rf"{size}.*{height}x{width}"):
        patch_grid(height, width, size)


@pytest.mark.bad_input
@pytest.mark.parametrize("shape", [(2, 5, 12), (2, 6, 11)])
def test_unpatchify_refuses_other_counts(shape):
    with pytest.raises(ValueError, match=str(shape[1])):
        unpatchify(torch.zeros(shape), 2, (2, 3))


# -- normalised targets


@timeless
@given(st.integers(2, 40), st.floats(-5, 5), st.floats(1e-2, 10), seeds)
def test_normalized_patches_are_standard_and_come_back(pixels, mean, std, seed):
    patches = mean + std * draw(seed, 2, 3, pixels)
    parts = normalize_patches(patches)
    torch.testing.assert_close(
        parts.normalized.mean(-1),
        torch.zeros(2, 3, dtype=torch.float64),
        atol=1e-9,
        rtol=0,
    )
    variance = patches.var(-1)
    torch.testing.assert_close(
        parts.normalized.var(-1), variance / (variance + TARGET_VARIANCE_FLOOR)
    )
    torch.testing.assert_close(
        parts.normalized * parts.std + parts.mean, patches, rtol=1e-12, atol=1e-12
    )


def test_a_flat_patch_has_zero_target_not_nan():
    parts = normalize_patches(torch.full((1, 1, 12), 0.7))
    # rounding of the mean, over the floor's root 1e-3
    assert parts.normalized.abs().max() < 1e-3


# -- positions


@pytest.mark.parametrize(
    ("dim", "rows", "columns"), [(4, 1, 1), (8, 2, 3), (16, 4, 4), (384, 14, 14)]
)
def test_positions_follow_the_formula(dim, rows, columns):
    table = sincos_positions(dim, (rows, columns))
    assert table.shape == (1 + rows * columns, dim)
    assert torch.equal(table[0], torch.zeros(dim))
    quarter = dim // 4
    for row in {0, rows // 2, rows - 1}:
        for column in {0, columns // 2, columns - 1}:
            omegas = [1 / 10000 ** (i / quarter) for i in range(quarter)]
            expected = (
                [math.sin(column * w) for w in omegas]
                + [math.cos(column * w) for w in omegas]
                + [math.sin(row * w) for w in omegas]
                + [math.cos(row * w) for w in omegas]
            )
            torch.testing.assert_close(
                table[1 + row * columns + column],
                torch.tensor(expected),
                rtol=0,
                atol=1e-7,
            )


@timeless
@given(st.integers(2, 6), st.integers(2, 6))
def test_no_two_patches_share_a_position(rows, columns):
    table = sincos_positions(16, (rows, columns))[1:]
    distances = torch.cdist(table, table) + 10 * torch.eye(rows * columns)
    assert distances.min() > 0.1


def interpolated(dim: int, reference: int, grid: int) -> torch.Tensor:
    table = sincos_positions(dim, (reference, reference))[1:].reshape(
        1, reference, reference, dim
    )
    return F.interpolate(table.permute(0, 3, 1, 2), size=(grid, grid), mode="bicubic")[
        0
    ].permute(1, 2, 0)


@pytest.mark.parametrize("grid", [7, 10, 16, 20, 28])
def test_rescaled_positions_are_what_bicubic_interpolation_approximates(grid):
    dim, reference, quarter = 384, 14, 96
    ours = sincos_positions(dim, (grid, grid), (reference, reference))[1:].reshape(
        grid, grid, dim
    )
    error = (
        (ours - interpolated(dim, reference, grid))
        .abs()
        .reshape(grid, grid, 4, quarter)
    )
    # Away from the border (bicubic reads two patches on each side), slow waves are
    # reproduced, fast ones roughly.
    border = math.ceil(2.5 * grid / reference)
    inside = error[border:-border, border:-border]
    assert inside[..., 24:].max() < 1e-2  # wavelengths of 62 patches and more
    # the fastest, 2 pi patches long, is off by per cents
    assert 2e-3 < inside.max() < 0.1
    # At the border interpolation repeats the edge, which no wave does: twice the
    # patches, five times the error.
    assert error.max() > (4.5 if grid == 28 else 1.0) * inside.max()


@pytest.mark.parametrize("grid", [5, 14, 21])
def test_rescaled_coordinates_are_those_of_interpolation(grid):
    """A linear ramp interpolates exactly away from the border, and shows where
    interpolation samples.
    """
    reference = 14
    ramp = torch.arange(reference, dtype=torch.float64)[None, None, :]
    sampled = F.interpolate(ramp, size=grid, mode="linear")[0, 0]
    coordinates = (
        torch.arange(grid, dtype=torch.float64) + 0.5
    ) * reference / grid - 0.5
    torch.testing.assert_close(sampled, coordinates.clamp(0, reference - 1))
    table = sincos_positions(8, (1, grid), (1, reference))[1:]
    torch.testing.assert_close(table[:, 0], coordinates.sin().float())


def test_positions_at_the_reference_grid_are_the_plain_table():
    assert torch.equal(
        sincos_positions(32, (3, 5), (3, 5)), sincos_positions(32, (3, 5))
    )


@pytest.mark.bad_input
@pytest.mark.parametrize("dim", [0, 2, 6, 30, -4])
def test_positions_need_a_multiple_of_four(dim):
    with pytest.raises(ValueError, match=f"got {dim}"):
        sincos_positions(dim, (2, 2))


# -- masking


@timeless
@given(st.integers(1, 4), st.integers(1, 40), st.floats(0, 0.99), seeds, st.booleans())
def test_masking_keeps_the_lowest_noise(batch, length, ratio, seed, ties):
    noise = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed))
    if ties:
        noise = (noise * 4).floor() / 4
    visible = int(length * (1 - ratio))
    if visible == 0:
        with pytest.raises(ValueError, match=f"none of {length}"):
            random_masking(noise, ratio)
        return
    masking = random_masking(noise, ratio)
    for b in range(batch):
        order = sorted(range(length), key=lambda i: (noise[b, i].item(), i))
        assert masking.ids_keep[b].tolist() == order[:visible]
        assert [masking.ids_restore[b, i].item() for i in order] == list(range(length))
        assert masking.mask[b].tolist() == [
            float(i in order[visible:]) for i in range(length)
        ]


def test_masks_are_uniform_over_patches():
    """Every patch is removed with the same frequency: the share in 20,000 draws is
    within 5 standard errors.
    """
    generator = torch.Generator().manual_seed(0)
    draws, length, ratio = 20_000, 16, 0.75
    removed = random_masking(
        torch.rand(draws, length, generator=generator), ratio
    ).mask.mean(0)
    assert (removed - ratio).abs().max() < 5 * math.sqrt(ratio * (1 - ratio) / draws)


@timeless
@given(
    st.integers(1, 3), st.integers(1, 12), st.integers(1, 4), st.floats(0, 0.9), seeds
)
def test_restore_puts_visible_tokens_back_and_mask_tokens_elsewhere(
    batch, length, dim, ratio, seed
):
    if int(length * (1 - ratio)) < 1:
        return
    tokens, mask_token = draw(seed, batch, length, dim), draw(seed + 1, 1, 1, dim)
    noise = torch.rand(batch, length, generator=torch.Generator().manual_seed(seed))
    masking = random_masking(noise, ratio)
    restored = restore_tokens(
        gather_tokens(tokens, masking.ids_keep), mask_token, masking.ids_restore
    )
    for b in range(batch):
        for i in range(length):
            expected = mask_token[0, 0] if masking.mask[b, i] else tokens[b, i]
            assert torch.equal(restored[b, i], expected)


@pytest.mark.bad_input
@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, math.nan])
def test_mask_ratio_outside_its_range_is_named(ratio):
    with pytest.raises(
        ValueError, match=rf"mask_ratio must be in \[0, 1\), got {ratio}"
    ):
        random_masking(torch.rand(2, 4), ratio)


@timeless
@given(st.integers(1, 300))
def test_rounding_of_the_visible_count_is_that_of_mae(length):
    """int() rounds down after float arithmetic: ten patches at 0.9 leave none, and say
    so.
    """
    for ratio in (0.25, 0.5, 0.6, 0.75):
        if (visible := int(length * (1 - ratio))) >= 1:
            assert random_masking(torch.rand(1, length), ratio).ids_keep.shape == (
                1,
                visible,
            )
    with pytest.raises(ValueError, match="leaves none of 10"):
        random_masking(torch.rand(1, 10), 0.9)
