r"""A linear classifier on very many cached features, by stochastic gradients: MAE's
linear probe.

Book: :ref:`ch-evaluation`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import Tensor, nn

from crate_core.checks import (
    check_choice,
    check_integer,
    check_number,
    is_number,
    require,
    store,
)
from crate_core.keys import Stream, random_generator
from crate_core.training.recipe import warmup_cosine


@dataclass(frozen=True)
class LinearHeadConfig:
    """How :func:`fit_linear_head` trains.

    The values of MAE's linear probe (He et al., 2022, appendix A.1), but for the crops:
    there each epoch sees other crops and flips, here features are computed once.
    Raises ``ValueError`` for values out of range.
    """

    epochs: int = 90
    warmup_ratio: float = 1 / 9
    """Share of the epochs in which the learning rate rises linearly from zero."""
    batch_size: int = 16_384
    base_lrs: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    """Learning rates for 256 pictures, of which the validation split chooses."""
    optimizer: Literal["lars", "sgd"] = "lars"
    momentum: float = 0.9
    weight_decay: float = 0.0
    validation_share: float = 0.1
    most_validating: int = 50_000
    """Training pictures that validate are this share, at most this many."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "most_validating"):
            check_integer(self, name, least=1)
        check_number(self, "warmup_ratio", "a share in [0, 1)", 0, 1, "[)")
        rates = self.base_lrs
        some = isinstance(rates, list | tuple) and len(rates) > 0
        positive = some and all(is_number(lr, 0, math.inf, "()") for lr in rates)
        require(self, "base_lrs", positive, "positive numbers, at least one")
        store(self, "base_lrs", tuple(rates))
        check_choice(self, "optimizer", ("lars", "sgd"))
        check_number(self, "validation_share", "a share in (0, 1)", 0, 1, "()")
        check_number(self, "momentum", "a number in [0, 1)", 0, 1, "[)")
        check_number(self, "weight_decay", "zero or a positive number", ends="[]")

    @property
    def warmup_epochs(self) -> float:
        """Epochs of warm-up, ``warmup_ratio * epochs``."""
        return self.warmup_ratio * self.epochs


class LinearHead(nn.Module):
    r"""Class scores :math:`W\,\mathrm{BN}(x) + b` of features (n, d), with batch
    normalisation that learns no scale and no shift.

    Parameters
    ----------
    dim : d, of the features.
    classes : number of classes C.
    generator : of the first weights, of standard deviation 0.01; torch's default where
        there is none.

    He et al. (2022), appendix A.1.
    """

    def __init__(
        self, dim: int, classes: int, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, eps=1e-6, affine=False)
        # the usual first weights would be drawn from the global state, and not used
        self.classify = nn.utils.skip_init(nn.Linear, dim, classes)
        nn.init.normal_(self.classify.weight, std=0.01, generator=generator)
        nn.init.zeros_(self.classify.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Features (n, d) to scores (n, C)."""
        return self.classify(self.norm(x))


@dataclass(frozen=True)
class FittedHead:
    """A fitted head, the learning rate that was chosen, and the validation accuracy of
    each rate, in [0, 1].
    """

    head: LinearHead
    base_lr: float
    validation: dict[float, float]


def batches(rows: np.ndarray, size: int, *keys: int) -> Iterator[np.ndarray]:
    """Rows in an order drawn anew for these keys, in batches of one size; each batch is
    sorted, which is the order in which a disk gives it fastest.  What does not fill a
    batch is left out, unless there is no other.
    """
    order = torch.randperm(len(rows), generator=random_generator(*keys)).numpy()
    size = min(size, len(rows))
    for start in range(0, len(rows) - size + 1, size):
        yield np.sort(rows[order[start : start + size]])


def on_device(features: np.ndarray, rows: np.ndarray, device: str) -> Tensor:
    """Some rows of (memory-mapped) features as float32 on a device."""
    return torch.from_numpy(np.ascontiguousarray(features[rows])).to(device).float()


def train_head(
    features: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray,
    classes: int,
    base_lr: float,
    config: LinearHeadConfig,
    seed: int,
    device: str,
) -> LinearHead:
    """One head trained on some rows at one learning rate, by a warm-up and a cosine."""
    drawn_from = random_generator(seed, Stream.PROBE, config.epochs)
    head = LinearHead(features.shape[1], classes, drawn_from).to(device)
    size = min(config.batch_size, len(rows))
    peak = base_lr * size / 256
    options: dict[str, Any] = {
        "momentum": config.momentum,
        "weight_decay": config.weight_decay,
    }
    optimizer: torch.optim.Optimizer = (
        Lars(head.parameters(), lr=peak, **options)
        if config.optimizer == "lars"
        else torch.optim.SGD(head.parameters(), lr=peak, **options)
    )
    steps = len(rows) // size
    head.train()
    for epoch in range(config.epochs):
        drawn = batches(rows, size, seed, Stream.PROBE, epoch)
        for step, chosen in enumerate(drawn):
            now = epoch + step / steps
            for group in optimizer.param_groups:
                group["lr"] = warmup_cosine(
                    now, peak, config.warmup_epochs, config.epochs
                )
            x = on_device(features, chosen, device)
            y = torch.from_numpy(labels[chosen]).to(device)
            loss = F.cross_entropy(head(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return head.eval()


@torch.no_grad()
def head_accuracy(
    head: LinearHead,
    features: np.ndarray,
    labels: np.ndarray,
    rows: np.ndarray | None = None,
    device: str = "cpu",
    chunk: int = 16_384,
) -> float:
    """Share of (some) rows whose highest score is their class, in [0, 1]."""
    rows = np.arange(len(labels)) if rows is None else rows
    right = 0
    for start in range(0, len(rows), chunk):
        some = rows[start : start + chunk]
        guess = head(on_device(features, some, device)).argmax(dim=1).cpu().numpy()
        right += int((guess == labels[some]).sum())
    return right / len(rows)


def fit_linear_head(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    config: LinearHeadConfig = LinearHeadConfig(),  # frozen
    seed: int = 0,
    device: str = "cpu",
) -> FittedHead:
    r"""A linear classifier on features, its learning rate chosen on training pictures
    that it was not fitted on, then fitted on all.

    .. math:: \min_{W, b}\ \frac1n \sum_i -\log \mathrm{softmax}(W\, \mathrm{BN}(x_i) +
              b)_{y_i}

    Memory is one batch of features, (d + classes) numbers a row, and three copies of W;
    the features may be a memory map of any length.

    Parameters
    ----------
    features : (n, d), also memory-mapped, of any floating type.
    labels : (n,) integers in [0, classes).
    classes : how many.
    config, seed, device : how, with which draws, where.

    Raises
    ------
    ValueError
        If labels and features do not fit, or there are too few to validate.

    Book: :ref:`ch-evaluation`.  MAE's protocol (He et al., 2022) on cached features.
    """
    if len(features) != len(labels) or len(labels) < 2:
        raise ValueError(
            f"{len(labels)} labels for {len(features)} rows: one for each is needed, "
            "and two rows at least"
        )
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels must be in 0 to {classes - 1}, got {labels.max()}")
    order = torch.randperm(
        len(labels), generator=random_generator(seed, Stream.PROBE)
    ).numpy()
    count = max(
        1, int(min(config.validation_share * len(labels), config.most_validating))
    )
    validating, fitting = np.sort(order[:count]), np.sort(order[count:])
    told = {
        lr: head_accuracy(
            train_head(features, labels, fitting, classes, lr, config, seed, device),
            features,
            labels,
            validating,
            device,
        )
        for lr in config.base_lrs
    }
    best = max(told, key=lambda lr: told[lr])
    head = train_head(
        features, labels, np.arange(len(labels)), classes, best, config, seed, device
    )
    return FittedHead(head, best, told)
