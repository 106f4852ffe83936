r"""The ``crate`` command and its subcommands, from pretraining to converted weights.

What a subcommand needs is imported when it runs.  Bad input ends in one line on stderr
and exit code 2, a run that failed on its way in exit code 1; neither shows a traceback.

Book: :ref:`ch-first-training`.
"""

import contextlib
import io
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from crate_core.options import (
    Convert,
    Data,
    Evaluate,
    Inspect,
    Prepare,
    Preset,
    Probe,
    Reconstruct,
)

Command = TypeVar("Command")

SPIN_COUNT = "1000"
"""Rounds that a thread of the GNU OpenMP library waits for others before it sleeps."""

MOST_PICTURES = 64
"""Pictures in one figure of reconstructions: more take minutes to draw."""

USAGE = """usage: crate COMMAND [OPTIONS]

CRATE-MAE: white-box masked autoencoding.

commands:
  pretrain      train on digits, a folder, a torchvision or Hugging Face dataset; go on
                with a run that was cut off
  finetune      train an encoder whole, with labels; go on with a run that was cut off
  data          what is understood of data, with a sheet of its pictures
  prepare       a resized copy of a large data set (raw ImageNet), in shards or folders
  probe         linear probe and neighbours at any size, on features computed once
  evaluate      probes, neighbours, fine-tuning beside their controls; reconstruction by
                masking ratio
  reconstruct   a picture of masked inputs, reconstructions and originals
  inspect       what layers, tokens and heads do, beside an untrained control: one page
  convert       the authors' mae_crate_* checkpoint to this package's files

crate COMMAND --help lists a command's options.

  crate pretrain --preset digits --output-dir runs/digits
  crate evaluate --checkpoint runs/digits
"""


class UsageError(ValueError):
    """Arguments that do not parse."""


def parse(
    kind: type[Command],
    name: str,
    arguments: Sequence[str],
    default: Command | None = None,
    positional: bool = False,
) -> Command:
    """Arguments as an instance of a dataclass, through tyro; required ones by position
    if ``positional``.

    Raises ``UsageError`` in one line where tyro prints a box, ``SystemExit(0)`` after
    ``--help``.
    """
    import tyro

    options: dict[str, Any] = {} if default is None else {"default": default}
    with usage_errors():
        return tyro.cli(
            kind,
            prog=f"crate {name}",
            args=list(arguments),
            # A default says which of several dataclasses a field holds: no subcommand
            # for it.
            config=(
                tyro.conf.AvoidSubcommands,
                *((tyro.conf.PositionalRequiredArgs,) if positional else ()),
            ),
            **options,
        )


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """``UsageError`` in one line where tyro prints a box and leaves."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            yield
    except SystemExit as end:
        if not end.code:
            raise
        raise UsageError(box_text(box.getvalue())) from None


def box_text(box: str) -> str:
    """The first paragraph in a box that tyro drew, as one line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", box)
    body = [line.strip("│ ") for line in text.splitlines() if line.startswith("│")]
    paragraph = body[
        : next((i for i, line in enumerate(body) if set(line) <= {"─"}), len(body))
    ]
    return " ".join(paragraph) or " ".join(text.split())


def parse_run(
    kind: Callable[[str], Command], name: str, arguments: Sequence[str]
) -> Command:
    """The configuration of a run, whose preset says the other options' defaults."""
    import tyro

    # The preset comes first; tyro's overridable configurations would make it a
    # subcommand instead of an option.
    with usage_errors():
        given, _ = tyro.cli(
            Preset, args=list(arguments), return_unknown_args=True, add_help=False
        )
    default = kind(given.preset)
    return parse(type(default), name, arguments, default)


def run_pretrain(arguments: Sequence[str], command: str) -> None:
    """``crate pretrain``."""
    from crate_core.training.recipe import PretrainConfig

    config = parse_run(PretrainConfig, "pretrain", arguments)
    from crate_core.training.pretrain import pretrain

    pretrain(config, command=command)


def run_finetune(arguments: Sequence[str], command: str) -> None:
    """``crate finetune``."""
    from crate_core.evaluation.finetune_recipe import FinetuneConfig

    config = parse_run(FinetuneConfig, "finetune", arguments)
    from crate_core.evaluation.finetune import finetune_seeds

    finetune_seeds(config, command=command)


def run_data(arguments: Sequence[str], command: str) -> None:
    """``crate data``."""
    del command  # nothing is recorded
    options = parse(Data, "data", arguments, positional=True)
    for name in ("count", "image_size"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')}: at least 1 is needed")
    if options.streaming and (options.check or not options.source.startswith("hf:")):
        raise UsageError(
            "--streaming: accepted with hf:NAME-OR-PARQUET-PATH, without --check"
        )
    from crate_core.data.named import open_data
    from crate_core.data.streamed import stream_data
    from crate_core.data.understood import (
        class_counts,
        contact_sheet,
        readable,
        understood,
    )
    from crate_core.records import atomic_write, check_writable

    if options.output is not None:
        check_writable(Path(options.output))
    data = (
        stream_data(options.source.removeprefix("hf:"))
        if options.streaming
        else open_data(options.source, options.data_root)
    )
    print("\n".join([*understood(data), *class_counts(data)]))
    size = (options.image_size, options.image_size)
    if options.check:
        found = readable(data, size, options.channels, 1.0)
        names = [name for part in found.unreadable.values() for name in part]
        print("\n".join([f"unreadable: {name}" for name in names] or ["all are read"]))
    if options.output is not None:
        sheet = contact_sheet(data, size, options.channels, options.count, print)
        atomic_write(Path(options.output), sheet)
        print(f"saved in {options.output}")


def run_prepare(arguments: Sequence[str], command: str) -> None:
    """``crate prepare``."""
    del command  # the copy records its settings
    options = parse(Prepare, "prepare", arguments, positional=True)
    from dataclasses import asdict

    from crate_core.data.prepare import PrepareConfig, prepare

    prepare(PrepareConfig(**asdict(options)))


def output_file(given: str | None, checkpoint: str, name: str) -> Path:
    """Where a command's result goes: where it says, or beside the checkpoint; checked
    before the work.
    """
    from crate_core.records import check_writable

    directory = Path(checkpoint) if Path(checkpoint).is_dir() else Path()
    path = directory / name if given is None else Path(given)
    check_writable(path)
    return path


def run_probe(arguments: Sequence[str], command: str) -> None:
    """``crate probe``."""
    options = parse(Probe, "probe", arguments)
    from crate_core.evaluation.linear_head import LinearHeadConfig
    from crate_core.evaluation.probing import probe_checkpoint
    from crate_core.records import write_json

    path = output_file(options.output, options.checkpoint, "probe.json")
    head = LinearHeadConfig(
        epochs=options.epochs,
        batch_size=options.head_batch_size,
        base_lrs=options.base_lrs,
        optimizer=options.optimizer,
    )
    record = probe_checkpoint(
        options.checkpoint,
        options.data,
        cache=options.cache,
        solver=options.solver,
        features=options.features,
        head=head,
        neighbours=options.neighbours,
        controls=options.controls,
        seeds=options.seeds,
        precision=options.precision,
        batch_size=options.batch_size,
        device=options.device,
        workers=options.workers,
        command=command,
        max_unreadable=options.max_unreadable,
        report=print,
    )
    if not record:  # a process beside the first
        return
    write_json(path, record)
    print(f"saved in {path}")


def run_evaluate(arguments: Sequence[str], command: str) -> None:
    """``crate evaluate``."""
    options = parse(Evaluate, "evaluate", arguments)
    from crate_core.evaluation.evaluate import (
        EVALUATION_FILE,
        evaluate,
        save_evaluation,
        table,
    )
    from crate_core.evaluation.finetune_recipe import FinetuneConfig

    if options.finetune is None and options.finetune_epochs is not None:
        raise UsageError("--finetune-epochs: accepted with --finetune PRESET")
    epochs = options.finetune_epochs
    path = output_file(options.output, options.checkpoint, EVALUATION_FILE)
    fine_tuning = (
        None
        if options.finetune is None
        else FinetuneConfig.from_preset(
            options.finetune,
            **({} if epochs is None else {"epochs": epochs}),
            seeds=options.finetune_seeds,
            device=options.device,
            workers=options.workers,
            max_unreadable=options.max_unreadable,
        )
    )
    record = evaluate(
        options.checkpoint,
        options.data,
        seeds=options.seeds,
        labels_per_class=options.labels_per_class,
        mask_ratios=options.mask_ratios,
        probe=options.probe,
        neighbours=options.neighbours,
        fine_tuning=fine_tuning,
        device=options.device,
        workers=options.workers,
        command=command,
        max_unreadable=options.max_unreadable,
        report=print,
    )
    save_evaluation(record, path)
    print("\n".join(table(record)))
    print(f"saved in {path}")


def run_reconstruct(arguments: Sequence[str], command: str) -> None:
    """``crate reconstruct``."""
    del command  # the picture has no place for it
    options = parse(Reconstruct, "reconstruct", arguments)
    if bool(options.images) == (options.data is not None):
        raise UsageError("give either --images FILE ... or --data")
    import math

    import torch

    from crate_core.data.batches import UnreadableCount
    from crate_core.data.named import open_data
    from crate_core.data.sources import FileImages, ImageSource
    from crate_core.data.understood import chosen_pictures, understood
    from crate_core.keys import evaluation_noise
    from crate_core.model.build import load_model
    from crate_core.records import check_writable
    from crate_core.training.yardsticks import save_reconstructions

    check_writable(Path(options.output))
    model = load_model(options.checkpoint)
    if not 1 <= options.count <= MOST_PICTURES:
        raise UsageError(
            f"--count {options.count}: 1 to {MOST_PICTURES} pictures are accepted"
        )
    source: ImageSource
    if options.data is None:
        missing = [name for name in options.images if not Path(name).is_file()]
        if missing:
            raise FileNotFoundError(f"there is no file {missing[0]}")
        source = FileImages([Path(name) for name in options.images])
        # of files that are named one by one any share may be damaged
        count, unreadable = len(source), UnreadableCount(len(source), 1.0, {}, "")
    else:
        data = open_data(options.data, labels=False)
        print("\n".join(understood(data)))
        source, count = data.held_out, options.count
        unreadable = UnreadableCount(
            len(source), options.max_unreadable, {}, "held-out"
        )
    shown = chosen_pictures(
        source,
        model.config.image_shape,
        model.config.channels,
        count,
        unreadable,
        print,
    )
    for row, (index, _) in enumerate(shown, start=1):
        print(f"row {row}: {source.name(index)}")
    pictures = torch.stack([picture for _, picture in shown])
    noise = evaluation_noise(options.seed, len(pictures), math.prod(model.config.grid))
    save_reconstructions(options.output, model, pictures, options.mask_ratio, noise)
    print(
        f"{len(pictures)} pictures with {options.mask_ratio:.0%} of the patches "
        f"removed, saved in {options.output}"
    )


def run_inspect(arguments: Sequence[str], command: str) -> None:
    """``crate inspect``."""
    options = parse(Inspect, "inspect", arguments)
    if options.images and options.data is not None:
        raise UsageError("give either --images FILE ... or --data, or neither")
    from crate_core.inspection.page import inspect_checkpoint, write_report
    from crate_core.model.build import load_model, pick_device
    from crate_core.records import check_writable

    check_writable(Path(options.output))
    page = inspect_checkpoint(
        load_model(options.checkpoint).to(pick_device(options.device)),
        name=Path(options.checkpoint).name or options.checkpoint,
        files=options.images,
        data=options.data,
        count=options.count,
        eps=options.eps,
        seeds=options.seeds,
        command=command,
        report=print,
        max_unreadable=options.max_unreadable,
    )
    write_report(options.output, page)
    print(f"saved in {options.output}, {len(page) / 1e6:.1f} MB")


def run_convert(arguments: Sequence[str], command: str) -> None:
    """``crate convert``."""
    del command  # the weights' origin is the authors' file
    options = parse(Convert, "convert", arguments, positional=True)
    from crate_core.model.crate import CrateMAE

    model = CrateMAE.from_reference(options.reference, heads=options.heads)
    model.save_pretrained(options.output_dir)
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{parameters:,} parameters saved in {options.output_dir}: config.json, "
        "model.safetensors"
    )


COMMANDS: dict[str, Callable[[Sequence[str], str], None]] = {
    "pretrain": run_pretrain,
    "finetune": run_finetune,
    "data": run_data,
    "prepare": run_prepare,
    "probe": run_probe,
    "evaluate": run_evaluate,
    "reconstruct": run_reconstruct,
    "inspect": run_inspect,
    "convert": run_convert,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed on its way, 2 bad
    input, 75 ended by a signal and to be started again, 130 interrupted.
    """
    # Before torch is loaded. Threads that wait for each other give up their core after
    # some thousand rounds: no slower alone, and other processes are not starved.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Bars of the datasets library are for terminals, too.
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # Names of files that a console cannot print are no reason to fail, and a log in a
    # file is read while it is written.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
    if not given:
        return fail(
            f"crate: give a command: {', '.join(COMMANDS)}; crate --help says more", 2
        )
    if given[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    name, rest = given[0], given[1:]
    if name not in COMMANDS:
        return fail(
            f"crate: unknown command {name!r}; accepted are {', '.join(COMMANDS)}", 2
        )
    try:
        COMMANDS[name](rest, shlex.join(["crate", *given]))
    except SystemExit as end:  # after --help
        return int(end.code or 0)
    except BrokenPipeError:  # who read our output has seen enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return fail(
            f"crate {name}: interrupted; the same command again continues where "
            "pretraining, fine-tuning or preparing was",
            130,
        )
    except ModuleNotFoundError as error:
        return fail(
            f"crate {name}: {error}; it comes with the extra: "
            "pip install 'crate-core[train]'",
            1,
        )
    except ArithmeticError as error:
        return fail(f"crate {name}: {error}", 1)
    except RuntimeError as error:
        if not hasattr(error, "exit_code"):  # a defect, which needs its traceback
            raise
        return fail(f"crate {name}: {error}", error.exit_code)
    except (ValueError, OSError) as error:
        # errors of a run that failed on its way say so; the others are of bad input
        return fail(f"crate {name}: error: {error}", getattr(error, "exit_code", 2))
    return 0


def fail(message: Any, code: int) -> int:
    """One line on stderr; returns the exit code."""
    print(" ".join(str(message).split()), file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
