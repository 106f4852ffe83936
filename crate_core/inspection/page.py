r"""``crate inspect``: what the layers, tokens and heads of a saved model do, as one
self-contained HTML page.

Everything stands beside the same network untrained, from several seeds.  The page holds
no script and asks for nothing: pictures are inside it.

Book: :ref:`ch-layer-by-layer`, :ref:`ch-tokens-heads`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch
from matplotlib.figure import Figure

from crate_core.checks import is_count
from crate_core.data.batches import (
    MAX_UNREADABLE,
    UnreadableCount,
    some_pictures,
)
from crate_core.data.named import open_data
from crate_core.data.photographs import photographs
from crate_core.data.sources import ArrayImages, FileImages, ImageSource, digits
from crate_core.data.understood import chosen_pictures, understood
from crate_core.inspection import figures as figures
from crate_core.inspection.layers import inspect_layers, inspect_weights
from crate_core.inspection.sections import (
    SHOWN,
    Section,
    layer_sections,
    picture_sections,
    readout_sections,
)
from crate_core.model.autoencoder import MaskedAutoencoder
from crate_core.model.build import fresh_model, load_model
from crate_core.model.config import FrameConfig
from crate_core.records import (
    atomic_write,
    device_name,
    printable,
    provenance,
    shortened,
)
from crate_core.shapes import Images


def shipped_pictures(config: FrameConfig, count: int = 32) -> Images:
    """Pictures (B, C, H, W) in [0, 1] that need no download and fit a model: held-out
    digits for one channel, squares cut from the two photographs that scikit-learn ships
    for three.

    Raises ``ValueError`` for another number of channels.  Book:
    :ref:`ch-layer-by-layer`.
    """
    if config.channels == 1:
        return some_pictures(digits().held_out, config, count)
    if config.channels != 3:
        raise ValueError(
            f"no pictures of {config.channels} channels are at hand: give some "
            "with --images or --data"
        )
    photos = photographs()
    height = photos[0].shape[1]
    side = height // max(1, min(4, round(height / max(config.image_shape))))
    squares = [
        photo.unfold(1, side, side).unfold(2, side, side).flatten(1, 2).movedim(1, 0)
        for photo in photos
    ]
    return some_pictures(ArrayImages(torch.cat(squares)), config, count)


def render(
    title: str,
    facts: Sequence[tuple[str, str]],
    pictures: Figure,
    sections: Sequence[Section],
) -> str:
    """The page, from its template ``page.html.jinja``."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("crate_core.inspection", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["png"] = figures.png
    template = environment.get_template("page.html.jinja")
    return template.render(
        title=title, facts=facts, pictures=pictures, sections=sections
    )


def inspection_report(
    model: MaskedAutoencoder,
    images: Images,
    name: str,
    facts: Sequence[tuple[str, str]] = (),
    *,
    eps: float = 0.5,
    seeds: Sequence[int] = (0, 1, 2),
) -> str:
    """The report on a model as HTML: layers, tokens and heads on pictures, beside the
    same network untrained.

    Parameters
    ----------
    model : of either architecture, on its device.
    images : (B, C, H, W) in [0, 1], of the model's size.
    name : what to call the model.
    facts : more rows of the table at the top.
    eps : see :func:`crate_core.inspection.layers.inspect_layers`.
    seeds : of the untrained controls, at least one.

    Raises
    ------
    ValueError
        If there is no picture or no seed, or pictures and model do not fit.

    Book: :ref:`ch-layer-by-layer`.
    """
    if not seeds:
        raise ValueError("at least one seed of an untrained control is needed")
    device = next(model.parameters()).device
    controls = [fresh_model(model.config, seed).to(device) for seed in seeds]
    found, *others = (
        inspect_layers(network, images, eps=eps) for network in (model, *controls)
    )
    sections = layer_sections(
        found,
        others,
        inspect_weights(model),
        [inspect_weights(control) for control in controls],
    )
    config: Any = model.config
    described: list[tuple[str, str]] = [
        (
            "model",
            f"{config.model_type}, "
            f"{sum(p.numel() for p in model.parameters()):,} parameters",
        ),
        ("layers, width, heads", f"{config.depth}, {config.dim}, {config.heads}"),
        (
            "pictures",
            f"{len(images)} of {images.shape[2]} x {images.shape[3]} pixels, "
            f"{images.shape[1]} channels",
        ),
        ("eps", f"{eps:g} of the tokens' norm"),
        ("untrained controls", f"{len(seeds)} seeds"),
        *facts,
    ]
    return render(
        f"Inside {name}",
        described,
        figures.picture_rows([("", images[: 2 * SHOWN])]),
        [
            *sections,
            *readout_sections(model, controls, images),
            *picture_sections(model, controls[0], images),
        ],
    )


def named_pictures(
    source: ImageSource, config: FrameConfig, count: int, origin: str, limit: float
) -> tuple[Images, str]:
    """Some pictures (B, C, H, W) of a source in [0, 1], and where they come from with
    the names of those that could not be read.

    Raises ``ValueError`` if none is readable, or a larger share of the source than
    ``limit`` proves unreadable.
    """
    unreadable = UnreadableCount(len(source), limit, {}, "")
    shown = chosen_pictures(
        source,
        config.image_shape,
        config.channels,
        count,
        unreadable,
        lambda line: None,
    )
    if said := list(unreadable.names):
        met = len(said) + len(shown)
        origin += f"; {len(said)} of {met} could not be read: {shortened(said)}"
    return torch.stack([picture for _, picture in shown]), origin


def inspect_checkpoint(
    model: str | Path | MaskedAutoencoder,
    name: str,
    files: Sequence[str] = (),
    data: str | None = None,
    count: int = 32,
    eps: float = 0.5,
    seeds: int = 3,
    command: str = "crate_core.inspection.page.inspect_checkpoint",
    report: Callable[[str], None] = lambda line: None,
    max_unreadable: float = MAX_UNREADABLE,
) -> str:
    """What ``crate inspect`` writes: :func:`inspection_report` on files, on held-out
    pictures of ``data``, or on pictures that are shipped; ``report`` gets what was
    understood of the data, and where the pictures come from, before the work.
    ``model`` is what :func:`crate_core.model.build.load_model` takes.

    Raises
    ------
    FileNotFoundError
        If a file or the data are not there.
    ValueError
        If a file or the data cannot be used, a larger share of the held-out pictures
        than ``max_unreadable`` proves unreadable, or a number is out of range.
    """
    for field, value in (("count", count), ("seeds", seeds)):
        if not is_count(value):
            raise ValueError(f"{field}={value!r}: at least 1 is needed")
    model = load_model(model)
    if files:
        missing = [file for file in files if not Path(file).is_file()]
        if missing:
            raise FileNotFoundError(f"there is no file {missing[0]}")
        source = FileImages([Path(file) for file in files])
        # of files that are named one by one any share may be damaged
        images, origin = named_pictures(source, model.config, len(source), "files", 1.0)
    elif data is not None:
        opened = open_data(data, labels=False)
        for line in understood(opened):
            report(line)
        images, origin = named_pictures(
            opened.held_out,
            model.config,
            count,
            f"held out: {opened.description}",
            max_unreadable,
        )
    else:
        images = shipped_pictures(model.config, count)
        origin = (
            "scikit-learn's digits, held out"
            if model.config.channels == 1
            else "scikit-learn's photographs, cut"
        )
    report(f"pictures: {len(images)}, {origin}")
    record = provenance(command, device_name(next(model.parameters()).device))
    facts = [
        ("origin of the pictures", origin),
        *((key, record[key]) for key in ("command", "commit", "device", "time")),
    ]
    return inspection_report(model, images, name, facts, eps=eps, seeds=range(seeds))


def write_report(path: str | Path, page: str) -> None:
    """Write the page, whole or not at all; ``OSError`` if it cannot be written."""
    atomic_write(Path(path), printable(page).encode())
