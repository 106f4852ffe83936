r"""Photographs that installed packages ship, and their patches cut for an honest test.

Two photographs come with scikit-learn, five more with scikit-image.  Each is cut into
vertical stripes, alternately for fitting and for testing, so that no test patch
overlaps a fitting patch.  Patches lose their mean: what remains has ``size * size - 1``
coordinates, in the basis of :func:`zero_mean_basis`.

Book: :ref:`ch-mixture` and :ref:`ch-denoising`.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

STRIPE_WIDTH = 64
"""Width of a stripe in pixels; what is left over at the right edge is not used."""


@dataclass(frozen=True)
class StripedPatches:
    """Patches ``x`` (n, size * size - 1) without their means, and ``photo`` (n,), the
    index of the photograph that each was cut from: photographs, not patches, are the
    independent observations that a standard error counts.
    """

    x: Tensor
    photo: Tensor


def photograph_pixels() -> dict[str, np.ndarray]:
    """The two photographs of scikit-learn, ``"temple"`` and ``"flower"``: (427, 640, 3)
    uint8 each.
    """
    from sklearn.datasets import load_sample_image

    return {
        name: load_sample_image(file).copy()
        for name, file in (("temple", "china.jpg"), ("flower", "flower.jpg"))
    }


def photographs() -> list[Tensor]:
    """The two photographs of scikit-learn, a temple and a flower, each (3, 427, 640)
    in [0, 1].  Book: :ref:`ch-tokens-heads`.
    """
    return [
        torch.from_numpy(pixels).permute(2, 0, 1) / 255
        for pixels in photograph_pixels().values()
    ]


def grey_photographs() -> dict[str, Tensor]:
    """Seven photographs in grey, by name, float64 (H, W) in [0, 1]: a temple and a
    flower of scikit-learn, and of scikit-image a portrait, a photographer, a cat, a cup
    of coffee and a rocket.

    Raises ``ModuleNotFoundError`` without scikit-image (the ``book`` extra has it).
    Book: :ref:`ch-mixture`.
    """
    from skimage import data

    names = {
        "portrait": data.astronaut,
        "photographer": data.camera,
        "cat": data.chelsea,
        "coffee": data.coffee,
        "rocket": data.rocket,
    }
    grey = {
        name: photo.to(torch.float64).mean(0)
        for name, photo in zip(photograph_pixels(), photographs(), strict=True)
    }
    for name, load in names.items():
        pixels = np.asarray(load(), dtype=np.float64) / 255
        grey[name] = torch.from_numpy(pixels if pixels.ndim == 2 else pixels.mean(-1))
    return grey


def zero_mean_basis(size: int) -> Tensor:
    r"""Orthonormal basis of the patches without mean: the two-dimensional cosine
    transform but for its constant, (size * size, size * size - 1), float64.

    Raises ``ValueError`` for a size below 2.  Book: :ref:`ch-mixture`.
    """
    from scipy.fft import dct

    if size < 2:
        raise ValueError(f"a patch needs a side of at least 2 pixels, got {size}")
    rows = torch.from_numpy(dct(np.eye(size), norm="ortho", axis=0))
    return torch.kron(rows, rows).T[:, 1:].contiguous()


def cut_patches(picture: Tensor, size: int, every: int) -> Tensor:
    """Square patches of a grey picture (H, W), one every ``every`` pixels in both
    directions, as rows (n, size * size).

    Raises ``ValueError`` if no patch fits.  Book: :ref:`ch-mixture`.
    """
    if min(size, every) < 1 or picture.ndim != 2 or min(picture.shape) < size:
        raise ValueError(
            f"no {size} x {size} patch every {every} pixels fits in a picture "
            f"{tuple(picture.shape)}"
        )
    return picture.unfold(0, size, every).unfold(1, size, every).reshape(-1, size**2)


def striped_patches(
    part: Literal["fit", "test"], size: int = 8, every: int = 4
) -> StripedPatches:
    """Zero-mean patches of every second stripe of the seven photographs: the first,
    third, ... for ``"fit"``, the second, fourth, ... for ``"test"``.

    Raises ``ValueError`` for another part.  Book: :ref:`ch-mixture`.
    """
    if part not in ("fit", "test"):
        raise ValueError(f'part must be "fit" or "test", got {part!r}')
    basis = zero_mean_basis(size)
    first = 0 if part == "fit" else STRIPE_WIDTH
    patches, photos = [], []
    for index, picture in enumerate(grey_photographs().values()):
        last = picture.shape[1] - STRIPE_WIDTH
        for left in range(first, last + 1, 2 * STRIPE_WIDTH):
            stripe = picture[:, left : left + STRIPE_WIDTH]
            patches.append(cut_patches(stripe, size, every) @ basis)
            photos.append(torch.full((len(patches[-1]),), index))
    return StripedPatches(torch.cat(patches), torch.cat(photos))
