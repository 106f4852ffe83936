r"""Random numbers as functions of a seed and of what they are for, without any global
state.

Book: :ref:`ch-first-training`.
"""

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


def random_key(*numbers: int) -> int:
    """A 63-bit seed mixed from nonnegative integers by numpy's ``SeedSequence``."""
    return int(
        np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1)
    )


def random_generator(*numbers: int) -> torch.Generator:
    """A torch generator on the CPU seeded by :func:`random_key`."""
    return torch.Generator().manual_seed(random_key(*numbers))


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
