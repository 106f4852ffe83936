r"""CRATE-MAE: the masked autoencoder.

Book: :ref:`ch-crate-mae`; the layers are derived in :ref:`ch-layers`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from crate_core.model.autoencoder import Layers, MaskedAutoencoder
from crate_core.model.config import CrateMAEConfig
from crate_core.model.files import load_weights, unwrap_state_dict
from crate_core.model.layers import DecoderLayer, EncoderLayer
from crate_core.model.reference import convert_reference


class CrateMAE(MaskedAutoencoder):
    r"""The masked autoencoder of the paper.

    .. math::

        X^0 = [\,c;\ \mathrm{visible\ patches\ or\ mask\ token}\,] + P, \qquad
        X^{\ell+1} = \mathrm{Enc}^\ell(X^\ell), \qquad
        Y^0 = \mathrm{LN}(X^L), \qquad Y^{\ell+1} = \mathrm{Dec}^\ell(Y^\ell),

    with predictions :math:`W\,\mathrm{LN}(Y^L) + b` and the mean squared error over the
    removed patches as loss.  Mask tokens are put in place before the encoder, so it
    sees all L + 1 tokens; P is one fixed sine-cosine table.

    Parameters
    ----------
    config : sizes; see :class:`CrateMAEConfig`.

    Book: :ref:`ch-crate-mae`.  The authors' published code, without its two unused
    position tables and its unused linear map, so that every parameter receives a
    gradient; patch embedding is a matrix on flattened patches.
    """

    config_class: ClassVar[type[CrateMAEConfig]] = CrateMAEConfig
    config: CrateMAEConfig
    encoder: Layers[EncoderLayer]
    decoder: Layers[DecoderLayer]

    def __init__(self, config: CrateMAEConfig) -> None:
        self.check_config(config)
        super().__init__(
            config,
            (EncoderLayer(config) for _ in range(config.depth)),
            (DecoderLayer(config) for _ in range(config.decoder_layers)),
            config.dim,
        )
        self._initialize()

    def _initialize(self) -> None:
        # The distributions of the authors' code.  The bias of the patch embedding keeps
        # PyTorch's default, as there.
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                dictionary = name.endswith(".densify")
                (nn.init.kaiming_uniform_ if dictionary else nn.init.xavier_uniform_)(
                    module.weight
                )
                if module.bias is not None and module is not self.patch_embedding:
                    nn.init.zeros_(module.bias)

    @classmethod
    def from_reference(
        cls,
        source: str | Path | Mapping[str, Tensor],
        heads: int | None = None,
        **overrides: Any,
    ) -> "CrateMAE":
        """The authors' published ``mae_crate_*`` weights in this model.

        Parameters
        ----------
        source : a file (read without unpickling objects) or a state dict.
        heads : number of heads, for a size that was not published.
        overrides : configuration fields that the weights do not tell, such as ``lambd``
            or ``normalize_targets``.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If these are not the weights of a CRATE-MAE with the fixed sine-cosine
            position table.

        Book: :ref:`ch-crate-mae`.
        """
        if isinstance(source, str | Path):
            state = load_weights(source)
        else:
            state = unwrap_state_dict(source, source="the mapping")
        sizes, weights = convert_reference(state, heads)
        model = cls(CrateMAEConfig.from_dict({**sizes, **overrides}))
        table = state["decoder_pos_embed"][0].to(model.positions)
        if table.shape != model.positions.shape or not torch.allclose(
            table, model.positions, atol=1e-4
        ):
            raise ValueError(
                "the checkpoint's position table is not the fixed sine-cosine table "
                "this model uses"
            )
        model.load_weights(weights, source="the authors' checkpoint")
        return model
