r"""What one core prepares and reads, by the size of the files and their form, and what
a node of eight GPUs needs of both.

    python benchmarks/prepare.py --imagenet PATH/imagenet-sample-256.zip

Pictures of a zip file of JPEG files are prepared once as they are (29 kB on average in
the sample) and once enlarged to a shorter side of 375 pixels at the JPEG quality that
brings them to 65 kB, the size of ImageNet's own pictures at 500 x 375.  Timed, in
processor time of one thread: making the copy at 256 pixels, and reading training
pictures at 224 pixels from each form under each augmentation.  Writes
``results/prepare.json``.
"""

import argparse
import io
import os
import shlex
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from crate_core.data.batches import StepBatches, TrainingPictures
from crate_core.data.named import open_data
from crate_core.data.prepare import FORMATS, PrepareConfig, prepare
from crate_core.data.shards import order_of
from crate_core.model.config import CrateMAEConfig
from crate_core.model.cost import operations
from crate_core.records import device_name, provenance, write_json

SIZE = (224, 224)
BATCH = 64
AUGMENTATIONS = ("crop_flip", "crop_blur_solarize")
LARGE_SIDE, LARGE_BYTES = 375, 65_000

GPUS = 8
PEAK, USUAL = 989e12, 0.35
"""Dense bf16 operations a second of an H100, and the share of them that is reached, as
the chapter on pretraining assumes.
"""


def enlarged(files: list[bytes], quality: int) -> list[bytes]:
    """The pictures with a shorter side of ``LARGE_SIDE``."""
    made = []
    for data in files:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        scale = LARGE_SIDE / min(picture.size)
        size = (round(picture.width * scale), round(picture.height * scale))
        file = io.BytesIO()
        picture.resize(size, Image.Resampling.BICUBIC).save(
            file, "JPEG", quality=quality
        )
        made.append(file.getvalue())
    return made


def mean_bytes(files: list[bytes]) -> float:
    return sum(map(len, files)) / len(files)


def seconds(work: Callable[[], Any]) -> float:
    """Processor time of this process."""
    start = time.process_time()
    work()
    return time.process_time() - start


def rate(pictures: int, work: Callable[[], Any], rounds: int) -> dict[str, float]:
    """Pictures a second: median and extremes over rounds."""
    found = [pictures / seconds(work) for _ in range(rounds)]
    return {
        "median": statistics.median(found),
        "lowest": min(found),
        "highest": max(found),
    }


def written(root: Path, files: list[bytes]) -> Path:
    """Files in two class folders, every tenth held out."""
    for i, data in enumerate(files):
        part = "val" if i % 10 == 0 else "train"
        path = root / part / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def measure(root: Path, files: list[bytes], rounds: int) -> dict[str, Any]:
    """Making a copy at 256 pixels, and reading pictures of this size in every form."""
    raw = written(root / "raw", files)
    made: dict[str, Any] = {}
    reading: dict[str, dict[str, Any]] = {}
    for form in FORMATS:
        turn = 0

        def copy(side: int = 256, form: Any = form) -> Path:
            nonlocal turn
            turn += 1
            output = root / f"{form}-{side}-{turn}"
            config = PrepareConfig(
                str(raw), str(output), side=side, format=form, shard_size=100
            )
            prepare(config, lambda line: None, progress=False)
            return output

        made[form] = rate(len(files), copy, rounds)
        # for reading, pictures of their own size: none is larger than this
        output = copy(side=100_000)
        kind = "folder" if form == "folders" else "shards"
        source = open_data(f"{kind}:{output}").train
        for augmentation in AUGMENTATIONS:
            pictures = TrainingPictures(source, SIZE, 3, augmentation, 0)
            steps = len(source) // BATCH

            def read(
                pictures: Any = pictures, source: Any = source, steps: int = steps
            ) -> None:
                order = order_of(source, 0, BATCH)
                batches = StepBatches(
                    len(source), BATCH, 0, 0, steps, accumulate=1, order=order
                )
                for items in batches:
                    pictures.__getitems__(items)

            reading.setdefault(augmentation, {})[form] = rate(
                steps * BATCH, read, rounds
            )
    return {"bytes": mean_bytes(files), "prepare": made, "read": reading}


def node(sizes: dict[str, Any], needed: float) -> dict[str, Any]:
    """What a node of eight GPUs takes: pictures a second as predicted for the base
    model, the cores that read as many at the highest rate that was measured (other
    processes only lower it), and bytes a second.
    """
    pictures = GPUS * PEAK * USUAL / needed
    return {
        "gpus": GPUS,
        "operations_a_second": PEAK,
        "share": USUAL,
        "pictures_a_second": pictures,
        "by_size": {
            name: {
                "bytes_a_second": pictures * found["bytes"],
                "cores": {
                    augmentation: pictures / by["tar"]["highest"]
                    for augmentation, by in found["read"].items()
                },
            }
            for name, found in sizes.items()
        },
    }


def load_of_others() -> float | None:
    """Processes that wanted this machine's cores in the last minute, this one among
    them: caches and cores were shared with them.
    """
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description="What one core prepares and reads, and what a node needs."
    )
    parser.add_argument(
        "--imagenet", type=Path, required=True, help="a zip of JPEG files"
    )
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("results/prepare.json"))
    options = parser.parse_args()
    if options.pictures < 2 * BATCH:
        parser.error(f"--pictures: at least {2 * BATCH}")
    torch.set_num_threads(1)
    command = shlex.join(
        ["python", "benchmarks/prepare.py", "--imagenet", options.imagenet.name]
    )
    origin = provenance(command, device_name(torch.device("cpu")))

    with zipfile.ZipFile(options.imagenet) as archive:
        names = sorted(n for n in archive.namelist() if n.lower().endswith(".jpeg"))
        files = [archive.read(name) for name in names[: options.pictures]]
    some = files[::5]
    quality = min(
        range(80, 97),
        key=lambda q: abs(mean_bytes(enlarged(some, q)) - LARGE_BYTES),
    )
    sizes: dict[str, Any] = {}
    for made in (files, enlarged(files, quality)):
        with tempfile.TemporaryDirectory() as root:
            found = measure(Path(root), made, options.rounds)
        sizes[f"{found['bytes'] / 1000:.0f} kB"] = found
    needed = operations(CrateMAEConfig.preset("base"), 512).needed / 512
    content = {
        "pictures": len(files),
        "size": list(SIZE),
        "enlarged": {"shorter_side": LARGE_SIDE, "quality": quality},
        "files": sizes,
        "node": node(sizes, needed),
        "unit": "pictures a second of processor time, one thread",
        "processes_that_shared_the_machine": load_of_others(),
        **origin,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, content)
    for name, found in sizes.items():
        print(f"{name}: prepared to 256 pixels, pictures a second and core")
        for form, of in found["prepare"].items():
            print(f"  {form:28}{of['highest']:9.0f}")
        for augmentation, by in found["read"].items():
            for form, of in by.items():
                print(f"  {f'read {form}, {augmentation}':36}{of['highest']:9.0f}")
    needs = content["node"]
    print(f"eight GPUs: {needs['pictures_a_second']:,.0f} pictures a second")
    for name, of in needs["by_size"].items():
        cores = ", ".join(f"{v:.0f} cores {k}" for k, v in of["cores"].items())
        print(f"  {name}: {of['bytes_a_second'] / 1e6:,.0f} MB a second, {cores}")


if __name__ == "__main__":
    main()
