r"""Pictures of what a model fills in: masked input, reconstruction, original, side by side.

Book: :ref:`ch-first-training`.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crate_core.model import CrateMAE
from crate_core.shapes import Images, PatchNoise

COLUMNS = ("masked input", "reconstruction", "visible + reconstruction", "original")


def reconstruction_rows(model: CrateMAE, images: Images, mask_ratio: float, noise: PatchNoise) -> Tensor:
    """Pictures (B, 4, C, H, W) in [0, 1]: masked input, reconstruction, the two pasted together, original.

    Removed patches of the masked input are grey.  Predictions are brought back to pixels, de-normalised where the
    model predicts normalised patches, and cut off at 0 and 1.

    Parameters
    ----------
    model : the model; used in evaluation mode.
    images : (B, C, H, W) in [0, 1].
    mask_ratio : share of patches to remove, in [0, 1).
    noise : (B, L), fixes the masks.

    Book: :ref:`ch-first-training`.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    images, noise = images.to(device), noise.to(device)
    parts = model.reconstruct(model.standardize(images), mask_ratio, noise)
    model.train(was_training)
    size = model.config.patch_size
    rows, columns = images.shape[-2] // size, images.shape[-1] // size
    removed = parts.mask.reshape(-1, 1, rows, columns).repeat_interleave(size, 2).repeat_interleave(size, 3)
    masked = torch.where(removed > 0, 0.5, images)
    predicted, pasted = (model.unstandardize(p) for p in (parts.predicted, parts.pasted))
    return torch.stack([masked, predicted, pasted, images], dim=1).clamp(0, 1).cpu()


def save_reconstructions(
    path: str | Path, model: CrateMAE, images: Images, mask_ratio: float, noise: PatchNoise
) -> None:
    """Write the figure of :func:`reconstruction_rows` as PNG, one row a picture.

    Raises ``ValueError`` if there is no picture, ``OSError`` if the file cannot be written.
    """
    from matplotlib.figure import Figure

    if len(images) == 0:
        raise ValueError("there is no picture to reconstruct")
    grid = reconstruction_rows(model, images, mask_ratio, noise).movedim(2, -1).numpy()  # (B, 4, H, W, C)
    figure = Figure(figsize=(1.6 * len(COLUMNS), 1.6 * len(grid) + 0.3), dpi=120, layout="constrained")
    axes = np.atleast_2d(figure.subplots(len(grid), len(COLUMNS), squeeze=False))
    for row, pictures in zip(axes, grid, strict=True):
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture if picture.shape[-1] == 3 else picture[..., 0], cmap="gray", vmin=0, vmax=1)
            axis.set_axis_off()
    for axis, title in zip(axes[0], COLUMNS, strict=True):
        axis.set_title(title, fontsize=8)
    figure.savefig(path, format="png")
