"""The ViT-MAE baseline: sizes by formula, gradients, attention, visible tokens only,
MAE's equations transcribed.
"""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from crate_core.model.autoencoder import END_NORM_EPS
from crate_core.model.build import build_model, load_model
from crate_core.model.config import VIT_PRESETS, CrateMAEConfig, ViTMAEConfig
from crate_core.model.crate import CrateMAE
from crate_core.model.patches import patchify
from crate_core.model.vit import BLOCK_NORM_EPS, ViTBlock, ViTMAE

TINY = ViTMAEConfig(
    image_size=8,
    patch_size=2,
    channels=1,
    dim=16,
    depth=2,
    heads=2,
    decoder_dim=8,
    decoder_depth=1,
    decoder_heads=2,
)


def parameters(config: ViTMAEConfig) -> int:
    """Trainable parameters by formula: an independent count."""

    def block(d: int) -> int:
        hidden = int(d * config.mlp_ratio)
        attention = d * 3 * d + 3 * d + d * d + d
        return attention + d * hidden + hidden + hidden * d + d + 2 * 2 * d

    d, e, pixels = (
        config.dim,
        config.decoder_dim,
        config.patch_size**2 * config.channels,
    )
    # patches, class token, blocks, norm
    encoder = pixels * d + d + d + config.depth * block(d) + 2 * d
    mask_token = e if config.encode_visible_only else d
    decoder = (
        mask_token
        + d * e
        + e
        + config.decoder_depth * block(e)
        + 2 * e
        + e * pixels
        + pixels
    )
    return encoder + decoder


@pytest.mark.parametrize("name", VIT_PRESETS)
def test_sizes_are_the_formulas(name: str) -> None:
    config = ViTMAEConfig.preset(name)
    with torch.device("meta"):
        model = ViTMAE(config)
    assert sum(p.numel() for p in model.parameters()) == parameters(config)


def test_published_sizes() -> None:
    base = parameters(ViTMAEConfig.preset("base"))
    assert base == 143_533_824
    # The published 143.8M also count two fixed position tables.
    assert base + 2 * (1 + 14 * 14) * 768 == 143_533_824 + 302_592
    small = parameters(ViTMAEConfig.preset("small"))
    assert round((small + (1 + 14 * 14) * (384 + 512)) / 1e6, 1) == 47.6
    assert parameters(ViTMAEConfig.preset("mae-base")) == 111_655_680


@pytest.mark.parametrize(
    ("name", "crate", "share"),
    [
        ("base-matched", "base", 0.02),
        ("cifar10", "cifar10", 0.03),
        ("cifar10-tiny", "cifar10-tiny", 0.03),
    ],
)
def test_matched_sizes_match(name: str, crate: str, share: float) -> None:
    with torch.device("meta"):
        theirs = sum(
            p.numel() for p in CrateMAE(CrateMAEConfig.preset(crate)).parameters()
        )
    assert parameters(ViTMAEConfig.preset(name)) == pytest.approx(theirs, rel=share)
    if crate == "base":
        assert theirs == 43_745_280


@pytest.mark.parametrize("visible_only", [True, False])
def test_every_parameter_gets_a_gradient(visible_only: bool) -> None:
    model = ViTMAE(
        ViTMAEConfig.from_dict({**TINY.to_dict(), "encode_visible_only": visible_only})
    )
    model(torch.randn(4, 1, 8, 8), 0.5).loss.backward()
    without = [
        name
        for name, p in model.named_parameters()
        if p.grad is None or not p.grad.abs().sum() > 0
    ]
    assert without == []


def test_attention_weights_are_those_of_the_block() -> None:
    block = ViTBlock(12, 3, 4.0).eval()
    x = torch.randn(2, 5, 12)
    weights = block.attention_weights(x)
    assert weights.shape == (2, 3, 5, 5)
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(2, 3, 5))
    # The block computed from them, by hand.
    values = (
        block.attn.qkv(block.norm1(x)).reshape(2, 5, 3, 3, 4)[:, :, 2].transpose(1, 2)
    )
    mixed = (weights @ values).transpose(1, 2).reshape(2, 5, 12)
    u = x + block.attn.proj(mixed)
    torch.testing.assert_close(
        u + block.mlp(block.norm2(u)), block(x), rtol=1e-5, atol=1e-6
    )


def test_removed_pixels_are_not_seen() -> None:
    model = ViTMAE(TINY).eval()
    images, noise = torch.randn(3, 1, 8, 8), torch.rand(3, 16)
    out = model(images, 0.75, noise)
    removed = (
        out.mask.reshape(3, 1, 4, 4)
        .repeat_interleave(2, 2)
        .repeat_interleave(2, 3)
        .bool()
    )
    other = torch.where(removed, torch.randn_like(images), images)
    assert torch.equal(model(other, 0.75, noise).logits, out.logits)
    seen = torch.where(removed, images, torch.randn_like(images))
    assert not torch.allclose(model(seen, 0.75, noise).logits, out.logits)


def transcription(
    model: ViTMAE, images: Tensor, mask_ratio: float, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """He et al.'s forward pass for one picture at a time, in loops over plain
    tensors.
    """
    w, config = dict(model.named_parameters()), model.config

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def block(x: Tensor, name: str, heads: int) -> Tensor:
        q, k, v = linear(
            norm(x, f"{name}.norm1", BLOCK_NORM_EPS), f"{name}.attn.qkv"
        ).chunk(3, dim=-1)
        size = q.shape[-1] // heads
        out = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            out.append(
                torch.softmax(q[:, part] @ k[:, part].T / math.sqrt(size), dim=-1)
                @ v[:, part]
            )
        x = x + linear(torch.cat(out, dim=-1), f"{name}.attn.proj")
        hidden = F.gelu(
            linear(norm(x, f"{name}.norm2", BLOCK_NORM_EPS), f"{name}.mlp.fc1")
        )
        return x + linear(hidden, f"{name}.mlp.fc2")

    logits, errors = [], []
    for image, order in zip(images, noise.argsort(dim=1), strict=True):
        patches = patchify(image[None], config.patch_size)[0]
        keep = order[: int(len(order) * (1 - mask_ratio))]
        x = linear(patches[keep], "patch_embedding") + model.positions[1:][keep]
        x = torch.cat([w["class_token"][0] + model.positions[:1], x])
        for i in range(config.depth):
            x = block(x, f"encoder.{i}", config.heads)
        x = linear(norm(x, "encoder_norm", END_NORM_EPS), "decoder_embedding")
        y = w["mask_token"][0].repeat(len(order) + 1, 1)
        y[0] = x[0]
        y[1 + keep] = x[1:]
        y = y + model.decoder_positions
        for i in range(config.decoder_depth):
            y = block(y, f"decoder.{i}", config.decoder_heads)
        predicted = linear(norm(y, "decoder_norm", END_NORM_EPS), "prediction")[1:]
        gone = order[len(keep) :]
        logits.append(predicted)
        errors.append((predicted[gone] - patches[gone]).square().mean())
    return torch.stack(logits), torch.stack(errors).mean()


def test_the_forward_pass_is_maes() -> None:
    model = ViTMAE(TINY).eval()
    images, noise = torch.randn(3, 1, 8, 8), torch.rand(3, 16)
    with torch.no_grad():
        # biases and norms that are not trivial
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter)).mul_(
                    1.0 if "norm" in name else 1.5
                )
        out = model(images, 0.75, noise)
        logits, loss = transcription(model, images, 0.75, noise)
    torch.testing.assert_close(out.logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.loss, loss)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    model = ViTMAE(TINY).eval()
    model.save_pretrained(tmp_path)
    images, noise = torch.randn(2, 1, 8, 8), torch.rand(2, 16)
    for loaded in (ViTMAE.from_pretrained(tmp_path), load_model(tmp_path)):
        assert isinstance(loaded, ViTMAE)
        assert loaded.config == TINY
        assert torch.equal(
            loaded.eval()(images, 0.5, noise).logits, model(images, 0.5, noise).logits
        )
    with pytest.raises(
        ValueError, match="model of type 'vit-mae', accepted: 'crate-mae'"
    ):
        CrateMAE.from_pretrained(tmp_path)


def test_other_sizes_than_configured_are_taken() -> None:
    model = ViTMAE(TINY).eval()
    out = model(torch.randn(2, 1, 12, 8), 0.5)
    assert out.logits.shape == (2, 24, 4)
    # At the configured size the table made for any grid is the fixed one.
    torch.testing.assert_close(model.position_table((4, 4)), model.positions)


def test_half_precision_weights_load_into_single_precision(tmp_path: Path) -> None:
    model = build_model(TINY)
    with torch.no_grad():
        model.bfloat16().save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert torch.equal(loaded.class_token, model.class_token.float())
