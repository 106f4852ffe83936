r"""Pictures a second that one core decodes and augments: by decoder and transform,
beside what this package does.

    python benchmarks/input_pipeline.py --imagenet PATH/imagenet-sample-256.zip --cifar
    hf:PATH/cifar10-train.parquet

Each way of going from JPEG bytes in memory to a batch of bytes (B, 3, H, W) is timed in
turn, several rounds, with the median taken; and compared in pixels with the package's
on the same crops.  One thread.  Writes ``results/input-pipeline.json``.
"""

import argparse
import io
import shlex
import statistics
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from crate_core.data.batches import TrainingPictures
from crate_core.data.named import open_data
from crate_core.data.pictures import open_picture
from crate_core.data.transforms import (
    crop_box,
    crop_flip,
    in_mode,
    raw_tensor,
    uniforms,
)
from crate_core.records import device_name, provenance, write_json

SIZE = (224, 224)


def boxes(size: tuple[int, int], key: int) -> tuple[bool, tuple[int, int, int, int]]:
    """Whether to flip, and the crop, as :func:`crate_core.data.transforms.crop_flip`
    draws them.
    """
    draws = uniforms(key)
    return next(draws) < 0.5, crop_box(*size, draws)


def package(data: bytes, key: int) -> torch.Tensor:
    return raw_tensor(
        crop_flip(in_mode(open_picture(io.BytesIO(data)), 3), SIZE, key), 3
    )


def decode_only(data: bytes, key: int) -> torch.Tensor:
    del key
    return torch.from_numpy(np.array(open_picture(io.BytesIO(data))))


def pillow_draft(data: bytes, key: int) -> torch.Tensor:
    """Decode at 1/2, 1/4 or 1/8 where the crop stays larger than the result."""
    with Image.open(io.BytesIO(data)) as picture:
        whole = picture.size
        flipped, box = boxes(whole, key)
        scale = min(box[2] - box[0], box[3] - box[1]) / SIZE[0]
        if scale >= 2:
            picture.draft("RGB", (int(whole[0] / scale), int(whole[1] / scale)))
        picture = picture.convert("RGB")
        ratio = picture.size[0] / whole[0]
        cropped = picture.crop(tuple(round(side * ratio) for side in box)).resize(
            SIZE, Image.Resampling.BICUBIC
        )
        return raw_tensor(
            cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else cropped,
            3,
        )


def pillow_bilinear(data: bytes, key: int) -> torch.Tensor:
    picture = in_mode(open_picture(io.BytesIO(data)), 3)
    flipped, box = boxes(picture.size, key)
    cropped = picture.crop(box).resize(SIZE, Image.Resampling.BILINEAR)
    return raw_tensor(
        cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else cropped, 3
    )


def torchvision_tensor(data: bytes, key: int) -> torch.Tensor:
    picture = decode_jpeg(
        torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB
    )
    flipped, (left, top, right, bottom) = boxes(
        (picture.shape[2], picture.shape[1]), key
    )
    cropped = F.resized_crop(
        picture,
        top,
        left,
        bottom - top,
        right - left,
        list(SIZE),
        InterpolationMode.BICUBIC,
        antialias=True,
    )
    return F.hflip(cropped) if flipped else cropped


WAYS: dict[str, Callable[[bytes, int], torch.Tensor]] = {
    "decode only (Pillow)": decode_only,
    "this package: Pillow, crop, bicubic": package,
    "Pillow, crop, bilinear": pillow_bilinear,
    "Pillow with draft decoding": pillow_draft,
    "torchvision decode and tensor resize": torchvision_tensor,
}


def pictures_a_second(
    works: dict[str, Callable[[], Any]], pictures: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Pictures a second of processor time for each way, taken in turns: median and
    extremes over rounds.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            start = time.process_time()
            work()
            found[name].append(pictures / (time.process_time() - start))
    return {
        name: {"median": statistics.median(of), "lowest": min(of), "highest": max(of)}
        for name, of in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Pictures a second that one core reads and augments."
    )
    parser.add_argument(
        "--imagenet", type=Path, required=True, help="a zip of JPEG files"
    )
    parser.add_argument("--cifar", required=True, help="as crate pretrain's --data")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--output", type=Path, default=Path("results/input-pipeline.json")
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    command = shlex.join(
        [
            "python",
            "benchmarks/input_pipeline.py",
            "--imagenet",
            options.imagenet.name,
            "--cifar",
            "hf:cifar10-train",
        ]
    )
    origin = provenance(command, device_name(torch.device("cpu")))

    with zipfile.ZipFile(options.imagenet) as archive:
        names = sorted(
            name
            for name in archive.namelist()
            if name.lower().endswith((".jpg", ".jpeg"))
        )
        files = [archive.read(name) for name in names[: options.pictures]]
    for work in WAYS.values():  # warm up
        work(files[0], 0)
    works = {
        name: (lambda work=work: [work(f, k) for k, f in enumerate(files)])
        for name, work in WAYS.items()
    }
    ways: dict[str, Any] = {
        name: {"rate": r}
        for name, r in pictures_a_second(works, len(files), options.rounds).items()
    }
    for name, work in WAYS.items():
        if work not in (package, decode_only):
            differences = [
                (work(f, k).float() - package(f, k).float()).abs()
                for k, f in enumerate(files[:50])
            ]
            ways[name]["mean_difference"] = float(
                torch.stack([d.mean() for d in differences]).mean()
            )
            ways[name]["largest_difference"] = float(
                torch.stack([d.max() for d in differences]).max()
            )
    pixels = [Image.open(io.BytesIO(f)).size for f in files]

    source = open_data(options.cifar).train
    items = [(0, i) for i in range(2000)]
    datasets = {
        name: TrainingPictures(source, (32, 32), 3, name, 0)
        for name in ("none", "crop_flip")
    }
    for dataset in datasets.values():
        dataset.__getitems__(items[:100])
    works = {
        name: (lambda dataset=dataset: dataset.__getitems__(items))
        for name, dataset in datasets.items()
    }
    small = pictures_a_second(works, len(items), options.rounds)

    content = {
        "imagenet": {
            "pictures": len(files),
            "mean_pixels": float(np.mean([w * h for w, h in pixels])),
            "mean_bytes": float(np.mean([len(f) for f in files])),
            "size": list(SIZE),
            "ways": ways,
        },
        "cifar10": small,
        "unit": "pictures a second of processor time, one thread",
        **origin,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, content)
    for name, way in ways.items():
        print(
            f"{name:40}{way['rate']['median']:9.0f} a second   "
            f"{way.get('mean_difference', 0.0):.2f} of 255"
        )
    for name, way in small.items():
        print(f"32 pixels, {name:29}{way['median']:9.0f} a second")


if __name__ == "__main__":
    main()
