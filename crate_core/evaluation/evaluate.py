r"""Evaluation of a checkpoint: probes, neighbours, fine-tuning, each beside its
controls, and reconstruction.

Book: :ref:`ch-evaluation`.
"""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from crate_core.checks import check_instance, is_count
from crate_core.data.batches import MAX_UNREADABLE, some_batches
from crate_core.data.named import open_data
from crate_core.data.sources import ImageData, data_identity
from crate_core.data.understood import (
    readable,
    understood,
    unreadable_lines,
    with_labels,
)
from crate_core.evaluation.finetune import finetune_seeds
from crate_core.evaluation.finetune_recipe import FinetuneConfig
from crate_core.evaluation.labels import require_probe_labels
from crate_core.evaluation.neighbours import NEIGHBOURS, neighbour_judge
from crate_core.evaluation.probe import (
    Judge,
    Score,
    judge_features,
    probe_judges,
)
from crate_core.model.autoencoder import MaskedAutoencoder
from crate_core.model.build import load_model, pick_device
from crate_core.records import RUN_FILE, device_name, provenance, write_json
from crate_core.training.yardsticks import (
    mean_picture,
    reconstruction_by_ratio,
    removes_some,
)

EVALUATION_FILE = "evaluation.json"


def run_data(checkpoint: str | Path) -> tuple[str, str]:
    """The data a checkpoint was trained on and its root, from ``run.json`` beside it.

    Raises ``ValueError`` if there is no such record.
    """
    record = Path(checkpoint) / RUN_FILE
    if not record.is_file():
        raise ValueError(
            f"{checkpoint} has no {RUN_FILE} that says what it was trained on: "
            "give --data"
        )
    owner = json.loads(record.read_text(encoding="utf8"))
    spec, root = owner["config"]["data"], owner["config"]["data_root"]
    # Relative names count from where the run was started, if they lie there.
    start = Path(checkpoint) / owner.get("starts", [{}])[-1].get("started_from", ".")
    kind, colon, location = spec.partition(":")
    if (
        kind in ("folder", "shards", "hf")
        and not Path(location).expanduser().is_absolute()
    ):
        if (start / location).exists():
            spec = kind + colon + os.path.normpath(start / location)
        elif kind in ("folder", "shards") and not Path(location).exists():
            raise FileNotFoundError(
                f"{record} names the data {spec!r} relative to where the run was "
                f"started, and there is no such folder there or here: give --data"
            )
    return spec, str(start / root) if (start / root).exists() else root


def open_for(
    checkpoint: str | Path | MaskedAutoencoder, data: str | None
) -> tuple[str, ImageData]:
    """The data that a checkpoint is judged on, by name and opened: ``data``, or what it
    was trained on.

    What a run that streamed its data held out is held out here.  ``notes`` say so where
    a run trained on other pictures than the data now gives to train on: what is held
    out now may have been among them.

    Raises
    ------
    FileNotFoundError, ValueError
        If the data are not there or cannot be used, or are neither given nor recorded.

    Book: :ref:`ch-evaluation`.
    """
    if isinstance(checkpoint, MaskedAutoencoder):
        if data is None:
            raise ValueError("a model does not say what it was trained on: give data")
        return data, open_data(data)
    spec, root = (data, "data") if data is not None else run_data(checkpoint)
    path = Path(checkpoint) / RUN_FILE
    if not path.is_file():
        return spec, open_data(spec, root)
    run = json.loads(path.read_text(encoding="utf8"))
    streamed = bool(run["config"].get("streaming"))
    opened = open_data(spec, root, streamed=streamed and spec.startswith("hf:"))
    recorded = run.get("identity", {})
    now = data_identity(opened)
    if streamed:  # rows of a stream have other names
        now = {"training pictures": len(opened.train)}
    if data is None and any(recorded.get(name, now[name]) != now[name] for name in now):
        note = (
            f"the run trained on {recorded.get('training pictures'):,} pictures, and "
            f"these are not the {len(opened.train):,} that the data now gives to train "
            "on: it may have seen what is held out"
        )
        opened = replace(opened, notes=(*opened.notes, note))
    return spec, opened


def evaluate(
    checkpoint: str | Path | MaskedAutoencoder,
    data: str | None = None,
    seeds: int = 5,
    labels_per_class: int = 5,
    mask_ratios: Sequence[float] = (0.25, 0.5, 0.75, 0.875),
    probe: bool = True,
    neighbours: bool = True,
    fine_tuning: FinetuneConfig | None = None,
    device: str = "auto",
    workers: int = 0,
    command: str = "crate_core.evaluation.evaluate.evaluate",
    max_unreadable: float = MAX_UNREADABLE,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Evaluate a checkpoint beside its controls: an untrained network, and pixels.

    Parameters
    ----------
    checkpoint : directory, bundled name, Hub id or a model, as
        :func:`crate_core.model.build.load_model` takes.
    data : as :func:`crate_core.data.named.open_data` takes; what the checkpoint was
        trained on unless given.  A model needs it.
    seeds : how many seeds, at least 1.
    labels_per_class : for the probes' second column, see
        :func:`crate_core.evaluation.probe.linear_probes`.
    mask_ratios : where reconstruction is measured, see
        :func:`crate_core.training.yardsticks.reconstruction_by_ratio`; none leaves it
        out.
    probe, neighbours : fit linear probes, and let nearest neighbours vote; both need
        labels.
    fine_tuning : also fine-tune the model, and the same network from scratch, once for
        each of its own seeds, on this evaluation's pictures; ``None`` does not.
    device, workers : where, "auto" for the best that there is, and with how many
        reading processes.
    command : what to record as the command.
    max_unreadable : largest share of a part's pictures that may be unreadable.
    report : gets what was understood of the data, before the work.

    Returns
    -------
    A record ready for JSON: ``linear_probe``, ``neighbours`` ({row: {column: mean, std,
    accuracies}}), ``fine_tuning`` and ``reconstruction``, each ``None`` or empty where
    it was left out or there are no labels; counts, ``seconds`` of each part, and
    provenance.

    Raises
    ------
    FileNotFoundError, ValueError
        If checkpoint or data are not there or cannot be used, or fine-tuning is asked
        for without labels.

    Book: :ref:`ch-evaluation`.
    """
    if not is_count(seeds):
        raise ValueError(f"seeds={seeds!r}: at least 1 is needed")
    if fine_tuning is not None:
        check_instance("fine_tuning", fine_tuning, FinetuneConfig, "a FinetuneConfig")
    device = pick_device(device)
    model = load_model(checkpoint).to(device)
    spec, opened = open_for(checkpoint, data)
    for line in understood(opened):
        report(line)
    patches = math.prod(model.config.grid)
    possible = [ratio for ratio in mask_ratios if removes_some(ratio, patches)]
    if impossible := [ratio for ratio in mask_ratios if ratio not in possible]:
        report(f"masking ratios left out, too fine for the patches: {impossible}")
    labelled = with_labels(opened)
    if labelled is not None and (probe or neighbours or fine_tuning is not None):
        require_probe_labels(labelled, labels_per_class)
    elif fine_tuning is not None:
        raise ValueError(
            "fine-tuning needs labels of at least two classes (class folders, or a "
            "label column); these pictures have none"
        )
    elif probe or neighbours:
        report("no labels of two classes: probes and neighbours are left out")
    found = readable(
        opened, model.config.image_shape, model.config.channels, max_unreadable, workers
    )
    for line in found.lines():
        report(line)
    pictures, labelled = found.data, with_labels(found.data)

    clock = Stopwatch()
    judges: dict[str, Judge] = probe_judges(labels_per_class) if probe else {}
    if neighbours:
        judges[f"{NEIGHBOURS} neighbours"] = neighbour_judge(device)
    judged = (
        judge_features(model, labelled, range(seeds), judges, workers)
        if labelled is not None and judges
        else {}
    )
    clock.lap("features, probes and neighbours")
    tuned = (
        None
        if fine_tuning is None or labelled is None
        else compare_fine_tuning(model, labelled, fine_tuning)
    )
    clock.lap("fine-tuning")
    mean = mean_picture(some_batches(pictures.train, model.config))
    held_out = some_batches(pictures.held_out, model.config)
    by_ratio = reconstruction_by_ratio(model, held_out, mean, possible)
    clock.lap("reconstruction")
    return {
        "data": spec,
        "description": pictures.description,
        "notes": list(pictures.notes),
        "train": len(pictures.train),
        "held_out": len(pictures.held_out),
        "labelled": None
        if labelled is None
        else {"train": len(labelled.train), "held_out": len(labelled.held_out)},
        "unreadable": found.unreadable,
        "classes": len(pictures.classes),
        "seeds": list(range(seeds)),
        "linear_probe": columns_of(judged, probe_judges(labels_per_class).keys()),
        "neighbours": columns_of(judged, {f"{NEIGHBOURS} neighbours"}),
        "fine_tuning": tuned,
        "reconstruction": [asdict(score) for score in by_ratio],
        "seconds": clock.laps,
        **provenance(command, device_name(torch.device(device))),
    }


class Stopwatch:
    """Seconds of parts, one after another."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Give the time since the last lap to ``name``."""
        now = time.perf_counter()
        self.laps[name], self.last = round(now - self.last, 2), now


def columns_of(
    judged: Mapping[str, Mapping[str, Score]], names: Collection[str]
) -> dict[str, Any] | None:
    """Some columns of a table of scores, ready for JSON; ``None`` if none of them is
    there.
    """
    chosen = {
        row: {c: score.to_dict() for c, score in by.items() if c in names}
        for row, by in judged.items()
    }
    return chosen if any(chosen.values()) else None


def compare_fine_tuning(
    model: MaskedAutoencoder, data: ImageData, config: FinetuneConfig
) -> dict[str, Any]:
    """Held-out accuracy after fine-tuning, and after the same training from scratch,
    once for each seed of ``config``; nothing of the runs is kept.

    From scratch all layers learn at the same rate, whatever ``config.layer_decay``.
    ``model`` is left as it is.

    Returns
    -------
    {"scores": {"pretrained", "from scratch"}, "config"}, ready for JSON.

    Book: :ref:`ch-evaluation`.
    """
    scores = {}
    for row, fresh in (("pretrained", False), ("from scratch", True)):
        with tempfile.TemporaryDirectory() as scratch:
            own = replace(config, from_scratch=fresh, output_dir=scratch)
            results = finetune_seeds(
                own, False, lambda line: None, model=model, data=data
            )
        scores[row] = Score(tuple(result.accuracy for result in results)).to_dict()
    placed = ("data", "from_scratch", "seed")
    chosen = {k: v for k, v in config.identity().items() if k not in placed}
    return {"scores": scores, "config": chosen}


def table(record: dict[str, Any]) -> list[str]:
    """The record of :func:`evaluate` in lines of text."""
    lines = [record["description"]]
    judged = (record["labelled"] or record)["held_out"]
    over = (
        f"accuracy in % on {judged:,} held-out pictures, mean and standard "
        "deviation over "
    )
    over += f"{len(record['seeds'])} seeds"
    rows: dict[str, dict[str, Any]] = {}
    for part in ("linear_probe", "neighbours"):
        for row, columns in (record[part] or {}).items():
            rows.setdefault(row, {}).update(columns)
    tuned = record["fine_tuning"]
    if rows:
        lines += [f"linear probes and nearest neighbours, {over}", *score_lines(rows)]
    else:
        lines.append("linear probes and nearest neighbours: left out, or no labels")
    if tuned is not None:
        runs = len(tuned["scores"]["pretrained"]["accuracies"])
        over_runs = over.replace(f"{len(record['seeds'])} seeds", f"{runs} seeds")
        rows = {row: {"fine-tuned": score} for row, score in tuned["scores"].items()}
        lines += [
            f"after {tuned['config']['epochs']:g} epochs with labels, {over_runs}",
            *score_lines(rows),
        ]
    if record["reconstruction"]:
        lines.append("reconstruction of removed patches by masking ratio")
        lines.append(
            f"  {'masking ratio':28}{'loss':>10}{'PSNR, dB':>12}"
            f"{'of the mean picture':>24}"
        )
    for score in record["reconstruction"]:
        lines.append(
            f"  {score['mask_ratio']:<28g}{score['loss']:>10.4f}"
            f"{score['psnr']:>12.2f}{score['mean_picture_psnr']:>24.2f}"
        )
    lines += unreadable_lines(record["unreadable"])
    lines.append(
        "seconds: "
        + ", ".join(f"{name} {value:.0f}" for name, value in record["seconds"].items())
    )
    return lines


def score_lines(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Rows of scores as lines under a head of column names."""
    columns = list(next(iter(rows.values())))
    lines = [f"  {'':28}" + "".join(f"{column:>22}" for column in columns)]
    for row, by in rows.items():
        cells = [
            f"{100 * by[column]['mean']:.1f}"
            # one value has no spread
            + (
                f" ± {100 * by[column]['std']:.1f}"
                if len(by[column]["accuracies"]) > 1
                else ""
            )
            for column in columns
        ]
        lines.append(f"  {row:28}" + "".join(f"{cell:>22}" for cell in cells))
    return lines


def save_evaluation(record: dict[str, Any], path: str | Path) -> None:
    """Write the record as JSON, whole or not at all."""
    write_json(Path(path), record)
