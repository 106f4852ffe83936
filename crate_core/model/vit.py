r"""ViT-MAE in the same frame: the comparison that matched layers need.

The encoder and decoder layers are timm's vision-transformer blocks; patches, masks,
positions, loss, saving and the training loop are those of CRATE-MAE
(:mod:`crate_core.model.autoencoder`).

Book: :ref:`ch-comparison`.
"""

from functools import partial
from typing import Any, ClassVar, cast

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from crate_core.model.autoencoder import Layers, MaskedAutoencoder
from crate_core.model.config import ViTMAEConfig
from crate_core.model.patches import sincos_positions
from crate_core.shapes import AttentionWeights, PatchOrder, Tokens

BLOCK_NORM_EPS = 1e-6
"""Added to the variance in the LayerNorms inside blocks, as in MAE."""


class ViTBlock(Block):
    r"""timm's pre-norm transformer block :math:`U = X + \mathrm{MHSA}(\mathrm{LN}(X))`,
    :math:`X' = U + \mathrm{MLP}(\mathrm{LN}(U))`, which can tell its attention weights.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        # timm asks for a class and takes any function
        norm: Any = partial(nn.LayerNorm, eps=BLOCK_NORM_EPS)
        super().__init__(dim, heads, mlp_ratio, qkv_bias=True, norm_layer=norm)
        # PyTorch's fused attention on a CPU is slow backwards in bfloat16, and pictures
        # there have few tokens.
        cast(Any, self.attn).fused_attn = torch.cuda.is_available()

    def attention_weights(self, x: Tokens) -> AttentionWeights:
        """The weights (B, K, n, n) of the block's attention at its input x."""
        attention = cast(Any, self.attn)
        heads = attention.qkv(self.norm1(x)).unflatten(-1, (3, attention.num_heads, -1))
        queries, keys = (
            heads[..., 0, :, :].transpose(-3, -2),
            heads[..., 1, :, :].transpose(-3, -2),
        )
        return torch.softmax(attention.scale * (queries @ keys.mT), dim=-1)


class ViTMAE(MaskedAutoencoder):
    r"""The masked autoencoder of He et al. (2022) in the frame of
    :class:`crate_core.model.autoencoder.MaskedAutoencoder`.

    Pre-norm blocks :math:`X' = U + \mathrm{MLP}(\mathrm{LN}(U))`, :math:`U = X +
    \mathrm{MHSA}(\mathrm{LN}(X))`; a linear map into the decoder's width, mask tokens
    put in place there, positions added again.

    Parameters
    ----------
    config : sizes; see :class:`ViTMAEConfig`.

    Book: :ref:`ch-comparison`.  Blocks are timm's; the initialisation is MAE's.
    """

    config_class: ClassVar[type[ViTMAEConfig]] = ViTMAEConfig
    config: ViTMAEConfig
    encoder: Layers[ViTBlock]
    decoder: Layers[ViTBlock]
    decoder_positions: Tensor

    def __init__(self, config: ViTMAEConfig) -> None:
        self.check_config(config)
        super().__init__(
            config,
            (
                ViTBlock(config.dim, config.heads, config.mlp_ratio)
                for _ in range(config.depth)
            ),
            (
                ViTBlock(config.decoder_dim, config.decoder_heads, config.mlp_ratio)
                for _ in range(config.decoder_depth)
            ),
            config.decoder_dim,
        )
        self.decoder_embedding = nn.Linear(config.dim, config.decoder_dim)
        self.register_buffer(
            "decoder_positions",
            sincos_positions(config.decoder_dim, config.grid),
            persistent=False,
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def enter_decoder(
        self, y: Tokens, ids_restore: PatchOrder, grid: tuple[int, int]
    ) -> Tensor:
        """Tokens in the decoder's width, mask tokens put in place, positions added."""
        embedded = self.decoder_embedding(y)
        tokens = (
            self.restore(embedded, ids_restore)
            if self.config.encode_visible_only
            else embedded
        )
        if grid == self.config.grid:
            return tokens + self.decoder_positions
        return tokens + sincos_positions(
            self.config.decoder_dim, grid, self.config.grid
        ).to(tokens)
