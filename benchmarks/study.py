r"""One controlled study on CIFAR-10: white-box layers against transformer layers, all
else equal.

    python benchmarks/study.py --data hf:PATH/cifar10-train.parquet --plan
    python benchmarks/study.py --data hf:PATH/cifar10-train.parquet --workers 2
    python benchmarks/study.py --data hf:PATH/cifar10-train.parquet --status
    python benchmarks/study.py --data hf:PATH/cifar10-train.parquet --device cuda
        --scale large --records results/study/large

Four arms, {CRATE, ViT} x {encoder sees all tokens, visible tokens only}, of one depth,
one decoder shape and, by their widths, as many parameters within 1 %.  Stage 1 finds
each arm's learning rate over the whole schedule on validation pictures; stage 2 trains
each arm at its rate from several seeds, the only stage the comparison is read from;
stage 3 varies one choice at a time, each variant at a rate of its own.

The queue is a function of the records (:func:`queue`), so nothing is kept of it: start
the command again and it goes on, also on another machine that has the records, and a
run that was cut off goes on from its checkpoint.  ``--workers`` runs go side by side,
each a process of its own with ``--threads`` threads.  While the file ``--pause-file``
is there they stand still.  SIGTERM (its process number is in RUNS/queue.pid) or
``--limit-hours`` stops it.  Each run's record is written as it ends.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch

from crate_core.data.batches import some_pictures
from crate_core.data.named import open_data
from crate_core.data.sources import ImageData, ImageSource, SelectedImages
from crate_core.evaluation.features import encode
from crate_core.evaluation.neighbours import neighbour_accuracy
from crate_core.evaluation.paired import read_runs
from crate_core.evaluation.probe import probe_accuracy
from crate_core.model.autoencoder import MaskedAutoencoder
from crate_core.model.build import build_model, fresh_model, load_model
from crate_core.model.config import CrateMAEConfig, ModelConfig, ViTMAEConfig
from crate_core.model.cost import operation_counter
from crate_core.records import device_name, provenance, write_json
from crate_core.training.loop import TrainingDivergedError
from crate_core.training.pretrain import (
    pretrain,
)
from crate_core.training.recipe import Plan, PretrainConfig
from crate_core.training.run_directory import RunDirectory
from crate_core.training.yardsticks import held_out_loss, trivial_loss

Record = dict[str, Any]
Rates = tuple[float, ...]


@dataclass(frozen=True)
class Study:
    """How much of everything; a scale is one of these."""

    pictures: int = 5_000
    """Training pictures, of 50,000: what twenty epochs can pay for."""
    validation: int = 5_000
    """Pictures that learning rates are chosen on; shares none with the others."""
    labelled: int = 5_000
    """Training pictures whose labels probe and neighbours may see."""
    scored: int = 2_048
    """Pictures of each part that the reconstruction loss is measured on."""
    epochs: float = 20.0
    warmup_epochs: float = 1.0
    batch_size: int = 64
    marks: tuple[float, ...] = (1.0, 3.0, 10.0)
    """Epochs after which a run of stage 2 or 3 is evaluated, besides 0 and the end."""
    rates: Rates = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
    """Peak learning rates of stage 1; doubled or halved further while the best is at an
    edge."""
    furthest: int = 4
    """Most times that a grid is extended at either end."""
    tuning_seed: int = 0
    """Of stage 1 and of stage 3's rates; no run that is compared has it."""
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7)
    """Of stage 2: the fewest that can pass three tests with Holm's correction."""
    few_seeds: tuple[int, ...] = (1, 2, 3)
    """Of stage 3, beside stage 2's runs of the same seeds."""
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = True
    depth: int = 4
    widths: tuple[int, int] = (128, 64)
    """Of CRATE and of ViT: a CRATE layer has 3 d^2 weights, a block 12 d^2."""
    data: str = "cifar10"
    image: Mapping[str, Any] = field(default_factory=dict)
    """Fields of both models that other pictures need."""


SCALES = {
    "standard": Study(),
    "large": Study(
        pictures=45_000,
        labelled=10_000,
        epochs=100.0,
        warmup_epochs=5.0,
        batch_size=256,
        marks=(1.0, 3.0, 10.0, 30.0),
        precision="bf16",
        depth=6,
        widths=(192, 96),
    ),
    "miniature": Study(
        pictures=96,
        validation=48,
        labelled=96,
        scored=32,
        epochs=2.0,
        warmup_epochs=0.5,
        batch_size=16,
        marks=(1.0,),
        rates=(1e-3, 4e-3, 16e-3),
        furthest=1,
        seeds=(1, 2),
        few_seeds=(1,),
        compile=False,
        depth=1,
        widths=(16, 8),
        image={
            "image_size": 8,
            "patch_size": 2,
            "channels": 1,
            "heads": 2,
            "pixel_mean": (0.3,),
            "pixel_std": (0.4,),
        },
    ),
}
"""``standard``: about four hours of two cores for stages 1 and 2. ``large``: with a
GPU. ``miniature``: seconds, for the tests, on pictures of 8 x 8."""


@dataclass(frozen=True)
class Arm:
    """Layers, what the encoder sees, and what is changed of them (``mask_ratio``, else
    fields of the model)."""

    layers: Literal["crate", "vit"]
    visible: bool
    changes: Mapping[str, Any] = field(default_factory=dict)
    base: str = ""
    """The arm of stage 2 that it varies; "" for those arms."""


ARMS: Mapping[str, Arm] = {
    "crate-all": Arm("crate", False),
    "vit-all": Arm("vit", False),
    "crate-visible": Arm("crate", True),
    "vit-visible": Arm("vit", True),
}
"""The arms of stages 1 and 2."""


def varied(base: str, **changes: Any) -> Arm:
    """An arm with something changed."""
    return Arm(ARMS[base].layers, ARMS[base].visible, changes, base)


VARIANTS: Mapping[str, Arm] = {
    "crate-all-depth-2": varied("crate-all", depth=2),
    "vit-all-depth-2": varied("vit-all", depth=2),
    "crate-all-depth-6": varied("crate-all", depth=6),
    "vit-all-depth-6": varied("vit-all", depth=6),
    "lambda-0": varied("crate-all", lambd=0.0),
    "lambda-2": varied("crate-all", lambd=2.0),
    "eta-0.02": varied("crate-all", eta=0.02),
    "eta-0.5": varied("crate-all", eta=0.5),
    "separate-values": varied("crate-all", separate_values=True),
    "mask-0.5": varied("crate-all", mask_ratio=0.5),
    "mask-0.9": varied("crate-all", mask_ratio=0.9),
}
"""Stage 3, the more important first; lambda 0.5, eta 0.1, tied values and masking ratio
0.75 are stage 2's crate-all."""

EVERY_ARM = {**ARMS, **VARIANTS}

PICTURES_PER_SECOND = {
    "crate-all": 215.0,
    "vit-all": 170.0,
    "crate-visible": 350.0,
    "vit-visible": 290.0,
}
"""The pilot's: of one processor second, fp32, compiled, batch 64, depth 4, one thread
beside another run on a Xeon with AVX-512 and no AMX (bfloat16 gave half of it).  Only
predicts; records replace it."""

EVALUATION_SECONDS = 30.0
"""Of one evaluation on all parts, predicted alike."""


@dataclass(frozen=True)
class Run:
    """One run of the queue."""

    stage: int
    arm: str
    peak_lr: float
    seed: int

    @property
    def name(self) -> str:
        """Its file's and directory's name."""
        return f"stage{self.stage}-{self.arm}-lr{self.peak_lr:g}-seed{self.seed}"


def mask_ratio_of(arm: Arm) -> float:
    """The masking ratio that an arm trains with."""
    return float(arm.changes.get("mask_ratio", 0.75))


def model_of(study: Study, arm: Arm) -> ModelConfig:
    """An arm's model: one depth and one width for encoder and decoder."""
    changes = {k: v for k, v in arm.changes.items() if k != "mask_ratio"}
    fields: dict[str, Any] = {
        "depth": study.depth,
        "encode_visible_only": arm.visible,
        **study.image,
        **changes,
    }
    crate, vit = study.widths
    if arm.layers == "crate":
        return CrateMAEConfig.preset("cifar10-tiny", dim=crate, **fields)
    fields |= {"decoder_dim": vit, "decoder_depth": fields["depth"]}
    heads = fields.get("heads", 4)
    fields |= {"heads": heads, "decoder_heads": heads}
    return ViTMAEConfig.preset("cifar10-tiny", dim=vit, **fields)


def config_of(study: Study, run: Run, options: argparse.Namespace) -> PretrainConfig:
    """The pretraining of a run, on the pictures that :func:`prepare` wrote."""
    arm = EVERY_ARM[run.arm]
    return PretrainConfig.from_preset(
        "cifar10-tiny",
        data=f"hf:{options.runs / 'pictures'}",
        model=model_of(study, arm),
        epochs=study.epochs,
        warmup_ratio=study.warmup_epochs / study.epochs,
        batch_size=study.batch_size,
        lr=run.peak_lr * 256 / study.batch_size,
        mask_ratio=mask_ratio_of(arm),
        seed=run.seed,
        precision=study.precision,
        compile=study.compile,
        device=options.device,
        checkpoint_every=100,
        output_dir=str(options.runs / run.name),
    )


# --- the queue, as a function of the records -----------------------------------------


def choosing_loss(record: Record) -> float:
    """What a learning rate is chosen by: the final loss of validation pictures at the
    run's own masking ratio; infinite where the run diverged."""
    if record["diverged"]:
        return math.inf
    return float(record["scores"][-1]["validation"]["own_loss"])


def grid(
    study: Study, start: Rates, losses: Mapping[float, float]
) -> tuple[Rates, float | None]:
    """Rates to try, given the losses of those tried: ``start``, extended by a factor of
    two beyond the best while that is at an edge; and the best once it is not, or the
    grid may not grow further."""
    rates = tuple(sorted({*start, *losses}))
    if any(rate not in losses for rate in rates):
        return rates, None
    best = min(rates, key=lambda rate: losses[rate])
    lowest, highest = min(start) / 2**study.furthest, max(start) * 2**study.furthest
    if best == rates[0] and best > lowest * 1.5:
        return (best / 2, *rates), None
    if best == rates[-1] and best < highest / 1.5:
        return (*rates, best * 2), None
    return rates, best


def losses_of(
    records: Mapping[str, Record], stage: int, arm: str, seed: int
) -> dict[float, float]:
    """Final validation losses by learning rate."""
    return {
        record["peak_lr"]: choosing_loss(record)
        for record in records.values()
        if (record["stage"], record["arm"], record["seed"]) == (stage, arm, seed)
    }


def best_rate(
    study: Study, arm: str, records: Mapping[str, Record]
) -> tuple[Rates, float | None]:
    """The grid of an arm, and its learning rate once that is known."""
    if not EVERY_ARM[arm].base:
        losses = losses_of(records, 1, arm, study.tuning_seed)
        return grid(study, study.rates, losses)
    _, centre = best_rate(study, EVERY_ARM[arm].base, records)
    if centre is None:
        return (), None
    losses = losses_of(records, 3, arm, study.tuning_seed)
    return grid(study, (centre / 2, centre, centre * 2), losses)


def middle_first(rates: Rates) -> list[float]:
    """Rates from the grid's middle outwards: what a short budget should see first."""
    centre = (len(rates) - 1) / 2
    order = sorted(range(len(rates)), key=lambda i: (abs(i - centre), i))
    return [rates[i] for i in order]


def queue(study: Study, records: Mapping[str, Record]) -> list[Run]:
    """Every run that is known to be needed, in the order to run them, done or not.

    Stage 1 by rate, then arm; stage 2 by seed, then arm, so that a queue cut off leaves
    whole comparisons; stage 3 by variant.
    """
    grids = {arm: best_rate(study, arm, records) for arm in EVERY_ARM}
    tuning = study.tuning_seed
    runs: list[Run] = []
    columns = [middle_first(grids[arm][0]) for arm in ARMS]
    for i in range(max(map(len, columns))):
        runs += [
            Run(1, arm, rates[i], tuning)
            for arm, rates in zip(ARMS, columns, strict=True)
            if i < len(rates)
        ]
    for seed in study.seeds:
        runs += [
            Run(2, arm, rate, seed)
            for arm in ARMS
            if (rate := grids[arm][1]) is not None
        ]
    for arm in VARIANTS:
        rates, best = grids[arm]
        runs += [Run(3, arm, rate, tuning) for rate in middle_first(rates)]
        if best is not None:
            runs += [Run(3, arm, best, seed) for seed in study.few_seeds]
    return runs


def unknown_yet(study: Study, records: Mapping[str, Record]) -> list[Run]:
    """Runs that will be needed once learning rates are known, at the first grid's
    middle for now; extended grids are not foreseen."""
    middle = middle_first(study.rates)[0]
    runs = []
    for arm in EVERY_ARM:
        rates, best = best_rate(study, arm, records)
        if arm in ARMS and best is None:
            runs += [Run(2, arm, middle, seed) for seed in study.seeds]
        if arm in VARIANTS and not rates:
            around = (middle / 2, middle, middle * 2)
            runs += [Run(3, arm, rate, study.tuning_seed) for rate in around]
        if arm in VARIANTS and best is None:
            runs += [Run(3, arm, middle, seed) for seed in study.few_seeds]
    return runs


def seconds_of(study: Study, run: Run, records: Mapping[str, Record]) -> float:
    """Processor seconds that a run will take, from finished runs of its arm, else the
    pilot's speed."""
    known = [
        record["processor_seconds"]
        for record in records.values()
        if record["arm"] == run.arm
        and (record["stage"] == 2) == (run.stage == 2)
        and record["processor_seconds"] is not None
    ]
    if known:
        return median(known)
    arm = EVERY_ARM[run.arm]
    depth = arm.changes.get("depth", study.depth) / SCALES["standard"].depth
    speed = PICTURES_PER_SECOND[arm.base or run.arm] / depth
    return study.pictures * study.epochs / speed + EVALUATION_SECONDS * len(
        marks_of(study, run)
    )


# --- one run -------------------------------------------------------------------------


def prepare(study: Study, data: ImageData, folder: Path) -> None:
    """Write the training and validation pictures, drawn once, as parquet files of PNGs;
    nothing if they are there."""
    import pyarrow
    import pyarrow.parquet
    from torchvision.transforms.functional import to_pil_image

    count = len(data.train)
    if count < study.pictures + study.validation:
        raise ValueError(
            f"{count:,} training pictures: {study.pictures:,} to train on and "
            f"{study.validation:,} to validate are needed"
        )
    rows = np.random.default_rng(0).permutation(count)
    parts = {
        "train": rows[: study.pictures],
        "validation": rows[count - study.validation :],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for part, chosen in parts.items():
        if (folder / f"{part}.parquet").is_file():
            continue
        source = SelectedImages(data.train, chosen)
        cells = []
        for i in range(len(source)):
            picture, png = source.read(i), io.BytesIO()
            if isinstance(picture, torch.Tensor):
                picture = to_pil_image(picture)
            picture.save(png, format="png")
            cells.append({"bytes": png.getvalue(), "path": None})
        kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        table = pyarrow.table(
            {"image": pyarrow.array(cells, kind), "label": np.asarray(source.labels)}
        )
        partial = folder / f".{part}.{os.getpid()}"
        pyarrow.parquet.write_table(table, partial)
        partial.rename(folder / f"{part}.parquet")


def digest(source: ImageSource) -> str:
    """A short name of a source's pixels and labels: runs that share it saw the same
    pictures."""
    found = hashlib.sha256(np.asarray(source.labels).tobytes())
    for i in range(len(source)):
        found.update(np.asarray(source.read(i)).tobytes())
    return found.hexdigest()[:16]


def marks_of(study: Study, run: Run) -> list[float]:
    """Epochs after which a run is evaluated; the end alone where it chooses a rate."""
    if run.seed == study.tuning_seed:
        return [study.epochs]
    return [0.0, *(e for e in study.marks if e < study.epochs), study.epochs]


def evaluated(
    study: Study,
    run: Run,
    model: MaskedAutoencoder,
    labelled: ImageSource,
    parts: Mapping[str, ImageSource],
) -> Record:
    """Loss at masking ratio 0.75 (and the arm's own) under masks that are the same for
    every run, linear probe and neighbours, on each part, validation or test.
    """
    own = mask_ratio_of(EVERY_ARM[run.arm])
    known = encode(
        model, SelectedImages(labelled, np.arange(study.labelled)), workers=0
    )
    result: Record = {}
    for part, source in parts.items():
        shown = some_pictures(source, model.config, study.scored)
        asked = encode(model, source)
        rows = (known.patch_mean, known.labels, asked.patch_mean, asked.labels)
        loss = held_out_loss(model, shown, 0.75)
        result[part] = {
            "loss": loss,
            "own_loss": loss if own == 0.75 else held_out_loss(model, shown, own),
            # one seed for all: it only splits the labels that choose C
            "probe": probe_accuracy(*rows, 0),
            "neighbours": neighbour_accuracy(*rows),
        }
    return result


def counted_operations(model: MaskedAutoencoder, ratio: float) -> int:
    """Operations of one training picture's forward pass, in a batch of 64."""
    size = model.config.image_size
    sides = (size, size) if isinstance(size, int) else size
    images = torch.zeros(64, model.config.channels, *sides)
    with operation_counter() as counter:
        model(images, ratio)
    return counter.get_total_flops() // 64


def train_to(
    config: PretrainConfig,
    study: Study,
    run: Run,
    pictures: ImageData,
    test: ImageSource | None,
) -> tuple[list[Record], str | None]:
    """Train from mark to mark, evaluating at each on test pictures, and at the end on
    validation pictures too; where rates are chosen on these alone.  Evaluations are
    kept beside the run, so that one which was cut off is not made again.  Also why it
    diverged, or None."""
    directory = Path(config.output_dir)
    steps = Plan(replace(config, max_steps=None), len(pictures.train)).steps
    scores: list[Record] = []
    before = 0
    for epoch in marks_of(study, run):
        step = min(steps, round(epoch * len(pictures.train) / config.batch_size))
        step = steps if epoch == study.epochs else step
        kept = directory / f"scores-{step:06d}.json"
        if not kept.is_file():
            latest = RunDirectory(directory).latest()
            fresh = (0 if latest is None else latest.step) == before
            started = time.process_time()
            if step:
                try:
                    pretrain(replace(config, max_steps=step), progress=False)
                except TrainingDivergedError as error:
                    return scores, str(error).partition(";")[0]
                model = load_model(directory)
            else:
                model = fresh_model(config.model, config.seed)
            trained = time.process_time()
            parts = {} if test is None else {"test": test}
            if step == steps:
                parts["validation"] = pictures.held_out
            found = evaluated(
                study, run, model.to(config.device), pictures.train, parts
            )
            kept.parent.mkdir(parents=True, exist_ok=True)
            score = {
                "epoch": epoch,
                "step": step,
                # of the steps since the last mark; null where they were cut off
                "processor_seconds": round(trained - started, 1) if fresh else None,
                "evaluation_seconds": round(time.process_time() - trained, 1),
                **found,
            }
            write_json(kept, score)
        scores.append(json.loads(kept.read_text()))
        before = step
    return scores, None


def execute(study: Study, run: Run, options: argparse.Namespace) -> Record:
    """Train and evaluate one run, or go on with it; write and return its record."""
    torch.set_num_threads(options.threads)
    config = config_of(study, run, options)
    command = shlex.join(
        [
            "python",
            "benchmarks/study.py",
            "--data",
            without_path(options.data),
            "--scale",
            options.scale,
            "--only",
            run.name,
        ]
    )
    origin = provenance(command, device_name(torch.device(options.device)))
    whole = open_data(options.data)
    prepare(study, whole, options.runs / "pictures")
    pictures = open_data(config.data)
    test = None if run.seed == study.tuning_seed else whole.held_out
    scores, diverged = train_to(config, study, run, pictures, test)
    fresh = build_model(config.model)
    spent = [s["processor_seconds"] for s in scores]
    spent += [s["evaluation_seconds"] for s in scores]
    curve = RunDirectory(config.output_dir).logged()
    trivial = trivial_loss(fresh, some_pictures(pictures.train, config.model))
    arm = EVERY_ARM[run.arm]
    record = {
        "name": run.name,
        "stage": run.stage,
        "arm": run.arm,
        "layers": arm.layers,
        "encoder_sees": "visible tokens" if arm.visible else "all tokens",
        "changes": dict(arm.changes),
        "peak_lr": run.peak_lr,
        "seed": run.seed,
        "scale": options.scale,
        "diverged": diverged is not None,
        "why_diverged": diverged,
        "parameters": sum(p.numel() for p in fresh.parameters()),
        "operations": counted_operations(fresh, config.mask_ratio),
        "pictures": len(pictures.train),
        "epochs": study.epochs,
        "batch_size": config.batch_size,
        "precision": config.precision,
        "scores": scores,
        "mean_picture_loss": trivial.mean_picture,
        "train_loss": [[line["step"], round(line["loss"], 5)] for line in curve[::5]],
        "processor_seconds": None if None in spent or not spent else sum(spent),
        "digests": {
            "train": digest(pictures.train),
            "validation": digest(pictures.held_out),
            "test": None if test is None else digest(test),
        },
        **origin,
    }
    options.records.mkdir(parents=True, exist_ok=True)
    write_json(options.records / f"{run.name}.json", record)
    return record


def without_path(data: str) -> str:
    """A data argument that names no machine's folders."""
    kind, _, where = data.partition(":")
    return f"{kind}:PATH/{Path(where).name}" if "/" in where else data


# --- the queue's process -------------------------------------------------------------


def finished(options: argparse.Namespace) -> dict[str, Record]:
    """Records by name; ``SystemExit`` if they are another scale's."""
    if not options.records.is_dir():
        return {}
    records = {record["name"]: record for record in read_runs(options.records)}
    if other := {r["scale"] for r in records.values()} - {options.scale}:
        raise SystemExit(
            f"{options.records} has records of scale {', '.join(sorted(other))}: give "
            f"{options.scale} another --records"
        )
    return records


def start(run: Run, options: argparse.Namespace) -> subprocess.Popen[bytes]:
    """A process of its own for a run; what it says goes beside it."""
    command = [sys.executable, str(Path(__file__).resolve()), "--only", run.name]
    for name in ("data", "scale", "device", "threads", "runs", "records"):
        command += [f"--{name}", str(getattr(options, name))]
    options.runs.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    with open(options.runs / f"{run.name}.txt", "ab") as said:
        return subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, env=environment
        )


@contextlib.contextmanager
def only_queue(runs: Path) -> Iterator[None]:
    """Hold the folder of runs; ``SystemExit`` if another queue does."""
    import fcntl

    runs.mkdir(parents=True, exist_ok=True)
    with open(runs / "queue.pid", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise SystemExit(
                f"another queue (process {file.read().strip()}) works in {runs}"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
        file.truncate(0)


def say(line: str) -> None:
    """A line with the time."""
    print(time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()), line, flush=True)


def hold(active: Sequence[subprocess.Popen[bytes]], paused: bool) -> None:
    """Stop every process, or let it go on; either may be repeated."""
    for process in active:
        process.send_signal(signal.SIGSTOP if paused else signal.SIGCONT)


def work(study: Study, options: argparse.Namespace) -> int:
    """Run what is left of the queue; the number of runs that failed (twice)."""
    active: dict[str, subprocess.Popen[bytes]] = {}
    failures: dict[str, int] = {}
    end = time.monotonic() + 3600 * options.limit_hours
    was_paused = False
    try:
        while time.monotonic() < end:
            for name, process in list(active.items()):
                if (code := process.poll()) is not None:
                    del active[name]
                    failures[name] = failures.get(name, 0) + (code != 0)
                    say(f"{name}: {'done' if code == 0 else f'failed ({code})'}")
            records = finished(options)
            todo = [
                run
                for run in queue(study, records)
                if run.stage in options.stage
                and run.arm in options.arms
                and run.name not in records
                and run.name not in active
                and failures.get(run.name, 0) < 2
            ]
            if not todo and not active:
                break
            paused = options.pause_file is not None and options.pause_file.exists()
            if paused != was_paused:
                hold(list(active.values()), paused)
                say("paused" if paused else "going on")
                was_paused = paused
            while todo and not paused and len(active) < options.workers:
                run = todo.pop(0)
                active[run.name] = start(run, options)
                say(f"{run.name}: started")
            time.sleep(options.poll_seconds)
    finally:
        # a stopped process acts on SIGTERM only when it goes on
        for process in active.values():
            process.terminate()
        hold(list(active.values()), paused=False)
        for process in active.values():
            process.wait()
    failed = [name for name, count in failures.items() if count >= 2]
    if failed:
        say(f"failed twice, see their .txt: {', '.join(failed)}")
    return len(failed)


def show_plan(study: Study, options: argparse.Namespace) -> None:
    """The queue with predicted hours of one core, and how far it is."""
    records = finished(options)
    known = queue(study, records)
    print(f"{'run':52}{'core minutes':>13}  state")
    for run in known:
        seconds = seconds_of(study, run, records)
        state = "done" if run.name in records else "waiting"
        print(f"{run.name:52}{seconds / 60:>13.1f}  {state}")
    for stage in (1, 2, 3):
        runs = [r for r in known if r.stage == stage]
        later = [r for r in unknown_yet(study, records) if r.stage == stage]
        left = [r for r in runs if r.name not in records] + later
        hours = sum(seconds_of(study, r, records) for r in left) / 3600
        print(
            f"stage {stage}: {len(runs) + len(later)} runs, {len(later)} of them at "
            f"rates not known yet, {len(left)} left: {hours:.1f} core hours, "
            f"{hours / 2:.1f} hours of two cores"
        )


def show_status(study: Study, options: argparse.Namespace) -> None:
    """What is done, and each arm's learning rates with their validation losses."""
    records = finished(options)
    for arm in EVERY_ARM:
        stage = 3 if EVERY_ARM[arm].base else 1
        losses = losses_of(records, stage, arm, study.tuning_seed)
        if not losses:
            continue
        tried = ", ".join(f"{r:g}: {losses[r]:.4f}" for r in sorted(losses))
        _, best = best_rate(study, arm, records)
        print(f"{arm}: {tried}; chosen {'not yet' if best is None else f'{best:g}'}")
    compared = [r for r in records.values() if r["seed"] != study.tuning_seed]
    for r in sorted(compared, key=lambda r: (r["stage"], r["arm"], r["seed"])):
        last = r["scores"][-1]["test"] if r["scores"] else {}
        shown = "  ".join(f"{k} {v:.4f}" for k, v in last.items())
        print(f"stage {r['stage']} {r['arm']} seed {r['seed']}: {shown or 'diverged'}")
    for text in sorted(options.runs.glob("stage*")):
        if text.is_dir() and text.name not in records:
            logged = RunDirectory(text).logged()
            at = f"step {logged[-1]['step']}" if logged else "not a line yet"
            print(f"begun: {text.name}, {at}")


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--data", required=True, help="as crate pretrain takes, with a test part"
    )
    parser.add_argument("--plan", action="store_true", help="print the queue")
    parser.add_argument("--status", action="store_true", help="print what is known")
    parser.add_argument("--only", help="one run of the queue, in this process")
    parser.add_argument(
        "--stage", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3]
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=EVERY_ARM,
        default=list(EVERY_ARM),
        metavar="ARM",
        help="these alone, for now: whole comparisons sooner on a slow machine",
    )
    parser.add_argument("--workers", type=int, default=1, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run")
    parser.add_argument("--limit-hours", type=float, default=math.inf)
    parser.add_argument("--pause-file", type=Path, help="stand still while it exists")
    parser.add_argument("--poll-seconds", type=float, default=2.0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--scale", choices=SCALES, default="standard")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"))
    parser.add_argument("--records", type=Path, default=Path("results/study/runs"))
    options = parser.parse_args(arguments)
    for name in ("workers", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: at least 1 is accepted")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    study = SCALES[options.scale]
    if options.plan:
        show_plan(study, options)
    elif options.status:
        show_status(study, options)
    elif options.only is not None:
        named = {run.name: run for run in queue(study, finished(options))}
        if options.only not in named:
            raise SystemExit(
                f"--only {options.only}: the queue has {', '.join(named) or 'no run'}"
            )
        execute(study, named[options.only], options)
    else:
        # leave through the finally of work(), which ends the runs
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
        with only_queue(options.runs):
            return 1 if work(study, options) else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
