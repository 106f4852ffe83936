"""Checks of a configuration's fields: each names the field, what was given and what is
accepted, for a wrong type as for a wrong value.

Book: :ref:`ch-first-training`.
"""

import math
import operator
from collections.abc import Sequence
from numbers import Integral, Real
from os import PathLike
from typing import Any

import torch


def require(record: Any, name: str, ok: bool, accepted: str) -> None:
    """``ValueError`` that names a field, its value and what is accepted, unless
    ``ok``.
    """
    if not ok:
        value = getattr(record, name)
        raise ValueError(f"{name}={value!r}: accepted is {accepted}")


def store(record: Any, name: str, value: Any) -> None:
    """Set a field of a frozen record that is being made."""
    object.__setattr__(record, name, value)


def check_integer(
    record: Any, name: str, least: int = 0, optional: bool = False
) -> None:
    """An integer of at least ``least``, or ``None`` if ``optional``; kept as an
    ``int``.
    """
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


def check_text(record: Any, name: str, optional: bool = False) -> None:
    """Text, or a path, which is kept as text; ``None`` if ``optional``."""
    value = getattr(record, name)
    if optional and value is None:
        return
    require(record, name, isinstance(value, str | PathLike), "text or a path")
    store(record, name, str(value))


def check_betas(record: Any, name: str) -> None:
    """AdamW's two averaging constants, each in [0, 1); kept as a tuple."""
    value = getattr(record, name)
    ok = (
        isinstance(value, Sequence)
        and len(value) == 2
        and all(is_number(beta, 0.0, 1.0, "[)") for beta in value)
    )
    require(record, name, ok, "two numbers in [0, 1)")
    store(record, name, (float(value[0]), float(value[1])))


def check_compiler(device: torch.device) -> None:
    """``ValueError`` if ``torch.compile`` would find no C++ compiler, which it needs on
    a CPU.
    """
    if device.type != "cpu":
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            "compile needs a C++ compiler (g++, or the one that CXX names), and there "
            "is none: install one, or leave out --compile"
        ) from error
