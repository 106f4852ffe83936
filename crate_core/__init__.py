"""The package that the book *CRATE-MAE, executed* builds chapter by chapter.

Names are imported from their modules when they are first used, so that
``import crate_core`` costs nothing and the command line answers without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crate_core.data.named import open_data as open_data
    from crate_core.evaluation.evaluate import evaluate as evaluate
    from crate_core.evaluation.finetune import finetune as finetune
    from crate_core.evaluation.finetune_recipe import FinetuneConfig as FinetuneConfig
    from crate_core.model.attention import MSSA as MSSA
    from crate_core.model.attention import attend as attend
    from crate_core.model.attention import attention_weights as attention_weights
    from crate_core.model.attention import exact_mssa as exact_mssa
    from crate_core.model.attention import mssa as mssa
    from crate_core.model.attention import mssa_step as mssa_step
    from crate_core.model.autoencoder import CrateMAEOutput as CrateMAEOutput
    from crate_core.model.autoencoder import Reconstruction as Reconstruction
    from crate_core.model.build import load_model as load_model
    from crate_core.model.classifier import Classifier as Classifier
    from crate_core.model.config import PRESETS as PRESETS
    from crate_core.model.config import CrateMAEConfig as CrateMAEConfig
    from crate_core.model.config import ViTMAEConfig as ViTMAEConfig
    from crate_core.model.crate import CrateMAE as CrateMAE
    from crate_core.model.layers import DecoderLayer as DecoderLayer
    from crate_core.model.layers import EncoderLayer as EncoderLayer
    from crate_core.model.patches import patchify as patchify
    from crate_core.model.patches import random_masking as random_masking
    from crate_core.model.patches import sincos_positions as sincos_positions
    from crate_core.model.patches import unpatchify as unpatchify
    from crate_core.model.sparsify import ISTA as ISTA
    from crate_core.model.sparsify import ista as ista
    from crate_core.model.sparsify import lasso_objective as lasso_objective
    from crate_core.model.sparsify import proximal_step as proximal_step
    from crate_core.model.vit import ViTMAE as ViTMAE
    from crate_core.theory.denoise import add_noise as add_noise
    from crate_core.theory.denoise import noise_left as noise_left
    from crate_core.theory.denoise import project as project
    from crate_core.theory.denoise import project_nearest as project_nearest
    from crate_core.theory.denoise import tweedie as tweedie
    from crate_core.theory.diffusion import (
        exact_structured_flow as exact_structured_flow,
    )
    from crate_core.theory.diffusion import forward_noising as forward_noising
    from crate_core.theory.diffusion import probability_flow as probability_flow
    from crate_core.theory.diffusion import reverse_sde as reverse_sde
    from crate_core.theory.diffusion import structured_flow as structured_flow
    from crate_core.theory.law import compression_bound as compression_bound
    from crate_core.theory.law import contraction_bound as contraction_bound
    from crate_core.theory.law import denoising_cosine as denoising_cosine
    from crate_core.theory.law import denoising_cosine_law as denoising_cosine_law
    from crate_core.theory.mixture import (
        LowRankGaussianMixture as LowRankGaussianMixture,
    )
    from crate_core.theory.mixture import MixtureSample as MixtureSample
    from crate_core.theory.mixture import coherence as coherence
    from crate_core.theory.mixture import random_bases as random_bases
    from crate_core.theory.rate import class_coding_rate as class_coding_rate
    from crate_core.theory.rate import coding_rate as coding_rate
    from crate_core.theory.rate import coding_rate_grad as coding_rate_grad
    from crate_core.theory.rate import rate_reduction as rate_reduction
    from crate_core.theory.rate import sparse_rate_reduction as sparse_rate_reduction
    from crate_core.theory.rate import subspace_coding_rate as subspace_coding_rate
    from crate_core.theory.rate import (
        subspace_coding_rate_grad as subspace_coding_rate_grad,
    )
    from crate_core.training.pretrain import pretrain as pretrain
    from crate_core.training.recipe import PretrainConfig as PretrainConfig

EXPORTS = {
    "theory.denoise": (
        "add_noise",
        "noise_left",
        "project",
        "project_nearest",
        "tweedie",
    ),
    "theory.diffusion": (
        "exact_structured_flow",
        "forward_noising",
        "probability_flow",
        "reverse_sde",
        "structured_flow",
    ),
    "theory.law": (
        "compression_bound",
        "contraction_bound",
        "denoising_cosine",
        "denoising_cosine_law",
    ),
    "theory.mixture": (
        "LowRankGaussianMixture",
        "MixtureSample",
        "coherence",
        "random_bases",
    ),
    "theory.rate": (
        "class_coding_rate",
        "coding_rate",
        "coding_rate_grad",
        "rate_reduction",
        "sparse_rate_reduction",
        "subspace_coding_rate",
        "subspace_coding_rate_grad",
    ),
    "model.attention": (
        "MSSA",
        "attend",
        "attention_weights",
        "exact_mssa",
        "mssa",
        "mssa_step",
    ),
    "model.autoencoder": (
        "CrateMAEOutput",
        "Reconstruction",
    ),
    "model.build": ("load_model",),
    "model.classifier": ("Classifier",),
    "model.config": (
        "PRESETS",
        "CrateMAEConfig",
        "ViTMAEConfig",
    ),
    "model.crate": ("CrateMAE",),
    "model.layers": (
        "DecoderLayer",
        "EncoderLayer",
    ),
    "model.patches": (
        "patchify",
        "random_masking",
        "sincos_positions",
        "unpatchify",
    ),
    "model.sparsify": (
        "ISTA",
        "ista",
        "lasso_objective",
        "proximal_step",
    ),
}
"""Names by module, for when the program runs; a test holds them equal to the above."""

TRAIN_EXPORTS = {
    "model.vit": ("ViTMAE",),
    "data.named": ("open_data",),
    "training.pretrain": ("pretrain",),
    "training.recipe": ("PretrainConfig",),
    "evaluation.evaluate": ("evaluate",),
    "evaluation.finetune": ("finetune",),
    "evaluation.finetune_recipe": ("FinetuneConfig",),
}
"""Those that need the [train] extra; ``from crate_core import *`` leaves them out."""

FOLDERS = ("theory", "model", "data", "training", "evaluation", "inspection")

_MODULE_OF = {
    name: module
    for exports in (EXPORTS, TRAIN_EXPORTS)
    for module, names in exports.items()
    for name in names
}
__all__ = sorted(name for names in EXPORTS.values() for name in names)


def __getattr__(name: str) -> Any:
    if name in FOLDERS:  # crate_core.theory, without an import of its own
        return import_module(f"crate_core.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'crate_core' has no attribute {name!r}")
    module = _MODULE_OF[name]
    try:
        value = getattr(import_module(f"crate_core.{module}"), name)
    except ModuleNotFoundError as error:
        if module not in TRAIN_EXPORTS:
            raise
        raise ImportError(
            f"crate_core.{name} needs {error.name}, which is not installed: "
            "pip install 'crate-core[train]'"
        ) from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF, *FOLDERS})
