r"""Linear probes on frozen features, beside their controls.

A linear probe asks how much of the class a *linear* map reads off frozen features.  By
itself the figure says little: it stands beside the same encoder untrained (what the
architecture gives away for nothing) and raw pixels (what no encoder is needed for),
each fitted in the same way.

Book: :ref:`ch-first-training`.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedShuffleSplit
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from crate_core.data.batches import MAX_UNREADABLE
from crate_core.data.sources import ImageData, SelectedImages
from crate_core.evaluation.features import encode
from crate_core.evaluation.labels import few_labels, require_probe_labels
from crate_core.model.autoencoder import MaskedAutoencoder
from crate_core.model.build import fresh_model

INVERSE_REGULARIZATION = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Values of scikit-learn's C that a probe chooses from."""

CHOOSING = 10_000
"""Labels that C is chosen on, where there are more: a fifth of them validates.

C is the variance of a Gaussian prior on W.  More pictures add terms to the sum and
leave the prior as it is, so that a value chosen on some of them means the same on all.
"""


@dataclass(frozen=True)
class Score:
    """Accuracies of one probe over seeds, each in [0, 1]; ``std`` is the sample
    standard deviation (0 for one seed).
    """

    accuracies: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean accuracy over seeds."""
        return float(np.mean(self.accuracies))

    @property
    def std(self) -> float:
        """Sample standard deviation over seeds; 0 for one."""
        return (
            float(np.std(self.accuracies, ddof=1)) if len(self.accuracies) > 1 else 0.0
        )

    def to_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "std": self.std, "accuracies": list(self.accuracies)}


def probe_pipeline(inverse_regularization: float) -> Pipeline:
    """Columns scaled to mean 0 and variance 1, then multinomial logistic regression."""
    return make_pipeline(
        StandardScaler(), LogisticRegression(C=inverse_regularization, max_iter=500)
    )


def fit_probe(
    features: np.ndarray, labels: np.ndarray, seed: int
) -> tuple[Pipeline, float]:
    r"""Fit a linear probe, its regularisation chosen on a validation split of the very
    pictures it may fit on.

    .. math:: \min_{W, b}\ \tfrac12 \|W\|_F^2 + C \sum_i -\log \mathrm{softmax}(W x_i +
              b)_{y_i},

    C from ``INVERSE_REGULARIZATION`` by mean accuracy over stratified splits (a fifth
    held back; two fifths, ten times, where there are at most 500 labels; of
    ``CHOOSING`` labels where there are more), the smallest on a tie; with more than 500
    labels, weaker ones are not tried after the first fall.  Then refitted on all.
    Held-out pictures have no part in it: they are no argument.

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
    validating = 0.4 if scarce else 0.2
    shares: dict[str, Any] = {"test_size": validating}
    if len(labels) > CHOOSING:
        shares = {
            "test_size": int(validating * CHOOSING),
            "train_size": CHOOSING - int(validating * CHOOSING),
        }
    splits = StratifiedShuffleSplit(10 if scarce else 1, random_state=seed, **shares)
    folds = list(splits.split(features, labels))
    with warnings.catch_warnings():
        # Weak regularisation need not converge to be ruled out on the validation split.
        warnings.simplefilter("ignore", ConvergenceWarning)
        best, highest = INVERSE_REGULARIZATION[0], -1.0
        for c in INVERSE_REGULARIZATION:
            accuracy = np.mean(
                [
                    probe_pipeline(c)
                    .fit(features[a], labels[a])
                    .score(features[b], labels[b])
                    for a, b in folds
                ]
            )
            if accuracy > highest:
                best, highest = c, accuracy
            elif accuracy < highest and not scarce:
                break
        return probe_pipeline(best).fit(features, labels), best


def probe_accuracy(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    seed: int,
    labels_per_class: int | None = None,
) -> float:
    """Held-out accuracy in [0, 1] of :func:`fit_probe` on all labels, or on a few of
    each class drawn with ``seed``.
    """
    if labels_per_class is not None:
        chosen = few_labels(train_labels, labels_per_class, seed)
        train, train_labels = train[chosen], train_labels[chosen]
    fitted, _ = fit_probe(train, train_labels, seed)
    return float(fitted.score(test, test_labels))


@dataclass(frozen=True)
class Judge:
    """One column of a table of features: ``accuracy`` from (training features, their
    labels, held-out features, their labels, seed).

    ``draws`` says whether the seed changes anything; where it does not, the same
    features are judged once.
    """

    accuracy: Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int], float]
    draws: bool = True


def judge_features(
    model: MaskedAutoencoder,
    data: ImageData,
    seeds: Sequence[int],
    judges: Mapping[str, Judge],
    workers: int = 0,
    max_unreadable: float = MAX_UNREADABLE,
) -> dict[str, dict[str, Score]]:
    """What ``judges`` say of a model's features and of its controls', over seeds.

    Pictures are encoded once for the model and once for each untrained control; those
    that cannot be read are left out, with a warning that names them, and every accuracy
    is over the others.

    Parameters
    ----------
    model : the trained model.
    data : labelled pictures; judges fit on ``data.train`` and score ``data.held_out``.
    seeds : given to the judges; each also draws an untrained encoder's weights.
    judges : by the name of their column.
    max_unreadable : largest share of a part's pictures that may be unreadable.

    Returns
    -------
    {row: {column: Score}}, rows "trained, class token", "trained, mean of patches", the
    same "untrained", and "raw pixels".  A score has one accuracy a seed, and a single
    one where seeds change neither the features nor the judge.

    Raises
    ------
    ValueError
        If no picture of a part can be read, or too many cannot.

    Book: :ref:`ch-evaluation`.
    """
    device = next(model.parameters()).device
    parts = {"training": data.train, "held-out": data.held_out}
    trained = [
        encode(model, source, 256, workers, max_unreadable, part)
        for part, source in parts.items()
    ]
    # what cannot be read is named once, and not tried again for each control
    train_part, held_out_part = (
        SelectedImages(source, features.indices)
        for source, features in zip(parts.values(), trained, strict=True)
    )
    accuracies: dict[str, dict[str, list[float]]] = {}
    for seed in seeds:
        fresh = fresh_model(model.config, seed).to(device)
        control = (
            encode(fresh, train_part, workers=workers),
            encode(fresh, held_out_part, workers=workers),
        )
        rows = {
            "trained, class token": [part.class_token for part in trained],
            "trained, mean of patches": [part.patch_mean for part in trained],
            "untrained, class token": [part.class_token for part in control],
            "untrained, mean of patches": [part.patch_mean for part in control],
            "raw pixels": [part.pixels for part in trained],
        }
        for row, (train, test) in rows.items():
            for column, judge in judges.items():
                told = accuracies.setdefault(row, {}).setdefault(column, [])
                if told and not judge.draws and not row.startswith("untrained"):
                    continue  # the same features, and nothing to draw
                verdict = judge.accuracy(
                    train, trained[0].labels, test, trained[1].labels, seed
                )
                told.append(verdict)
    return {
        row: {column: Score(tuple(a)) for column, a in by.items()}
        for row, by in accuracies.items()
    }


def probe_judges(labels_per_class: int) -> dict[str, Judge]:
    """Linear probes on all labels and on a few a class, as columns of
    :func:`judge_features`.
    """
    return {
        "all labels": Judge(probe_accuracy),
        f"{labels_per_class} labels a class": Judge(
            partial(probe_accuracy, labels_per_class=labels_per_class)
        ),
    }


def linear_probes(
    model: MaskedAutoencoder,
    data: ImageData,
    seeds: Sequence[int] = range(5),
    labels_per_class: int = 5,
    workers: int = 0,
    max_unreadable: float = MAX_UNREADABLE,
) -> dict[str, dict[str, Score]]:
    """Linear probes of a model and of its controls, with all labels and with few a
    class: :func:`judge_features` with :func:`probe_judges`.

    A seed draws the few labels, the validation splits, and the untrained encoder's
    weights; the held-out pictures stay the same.

    Raises
    ------
    ValueError
        If the pictures have no labels, fewer than two classes, or too few of a class,
        or too many cannot be read.

    Book: :ref:`ch-first-training`.
    """
    require_probe_labels(data, labels_per_class)
    judges = probe_judges(labels_per_class)
    return judge_features(model, data, seeds, judges, workers, max_unreadable)
