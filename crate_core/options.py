"""Options of the ``crate`` command beside those of ``pretrain`` and ``finetune``; their
docstrings are what ``--help`` shows.

Book: :ref:`ch-evaluation`.
"""

from dataclasses import dataclass
from typing import Literal

Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True)
class Preset:
    """The recipe of a run, on which the defaults of its other options depend."""

    preset: str = "digits"


@dataclass(frozen=True)
class Evaluate:
    """Linear probes, nearest neighbours and fine-tuning of a checkpoint beside their
    controls, and reconstruction.

    Writes evaluation.json beside the checkpoint and prints it as a table.
    """

    checkpoint: str
    """Directory of a saved model (such as a run's output directory), a bundled name, or
    a Hugging Face Hub id.
    """
    data: str | None = None
    """digits, folder:PATH, shards:PATH, torchvision:NAME, hf:NAME-OR-PARQUET-PATH; None
    takes the data of the run.
    """
    seeds: int = 5
    """Probes of each kind; a seed draws the few labels, validation splits and untrained
    weights.
    """
    labels_per_class: int = 5
    """Labels a class in the column of few labels."""
    mask_ratios: tuple[float, ...] = (0.25, 0.5, 0.75, 0.875)
    """Where reconstruction is measured; none leaves it out."""
    probe: bool = True
    """Fit linear probes."""
    neighbours: bool = True
    """Let nearest neighbours vote."""
    finetune: str | None = None
    """Also fine-tune by this recipe, a preset of crate finetune, beside the same
    network from scratch.
    """
    finetune_epochs: float | None = None
    """Epochs of fine-tuning in place of the preset's."""
    finetune_seeds: int = 1
    """Runs of fine-tuning, and of its control."""
    device: Device = "auto"
    """auto takes a GPU when there is one."""
    workers: int = 0
    """Processes that read pictures."""
    output: str | None = None
    """The JSON file; None writes evaluation.json beside the checkpoint."""
    max_unreadable: float = 0.1
    """Stop if a larger share of a part's pictures cannot be read."""


@dataclass(frozen=True)
class Data:
    """What is understood of data: parts and sizes, classes, columns, what is left out.

    With --output also a contact sheet: some pictures of each part as a model sees them.
    """

    source: str
    """SOURCE: digits, folder:PATH, shards:PATH, torchvision:NAME,
    hf:NAME-OR-PARQUET-PATH.
    """
    output: str | None = None
    """The contact sheet to write, PNG."""
    count: int = 8
    """Pictures of each part on the sheet."""
    image_size: int = 224
    """Side of the pictures."""
    channels: Literal[1, 3] = 3
    """1 for grey, 3 for colour."""
    data_root: str = "data"
    """Where torchvision datasets lie or are downloaded to."""
    streaming: bool = False
    """Look at hf: data as it comes, as pretraining does that streams it."""
    check: bool = False
    """Read every picture and name those that cannot be read."""


@dataclass(frozen=True)
class Reconstruct:
    """A picture of masked inputs, reconstructions and originals, as PNG."""

    checkpoint: str
    """Directory of a saved model, a bundled name, or a Hugging Face Hub id."""
    images: tuple[str, ...] = ()
    """Image files; brought to the model's size and channels."""
    data: str | None = None
    """Instead of files: held-out pictures of digits, folder:PATH, shards:PATH,
    torchvision:NAME, hf:NAME-OR-PARQUET-PATH.
    """
    output: str = "reconstructions.png"
    """The picture to write."""
    count: int = 8
    """How many held-out pictures of --data."""
    mask_ratio: float = 0.75
    """Share of patches to remove."""
    seed: int = 0
    """Fixes the masks."""
    max_unreadable: float = 0.1
    """Stop if a larger share of a part's pictures cannot be read."""


@dataclass(frozen=True)
class Inspect:
    """What the layers, tokens and heads of a checkpoint do, beside the same network
    untrained: one HTML page.

    Without --images and --data: held-out digits, or photographs that scikit-learn
    ships, as the model's channels ask.
    """

    checkpoint: str
    """Directory of a saved model, a bundled name, or a Hugging Face Hub id."""
    images: tuple[str, ...] = ()
    """Image files; brought to the model's size and channels."""
    data: str | None = None
    """Instead of files: held-out pictures of digits, folder:PATH, shards:PATH,
    torchvision:NAME, hf:NAME-OR-PARQUET-PATH.
    """
    output: str = "report.html"
    """The page to write; pictures are inside it."""
    count: int = 32
    """How many pictures of --data, or of those that are shipped."""
    eps: float = 0.5
    """Coding precision: the error allowed per token, as a share of the tokens' norm."""
    seeds: int = 3
    """Untrained controls."""
    device: Device = "auto"
    """auto takes a GPU when there is one."""
    max_unreadable: float = 0.1
    """Stop if a larger share of a part's pictures cannot be read."""


@dataclass(frozen=True)
class Convert:
    """Convert an authors' mae_crate_* checkpoint to config.json and model.safetensors.

    The file is read without executing anything that it may hold.
    """

    reference: str
    """REFERENCE: the authors' .pth file."""
    output_dir: str
    """OUTDIR: directory to write."""
    heads: int | None = None
    """Heads of a size that was not published."""


@dataclass(frozen=True)
class Probe:
    """Linear probe and nearest neighbours on features that are computed once and kept,
    for any number of pictures; under torchrun all processes encode.
    """

    checkpoint: str
    """Directory of a saved model, bundled name, or a Hugging Face Hub id."""
    data: str | None = None
    """Labelled pictures, as --data of pretraining; what the checkpoint was trained on
    unless given.
    """
    cache: str = "features"
    """Folder of the features."""
    solver: Literal["auto", "sklearn", "sgd"] = "auto"
    """scikit-learn's logistic regression, or stochastic gradients as in MAE; auto takes
    the second above 50,000 training pictures.
    """
    features: tuple[Literal["class_token", "patch_mean"], ...] = (
        "class_token",
        "patch_mean",
    )
    """What the probe is fitted on."""
    epochs: int = 90
    """Epochs of stochastic gradients."""
    head_batch_size: int = 16_384
    """Pictures in a step of stochastic gradients."""
    optimizer: Literal["lars", "sgd"] = "lars"
    """Optimizer of the stochastic gradients."""
    base_lrs: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0)
    """Learning rates for 256 pictures, of which validation chooses."""
    neighbours: bool = True
    """Also let nearest neighbours vote."""
    controls: bool = False
    """Also judge the same network untrained, and the pixels."""
    seeds: int = 1
    """Fits of each kind."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the encoder's matrix products."""
    batch_size: int = 256
    """Pictures that are encoded at a time."""
    device: Device = "auto"
    """auto takes a GPU when there is one."""
    workers: int = 0
    """Processes that read pictures."""
    output: str | None = None
    """The JSON file; None writes probe.json beside the checkpoint."""
    max_unreadable: float = 0.1
    """Stop if a larger share of a part's pictures cannot be read."""


@dataclass(frozen=True)
class Prepare:
    """A resized copy of a data set for training, as folders, tar or parquet shards; the
    same command again goes on with one that was cut off.

    Train with --data shards:OUTDIR, or folder:OUTDIR.
    """

    source: str
    """SOURCE: a folder of pictures, class folders with or without train/ and val/; or
    of ImageNet's archives.
    """
    output_dir: str
    """OUTDIR: folder to write."""
    side: int = 256
    """Shorter side in pixels; smaller pictures are not enlarged."""
    quality: int = 90
    """JPEG quality, 1 to 100."""
    format: Literal["folders", "parquet", "tar"] = "tar"
    """tar and parquet shards hold many pictures in one file."""
    labels: str | None = None
    """Classes of a flat val/: the devkit, or a file with a class a line in the order of
    the sorted names, or a name and its class; looked for in SOURCE and above unless
    given.
    """
    shard_size: int = 1000
    """Pictures in a shard."""
    workers: int = 0
    """Processes; 0 takes all cores."""
    max_unreadable: float = 0.1
    """Stop if a larger share of a part's pictures cannot be read."""
