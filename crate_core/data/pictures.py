r"""One encoded picture as a viewer shows it: which formats, which way up, which range.

One rule for each kind, whatever file or table it comes from:

* **Formats**: all that the installed Pillow decodes by itself, told by content; of an
  animation the first frame.  PostScript, which runs a program, is not among them.
* **Orientation**: turned as EXIF says.  Damaged EXIF turns nothing.
* **Transparency**: laid on white.
* **CIELAB**: brought to sRGB.  Other modes are converted as Pillow does.
* **Sixteen-bit grey**: white is 65,535, as the formats have it.  One that stays below
  a quarter of that is dark, or holds 8 to 14 bits unscaled: it is read, with a
  :class:`DarkPictureWarning`.
* **Floating point**: white is 1 where all values lie in [0, 1], 255 where they lie in
  [0, 255] and the largest is at least 16.  Anything else is refused.
* **Thirty-two-bit integers**: refused, as nothing says what white is; PPM and PGM
  files say it.

What is refused is an unreadable picture, named and counted as a damaged one is.

Book: :ref:`ch-first-training`.
"""

import io
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError
from torch import Tensor

Augmentation = Literal["none", "crop_flip", "crop_blur_solarize"]
"""What happens to training pictures: nothing but bringing them to the model's size; a
random resized crop and a horizontal flip; or a crop of a fixed size, a flip, and now
and then blur and solarisation.
"""

Picture = Image.Image | Tensor

NOT_DECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
"""What Pillow recognises and does not decode by itself: it needs a handler, another
system, or (EPS) runs a program on the file.
"""

SIXTEEN_BITS = 65535
"""White of sixteen-bit grey."""

DARK = SIXTEEN_BITS // 4
"""Sixteen-bit grey that reaches no higher (14 bits) is read with a word."""

DOUBT = "crate_core.doubt"
"""Where a decoded picture's ``info`` says why its range is doubtful."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture of each EXIF orientation upright."""


class UnreadableImageError(ValueError):
    """A picture that cannot be decoded; ``name`` says which, ``reason`` what the
    decoder said.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        return type(self), (self.name, self.reason)


class DarkPictureWarning(UserWarning):
    """A sixteen-bit picture that is dark, or was not scaled to sixteen bits."""


@lru_cache(maxsize=1)
def formats() -> tuple[str, ...]:
    """Names of the formats that are read, as Pillow spells them."""
    Image.init()
    return tuple(sorted(set(Image.OPEN) - NOT_DECODED))


@lru_cache(maxsize=1)
def image_extensions() -> tuple[str, ...]:
    """Endings of file names that count as images, in lower case, sorted."""
    known = Image.registered_extensions()
    return tuple(sorted(end for end, kind in known.items() if kind in formats()))


def open_picture(file: str | Path | io.BytesIO) -> Image.Image:
    """Decode a picture whole, as :func:`as_shown`.

    Raises whatever Pillow's decoders raise, which is no short list: callers go through
    :meth:`crate_core.data.sources.ImageSource.read`.
    """
    try:
        opened = Image.open(file, formats=formats())
    except UnidentifiedImageError as error:
        # Pillow names the file, or the place in memory where its bytes were
        raise UnidentifiedImageError("no format that Pillow decodes here") from error
    with opened as image:
        image.load()
        return as_shown(image)


def as_shown(image: Image.Image) -> Image.Image:
    """A decoded picture upright, in mode L or RGB, by the rules of this module.

    Raises ``ValueError`` where the rules refuse or Pillow cannot convert.
    """
    image = eight_bits(upright(image))
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if image.mode == "LAB":
        shown = ImageCms.applyTransform(image, lab_to_srgb())
        assert shown is not None  # it is None for a change in place only
        return shown
    if image.has_transparency_data:
        # a premultiplied mode converts to its plain one only
        plain = {"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)
        layers = image.convert(plain).convert("RGBA")
        white = Image.new("RGBA", layers.size, "white")
        shown = Image.alpha_composite(white, layers).convert("RGB")
        return shown.convert("L") if plain in ("L", "LA") else shown
    return image.convert("L" if image.mode == "1" else "RGB")


def upright(image: Image.Image) -> Image.Image:
    """A decoded picture turned as its EXIF says."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # whatever its parser meets: a picture without a use for EXIF
        orientation = None
    # a damaged entry may be of any type, hashable or not
    turn = TURNS.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey pictures of more than eight bits at eight, which Pillow's own conversion
    would clip; others as they are.

    Raises ``ValueError`` where white cannot be told; a doubt about it is said in
    ``info``.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image, dtype=np.float64)
    low, high = float(values.min()), float(values.max())
    if image.mode == "F":
        if not (low >= 0 and (high <= 1 or 16 <= high <= 255)):
            raise ValueError(
                f"floating-point values from {low:g} to {high:g}: which one is white "
                "cannot be told; accepted are [0, 1], and [0, 255] up to 16 at least"
            )
        white = 1.0 if high <= 1 else 255.0
    # PPM files say what white is, and PNG files have sixteen bits at most
    elif image.mode == "I" and image.format not in ("PPM", "PNG"):
        raise ValueError(
            f"32-bit integers from {low:g} to {high:g}: which one is white cannot be "
            "told; save 8 or 16 bits"
        )
    else:
        white = float(SIXTEEN_BITS)
    shown = Image.fromarray((values * (255 / white)).round().astype(np.uint8))
    if white == SIXTEEN_BITS and 0 < high <= DARK and image.format != "PPM":
        shown.info[DOUBT] = (
            f"16-bit grey that reaches {high:g} of {SIXTEEN_BITS}: read as a dark "
            "picture; if it holds fewer bits, scale it"
        )
    return shown


@lru_cache(maxsize=1)
def lab_to_srgb() -> ImageCms.ImageCmsTransform:
    """The transform from CIELAB (D50) to sRGB."""
    return ImageCms.buildTransform(
        ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB"
    )
