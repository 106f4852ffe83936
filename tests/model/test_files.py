"""crate_core.model.files: saving and loading models, whole or not at all."""

import errno
import json
import os
import stat

import pytest
import torch

from crate_core.model.config import CrateMAEConfig
from crate_core.model.crate import CrateMAE
from crate_core.model.files import CONFIG_FILE, WEIGHTS_FILE, load_weights
from crate_core.records import atomic_write

SMALL = {
    "image_size": 8,
    "patch_size": 2,
    "dim": 16,
    "depth": 1,
    "heads": 4,
    "channels": 1,
}


def build(seed: int = 0, **fields) -> CrateMAE:
    torch.manual_seed(seed)
    return CrateMAE(CrateMAEConfig(**{**SMALL, **fields}))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"image_size": (8, 4), "normalize_targets": True},
        {"encode_visible_only": True, "lambd": 0.1},
    ],
)
def test_round_trip(tmp_path, fields):
    model = build(**fields)
    model.save_pretrained(tmp_path / "new" / "folder")
    again = CrateMAE.from_pretrained(tmp_path / "new" / "folder")
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.parameters(), model.parameters(), strict=True)
    )
    images, noise = torch.randn(2, 1, 8, 4), torch.rand(2, 8)
    assert torch.equal(
        again(images, 0.5, noise).logits, model(images, 0.5, noise).logits
    )
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == [
        CONFIG_FILE,
        WEIGHTS_FILE,
    ]


def test_the_fixed_positions_are_not_saved(tmp_path):
    build().save_pretrained(tmp_path)
    assert not any(
        "positions" in name for name in load_weights(tmp_path / WEIGHTS_FILE)
    )


def test_files_have_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    build().save_pretrained(tmp_path)
    modes = {
        stat.S_IMODE((tmp_path / name).stat().st_mode)
        for name in ("plain", CONFIG_FILE, WEIGHTS_FILE)
    }
    assert len(modes) == 1


@pytest.mark.parametrize("failing_write", [1, 2])
def test_a_failed_save_leaves_the_old_model(tmp_path, monkeypatch, failing_write):
    """The disk fills up while weights (1) or configuration (2) are written."""
    old = build(seed=0)
    old.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls, real = [], os.fsync

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == failing_write:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        build(seed=1, lambd=0.1).save_pretrained(tmp_path)
    assert len(calls) == failing_write
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_save_cut_short_by_the_system_leaves_the_old_model(tmp_path):
    """The system itself refuses the write: a limit on file size, as a quota does."""
    resource = pytest.importorskip("resource")
    build(seed=0).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError):
            build(seed=1).save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_atomic_write_replaces_whole_files(tmp_path):
    path = tmp_path / "file"
    atomic_write(path, b"old")
    atomic_write(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_hub_names_are_downloaded(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    build().save_pretrained(tmp_path)
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    assert CrateMAE.from_pretrained("owner/name").config == build().config
    assert asked == [("owner/name", [CONFIG_FILE, WEIGHTS_FILE])]


@pytest.mark.bad_input
def test_a_hub_name_that_does_not_exist_is_named(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")

    def snapshot_download(name, allow_patterns):
        del allow_patterns
        raise hub.errors.LocalEntryNotFoundError(f"cannot find {name}")

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match="no directory owner/name here"):
        CrateMAE.from_pretrained("owner/name")


@pytest.mark.bad_input
@pytest.mark.parametrize("name", ["nowhere", "a/b/c", "/no/such/folder"])
def test_what_is_neither_directory_nor_hub_name_is_named(name):
    with pytest.raises(FileNotFoundError, match=f"{name} is neither a directory"):
        CrateMAE.from_pretrained(name)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        (None, FileNotFoundError, r"holds no config\.json"),
        ("{", ValueError, "not valid JSON"),
        ("[1]", ValueError, "must hold a JSON object"),
        (
            '{"model_type": "vit_mae", "hidden_size": 768}',
            ValueError,
            "'vit_mae', accepted: 'crate-mae'",
        ),
        ('{"hidden_size": 768}', ValueError, "None, accepted: 'crate-mae'"),
        (
            '{"model_type": "crate-mae", "hidden_size": 768}',
            ValueError,
            r"unknown configuration fields \['hidden_size'\]",
        ),
        (
            '{"model_type": "crate-mae", "dim": "wide"}',
            ValueError,
            "dim must be a positive integer, got 'wide'",
        ),
    ],
)
def test_directories_of_something_else_are_refused(tmp_path, content, error, message):
    if content is not None:
        (tmp_path / CONFIG_FILE).write_text(content)
    with pytest.raises(error, match=message):
        CrateMAE.from_pretrained(tmp_path)


@pytest.mark.bad_input
def test_missing_and_damaged_weights_are_named(tmp_path):
    build().save_pretrained(tmp_path)
    whole = (tmp_path / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ValueError, match=r"model\.safetensors is not a readable safetensors file"
    ):
        CrateMAE.from_pretrained(tmp_path)
    (tmp_path / WEIGHTS_FILE).unlink()
    with pytest.raises(
        FileNotFoundError, match=r"no weights file at .*model\.safetensors"
    ):
        CrateMAE.from_pretrained(tmp_path)


@pytest.mark.bad_input
def test_weights_of_another_size_are_refused_and_nothing_is_loaded(tmp_path):
    build().save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, "depth": 2}))
    with pytest.raises(ValueError, match=r"missing, such as decoder\.1"):
        CrateMAE.from_pretrained(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(json.dumps({**config, "dim": 32}))
    with pytest.raises(ValueError, match="of another shape, such as class_token"):
        CrateMAE.from_pretrained(tmp_path)
    model = build(seed=5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="1 unexpected, such as extra"):
        model.load_weights(
            {**build(seed=6).state_dict(), "extra": torch.zeros(1)}, source="a test"
        )
    assert all(
        torch.equal(before[name], value) for name, value in model.state_dict().items()
    )
