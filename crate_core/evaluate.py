r"""Evaluation of a checkpoint: linear probes beside their controls, and reconstruction by masking ratio.

A linear probe asks how much of the class a *linear* map reads off frozen features.  By itself the figure says little:
it is printed beside the same encoder untrained (what the architecture gives away for nothing) and raw pixels (what no
encoder is needed for), each fitted in the same way.

Book: :ref:`ch-first-training`.
"""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from crate_core.data import open_data
from crate_core.model import CrateMAE, CrateMAEConfig
from crate_core.runs import RUN_FILE, device_name, provenance, write_json
from crate_core.shapes import Images
from crate_core.sources import ImageData, ImageSource
from crate_core.stream import Stream, evaluation_batches, mask_noise, random_key

EVALUATION_FILE = "evaluation.json"

INVERSE_REGULARIZATION = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Values of scikit-learn's C that a probe chooses from."""

PIXEL_SIDE = 32
"""Larger pictures are averaged down to this side for the pixel control, which would not fit in memory otherwise."""

RECONSTRUCTED = 2048
"""How many held-out pictures reconstruction is measured on, at most."""


@dataclass(frozen=True)
class Features:
    """What probes are fitted on, one row a picture: ``class_token`` (n, d), ``patch_mean`` (n, d), ``pixels`` (n, m)
    and ``labels`` (n,); ``unreadable`` pictures were left out."""

    class_token: np.ndarray
    patch_mean: np.ndarray
    pixels: np.ndarray
    labels: np.ndarray
    unreadable: int


@dataclass(frozen=True)
class Score:
    """Accuracies of one probe over seeds, each in [0, 1]; ``std`` is the sample standard deviation (0 for one seed)."""

    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.accuracies))

    @property
    def std(self) -> float:
        return float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "std": self.std, "accuracies": list(self.accuracies)}


@dataclass(frozen=True)
class RatioScore:
    """Reconstruction at one masking ratio, on removed patches: the model's loss, and the peak signal-to-noise ratio
    in dB of its prediction and of the mean picture's."""

    mask_ratio: float
    loss: float
    psnr: float
    mean_picture_psnr: float


@torch.no_grad()
def encode(model: CrateMAE, source: ImageSource, batch_size: int = 256, workers: int = 0) -> Features:
    r"""Features of all pictures of a source, computed once, nothing masked.

    With encoder output :math:`(z_0, z_1, \dots, z_L)`: the class token :math:`z_0`, the mean of patch tokens
    :math:`\tfrac1L \sum_{i \ge 1} z_i`, and the pixels.

    Parameters
    ----------
    model : used in evaluation mode, on its device.
    source : pictures; brought to the model's image size and channels.
    batch_size, workers : how they are read.

    Raises
    ------
    ValueError
        If no picture can be read.

    Book: :ref:`ch-first-training`.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    size = image_size(model.config)
    tokens, means, pixels, indices = [], [], [], []
    unreadable = 0
    for batch in evaluation_batches(source, size, model.config.channels, batch_size, workers):
        unreadable += len(batch.unreadable)
        if len(batch.images) == 0:
            continue
        features = model.forward_features(model.standardize(batch.images.to(device)))
        tokens.append(features[:, 0].cpu())
        means.append(features[:, 1:].mean(dim=1).cpu())
        pixels.append(small_pixels(batch.images))
        indices.append(batch.indices)
    model.train(was_training)
    if not indices:
        raise ValueError(f"none of {len(source)} pictures can be read")
    kept = torch.cat(indices).numpy()
    labels = np.full(len(kept), -1) if source.labels is None else source.labels[kept]
    return Features(
        torch.cat(tokens).numpy(), torch.cat(means).numpy(), torch.cat(pixels).numpy(), labels, unreadable
    )


def small_pixels(images: Images) -> torch.Tensor:
    """Flattened pixels (B, m) of pictures averaged down to at most ``PIXEL_SIDE`` a side."""
    size = [min(side, PIXEL_SIDE) for side in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="area").flatten(1)


def image_size(config: CrateMAEConfig) -> tuple[int, int]:
    """Height and width in pixels."""
    size = config.image_size
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def few_labels(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Indices of ``per_class`` pictures of each class, drawn with ``seed``, sorted.

    Raises ``ValueError`` naming a class that has fewer.
    """
    generator = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < per_class:
            raise ValueError(f"class {label} has {len(members)} training pictures, {per_class} labels a class are asked")
        chosen.append(generator.choice(members, per_class, replace=False))
    return np.sort(np.concatenate(chosen))


def probe(inverse_regularization: float) -> Pipeline:
    """Columns scaled to mean 0 and variance 1, then multinomial logistic regression."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=inverse_regularization, max_iter=500))


def fit_probe(features: np.ndarray, labels: np.ndarray, seed: int) -> tuple[Pipeline, float]:
    r"""Fit a linear probe, its regularisation chosen on a validation split of the very pictures it may fit on.

    .. math:: \min_{W, b}\ \tfrac12 \|W\|_F^2 + C \sum_i -\log \mathrm{softmax}(W x_i + b)_{y_i},

    C from ``INVERSE_REGULARIZATION`` by mean accuracy over stratified splits (a fifth held back; two fifths, ten
    times, where there are at most 500 labels), the smallest on a tie; then refitted on all.

    Parameters
    ----------
    features : (n, d).
    labels : (n,) integers, at least two of each class.
    seed : of the splits.

    Returns
    -------
    (probe, C) : fitted on all n.

    Book: :ref:`ch-first-training`.
    """
    scarce = len(labels) <= 500
    splits = StratifiedShuffleSplit(10 if scarce else 1, test_size=0.4 if scarce else 0.2, random_state=seed)
    folds = list(splits.split(features, labels))
    with warnings.catch_warnings():
        # Weak regularisation need not converge to be ruled out on the validation split.
        warnings.simplefilter("ignore", ConvergenceWarning)
        accuracies = [
            np.mean([probe(c).fit(features[a], labels[a]).score(features[b], labels[b]) for a, b in folds])
            for c in INVERSE_REGULARIZATION
        ]
        best = INVERSE_REGULARIZATION[int(np.argmax(accuracies))]
        return probe(best).fit(features, labels), best


def probe_accuracy(
    train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray, seed: int,
    labels_per_class: int | None = None,
) -> float:  # fmt: skip
    """Held-out accuracy in [0, 1] of :func:`fit_probe` on all labels, or on a few of each class drawn with ``seed``."""
    if labels_per_class is not None:
        chosen = few_labels(train_labels, labels_per_class, seed)
        train, train_labels = train[chosen], train_labels[chosen]
    fitted, _ = fit_probe(train, train_labels, seed)
    return float(fitted.score(test, test_labels))


def untrained(config: CrateMAEConfig, seed: int) -> CrateMAE:
    """The same architecture with fresh weights; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(random_key(seed, 1))
        return CrateMAE(config)


def linear_probes(
    model: CrateMAE, data: ImageData, seeds: Sequence[int] = range(5), labels_per_class: int = 5, workers: int = 0
) -> dict[str, dict[str, Score]]:
    """Linear probes of a model and of its controls, with all labels and with a few a class, over seeds.

    A seed draws the few labels, the validation splits, and the untrained encoder's weights; the held-out pictures
    stay the same.

    Parameters
    ----------
    model : the trained model.
    data : labelled pictures; probes fit on ``data.train`` and are scored on ``data.held_out``.
    seeds : one probe of each kind for each.
    labels_per_class : how many labels a class the second column may use, at least 2.

    Returns
    -------
    {row: {column: Score}}, rows "trained, class token", "trained, mean of patches", the same "untrained", and
    "raw pixels"; columns "all labels" and "N labels a class".

    Raises
    ------
    ValueError
        If the pictures have no labels, fewer than two classes, or too few of a class.

    Book: :ref:`ch-first-training`.
    """
    check_labels(data, labels_per_class)
    columns = {"all labels": None, f"{labels_per_class} labels a class": labels_per_class}
    device = next(model.parameters()).device
    trained = encode(model, data.train, workers=workers), encode(model, data.held_out, workers=workers)
    accuracies: dict[str, dict[str, list[float]]] = {}
    for seed in seeds:
        fresh = untrained(model.config, seed).to(device)
        control = encode(fresh, data.train, workers=workers), encode(fresh, data.held_out, workers=workers)
        rows = {
            "trained, class token": [part.class_token for part in trained],
            "trained, mean of patches": [part.patch_mean for part in trained],
            "untrained, class token": [part.class_token for part in control],
            "untrained, mean of patches": [part.patch_mean for part in control],
            "raw pixels": [part.pixels for part in trained],
        }
        for row, (train, test) in rows.items():
            for column, few in columns.items():
                accuracy = probe_accuracy(train, trained[0].labels, test, trained[1].labels, seed, few)
                accuracies.setdefault(row, {}).setdefault(column, []).append(accuracy)
    return {row: {column: Score(tuple(a)) for column, a in by.items()} for row, by in accuracies.items()}


def check_labels(data: ImageData, labels_per_class: int) -> None:
    """``ValueError`` unless both parts have labels of at least two classes, and enough of each to probe."""
    if data.train.labels is None or data.held_out.labels is None:
        raise ValueError("a linear probe needs labels (class folders, or a label column); these pictures have none")
    if labels_per_class < 2:
        raise ValueError(f"labels_per_class={labels_per_class}: at least 2 are needed, one to fit and one to validate")
    classes, counts = np.unique(data.train.labels, return_counts=True)
    if len(classes) < 2:
        raise ValueError("a linear probe needs at least two classes, these pictures have one")
    if counts.min() < labels_per_class:
        rare = int(classes[counts.argmin()])
        raise ValueError(f"class {rare} has {counts.min()} training pictures, labels_per_class={labels_per_class}")


@torch.no_grad()
def reconstruction_by_ratio(
    model: CrateMAE,
    images: Images,
    mean_picture: torch.Tensor,
    mask_ratios: Sequence[float] = (0.25, 0.5, 0.75, 0.875),
    seed: int = 0,
    batch_size: int = 256,
) -> list[RatioScore]:
    r"""Loss and PSNR on removed patches by masking ratio,

    .. math:: \mathrm{PSNR} = -10 \log_{10} \mathrm{mean}_{\text{removed pixels}} (\hat x - x)^2,

    with pixels in [0, 1], predictions de-normalised and cut off at 0 and 1, the mean over all removed pixels of all
    pictures.

    Parameters
    ----------
    model : used in evaluation mode, on its device.
    images : (B, C, H, W) in [0, 1].
    mean_picture : (C, H, W) in [0, 1], of the training pictures: the prediction that needs no model.
    mask_ratios : each in (0, 1).
    seed : of the masks.

    Raises
    ------
    ValueError
        If a ratio removes no patch or all of them.

    Book: :ref:`ch-first-training`.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    length = math.prod(model.config.grid)
    noise = mask_noise(seed, 0, len(images), length, Stream.EVALUATION_MASK)
    scores = []
    for ratio in mask_ratios:
        if not 0 < length - int(length * (1 - ratio)) < length:
            raise ValueError(f"mask_ratio={ratio} must leave some of {length} patches visible and remove some")
        loss = squared = mean_squared = removed_pixels = 0.0
        for rows in torch.arange(len(images)).split(batch_size):
            pictures, masks = images[rows].to(device), noise[rows].to(device)
            standardized = model.standardize(pictures)
            loss += float(model(standardized, ratio, masks).loss) * len(rows)
            # Visible pixels of the pasted picture are the input's, so their error is zero.
            pasted = model.reconstruct(standardized, ratio, masks)
            error = model.unstandardize(pasted.pasted).clamp(0, 1) - pictures
            removed = removed_pixel_mask(pasted.mask, model.config)
            squared += float((error.square() * removed).sum())
            mean_squared += float(((mean_picture.to(device) - pictures).square() * removed).sum())
            removed_pixels += float(removed.sum()) * pictures.shape[1]
        psnr, mean_psnr = (-10 * math.log10(total / removed_pixels) for total in (squared, mean_squared))
        scores.append(RatioScore(ratio, loss / len(images), psnr, mean_psnr))
    model.train(was_training)
    return scores


def removed_pixel_mask(mask: torch.Tensor, config: CrateMAEConfig) -> torch.Tensor:
    """A patch mask (B, L) as pixels (B, 1, H, W)."""
    rows, columns = config.grid
    pixels = mask.reshape(-1, 1, rows, columns)
    return pixels.repeat_interleave(config.patch_size, 2).repeat_interleave(config.patch_size, 3)


def run_data(checkpoint: str | Path) -> tuple[str, str]:
    """The data a checkpoint was trained on and its root, from ``run.json`` beside it.

    Raises ``ValueError`` if there is no such record.
    """
    record = Path(checkpoint) / RUN_FILE
    if not record.is_file():
        raise ValueError(f"{checkpoint} has no {RUN_FILE} that says what it was trained on: give --data")
    config = json.loads(record.read_text())["config"]
    return config["data"], config["data_root"]


def read_pictures(source: ImageSource, config: CrateMAEConfig, count: int) -> Images:
    """Up to ``count`` pictures (B, C, H, W) in [0, 1], spread evenly over a source."""
    from crate_core.sources import SelectedImages

    chosen = np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int)
    batches = evaluation_batches(SelectedImages(source, chosen), image_size(config), config.channels)
    return torch.cat([batch.images for batch in batches])


def evaluate(
    checkpoint: str | Path,
    data: str | None = None,
    seeds: int = 5,
    labels_per_class: int = 5,
    mask_ratios: Sequence[float] = (0.25, 0.5, 0.75, 0.875),
    device: str = "cpu",
    workers: int = 0,
    command: str = "crate_core.evaluate.evaluate",
) -> dict[str, Any]:
    """Evaluate a checkpoint: linear probes with controls (where there are labels) and reconstruction.

    Parameters
    ----------
    checkpoint : directory or Hub id, as ``CrateMAE.from_pretrained`` takes.
    data : as :func:`crate_core.data.open_data` takes; what the checkpoint was trained on unless given.
    seeds : how many seeds, at least 1.
    labels_per_class, mask_ratios : see :func:`linear_probes` and :func:`reconstruction_by_ratio`.
    device, workers : where and with how many reading processes.
    command : what to record as the command.

    Returns
    -------
    A record ready for JSON: ``linear_probe`` (``None`` without labels), ``reconstruction``, counts and provenance.

    Raises
    ------
    FileNotFoundError, ValueError
        If checkpoint or data are not there or cannot be used.

    Book: :ref:`ch-first-training`.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: at least 1 is needed")
    model = CrateMAE.from_pretrained(checkpoint).to(device)
    spec, root = (data, "data") if data is not None else run_data(checkpoint)
    pictures = open_data(spec, root)
    labelled = pictures.train.labels is not None
    scores = linear_probes(model, pictures, range(seeds), labels_per_class, workers) if labelled else None
    mean_picture = read_pictures(pictures.train, model.config, RECONSTRUCTED).mean(dim=0)
    held_out = read_pictures(pictures.held_out, model.config, RECONSTRUCTED)
    by_ratio = reconstruction_by_ratio(model, held_out, mean_picture, mask_ratios)
    return {
        "data": spec,
        "description": pictures.description,
        "train": len(pictures.train),
        "held_out": len(pictures.held_out),
        "classes": len(pictures.classes),
        "seeds": list(range(seeds)),
        "linear_probe": None if scores is None else {
            row: {column: score.to_dict() for column, score in by.items()} for row, by in scores.items()
        },
        "reconstruction": [asdict(score) for score in by_ratio],
        **provenance(command, device_name(torch.device(device))),
    }  # fmt: skip


def table(record: dict[str, Any]) -> list[str]:
    """The record of :func:`evaluate` in lines of text."""
    lines = [record["description"]]
    probes = record["linear_probe"]
    if probes is None:
        lines.append("no labels: linear probes left out")
    else:
        columns = list(next(iter(probes.values())))
        lines.append(
            f"linear probe, accuracy in % on {record['held_out']:,} held-out pictures, mean and standard deviation "
            f"over {len(record['seeds'])} seeds"
        )
        lines.append(f"  {'':28}" + "".join(f"{column:>22}" for column in columns))
        for row, by in probes.items():
            cells = [f"{100 * by[column]['mean']:.1f} ± {100 * by[column]['std']:.1f}" for column in columns]
            lines.append(f"  {row:28}" + "".join(f"{cell:>22}" for cell in cells))
    lines.append("reconstruction of removed patches by masking ratio")
    lines.append(f"  {'masking ratio':28}{'loss':>10}{'PSNR, dB':>12}{'of the mean picture':>24}")
    for score in record["reconstruction"]:
        lines.append(
            f"  {score['mask_ratio']:<28g}{score['loss']:>10.4f}{score['psnr']:>12.2f}{score['mean_picture_psnr']:>24.2f}"
        )
    return lines


def save_evaluation(record: dict[str, Any], path: str | Path) -> None:
    """Write the record as JSON, whole or not at all."""
    write_json(Path(path), record)
