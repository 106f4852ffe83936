"""Checks of a run's settings beside those of :mod:`crate_core.checks`.

Book: :ref:`ch-first-training`.
"""

from collections.abc import Sequence
from typing import Any

import torch

from crate_core.checks import is_number, require, store


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
