r"""The loss that is normal at each point of a run, by preset, and how it was measured.

Runs of an unchanged preset over seeds give the means of their logs' lines; around point
e (in epochs) of a run

.. math:: \bar\ell(e) \pm \big(4\, s(e) + 0.03\, \bar\ell(e)\big),

with the mean and standard deviation of single lines, of all seeds, whose epoch lies
within 15 % of e.  The band is a rule of thumb: its width was chosen by looking at a few
runs, so that a line outside is a reason to look, no proof.

Book: :ref:`ch-pretraining`.
"""

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

EXPECTED_FILE = Path(__file__).with_name("expected_loss.json")
"""Measured bands by preset; written by ``benchmarks/expected_loss.py``."""

POINTS = 16
"""Points of a band, evenly spaced in the logarithm of the epoch."""

WINDOW = 0.15
"""A point's window: lines whose epoch lies within this share of it."""


def loss_band(
    logs: Sequence[Sequence[Mapping[str, Any]]], points: int = POINTS
) -> list[dict[str, float]]:
    """The band of the module's formula from the metrics logs of one or more runs of one
    recipe.

    Parameters
    ----------
    logs : for each seed the lines of ``metrics.jsonl``, as dictionaries.
    points : how many at most; each at the epoch of a line.

    Returns
    -------
    list of ``epoch``, ``mean``, ``low``, ``high``; the last point is the runs' end.

    Raises
    ------
    ValueError
        If there is no log, or a log of fewer than two lines.

    Book: :ref:`ch-pretraining`.
    """
    if not logs or min(map(len, logs)) < 2:
        raise ValueError(
            "a band needs the logs of one run or more, of at least two lines each"
        )
    lines = [(line["epoch"], line["loss"]) for log in logs for line in log]
    first, last = (
        max(log[1]["epoch"] for log in logs),
        min(log[-1]["epoch"] for log in logs),
    )
    band = []
    wanted = (first * (last / first) ** (i / (points - 1)) for i in range(points))
    logged = [epoch for epoch, _ in lines]
    distances = [[abs(epoch - w) for epoch in logged] for w in wanted]
    for epoch in sorted({logged[row.index(min(row))] for row in distances}):
        near = [loss for e, loss in lines if abs(e - epoch) <= WINDOW * epoch]
        mean, spread = (
            statistics.fmean(near),
            statistics.stdev(near) if len(near) > 1 else 0.0,
        )
        width = 4 * spread + 0.03 * mean
        band.append(
            {"epoch": epoch, "mean": mean, "low": mean - width, "high": mean + width}
        )
    return [{name: round(value, 4) for name, value in point.items()} for point in band]


@cache
def measured() -> dict[str, Any]:
    """All measured bands by preset, each with the number of pictures and the seeds;
    empty if none was measured.
    """
    return (
        json.loads(EXPECTED_FILE.read_text(encoding="utf8"))["presets"]
        if EXPECTED_FILE.is_file()
        else {}
    )


def band_at(
    points: Sequence[Mapping[str, float]], epoch: float
) -> tuple[float, float] | None:
    """Low and high end of a band after ``epoch`` epochs, linear in the logarithm of the
    epoch between its points; ``None`` outside.

    Book: :ref:`ch-pretraining`.
    """
    # Half a step's epoch is lost in rounding at the end.
    if not points[0]["epoch"] <= epoch <= 1.01 * points[-1]["epoch"]:
        return None
    left, right = next(
        (pair for pair in itertools.pairwise(points) if epoch <= pair[1]["epoch"]),
        points[-2:],
    )
    share = min(
        1.0, math.log(epoch / left["epoch"]) / math.log(right["epoch"] / left["epoch"])
    )
    low, high = (
        left[name] + share * (right[name] - left[name]) for name in ("low", "high")
    )
    return low, high
