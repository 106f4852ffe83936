r"""The encoder for other runtimes: ``torch.export`` and ONNX.

Book: :ref:`ch-evaluation`.
"""

from pathlib import Path

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from crate_core.model.autoencoder import MaskedAutoencoder
from crate_core.shapes import Images, Tokens


class Encoder(nn.Module):
    """The encoder alone as a module: ``forward`` is
    :meth:`~crate_core.model.autoencoder.MaskedAutoencoder.forward_features`.

    Book: :ref:`ch-evaluation`.
    """

    def __init__(self, model: MaskedAutoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Images) -> Tokens:
        """Encoder output (B, 1 + L, d) of images in model units."""
        return self.model.forward_features(images)


def example_images(model: MaskedAutoencoder) -> Images:
    """Two blank pictures of the model's size, on its device: what is traced."""
    return torch.zeros(
        2,
        model.config.channels,
        *model.config.image_shape,
        device=model.positions.device,
    )


def export_encoder(model: MaskedAutoencoder) -> ExportedProgram:
    """The encoder, evaluation mode, as a ``torch.export`` program for any batch size at
    the model's image size.

    Book: :ref:`ch-evaluation`.
    """
    return torch.export.export(
        Encoder(model).eval(),
        (example_images(model),),
        dynamic_shapes={"images": {0: Dim.DYNAMIC}},
    )


def save_onnx(model: MaskedAutoencoder, path: str | Path) -> None:
    """Write the encoder as an ONNX file, weights inside: input ``images`` (B, C, H, W)
    in model units, output ``features`` (B, 1 + L, d), any batch size.

    Raises ``ModuleNotFoundError`` without the packages onnx and onnxscript.  Book:
    :ref:`ch-evaluation`.
    """
    torch.onnx.export(
        Encoder(model).eval(),
        (example_images(model),),
        str(path),
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes={"images": {0: Dim.DYNAMIC}},
        dynamo=True,
        external_data=False,
        verbose=False,
    )
