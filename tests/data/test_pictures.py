"""A picture is read as a viewer shows it, whatever its format and mode, or refused."""

import io
import itertools
import struct
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, features

from crate_core.data.pictures import (
    NOT_DECODED,
    TURNS,
    DarkPictureWarning,
    UnreadableImageError,
    as_shown,
    formats,
    image_extensions,
    open_picture,
)
from crate_core.data.sources import ImageSource

WITH_EXIF = [
    name
    for name in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF", "MPO")
    if name not in ("WEBP", "AVIF") or features.check(name.lower())
]
INVERSE = {
    Image.Transpose.ROTATE_90: Image.Transpose.ROTATE_270,
    Image.Transpose.ROTATE_270: Image.Transpose.ROTATE_90,
}


def scene(seed: int = 0, size: tuple[int, int] = (48, 32)) -> Image.Image:
    """Smooth, and different after every turn and flip."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    rise = np.random.default_rng(seed).uniform(0.5, 1, 3)
    pixels = np.stack([220 * x * rise[0], 220 * y * rise[1], 90 * x * y + 40], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: object) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return io.BytesIO(file.getvalue())


class OneFile(ImageSource):
    def __init__(self, data: bytes) -> None:
        self.data = data

    def __len__(self) -> int:
        return 1

    def name(self, index: int) -> str:
        return f"the file {index}"

    def decode(self, index: int) -> Image.Image:
        return open_picture(io.BytesIO(self.data))


def distance(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one, float) - np.asarray(other, float)).mean())


@pytest.mark.parametrize(
    ("kind", "orientation"), list(itertools.product(WITH_EXIF, range(1, 9)))
)
def test_every_orientation_of_every_format_comes_upright(
    kind: str, orientation: int
) -> None:
    turn = TURNS.get(orientation)
    lying = scene() if turn is None else scene().transpose(INVERSE.get(turn, turn))
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95} if kind in ("JPEG", "WEBP", "AVIF", "MPO") else {}
    read = open_picture(saved(lying, kind, exif=exif, **options))
    assert read.size == scene().size
    assert distance(read, scene()) < 4
    for other in TURNS.values():
        turned = scene().transpose(other)
        assert turned.size != read.size or distance(read, turned) > 10


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@given(exif=st.binary(max_size=60), head=st.booleans())
def test_damaged_exif_turns_nothing_and_hides_no_picture(
    exif: bytes, head: bool
) -> None:
    # a file may say orientation 6 by chance; only sizes that swap would tell
    data = b"Exif\0\0" + (b"II*\0\x08\0\0\0" if head else b"") + exif
    read = open_picture(saved(scene(size=(16, 16)), "JPEG", exif=data))
    assert read.size == (16, 16)


@pytest.mark.parametrize("value", [0, 9, 2**16 - 1, b"6", (6, 6), "6", 6.5])
def test_an_orientation_that_is_none_turns_nothing(value: object) -> None:
    image = scene()
    exif = image.getexif()
    exif[0x0112] = value
    assert as_shown(image).size == scene().size


@given(seed=st.integers(0, 20), share=st.floats(0.02, 0.98))
def test_transparent_pictures_are_laid_on_white(seed: int, share: float) -> None:
    image = scene(seed)
    alpha = round(255 * share)
    image.putalpha(alpha)
    expected = np.asarray(scene(seed), float) * alpha / 255 + (255 - alpha)
    shown = np.asarray(as_shown(image), float)
    np.testing.assert_allclose(shown, expected, atol=1.01)
    assert as_shown(Image.new("LA", (2, 2), (0, 0))).getpixel((0, 0)) == 255
    palette = scene(seed).convert("P")
    palette.info["transparency"] = bytes(256)
    assert np.asarray(as_shown(palette)).min() == 255
    grey = scene(seed).convert("L")
    grey.info["transparency"] = grey.getpixel((0, 0))
    assert as_shown(grey).getpixel((0, 0)) == 255


def test_lab_pictures_look_as_their_colours() -> None:
    lab = ImageCms.applyTransform(
        scene(),
        ImageCms.buildTransform(
            ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"
        ),
    )
    read = open_picture(saved(lab, "TIFF"))
    assert read.mode == "RGB"
    assert distance(read, scene()) < 4


MODES = ["1", "L", "P", "LA", "PA", "La", "RGB", "RGBA", "RGBa", "RGBX", "CMYK"]
MODES += ["YCbCr", "HSV", "LAB"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_comes_as_grey_or_colour_of_bytes(mode: str) -> None:
    shown = as_shown(Image.new(mode, (5, 4)))
    assert shown.mode in ("L", "RGB")
    assert shown.size == (5, 4)


grey = scene().convert("L")
WIDE = np.asarray(grey, np.float64)


@pytest.mark.parametrize(
    "values",
    [
        WIDE.astype(np.float32) / 255,
        WIDE.astype(np.float32),
        (WIDE * 257).astype(np.uint16),
        np.zeros((4, 5), np.uint16),
        np.zeros((4, 5), np.float32),
    ],
    ids=["float 0 to 1", "float 0 to 255", "16 bits", "black", "black floats"],
)
def test_grey_of_many_bits_whose_range_is_known(values: np.ndarray) -> None:
    read = open_picture(saved(Image.fromarray(values), "TIFF"))
    expected = WIDE if values.any() else np.zeros(values.shape)
    np.testing.assert_allclose(np.asarray(read, float), expected, atol=0.51)


@given(
    kind=st.sampled_from(["f", "i", "h"]),
    low=st.floats(-1e4, 1e6),
    span=st.floats(0, 1e6),
)
def test_grey_of_many_bits_is_scaled_by_its_rule_or_refused(
    kind: str, low: float, span: float
) -> None:
    values = np.linspace(low, low + span, 12).reshape(3, 4)
    if kind == "h":
        values = values.clip(0, 65535)
    array = values.astype({"f": np.float32, "i": np.int32, "h": np.uint16}[kind])
    top, bottom = float(array.max()), float(array.min())
    white = {
        "i": None,
        "h": 65535.0,
        "f": 1.0
        if bottom >= 0 and top <= 1
        else (255.0 if bottom >= 0 and 16 <= top <= 255 else None),
    }[kind]
    image = Image.fromarray(array)
    if white is None:
        with pytest.raises(ValueError, match="cannot be told"):
            as_shown(image)
    else:
        np.testing.assert_allclose(
            np.asarray(as_shown(image), float), array * (255 / white), atol=0.51
        )


@given(top=st.integers(0, 65535))
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_that_stay_dark_are_read_with_a_word(kind: str, top: int) -> None:
    values = np.linspace(0, top, 12).astype(np.uint16).reshape(3, 4)
    file = OneFile(saved(Image.fromarray(values), kind).getvalue())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read, _ = (np.asarray(file.read(0), float) for _ in range(2))
    np.testing.assert_allclose(read, values / 257, atol=0.51)
    said = [str(w.message) for w in caught if w.category is DarkPictureWarning]
    # 8, 10, 12 and 14 bits in sixteen are among them; one word a source
    assert len(said) == (0 < top < 2**14)
    assert all("the file 0" in line and str(top) in line for line in said)


def test_a_picture_of_no_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be told"):
        as_shown(Image.fromarray(np.full((3, 3), np.nan, np.float32)))


def test_portable_grey_maps_say_their_white() -> None:
    file = b"P5 3 1 1000\n" + struct.pack(">3H", 0, 500, 1000)
    np.testing.assert_allclose(
        np.asarray(open_picture(io.BytesIO(file)))[0], [0, 127.5, 255], atol=0.51
    )


def test_postscript_is_not_run() -> None:
    assert not NOT_DECODED & set(formats())
    assert {".jpg", ".gif", ".avif", ".jfif", ".jp2", ".jpe"} <= set(image_extensions())
    assert not {".eps", ".ps", ".mpg", ".pdf"} & set(image_extensions())
    with pytest.raises(UnreadableImageError, match=r"the file 0"):
        OneFile(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").read(0)


KINDS = ["JPEG", "PNG", "GIF", "BMP", "TIFF", "PPM", "TGA", "ICO", "PCX", "SGI", "DDS"]
KINDS += [k for k in ("WEBP", "AVIF") if features.check(k.lower())]
KINDS += ["JPEG2000"] if features.check("jpg_2000") else []
ENCODED = {kind: saved(scene(size=(64, 64)), kind).getvalue() for kind in KINDS}


@given(
    kind=st.sampled_from(KINDS),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=12),
    cut=st.floats(0.05, 1),
)
def test_damage_is_read_or_named(
    kind: str, flips: list[tuple[float, int]], cut: float
) -> None:
    data = bytearray(ENCODED[kind])
    for place, byte in flips:
        data[min(int(place * len(data)), len(data) - 1)] = byte
    source = OneFile(bytes(data[: round(cut * len(data))]))
    read, failure = None, None
    try:
        read = source.read(0)
    except UnreadableImageError as error:
        failure = error
    if failure is None:
        assert read.mode in ("L", "RGB")
    else:
        assert failure.name == "the file 0"
        assert failure.reason


@given(error=st.sampled_from([RuntimeError, NotImplementedError, KeyError, TypeError]))
def test_whatever_a_decoder_raises_is_that_pictures(error: type[Exception]) -> None:
    class Raising(OneFile):
        def decode(self, index: int) -> Image.Image:
            raise error("by a plugin")

    with pytest.raises(UnreadableImageError, match=r"the file 0: .*by a plugin"):
        Raising(b"").read(0)


def test_what_is_said_of_an_unknown_format_is_the_same_each_time() -> None:
    said = set()
    for _ in range(3):
        with pytest.raises(UnreadableImageError) as caught:
            OneFile(b"no picture").read(0)
        said.add(str(caught.value))
    assert said == {"the file 0: no format that Pillow decodes here"}
