r"""Runs compared in pairs: the records of a study, differences seed by seed, and what
they decide.

Two arms that share a seed share pictures, their order and their masks (common random
numbers), so that the *difference* of a pair varies less than either arm, and is what is
averaged and tested.  With n pairs no exact two-sided test can give less than
:math:`2 / 2^n`: four pairs never reach 5 %, six do, and seven are the fewest that pass
Holm's correction of three measures.

Book: :ref:`ch-comparison`.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

MOST_EXACT = 20
"""Most pairs whose :math:`2^n` sign patterns are gone through one by one."""


@dataclass(frozen=True)
class PairedDifference:
    """Differences of paired runs in the order of their seeds: ``mean``, the interval
    ``low`` to ``high``, and the two-sided p-values of both exact tests.
    """

    seeds: tuple[int, ...]
    differences: tuple[float, ...]
    mean: float
    low: float
    high: float
    p_sign_flip: float
    p_sign: float


def read_runs(folder: str | Path) -> list[dict[str, Any]]:
    """Every record (``*.json``) of a folder, by name.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    ValueError
        If a file is not JSON; the file is named.

    Book: :ref:`ch-comparison`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} of runs")
    records = []
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(json.loads(path.read_text(encoding="utf8")))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
    return records


def by_seed(
    runs: Iterable[Mapping[str, Any]],
    measure: str,
    part: str = "test",
    epoch: float | None = None,
    gain: bool = False,
    **wanted: Any,
) -> dict[int, float]:
    r"""One measure of chosen runs, by seed.

    .. math:: m_s(e) \quad\text{or, as a gain,}\quad m_s(e) - m_s(0)

    with epoch 0 the same network untrained.

    Parameters
    ----------
    runs : records of ``benchmarks/study.py``.
    measure : "loss", "probe" or "neighbours".
    part : "validation" or "test" pictures.
    epoch : of the evaluation; the last one if ``None``.
    gain : less the value at epoch 0.
    wanted : fields that a record must have, such as ``stage=2, arm="crate-all"``.

    Raises
    ------
    ValueError
        If two chosen runs have one seed, or a run has no such evaluation or measure.

    Book: :ref:`ch-comparison`.
    """
    found: dict[int, float] = {}
    for run in runs:
        if any(run.get(name) != value for name, value in wanted.items()):
            continue
        seed = int(run["seed"])
        if seed in found:
            raise ValueError(f"two runs of seed {seed} fit {wanted}: say more of them")
        values = {
            float(score["epoch"]): score[part][measure]
            for score in run["scores"]
            if measure in score.get(part, {})
        }
        last = max(values, default=math.nan) if epoch is None else float(epoch)
        absent = [e for e in (last, *([0.0] if gain else [])) if e not in values]
        if absent:
            raise ValueError(
                f"{run['name']} has no {measure} of {part} pictures at epoch "
                f"{absent[0]:g}; there are {sorted(values)}"
            )
        found[seed] = values[last] - (values[0.0] if gain else 0.0)
    return found


def sign_flip_p(differences: Sequence[float]) -> float:
    r"""Exact two-sided p-value of the mean under flipped signs,

    .. math:: p = 2^{-n}\, \#\Big\{ s \in \{-1, 1\}^n :
              \Big|\sum_i s_i d_i\Big| \ge \Big|\sum_i d_i\Big| \Big\}.

    Exact where each difference is as likely as its negative: the two arms could be
    exchanged within a pair.

    Raises ``ValueError`` for fewer than two or more than ``MOST_EXACT`` differences.

    Book: :ref:`ch-comparison`.
    """
    if not 2 <= len(differences) <= MOST_EXACT:
        raise ValueError(
            f"{len(differences)} differences: accepted are 2 to {MOST_EXACT}"
        )
    # all 2^n patterns, as n_resamples is no smaller; two-sided as twice the smaller
    # tail, which is the same here: flipping all signs mirrors the distribution
    done = stats.permutation_test(
        (np.asarray(differences, dtype=float),),
        np.mean,
        permutation_type="samples",
        n_resamples=2 ** len(differences),
    )
    return float(done.pvalue)


def sign_p(differences: Sequence[float]) -> float:
    """Exact two-sided sign test: that as few or as many of the differences that are not
    zero are positive, if both signs are as likely; 1 if all are zero.

    Book: :ref:`ch-comparison`.
    """
    signs = [d > 0 for d in differences if d != 0]
    return float(stats.binomtest(sum(signs), len(signs)).pvalue) if signs else 1.0


def paired_difference(
    first: Mapping[int, float], second: Mapping[int, float], level: float = 0.95
) -> PairedDifference:
    r"""First less second, seed by seed: :math:`d_s = a_s - b_s`, their mean, Student's
    interval

    .. math:: \bar d \pm t_{n-1,\,(1 + \text{level})/2}\,
              \frac{\mathrm{sd}(d)}{\sqrt n},

    and :func:`sign_flip_p` and :func:`sign_p` of them.

    Parameters
    ----------
    first, second : values by seed; the same two or more seeds.
    level : of the interval, in (0, 1).

    Raises
    ------
    ValueError
        If seeds differ (those without a partner are named), there are fewer than two,
        or ``level`` is out of range.

    Book: :ref:`ch-comparison`.
    """
    if alone := first.keys() ^ second.keys():
        raise ValueError(f"seeds {sorted(alone)} have no partner in the other arm")
    if not 0 < level < 1:
        raise ValueError(f"level={level}: accepted is a share in (0, 1)")
    seeds = tuple(sorted(first))
    differences = np.array([first[seed] - second[seed] for seed in seeds])
    p = sign_flip_p(differences.tolist())
    mean = float(differences.mean())
    error = float(differences.std(ddof=1)) / math.sqrt(len(seeds))
    half = float(stats.t.ppf((1 + level) / 2, len(seeds) - 1)) * error
    listed = tuple(differences.tolist())
    return PairedDifference(
        seeds, listed, mean, mean - half, mean + half, p, sign_p(listed)
    )


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    r"""Holm's adjusted p-values of m tests: in increasing order

    .. math:: \tilde p_{(i)} = \max_{j \le i} \min\big(1,\, (m - j + 1)\, p_{(j)}\big),

    which keep the chance of any false finding below the level, however the tests
    depend on each other.

    Book: :ref:`ch-comparison`.
    """
    adjusted, highest = {}, 0.0
    ranked = sorted(p_values.items(), key=lambda item: item[1])
    for rank, (name, p) in enumerate(ranked):
        highest = max(highest, min(1.0, (len(ranked) - rank) * p))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}
