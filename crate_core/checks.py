"""Checks of arguments and of a configuration's fields: each names what was given and
what is accepted, for a wrong type as for a wrong value.

Book: :ref:`ch-first-training`.
"""

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from os import PathLike
from typing import Any

from torch import Tensor


def check_tensor(name: str, value: Any) -> None:
    """``TypeError`` unless an argument is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a torch tensor, got {type(value).__name__}; "
            "torch.as_tensor makes one"
        )


def check_instance(
    name: str, value: Any, kind: type | tuple[type, ...], accepted: str
) -> None:
    """``TypeError`` unless an argument is of a kind."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {accepted}, got {type(value).__name__}")


def check_count(name: str, value: Any) -> None:
    """``ValueError`` unless an argument is an integer of at least one."""
    if not is_count(value):
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def check_real(name: str, value: Any) -> None:
    """``TypeError`` unless an argument is a number, or a tensor of numbers."""
    if not isinstance(value, Tensor) and math.isnan(as_number(value)):
        raise TypeError(f"{name} must be a number or a tensor, got {value!r}")


def check_numbers(name: str, value: Any) -> None:
    """``TypeError`` unless an argument is a sequence of numbers or a tensor."""
    sequence = isinstance(value, Iterable) and not isinstance(value, str | Mapping)
    if not sequence or any(math.isnan(as_number(item)) for item in value):
        raise TypeError(f"{name} must be numbers or a tensor, got {value!r}")


def is_count(value: Any) -> bool:
    """Whether a value is an integer of at least one."""
    return (
        isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1
    )


def as_number(value: Any) -> float:
    """A number (a tensor of one element too) as ``float``; not-a-number for text,
    ``None`` and all else, so that every comparison with it fails.
    """
    if type(value) is float:
        return value
    if isinstance(value, str | bytes | bool):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.nan


def require(record: Any, name: str, ok: bool, accepted: str) -> None:
    """``ValueError`` naming a field, its value and what is accepted, unless ``ok``."""
    if not ok:
        value = getattr(record, name)
        raise ValueError(f"{name}={value!r}: accepted is {accepted}")


def store(record: Any, name: str, value: Any) -> None:
    """Set a field of a frozen record that is being made."""
    object.__setattr__(record, name, value)


def check_integer(
    record: Any, name: str, least: int = 0, optional: bool = False
) -> None:
    """An integer >= ``least``, or ``None`` if ``optional``; kept as ``int``."""
    value = getattr(record, name)
    if optional and value is None:
        return
    kind = isinstance(value, Integral) and not isinstance(value, bool)
    accepted = "zero or a positive integer" if least == 0 else f"an integer >= {least}"
    accepted += " or None" if optional else ""
    require(record, name, kind and value >= least, accepted)
    store(record, name, operator.index(value))


def check_number(
    record: Any,
    name: str,
    accepted: str,
    low: float = 0.0,
    high: float = math.inf,
    ends: str = "(]",
    optional: bool = False,
) -> None:
    """A finite number between ``low`` and ``high``, or ``None`` if ``optional``; kept
    as ``float``.

    ``ends`` says with square brackets which ends belong to the interval.
    """
    value = getattr(record, name)
    if optional and value is None:
        return
    require(record, name, is_number(value, low, high, ends), accepted)
    store(record, name, float(value))


def is_number(value: Any, low: float, high: float, ends: str) -> bool:
    """Whether a value is a finite real number in an interval; see
    :func:`check_number`.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    number = float(value)
    above = number >= low if ends[0] == "[" else number > low
    below = number <= high if ends[1] == "]" else number < high
    return math.isfinite(number) and above and below


def check_choice(record: Any, name: str, choices: Sequence[str]) -> None:
    """One of some words."""
    value = getattr(record, name)
    accepted = f"{', '.join(choices[:-1])} or {choices[-1]}"
    require(record, name, isinstance(value, str) and value in choices, accepted)


def check_flag(record: Any, name: str) -> None:
    """``True`` or ``False``."""
    require(record, name, isinstance(getattr(record, name), bool), "True or False")


def check_mapping(values: Any) -> None:
    """``TypeError`` unless a configuration's fields are given by name."""
    if not isinstance(values, Mapping):
        raise TypeError(
            "the fields of a configuration are a mapping from names to values, "
            f"got {type(values).__name__}"
        )


def check_text(record: Any, name: str, optional: bool = False) -> None:
    """Text, or a path, which is kept as text; ``None`` if ``optional``."""
    value = getattr(record, name)
    if optional and value is None:
        return
    require(record, name, isinstance(value, str | PathLike), "text or a path")
    store(record, name, str(value))
