"""What a live figure is made of: its controls, its inputs, its numbers, its still.

Book: :ref:`ch-notation`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from crate_core.theory.mixture import LowRankGaussianMixture

State = Mapping[str, Any]
"""The values of a figure's controls, and what the reader has moved in its plot."""


@dataclass(frozen=True)
class Slider:
    """A number between ``low`` and ``high`` in ``steps`` steps, even or (``log``) of
    even ratio; ``digits`` are shown; ``whole`` rounds to
    integers; ``play`` adds a button that runs through it.
    """

    name: str
    label: str
    low: float
    high: float
    value: float
    steps: int
    log: bool = False
    digits: int = 2
    unit: str = ""
    whole: bool = False
    play: bool = False
    kind: str = "slider"

    def __post_init__(self) -> None:
        if not (self.low <= self.value <= self.high and self.low < self.high):
            raise ValueError(
                f"{self.name}: need low <= value <= high and low < high, got "
                f"{self.low}, {self.value}, {self.high}"
            )
        if self.steps < 1 or (self.log and self.low <= 0):
            raise ValueError(
                f"{self.name}: a slider has at least one step, and one of even ratio "
                f"starts above 0; got steps = {self.steps}, low = {self.low}"
            )


@dataclass(frozen=True)
class Choice:
    """One of several ``(value, words)``."""

    name: str
    label: str
    options: tuple[tuple[str, str], ...]
    value: str
    kind: str = "choice"

    def __post_init__(self) -> None:
        if self.value not in dict(self.options):
            raise ValueError(
                f"{self.name}: {self.value!r} is none of {sorted(dict(self.options))}"
            )


@dataclass(frozen=True)
class Switch:
    """On or off."""

    name: str
    label: str
    value: bool
    kind: str = "switch"


Control = Slider | Choice | Switch


@dataclass(frozen=True)
class LiveFigure:
    """A figure that the reader moves.

    Parameters
    ----------
    name : as in ``data-live-figure``.
    title : a few words: the name of the group of controls, for who listens.
    alt : what there is to see, for who does not see it.
    script : file beside this module that draws it in the page.
    controls : in the order in which they stand below the plot.
    inputs : the data that page and package both compute on, as JSON.
    numbers : what the figure computes at a state of the controls, by the package; the
        script's function ``numbers`` gives the same names and values.
    still : the figure at its first state, for paper and for pages without scripts.
    moved : what the reader moves in the plot itself, at first.
    """

    name: str
    title: str
    alt: str
    script: str
    controls: tuple[Control, ...]
    inputs: Callable[[], dict[str, Any]]
    numbers: Callable[[State], dict[str, Any]]
    still: Callable[[], Figure]
    moved: tuple[tuple[str, Any], ...] = ()

    @property
    def state(self) -> dict[str, Any]:
        """The state of the controls at first."""
        return {control.name: control.value for control in self.controls} | dict(
            self.moved
        )

    def data(self) -> dict[str, Any]:
        """All that the script needs, as JSON."""
        return {
            "alt": self.alt,
            "state": self.state,
            "controls": [asdict(control) for control in self.controls],
            "inputs": self.inputs(),
        }


def rounded(values: Tensor, digits: int = 3) -> list[Any]:
    """A tensor as nested lists of few digits: the page and the package start from the
    very same numbers, and the page stays small.
    """
    return torch.round(values.double(), decimals=digits).tolist()


def as_tensor(values: Any) -> Tensor:
    """Nested lists as a tensor in double precision, as the page computes."""
    return torch.tensor(values, dtype=torch.float64)


def drawn_tokens(
    tokens: int, heads: int, rank: int, generator: torch.Generator, **options: Any
) -> tuple[Tensor, Tensor]:
    """Coordinates (tokens, rank) of each token in its own subspace, of norm about one,
    and noise (tokens, heads * rank), drawn in this order; ``options`` go to ``randn``.
    """
    codes = torch.randn(tokens, rank, generator=generator, **options) / math.sqrt(rank)
    return codes, torch.randn(tokens, heads * rank, generator=generator, **options)


def placed_tokens(
    drawn: Mapping[str, Any], state: State
) -> tuple[LowRankGaussianMixture, Tensor, Tensor, Tensor]:
    """Mixture, the first ``state["tokens"]`` tokens z with noise of norm about
    ``state["noise"]``, clean tokens and labels.

    Bases are columns of the identity, memberships go round; ``drawn`` holds "heads",
    "rank", and "codes" and "noise" of :func:`drawn_tokens` as lists.
    """
    heads, rank, n = drawn["heads"], drawn["rank"], state["tokens"]
    dim = heads * rank
    bases = torch.eye(dim, dtype=torch.float64).reshape(dim, heads, rank)
    mix = LowRankGaussianMixture(bases.permute(1, 0, 2))
    labels = torch.arange(n) % heads
    codes = as_tensor(drawn["codes"])[:n]
    clean = (mix.bases[labels] @ codes[:, :, None])[..., 0]
    noise = as_tensor(drawn["noise"])[:n]
    return mix, clean + state["noise"] / math.sqrt(dim) * noise, clean, labels
