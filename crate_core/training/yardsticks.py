r"""What a model fills in: loss and signal-to-noise ratio on removed patches, yardsticks
for them, pictures.

Book: :ref:`ch-first-training`.
"""

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crate_core.keys import Stream, random_generator
from crate_core.model.autoencoder import MaskedAutoencoder, evaluation_mode
from crate_core.model.config import FrameConfig
from crate_core.model.patches import upsample
from crate_core.records import atomic_write
from crate_core.shapes import Images, PatchMask, PatchNoise

COLUMNS = ("masked input", "reconstruction", "visible + reconstruction", "original")


@dataclass(frozen=True)
class TrivialLoss:
    """What knowing nothing of the visible patches costs, in model units.

    ``mean_patch``: predicting one patch, the mean of all; ``mean_picture``: at each
    position that position's mean.
    """

    mean_patch: float
    mean_picture: float


@dataclass(frozen=True)
class RatioScore:
    """Reconstruction at one masking ratio, on removed patches: the model's loss, and
    the peak signal-to-noise ratio in dB of its prediction and of the mean picture's.
    """

    mask_ratio: float
    loss: float
    psnr: float
    mean_picture_psnr: float


def trivial_loss(
    model: MaskedAutoencoder, images: Images | Iterable[Images]
) -> TrivialLoss:
    r"""The loss of predicting means, from the variance of the targets :math:`t_{ijk}`
    (picture, position, pixel),

    .. math:: \mathrm{mean}_{ijk} (t_{ijk} - \bar t_{k})^2 \quad\text{and}\quad
              \mathrm{mean}_{ijk} (t_{ijk} - \bar t_{jk})^2.

    Parameters
    ----------
    model : gives the units, and whether targets are normalised.
    images : (B, C, H, W) in [0, 1], or batches of them, which are read once.

    Book: :ref:`ch-first-training`.
    """
    count, total, squares = 0, torch.zeros((), dtype=torch.float64), 0.0
    for batch in in_batches(images, 64):
        targets = model.targets(model.standardize(batch)).double()
        count += len(targets)
        total = total + targets.sum(dim=0)
        squares += float(targets.square().sum())
    # the mean of squares less the square of the mean; never below zero but by rounding
    mean = total / count
    second = squares / (count * mean.numel())
    return TrivialLoss(
        max(0.0, second - float(mean.mean(dim=0).square().mean())),
        max(0.0, second - float(mean.square().mean())),
    )


def mean_picture(images: Images | Iterable[Images]) -> Tensor:
    """The mean (C, H, W) of pictures in one tensor (B, C, H, W), or in batches, which
    are read once.

    Book: :ref:`ch-first-training`.
    """
    count, total = 0, torch.zeros((), dtype=torch.float64)
    for batch in in_batches(images, 64):
        count += len(batch)
        total = total + batch.double().sum(dim=0)
    return (total / count).to(torch.float32)


def in_batches(images: Images | Iterable[Tensor], batch_size: int) -> Iterable[Tensor]:
    """Pictures in one tensor as batches; batches as they are."""
    return images.split(batch_size) if isinstance(images, Tensor) else images


def masked_batches(
    images: Images | Iterable[Tensor], batch_size: int, length: int, seed: int
) -> Iterator[tuple[Images, PatchNoise]]:
    """Batches with the noise (b, L) that fixes their masks: rows of one draw from
    ``seed``, whatever the batches.
    """
    generator = random_generator(seed, Stream.EVALUATION_MASK, 0)
    for batch in in_batches(images, batch_size):
        yield batch, torch.rand(len(batch), length, generator=generator)


@torch.no_grad()
def held_out_loss(
    model: MaskedAutoencoder,
    images: Images | Iterable[Images],
    mask_ratio: float,
    seed: int = 0,
    batch_size: int = 256,
) -> float:
    """Mean loss of pictures under masks fixed by ``seed``, in evaluation mode.

    Parameters
    ----------
    model : used on its device.
    images : (B, C, H, W) in [0, 1], or batches of them, which are read once.
    mask_ratio : in [0, 1).
    seed : of the masks.

    Book: :ref:`ch-first-training`.
    """
    with evaluation_mode(model):
        device = next(model.parameters()).device
        length = math.prod(model.config.grid)
        total, count = 0.0, 0
        for pictures, noise in masked_batches(images, batch_size, length, seed):
            loss = model(
                model.standardize(pictures.to(device)), mask_ratio, noise.to(device)
            ).loss
            total, count = total + float(loss) * len(pictures), count + len(pictures)
    return total / count


@torch.no_grad()
def removes_some(mask_ratio: float, patches: int) -> bool:
    """Whether a masking ratio removes some of a picture's patches and leaves some."""
    return 0 < patches - int(patches * (1 - mask_ratio)) < patches


def reconstruction_by_ratio(
    model: MaskedAutoencoder,
    images: Images | Iterable[Images],
    mean_picture: Tensor,
    mask_ratios: Sequence[float] = (0.25, 0.5, 0.75, 0.875),
    seed: int = 0,
    batch_size: int = 256,
) -> list[RatioScore]:
    r"""Loss and PSNR on removed patches by masking ratio,

    .. math:: \mathrm{PSNR} = -10 \log_{10}
              \mathrm{mean}_{\text{removed pixels}} (\hat x - x)^2,

    with pixels in [0, 1], predictions de-normalised and cut off at 0 and 1, the mean
    over all removed pixels of all pictures.

    Parameters
    ----------
    model : used in evaluation mode, on its device.
    images : (B, C, H, W) in [0, 1], or batches of them, which are read once.
    mean_picture : (C, H, W) in [0, 1], of the training pictures: the prediction that
        needs no model.
    mask_ratios : each in (0, 1).
    seed : of the masks.

    Raises
    ------
    ValueError
        If a ratio removes no patch or all of them.

    Book: :ref:`ch-first-training`.
    """
    length = math.prod(model.config.grid)
    for ratio in mask_ratios:
        if not removes_some(ratio, length):
            raise ValueError(
                f"mask_ratio={ratio} must leave some of {length} patches visible and "
                "remove some"
            )
    # by ratio: loss, squared error of the model and of the mean picture, removed pixels
    totals = np.zeros((len(mask_ratios), 4))
    count = 0
    with evaluation_mode(model):
        device = next(model.parameters()).device
        for batch, noise in masked_batches(images, batch_size, length, seed):
            pictures, masks = batch.to(device), noise.to(device)
            standardized = model.standardize(pictures)
            mean_error = (mean_picture.to(device) - pictures).square()
            count += len(pictures)
            for sums, ratio in zip(totals, mask_ratios, strict=True):
                # Visible pixels of the pasted picture are the input's, so their error
                # is zero.
                pasted = model.reconstruct(standardized, ratio, masks)
                error = model.unstandardize(pasted.pasted).clamp(0, 1) - pictures
                removed = removed_pixels(pasted.mask, model.config)
                sums += (
                    float(model(standardized, ratio, masks).loss) * len(pictures),
                    float((error.square() * removed).sum()),
                    float((mean_error * removed).sum()),
                    float(removed.sum()) * pictures.shape[1],
                )
    return [
        RatioScore(
            ratio,
            float(loss / count),
            *(-10 * math.log10(total / pixels) for total in (squared, mean_squared)),
        )
        for ratio, (loss, squared, mean_squared, pixels) in zip(
            mask_ratios, totals, strict=True
        )
    ]


def removed_pixels(mask: PatchMask, config: FrameConfig) -> Tensor:
    """A patch mask (B, L) as pixels (B, 1, H, W)."""
    return upsample(mask.unflatten(1, config.grid)[:, None], config.image_shape)


def reconstruction_rows(
    model: MaskedAutoencoder, images: Images, mask_ratio: float, noise: PatchNoise
) -> Tensor:
    """Pictures (B, 4, C, H, W) in [0, 1]: masked input, reconstruction, the two pasted
    together, original.

    Removed patches of the masked input are grey.  Predictions are brought back to
    pixels, de-normalised where the model predicts normalised patches, and cut off at 0
    and 1.

    Parameters
    ----------
    model : the model; used in evaluation mode.
    images : (B, C, H, W) in [0, 1].
    mask_ratio : share of patches to remove, in [0, 1).
    noise : (B, L), fixes the masks.

    Book: :ref:`ch-first-training`.
    """
    with evaluation_mode(model):
        device = next(model.parameters()).device
        images, noise = images.to(device), noise.to(device)
        parts = model.reconstruct(model.standardize(images), mask_ratio, noise)
    masked = torch.where(removed_pixels(parts.mask, model.config) > 0, 0.5, images)
    predicted, pasted = (
        model.unstandardize(p) for p in (parts.predicted, parts.pasted)
    )
    return torch.stack([masked, predicted, pasted, images], dim=1).clamp(0, 1).cpu()


def save_reconstructions(
    path: str | Path,
    model: MaskedAutoencoder,
    images: Images,
    mask_ratio: float,
    noise: PatchNoise,
) -> None:
    """Write the figure of :func:`reconstruction_rows` as PNG, one row a picture; the
    file is whole or absent.

    Raises ``ValueError`` if there is no picture, ``OSError`` if the file cannot be
    written.
    """
    from matplotlib.figure import Figure

    if len(images) == 0:
        raise ValueError("there is no picture to reconstruct")
    # (B, 4, H, W, C)
    grid = reconstruction_rows(model, images, mask_ratio, noise).movedim(2, -1).numpy()
    figure = Figure(
        figsize=(1.6 * len(COLUMNS), 1.6 * len(grid) + 0.3),
        dpi=120,
        layout="constrained",
    )
    axes = np.atleast_2d(figure.subplots(len(grid), len(COLUMNS), squeeze=False))
    for row, pictures in zip(axes, grid, strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(
                picture if picture.shape[-1] == 3 else picture[..., 0],
                cmap="gray",
                vmin=0,
                vmax=1,
            )
            axis.set_axis_off()
    for axis, title in zip(axes[0], COLUMNS, strict=True):
        axis.set_title(title, fontsize=8)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    atomic_write(Path(path), png.getvalue())
