"""The package that the book *CRATE-MAE, executed* builds chapter by chapter.

Names are imported from their modules when they are first used, so that ``import crate_core`` costs nothing and the
command line answers without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crate_core.attention import MSSA as MSSA
    from crate_core.attention import attend as attend
    from crate_core.attention import attention_weights as attention_weights
    from crate_core.attention import exact_mssa as exact_mssa
    from crate_core.attention import mssa as mssa
    from crate_core.attention import mssa_step as mssa_step
    from crate_core.config import PRESETS as PRESETS
    from crate_core.config import CrateMAEConfig as CrateMAEConfig
    from crate_core.denoise import add_noise as add_noise
    from crate_core.denoise import noise_left as noise_left
    from crate_core.denoise import project as project
    from crate_core.denoise import project_nearest as project_nearest
    from crate_core.denoise import tweedie as tweedie
    from crate_core.diffusion import exact_structured_flow as exact_structured_flow
    from crate_core.diffusion import forward_noising as forward_noising
    from crate_core.diffusion import probability_flow as probability_flow
    from crate_core.diffusion import reverse_sde as reverse_sde
    from crate_core.diffusion import structured_flow as structured_flow
    from crate_core.law import compression_bound as compression_bound
    from crate_core.law import contraction_bound as contraction_bound
    from crate_core.law import denoising_cosine as denoising_cosine
    from crate_core.law import denoising_cosine_law as denoising_cosine_law
    from crate_core.layers import DecoderLayer as DecoderLayer
    from crate_core.layers import EncoderLayer as EncoderLayer
    from crate_core.mixture import LowRankGaussianMixture as LowRankGaussianMixture
    from crate_core.mixture import MixtureSample as MixtureSample
    from crate_core.mixture import coherence as coherence
    from crate_core.mixture import random_bases as random_bases
    from crate_core.model import CrateMAE as CrateMAE
    from crate_core.outputs import CrateMAEOutput as CrateMAEOutput
    from crate_core.outputs import Reconstruction as Reconstruction
    from crate_core.patches import patchify as patchify
    from crate_core.patches import random_masking as random_masking
    from crate_core.patches import sincos_positions as sincos_positions
    from crate_core.patches import unpatchify as unpatchify
    from crate_core.rate import class_coding_rate as class_coding_rate
    from crate_core.rate import coding_rate as coding_rate
    from crate_core.rate import coding_rate_grad as coding_rate_grad
    from crate_core.rate import rate_reduction as rate_reduction
    from crate_core.rate import sparse_rate_reduction as sparse_rate_reduction
    from crate_core.rate import subspace_coding_rate as subspace_coding_rate
    from crate_core.rate import subspace_coding_rate_grad as subspace_coding_rate_grad
    from crate_core.sparsify import ISTA as ISTA
    from crate_core.sparsify import ista as ista
    from crate_core.sparsify import lasso_objective as lasso_objective
    from crate_core.sparsify import proximal_step as proximal_step

EXPORTS = {
    "attention": (
        "MSSA",
        "attend",
        "attention_weights",
        "exact_mssa",
        "mssa",
        "mssa_step",
    ),
    "config": (
        "PRESETS",
        "CrateMAEConfig",
    ),
    "denoise": (
        "add_noise",
        "noise_left",
        "project",
        "project_nearest",
        "tweedie",
    ),
    "diffusion": (
        "exact_structured_flow",
        "forward_noising",
        "probability_flow",
        "reverse_sde",
        "structured_flow",
    ),
    "law": (
        "compression_bound",
        "contraction_bound",
        "denoising_cosine",
        "denoising_cosine_law",
    ),
    "layers": (
        "DecoderLayer",
        "EncoderLayer",
    ),
    "mixture": (
        "LowRankGaussianMixture",
        "MixtureSample",
        "coherence",
        "random_bases",
    ),
    "model": ("CrateMAE",),
    "outputs": (
        "CrateMAEOutput",
        "Reconstruction",
    ),
    "patches": (
        "patchify",
        "random_masking",
        "sincos_positions",
        "unpatchify",
    ),
    "rate": (
        "class_coding_rate",
        "coding_rate",
        "coding_rate_grad",
        "rate_reduction",
        "sparse_rate_reduction",
        "subspace_coding_rate",
        "subspace_coding_rate_grad",
    ),
    "sparsify": (
        "ISTA",
        "ista",
        "lasso_objective",
        "proximal_step",
    ),
}
"""The names above by module, for when the program runs; a test holds the two equal."""

_MODULE_OF = {name: module for module, names in EXPORTS.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(import_module(f"crate_core.{_MODULE_OF[name]}"), name)
    elif name in EXPORTS:  # crate_core.rate, without an import of its own
        return import_module(f"crate_core.{name}")
    else:
        raise AttributeError(f"module 'crate_core' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF, *EXPORTS})
