r"""Where a number comes from: command, commit, device, versions, time; and files that
are whole or absent.

Book: :ref:`ch-first-training`.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "crate-core",
    "torch",
    "numpy",
    "scikit-learn",
    "accelerate",
    "safetensors",
    "torchvision",
)


RUN_FILE = "run.json"
"""What a training run records of itself: its configuration and its starts."""


def printable(text: str) -> str:
    r"""Text as UTF-8 can hold it: bytes of a file's name that are in another encoding,
    which Python reads as surrogates, become ``\udcXX`` with a backslash.
    """
    return text.encode("utf8", "backslashreplace").decode("utf8")


def shortened(names: Sequence[str], count: int = 5) -> str:
    """The first ``count`` names, and an ellipsis where there are more."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def atomic_write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: under a temporary name beside it, flushed to
    disk, then renamed.

    Raises ``OSError`` if the disk is full or not writable; the previous file is then
    untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Check, before the work whose result it is to hold, that a file can be written.

    Raises ``OSError`` if its folder is not there or not writable, or it is a folder.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it")
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{path} cannot be written: there is no folder {folder}"
        )
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{path} cannot be written: {folder} is not writable")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all.

    ``ValueError`` for NaN and infinities, which JSON does not have.
    """
    atomic_write(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def results_path(name: str) -> Path:
    """Where a record of a longer run is: in a clone, or in the installed package.

    Parameters
    ----------
    name : ``"results/"`` and the name of a file, as in ``"results/cifar10.json"``, or
        of a folder of weights, as in ``"results/weights/vit-seed0"``.  The wheel
        carries every JSON file and the first seed of each network.

    Raises
    ------
    ValueError
        If ``name`` does not begin with ``results/``.
    FileNotFoundError
        If there is no such record; the message lists what there is.

    Book: :ref:`ch-comparison`.
    """
    package = Path(__file__).resolve().parent
    if not name.startswith("results/"):
        raise ValueError(f"a record is named results/..., got {name!r}")
    folders = [package, package.parent]  # the wheel's, the clone's
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    known = sorted(
        path.relative_to(folder).as_posix()
        for folder in folders
        for pattern in ("results/*.json", "results/weights/*/config.json")
        for path in folder.glob(pattern)
    )
    listed = ", ".join(one.removesuffix("/config.json") for one in known)
    raise FileNotFoundError(f"no record {name}; there are: {listed or 'none'}")


def git_commit() -> str:
    """Commit of the checkout that this package runs from, ``+changes`` if it was
    edited, else ``"uncommitted"``.
    """
    root = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.stdout.strip() if done.returncode == 0 else ""

    if (
        shutil.which("git") is None
        or not (root / ".git").exists()
        or not (commit := git("rev-parse", "HEAD"))
    ):
        return "uncommitted"
    return commit + (
        "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    )


def provenance(command: str, device: str) -> dict[str, Any]:
    """Where a number comes from: command, commit, device, versions, time (UTC).

    Names no machine and no path.
    """

    def version(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    return {
        "command": command,
        "commit": git_commit(),
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """A device in words: the GPU's name, or architecture and cores of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = (
        len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count()
    )
    return f"{device.type} ({platform.machine()}, {cores} cores)"
