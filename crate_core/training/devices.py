r"""Where a run computes: devices, precision and processes through accelerate; copies
(DDP) or shares (FSDP2) of the model; the same checkpoint from either.

With P processes, each on its rows of the global batch, both compute

.. math:: g = \frac1P \sum_{p=1}^P \frac1A \sum_{a=1}^A
          \nabla \ell(\text{micro-batch } a \text{ of process } p),

which is the gradient of the whole batch's loss, since every picture has the same number
of removed patches.

Book: :ref:`ch-pretraining`.
"""

import contextlib
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from crate_core.model.autoencoder import MaskedAutoencoder
from crate_core.model.build import processes_on_cpu
from crate_core.model.files import StateDict
from crate_core.training.recipe import PretrainConfig, TrainingConfig

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def make_accelerator(config: TrainingConfig) -> Accelerator:
    """Accelerate's view of the devices and processes.  ``ValueError`` if the device
    asked for is not there.
    """
    # The state is one per process and would keep the precision of an earlier run.
    AcceleratorState._reset_state(reset_partial_state=True)
    precision = "no" if config.precision == "fp32" else config.precision
    cpu = processes_on_cpu(config.device)
    accelerator = Accelerator(mixed_precision=precision, cpu=cpu)
    if config.device not in ("auto", accelerator.device.type):
        raise ValueError(
            f"device={config.device!r}: this machine offers {accelerator.device.type!r}"
        )
    return accelerator


def company(threads: int | None = None) -> str | None:
    """A line that says so where other processes want this machine's cores too, else
    ``None``: the load of the last minute and ``threads`` of our own are more than there
    are cores.
    """
    if not hasattr(os, "getloadavg"):  # Windows
        return None
    others = os.getloadavg()[0]
    threads = torch.get_num_threads() if threads is None else threads
    cores = (
        len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1
    )
    if others < 0.5 or others + threads <= cores + 0.5:
        return None
    return (
        f"this machine is busy: {others:.1f} processes ran on its {cores} cores in the "
        f"last minute, and this one wants {threads} more; it will be slow"
        + ("; OMP_NUM_THREADS=1 often costs least then" if threads > 1 else "")
    )


def distribute(
    model: MaskedAutoencoder, config: PretrainConfig, accelerator: Accelerator
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model and its AdamW on this process's device, as a copy or, with
    ``config.shard``, as a share.

    A share needs more than one process; with one, ``shard`` changes nothing.
    """
    sharded = config.shard and accelerator.num_processes > 1
    module: nn.Module = model
    if sharded:
        # device and precision, no copies
        module = accelerator.prepare_model(model, evaluation_mode=True)
        # Its advice on in-place changes of outputs does not concern a loop that reads
        # the loss alone.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for part in (*model.encoder, *model.decoder, module):
            fully_shard(part, mesh=mesh)
    optimizer = make_optimizer(module, config, accelerator.device)
    return (module, optimizer) if sharded else accelerator.prepare(module, optimizer)


def make_optimizer(
    model: nn.Module, config: PretrainConfig, device: torch.device
) -> torch.optim.Optimizer:
    """AdamW for a model that trains on ``device``; biases, norms and other vectors do
    not decay, as in MAE.
    """
    return torch.optim.AdamW(
        param_groups_weight_decay(model, config.weight_decay),
        lr=config.peak_lr,
        betas=config.betas,
        fused=device.type in ("cpu", "cuda"),
    )


@contextlib.contextmanager
def gradient_sync(
    wrapped: nn.Module, accelerator: Accelerator, wanted: bool
) -> Iterator[None]:
    """Average gradients over processes in the backward pass inside, or leave that to a
    later micro-batch's.
    """
    if isinstance(wrapped, FSDPModule):
        wrapped.set_requires_gradient_sync(wanted)
        yield
    elif wanted:
        yield
    else:
        with accelerator.no_sync(wrapped):
            yield


def clip_gradient(
    wrapped: nn.Module, accelerator: Accelerator, limit: float | None
) -> Tensor:
    """Scale the gradient to a norm of at most ``limit``; returns its norm before, over
    all processes' shares.
    """
    norm = accelerator.clip_grad_norm_(
        wrapped.parameters(), math.inf if limit is None else limit
    )
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def whole_weights(wrapped: nn.Module) -> StateDict:
    """All weights of a sharded model, on the main process; empty on the others.  Every
    process calls it.
    """
    return {
        name: cast(Tensor, value)
        for name, value in get_model_state_dict(wrapped, options=WHOLE).items()
    }


def bare(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def optimizer_state(
    wrapped: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """The whole state of an optimizer by the names of parameters, on the main process,
    whatever the number of processes.  Every process calls it.
    """
    return dict(get_optimizer_state_dict(wrapped, bare(optimizer), options=WHOLE))


def load_optimizer_state(
    wrapped: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Take back what :func:`optimizer_state` gave, whatever the number of processes
    then and now.
    """
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(wrapped, bare(optimizer), state, options=options)
