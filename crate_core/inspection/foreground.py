r"""Do maps find the object?  Scores of maps against masks, and the choice of a head
that does not fool itself.

Book: :ref:`ch-tokens-heads`.
"""

import math
from dataclasses import dataclass

import torch
from scipy.stats import rankdata
from torch import Tensor

from crate_core.shapes import HeadMaps, ObjectMaps, ObjectMask, PerMap, Scalars

ATTENTION_MASS = 0.6
"""Share of a map's mass that its thresholded mask keeps, as in the usual figures of
attention maps.
"""


def keep_mass(maps: HeadMaps, share: float = ATTENTION_MASS) -> ObjectMaps:
    r"""The smallest set of places that holds at least ``share`` of a map's mass,

    .. math:: \{j : a_j \ge \tau\}, \qquad \tau = \max\Big\{\tau : \sum_{a_j \ge \tau}
              a_j \ge
              \text{share} \cdot \sum_j a_j\Big\}.

    Equal values are kept or left together, so a map that is the same everywhere keeps
    everything.

    Parameters
    ----------
    maps : (B, K, h, w), not negative.
    share : in (0, 1].

    Raises
    ------
    ValueError
        For negative maps or a share out of range.

    Book: :ref:`ch-tokens-heads`.  The rule of :cite:t:`caron2021emerging`, with ties
    kept together.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    if not bool((maps >= 0).all()):
        raise ValueError("maps must be >= 0 to have a mass")
    # float64 lies on the CPU: not every device has it
    flat = maps.cpu().double().flatten(-2)
    ordered = flat.sort(dim=-1, descending=True).values
    held = ordered.cumsum(-1)
    enough = held >= share * held[..., -1:] * (1 - 1e-12)
    first = enough.to(torch.int8).argmax(-1, keepdim=True)
    return (flat >= ordered.gather(-1, first)).reshape(maps.shape)


def intersection_over_union(predicted: ObjectMaps, mask: ObjectMask) -> PerMap:
    r"""Overlap of predicted masks (B, K, h, w) and the true one (B, h, w), :math:`|A
    \cap B| / |A \cup B|`; 1 where both are empty.  Book: :ref:`ch-tokens-heads`.
    """
    predicted, true = predicted.cpu(), mask.cpu()[:, None]
    common = (predicted & true).sum((-2, -1)).double()
    union = (predicted | true).sum((-2, -1)).double()
    return torch.where(union > 0, common / union.clamp_min(1), 1.0)


def pointing_game(maps: HeadMaps, mask: ObjectMask) -> PerMap:
    """Is the map's highest place on the object?  1 or 0, and the share of the highest
    places that are on it in case of a tie.  Book: :ref:`ch-tokens-heads`.
    """
    maps, mask = maps.cpu(), mask.cpu()
    highest = maps == maps.amax((-2, -1), keepdim=True)
    return (highest & mask[:, None]).sum((-2, -1)).double() / highest.sum(
        (-2, -1)
    ).double()


def area_under_curve(maps: HeadMaps, mask: ObjectMask) -> PerMap:
    r"""Probability that a place on the object has a higher value than one beside it,
    equal values counting half,

    .. math:: P(a_i > a_j) + \tfrac12 P(a_i = a_j), \qquad i \in \text{object},\ j
              \notin \text{object}.

    The area under the ROC curve: no threshold, and 0.5 by chance whatever the size of
    the object.  Not a number where a mask is empty or full.  Book:
    :ref:`ch-tokens-heads`.
    """
    batch, heads = maps.shape[:2]
    maps, mask = maps.cpu(), mask.cpu()
    flat = maps.double().flatten(2).flatten(0, 1)
    inside = mask.flatten(1).repeat_interleave(heads, 0)
    # counted from 1, equal values sharing their mean rank
    ranks = torch.from_numpy(rankdata(flat.numpy(), axis=-1))
    rank_sum = (ranks * inside).sum(-1)
    positive = inside.sum(-1).double()
    negative = inside.shape[-1] - positive
    return ((rank_sum - positive * (positive + 1) / 2) / (positive * negative)).reshape(
        batch, heads
    )


@dataclass(frozen=True)
class ForegroundScores:
    """Scores (B, K) of maps against masks, in [0, 1]: ``iou`` of the thresholded map,
    ``pointing``, ``auc``.
    """

    iou: PerMap
    pointing: PerMap
    auc: PerMap


def foreground_scores(
    maps: HeadMaps, mask: ObjectMask, share: float = ATTENTION_MASS
) -> ForegroundScores:
    """Three scores of each map (B, K, h, w) against a mask (B, h, w) on the same grid.

    Raises ``ValueError`` for maps and masks of different size, negative maps, or a
    share out of range.

    Book: :ref:`ch-tokens-heads`.
    """
    if maps.shape[:1] + maps.shape[2:] != mask.shape:
        raise ValueError(
            f"maps {tuple(maps.shape)} and masks {tuple(mask.shape)} must "
            "agree in all but the heads"
        )
    return ForegroundScores(
        intersection_over_union(keep_mass(maps, share), mask),
        pointing_game(maps, mask),
        area_under_curve(maps, mask),
    )


# ---- choosing a map ----


@dataclass(frozen=True)
class Selection:
    """Mean score of the best of K maps, by where it was chosen.

    ``held_out``: chosen on one half of the pictures, scored on the other, both ways,
    (B,) one a picture; ``same_pictures``: chosen and scored on all pictures;
    ``each_picture``: chosen anew for every picture, which needs the answer; ``mean``:
    of all maps; ``chosen``: the map chosen on all pictures.
    """

    held_out: Scalars
    same_pictures: float
    each_picture: float
    mean: float
    chosen: int


def select_map(
    scores: PerMap, seed: int = 0, control: PerMap | None = None
) -> Selection:
    """The best of K maps by mean score over pictures, and what choosing it adds by
    itself.

    The maximum of K noisy means is above the best mean: a score on the pictures on
    which the map was chosen is too high, and one chosen for every picture higher still,
    also for maps that know nothing.

    Parameters
    ----------
    scores : (B, K), at least two pictures.
    seed : of the split into halves.
    control : (B, K), scores of the same K maps on other pictures (the object erased,
        say).  Maps are then chosen by ``scores``, and all that is returned is what the
        chosen ones score in ``control``.

    Raises
    ------
    ValueError
        With fewer than two pictures, or a control of another shape.

    Book: :ref:`ch-tokens-heads`.
    """
    batch = len(scores)
    if batch < 2:
        raise ValueError(
            "choosing on one half and scoring on the other takes two pictures at least"
        )
    reported = scores if control is None else control
    if reported.shape != scores.shape:
        raise ValueError(
            f"control must be {tuple(scores.shape)} like the scores, got "
            f"{tuple(reported.shape)}"
        )
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    halves = order[: batch // 2], order[batch // 2 :]
    held_out = torch.empty_like(scores[:, 0])
    for choosing, scoring in (halves, halves[::-1]):
        held_out[scoring] = reported[scoring, int(scores[choosing].mean(0).argmax())]
    chosen = int(scores.mean(0).argmax())
    of_each_picture = reported.gather(1, scores.argmax(1, keepdim=True))
    return Selection(
        held_out,
        float(reported[:, chosen].mean()),
        float(of_each_picture.mean()),
        float(reported.mean()),
        chosen,
    )


# ---- maps that need no trained model ----


def centre_blob(size: tuple[int, int], width: float = 0.25) -> Tensor:
    """A Gaussian bump (h, w) in the middle; ``width`` is its standard deviation as a
    share of each side, > 0.

    Raises ``ValueError`` for a width that is not positive.  Book:
    :ref:`ch-tokens-heads`.
    """
    if not width > 0:
        raise ValueError(f"width must be positive, got {width}")
    rows, columns = ((torch.arange(n) + 0.5) / n - 0.5 for n in size)
    return torch.exp(-(rows[:, None].square() + columns.square()) / (2 * width**2))


def random_maps(
    batch: int,
    heads: int,
    size: tuple[int, int],
    generator: torch.Generator,
    smoothness: float = 1.0,
) -> HeadMaps:
    """Maps that know nothing: positive, blurred noise (B, K, h, w), summing to 1.

    ``smoothness`` is the width of the blur in patches, > 0.  Book:
    :ref:`ch-tokens-heads`.
    """
    noise = torch.randn(batch, heads, *size, generator=generator)
    for axis in (-2, -1):
        places = torch.arange(size[axis])
        kernel = torch.exp(-((places[:, None] - places) / smoothness).square() / 2)
        noise = (
            noise.movedim(axis, -1) @ (kernel / kernel.square().sum(0).sqrt())
        ).movedim(-1, axis)
    return torch.softmax(math.sqrt(2) * noise.flatten(-2), -1).reshape(noise.shape)


def patch_contrast(patches: Tensor, grid: tuple[int, int]) -> HeadMaps:
    r"""What pixels say without a model: the distance :math:`\|x_j - \bar x\|` of each
    patch from the picture's mean patch, and the deviation of pixels inside each patch,
    as two maps (B, 2, h, w) from patches (B, L, m).

    Book: :ref:`ch-tokens-heads`.
    """
    distance = (patches - patches.mean(1, keepdim=True)).norm(dim=-1)
    return torch.stack([distance, patches.std(-1)], 1).unflatten(-1, grid)
