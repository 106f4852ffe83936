"""Random crops of a fixed size, flips, blur and solarisation: functions of a key with
the chances that they say.
"""

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional

from crate_core.data.batches import TrainingPictures
from crate_core.data.sources import ArrayImages
from crate_core.data.transforms import (
    BLURRED,
    SOLARIZED,
    augment,
    crop_blur_solarize,
    to_tensor,
)

KEYS = range(600)


def near(share: float, chance: float) -> bool:
    """Whether a share over the keys is within four standard deviations of a chance."""
    return abs(share - chance) < 4 * math.sqrt(chance * (1 - chance) / len(KEYS))


@given(
    height=st.integers(3, 40),
    width=st.integers(3, 40),
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    channels=st.sampled_from([1, 3]),
    key=st.integers(0, 2**40),
    name=st.sampled_from(["none", "crop_flip", "crop_blur_solarize"]),
)
def test_every_augmentation_gives_the_size_from_any_picture(
    height: int, width: int, rows: int, columns: int, channels: int, key: int, name: str
) -> None:
    pixels = np.random.default_rng(key).integers(0, 256, (height, width, 3), np.uint8)
    picture = Image.fromarray(pixels).convert("RGB" if channels == 3 else "L")
    tensor = to_tensor(picture, channels)
    for given_picture in (picture, tensor):
        shown = augment(given_picture, (rows, columns), name, key)
        assert to_tensor(shown, channels).shape == (channels, rows, columns)
        again = augment(given_picture, (rows, columns), name, key)
        assert torch.equal(to_tensor(shown, channels), to_tensor(again, channels))


def test_solarisation_inverts_bright_pixels_of_a_fifth() -> None:
    # Neither crop nor flip nor blur changes a picture of one colour.
    for value, inverted in ((200, 55), (60, 60)):
        flat = Image.new("L", (40, 30), value)
        seen = [
            int(np.array(crop_blur_solarize(flat, (14, 14), k))[3, 4]) for k in KEYS
        ]
        assert set(seen) == {value, inverted}
        share = sum(pixel == inverted for pixel in seen) / len(KEYS)
        assert inverted == value or near(share, SOLARIZED)


def test_flips_crops_and_blur_have_their_chances() -> None:
    # A ramp below one half, which solarisation leaves alone: its direction tells the
    # flip, its smallest value where the crop lies; a line on it tells the blur.
    size, larger = 21, 24
    ramp = torch.linspace(0.1, 0.4, larger).expand(1, larger, larger)
    shown = [crop_blur_solarize(ramp, (size, size), key) for key in KEYS]
    flipped = [bool(picture[0, 0, 0] > picture[0, 0, -1]) for picture in shown]
    assert near(sum(flipped) / len(KEYS), 0.5)
    column = ramp[0, 0]
    # blur bends the ramp at its ends
    sharp = [p for p in shown if p[0, 0].diff().std() < 1e-5]
    places = {int((column - p[0, size // 2].min()).abs().argmin()) for p in sharp}
    assert places == set(range(larger - size + 1))
    lined = torch.zeros(1, larger, larger)
    lined[:, larger // 2] = 0.4
    peaks = [float(crop_blur_solarize(lined, (size, size), k).max()) for k in KEYS]
    share = sum(peak < 0.399 for peak in peaks) / len(KEYS)
    # Of the blurs those below 0.3 pixels are not seen.
    assert near(share, BLURRED * (2 - 0.3) / 1.9)


def test_a_larger_picture_is_brought_to_eight_sevenths_before_the_crop() -> None:
    # Without blur and solarisation the crop is one of the resized picture.
    pixels = np.random.default_rng(0).integers(0, 120, (300, 450, 3), np.uint8)
    picture = Image.fromarray(pixels)
    resized = functional.resize(
        picture, [256, 384], functional.InterpolationMode.BICUBIC, antialias=True
    )
    whole = np.array(resized).astype(int)
    found = 0
    for key in range(6):
        shown = np.array(crop_blur_solarize(picture, (224, 224), key)).astype(int)
        for candidate in (shown, shown[:, ::-1]):
            places = [
                (top, left)
                for top in range(33)
                for left in range(161)
                if (whole[top, left : left + 9] == candidate[0, :9]).all()
            ]
            found += any(
                (whole[t : t + 224, c : c + 224] == candidate).all() for t, c in places
            )
    assert found >= 4


def test_training_batches_take_it() -> None:
    source = ArrayImages(torch.rand(5, 3, 12, 12), None)
    batches = TrainingPictures(source, (8, 8), 3, "crop_blur_solarize", 0)
    items = [(epoch, index) for epoch in range(8) for index in range(5)]
    images = batches.__getitems__(items).images
    assert images.shape == (40, 3, 8, 8)
    assert torch.equal(images, batches.__getitems__(items).images)
    assert not torch.equal(images[:5], images[5:10])
    assert 0 <= images.min() <= images.max() <= 1
