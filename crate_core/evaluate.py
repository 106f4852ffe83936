r"""Evaluation of a checkpoint: linear probes beside their controls, and reconstruction by masking ratio.

Book: :ref:`ch-first-training`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from crate_core.architectures import load_model
from crate_core.data import open_data
from crate_core.probe import linear_probes
from crate_core.reconstruction import reconstruction_by_ratio, some_pictures
from crate_core.runs import RUN_FILE, device_name, provenance, write_json

EVALUATION_FILE = "evaluation.json"


def run_data(checkpoint: str | Path) -> tuple[str, str]:
    """The data a checkpoint was trained on and its root, from ``run.json`` beside it.

    Raises ``ValueError`` if there is no such record.
    """
    record = Path(checkpoint) / RUN_FILE
    if not record.is_file():
        raise ValueError(f"{checkpoint} has no {RUN_FILE} that says what it was trained on: give --data")
    config = json.loads(record.read_text())["config"]
    return config["data"], config["data_root"]


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
    checkpoint : directory or Hub id, as :func:`crate_core.architectures.load_model` takes.
    data : as :func:`crate_core.data.open_data` takes; what the checkpoint was trained on unless given.
    seeds : how many seeds, at least 1.
    labels_per_class, mask_ratios : see :func:`crate_core.probe.linear_probes` and
        :func:`crate_core.reconstruction.reconstruction_by_ratio`.
    device, workers : where and with how many reading processes.
    command : what to record as the command.

    Returns
    -------
    A record ready for JSON: ``linear_probe`` (``None`` without labels), ``reconstruction``, counts and
    provenance.

    Raises
    ------
    FileNotFoundError, ValueError
        If checkpoint or data are not there or cannot be used.

    Book: :ref:`ch-first-training`.
    """
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: at least 1 is needed")
    model = load_model(checkpoint).to(device)
    spec, root = (data, "data") if data is not None else run_data(checkpoint)
    pictures = open_data(spec, root)
    labelled = pictures.train.labels is not None
    scores = linear_probes(model, pictures, range(seeds), labels_per_class, workers) if labelled else None
    mean_picture = some_pictures(pictures.train, model.config).mean(dim=0)
    held_out = some_pictures(pictures.held_out, model.config)
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
            f"  {score['mask_ratio']:<28g}{score['loss']:>10.4f}"
            f"{score['psnr']:>12.2f}{score['mean_picture_psnr']:>24.2f}"
        )
    return lines


def save_evaluation(record: dict[str, Any], path: str | Path) -> None:
    """Write the record as JSON, whole or not at all."""
    write_json(Path(path), record)
