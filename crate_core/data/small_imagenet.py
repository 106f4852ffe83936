"""A small data set laid out as ImageNet is, to try commands on before the real one:
scikit-learn's digits as JPEG files in class folders, a flat held-out part, and the file
of its labels.

Book: :ref:`ch-pretraining`.
"""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from crate_core.data.sources import digits

ENLARGED = 4
"""Times 8 pixels is the side of a picture, so that there is something to resize."""


def small_imagenet(folder: str | Path) -> Path:
    """Write the 1,797 digits as ImageNet lies on a disk: class folders in ``train/``,
    pictures without folders in ``val/``, and the classes of these in
    ``LOC_val_solution.csv``, as Kaggle spells them.

    Parameters
    ----------
    folder : where to; made if it is not there.

    Returns
    -------
    The folder.  Which pictures are held out is the choice of
    :func:`crate_core.data.sources.digits`.

    Raises
    ------
    FileExistsError
        If the folder holds ``train`` or ``val`` already.

    Book: :ref:`ch-pretraining`.
    """
    data, root = digits(), Path(folder)
    names = [f"n{label:08d}" for label in range(len(data.classes))]
    (root / "train").mkdir(parents=True)
    (root / "val").mkdir()
    for name in names:
        (root / "train" / name).mkdir()
    with (root / "LOC_val_solution.csv").open("w", encoding="utf8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("ImageId", "PredictionString"))
        for part, source in (("train", data.train), ("val", data.held_out)):
            assert source.labels is not None  # digits have them
            for i in range(len(source)):
                picture = source.read(i)
                pixels = (255 * np.asarray(picture).squeeze()).round().astype(np.uint8)
                class_name = names[int(source.labels[i])]
                name = (
                    f"{class_name}_{i}"
                    if part == "train"
                    else f"ILSVRC2012_val_{i:08d}"
                )
                place = root / "train" / class_name if part == "train" else root / "val"
                side = ENLARGED * pixels.shape[0]
                large = Image.fromarray(pixels).resize((side, side))
                large.save(place / f"{name}.JPEG", quality=95)
                if part == "val":
                    rows.writerow((name, class_name))
    return root
