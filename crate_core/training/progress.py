r"""What a user sees of a run while it goes on: the bar, throughput, TensorBoard,
pictures, whether the loss is normal.

Nothing here is part of the metrics log: two runs of one configuration have the same
losses and never the same times.

Book: :ref:`ch-pretraining`.
"""

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from tqdm import tqdm

from crate_core.training.recipe import Schedule
from crate_core.training.run_directory import RunDirectory

PICTURE_FOLDER = "pictures"
TENSORBOARD_FOLDER = "tensorboard"
REMARKS = 10
"""How many times in a run a line says whether the loss is normal."""

SECONDS_BETWEEN_LINES = 10.0
"""How often a line takes the place of the bar where there is no terminal, at most; the
last step has one.
"""


class Progress:
    """The main process's bar, ``timing.jsonl`` and TensorBoard; on the others it does
    nothing.

    Parameters
    ----------
    run : where files go.
    plan : the run's configuration, steps and, for pretraining, what loss is normal.
    start : first step.
    bar : show a progress bar on stderr.
    main : whether this is the main process.
    report : gets one-line remarks.

    Book: :ref:`ch-pretraining`.
    """

    def __init__(
        self,
        run: RunDirectory,
        plan: Schedule,
        start: int,
        bar: bool,
        main: bool,
        report: Callable[[str], None],
    ) -> None:
        self.run, self.plan, self.config = run, plan, plan.config
        self.main, self.report = main, report
        self.bar = tqdm(
            total=plan.steps,
            initial=start,
            unit="step",
            disable=not (bar and main and sys.stderr.isatty()),
            mininterval=0.5,
        )
        self.timed_step, self.timed_at = start, time.perf_counter()
        # Where there is no terminal: a line now and then in place of the bar.
        self.lines = bar and main and not sys.stderr.isatty()
        self.said_at = self.timed_at
        self.writer: Any = None
        if main and plan.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Steps after `start` that an earlier process wrote and lost are hidden.
            self.writer = SummaryWriter(
                str(run.path / TENSORBOARD_FOLDER), purge_step=start + 1
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.bar.close()
        if self.writer is not None:
            self.writer.close()

    def line(self, record: Mapping[str, Any]) -> None:
        """Show a line of the metrics log, with the images per second since the last
        one.
        """
        if not self.main:
            return
        step, now = record["step"], time.perf_counter()
        seconds = max(now - self.timed_at, 1e-9)
        rate = (step - self.timed_step) * self.config.batch_size / seconds
        timing: dict[str, Any] = {
            "step": step,
            "seconds": round(seconds, 4),
            "images_per_second": round(rate, 2),
        }
        if torch.cuda.is_available():
            timing["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        self.run.log_timing(timing)
        self.remark(record)
        waited = now - self.said_at > SECONDS_BETWEEN_LINES
        if self.lines and (waited or step == self.plan.steps):
            self.said_at = now
            self.report(
                f"step {step:,} of {self.plan.steps:,}, epoch {record['epoch']:g}: "
                f"loss {record['loss']:.4f}, {rate:.0f} images/s"
            )
        self.timed_step, self.timed_at = step, now
        self.bar.set_postfix(
            epoch=f"{record['epoch']:g}/{self.config.epochs:g}",
            loss=f"{record['loss']:.4f}",
            lr=f"{record['lr']:.1e}",
            gradient=f"{record['gradient_norm'] or float('nan'):.2g}",
            images_per_s=f"{rate:.0f}",
        )
        if self.writer is not None:
            for name, value in {**record, **timing}.items():
                if name not in ("step", "seconds") and value is not None:
                    self.writer.add_scalar(name, value, step)

    def remark(self, record: Mapping[str, Any]) -> None:
        """Say ten times in a run whether the loss is normal, where it was measured."""
        step, before = record["step"], record["step"] - self.config.log_every
        if step * REMARKS // self.plan.steps == before * REMARKS // self.plan.steps:
            return
        normal = self.plan.expected(step)
        if normal is not None:
            low, high = normal
            verdict = "" if low <= record["loss"] <= high else "  <- outside"
            self.report(
                f"step {step:,}, epoch {record['epoch']:g}: loss {record['loss']:.3f}; "
                f"normal at this point: {low:.3f} to {high:.3f}{verdict}"
            )

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Say what an evaluation on held-out pictures gave."""
        shown = ", ".join(
            f"{name.replace('_', ' ')} {value:.4f}" for name, value in scores.items()
        )
        self.report(f"step {step:,}, epoch {self.plan.epoch(step):.4g}: {shown}")
        if self.writer is not None:
            for name, value in scores.items():
                self.writer.add_scalar(name, value, step)

    def picture_path(self, step: int) -> Path:
        """Where the reconstructions of a step go."""
        folder = self.run.path / PICTURE_FOLDER
        folder.mkdir(exist_ok=True)
        return folder / f"step-{step:08d}.png"

    def show_picture(self, path: Path, step: int) -> None:
        """Add a picture to TensorBoard."""
        if self.writer is not None:
            import numpy as np
            from PIL import Image

            with Image.open(path) as picture:
                self.writer.add_image(
                    "reconstructions",
                    np.asarray(picture.convert("RGB")),
                    step,
                    dataformats="HWC",
                )
