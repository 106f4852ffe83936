r"""What a linear map reads off the tokens of removed patches: what each layer brought
there from visible ones.

Book: :ref:`ch-layer-by-layer`.
"""

import math

import numpy as np
import torch

from crate_core.keys import evaluation_noise
from crate_core.model.autoencoder import MaskedAutoencoder, evaluation_mode
from crate_core.model.patches import patchify
from crate_core.shapes import Images, OtherImages

READOUT_RIDGE = 1e-2
"""Weight of the ridge penalty of :func:`linear_readout`, for standardised tokens, per
token.
"""


@torch.no_grad()
def linear_readout(
    model: MaskedAutoencoder,
    fitted: Images,
    tested: OtherImages,
    mask_ratio: float,
    seed: int = 0,
) -> np.ndarray:
    r"""How much of the removed patches a linear map reads off their own tokens, by
    layer,

    .. math:: 1 - \frac{\sum (t - \hat t)^2}{\sum (t - \bar t)^2},

    for the pixels t of removed patches of ``tested`` pictures, a ridge regression
    :math:`\hat t` fitted on ``fitted`` ones and :math:`\bar t` the mean picture of
    those.  A removed patch's token starts as position alone, which knows no more than
    the mean picture; whatever is above 0 was brought there from visible patches.

    Parameters
    ----------
    model : one whose encoder sees tokens of removed patches too.
    fitted, tested : (B, C, H, W) in [0, 1].
    mask_ratio : share of patches removed, in (0, 1).
    seed : of the masks.

    Returns
    -------
    array (L + 1,)
        For the embedding and the output of each layer; at most 1, below 0 where the fit
        does not carry over.

    Raises
    ------
    ValueError
        If the encoder sees visible patches only, or no patch is removed.

    Book: :ref:`ch-layer-by-layer`.
    """
    if model.config.encode_visible_only:
        raise ValueError("the encoder of this model sees no token of a removed patch")
    with evaluation_mode(model):
        device = next(model.parameters()).device
        length = math.prod(model.config.grid)
        noise = evaluation_noise(seed, len(fitted) + len(tested), length)
        pictures = model.standardize(torch.cat([fitted, tested]).to(device))
        out = model(pictures, mask_ratio, noise.to(device), output_hidden_states=True)
        assert out.hidden_states is not None  # asked for
    if not bool((out.mask > 0).any()):
        raise ValueError(f"mask_ratio={mask_ratio} removes no patch of {length}")
    pixels, first = (
        patchify(pictures, model.config.patch_size).cpu().double(),
        len(fitted),
    )
    targets = pixels - pixels[:first].mean(dim=0)
    removed = out.mask.cpu() > 0
    train, test = removed[:first], removed[first:]
    shares = []
    for hidden in out.hidden_states:
        tokens = hidden[:, 1:].cpu().double()
        rows = tokens[:first][train]
        spread = rows.std(dim=0)
        tokens = (tokens - rows.mean(dim=0)) / spread.clamp_min(
            1e-3 * float(spread.max())
        )
        rows, wanted = tokens[:first][train], targets[:first][train]
        gram = rows.mT @ rows + READOUT_RIDGE * len(rows) * torch.eye(rows.shape[1]).to(
            rows
        )
        read = tokens[first:][test] @ torch.linalg.solve(gram, rows.mT @ wanted)
        true = targets[first:][test]
        shares.append(float(1 - (true - read).square().sum() / true.square().sum()))
    return np.array(shares)
