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
    # held-out pictures keep their order; JPEG twice, bicubic once: an eighth at most
    # in the mean over a picture's pixels
    for i in (0, 100, 358):
        one = np.asarray(found.held_out.read(i), dtype=float).squeeze() / 255
        assert np.abs(one - np.asarray(data.held_out.read(i)).squeeze()).mean() < 1 / 8


def test_a_second_time_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(FileExistsError):
        small_imagenet(tmp_path)
