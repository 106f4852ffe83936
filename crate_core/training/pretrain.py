r"""Masked pretraining: the loop, its schedule, exact resume.

Step t draws its pictures, augmentation and masks from (seed, t) alone
(:mod:`crate_core.data.batches`), so the state of a run is its weights, the optimizer's
averages and t.  A checkpoint holds these; a run that was cut off at any moment goes on
from the last one and, on a CPU with the same number of threads, ends with the bits of
the uncut run.

Book: :ref:`ch-first-training`, :ref:`ch-pretraining`.
"""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from crate_core.data.named import open_data
from crate_core.data.sources import ImageData
from crate_core.data.streamed import stream_data
from crate_core.data.understood import understood
from crate_core.model.autoencoder import MaskedAutoencoder
from crate_core.model.build import fresh_model
from crate_core.records import device_name, provenance, write_json
from crate_core.training.devices import check_compiler, make_accelerator
from crate_core.training.loop import PICTURES_SHOWN as PICTURES_SHOWN
from crate_core.training.loop import Trainer, draw_reconstructions
from crate_core.training.loop import TrainingDivergedError as TrainingDivergedError
from crate_core.training.recipe import PretrainConfig, expected_range, total_steps
from crate_core.training.run_directory import (
    PICTURES_FILE,
    SUMMARY_FILE,
    PretrainResult,
    RunDirectory,
    describe,
    result_of,
)
from crate_core.training.yardsticks import (
    TrivialLoss,
    held_out_loss,
    some_batches,
    some_pictures,
    trivial_loss,
)


def data_identity(data: ImageData) -> dict[str, Any]:
    """What of the data decides a run: how many pictures there are to train on, and the
    names of some of them.
    """
    count = len(data.train)
    names = [Path(data.train.name(i)).name for i in sorted({0, count // 2, count - 1})]
    return {"training pictures": count, "first, middle and last picture": names}


def relative_directory(start: Path) -> str:
    """The working directory as seen from ``start``: where relative names of data lie,
    wherever the tree is moved to.
    """
    try:
        return os.path.relpath(Path.cwd(), start)
    except ValueError:  # another drive of Windows
        return str(Path.cwd())


def finish(
    trainer: Trainer, model: MaskedAutoencoder, trivial: TrivialLoss, command: str
) -> None:
    """Write weights, pictures and summary of a run whose steps are done; the summary
    last.
    """
    config, run = trainer.config, trainer.run
    pictures = some_pictures(trainer.data.held_out, config.model)
    epoch = math.ceil(trainer.count / config.batch_size)
    losses = [
        line["loss"]
        for line in run.logged()
        if line["step"] > trainer.step - max(epoch, 1)
    ]
    model.save_pretrained(run.path)
    draw_reconstructions(run.path / PICTURES_FILE, model, trainer.data, config)
    summary = {
        "steps": trainer.step,
        "train_loss": sum(losses) / len(losses),
        "held_out_loss": held_out_loss(model, pictures, config.mask_ratio),
        "trivial_loss": {
            "mean_patch": trivial.mean_patch,
            "mean_picture": trivial.mean_picture,
        },
        "expected_train_loss": expected_range(config, trainer.step, trainer.count),
        "unreadable": len(trainer.unreadable.met),
        "seed": config.seed,
        **provenance(command, device_name(trainer.accelerator.device)),
    }
    write_json(run.path / SUMMARY_FILE, summary)


def pretrain(
    config: PretrainConfig,
    progress: bool = True,
    report: Callable[[str], None] = print,
    command: str = "crate_core.training.pretrain.pretrain",
) -> PretrainResult:
    r"""Pretrain a CRATE-MAE, or continue a run that was cut off.

    Minimises the mean squared error on removed patches with AdamW; see
    :mod:`crate_core.training.recipe` for the recipe.

    Parameters
    ----------
    config : the run; ``config.output_dir`` is where it lives.
    progress : show a progress bar on stderr.
    report : gets each line of text.
    command : what to record as the command.

    Returns
    -------
    PretrainResult : losses and where things were saved.

    Raises
    ------
    ValueError
        If the directory holds another run, the data cannot be used, too many pictures are unreadable, or the
        device is not there.
    FileNotFoundError
        If the data is not there.
    TrainingDivergedError
        If the loss or the gradient is no longer finite.
    CheckpointError If a checkpoint cannot be saved; the previous one is kept, and the
        same call continues from it.

    Book: :ref:`ch-first-training`.
    """
    accelerator = make_accelerator(config)
    main = accelerator.is_main_process

    def say(line: str) -> None:
        if main:
            report(line)

    # which downloads, where there is something to download
    with accelerator.main_process_first():
        data = (
            stream_data(config.data[3:])
            if config.streaming
            else open_data(config.data, config.data_root)
        )
    run = RunDirectory(config.output_dir)
    identity = {**config.identity(), **data_identity(data)}
    for line in understood(data):
        say(line)
    try:
        if main:
            run.claim(
                identity,
                config.to_dict(),
                {
                    **provenance(command, device_name(accelerator.device)),
                    "started_from": relative_directory(run.path),
                },
            )
        accelerator.wait_for_everyone()
        return continued(config, data, run, accelerator, say, report, progress, command)
    finally:
        run.release()


def continued(
    config: PretrainConfig,
    data: ImageData,
    run: RunDirectory,
    accelerator: Accelerator,
    say: Callable[[str], None],
    report: Callable[[str], None],
    progress: bool,
    command: str,
) -> PretrainResult:
    """A run whose directory is claimed, from where it stands to its end; ``say`` speaks
    on the main process only.
    """
    summary, latest = run.summary(), run.latest()
    steps = total_steps(config, len(data.train))
    if (
        summary is not None
        and latest is not None
        and summary["steps"] == latest.step >= steps
    ):
        result = result_of(run)
        say(
            f"{run.path} is finished: {latest.step:,} steps are done; nothing was trained"
        )
        for line in describe(result):
            say(line)
        return result
    if config.compile:
        check_compiler(accelerator.device)
    trivial = TrivialLoss(math.nan, math.nan)
    if accelerator.is_main_process:
        # what the end needs is looked for before the work: some held-out picture
        some_pictures(data.held_out, config.model, PICTURES_SHOWN)
        trivial = trivial_loss(
            fresh_model(config.model, config.seed),
            some_batches(data.train, config.model),
        )
    trainer = Trainer(config, data, run, accelerator, say, report)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    processes = (
        f", {accelerator.num_processes} processes"
        if accelerator.num_processes > 1
        else ""
    )
    say(
        f"model: {parameters:,} parameters on {device_name(accelerator.device)}{processes}, {config.precision}"
    )
    say(
        f"loss to beat: {trivial.mean_picture:.4f}, what predicting the mean picture costs"
    )
    expected = expected_range(config, steps, trainer.count)
    if expected is not None:
        say(f"loss that is normal at the end: {expected[0]:.3f} to {expected[1]:.3f}")
    if trainer.step:
        say(f"continuing after step {trainer.step:,} of {trainer.stop:,}")
    trainer.fit(progress)
    model = trainer.whole_model()
    if accelerator.is_main_process and model is not None:
        with run.writing(
            "the finished run (its steps are done; the same call writes it)"
        ):
            finish(trainer, model, trivial, command)
    accelerator.wait_for_everyone()
    result = result_of(run)
    for line in describe(result):
        say(line)
    return result
