"""Features on disk: the same as in memory, computed once, by one process or several."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crate_core.data.batches import UnreadablePictureWarning
from crate_core.data.sources import ArrayImages, FileImages
from crate_core.evaluation.features import cached_features, encode, features_key
from crate_core.model.build import fresh_model
from crate_core.model.config import CrateMAEConfig

TINY = CrateMAEConfig.preset("digits", dim=16, depth=1, heads=2)
PICTURES = ArrayImages(
    torch.rand(23, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
    np.arange(23) % 3,
)


@pytest.mark.parametrize("processes", [1, 3])
def test_features_on_disk_are_those_in_memory(tmp_path: Path, processes: int) -> None:
    model, direct = fresh_model(TINY, 0), encode(fresh_model(TINY, 0), PICTURES)
    for process in range(processes):
        stored = cached_features(
            model,
            PICTURES,
            tmp_path,
            batch_size=4,
            process=process,
            processes=processes,
        )
    for name in ("class_token", "patch_mean", "pixels"):
        rows = getattr(stored, name)
        assert isinstance(rows, np.memmap)
        assert rows.dtype == np.float16
        # float16 keeps eleven bits
        np.testing.assert_allclose(rows, getattr(direct, name), rtol=2**-10, atol=1e-4)
    np.testing.assert_array_equal(stored.labels, PICTURES.labels)
    assert stored.unreadable == ()


class Counted(ArrayImages):
    """Pictures that count how often one is read."""

    reads = 0

    def decode(self, index: int) -> torch.Tensor:
        type(self).reads += 1
        return super().decode(index)


def test_nothing_is_encoded_twice_and_a_cut_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh_model(TINY, 0)
    source = Counted(PICTURES.images, PICTURES.labels)
    monkeypatch.setattr(Counted, "reads", 0)
    forward, calls = type(model).forward_features, []

    def stops(self: object, images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(self, images)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward_features", stops)
        with pytest.raises(KeyboardInterrupt):
            cached_features(model, source, tmp_path, batch_size=4)
    assert calls == [4, 4, 4, 4]
    before = Counted.reads
    whole = cached_features(model, source, tmp_path, batch_size=4)
    assert Counted.reads - before == 23 - 12
    np.testing.assert_allclose(
        whole.patch_mean, encode(model, PICTURES).patch_mean, rtol=2**-10, atol=1e-4
    )
    before = Counted.reads
    cached_features(model, source, tmp_path, batch_size=4)
    assert Counted.reads == before


def test_other_weights_labels_or_precision_are_other_features() -> None:
    model = fresh_model(TINY, 0)
    keys = {
        features_key(model, PICTURES, "fp32"),
        features_key(model, PICTURES, "bf16"),
        features_key(fresh_model(TINY, 1), PICTURES, "fp32"),
        features_key(
            model, ArrayImages(PICTURES.images, PICTURES.labels[::-1].copy()), "fp32"
        ),
        features_key(model, ArrayImages(PICTURES.images[:22], None), "fp32"),
    }
    assert len(keys) == 5
    assert features_key(fresh_model(TINY, 0), PICTURES, "fp32") in keys


def test_unreadable_pictures_are_left_out_with_their_labels(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(paths):
        Image.new("L", (8, 8), 50 * i).save(path)
    paths[2].write_bytes(b"x")
    source, cache = FileImages(paths, np.arange(5)), tmp_path / "cache"
    with pytest.warns(UnreadablePictureWarning, match=r"2\.png"):
        cached_features(fresh_model(TINY, 0), source, cache, max_unreadable=0.5)
    stored = cached_features(fresh_model(TINY, 0), source, cache)  # read, not tried
    assert len(stored.unreadable) == 1
    assert "2.png" in stored.unreadable[0]
    assert stored.labels.tolist() == [0, 1, 3, 4]
    np.testing.assert_allclose(
        stored.pixels[:, 0], np.array([0, 50, 150, 200]) / 255, atol=1e-3
    )
    with pytest.raises(ValueError, match="none of 1 pictures can be read"):
        cached_features(
            fresh_model(TINY, 0), FileImages([paths[2]], None), cache, max_unreadable=1
        )
    with pytest.raises(ValueError, match="no such share"):
        cached_features(
            fresh_model(TINY, 0), PICTURES, tmp_path, process=2, processes=2
        )
