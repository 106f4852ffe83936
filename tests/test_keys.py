"""crate_core.keys: random numbers as functions of a seed and of what they are for."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from crate_core.keys import Stream, evaluation_noise, mask_noise, random_key


def test_mask_noise_is_uniform_and_a_function_of_seed_and_step() -> None:
    noise = mask_noise(3, 7, 200, 50)
    assert torch.equal(noise, mask_noise(3, 7, 200, 50))
    assert not torch.equal(noise, mask_noise(3, 8, 200, 50))
    assert not torch.equal(noise, mask_noise(4, 7, 200, 50))
    counts = torch.histc(noise, 10, 0, 1)
    # chi-square, 9 degrees of freedom, p = 0.001
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 27.9


def test_evaluation_masks_are_those_of_no_training_step() -> None:
    held_out = evaluation_noise(0, 8, 16)
    assert torch.equal(held_out, evaluation_noise(0, 8, 16))
    assert not any(torch.equal(held_out, mask_noise(0, t, 8, 16)) for t in range(50))


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=4), st.integers(0, 3))
def test_keys_fit_torch_and_tell_every_number_apart(
    numbers: list[int], place: int
) -> None:
    key = random_key(*numbers)
    assert 0 <= key < 2**63
    assert key == random_key(*numbers)
    changed = numbers.copy()
    changed[place % len(numbers)] += 1
    assert random_key(*changed) != key


def test_streams_of_one_seed_differ() -> None:
    assert len({random_key(5, stream) for stream in Stream}) == len(Stream)
