r"""Pictures whose object is known exactly: a digit or a disc pasted on a photograph,
and digits alone.

Made from what scikit-learn ships (two photographs, handwritten digits), the same for
the same seed.

Book: :ref:`ch-tokens-heads`.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crate_core.data.photographs import photographs
from crate_core.data.sources import all_digits
from crate_core.shapes import Images, ObjectMask

PLACES = ("anywhere", "centre")
"""Where an object can be pasted."""

BRIGHT = 0.4
"""Value in [0, 1] above which a pixel of a digit belongs to it."""


@dataclass(frozen=True)
class Composites:
    """``images`` (B, 3, S, S) in [0, 1]; ``mask`` (B, S, S), true on the object;
    ``is_disc`` (B,), false for digits; ``background`` (B, 3, S, S), the picture without
    its object.
    """

    images: Images
    mask: ObjectMask
    is_disc: Tensor
    background: Images


def composites(
    count: int,
    seed: int = 0,
    size: int = 32,
    place: Literal["anywhere", "centre"] = "anywhere",
) -> Composites:
    """Crops of the photographs with an object pasted on, half of them digits, half
    discs.

    A digit has one random colour; a disc is filled with a crop of the *other*
    photograph, so that neither colour nor brightness gives every object away.  An
    object's box has 0.3 to 0.5 of the picture's side and lies wholly in it.

    Parameters
    ----------
    count : number of pictures, at least 1.
    seed : of everything that is random.
    size : side of the pictures in pixels, at least 16.
    place : "anywhere", or "centre" for objects in the middle, where a blob needs no
        eyes.

    Raises
    ------
    ValueError
        For a count, size or place that is not accepted.

    Book: :ref:`ch-tokens-heads`.
    """
    check_count(count, size)
    if place not in PLACES:
        raise ValueError(f"place must be one of {PLACES}, got {place!r}")
    digits = all_digits().images[:, 0]
    photos = photographs()
    generator = np.random.default_rng(seed)
    images, masks, discs, backgrounds = [], [], [], []
    for index in range(count):
        which = int(generator.integers(len(photos)))
        background = random_crop(photos[which], size, generator)
        side = int(generator.integers(round(0.3 * size), round(0.5 * size) + 1))
        is_disc = index % 2 == 1
        if is_disc:
            shape = disc(side)
            paint = random_crop(photos[1 - which], side, generator)
        else:
            shape = (
                scaled_up(digits[int(generator.integers(len(digits)))], side) > BRIGHT
            )
            paint = (
                torch.from_numpy(generator.random(3))
                .float()[:, None, None]
                .expand(3, side, side)
            )
        free = size - side
        top, left = (
            generator.integers(free + 1, size=2)
            if place == "anywhere"
            else (free // 2, free // 2)
        )
        window = (slice(int(top), int(top) + side), slice(int(left), int(left) + side))
        mask = torch.zeros(size, size, dtype=torch.bool)
        mask[window] = shape
        painted = background.clone()
        painted[(slice(None), *window)] = paint
        images.append(torch.where(mask, painted, background))
        masks.append(mask)
        discs.append(is_disc)
        backgrounds.append(background)
    return Composites(
        torch.stack(images),
        torch.stack(masks),
        torch.tensor(discs),
        torch.stack(backgrounds),
    )


def digit_pictures(count: int, seed: int = 0, size: int = 32) -> Composites:
    """Handwritten digits alone, white on black as in scikit-learn, scaled up smoothly;
    the mask is where they are bright.  Raises ``ValueError`` for a count or size that
    :func:`composites` does not take.

    Book: :ref:`ch-tokens-heads`.
    """
    check_count(count, size)
    digits = all_digits().images[:, 0]
    chosen = np.random.default_rng(seed).choice(
        len(digits), count, replace=count > len(digits)
    )
    grey = torch.stack([scaled_up(digits[i], size) for i in chosen])
    images = grey.clamp(0, 1)[:, None].expand(-1, 3, -1, -1).clone()
    return Composites(
        images,
        grey > BRIGHT,
        torch.zeros(count, dtype=torch.bool),
        torch.zeros_like(images),
    )


def check_count(count: int, size: int) -> None:
    """``ValueError`` unless there is a picture to make, large enough to
    hold an object.
    """
    if count < 1 or size < 16:
        raise ValueError(
            f"composites need count >= 1 and size >= 16, got {count} and {size}"
        )


def random_crop(photo: Tensor, size: int, generator: np.random.Generator) -> Tensor:
    """A square crop (3, size, size) of a photograph, of a random part of 2 to 6 times
    the size where it fits, scaled down by averaging.
    """
    height, width = photo.shape[-2:]
    side = min(round(size * generator.uniform(2, 6)), height, width)
    top, left = (
        int(generator.integers(height - side + 1)),
        int(generator.integers(width - side + 1)),
    )
    part = photo[None, :, top : top + side, left : left + side]
    return F.interpolate(
        part, size=(size, size), mode="bilinear", antialias=True, align_corners=False
    )[0].clamp(0, 1)


def disc(side: int) -> Tensor:
    """A filled circle (side, side)."""
    x = (torch.arange(side) + 0.5) / side - 0.5
    return x[:, None].square() + x.square() <= 0.25


def scaled_up(digit: Tensor, side: int) -> Tensor:
    """A digit (8, 8) scaled up smoothly to (side, side)."""
    return F.interpolate(
        digit[None, None], size=(side, side), mode="bicubic", align_corners=False
    )[0, 0]
