r"""A picture brought to a model's size, channels and type, whole or as a random crop.

A random crop is a function of a key alone.  With uniform numbers :math:`u_1, u_2,
\dots` in [0, 1) that a mixing function draws from it, the crop of a picture of W by H
pixels has

.. math:: \text{area} = WH\,(s_0 + (s_1 - s_0)\, u_1), \qquad
          \text{width}/\text{height} = (4/3)^{2 u_2 - 1}, \qquad s = (0.2, 1),

and lies anywhere with equal chance; sizes that do not fit are drawn again, ten times.

Book: :ref:`ch-pretraining`.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as transforms

from crate_core.data.pictures import Augmentation, Picture

Size = tuple[int, int]

CROP_SCALE = (0.2, 1.0)
"""Area of a random crop, as a share of the picture: MAE's pretraining."""

CROP_RATIO = 4 / 3
"""Widest random crop, width over height; the tallest is one over it."""

BLURRED, SOLARIZED = 0.1, 0.2
"""Chances of blur and of solarisation."""

ATTEMPTS = 10
"""Draws of a crop's size before the middle of the picture is taken."""

WORD = 2**64 - 1


def mixed(number: int) -> int:
    """64 well-mixed bits of an integer: the output function of SplitMix64 (Steele, Lea
    and Flood, 2014).
    """
    z = number & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


def uniforms(key: int) -> Iterator[float]:
    """Endless uniform numbers in [0, 1), a function of ``key``: SplitMix64.  A
    generator object of numpy or torch costs more to seed than a small picture to crop.
    """
    state = mixed(key)
    while True:
        state = (state + 0x9E3779B97F4A7C15) & WORD
        yield (mixed(state) >> 11) * 2.0**-53


def crop_box(
    width: int, height: int, draws: Iterator[float]
) -> tuple[int, int, int, int]:
    """A random crop (left, top, right, bottom) of a picture, by the formula of the
    module.

    Book: :ref:`ch-pretraining`.  The distribution of torchvision's RandomResizedCrop,
    which MAE uses.
    """
    low, high = CROP_SCALE
    for _ in range(ATTEMPTS):
        area = width * height * (low + (high - low) * next(draws))
        ratio = CROP_RATIO ** (2 * next(draws) - 1)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = (
                int(next(draws) * (width - w + 1)),
                int(next(draws) * (height - h + 1)),
            )
            return left, top, left + w, top + h
    w, h = (
        min(width, round(height * CROP_RATIO)),
        min(height, round(width * CROP_RATIO)),
    )
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def in_mode(picture: Picture, channels: int) -> Picture:
    """A PIL picture in the mode that has this many channels; tensors pass.
    ``ValueError`` unless 1 or 3.
    """
    if isinstance(picture, Tensor):
        return picture
    if channels not in (1, 3):
        raise ValueError(
            "image files are read as grey (1 channel) or colour (3), the model "
            f"has {channels}"
        )
    mode = "L" if channels == 1 else "RGB"
    return picture if picture.mode == mode else picture.convert(mode)


def raw_tensor(picture: Picture, channels: int) -> Tensor:
    """A picture as a tensor (C, H, W), grey for one channel and colour for three: bytes
    of a PIL picture that :func:`in_mode` prepared, floats in [0, 1] of a tensor.

    Raises ``ValueError`` for other channel counts, unless the picture is a tensor that
    has just as many.
    """
    if not isinstance(picture, Tensor):
        pixels = torch.from_numpy(np.array(picture))
        return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    if len(picture) == channels:
        return picture
    if len(picture) == 1 and channels == 3:
        return picture.expand(3, -1, -1)
    if len(picture) == 3 and channels == 1:
        return transforms.rgb_to_grayscale(picture)
    raise ValueError(
        f"pictures of {len(picture)} channels do not fit a model of {channels}"
    )


def to_tensor(picture: Picture, channels: int) -> Tensor:
    """A picture as a float tensor (C, H, W) in [0, 1]; see :func:`raw_tensor`."""
    pixels = raw_tensor(in_mode(picture, channels), channels)
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels


def fit(picture: Picture, size: Size) -> Picture:
    """Resize so that the picture just covers ``size`` (height, width), bicubic, and cut
    the centre.
    """
    width, height = transforms.get_image_size(picture)
    if (height, width) == size:
        return picture
    resized = transforms.resize(
        picture, covering_size(picture, size), InterpolationMode.BICUBIC, antialias=True
    )
    return transforms.center_crop(resized, list(size))


def prepare(picture: Picture, size: Size, channels: int) -> Tensor:
    """What evaluation sees: :func:`fit`, then a tensor (channels, height, width) in [0,
    1].
    """
    return to_tensor(fit(in_mode(picture, channels), size), channels).clamp(0, 1)


def crop_flip(picture: Picture, size: Size, key: int) -> Picture:
    """:func:`crop_box` brought to ``size`` (height, width), bicubic, and flipped from
    left to right half the time: a function of ``key`` alone.
    """
    draws = uniforms(key)
    flipped = next(draws) < 0.5
    width, height = transforms.get_image_size(picture)
    left, top, right, bottom = crop_box(width, height, draws)
    if isinstance(picture, Tensor):
        cropped = transforms.resized_crop(
            picture,
            top,
            left,
            bottom - top,
            right - left,
            list(size),
            InterpolationMode.BICUBIC,
            antialias=True,
        )
        return transforms.hflip(cropped) if flipped else cropped
    resized = picture.crop((left, top, right, bottom)).resize(
        size[::-1], Image.Resampling.BICUBIC
    )
    return resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else resized


def covering_size(picture: Picture, size: Size) -> list[int]:
    """Height and width at which a picture just covers ``size``, its shape kept."""
    width, height = transforms.get_image_size(picture)
    scale = max(size[0] / height, size[1] / width)
    return [max(size[0], round(height * scale)), max(size[1], round(width * scale))]


def crop_blur_solarize(picture: Picture, size: Size, key: int) -> Picture:
    r"""A picture that covers 8/7 of ``size`` (height, width), a crop of ``size``
    anywhere in it, flipped half the time; blurred with chance 0.1, by a Gaussian of
    standard deviation 0.1 to 2 pixels, and solarised with chance 0.2 (pixels of at
    least one half are inverted).  A function of ``key`` alone.

    Book: :ref:`ch-pretraining`.  The authors name resizing to 256, crops of 224, flips,
    blur and solarisation; the chances are those of DINO's second view.
    """
    flip, down, right, blur, deviation, solar = (
        draw for draw, _ in zip(uniforms(key), range(6), strict=False)
    )
    larger = (round(size[0] * 8 / 7), round(size[1] * 8 / 7))
    resized = transforms.resize(
        picture,
        covering_size(picture, larger),
        InterpolationMode.BICUBIC,
        antialias=True,
    )
    width, height = transforms.get_image_size(resized)
    top = int(down * (height - size[0] + 1))
    left = int(right * (width - size[1] + 1))
    shown = transforms.crop(resized, top, left, size[0], size[1])
    if flip < 0.5:
        shown = transforms.hflip(shown)
    if blur < BLURRED:
        sigma = 0.1 + 1.9 * deviation
        reach = min(math.ceil(3 * sigma), (min(size) - 1) // 2)
        if reach:
            shown = transforms.gaussian_blur(shown, 2 * reach + 1, sigma)
    if solar < SOLARIZED:
        bytes_ = not isinstance(shown, Tensor) or shown.dtype == torch.uint8
        shown = transforms.solarize(shown, 128 if bytes_ else 0.5)
    return shown


def augment(
    picture: Picture, size: Size, augmentation: Augmentation, key: int
) -> Picture:
    """A picture brought to ``size`` (height, width) under a named augmentation: a
    function of ``key`` alone.
    """
    if augmentation == "none":
        return fit(picture, size)
    if augmentation == "crop_flip":
        return crop_flip(picture, size, key)
    return crop_blur_solarize(picture, size, key)
