r"""``crate probe``: how much of the class a linear map, and the nearest neighbours,
read off a checkpoint's features, at any number of pictures.

Book: :ref:`ch-evaluation`.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from accelerate import PartialState

from crate_core.checks import check_instance, is_count
from crate_core.data.batches import MAX_UNREADABLE
from crate_core.data.understood import understood, with_labels
from crate_core.evaluation.evaluate import open_for
from crate_core.evaluation.features import Features, cached_features
from crate_core.evaluation.labels import class_count
from crate_core.evaluation.linear_head import (
    LinearHeadConfig,
    fit_linear_head,
    head_accuracy,
)
from crate_core.evaluation.neighbours import NEIGHBOURS, neighbour_accuracy
from crate_core.evaluation.probe import Score, probe_accuracy
from crate_core.model.autoencoder import MaskedAutoencoder
from crate_core.model.build import (
    fresh_model,
    load_model,
    pick_device,
    processes_on_cpu,
)
from crate_core.records import device_name, provenance
from crate_core.training.recipe import Precision

Solver = Literal["auto", "sklearn", "sgd"]
"""scikit-learn's logistic regression (the authors' protocol), or stochastic gradients
(MAE's); auto takes the second above ``MANY`` training pictures.
"""

MANY = 50_000

FEATURES = ("class_token", "patch_mean")


def probe_checkpoint(
    checkpoint: str | Path | MaskedAutoencoder,
    data: str | None = None,
    *,
    cache: str | Path = "features",
    solver: Solver = "auto",
    features: Sequence[str] = FEATURES,
    head: LinearHeadConfig = LinearHeadConfig(),  # noqa: B008  # frozen
    neighbours: bool = True,
    controls: bool = False,
    seeds: int = 1,
    precision: Precision = "fp32",
    batch_size: int = 256,
    device: str = "auto",
    workers: int = 0,
    command: str = "crate_core.evaluation.probing.probe_checkpoint",
    max_unreadable: float = MAX_UNREADABLE,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Linear probe and nearest neighbours on features that are computed once.

    Under ``torchrun`` or ``accelerate launch`` every process encodes its share of the
    pictures; the first one fits.

    Parameters
    ----------
    checkpoint, data, device, workers : as of
        :func:`crate_core.evaluation.evaluate.evaluate`.
    cache : where features are kept (:func:`cached_features`); the same checkpoint and
        pictures are never encoded twice.
    solver : see ``Solver``.
    features : "class_token", "patch_mean", or both.
    head : how stochastic gradients train.
    neighbours : also let the nearest neighbours vote, once: no seed changes them.
    controls : also judge the same network untrained, and the pixels.
    seeds : of validation split, order and first weights; and of the untrained network.
    precision, batch_size : of the encoder.
    max_unreadable : largest share of a part's pictures that may be unreadable.

    Returns
    -------
    A record ready for JSON on the first process: ``scores`` {row: {column: mean, std,
    accuracies}}, ``chosen`` (what the validation split chose), counts, provenance; an
    empty one on the others.

    Raises
    ------
    FileNotFoundError, ValueError
        If checkpoint or data are not there or cannot be used, or have no labels.

    Book: :ref:`ch-evaluation`.
    """
    if solver not in get_args(Solver):
        raise ValueError(
            f"solver={solver!r}: accepted are {', '.join(get_args(Solver))}"
        )
    if unknown := [name for name in features if name not in FEATURES] or not features:
        raise ValueError(f"features={unknown}: accepted are {', '.join(FEATURES)}")
    if not is_count(seeds):
        raise ValueError(f"seeds={seeds!r}: at least 1 is needed")
    check_instance("head", head, LinearHeadConfig, "a LinearHeadConfig")
    # the others wait while the first process fits, longer than the usual ten minutes
    processes = PartialState(cpu=processes_on_cpu(device), timeout=timedelta(days=1))
    place = (
        pick_device(device) if processes.num_processes == 1 else str(processes.device)
    )
    model = load_model(checkpoint).to(place)
    spec, opened = open_for(checkpoint, data)
    if processes.is_main_process:
        for line in understood(opened):
            report(line)
    labelled = with_labels(opened)
    if labelled is None:
        raise ValueError(
            "a probe needs labels of at least two classes (class folders, or a label "
            "column)"
        )
    classes = class_count(labelled)

    store = partial(
        cached_features,
        cache=cache,
        precision=precision,
        pixels=controls,
        batch_size=batch_size,
        workers=workers,
        process=processes.process_index,
        processes=processes.num_processes,
        max_unreadable=max_unreadable,
    )

    def encoded(network: MaskedAutoencoder) -> tuple[Features, Features]:
        parts = {"training": labelled.train, "held-out": labelled.held_out}
        for part, source in parts.items():
            store(network, source, part=part)
        # after all have written their rows, all can read all
        processes.wait_for_everyone()
        return store(network, labelled.train), store(network, labelled.held_out)

    networks = {"trained": [model]}
    if controls:
        networks["untrained"] = [
            fresh_model(model.config, seed).to(place) for seed in range(seeds)
        ]
    told: dict[str, dict[str, list[float]]] = {}
    chosen: dict[str, Any] = {}
    counts: dict[str, Any] = {}
    for kind, members in networks.items():
        for number, network in enumerate(members):
            train, test = encoded(network)
            if not processes.is_main_process:
                continue
            counts = {
                "train": len(train.labels),
                "held_out": len(test.labels),
                "unreadable": [*train.unreadable, *test.unreadable],
            }
            rows = {f"{kind}, {name}": name for name in features}
            if controls and kind == "trained":
                rows["raw pixels"] = "pixels"
            for row, name in rows.items():
                columns = told.setdefault(row, {})
                seeds_here = [number] if kind == "untrained" else range(seeds)
                for seed in seeds_here:
                    accuracy, how = linear_accuracy(
                        getattr(train, name),
                        train.labels,
                        getattr(test, name),
                        test.labels,
                        classes,
                        solver,
                        head,
                        seed,
                        place,
                    )
                    columns.setdefault("linear", []).append(accuracy)
                    chosen.setdefault(row, []).append(how)
                    report(f"{row}: linear probe {100 * accuracy:.1f} %, {how}")
                if neighbours:
                    voted = neighbour_accuracy(
                        getattr(train, name),
                        train.labels,
                        getattr(test, name),
                        test.labels,
                        device=place,
                    )
                    columns.setdefault(f"{NEIGHBOURS} neighbours", []).append(voted)
                    report(f"{row}: {NEIGHBOURS} neighbours {100 * voted:.1f} %")
    if not processes.is_main_process:
        return {}
    return {
        "data": spec,
        "description": opened.description,
        "notes": list(opened.notes),
        **counts,
        "classes": classes,
        "solver": solver,
        "head": asdict(head),
        "scores": {
            row: {name: Score(tuple(a)).to_dict() for name, a in columns.items()}
            for row, columns in told.items()
        },
        "chosen": chosen,
        **provenance(command, device_name(torch.device(place))),
    }


def linear_accuracy(
    train: Any,
    train_labels: Any,
    test: Any,
    test_labels: Any,
    classes: int,
    solver: Solver,
    head: LinearHeadConfig,
    seed: int,
    device: str,
) -> tuple[float, str]:
    """Held-out accuracy in [0, 1] of a linear probe by one of the solvers, and what its
    validation split chose, in words.
    """
    if solver == "sklearn" or (solver == "auto" and len(train_labels) <= MANY):
        accuracy = probe_accuracy(train, train_labels, test, test_labels, seed)
        return accuracy, "scikit-learn, C by validation"
    fitted = fit_linear_head(train, train_labels, classes, head, seed, device)
    accuracy = head_accuracy(fitted.head, test, test_labels, device=device)
    rates = ", ".join(f"{lr:g}: {100 * a:.1f}" for lr, a in fitted.validation.items())
    return accuracy, f"base_lr {fitted.base_lr:g} of (validation, %) {rates}"
