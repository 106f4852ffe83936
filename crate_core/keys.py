r"""Random numbers as functions of a seed and of what they are for, without any global
state.

Book: :ref:`ch-first-training`.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch

from crate_core.shapes import PatchNoise


class Stream(IntEnum):
    """What a random key is for; keeps the streams of one seed apart."""

    SHUFFLE = 0
    AUGMENT = 1
    MASK = 2
    SUBSTITUTE = 3
    EVALUATION_MASK = 4
    PROBE = 5
    MIX = 6
    DROP = 7


def random_key(*numbers: int) -> int:
    """A 63-bit seed mixed from nonnegative integers by numpy's ``SeedSequence``."""
    return int(
        np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1)
    )


def random_generator(*numbers: int) -> torch.Generator:
    """A torch generator on the CPU seeded by :func:`random_key`."""
    return torch.Generator().manual_seed(random_key(*numbers))


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """The global generators of Python, numpy and torch (on the CPU) seeded by
    :func:`random_key`, and put back afterwards: for libraries that draw from them.
    """
    key = random_key(*numbers)
    # numpy's legacy state is what such libraries draw from
    old = np.random.get_state()  # noqa: NPY002
    before = random.getstate(), torch.get_rng_state()
    random.seed(key)
    np.random.seed(key % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(key)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(old)  # noqa: NPY002
        torch.set_rng_state(before[1])


def mask_noise(
    seed: int, step: int, batch_size: int, length: int, stream: Stream = Stream.MASK
) -> PatchNoise:
    """Uniform noise (batch_size, length) in [0, 1) that fixes the masks of one step: a
    function of (seed, step).
    """
    return torch.rand(
        batch_size, length, generator=random_generator(seed, stream, step)
    )


def evaluation_noise(seed: int, count: int, length: int) -> PatchNoise:
    """Uniform noise (count, length) in [0, 1) that fixes the masks of held-out
    pictures: a function of the seed, apart from every training step's.
    """
    return mask_noise(seed, 0, count, length, Stream.EVALUATION_MASK)
