"""What pyproject.toml cannot say: the records that the chapters read go into the wheel.

They stay in `results/`, beside the package, in a clone; in the wheel they are at
`crate_core/results/`. `crate_core.records.results_path` finds them in both.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

RESULTS = (
    "*.json",
    "study/runs/*.json",
    "weights/*-seed0/config.json",
    "weights/*-seed0/model.safetensors",  # one seed of each network, to look into
)


class BuildWithResults(build_py):
    """Copies the records beside the modules, unless the clone itself is installed."""

    def run(self) -> None:
        """Build as usual, then copy."""
        super().run()
        if self.editable_mode:
            return
        source = Path("results")
        for pattern in RESULTS:
            for path in sorted(source.glob(pattern)):
                target = Path(self.build_lib, "crate_core", path)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


setup(cmdclass={"build_py": BuildWithResults})
