"""Two "nodes" of two processes each, which find each other through torchrun's
rendezvous on this machine: the losses of one process, and a node that is lost.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_runs import ENVIRONMENT, ROOT, tiny, train

from crate_core.evaluation.finetune import finetune
from crate_core.evaluation.finetune_recipe import FinetuneConfig
from crate_core.training.run_directory import RunDirectory

pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(
        not Path("/proc/self/task").is_dir(), reason="a node's processes by /proc"
    ),
]

SCRIPT = """
import json, sys, time
import torch
import crate_core.training.pretrain as loop
from crate_core.evaluation.finetune import finetune
from crate_core.evaluation.finetune_recipe import FinetuneConfig
from crate_core.training.recipe import PretrainConfig

torch.set_num_threads(1)
pretraining, tuning, pause = json.loads(sys.argv[1])
update = loop.Trainer.update
def slow(self, batches):
    time.sleep(pause if self.step >= 5 else 0)
    return update(self, batches)
loop.Trainer.update = slow
loop.pretrain(PretrainConfig.from_dict(pretraining), progress=False, report=str)
finetune(FinetuneConfig.from_dict(tuning), progress=False, report=str)
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tuning(directory: Path, checkpoint: Path) -> FinetuneConfig:
    """Six steps with all that is random in MAE's recipe."""
    return FinetuneConfig(
        "digits", checkpoint=str(checkpoint), batch_size=16, max_steps=6, mixup=0.8,
        cutmix=1.0, drop_path=0.2, log_every=2, device="cpu", output_dir=str(directory),
    )  # fmt: skip


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def start_nodes(
    directory: Path, checkpoint: Path, pause: float
) -> list[subprocess.Popen[bytes]]:
    """Two launchers, each of two processes, and one run."""
    script = directory.parent / "script.py"
    script.write_text(SCRIPT)
    given = json.dumps(
        [
            tiny(directory / "pretrain").to_dict(),
            tuning(directory / "finetune", checkpoint).to_dict(),
            pause,
        ]
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    launch += ["--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-id", "tiny"]
    launch += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    launch += ["--local-addr", "127.0.0.1", str(script), given]
    return [
        subprocess.Popen(
            launch, env=ENVIRONMENT, cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=open(directory.parent / f"node-{node}.txt", "ab"),
        )
        for node in (0, 1)
    ]  # fmt: skip


def lose(node: subprocess.Popen[bytes]) -> None:
    """Kill a launcher and its processes, as a node that loses its power."""
    children = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
    for process in (node.pid, *map(int, children)):
        os.kill(process, signal.SIGKILL)
    node.wait()


def losses(directory: Path) -> list[float]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_two_nodes_compute_what_one_process_does_and_one_may_be_lost(
    tmp_path: Path,
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    two.mkdir()
    train(tiny(one / "pretrain"))
    finetune(tuning(one / "finetune", one / "pretrain"), False, str)

    nodes = start_nodes(two, one / "pretrain", pause=1.0)
    try:
        while (
            all(node.poll() is None for node in nodes)
            and not (two / "pretrain" / "checkpoints" / "step-00000004").exists()
        ):
            time.sleep(0.05)
        assert all(node.poll() is None for node in nodes)
        lose(nodes[1])
        # the other one cannot go on alone, and says so
        assert nodes[0].wait() != 0
    finally:
        for node in nodes:
            if node.poll() is None:
                lose(node)
    kept = RunDirectory(two / "pretrain").latest()
    assert kept is not None
    assert 4 <= kept.step < 12

    nodes = start_nodes(two, one / "pretrain", pause=0.0)
    assert [node.wait() for node in nodes] == [0, 0]
    for part, rounding in (("pretrain", 1e-4), ("finetune", 1e-2)):
        assert losses(two / part) == pytest.approx(losses(one / part), rel=rounding)
    starts = json.loads((two / "pretrain" / "run.json").read_text())["starts"]
    assert len(starts) == 2
