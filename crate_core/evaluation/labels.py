r"""Labels that an evaluation can use: how many classes there are, and a few of each.

Book: :ref:`ch-evaluation`.
"""

import numpy as np

from crate_core.data.sources import ImageData


def few_labels(labels: np.ndarray, per_class: int, seed: int) -> np.ndarray:
    """Indices of ``per_class`` pictures of each class, drawn with ``seed``, sorted.

    Raises ``ValueError`` naming a class that has fewer.
    """
    generator = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < per_class:
            raise ValueError(
                f"class {label} has {len(members)} training pictures, "
                f"{per_class} labels a class are asked"
            )
        chosen.append(generator.choice(members, per_class, replace=False))
    return np.sort(np.concatenate(chosen))


def class_count(data: ImageData) -> int:
    """How many classes the labels of both parts speak of.

    Raises ``ValueError`` unless every picture of both parts has a label, held-out ones
    of classes that there are to train on, and there are at least two classes.
    """
    parts = {"training": data.train.labels, "held-out": data.held_out.labels}
    for part, labels in parts.items():
        if labels is None:
            raise ValueError(
                "labels are needed (class folders, or a label column); these "
                f"{part} pictures have none"
            )
        if len(labels) and labels.min() < 0:
            raise ValueError(
                f"label {labels.min()} of a {part} picture: classes are "
                "counted from 0, none may be missing"
            )
    train, held_out = (
        np.unique(labels) for labels in parts.values() if labels is not None
    )
    if len(train) < 2:
        raise ValueError("at least two classes are needed, these pictures have one")
    strange = np.setdiff1d(held_out, train)
    if len(strange):
        first = strange[0]
        such = data.classes[first] if first < len(data.classes) else first
        raise ValueError(
            f"held-out pictures have {len(strange)} classes that no training "
            f"picture has, such as {such}: "
            f"{len(held_out)} classes held out, {len(train)} to train on"
        )
    named = len(data.classes)
    if named and train[-1] >= named:
        raise ValueError(
            f"label {train[-1]} is out of range: the data names {named} "
            "classes, counted from 0"
        )
    return max(named, int(train[-1]) + 1)


def require_probe_labels(data: ImageData, labels_per_class: int) -> None:
    """``ValueError`` unless both parts have labels of at least two classes, and enough
    of each to probe.
    """
    class_count(data)
    if labels_per_class < 2:
        raise ValueError(
            f"labels_per_class={labels_per_class}: at least 2 are needed, one "
            "to fit and one to validate"
        )
    classes, counts = np.unique(np.asarray(data.train.labels), return_counts=True)
    if counts.min() < labels_per_class:
        rare = int(classes[counts.argmin()])
        raise ValueError(
            f"class {rare} has {counts.min()} training pictures, "
            f"labels_per_class={labels_per_class}"
        )
