r"""The frame of every masked autoencoder here: patches, masks, positions, loss,
pictures, saving and loading.

A model is a frame with an encoder and a decoder in it.
:class:`crate_core.model.crate.CrateMAE` puts the paper's layers there,
:class:`crate_core.model.vit.ViTMAE` those of a vision transformer, so that a comparison
of the two compares layers and nothing else.

Book: :ref:`ch-crate-mae`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    Any,
    Generic,
    Literal,
    TypeVar,
    overload,
)

import torch
from torch import Tensor, nn

from crate_core.checks import check_tensor
from crate_core.model.config import FrameConfig
from crate_core.model.patches import (
    gather_tokens,
    normalize_patches,
    patch_grid,
    patchify,
    random_masking,
    restore_tokens,
    sincos_positions,
    unpatchify,
)
from crate_core.model.saved import SavedModel
from crate_core.shapes import (
    Images,
    Patches,
    PatchMask,
    PatchNoise,
    PatchOrder,
    Tokens,
)

MOST_OF_ONE = 2.0
"""Largest pixel that still passes for one of [0, 1]: resizing overshoots by a little,
bytes as floats by far.
"""

END_NORM_EPS = 1e-6
"""Added to the variance in the LayerNorms after the encoder and after the decoder."""


@dataclass(frozen=True)
class CrateMAEOutput:
    """What a forward pass returns; names as in transformers' ViTMAE."""

    loss: Tensor
    """Mean squared error over removed patches; not a number when none is removed."""
    logits: Patches
    """Predicted patches (B, L, P*P*C), in the units of the targets."""
    mask: PatchMask
    """(B, L), 1 where a patch was removed."""
    ids_restore: PatchOrder
    """(B, L), position of each patch in the order of increasing noise."""
    hidden_states: tuple[Tensor, ...] | None = None
    """Encoder tokens (B, n, d), if asked for: embedding, then each layer's output."""
    attentions: tuple[Tensor, ...] | None = None
    """Encoder attention weights (B, K, n, n) of each layer; when asked for."""
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    """Decoder tokens (B, n, d), with the encoder's: its input, each layer's output."""


@dataclass(frozen=True)
class Reconstruction:
    """Pictures (B, C, H, W) in the units of the input: ``masked`` input (removed
    patches at the pixel mean), ``predicted`` by the model everywhere, ``pasted``:
    visible patches of the input and predictions elsewhere; and the ``mask`` (B, L).
    """

    masked: Images
    predicted: Images
    pasted: Images
    mask: PatchMask


Layer = TypeVar("Layer", bound=nn.Module)


class Layers(nn.ModuleList, Generic[Layer]):
    """A ``ModuleList`` of layers of one class, which type checkers know."""

    if TYPE_CHECKING:

        @overload  # type: ignore[override]
        def __getitem__(self, idx: slice) -> "Layers[Layer]": ...
        @overload
        def __getitem__(self, idx: int) -> Layer: ...
        def __getitem__(self, idx: int | slice) -> Any: ...
        def __iter__(self) -> Iterator[Layer]: ...


Visit = Callable[[int, Tensor, Tensor], None]
"""Gets the number of a layer, its input and its output."""


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards, also after an exception, every part of
    it is in the mode that it was in.
    """
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


class MaskedAutoencoder(SavedModel):
    r"""Everything of a masked autoencoder but its layers.

    .. math::

        X^0 = [\,c;\ \mathrm{visible\ patches\ or\ mask\ token}\,] + P, \qquad
        X^{\ell+1} = \mathrm{Enc}^\ell(X^\ell), \qquad
        Y^0 = \mathrm{enter}(\mathrm{LN}(X^L)), \qquad Y^{\ell+1} =
        \mathrm{Dec}^\ell(Y^\ell),

    with predictions :math:`W\,\mathrm{LN}(Y^M) + b` and the mean squared error over the
    removed patches as loss.

    Parameters
    ----------
    config : sizes; see :class:`FrameConfig`.
    encoder, decoder : layers on tokens (B, n, d) and (B, n, decoder_dim).
    decoder_dim : width of the decoder.

    Book: :ref:`ch-crate-mae`.
    """

    config: FrameConfig
    positions: Tensor
    encoder: Layers[Any]
    decoder: Layers[Any]

    if TYPE_CHECKING:  # nn.Module hides the types of forward

        def __call__(
            self,
            images: Images,
            mask_ratio: float = 0.75,
            noise: PatchNoise | None = None,
            output_hidden_states: bool = False,
            output_attentions: bool = False,
        ) -> CrateMAEOutput: ...

    def __init__(
        self,
        config: FrameConfig,
        encoder: Iterable[nn.Module],
        decoder: Iterable[nn.Module],
        decoder_dim: int,
    ) -> None:
        super().__init__()
        self.config = config
        patch_pixels = config.patch_size**2 * config.channels
        self.patch_embedding = nn.Linear(patch_pixels, config.dim)
        self.class_token = nn.Parameter(torch.empty(1, 1, config.dim))
        self.mask_token = nn.Parameter(
            torch.empty(1, 1, decoder_dim if config.encode_visible_only else config.dim)
        )
        self.register_buffer(
            "positions", sincos_positions(config.dim, config.grid), persistent=False
        )
        self.encoder = Layers(encoder)
        self.encoder_norm = nn.LayerNorm(config.dim, eps=END_NORM_EPS)
        self.decoder = Layers(decoder)
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=END_NORM_EPS)
        self.prediction = nn.Linear(decoder_dim, patch_pixels)
        nn.init.normal_(self.class_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def standardize(self, images: Tensor) -> Images:
        """Pixels, uint8 in 0..255 or floating point in [0, 1], to model units: (x -
        mean) / std per channel.

        Raises ``ValueError`` for any other dtype, for floats of 0..255, or for the
        wrong number of channels; ``TypeError`` for what is no tensor.
        """
        check_tensor("images", images)
        if images.dtype == torch.uint8:
            images = images.to(self.positions.dtype) / 255
            self._check_images(images)
        else:
            self._check_images(images)
            self._check_range(images)
        mean, std = self._pixel_statistics(images)
        return (images - mean) / std

    @staticmethod
    def _check_range(images: Images) -> None:
        # Not while a compiler or an exporter traces, which cannot look at values.
        if images.is_meta or torch.compiler.is_compiling() or images.numel() == 0:
            return
        largest = float(images.detach().amax())
        if largest > MOST_OF_ONE:
            raise ValueError(
                f"floating-point pixels must be in [0, 1], got up to {largest:g}: "
                "divide them by 255, or pass uint8"
            )

    def unstandardize(self, images: Images) -> Images:
        """Model units back to [0, 1] pixels (predictions can fall outside): x * std +
        mean per channel.
        """
        self._check_images(images)
        mean, std = self._pixel_statistics(images)
        return images * std + mean

    def _pixel_statistics(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (
            torch.tensor(values, dtype=images.dtype, device=images.device)[
                :, None, None
            ]
            for values in (self.config.pixel_mean, self.config.pixel_std)
        )
        return mean, std

    def _check_images(self, images: Tensor) -> tuple[int, int]:
        """The patch grid of the images; ``ValueError`` if they are no images."""
        check_tensor("images", images)
        channels = self.config.channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(
                f"images must be (B, {channels}, H, W), got {tuple(images.shape)}"
            )
        if not images.is_floating_point():
            raise ValueError(
                f"images must be floating point, got {images.dtype}; "
                "model.standardize() takes uint8"
            )
        return patch_grid(images.shape[2], images.shape[3], self.config.patch_size)

    def _check_input(self, images: Tensor) -> tuple[int, int]:
        """The patch grid of images in model units; ``ValueError`` also if their dtype
        is not the weights'.
        """
        grid = self._check_images(images)
        own = self.positions.dtype
        if images.dtype != own and not torch.is_autocast_enabled(images.device.type):
            raise ValueError(
                f"images must be {own} like the weights, got {images.dtype}; convert "
                "with images.to(...)"
            )
        return grid

    def position_table(self, grid: tuple[int, int]) -> Tensor:
        """Positions (1 + L, d) for any grid: the fixed table at the configured size,
        rescaled coordinates elsewhere.
        """
        if grid == self.config.grid:
            return self.positions
        return sincos_positions(self.config.dim, grid, self.config.grid).to(
            self.positions
        )

    def with_class_token(self, tokens: Tokens) -> Tensor:
        """Put the class token first, (B, L, d) to (B, L + 1, d)."""
        return torch.cat(
            [self.class_token.to(tokens.dtype).expand(tokens.shape[0], -1, -1), tokens],
            dim=1,
        )

    def enter_decoder(
        self, y: Tokens, ids_restore: PatchOrder, grid: tuple[int, int]
    ) -> Tensor:
        """What the decoder starts from: the encoder's tokens; with visible ones only,
        mask tokens put in their places and positions added again.
        """
        return (
            y
            if not self.config.encode_visible_only
            else self.restore(y, ids_restore) + self.position_table(grid)
        )

    def restore(self, y: Tokens, ids_restore: PatchOrder) -> Tensor:
        """Class and visible tokens (B, 1 + L', d) to all tokens (B, 1 + L, d), mask
        tokens where none was encoded.
        """
        return torch.cat(
            [y[:, :1], restore_tokens(y[:, 1:], self.mask_token, ids_restore)], dim=1
        )

    def targets(self, images: Images) -> Patches:
        """The patches (B, L, P*P*C) that the model learns to predict: pixels,
        standardised per patch if so set.
        """
        patches = patchify(images, self.config.patch_size)
        return (
            normalize_patches(patches).normalized
            if self.config.normalize_targets
            else patches
        )

    def embed(self, images: Images) -> Tensor:
        """What the encoder starts from for whole images, (B, 1 + L, d): class token and
        patches, positions added.
        """
        grid = self._check_input(images)
        embedded = self.patch_embedding(patchify(images, self.config.patch_size))
        return self.with_class_token(embedded) + self.position_table(grid)

    def forward_features(self, images: Images) -> Tokens:
        """Encoder output (B, 1 + L, d) of whole images, nothing masked; the class token
        comes first.

        Raises ``ValueError`` for images of the wrong shape, size or dtype.  Book:
        :ref:`ch-crate-mae`.
        """
        return self.encode(self.embed(images))

    def encode(
        self,
        x: Tokens,
        start: int = 0,
        stop: int | None = None,
        visit: Visit | None = None,
    ) -> Tensor:
        """Encoder layers ``start`` to ``stop`` - 1 (the last), then the norm after
        them, on tokens (B, n, d).

        ``visit`` is called after each layer with its number, its input and its output.
        Book: :ref:`ch-crate-mae`.
        """
        depth = len(self.encoder)
        for index in range(start, depth if stop is None else stop):
            before, x = x, self.encoder[index](x)
            if visit is not None:
                visit(index, before, x)
        return self.encoder_norm(x)

    def decode(
        self,
        encoded: Tokens,
        ids_restore: PatchOrder,
        grid: tuple[int, int],
        visit: Visit | None = None,
    ) -> Tensor:
        """Predicted patches (B, L, P*P*C), in the units of the targets, from the
        encoder's output.

        Parameters
        ----------
        encoded : what :meth:`encode` returns.
        ids_restore : (B, L), places of the patches in the order of the mask; read only
            with ``encode_visible_only``.
        grid : patches down and across.
        visit : called after each layer with its number, its input and its output.

        Book: :ref:`ch-crate-mae`.
        """
        y = self.enter_decoder(encoded, ids_restore, grid)
        for index, layer in enumerate(self.decoder):
            before, y = y, layer(y)
            if visit is not None:
                visit(index, before, y)
        return self.prediction(self.decoder_norm(y))[:, 1:]

    def denormalize(self, predicted: Patches, originals: Patches) -> Patches:
        """Predicted patches as pixels in model units: with ``normalize_targets`` on the
        mean and deviation of each *original* patch, else as they are.
        """
        if not self.config.normalize_targets:
            return predicted
        statistics = normalize_patches(originals)
        return predicted * statistics.std + statistics.mean

    def forward_intermediates(
        self,
        images: Images,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Outputs of chosen encoder layers for whole images, as timm's models return
        them.

        Parameters
        ----------
        images : (B, C, H, W) in model units.
        indices : the last n layers, or these layers (negative ones count from the end);
            all if ``None``.
        return_prefix_tokens : give pairs (patch tokens, class token (B, 1, d)) in place
            of patch tokens.
        norm : apply the LayerNorm after the encoder to each.
        stop_early : leave out layers after the last chosen one; the encoder output is
            then that layer's.
        output_fmt : ``NCHW``, maps (B, d, rows, columns); or ``NLC``, tokens (B, L, d).
        intermediates_only : return the list alone.

        Returns
        -------
        (encoder output (B, 1 + L, d), list of layer outputs in the order of depth), or
        the list.

        Raises
        ------
        ValueError
            For a layer that does not exist, another format, or images that
            ``forward_features`` refuses.

        Book: :ref:`ch-evaluation`.
        """
        chosen = self._layer_indices(indices)
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}: accepted are NCHW and NLC")
        grid = self._check_input(images)
        found: list[Any] = []

        def gather(index: int, _: Tensor, x: Tensor) -> None:
            if index not in chosen:
                return
            y = self.encoder_norm(x) if norm else x
            patches = y[:, 1:]
            if output_fmt == "NCHW":
                patches = patches.mT.unflatten(-1, grid).contiguous()
            found.append((patches, y[:, :1]) if return_prefix_tokens else patches)

        stop = max(chosen) + 1 if stop_early else None
        output = self.encode(self.embed(images), stop=stop, visit=gather)
        return found if intermediates_only else (output, found)

    def _layer_indices(self, indices: int | Sequence[int] | None) -> set[int]:
        """Encoder layers by number from 0; ``ValueError`` for one that is not there."""
        depth = len(self.encoder)
        wanted = (
            range(depth)
            if indices is None
            else range(-indices, 0)
            if isinstance(indices, int)
            else indices
        )
        odd = [i for i in wanted if not -depth <= i < depth]
        if odd or not wanted:
            raise ValueError(
                f"indices={indices}: accepted are 1 to {depth} last layers, or layers "
                f"-{depth} to {depth - 1}"
            )
        return {i % depth for i in wanted}

    def forward(
        self,
        images: Images,
        mask_ratio: float = 0.75,
        noise: PatchNoise | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> CrateMAEOutput:
        """Mask, encode, decode, compare.

        Parameters
        ----------
        images : (B, C, H, W) in model units (see :meth:`standardize`), H and W
            multiples of the patch size.
        mask_ratio : share of patches to remove, in [0, 1).
        noise : (B, L) in [0, 1), fixes the mask: the lowest values stay visible.  Drawn
            afresh if ``None``.
        output_hidden_states : also return the tokens between layers, of the encoder and
            of the decoder.
        output_attentions : also return the encoder's attention weights; this stores n x
            n numbers a head.

        Raises
        ------
        ValueError
            For images of the wrong shape, size or dtype, noise of the wrong shape, or a
            mask ratio out of range.

        Book: :ref:`ch-crate-mae`.
        """
        grid = self._check_input(images)
        batch, length = images.shape[0], grid[0] * grid[1]
        if noise is None:
            noise = torch.rand(batch, length, device=images.device)
        check_tensor("noise", noise)
        if noise.shape != (batch, length):
            raise ValueError(
                f"noise must be ({batch}, {length}), one number a patch, got "
                f"{tuple(noise.shape)}"
            )
        masking = random_masking(noise, mask_ratio)
        mask = masking.mask.to(images.dtype)
        positions = self.position_table(grid)

        embedded = self.patch_embedding(patchify(images, self.config.patch_size))
        if self.config.encode_visible_only:
            visible = gather_tokens(embedded + positions[1:], masking.ids_keep)
            x = self.with_class_token(visible)
        else:
            filled = torch.where(
                mask[..., None] > 0, self.mask_token.to(embedded.dtype), embedded
            )
            x = self.with_class_token(filled) + positions

        hidden_states: list[Tensor] = [x]
        decoder_hidden_states: list[Tensor] = []
        attentions: list[Tensor] = []

        def keep_encoder(index: int, before: Tensor, after: Tensor) -> None:
            if output_attentions:
                layer = self.encoder[index]
                attentions.append(layer.attention_weights(before))
            if output_hidden_states:
                hidden_states.append(after)

        def keep_decoder(index: int, before: Tensor, after: Tensor) -> None:
            decoder_hidden_states.extend([before, after] if index == 0 else [after])

        asked = output_hidden_states or output_attentions
        encoded = self.encode(x, visit=keep_encoder if asked else None)
        logits = self.decode(
            encoded,
            masking.ids_restore,
            grid,
            visit=keep_decoder if output_hidden_states else None,
        )
        error = (logits - self.targets(images)).square().mean(dim=-1)  # (B, L)
        return CrateMAEOutput(
            loss=(error * mask).sum() / mask.sum(),
            logits=logits,
            mask=mask,
            ids_restore=masking.ids_restore,
            hidden_states=tuple(hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
            decoder_hidden_states=tuple(decoder_hidden_states)
            if output_hidden_states
            else None,
        )

    @torch.no_grad()
    def reconstruct(
        self, images: Images, mask_ratio: float = 0.75, noise: PatchNoise | None = None
    ) -> Reconstruction:
        """Mask images and fill them in; pictures come back in the units of the input.

        With ``normalize_targets`` the model predicts standardised patches; they are put
        back on the mean and variance of the *original* patches, which only someone who
        has the originals can do.

        Raises ``ValueError`` as ``forward`` does.  Book: :ref:`ch-crate-mae`.
        """
        out = self(images, mask_ratio, noise)
        size, grid = self.config.patch_size, self._check_images(images)
        originals = patchify(images, size)
        predicted = self.denormalize(out.logits, originals)
        removed = out.mask[..., None] > 0
        return Reconstruction(
            masked=unpatchify(originals.masked_fill(removed, 0.0), size, grid),
            predicted=unpatchify(predicted, size, grid),
            pasted=unpatchify(
                torch.where(removed, predicted.to(originals.dtype), originals),
                size,
                grid,
            ),
            mask=out.mask,
        )
