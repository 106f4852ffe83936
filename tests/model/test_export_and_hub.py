"""Other people's tools: timm's interface, torch.export and ONNX, the Hugging Face Hub,
bundled weights.
"""

import importlib.util
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import crate_core.model.saved
from crate_core.model.build import build_model, load_model
from crate_core.model.config import CrateMAEConfig, FrameConfig, ViTMAEConfig
from crate_core.model.crate import CrateMAE
from crate_core.model.export import export_encoder, save_onnx
from crate_core.model.files import save_model
from crate_core.model.saved import (
    bundled_directory,
    bundled_names,
    push_to_hub,
    resolve_directory,
)
from crate_core.model.vit import BLOCK_NORM_EPS, ViTMAE

CRATE = CrateMAEConfig.preset("digits", dim=16, depth=3, heads=2)
VIT = ViTMAEConfig(
    image_size=(8, 12), patch_size=2, channels=1, dim=16, depth=3, heads=2,
    decoder_dim=8, decoder_depth=1, decoder_heads=2,
)  # fmt: skip
BOTH = pytest.mark.parametrize("config", [CRATE, VIT], ids=["crate", "vit"])


def pictures(config: FrameConfig, count: int = 3) -> torch.Tensor:
    rows, columns = config.grid
    return torch.randn(
        count, config.channels, rows * config.patch_size, columns * config.patch_size
    )


# -- timm's interface


def as_timm(model: ViTMAE) -> VisionTransformer:
    """timm's own vision transformer with the encoder weights of our baseline."""
    config = model.config
    vit = VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        in_chans=config.channels,
        num_classes=0,
        embed_dim=config.dim,
        depth=config.depth,
        num_heads=config.heads,
        mlp_ratio=config.mlp_ratio,
        norm_layer=partial(nn.LayerNorm, eps=BLOCK_NORM_EPS),
    )
    kernel = model.patch_embedding.weight.reshape(
        config.dim, config.patch_size, config.patch_size, config.channels
    )
    state = {
        "cls_token": model.class_token,
        "pos_embed": model.positions[None],
        "patch_embed.proj.weight": kernel.permute(0, 3, 1, 2),
        "patch_embed.proj.bias": model.patch_embedding.bias,
        **{
            f"blocks.{name}": value
            for name, value in model.encoder.state_dict().items()
        },
        **{
            f"norm.{name}": value
            for name, value in model.encoder_norm.state_dict().items()
        },
    }
    vit.load_state_dict(state)
    return vit.eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"indices": 2},
        {"indices": [0, -1], "norm": True},
        {"indices": [1], "stop_early": True},
        {"return_prefix_tokens": True},
        {"output_fmt": "NLC", "indices": (0, 2)},
        {
            "intermediates_only": True,
            "indices": 1,
            "return_prefix_tokens": True,
            "norm": True,
        },
    ],
    ids=str,
)
def test_intermediates_are_what_timm_returns(options: dict[str, Any]) -> None:
    model = ViTMAE(VIT).eval()
    images = pictures(VIT)
    with torch.no_grad():
        mine, timms = (
            model.forward_intermediates(images, **options),
            as_timm(model).forward_intermediates(images, **options),
        )
    torch.testing.assert_close(mine, timms, rtol=1e-4, atol=1e-5)
    assert len(mine) == len(timms)


@BOTH
def test_intermediates_are_the_layers_outputs(config: FrameConfig) -> None:
    model = build_model(config).eval()
    images = pictures(config)
    with torch.no_grad():
        features, maps = model.forward_intermediates(images)
        torch.testing.assert_close(features, model.forward_features(images))
        x = model.embed(images)
        for layer, map_ in zip(model.encoder, maps, strict=True):
            x = layer(x)
            assert map_.shape == (3, 16, *config.grid)
            torch.testing.assert_close(map_[:, :, 1, 2], x[:, 1 + config.grid[1] + 2])
        ((patches, prefix),) = model.forward_intermediates(
            images,
            1,
            return_prefix_tokens=True,
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
    torch.testing.assert_close(torch.cat([prefix, patches], dim=1), features)


def test_early_stopping_leaves_out_later_layers() -> None:
    model = CrateMAE(CRATE).eval()
    nn.init.constant_(model.encoder[2].sparsify.weight, torch.nan)
    features, (first,) = model.forward_intermediates(
        pictures(CRATE), [0], stop_early=True
    )
    assert features.isfinite().all()
    assert first.isfinite().all()
    assert not model.forward_intermediates(pictures(CRATE), [0])[0].isfinite().all()


@pytest.mark.parametrize("indices", [0, 4, -1, [3], [-4], []])
def test_layers_that_do_not_exist_are_named(indices: Any) -> None:
    with pytest.raises(
        ValueError, match=r"accepted are 1 to 3 last layers, or layers -3 to 2"
    ):
        CrateMAE(CRATE).forward_intermediates(pictures(CRATE), indices)


@pytest.mark.bad_input
def test_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="accepted are NCHW and NLC"):
        CrateMAE(CRATE).forward_intermediates(pictures(CRATE), output_fmt="NHWC")  # type: ignore[arg-type]


# -- other runtimes


def outside_of_jaxtyping() -> bool:
    """Whether signatures are unchecked: what traces a function cannot follow the
    checks.
    """
    return not hasattr(CrateMAE.forward_features, "__wrapped__")


@BOTH
def test_the_exported_encoder_computes_the_same_for_any_batch(
    config: FrameConfig,
) -> None:
    if not outside_of_jaxtyping():
        pytest.skip("shape checks cannot be traced")
    model = build_model(replace(config, depth=1)).eval()
    program = export_encoder(model).module()
    for count in (1, 5):
        images = pictures(config, count)
        torch.testing.assert_close(program(images), model.forward_features(images))


@BOTH
def test_onnx_runtime_computes_the_same_for_any_batch(
    config: FrameConfig, tmp_path: Path
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: it comes with the extra [test]")
    if not outside_of_jaxtyping():
        pytest.skip("shape checks cannot be traced")
    import onnxruntime

    model = build_model(replace(config, depth=1)).eval()
    save_onnx(model, tmp_path / "encoder.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["encoder.onnx"]
    session = onnxruntime.InferenceSession(
        tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"]
    )
    for count in (1, 5):
        images = pictures(config, count)
        (features,) = session.run(["features"], {"images": images.numpy()})
        np.testing.assert_allclose(
            features, model.forward_features(images).detach(), rtol=1e-4, atol=2e-5
        )


# -- the Hub, without a network


class FakeApi:
    """What the mixin asks of huggingface_hub, written down."""

    calls: list[tuple[str, dict[str, Any]]] = []  # noqa: RUF012  # the mixin makes its own instance
    uploaded: dict[str, bytes] = {}  # noqa: RUF012

    def __init__(self, token: str | None = None) -> None:
        self.calls.append(("token", {"token": token}))

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        return type("Repo", (), {"repo_id": repo_id})

    def upload_folder(self, folder_path: Path, **options: Any) -> str:
        self.calls.append(("upload_folder", options))
        self.uploaded.update(
            {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        )
        return "the commit"


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    import huggingface_hub.hub_mixin

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", FakeApi)
    FakeApi.calls, FakeApi.uploaded = [], {}
    return FakeApi


@BOTH
def test_pushing_uploads_files_that_load_and_a_card(
    config: FrameConfig, api: type[FakeApi], tmp_path: Path
) -> None:
    model = build_model(config).eval()
    answer = model.push_to_hub(
        "someone/a-model", private=True, token="a secret", branch="next"
    )
    assert answer == "the commit"
    names = [name for name, _ in api.calls]
    assert names == ["token", "create_repo", "upload_folder"]
    assert api.calls[0][1]["token"] == "a secret"
    assert api.calls[1][1]["private"] is True
    assert (api.calls[2][1]["repo_id"], api.calls[2][1]["revision"]) == (
        "someone/a-model",
        "next",
    )
    assert set(api.uploaded) == {"config.json", "model.safetensors", "README.md"}
    for name, content in api.uploaded.items():
        (tmp_path / name).write_bytes(content)
    images = pictures(config)
    torch.testing.assert_close(
        load_model(tmp_path).eval().forward_features(images),
        model.forward_features(images),
    )

    card = api.uploaded["README.md"].decode()
    head, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert "library_name: crate-core" in head
    assert f"- {config.model_type}" in head
    assert "secret" not in card
    assert body.strip().startswith("# a-model")
    assert 'load_model("someone/a-model")' in body
    assert f"| depth | {config.depth} |" in body
    # The snippet on the card runs.
    code = (
        body.split("```python\n")[1]
        .split("```")[0]
        .replace("someone/a-model", str(tmp_path))
    )
    scope: dict[str, Any] = {"images": pictures(config).clamp(0, 1)}
    exec(code, scope)
    assert scope["features"].shape == (
        3,
        1 + config.grid[0] * config.grid[1],
        config.dim,
    )


def test_pushing_takes_only_what_the_mixin_knows(api: type[FakeApi]) -> None:
    with pytest.raises(TypeError, match="secretly"):
        push_to_hub(
            lambda path: None, {"model_type": "frame"}, "someone/a-model", secretly=True
        )
    assert api.calls == []


# -- names


def test_a_bundled_name_loads_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = CrateMAE(CRATE)
    half = {name: value.half() for name, value in saved.state_dict().items()}
    save_model(tmp_path / "a-bundled-model", CRATE.to_dict(), half)
    (tmp_path / "not-a-model").mkdir()
    monkeypatch.setattr(crate_core.model.saved, "bundled_directory", lambda: tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    assert bundled_names() == ["a-bundled-model"]
    for model in (
        CrateMAE.from_pretrained("a-bundled-model"),
        load_model("a-bundled-model"),
    ):
        for name, value in model.state_dict().items():
            assert value.dtype == torch.float32
            assert torch.equal(value, half[name].float())
    with pytest.raises(
        FileNotFoundError,
        match=r"no-such is neither .* bundled model \(a-bundled-model\), nor a Hub",
    ):
        load_model("no-such")


def test_a_directory_comes_before_a_bundled_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    CrateMAE(CRATE).save_pretrained("cifar10-tiny")
    assert resolve_directory("cifar10-tiny") == Path("cifar10-tiny")
    assert load_model("cifar10-tiny").config == CRATE


def test_what_is_bundled_is_what_its_name_says() -> None:
    if "cifar10-tiny" not in bundled_names():
        pytest.skip("no weights are bundled yet: benchmarks/cifar10.py trains them")
    model = CrateMAE.from_pretrained("cifar10-tiny")
    assert model.config == CrateMAEConfig.preset("cifar10-tiny")
    files = list((bundled_directory() / "cifar10-tiny").iterdir())
    assert sum(path.stat().st_size for path in files) < 2_000_000
    assert {path.name for path in files} >= {"config.json", "model.safetensors"}
    assert (
        json.loads((bundled_directory() / "cifar10-tiny" / "config.json").read_text())[
            "model_type"
        ]
        == "crate-mae"
    )
