r"""CRATE-MAE as its equations read, step by step, to measure the package against.

Three products with the tokens in ISTA, attention weights that are stored, LayerNorms
and sums one after the other, the mask by two gathers: what the published code computes,
transcribed from the equations.  It shares the weights with a
:class:`crate_core.model.crate.CrateMAE` and none of its computation.  Single steps can
be swapped for the package's, one at a time, which is how ``speed.py`` finds what each
of them gains.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_core.model.attention import MSSA
from crate_core.model.crate import CrateMAE

IstaStep = Callable[[Tensor, Tensor, float, float], Tensor]
Attend = Callable[[Tensor, float], Tensor]


def plain_ista(z: Tensor, dictionary: Tensor, eta: float, lambd: float) -> Tensor:
    """Tokens as rows (B, n, d): the three products of D^T z - D^T D z one after the
    other.
    """
    reconstructed = F.linear(z, dictionary)
    step = F.linear(z, dictionary.T) - F.linear(reconstructed, dictionary.T)
    return F.relu(z + (eta * step - eta * lambd))


def plain_attend(v: Tensor, scale: float) -> Tensor:
    """Heads (B, K, n, p): the weights (B, K, n, n) are stored, as inner products,
    scaled, and after the softmax.
    """
    scores = (v @ v.transpose(-1, -2)) * scale
    return torch.softmax(scores, dim=-1) @ v


class PlainCrateMAE(nn.Module):
    """The published forward pass on the weights of ``model``; (loss, predictions) of
    images (B, C, H, W).
    """

    def __init__(
        self,
        model: CrateMAE,
        ista: IstaStep = plain_ista,
        attend: Attend = plain_attend,
    ) -> None:
        super().__init__()
        self.model, self.ista, self.attend = model, ista, attend
        config = model.config
        kernel = model.patch_embedding.weight.detach()
        self.embed = nn.Conv2d(
            config.channels, config.dim, config.patch_size, config.patch_size
        )
        # ours is a matrix on flattened patches: rows, columns, channels
        with torch.no_grad():
            size = (config.dim, config.patch_size, config.patch_size, config.channels)
            self.embed.weight.copy_(kernel.view(size).permute(0, 3, 1, 2))
            assert self.embed.bias is not None
            self.embed.bias.copy_(model.patch_embedding.bias)

    def attention(self, module: MSSA, z: Tensor) -> Tensor:
        batch, n, dim = z.shape
        heads = (
            F.linear(z, module.project.weight)
            .view(batch, n, module.heads, dim // module.heads)
            .transpose(1, 2)
        )
        attended = (
            self.attend(heads, module.scale).transpose(1, 2).reshape(batch, n, dim)
        )
        return F.linear(attended, module.output.weight, module.output.bias)

    def patches(self, images: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        size = self.model.config.patch_size
        blocks = images.reshape(
            batch, channels, height // size, size, width // size, size
        )
        return blocks.permute(0, 2, 4, 3, 5, 1).reshape(
            batch, -1, size * size * channels
        )

    def forward(
        self, images: Tensor, mask_ratio: float, noise: Tensor
    ) -> tuple[Tensor, Tensor]:
        model, config = self.model, self.model.config
        embedded = self.embed(images).flatten(2).transpose(1, 2)
        batch, length, dim = embedded.shape
        kept = int(length * (1 - mask_ratio))
        shuffle = torch.argsort(noise, dim=1)
        restore = torch.argsort(shuffle, dim=1)
        visible = torch.gather(embedded, 1, shuffle[:, :kept, None].expand(-1, -1, dim))
        mask = torch.ones(batch, length, device=images.device)
        mask[:, :kept] = 0
        mask = torch.gather(mask, 1, restore)
        filled = torch.cat(
            [visible, model.mask_token.expand(batch, length - kept, -1)], dim=1
        )
        filled = torch.gather(filled, 1, restore[:, :, None].expand(-1, -1, dim))
        rows, columns = (side // config.patch_size for side in images.shape[-2:])
        x = torch.cat(
            [model.class_token.expand(batch, -1, -1), filled], dim=1
        ) + model.position_table((rows, columns))
        for layer in model.encoder:
            x = x + self.attention(layer.attention, layer.norm_attention(x))
            x = self.ista(
                layer.norm_sparsify(x), layer.sparsify.weight, config.eta, config.lambd
            )
        y = model.encoder_norm(x)
        for layer in model.decoder:
            v = F.linear(layer.norm_densify(y), layer.densify.weight)
            y = v - self.attention(layer.attention, layer.norm_attention(v))
        predicted = model.prediction(model.decoder_norm(y))[:, 1:]
        target = self.patches(images)
        if config.normalize_targets:
            mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
            target = (target - mean) / torch.sqrt(variance + 1e-6)
        error = ((predicted - target) ** 2).mean(-1)
        return (error * mask).sum() / mask.sum(), predicted
