r"""Seconds that imports and the command line take, in fresh processes:
``python benchmarks/startup.py``.

Each is run some times in turn after one run that warms the disk; the median is
reported.  Writes ``results/startup.json``.
"""

import argparse
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from crate_core.records import device_name, provenance, write_json

PROGRAMS = {
    "python": "pass",
    "import torch": "import torch",
    "import crate_core": "import crate_core",
    "import torch, crate_core": "import torch, crate_core",
    "import torch, all names of crate_core": "import torch; from crate_core import *",
    "crate --help": (
        "import sys; from crate_core.cli import main; sys.exit(main(['--help']))"
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("results/startup.json"))
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for round_ in range(1 + options.repeats):
        for name, program in PROGRAMS.items():
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL
            )
            if round_:
                seconds[name].append(time.perf_counter() - start)
    record = {
        "seconds": {name: statistics.median(times) for name, times in seconds.items()},
        "provenance": provenance(
            shlex.join(["python", "benchmarks/startup.py", *sys.argv[1:]]),
            device_name(torch.device("cpu")),
        ),
    }
    write_json(options.output, record)
    for name, value in record["seconds"].items():  # type: ignore[attr-defined]
        print(f"{name:40s} {value:6.2f} s")


if __name__ == "__main__":
    main()
