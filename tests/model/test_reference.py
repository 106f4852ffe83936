"""Parity with a plain transcription of the published CRATE-MAE, and the conversion of
its checkpoints.

The transcription below follows the equations token by token, in loops, on a dictionary
of tensors with the keys of the authors' checkpoints.  It shares no code with the
package.
"""

import argparse
import math
import os
import pickle
import re

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from crate_core.model.config import CrateMAEConfig
from crate_core.model.crate import CrateMAE
from crate_core.model.files import load_weights
from crate_core.model.reference import REFERENCE_UNUSED, convert_reference

ETA, LAMBDA = 0.1, 0.5
PUBLISHED = {
    "tiny": (384, 12),
    "small": (576, 12),
    "base": (768, 12),
    "large": (1024, 24),
}


# -- the transcription


def reference_shapes(dim, depth, patch_size, channels, side):
    """Keys and shapes of an authors' checkpoint."""
    pixels, length = patch_size**2 * channels, side**2
    shapes = {
        "cls_token": (1, 1, dim),
        "mask_token": (1, 1, dim),
        "pos_embed": (1, 1 + length, dim),
        "decoder_pos_embed": (1, 1 + length, dim),
        "patch_embed.proj.weight": (dim, channels, patch_size, patch_size),
        "patch_embed.proj.bias": (dim,),
        "decoder_embed.weight": (dim, dim),
        "decoder_embed.bias": (dim,),
        "decoder_pred.weight": (pixels, dim),
        "decoder_pred.bias": (pixels,),
    }
    for name in ("norm", "decoder_norm"):
        shapes |= {f"{name}.weight": (dim,), f"{name}.bias": (dim,)}
    for side_name, (attention, dictionary) in {
        "blocks": ("0.0", "0.1"),
        "decoder_blocks": ("0.1", "0.0"),
    }.items():
        for layer in range(depth):
            at = f"{side_name}.{layer}.layers."
            for part in (attention, dictionary):
                shapes |= {
                    f"{at}{part}.norm.weight": (dim,),
                    f"{at}{part}.norm.bias": (dim,),
                }
            shapes |= {
                f"{at}{attention}.fn.qkv.weight": (dim, dim),
                f"{at}{attention}.fn.to_out.0.weight": (dim, dim),
                f"{at}{attention}.fn.to_out.0.bias": (dim,),
                f"{at}{dictionary}.fn.weight": (dim, dim),
            }
    return shapes


def reference_positions(dim, side):
    table = torch.zeros(1 + side * side, dim)
    for row in range(side):
        for column in range(side):
            for i in range(dim // 4):
                omega = 10000 ** (-i / (dim / 4))
                values = (
                    math.sin(column * omega),
                    math.cos(column * omega),
                    math.sin(row * omega),
                    math.cos(row * omega),
                )
                for block, value in enumerate(values):
                    table[1 + row * side + column, block * dim // 4 + i] = value
    return table[None]


def random_checkpoint(seed=0, dim=24, depth=2, patch_size=2, channels=3, side=3):
    """A checkpoint with gains and biases far from 1 and 0, float32."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in reference_shapes(dim, depth, patch_size, channels, side).items():
        values = torch.randn(shape, generator=generator)
        if "norm" in name:
            state[name] = 0.4 * values + (1.0 if name.endswith("weight") else 0.0)
        else:
            state[name] = 0.3 * values if len(shape) < 2 else values / shape[-1] ** 0.5
    state["pos_embed"] = state["decoder_pos_embed"] = reference_positions(dim, side)
    return state


def layer_norm(x, state, name, eps):
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    return (x - mean) / torch.sqrt(variance + eps) * state[f"{name}.weight"] + state[
        f"{name}.bias"
    ]


def subspace_attention(tokens, state, name, heads, record):
    """tokens (n, d): each head attends with one projection as query, key and value."""
    projected = tokens @ state[f"{name}.qkv.weight"].T
    p = tokens.shape[1] // heads
    columns, weights = [], []
    for k in range(heads):
        v = projected[:, k * p : (k + 1) * p]
        rows, row_weights = [], []
        for i in range(len(tokens)):
            scores = torch.stack(
                [(v[i] * v[j]).sum() for j in range(len(tokens))]
            ) / math.sqrt(p)
            weight = torch.exp(scores - scores.max())
            weight = weight / weight.sum()
            rows.append(sum(weight[j] * v[j] for j in range(len(tokens))))
            row_weights.append(weight)
        columns.append(torch.stack(rows))
        weights.append(torch.stack(row_weights))
    record.append(torch.stack(weights))
    return (
        torch.cat(columns, dim=1) @ state[f"{name}.to_out.0.weight"].T
        + state[f"{name}.to_out.0.bias"]
    )


def transcription(state, images, noise, mask_ratio, heads, normalize=False):
    """Loss, predictions (B, L, P*P*C), mask (B, L), encoder tokens after each layer,
    encoder attention weights.
    """
    kernel = state["patch_embed.proj.weight"]
    dim, channels, size, _ = kernel.shape
    side = images.shape[-1] // size
    depth = sum(
        name.startswith("blocks.") and name.endswith("qkv.weight") for name in state
    )
    length = side * side
    kept = int(length * (1 - mask_ratio))
    predictions, masks, hidden, attention = [], [], [], []
    total, count = 0.0, 0
    for image, numbers in zip(images, noise, strict=True):
        removed = set(
            sorted(range(length), key=lambda i, numbers=numbers: float(numbers[i]))[
                kept:
            ]
        )
        tokens, pixels = [state["cls_token"][0, 0]], []
        for row in range(side):
            for column in range(side):
                block = image[
                    :,
                    row * size : (row + 1) * size,
                    column * size : (column + 1) * size,
                ]
                embedded = torch.stack([(kernel[m] * block).sum() for m in range(dim)])
                embedded = embedded + state["patch_embed.proj.bias"]
                tokens.append(
                    state["mask_token"][0, 0]
                    if row * side + column in removed
                    else embedded
                )
                pixels.append(
                    torch.stack(
                        [
                            block[c, i, j]
                            for i in range(size)
                            for j in range(size)
                            for c in range(channels)
                        ]
                    )
                )
        x = torch.stack(tokens) + state["decoder_pos_embed"][0]
        states, weights = [x], []
        for layer in range(depth):
            at = f"blocks.{layer}.layers."
            normed = layer_norm(x, state, f"{at}0.0.norm", 1e-5)
            u = x + subspace_attention(normed, state, f"{at}0.0.fn", heads, weights)
            v = layer_norm(u, state, f"{at}0.1.norm", 1e-5)
            dictionary = state[f"{at}0.1.fn.weight"]
            new = []
            for token in v:
                step = dictionary.T @ token - dictionary.T @ (dictionary @ token)
                new.append(torch.clamp(token + ETA * step - ETA * LAMBDA, min=0))
            x = torch.stack(new)
            states.append(x)
        y = layer_norm(x, state, "norm", 1e-6)
        for layer in range(depth):
            at = f"decoder_blocks.{layer}.layers."
            normed = layer_norm(y, state, f"{at}0.0.norm", 1e-5)
            v = torch.stack([state[f"{at}0.0.fn.weight"] @ token for token in normed])
            y = v - subspace_attention(
                layer_norm(v, state, f"{at}0.1.norm", 1e-5),
                state,
                f"{at}0.1.fn",
                heads,
                record=[],
            )
        y = layer_norm(y, state, "decoder_norm", 1e-6)
        predicted = y[1:] @ state["decoder_pred.weight"].T + state["decoder_pred.bias"]
        for i in removed:
            target = pixels[i]
            if normalize:
                mean = target.mean()
                target = (target - mean) / torch.sqrt(
                    ((target - mean) ** 2).sum() / (len(target) - 1) + 1e-6
                )
            total = total + ((predicted[i] - target) ** 2).mean()
            count += 1
        predictions.append(predicted)
        masks.append([float(i in removed) for i in range(length)])
        hidden.append(torch.stack(states))
        attention.append(torch.stack(weights))
    return (
        total / count,
        torch.stack(predictions),
        torch.tensor(masks),
        torch.stack(hidden),
        torch.stack(attention),
    )


def relative(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def inputs(seed=1, batch=2, channels=3, pixels=6, length=9, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, channels, pixels, pixels, generator=generator)
    return images.to(dtype), torch.rand(batch, length, generator=generator).to(dtype)


# -- parity


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("shape", "heads", "ratio"),
    [
        ({}, 3, 0.75),
        ({"channels": 1, "patch_size": 3, "side": 2, "dim": 16}, 4, 0.5),
        ({"depth": 1, "side": 4, "channels": 2}, 2, 0.3),
    ],
    ids=["colour", "grey", "two-channel"],
)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float64, 1e-12)],
    ids=["float32", "float64"],
)
def test_parity_with_the_transcription(
    shape, heads, ratio, normalize, dtype, tolerance
):
    sizes = {"dim": 24, "depth": 2, "patch_size": 2, "channels": 3, "side": 3} | shape
    state = random_checkpoint(**sizes)
    images, noise = inputs(
        channels=sizes["channels"],
        pixels=sizes["side"] * sizes["patch_size"],
        length=sizes["side"] ** 2,
        dtype=dtype,
    )
    model = CrateMAE.from_reference(state, heads=heads, normalize_targets=normalize).to(
        dtype
    )
    out = model(images, ratio, noise, output_hidden_states=True, output_attentions=True)
    reference = {name: value.to(dtype) for name, value in state.items()}
    with torch.no_grad():
        loss, logits, mask, hidden, attention = transcription(
            reference, images, noise, ratio, heads, normalize
        )
    assert torch.equal(out.mask, mask.to(dtype))
    assert relative(out.loss, loss) < tolerance
    assert relative(out.logits, logits) < tolerance
    assert relative(torch.stack(out.hidden_states, dim=1), hidden) < tolerance
    assert relative(torch.stack(out.attentions, dim=1), attention) < tolerance


@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_equal_those_of_the_transcription(normalize):
    state = random_checkpoint()
    images, noise = inputs(dtype=torch.float64)
    model = CrateMAE.from_reference(
        state, heads=3, normalize_targets=normalize
    ).double()
    model(images, 0.6, noise).loss.backward()
    leaves = {name: value.double().requires_grad_() for name, value in state.items()}
    transcription(leaves, images, noise, 0.6, 3, normalize)[0].backward()
    # The map of the weights is linear and maps their gradients too.
    given = {
        name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        for name, leaf in leaves.items()
    }
    _, gradients = convert_reference(given, heads=3)
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert relative(parameter.grad, gradients[name]) < 1e-9, name
    used = {
        name
        for name, leaf in leaves.items()
        if leaf.grad is not None and leaf.grad.abs().max() > 0
    }
    assert leaves.keys() - used == {
        "pos_embed",
        "decoder_embed.weight",
        "decoder_embed.bias",
    }


# -- published sizes


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_key_map_is_one_to_one_at_published_sizes(name):
    dim, depth = PUBLISHED[name]
    shapes = reference_shapes(dim, depth, 16, 3, 14)
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    sizes, weights = convert_reference(state)
    assert CrateMAEConfig(**sizes) == CrateMAEConfig.preset(name)
    with torch.device("meta"):
        own = CrateMAE.from_preset(name).state_dict()
    assert {key: value.shape for key, value in weights.items()} == {
        key: value.shape for key, value in own.items()
    }
    assert len(weights) == len(state) - len(REFERENCE_UNUSED)


@pytest.mark.parametrize(
    ("name", "published_millions", "ours"),
    [("small", "25.4", 24_846_528), ("base", "44.6", 43_745_280)],
)
def test_the_sum_that_leads_to_the_published_counts(name, published_millions, ours):
    dim, depth = PUBLISHED[name]
    shapes = reference_shapes(dim, depth, 16, 3, 14)
    unused_map, table = dim * dim + dim, 197 * dim
    total = sum(math.prod(shape) for shape in shapes.values())
    assert total == ours + unused_map + 2 * table
    assert f"{total / 1e6:.1f}" == published_millions


def test_the_sum_of_base_digit_by_digit():
    assert 43_745_280 + 590_592 + 2 * 151_296 == 44_638_464


# -- files and refusals


@pytest.mark.parametrize("wrapped", ["plain", "model", "state_dict", "module."])
def test_checkpoint_files_load_however_they_are_wrapped(tmp_path, wrapped):
    state = random_checkpoint()
    content = {
        "plain": state,
        # What MAE's training script writes beside the weights.
        "model": {
            "model": state,
            "epoch": 799,
            "args": argparse.Namespace(lr=1e-3, model="mae_crate_base"),
        },
        "state_dict": {"state_dict": state},
        "module.": {f"module.{name}": value for name, value in state.items()},
    }[wrapped]
    torch.save(content, tmp_path / "checkpoint.pth")
    images, noise = inputs()
    expected = CrateMAE.from_reference(state, heads=3)(images, 0.5, noise).logits
    assert torch.equal(
        CrateMAE.from_reference(tmp_path / "checkpoint.pth", heads=3)(
            images, 0.5, noise
        ).logits,
        expected,
    )


def test_safetensors_files_load(tmp_path):
    state = random_checkpoint()
    save_file(
        {name: value.clone() for name, value in state.items()},
        tmp_path / "checkpoint.safetensors",
    )
    model = CrateMAE.from_reference(str(tmp_path / "checkpoint.safetensors"), heads=3)
    assert torch.equal(model.class_token.detach(), state["cls_token"])


class Command:
    """Unpickles by running a shell command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.bad_input
@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_pickle_that_would_execute_code_is_refused_unexecuted(tmp_path, writer):
    trace = tmp_path / "executed"
    content = {"model": {"a": torch.zeros(1)}, "args": Command(f"touch {trace}")}
    path = tmp_path / "checkpoint.pth"
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(
        ValueError, match=r"checkpoint\.pth was refused.*GLOBAL"
    ) as caught:
        CrateMAE.from_reference(path)
    assert not trace.exists()
    # Torch's own message says how to execute the file all the same.
    assert not re.search("Re-running|safe_globals", str(caught.value))


@pytest.fixture(scope="module")
def checkpoint_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "c.pth"
    torch.save({"a": torch.zeros(3)}, path)
    return path.read_bytes()


@pytest.mark.bad_input
@settings(
    deadline=None,
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.binary(max_size=60))
@example(b"")
@example(b"not a checkpoint")
def test_damaged_files_are_a_value_error(tmp_path, content):
    for name in ("x.pth", "x.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            load_weights(tmp_path / name)


@pytest.mark.bad_input
def test_files_cut_off_anywhere_are_a_value_error(tmp_path, checkpoint_bytes):
    path = tmp_path / "cut.pth"
    for end in range(0, len(checkpoint_bytes), 37):
        path.write_bytes(checkpoint_bytes[:end])
        with pytest.raises(ValueError, match=r"cut\.pth was refused"):
            load_weights(path)


@pytest.mark.bad_input
def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
        CrateMAE.from_reference(tmp_path / "nowhere.pth")


def vit_mae_checkpoint():
    """The keys of a ViT-MAE of the same frame."""
    state = random_checkpoint()
    layers = [name for name in state if "blocks." in name]
    for name in layers:
        del state[name]
    for part in ("blocks", "decoder_blocks"):
        state[f"{part}.0.attn.qkv.weight"] = torch.zeros(72, 24)
        state[f"{part}.0.mlp.fc1.weight"] = torch.zeros(96, 24)
    return state


@pytest.mark.bad_input
def test_other_architectures_are_refused():
    with pytest.raises(
        ValueError,
        match=r"not an authors' CRATE-MAE checkpoint.*blocks\.0\.attn\.qkv\.weight",
    ):
        CrateMAE.from_reference(vit_mae_checkpoint(), heads=3)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("cls_token"), "missing.*cls_token"),
        (lambda s: s.pop("patch_embed.proj.weight"), "missing.*patch_embed"),
        (
            lambda s: s.pop("blocks.1.layers.0.1.fn.weight"),
            "missing.*encoder.1.sparsify.weight",
        ),
        (lambda s: s.update(head=torch.zeros(3)), "unexpected.*head"),
        (
            lambda s: s.update({"blocks.0.layers.0.1.fn.weight": torch.zeros(24, 23)}),
            "another shape",
        ),
        (
            lambda s: s.update(decoder_pos_embed=s["decoder_pos_embed"] + 0.1),
            "position table",
        ),
        (lambda s: s.update(epoch=3), "not a state dict of tensors.*epoch"),
        (lambda s: s.clear(), "no state dict"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(change, message):
    state = random_checkpoint()
    change(state)
    with pytest.raises(ValueError, match=message):
        CrateMAE.from_reference(state, heads=3)


@pytest.mark.bad_input
def test_heads_must_be_given_for_sizes_that_were_not_published():
    with pytest.raises(ValueError, match="dimension 24: pass heads="):
        CrateMAE.from_reference(random_checkpoint())
    with pytest.raises(ValueError, match="heads=5"):
        CrateMAE.from_reference(random_checkpoint(), heads=5)
