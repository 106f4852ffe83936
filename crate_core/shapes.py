r"""Array-type aliases: the notation table in code.

Tokens are rows in code, shape ``(..., n, d)``, and columns in the text, :math:`Z \in
\mathbb{R}^{d \times n}`. The aliases below name every array that crosses a public
signature.  They are annotations: nothing is checked in ordinary use; ``make test``
checks them with beartype.

========= ============================================================
axis      meaning
========= ============================================================
``n``     number of tokens
``d``     token dimension
``K``     number of subspaces (attention heads)
``p``     dimension (rank) of each subspace
``m``     number of dictionary atoms
``B``     images in a batch
``L``     patches in an image
``C``     colour channels
``H W``   image height and width in pixels
========= ============================================================

Book: :ref:`ch-notation`.
"""

from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

Tokens = Float[Tensor, "*batch n d"]
"""Tokens as rows; any leading batch dimensions."""

TokenSubset = Float[Tensor, "*batch n_sub d"]
"""Some of the tokens, where all of them are there too."""

TokenVectors = Float[Tensor, "*tokens d"]
"""Vectors in token space with any leading shape, a single vector included."""

TokenMatrix = Float[Tensor, "n d"]
"""Tokens as rows, without batch dimensions."""

Bases = Float[Tensor, "K d p"]
"""One d x p basis per subspace, columns orthonormal where a function says so."""

Heads = Float[Tensor, "*batch K n p"]
"""Tokens seen by each subspace: the coordinates U_k^T z as rows."""

AttentionWeights = Float[Tensor, "*batch K n n"]
"""Row-stochastic attention: entry (i, j) is the weight of token j in the output of
token i.
"""

Dictionary = Float[Tensor, "d m"]
"""Dictionary with m atoms as columns; m = d when complete."""

Codes = Float[Tensor, "*batch n m"]
"""Sparse codes as rows."""

Scalars = Float[Tensor, "*batch"]
"""One number per batch entry (a zero-dimensional tensor without batch dimensions)."""

PerToken = Float[Tensor, "*tokens"]
"""One number per token vector."""

Posterior = Float[Tensor, "*tokens K"]
"""Probability of each component given each token."""

SubspaceIndex = Int[Tensor, "*tokens"]
"""Index of a subspace, for tokens of any leading shape."""

Labels = Int[Tensor, "n"]
"""Component index of each token."""

Images = Float[Tensor, "B C H W"]
"""A batch of images."""

PictureVectors = Float[Tensor, "B k"]
"""One vector a picture: pooled features, or class scores."""

Pictures = Num[Tensor, "B C H W"]
"""A batch of pictures as they are read: bytes, or floating point in [0, 1]."""

OtherImages = Float[Tensor, "B_other C H W"]
"""Images beside another batch, as many as there are."""

Patches = Float[Tensor, "B L patch_pixels"]
"""Flattened patches: patch rows, then columns, then channels."""

PatchMask = Float[Tensor, "B L"]
"""1 where a patch is removed, 0 where it is visible."""

PatchNoise = Float[Tensor, "B L"]
"""Uniform noise that fixes a mask: the patches with the lowest values stay visible."""

PatchIndex = Int[Tensor, "B L_sub"]
"""Some patch indices, per image."""

PatchOrder = Int[Tensor, "B L"]
"""One index for each patch, per image."""

PatchSelection = Bool[Tensor, "L"]
"""Some places of the patch grid, the same in every image."""

HeadMaps = Float[Tensor, "B K h w"]
"""One map a head (or another source of maps) and picture, on the grid of patches or on
pixels.
"""

PixelMaps = Float[Tensor, "B K H W"]
"""Such maps on pixels, where maps on the grid of patches are there too."""

ObjectMask = Bool[Tensor, "B h w"]
"""True on the object, on the same grid as the maps that it is compared with."""

ObjectMaps = Bool[Tensor, "B K h w"]
"""Predicted object masks, one a map."""

PerMap = Float[Tensor, "B K"]
"""One number a map."""

ColorMaps = Float[Tensor, "B rgb h w"]
"""Colours in [0, 1] on the grid of patches."""
