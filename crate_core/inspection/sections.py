"""The parts of the report that ``crate inspect`` writes: what each shows, how to read
it, what was found.

Book: :ref:`ch-layer-by-layer`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from crate_core.inspection import figures as figures
from crate_core.inspection.heads import all_attention_maps
from crate_core.inspection.layers import (
    LayerInspection,
    WeightInspection,
    partner_scores,
)
from crate_core.inspection.readout import linear_readout
from crate_core.inspection.token_blends import interpolate_tokens
from crate_core.inspection.tokens import token_pca, trace_tokens
from crate_core.model.autoencoder import MaskedAutoencoder
from crate_core.model.patches import upsample
from crate_core.shapes import Images

SHOWN = 6
"""Pictures that the page shows."""

MASK_RATIO = 0.75
"""Share of patches removed where the decoder is asked for pictures, as in pretraining.
"""


READOUT_PICTURES = 8
"""Pictures below which nothing is fitted on half of them."""


@dataclass(frozen=True)
class Section:
    """A part of the page: its ``figure`` with ``alt`` text, how to read it (``how``),
    what was ``found``, and ``rows`` of numbers, one a layer.
    """

    title: str
    how: str
    found: str
    figure: Figure
    alt: str
    rows: tuple[tuple[str, np.ndarray], ...] = ()


def falls(values: np.ndarray) -> str:
    """ "falls in 2 of 3 steps" for the means over pictures of an array (pictures,
    layers).
    """
    changes = np.diff(values.mean(axis=0))
    return (
        f"falls in {int((changes < 0).sum())} of {len(changes)} steps from layer "
        "to layer"
    )


def _untrained(
    controls: Sequence[LayerInspection], measure: figures.Measure
) -> np.ndarray:
    """A measure's mean over controls and pictures, (layers,)."""
    return np.mean([measure(control).mean(axis=0) for control in controls], axis=0)


def _steps_inside(weights: WeightInspection) -> str:
    """Where the step size is inside the theorems' ranges, in words; nothing without a
    dictionary.
    """
    if weights.dictionary_norm is None or weights.eta is None:
        return ""
    inside = [
        int((weights.dictionary_norm <= multiple / weights.eta).sum())
        for multiple in (1, 2)
    ]
    return (
        f" The largest eigenvalue of D^T D is below 1/eta in {inside[0]} and "
        f"below 2/eta in {inside[1]} of "
        f"{len(weights.dictionary_norm)} layers."
    )


def _partners(scores: np.ndarray) -> str:
    """The mean score of partners beside that of other decoder layers, in words."""
    if scores.shape[1] != scores.shape[2] or scores.shape[1] < 2:
        return (
            "The decoder is not as deep as the encoder, so that layers have no "
            "partners."
        )
    partners, others = partner_scores(scores)
    return (
        f"Partners {partners.mean():+.2f}, other decoder layers "
        f"{others.mean():+.2f}. An inverse has 1."
    )


def layer_sections(
    model: LayerInspection,
    controls: Sequence[LayerInspection],
    weights: WeightInspection,
    control_weights: Sequence[WeightInspection],
) -> list[Section]:
    """The sections on layers: rates, sparsity, weights, ranks, steps and, where there
    is one, inversion.
    """
    untrained_rate = np.concatenate(
        [control.layers.attended.orthonormal for control in controls]
    )
    half_step = model.layers.compressed.orthonormal - model.layers.tokens.orthonormal
    sections = [
        Section(
            "Coding rates",
            "R says how much the tokens span, R^c how much they need inside "
            "the heads' subspaces; both in tokens of "
            f"root mean square norm one, error allowed per token {model.eps:g} "
            "of that norm. The theory: R^c falls "
            "from layer to layer, and each attention half-step lowers it. "
            "Falling R^c alone does not show denoising: "
            "tokens that are all alike have little of it too.",
            "R^c in the orthonormalised subspaces "
            f"{falls(model.layers.attended.orthonormal)}; untrained, it "
            f"{falls(untrained_rate)}. The half-step lowers R^c in "
            f"{int((half_step.mean(axis=0) < 0).sum())} of "
            f"{half_step.shape[1]} layers.",
            figures.rate_curves(model, controls),
            "Four line charts over layers, this model beside the untrained "
            "range: R, R^c, the change of R^c by the "
            "attention half-step, and the published measure.",
            (
                ("R", model.layers.attended.total.mean(axis=0)),
                ("R^c, as learned", model.layers.attended.learned.mean(axis=0)),
                (
                    "R^c, orthonormalised",
                    model.layers.attended.orthonormal.mean(axis=0),
                ),
                ("R^c, random subspaces", model.layers.random_rate.mean(axis=0)),
                ("R - R^c", model.layers.attended.reduction.mean(axis=0)),
                ("R^c, orthonormalised, untrained", untrained_rate.mean(axis=0)),
            ),
        ),
        Section(
            "Sparsity",
            "Share of nonzero entries, and two measures that do not depend on "
            "a threshold: Hoyer and Gini, 0 for equal "
            "entries and 1 for a single one. Dotted: entries drawn from a "
            "Gaussian. A ReLU alone makes about half the "
            "entries zero.",
            "After the last layer "
            f"{model.between.nonzeros.mean(axis=0)[-1]:.0%} of the entries are "
            "nonzero, untrained "
            f"{_untrained(controls, lambda r: r.between.nonzeros)[-1]:.0%}; "
            f"Gini {model.between.gini.mean(axis=0)[-1]:.2f}, untrained "
            f"{_untrained(controls, lambda r: r.between.gini)[-1]:.2f}.",
            figures.between_layers(
                model,
                controls,
                [
                    ("share of nonzeros", lambda r: r.between.nonzeros),
                    ("Hoyer", lambda r: r.between.hoyer),
                    ("Gini", lambda r: r.between.gini),
                ],
                [1.0, 1 - math.sqrt(2 / math.pi), math.sqrt(2) - 1],
            ),
            "Three line charts over layers: share of nonzeros, Hoyer and Gini, "
            "this model beside the untrained range.",
            (
                ("nonzeros", model.between.nonzeros.mean(axis=0)),
                ("hoyer", model.between.hoyer.mean(axis=0)),
                ("gini", model.between.gini.mean(axis=0)),
            ),
        ),
        Section(
            "Subspaces and dictionaries",
            "The theorems need subspaces that are orthogonal to each other "
            "(largest cosine 0), orthonormal bases, an "
            "output projection equal to them, and a dictionary whose D^T D has "
            "no eigenvalue above 1/eta (for the "
            "rate) or 2/eta (for descent); an orthogonal dictionary has D^T D = I.",
            "Largest cosine between two subspaces of a layer: "
            f"{weights.coherence_max.max():.2f} (untrained "
            f"{np.mean([c.coherence_max.max() for c in control_weights]):.2f})."
            + _steps_inside(weights),
            figures.weights(weights, control_weights),
            "Line charts over layers of what the theorems assume of the "
            "weights: coherence, orthonormality, output "
            "projection, and the dictionary where there is one; with the value "
            "that the theory asks for.",
            tuple(
                (name.replace("_", " "), getattr(weights, name))
                for name in (
                    "coherence_max",
                    "coherence_mean",
                    "basis_condition",
                    "dictionary_condition",
                    "partner_cosine",
                )
                if getattr(weights, name) is not None
            ),
        ),
        Section(
            "Effective rank of the tokens",
            "How many directions the tokens of one picture use, about their "
            "mean: the participation ratio, and the "
            "exponential of the spectrum's entropy. On the right each token "
            "was standardised first.",
            "After the last layer "
            f"{model.between.participation.mean(axis=0)[-1]:.1f} directions by "
            "the participation ratio, "
            "untrained "
            f"{_untrained(controls, lambda r: r.between.participation)[-1]:.1f}; "
            "all pictures pooled "
            f"{model.pooled.participation[-1]:.1f}.",
            figures.between_layers(
                model,
                controls,
                [
                    ("participation ratio", lambda r: r.between.participation),
                    ("entropy rank", lambda r: r.between.entropy),
                    (
                        "participation, standardised",
                        lambda r: r.between.normed_participation,
                    ),
                ],
                [None, None, None],
            ),
            "Three line charts over layers of the effective rank, this model "
            "beside the untrained range.",
            (
                ("entropy rank", model.between.entropy.mean(axis=0)),
                ("entropy rank, pictures pooled", model.pooled.entropy),
            ),
        ),
        Section(
            "The attention step against the gradient",
            "Mean cosine, token by token, between what attention adds and a "
            "direction at its input: the negative exact "
            "gradient of R^c; the same with the token's own direction taken "
            "out of both, since shrinking explains part "
            "of any agreement; minus the part outside the strongest subspace; "
            "and the gradient in random subspaces, "
            "the control. 1 is what the derivation says, 0 is no relation.",
            "With the negative gradient: "
            f"{model.layers.steps.gradient.mean():+.2f} on average over "
            "layers, in random "
            f"subspaces {model.layers.steps.random.mean():+.2f}, untrained "
            f"{_untrained(controls, lambda r: r.layers.steps.gradient).mean():+.2f}.",
            figures.steps(
                model,
                controls,
                [
                    ("negative gradient of R^c", lambda r: r.layers.steps.gradient),
                    ("the same beyond shrinking", lambda r: r.layers.steps.beyond),
                    (
                        "towards the strongest subspace",
                        lambda r: r.layers.steps.residual,
                    ),
                    ("gradient, random subspaces", lambda r: r.layers.steps.random),
                ],
            ),
            "Four line charts over layers of cosines between -1 and 1, this "
            "model beside the untrained range.",
            (
                ("gradient", model.layers.steps.gradient.mean(axis=0)),
                ("exact", model.layers.steps.exact.mean(axis=0)),
                ("formula", model.layers.steps.formula.mean(axis=0)),
                ("shrink", model.layers.steps.shrink.mean(axis=0)),
                ("swapped", model.layers.steps.swapped.mean(axis=0)),
            ),
        ),
    ]
    if model.inversion is not None and controls[0].inversion is not None:
        sections.append(
            Section(
                "Does the decoder invert the encoder?",
                "Left pair: cosine (mean token taken out) between an encoder "
                "layer's input and what a decoder layer "
                "makes of its output; partners stand on the rising diagonal, "
                "in bold. Right pair: how alike the tokens "
                "on the decoder's own way are to those on the encoder's, "
                "whatever rotation lies between.",
                _partners(model.inversion.centred),
                figures.inversion(model.inversion, controls[0].inversion),
                "Four heat maps with numbers, encoder layer against decoder "
                "layer, this model and untrained.",
            )
        )
    return sections


def readout_sections(
    model: MaskedAutoencoder, controls: Sequence[MaskedAutoencoder], images: Images
) -> list[Section]:
    """The section on removed patches, where the encoder sees them and there are
    pictures enough to fit and to test.
    """
    if model.config.encode_visible_only or len(images) < READOUT_PICTURES:
        return []
    fitted, tested = images[::2], images[1::2]
    found, *others = (
        linear_readout(network, fitted, tested, MASK_RATIO)
        for network in (model, *controls)
    )
    return [
        Section(
            "What the layers bring to removed patches",
            f"With {MASK_RATIO:.0%} of the patches removed: the share of a "
            "removed patch's variance about the mean "
            "picture that a linear map reads off its token, fitted on half of "
            "the pictures and tested on the others. "
            "It starts at 0, where the token is a position; what is above came "
            "from visible patches. A network whose "
            "rates fall and whose sparsity rises while this curve does not "
            "move does nothing for its task.",
            f"After the last layer {found[-1]:.2f}, untrained "
            f"{np.mean([other[-1] for other in others]):.2f}, from "
            f"{len(images)} pictures.",
            figures.readout(found, np.stack(others)),
            "A line chart over layers of the share of removed patches that can "
            "be read, this model and untrained.",
            (("share read", found), ("untrained", np.mean(others, axis=0))),
        )
    ]


def picture_sections(
    model: MaskedAutoencoder, control: MaskedAutoencoder, images: Images
) -> list[Section]:
    """The sections with pictures: attention maps, principal components of tokens, and
    blends of two pictures.
    """
    size, shown = model.config.image_shape, images[:SHOWN]
    rows: list[tuple[str, Tensor]] = [("picture", shown)]
    for name, network in (("this model", model), ("untrained", control)):
        maps = upsample(all_attention_maps(network, shown)[-1].class_token.cpu(), size)
        rows += [
            (f"{name}\nhead {head + 1}", maps[:, head, None])
            for head in range(min(4, maps.shape[1]))
        ]
    grid = (size[0] // model.config.patch_size, size[1] // model.config.patch_size)
    colours: list[tuple[str, Tensor]] = [("picture", shown)]
    for name, network in (("this model", model), ("untrained", control)):
        tokens = trace_tokens(network, images).hidden_states[-1][:, 1:].cpu()
        pca = token_pca(tokens, 3)
        colours.append(
            (
                f"{name}\n{float(pca.explained.sum()):.0%} of variance",
                pca.colors(grid)[: len(shown)],
            )
        )
    sections = [
        Section(
            "Where the heads look",
            "Weight of each patch in the class token's output, last encoder "
            "layer, head by head, from zero to each "
            "map's largest. A map that follows the object in the picture is a "
            "claim that needs a score against masks "
            "and against a blob in the centre; the book's chapter on heads has one.",
            "The rows of the untrained network show what the architecture "
            "gives for nothing.",
            figures.picture_rows(rows, maps=True),
            "Rows of grey maps, one a head, under the pictures they belong to, "
            "this model and untrained.",
        ),
        Section(
            "Principal components of the tokens",
            "First three principal components of the last layer's patch "
            "tokens, of all pictures together, as red, "
            "green and blue: equal colours are equal directions, in every picture.",
            "Compare with the row of untrained weights before reading anything "
            "into a colour.",
            figures.picture_rows(colours),
            "Pictures, and below them the same pictures in false colours by "
            "patch, for this model and untrained.",
        ),
    ]
    if len(images) > 1:
        weights = (0.0, 0.25, 0.5, 0.75, 1.0)
        noise = torch.rand(
            1, math.prod(model.config.grid), generator=torch.Generator().manual_seed(0)
        )
        blend = interpolate_tokens(
            model, images[:1], images[1:2], weights, mask_ratio=MASK_RATIO, noise=noise
        )
        sections.append(
            Section(
                "Between two pictures",
                f"Decoded with {MASK_RATIO:.0%} of the patches removed, as in "
                "pretraining: from blends of the two "
                "pictures' last tokens (above), from the tokens of blended "
                "pixels (middle), and the blended pixels "
                "themselves. If the tokens were linear in the picture, the "
                "first two rows would be the same.",
                "The two decoded rows differ by "
                f"{float((blend.tokens - blend.pixels).square().mean().sqrt()):.3f} "
                "(root mean square, of pixels in [0, 1]).",
                figures.picture_rows(
                    [
                        ("tokens blended", blend.tokens[:, 0]),
                        ("pixels blended,\nthen encoded", blend.pixels[:, 0]),
                        ("pixels blended", blend.blend[:, 0]),
                    ]
                ),
                "Three rows of five pictures that go from a first picture to a "
                "second one.",
            )
        )
    return sections
