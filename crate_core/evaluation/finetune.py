r"""Fine-tuning: an encoder with a linear classifier on top, trained whole with labels.

Pretrained or from scratch, of either architecture.  Step t draws its pictures and
augmentation from (seed, t) alone (:mod:`crate_core.data.batches`), so that a run is a
function of its configuration.

Book: :ref:`ch-evaluation`.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crate_core.checks import check_choice, check_flag, check_integer, check_number
from crate_core.data.batches import (
    MAX_UNREADABLE,
    StepBatches,
    TrainingPictures,
    UnreadableCount,
    loader,
    readable_batches,
    readable_rows,
)
from crate_core.data.pictures import Picture
from crate_core.data.sources import ImageData, ImageSource, SelectedImages
from crate_core.data.transforms import augmented, prepare
from crate_core.evaluation.labels import class_count
from crate_core.keys import Stream, random_generator, random_key
from crate_core.model.autoencoder import MaskedAutoencoder, evaluation_mode
from crate_core.shapes import Images, PictureVectors, Tokens
from crate_core.training.checks import check_betas, check_compiler
from crate_core.training.pretrain import TrainingDivergedError
from crate_core.training.recipe import warmup_cosine

Pooling = Literal["patch_mean", "class_token"]
FinetuneAugmentation = Literal["none", "crop_flip", "shift_flip"]

SHIFT = 0.125
"""Largest shift of "shift_flip", as a share of the side: four pixels of CIFAR-10's
thirty-two.
"""


@dataclass(frozen=True)
class FinetuneConfig:
    """Every choice of a fine-tuning run; defaults as in MAE's fine-tuning where it has
    them.

    Raises
    ------
    ValueError
        On construction, naming the field, what was given and what is accepted.

    Book: :ref:`ch-evaluation`.  MAE also uses stochastic depth, RandAugment, mixup and
    cutmix, which this does not.
    """

    epochs: float = 20.0
    """Passes over the training pictures; they set the learning-rate schedule."""
    batch_size: int = 256
    """Pictures in a step."""
    lr: float = 1e-3
    """Base learning rate; the peak is lr * batch_size / 256."""
    warmup_ratio: float = 0.05
    """Share of the epochs in which the learning rate rises linearly from zero."""
    weight_decay: float = 0.05
    """AdamW's weight decay; none on biases, norms and other one-dimensional parameters.
    """
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging constants."""
    layer_decay: float = 0.75
    """Each layer learns this much slower than the one above it; 1 from scratch."""
    label_smoothing: float = 0.1
    """Share of the target that is spread evenly over the classes."""
    pooling: Pooling = "patch_mean"
    """What the classifier reads: the mean of patch tokens, or the class token."""
    augmentation: FinetuneAugmentation = "shift_flip"
    """none, crop_flip (as in pretraining), or shift_flip: up to an eighth of the side,
    and horizontal flip.
    """
    seed: int = 0
    """Fixes the order of pictures and augmentation."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """fp32, or autocast to bf16."""
    compile: bool = False
    """Compile the model with torch.compile."""
    workers: int = 0
    """Processes that read pictures; batches do not depend on it."""
    max_unreadable: float = MAX_UNREADABLE
    """Stop if a larger share of a part's pictures cannot be read."""

    def __post_init__(self) -> None:
        check_integer(self, "batch_size", least=1)
        for name in ("workers", "seed"):
            check_integer(self, name)
        for name in ("epochs", "lr"):
            check_number(self, name, "a positive number")
        check_number(self, "weight_decay", "zero or a positive number", ends="[]")
        check_number(self, "warmup_ratio", "a share in [0, 1)", 0, 1, "[)")
        check_betas(self, "betas")
        check_number(self, "layer_decay", "a number in (0, 1]", 0, 1)
        check_number(self, "label_smoothing", "a number in [0, 1)", 0, 1, "[)")
        check_number(self, "max_unreadable", "a share in [0, 1]", 0, 1, "[]")
        check_choice(self, "pooling", get_args(Pooling))
        check_choice(self, "augmentation", get_args(FinetuneAugmentation))
        check_choice(self, "precision", ("fp32", "bf16"))
        check_flag(self, "compile")


def pool(tokens: Tokens, pooling: Pooling) -> PictureVectors:
    r"""Encoder output (B, 1 + L, d) as one row a picture (B, d): :math:`z_0`, or
    :math:`\tfrac1L \sum_{i\ge1} z_i`.
    """
    return tokens[:, 0] if pooling == "class_token" else tokens[:, 1:].mean(dim=1)


class Classifier(nn.Module):
    r"""A linear classifier on an encoder, :math:`W\,\mathrm{pool}(\mathrm{LN}(X^L)) +
    b`, W and b zero at first.

    Parameters
    ----------
    autoencoder : its encoder is used, its decoder left as it is.
    classes : how many there are.
    pooling : what the classifier reads.

    Book: :ref:`ch-evaluation`.  MAE pools before the last LayerNorm; here the encoder's
    own one comes first.
    """

    def __init__(
        self,
        autoencoder: MaskedAutoencoder,
        classes: int,
        pooling: Pooling = "patch_mean",
    ) -> None:
        super().__init__()
        self.autoencoder, self.pooling = autoencoder, pooling
        self.head = nn.Linear(autoencoder.config.dim, classes)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Images) -> PictureVectors:
        """Class scores (B, classes) of images in model units."""
        return self.head(pool(self.autoencoder.forward_features(images), self.pooling))

    def layer_index(self, name: str) -> int | None:
        """Depth of a parameter: 0 for the embedding, then the layers, last the norm and
        the classifier; ``None`` for one that the forward pass does not use.
        """
        parts = name.split(".")
        if parts[0] == "head" or parts[1] == "encoder_norm":
            return self.autoencoder.config.depth + 1
        if parts[1] == "encoder":
            return int(parts[2]) + 1
        return 0 if parts[1] in ("patch_embedding", "class_token") else None


def layer_groups(
    model: Classifier, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    r"""AdamW's groups for the parameters that are used, with ``scale``
    :math:`\gamma^{\,D + 1 - \ell}` for the learning rate of depth :math:`\ell` of
    0..D+1, and weight decay for matrices only.

    Book: :ref:`ch-evaluation`.
    """
    last = model.autoencoder.config.depth + 1
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        depth = model.layer_index(name)
        if depth is not None:
            groups.setdefault((depth, parameter.ndim > 1), []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay * matrix,
            "scale": layer_decay ** (last - depth),
        }
        for (depth, matrix), parameters in groups.items()
    ]


def shifted(image: Tensor, key: int) -> Tensor:
    """A picture (C, H, W) shifted by up to ``SHIFT`` of its side each way, edges
    repeated, and flipped half of the time: a function of ``key`` alone.
    """
    height, width = image.shape[-2:]
    rows, columns = round(SHIFT * height), round(SHIFT * width)
    down, right, flip = torch.rand(3, generator=random_generator(key)).tolist()
    padded = F.pad(image[None], (columns, columns, rows, rows), mode="replicate")[0]
    top, left = int(down * (2 * rows + 1)), int(right * (2 * columns + 1))
    cut = padded[:, top : top + height, left : left + width]
    return cut.flip(-1) if flip < 0.5 else cut


class LabelledPictures(TrainingPictures):
    """Training pictures under the augmentations of fine-tuning."""

    def __init__(
        self, source: ImageSource, model: MaskedAutoencoder, config: FinetuneConfig
    ) -> None:
        super().__init__(
            source, model.config.image_shape, model.config.channels, "none", config.seed
        )
        self.choice = config.augmentation

    def transform(self, picture: Picture, epoch: int, index: int) -> Tensor:
        """The picture as epoch ``epoch`` sees it."""
        key = random_key(self.seed, Stream.AUGMENT, epoch, index)
        if self.choice == "crop_flip":
            return augmented(picture, self.size, self.channels, key)
        image = prepare(picture, self.size, self.channels)
        return shifted(image, key) if self.choice == "shift_flip" else image


@dataclass(frozen=True)
class FinetuneResult:
    """How fine-tuning ended: ``curve`` has a record an epoch (epoch, loss and accuracy
    on the training pictures as they were met, augmented), ``accuracy`` is that of the
    held-out pictures after the last step; both in [0, 1].

    ``held_out`` is the number of pictures that ``accuracy`` is over, ``unreadable``
    names those of both parts that could not be read.
    """

    classifier: Classifier
    curve: tuple[dict[str, float], ...]
    accuracy: float
    config: FinetuneConfig
    held_out: int
    unreadable: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All but the weights, ready for JSON."""
        return {
            "accuracy": self.accuracy,
            "held_out": self.held_out,
            "unreadable": list(self.unreadable),
            "curve": list(self.curve),
            "config": asdict(self.config),
        }


@torch.no_grad()
def accuracy(
    model: Classifier,
    source: ImageSource,
    workers: int = 0,
    max_unreadable: float = MAX_UNREADABLE,
) -> float:
    """Share of a labelled source's readable pictures that the classifier gets right, in
    evaluation mode; a warning names those that cannot be read.

    Raises ``ValueError`` if none can be read, more than ``max_unreadable`` cannot, or
    there are no labels.
    """
    if source.labels is None:
        raise ValueError("accuracy needs labels; these pictures have none")
    unreadable = UnreadableCount(len(source), max_unreadable, {}, "held-out")
    with evaluation_mode(model):
        frame = model.autoencoder
        device = next(model.parameters()).device
        size, channels = frame.config.image_shape, frame.config.channels
        right = seen = 0
        for batch in readable_batches(
            source, size, channels, unreadable, workers=workers
        ):
            labels = torch.from_numpy(source.labels[batch.indices.numpy()])
            scores = model(frame.standardize(batch.images.to(device)))
            right += int((scores.argmax(dim=1).cpu() == labels).sum())
            seen += len(labels)
    return right / seen


def finetune(
    model: MaskedAutoencoder,
    data: ImageData,
    config: FinetuneConfig,
    report: Callable[[str], None] = lambda line: None,
) -> FinetuneResult:
    r"""Train an encoder and a classifier on it with labels; ``model`` is changed in
    place.

    Minimises :math:`-\sum_k t_k \log \mathrm{softmax}(\mathrm{logits})_k` over
    mini-batches with AdamW, where t is the label smoothed by s: :math:`t = (1 - s)\,e_y
    + s / \mathrm{classes}`.

    Parameters
    ----------
    model : pretrained or fresh, of either architecture, on the device to train on.  Its
        decoder is not touched, so ``model.save_pretrained(dir)`` saves the trained
        encoder for every tool that opens a model.
    data : labelled pictures; fits on ``data.train``, scores ``data.held_out`` once, at
        the end.
    config : the run.
    report : gets a line for each epoch and each picture that cannot be read.

    Warns
    -----
    UnreadablePictureWarning
        Naming pictures that cannot be read.

    Raises
    ------
    ValueError
        If the pictures have no labels, labels out of range, too many are unreadable, or
        the model is to be compiled and there is no compiler.
    TrainingDivergedError
        If the loss is no longer finite.

    Book: :ref:`ch-evaluation`.
    """
    classes = class_count(data)
    labels = torch.as_tensor(data.train.labels)
    device = next(model.parameters()).device
    if config.compile:
        check_compiler(device)
    # held-out pictures are read once before the work, which must not be lost to them
    left_out = UnreadableCount(
        len(data.held_out), config.max_unreadable, {}, "held-out"
    )
    held_out = SelectedImages(
        data.held_out,
        readable_rows(
            data.held_out, model.config.image_shape, model.config.channels, left_out
        ),
    )
    classifier = Classifier(model, classes, config.pooling).to(device).train()
    groups = layer_groups(classifier, config.weight_decay, config.layer_decay)
    optimizer = torch.optim.AdamW(
        groups, betas=config.betas, fused=device.type in ("cpu", "cuda")
    )
    forward = torch.compile(classifier) if config.compile else classifier
    count = len(data.train)
    steps = math.ceil(config.epochs * count / config.batch_size)
    unreadable = UnreadableCount(count, config.max_unreadable, {})
    peak = config.lr * config.batch_size / 256
    order = StepBatches(count, config.batch_size, config.seed, 0, steps)
    # loss, right answers, pictures since the last record
    totals = torch.zeros(3, dtype=torch.float64)
    curve: list[dict[str, float]] = []
    for step, batch in enumerate(
        loader(LabelledPictures(data.train, model, config), order, config.workers)
    ):
        unreadable.add(batch, report)
        rate = warmup_cosine(
            step * config.batch_size / count,
            peak,
            config.warmup_ratio * config.epochs,
            config.epochs,
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        target = labels[batch.indices].to(device)
        with torch.autocast(
            device.type, torch.bfloat16, enabled=config.precision == "bf16"
        ):
            logits = forward(model.standardize(batch.images.to(device)))
        loss = F.cross_entropy(
            logits.float(), target, label_smoothing=config.label_smoothing
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value, right = float(loss.detach()), int((logits.argmax(dim=1) == target).sum())
        if not math.isfinite(value):
            raise TrainingDivergedError(
                f"the loss is {value} at step {step + 1} (learning rate {rate:.3g})"
            )
        totals += torch.tensor([value * len(target), right, len(target)])
        epoch = (step + 1) * config.batch_size / count
        if step + 1 == steps or int(epoch) > int(step * config.batch_size / count):
            mean_loss, share = (totals[:2] / totals[2]).tolist()
            curve.append(
                {"epoch": round(epoch, 3), "loss": mean_loss, "accuracy": share}
            )
            report(
                f"epoch {epoch:.1f}: loss {mean_loss:.3f}, training accuracy {share:.3f}"
            )
            totals.zero_()
    unreadable.warn("were replaced by others")
    result = accuracy(classifier, held_out, config.workers)
    report(f"held-out accuracy {result:.4f} on {len(held_out):,} pictures")
    return FinetuneResult(
        classifier,
        tuple(curve),
        result,
        config,
        len(held_out),
        (*unreadable.names, *left_out.names),
    )
