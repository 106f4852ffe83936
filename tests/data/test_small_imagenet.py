"""The small data set is laid out as ImageNet is, and `crate prepare` gets it back."""

from pathlib import Path

import numpy as np
import pytest

from crate_core.data.named import open_data
from crate_core.data.prepare import PrepareConfig, prepare
from crate_core.data.small_imagenet import small_imagenet
from crate_core.data.sources import digits


def test_prepared_it_is_the_digits_again(tmp_path: Path) -> None:
    raw = small_imagenet(tmp_path / "raw")
    config = PrepareConfig(str(raw), str(tmp_path / "small"), side=8, quality=95)
    prepare(config, report=lambda line: None, progress=False)
    found, data = open_data(f"shards:{tmp_path / 'small'}"), digits()
    assert (len(found.train), len(found.held_out)) == (1438, 359)
    for got, given in ((found.train, data.train), (found.held_out, data.held_out)):
        assert got.labels is not None
        assert given.labels is not None
        assert np.array_equal(np.bincount(got.labels), np.bincount(given.labels))
    # written in mixed order; JPEG twice and bicubic once: each digit comes back, and
    # the nearest of all pictures has its class
    assert found.held_out.labels is not None
    assert data.held_out.labels is not None
    got = np.stack([flat(found.held_out.read(i)) / 255 for i in range(359)])
    given = np.stack([flat(data.held_out.read(i)) for i in range(359)])
    apart = np.abs(got[:, None] - given).mean(-1)
    assert apart.min(axis=0).max() < 1 / 8
    nearest = apart.argmin(axis=0)
    assert np.array_equal(found.held_out.labels[nearest], data.held_out.labels)


def flat(picture: object) -> np.ndarray:
    """The 64 grey values of a picture."""
    return np.asarray(picture, dtype=float).squeeze().reshape(64, -1).mean(axis=1)


def test_a_second_time_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(FileExistsError):
        small_imagenet(tmp_path)
