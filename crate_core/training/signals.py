"""A run that is asked to stop: SIGTERM and SIGUSR1 end it after the current step, with
a checkpoint, so that a queue can start it again.

A batch system sends one of them before its time limit (Slurm: ``--signal=TERM@120``)
and on preemption.  SIGINT stays Python's ``KeyboardInterrupt``.

Book: :ref:`ch-pretraining`.
"""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

NAMES = ("SIGTERM", "SIGUSR1")
"""Signals that end a run after its current step; Windows has no SIGUSR1."""


class TrainingStoppedError(RuntimeError):
    """A signal ended the run after a step, with a checkpoint; the same call goes on."""

    exit_code = 75
    """Of the command: EX_TEMPFAIL of sysexits.h, start it again."""


class StopSignals:
    """Remembers whether a signal of :data:`NAMES` came while the context is open.

    Handlers are put in place in the main thread only, as Python demands, and put back
    at the end.  Used by every process of a run, in which :meth:`agreed` is the same.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}
        self._group: Any = None

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for name in NAMES:
                number = getattr(signal, name, None)
                if number is not None:
                    self._before[number] = signal.signal(number, self._remember)
        if several() and dist.get_backend() != "gloo":
            # A flag on the CPU: waiting for it does not wait for the GPU.
            self._group = dist.new_group(backend="gloo")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name

    def agreed(self) -> bool:
        """Whether any process of the run has got a signal.  Every process calls it."""
        if not several():
            return self.received is not None
        flag = torch.tensor(int(self.received is not None))
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group)
        return bool(flag)


def several() -> bool:
    """Whether the run has more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
