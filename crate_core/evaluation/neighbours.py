r"""Classification by nearest neighbours: features judged without fitting anything to
them.

Book: :ref:`ch-evaluation`.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from crate_core.data.sources import ImageData, SelectedImages, spread_rows
from crate_core.evaluation.features import encode
from crate_core.evaluation.probe import Judge
from crate_core.model.autoencoder import MaskedAutoencoder

NEIGHBOURS = 20
"""How many neighbours vote.  Fixed beforehand: choosing it on held-out pictures would
use their labels.
"""

TEMPERATURE = 0.07
"""Temperature of the votes, as in the protocol's source."""


def neighbour_votes(
    train: np.ndarray,
    labels: np.ndarray,
    test: np.ndarray,
    classes: int,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    chunk: int = 512,
    block: int = 65_536,
    device: str = "cpu",
) -> np.ndarray:
    r"""Votes (m, classes) of the k nearest training rows for each test row,

    .. math:: v_c(x) = \sum_{i \in \mathcal N_k(x)} \mathbb 1[y_i = c]\,
              \exp\big(\cos(x, x_i) / \tau\big),

    nearest by cosine; scaled so that the nearest has weight one, which changes no
    winner.

    Parameters
    ----------
    train : (n, d) features.
    labels : (n,) integers in [0, classes).
    test : (m, d) features.
    classes : how many there are.
    neighbours : k, at least 1; all rows vote if there are fewer.
    temperature : tau, positive.  Towards 0 the nearest decides alone, for large ones
        all k count alike.
    chunk, block : test and training rows at a time; memory is chunk x block
        similarities, whatever n is.
    device : where the products are computed.

    Raises
    ------
    ValueError
        If k or tau is out of range, there is no training row, or labels and features do
        not fit.

    Book: :ref:`ch-evaluation`.  The weighted vote of Wu et al. (2018), as in DINO's
    evaluation (Caron et al., 2021).
    """
    if neighbours < 1 or not temperature > 0:
        raise ValueError(
            f"neighbours={neighbours}, temperature={temperature}: accepted are "
            "1 or more, and above 0"
        )
    if (
        len(train) == 0
        or len(labels) != len(train)
        or labels.min() < 0
        or labels.max() >= classes
    ):
        raise ValueError(
            f"{len(labels)} labels for {len(train)} rows: one is needed for "
            f"each, in 0 to {classes - 1}, and one row"
        )
    k = min(neighbours, len(train))
    targets = torch.from_numpy(labels)
    votes = torch.zeros(len(test), classes)
    for rows in np.array_split(np.arange(len(test)), max(1, -(-len(test) // chunk))):
        similarity, nearest = nearest_rows(train, test[rows], k, block, device)
        weights = torch.exp((similarity - similarity[:, :1]) / temperature)
        votes[rows] = votes[rows].scatter_add(1, targets[nearest], weights)
    return votes.numpy()


def nearest_rows(
    train: np.ndarray, asked: np.ndarray, k: int, block: int, device: str
) -> tuple[Tensor, Tensor]:
    """Cosines (m, k) of the k nearest training rows of each row asked, in falling
    order, and their numbers; training rows are visited in blocks.
    """
    found = F.normalize(unit_input(asked, device), dim=1)
    best = torch.full((len(asked), k), -torch.inf, device=device)
    number = torch.zeros(len(asked), k, dtype=torch.int64, device=device)
    for start in range(0, len(train), block):
        known = F.normalize(unit_input(train[start : start + block], device), dim=1)
        cosines = found @ known.T
        ours = torch.arange(start, start + len(known), device=device)
        all_cosines = torch.cat([best, cosines], dim=1)
        all_numbers = torch.cat([number, ours.expand(len(asked), -1)], dim=1)
        best, chosen = all_cosines.topk(k, dim=1)
        number = all_numbers.gather(1, chosen)
    return best.cpu(), number.cpu()


def unit_input(rows: np.ndarray, device: str) -> Tensor:
    """Rows as float32 on a device, whatever they are stored as."""
    return torch.from_numpy(np.asarray(rows, dtype=np.float32)).to(device)


def neighbour_accuracy(
    train: np.ndarray,
    train_labels: np.ndarray,
    test: np.ndarray,
    test_labels: np.ndarray,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    device: str = "cpu",
) -> float:
    """Share of test rows whose most voted class (:func:`neighbour_votes`) is theirs, in
    [0, 1].

    Book: :ref:`ch-evaluation`.
    """
    votes = neighbour_votes(
        train,
        train_labels,
        test,
        int(train_labels.max()) + 1,
        neighbours,
        temperature,
        device=device,
    )
    return float((votes.argmax(axis=1) == test_labels).mean())


def held_out_neighbours_check(data: ImageData) -> None:
    """``ValueError`` unless both parts of the data have labels."""
    if data.train.labels is None or data.held_out.labels is None:
        raise ValueError("neighbours vote for labels; these pictures have none")


def held_out_neighbours(
    model: MaskedAutoencoder, data: ImageData, most: int = 20_000
) -> dict[str, float]:
    """What a pretraining run's ``evaluators`` may name: the share of held-out pictures
    that neighbours among training pictures classify by their class tokens.

    At most ``most`` pictures of each part are encoded, spread evenly.  ``ValueError``
    if the pictures have no labels.
    """
    held_out_neighbours_check(data)
    parts = []
    for source in (data.train, data.held_out):
        chosen = spread_rows(source, most)
        parts.append(encode(model, SelectedImages(source, chosen)))
    train, held_out = parts
    return {
        "neighbours": neighbour_accuracy(
            train.class_token, train.labels, held_out.class_token, held_out.labels
        )
    }


def neighbour_judge(device: str = "cpu") -> Judge:
    """:func:`neighbour_accuracy` as a column of
    :func:`crate_core.evaluation.probe.judge_features`; a seed changes nothing.
    """

    def accuracy(
        train: np.ndarray,
        labels: np.ndarray,
        test: np.ndarray,
        test_labels: np.ndarray,
        seed: int,
    ) -> float:
        del seed
        return neighbour_accuracy(train, labels, test, test_labels, device=device)

    return Judge(accuracy, draws=False)
