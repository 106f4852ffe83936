"""What all tests share: threads, repeatable hypothesis examples, and the order (the
book last).
"""

import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# the book's own Sphinx extensions are tested too, and the script that injects faults
sys.path[:0] = [str(ROOT / "book" / "_ext"), str(ROOT / "tests" / "faults")]

# The same examples in every run; a failure found once is found again.
hypothesis.settings.register_profile(
    "repeatable", derandomize=True, deadline=None, print_blob=True
)
hypothesis.settings.load_profile("repeatable")

# Tests that run side by side take one thread each; small tensors gain nothing from
# more.
torch.set_num_threads(
    1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1)
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Unit tests first, then the book's build, then its pages."""
    items.sort(
        key=lambda item: [
            item.get_closest_marker(mark) is not None for mark in ("site", "book")
        ]
    )


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Each test starts from the same state of torch's global generator."""
    torch.manual_seed(0)
