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

from crate_core.keys import Stream, random_generator


@dataclass(frozen=True)
class LinearHeadConfig:
    """How :func:`fit_linear_head` trains.

    The values of MAE's linear probe (He et al., 2022, appendix A.1), but for the crops:
    there each epoch sees other crops and flips, here features are computed once.
    Raises ``ValueError`` for values out of range.
    """

    epochs: int = 90
    warmup_epochs: float = 10.0
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
        positive = ("epochs", "batch_size", "most_validating")
        for name in positive:
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name}={getattr(self, name)}: at least 1 is needed")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"warmup_epochs={self.warmup_epochs}: accepted is 0 to less than "
                f"epochs={self.epochs}"
            )
        if not self.base_lrs or not all(lr > 0 for lr in self.base_lrs):
            raise ValueError(f"base_lrs={self.base_lrs}: positive ones are needed")
        if self.optimizer not in ("lars", "sgd"):
            raise ValueError(f"optimizer={self.optimizer!r}: accepted are lars, sgd")
        if not 0 < self.validation_share < 1:
            raise ValueError(
                f"validation_share={self.validation_share}: accepted is above "
                "0, below 1"
            )
        if not 0 <= self.momentum < 1 or self.weight_decay < 0:
            raise ValueError(
                f"momentum={self.momentum}, weight_decay={self.weight_decay}: accepted "
                "are 0 to less than 1, and 0 or more"
            )


class LinearHead(nn.Module):
    r"""Class scores :math:`W\,\mathrm{BN}(x) + b` of features (n, d), with batch
    normalisation that learns no scale and no shift.
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
                group["lr"] = peak * schedule(now, config)
            x = on_device(features, chosen, device)
            y = torch.from_numpy(labels[chosen]).to(device)
            loss = F.cross_entropy(head(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return head.eval()


def schedule(epoch: float, config: LinearHeadConfig) -> float:
    """The learning rate at a point of the run, as a share of the highest: a line up to
    one, then half a cosine down to zero.
    """
    if epoch < config.warmup_epochs:
        return epoch / config.warmup_epochs
    left = (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return 0.5 * (1 + math.cos(math.pi * left))


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
