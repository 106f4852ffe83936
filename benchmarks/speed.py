r"""Training step and inference of CRATE-MAE, side by side with other code, at equal
outputs.

    OMP_NUM_THREADS=2 python benchmarks/speed.py --sizes small base --authors
    PATH/TO/CRATE OMP_NUM_THREADS=2 python benchmarks/speed.py --sizes base --modes
    inference --batch 1 OMP_NUM_THREADS=1 python benchmarks/speed.py --sizes base
    --clock cpu python benchmarks/speed.py --device cuda --sizes base --batch 512
    --precisions bf16 --compile

Contenders take turns within each round, so that a ratio compares neighbours in time;
reported are the median over rounds of each contender's time and of its ratio to the
first one.  Before that, all contenders that compute the same function get the same
weights, images and mask, and their predictions are compared.  In the same process the
speed of a large matrix product and of a copy are measured: the ceilings.

``--authors`` is a clone of the published code (its ``model/crate_ae``),
``--transformers`` a folder with the transformers package, if it is not installed.  Each
record is added to the output under its own name, with its own provenance. ``--clock
cpu`` counts processor time of one thread, which other programs on the machine disturb
less than seconds.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from plain import PlainCrateMAE, plain_attend, plain_ista
from torch import Tensor, nn

from crate_core.model.attention import attend
from crate_core.model.cost import operations
from crate_core.model.crate import CrateMAE
from crate_core.model.fold import fold
from crate_core.model.sparsify import ista
from crate_core.records import device_name, provenance, write_json

MASK_RATIO = 0.75
MODES = ["training", "inference", "ablation"]
PARTS = {
    "products": (
        "aten::mm",
        "aten::addmm",
        "mkldnn_convolution",
        "aten::convolution_backward",
    ),
    "attention": ("scaled_dot_product", "aten::bmm", "softmax"),
    "norms": ("layer_norm",),
    "optimizer": (
        "adam",
        "Optimizer",
        "aten::_foreach",
        "aten::addcdiv",
        "aten::addcmul",
        "aten::lerp",
    ),
}
"""Parts of a step by what the names of their kernels contain; the rest is element-wise
work and moving numbers.
"""
Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Images and mask noise to (loss, predictions)."""


def authors_model(path: Path, size: str, noise_seed: int) -> tuple[nn.Module, Forward]:
    """The published model, whose mask is fixed by seeding the generator that it draws
    from.
    """
    sys.path.insert(0, str(path))
    import importlib

    module = importlib.import_module("model.crate_ae.crate_ae")
    model = getattr(module, f"mae_crate_{size}")()

    def forward(images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(noise_seed)  # the noise was drawn from the same seed
        loss, predictions, _ = model(images, MASK_RATIO)
        return loss, predictions

    return model, forward


def own(model: nn.Module) -> Forward:
    """A model of this package."""

    def forward(images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        out = model(images, MASK_RATIO, noise)
        return out.loss, out.logits

    return forward


def plain(model: CrateMAE, **steps: Any) -> tuple[nn.Module, Forward]:
    """The plain transcription on a copy of the weights, some of its steps replaced."""
    copied = PlainCrateMAE(copy_of(model), **steps)
    return copied, lambda images, noise: copied(images, MASK_RATIO, noise)


def copy_of(model: CrateMAE) -> CrateMAE:
    """Another model with the same weights, on the same device."""
    made = CrateMAE(model.config).to(model.class_token.device)
    made.load_state_dict(model.state_dict())
    return made


def transformers_model(
    path: Path | None, device: torch.device
) -> tuple[nn.Module, Forward]:
    """ViT-MAE base as transformers has it: it encodes visible tokens only, and is
    another function.
    """
    if path is not None:
        sys.path.insert(0, str(path))
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    model = ViTMAEForPreTraining(ViTMAEConfig()).to(device)

    def forward(images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        out = model(images, noise=noise)
        return out.loss, out.logits

    return model, forward


def optimizer_of(model: nn.Module, fused: bool) -> torch.optim.Optimizer:
    """AdamW with a rate that changes nothing measurable; as it comes for others, in one
    kernel for ours.
    """
    return torch.optim.AdamW(
        (p for p in model.parameters() if p.requires_grad), lr=1e-8, fused=fused or None
    )


@contextmanager
def no_hidden_synchronisation(device: torch.device) -> Iterator[None]:
    """On a GPU, an operation that waits for the device raises."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


class Stopwatch:
    """Seconds of one call: of the wall, of this process's processor time, or between
    two events on a GPU.
    """

    def __init__(self, clock: str, device: torch.device) -> None:
        self.device = device
        self.now = time.process_time if clock == "cpu" else time.perf_counter

    def __call__(self, call: Callable[[], Any]) -> float:
        if self.device.type == "cuda":
            start, end = (
                torch.cuda.Event(enable_timing=True),
                torch.cuda.Event(enable_timing=True),
            )
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3
        begin = self.now()
        call()
        return self.now() - begin


def ceilings(
    watch: Stopwatch, dtype: torch.dtype, repeats: int = 5
) -> dict[str, float]:
    """Operations a second of a large matrix product and bytes a second of a large copy:
    the best of some tries.
    """
    side = 8192 if watch.device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=watch.device, dtype=dtype) for _ in range(2))
    source = torch.randn(
        2**28 if watch.device.type == "cuda" else 2**25, device=watch.device
    )
    target = torch.empty_like(source)
    product = min(watch(lambda: a @ b) for _ in range(repeats))
    copied = min(watch(lambda: target.copy_(source)) for _ in range(repeats))
    return {
        "operations_per_second": 2 * side**3 / product,
        "bytes_per_second": 2 * source.nbytes / copied,
    }


def contenders(
    size: str, mode: str, options: argparse.Namespace, device: torch.device
) -> dict[str, tuple[nn.Module, Forward, bool]]:
    """Name -> (model, forward, fused optimizer); the first is what ratios refer to."""
    given: dict[str, tuple[nn.Module, Forward, bool]] = {}
    if options.authors is not None:
        published, forward = authors_model(options.authors, size, options.seed)
        base = CrateMAE.from_reference(published.state_dict()).to(device)
        given["authors"] = (published.to(device), forward, False)
    else:
        torch.manual_seed(options.seed)
        base = CrateMAE.from_preset(size).to(device)
    given["plain"] = (*plain(base), False)
    ours = copy_of(base)
    if mode == "ablation":  # one change at a time, and all of them
        for name, steps, fused in (
            ("ISTA", {"ista": ista}, False),
            ("attention", {"attend": attend}, False),
            ("AdamW", {"ista": plain_ista, "attend": plain_attend}, True),
            ("ISTA and attention", {"ista": ista, "attend": attend}, False),
        ):
            given[f"plain, fused {name}"] = (*plain(base, **steps), fused)
    given["ours"] = (ours, own(ours), True)
    if mode == "inference":
        folded = fold(base)
        given["ours, folded"] = (folded, own(folded), True)
    if options.visible_only:
        visible = CrateMAE.from_preset(size, encode_visible_only=True).to(device)
        given["ours, visible tokens only"] = (visible, own(visible), True)
    if options.compile:
        for name in [
            name for name in ("authors", "ours", "ours, folded") if name in given
        ]:
            model, forward, fused = given[name]
            kind: dict[str, Any] = {"fullgraph": True}
            # theirs draws its mask inside, which is to stay the mask of the others
            if name == "authors":
                kind = {"options": {"fallback_random": True}}
            elif name == "ours, folded" and device.type == "cpu":
                # constant weights may be laid out anew
                kind["options"] = {"freezing": True}
            given[f"{name}, compiled"] = (model, torch.compile(forward, **kind), fused)
    if options.transformers is not False and size == "base":
        try:
            given["transformers ViT-MAE"] = (
                *transformers_model(options.transformers, device),
                False,
            )
        except ModuleNotFoundError as error:
            print(f"without transformers' ViT-MAE: {error}")
    return given


def shares_of_time(call: Callable[[], Any]) -> dict[str, float]:
    """Share of a call's time on a CPU in each of ``PARTS``, from PyTorch's profiler,
    and in the rest.
    """
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU]
    ) as profiled:
        call()
    seconds = dict.fromkeys([*PARTS, "rest"], 0.0)
    for event in profiled.key_averages():
        part = next(
            (
                part
                for part, names in PARTS.items()
                if any(name in event.key for name in names)
            ),
            "rest",
        )
        seconds[part] += event.self_cpu_time_total
    return {
        part: round(value / sum(seconds.values()), 4) for part, value in seconds.items()
    }


SAME_FUNCTION = ("authors", "plain", "ours")


def worst_difference(predictions: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each contender's predictions from the first one's, relative
    to its largest prediction.
    """
    first = next(iter(predictions.values()))
    return {
        name: float((p - first).abs().max() / first.abs().max())
        for name, p in predictions.items()
    }


def measure(
    size: str, mode: str, precision: str, options: argparse.Namespace
) -> dict[str, Any]:
    """One record: times, ratios, differences and ceilings of one size, mode and
    precision.
    """
    device = torch.device(options.device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    watch = Stopwatch(options.clock, device)
    entries = contenders(size, mode, options, device)
    images = torch.randn(
        options.batch, 3, 224, 224, generator=torch.Generator().manual_seed(1)
    ).to(device)
    torch.manual_seed(options.seed)
    noise = torch.rand(options.batch, 196, device=device)

    def autocast() -> Any:
        return (
            torch.autocast(device.type, torch.bfloat16)
            if precision == "bf16"
            else nullcontext()
        )

    def inference(forward: Forward) -> Tensor:
        with torch.inference_mode(), autocast():
            return forward(images, noise)[1]

    def trainer(model: nn.Module, forward: Forward, fused: bool) -> Callable[[], None]:
        optimizer = optimizer_of(model, fused)

        def step() -> None:
            optimizer.zero_grad()
            with autocast():
                loss = forward(images, noise)[0]
            loss.backward()
            optimizer.step()

        return step

    predictions = {
        name: inference(forward).float().cpu()
        for name, (_, forward, _) in entries.items()
        if name.startswith(SAME_FUNCTION) and "visible" not in name
    }
    differences = worst_difference(predictions)
    limit = 0.1 if precision == "bf16" else 1e-4
    wrong = {name: value for name, value in differences.items() if not value < limit}
    if wrong:
        raise SystemExit(f"outputs differ, nothing is measured: {wrong}")

    calls: dict[str, Callable[[], Any]] = {}
    memory: dict[str, int] = {}
    for name, (model, forward, fused) in entries.items():
        calls[name] = (
            (lambda forward=forward: inference(forward))
            if mode == "inference"
            else trainer(model, forward, fused)
        )
        calls[name]()
        calls[name]()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            calls[name]()
            torch.cuda.synchronize()
            memory[name] = torch.cuda.max_memory_allocated()
            with no_hidden_synchronisation(device):
                if name.startswith("ours"):
                    calls[name]()

    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.repeats):
        for name, call in calls.items():
            seconds[name].append(watch(call))
    first = next(iter(seconds))
    ceiling = ceilings(watch, dtype)
    record: dict[str, Any] = {
        "size": size,
        "mode": mode,
        "precision": precision,
        "batch": options.batch,
        "clock": "events" if device.type == "cuda" else options.clock,
        "repeats": options.repeats,
        "malloc": {
            name: value
            for name, value in os.environ.items()
            if name.startswith("MALLOC_")
        },
        "ceilings": ceiling,
        "relative_difference": differences,
        "contenders": {},
        "provenance": provenance(command(options), device_name(device)),
    }
    config = CrateMAE.config_class.preset(size)
    for name, times in seconds.items():
        median = statistics.median(times)
        entry: dict[str, Any] = {
            "seconds": median,
            "seconds_of_each_round": [round(value, 5) for value in times],
            "images_per_second": options.batch / median,
            "speedup": statistics.median(
                a / b for a, b in zip(seconds[first], times, strict=True)
            ),
        }
        if (
            name.startswith(SAME_FUNCTION)
            and "visible" not in name
            and not name.startswith("plain, fused")
        ):
            cost = operations(config, options.batch, fused=name.startswith("ours"))
            count = sum(cost.forward.values()) if mode == "inference" else cost.total
            if "folded" in name:  # M is computed once, when the model is folded
                count -= cost.forward["M of ISTA"]
            entry["operations"] = count
            entry["share_of_ceiling"] = (
                count / median / ceiling["operations_per_second"]
            )
        if device.type == "cpu" and "compiled" not in name and mode != "ablation":
            entry["shares_of_time"] = shares_of_time(calls[name])
        if name in memory:
            entry["peak_bytes"] = memory[name]
        record["contenders"][name] = entry
    return record


def command(options: argparse.Namespace) -> str:
    """The command line with names in the place of this machine's paths."""
    paths = {
        str(options.authors): "PATH/TO/CRATE",
        str(options.transformers): "PATH",
        str(options.output): "OUTPUT",
    }
    return shlex.join(
        [
            "python",
            "benchmarks/speed.py",
            *(paths.get(word, word) for word in sys.argv[1:]),
        ]
    )


def table(record: dict[str, Any]) -> str:
    """A record in lines."""
    head = (
        f"{record['size']}, {record['mode']}, {record['precision']}, batch "
        f"{record['batch']}, clock {record['clock']}"
    )
    lines = [
        f"{head}; ceiling "
        f"{record['ceilings']['operations_per_second'] / 1e9:.0f} GFLOP/s"
    ]
    for name, entry in record["contenders"].items():
        share = (
            f"{entry['share_of_ceiling']:6.1%} of the ceiling"
            if "share_of_ceiling" in entry
            else ""
        )
        memory = (
            f"  {entry['peak_bytes'] / 2**30:.2f} GiB" if "peak_bytes" in entry else ""
        )
        lines.append(
            f"  {name:32s} {entry['seconds']:8.4f} s "
            f"{entry['images_per_second']:8.1f} images/s "
            f"{entry['speedup']:6.2f}x {share}{memory}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small", "base"])
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=["training", "inference", "ablation"],
        default=["training", "inference"],
    )
    parser.add_argument(
        "--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32"]
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--authors", type=Path, help="a clone of the published code")
    parser.add_argument(
        "--transformers",
        type=Path,
        nargs="?",
        default=False,
        const=None,
        help="folder of the package",
    )
    parser.add_argument("--visible-only", action="store_true")
    parser.add_argument(
        "--compile", action="store_true", help="compiled contenders too"
    )
    parser.add_argument("--suffix", default="", help="added to the records' names")
    parser.add_argument("--output", type=Path, default=Path("results/speed.json"))
    options = parser.parse_args()
    if options.clock == "cpu" and torch.get_num_threads() != 1:
        parser.error(
            "--clock cpu needs OMP_NUM_THREADS=1: threads that wait for each "
            "other count as work"
        )
    for size in options.sizes:
        for mode in options.modes:
            for precision in options.precisions:
                record = measure(size, mode, precision, options)
                print(table(record), flush=True)
                known = (
                    json.loads(options.output.read_text())
                    if options.output.is_file()
                    else {}
                )
                name = (
                    f"{options.device} {size} {mode} {precision} batch "
                    f"{options.batch} {record['clock']}"
                )
                write_json(options.output, {**known, name + options.suffix: record})


if __name__ == "__main__":
    main()
