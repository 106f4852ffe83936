"""Scores of maps against masks, the choice of a map, and the composites whose masks are
exact.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import jaccard_score, roc_auc_score
from torch import Tensor

from crate_core.data.photographs import photographs
from crate_core.inspection.composites import composites, digit_pictures
from crate_core.inspection.foreground import (
    area_under_curve,
    centre_blob,
    foreground_scores,
    intersection_over_union,
    keep_mass,
    patch_contrast,
    pointing_game,
    random_maps,
    select_map,
)
from crate_core.model.patches import patchify

SEEDS = st.integers(0, 10_000)


def maps_and_masks(seed: int, levels: int = 5) -> tuple[Tensor, Tensor]:
    """Maps with many ties, and masks that are neither empty nor full."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(levels, (2, 3, 4, 5), generator=generator).float()
    mask = torch.rand(2, 4, 5, generator=generator) < 0.4
    mask[:, 0, 0], mask[:, 3, 4] = True, False
    return maps, mask


# ---- scores ----


@given(SEEDS, st.floats(0.05, 1.0))
def test_kept_places_are_the_smallest_set_that_holds_the_mass(
    seed: int, share: float
) -> None:
    maps, _ = maps_and_masks(seed)
    kept = keep_mass(maps, share)
    for values, chosen in zip(maps.flatten(0, 1), kept.flatten(0, 1), strict=True):
        if values.sum() == 0:
            continue
        assert values[chosen].sum() >= share * values.sum() * (1 - 1e-9)
        # a threshold
        assert chosen.all() or values[chosen].min() > values[~chosen].max()
        lowest = values == values[chosen].min()
        # a higher one would not do
        assert values[chosen & ~lowest].sum() < share * values.sum()


def test_a_map_that_is_the_same_everywhere_keeps_everything() -> None:
    assert keep_mass(torch.ones(1, 1, 3, 3), 0.2).all()
    for bad in (0.0, 1.5):
        with pytest.raises(ValueError, match="share"):
            keep_mass(torch.ones(1, 1, 3, 3), bad)
    with pytest.raises(ValueError, match=">= 0"):
        keep_mass(-torch.ones(1, 1, 3, 3))


@given(SEEDS)
def test_scores_are_those_of_scikit_learn(seed: int) -> None:
    maps, mask = maps_and_masks(seed)
    scores = foreground_scores(maps, mask)
    kept = keep_mass(maps)
    for b, k in itertools.product(range(2), range(3)):
        true, values = mask[b].flatten().numpy(), maps[b, k].flatten().numpy()
        assert math.isclose(scores.auc[b, k], roc_auc_score(true, values), abs_tol=1e-9)
        assert math.isclose(
            scores.iou[b, k],
            jaccard_score(true, kept[b, k].flatten().numpy()),
            abs_tol=1e-9,
        )
        assert math.isclose(
            scores.pointing[b, k], true[values == values.max()].mean(), abs_tol=1e-9
        )


@given(SEEDS)
def test_area_under_the_curve_sees_order_only(seed: int) -> None:
    maps, mask = maps_and_masks(seed)
    torch.testing.assert_close(
        area_under_curve(maps.exp() * 3 + 1, mask), area_under_curve(maps, mask)
    )
    torch.testing.assert_close(
        area_under_curve(-maps, mask), 1 - area_under_curve(maps, mask)
    )


def test_scores_of_the_mask_itself_are_perfect() -> None:
    _, mask = maps_and_masks(0)
    scores = foreground_scores(mask[:, None].float(), mask)
    for values in (scores.iou, scores.pointing, scores.auc):
        torch.testing.assert_close(values, torch.ones(2, 1).double())
    nothing = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    assert float(intersection_over_union(nothing, nothing[:, 0])) == 1


@pytest.mark.bad_input
def test_maps_and_masks_must_share_a_grid() -> None:
    with pytest.raises(ValueError, match=r"like the scores, got \(4, 2\)"):
        select_map(torch.ones(4, 3), control=torch.ones(4, 2))
    with pytest.raises(ValueError, match="agree"):
        foreground_scores(torch.ones(2, 3, 4, 5), torch.ones(2, 8, 8, dtype=torch.bool))


# ---- choosing ----


def test_choosing_among_useless_maps_looks_useful_on_the_pictures_it_was_done_on() -> (
    None
):
    scores = torch.rand(40, 16, generator=torch.Generator().manual_seed(0)).double()
    best = select_map(scores)
    spread = 1 / math.sqrt(12 * 40)
    assert abs(float(best.held_out.mean()) - 0.5) < 3 * spread
    # the expected maximum of 16 normals is 1.77 deviations up
    assert best.same_pictures > 0.5 + spread
    # the expected maximum of 16 uniforms
    assert abs(best.each_picture - 16 / 17) < 0.03
    assert best.mean < float(best.held_out.mean()) + 3 * spread
    assert best.chosen == int(scores.mean(0).argmax())


@given(SEEDS)
def test_a_map_that_is_best_on_every_picture_is_chosen_everywhere(seed: int) -> None:
    scores = torch.rand(7, 4, generator=torch.Generator().manual_seed(seed)).double()
    scores[:, 2] += 2
    best = select_map(scores, seed)
    torch.testing.assert_close(best.held_out, scores[:, 2])
    assert best.chosen == 2
    assert math.isclose(best.same_pictures, best.each_picture)


def test_each_half_is_scored_with_the_other_halfs_choice() -> None:
    # Map 0 is right on pictures of one half only; whoever chose on the scored half
    # would get 1.
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    scores = torch.zeros(6, 2).double()
    scores[order[:3], 0] = 1
    scores[order[3:], 1] = 1
    assert float(select_map(scores, 3).held_out.sum()) == 0
    with pytest.raises(ValueError, match="two pictures"):
        select_map(scores[:1])


@given(SEEDS)
def test_a_control_is_scored_with_the_choice_made_without_it(seed: int) -> None:
    scores, control = torch.rand(
        2, 8, 3, generator=torch.Generator().manual_seed(seed)
    ).double()
    plain, under = select_map(scores, seed), select_map(scores, seed, control)
    assert under.chosen == plain.chosen == int(scores.mean(0).argmax())
    # Marking every score with its map shows which map was read.
    which = select_map(
        scores, seed, torch.arange(3).double().expand(8, 3)
    ).held_out.long()
    torch.testing.assert_close(plain.held_out, scores[torch.arange(8), which])
    torch.testing.assert_close(under.held_out, control[torch.arange(8), which])
    assert math.isclose(
        under.same_pictures, control[:, plain.chosen].mean(), abs_tol=1e-12
    )
    assert math.isclose(
        under.each_picture,
        control[torch.arange(8), scores.argmax(1)].mean(),
        abs_tol=1e-12,
    )


# ---- maps without a model ----


def test_a_centre_blob_finds_what_is_in_the_centre() -> None:
    blob = centre_blob((8, 8))
    assert float(blob.max()) == float(blob[3, 4])
    torch.testing.assert_close(blob, blob.flip(0))
    torch.testing.assert_close(blob, blob.mT)
    mask = torch.zeros(1, 8, 8, dtype=torch.bool)
    mask[:, 2:6, 2:6] = True
    assert float(area_under_curve(blob[None, None], mask)) > 0.95
    with pytest.raises(ValueError, match="width"):
        centre_blob((8, 8), 0.0)


def test_random_maps_know_nothing_and_are_maps() -> None:
    maps = random_maps(100, 4, (8, 8), torch.Generator().manual_seed(0))
    torch.testing.assert_close(maps.sum((-2, -1)), torch.ones(100, 4))
    mask = torch.zeros(100, 8, 8, dtype=torch.bool)
    mask[:, 2:5, 3:7] = True
    assert abs(float(area_under_curve(maps, mask).mean()) - 0.5) < 0.05
    # Blurred: neighbours are alike.
    logs = maps.log() - maps.log().mean((-2, -1), keepdim=True)
    assert float((logs[..., 1:] * logs[..., :-1]).mean() / logs.square().mean()) > 0.5


def test_pixel_contrast_marks_the_patch_that_differs() -> None:
    images = torch.full((1, 3, 16, 16), 0.5)
    images[..., 4:8, 8:12] = 1.0
    maps = patch_contrast(patchify(images, 4), (4, 4))
    assert maps.shape == (1, 2, 4, 4)
    assert int(maps[0, 0].argmax()) == 1 * 4 + 2
    assert float(maps[0, 1].max()) < 1e-6  # every patch is flat
    assert float(pointing_game(maps[:, :1], images[:, 0, ::4, ::4] > 0.9)) == 1


# ---- composites ----


@pytest.mark.parametrize("place", ["anywhere", "centre"])
def test_composites_differ_from_their_background_on_the_object_only(place: str) -> None:
    made = composites(20, seed=1, size=32, place=place)
    differs = (made.images != made.background).any(1)
    assert not (differs & ~made.mask).any()
    assert (differs & made.mask).sum() > 0.95 * made.mask.sum()
    share = made.mask.float().mean((1, 2))
    assert 0.02 < float(share.min()) < float(share.max()) < 0.25
    assert made.images.amin() >= 0
    assert made.images.amax() <= 1
    np.testing.assert_array_equal(made.is_disc.numpy(), np.arange(20) % 2 == 1)
    if place == "centre":
        places = torch.arange(32) + 0.5
        for disc in made.mask[made.is_disc].float():
            middle = (
                (disc.sum(0) @ places) / disc.sum(),
                (disc.sum(1) @ places) / disc.sum(),
            )
            assert max(abs(float(m) - 16) for m in middle) <= 0.5


def test_composites_are_a_function_of_the_seed_and_cover_the_picture() -> None:
    one, same, other = composites(6, 4), composites(6, 4), composites(6, 5)
    torch.testing.assert_close(one.images, same.images, rtol=0, atol=0)
    assert not torch.equal(one.images, other.images)
    where = composites(100, 0).mask.float().mean(0)
    # anywhere is anywhere
    assert (
        float(where.unflatten(0, (4, 8)).unflatten(2, (4, 8)).mean((1, 3)).min()) > 0.01
    )
    assert composites(2, 0, size=64).images.shape == (2, 3, 64, 64)


def test_digits_alone_are_bright_where_their_mask_says() -> None:
    made = digit_pictures(12, seed=0, size=32)
    inside, outside = (made.images[:, 0][m].mean() for m in (made.mask, ~made.mask))
    assert float(inside) > 0.6
    assert float(outside) < 0.15
    assert not torch.equal(made.images[0], made.images[1])
    assert all(photo.shape == (3, 427, 640) for photo in photographs())


@pytest.mark.bad_input
def test_composites_say_what_they_do_not_take() -> None:
    for function in (composites, digit_pictures):
        with pytest.raises(ValueError, match="count"):
            function(0)
        with pytest.raises(ValueError, match="size"):
            function(1, size=8)
    with pytest.raises(ValueError, match="place"):
        composites(1, place="left")
