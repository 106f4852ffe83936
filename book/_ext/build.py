"""Build the book: `python book/_ext/build.py [options of jupyter-book build]`, what
`make book` runs.

Chapters whose outputs are not cached run first, several at a time (execute.py); Sphinx
then finds all of them in the cache. Warnings are errors (-W), missing references are
warnings (-n), and all of them are shown before the build stops (--keep-going). A failed
build forgets what Sphinx has read, though not what the cells put out: Sphinx does not
repeat a warning about a page that it does not read again, so a second try would
otherwise pass.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from execute import execute_book

ROOT = Path(__file__).resolve().parents[2]


def build(root: Path = ROOT, extra: tuple[str, ...] = ()) -> int:
    """Build the book at `root` into `root/_build/html`; the exit status is 0 only
    without a warning.
    """
    # it has no __main__; Python looks for garbage after every 700 objects, which takes
    # most of the time in which Sphinx loads a hundred pages of some hundred thousand
    start = (
        "import gc, sys; gc.set_threshold(200_000, 10, 10); "
        "from jupyter_book.cli.main import main; sys.exit(main())"
    )
    command = [
        sys.executable,
        "-c",
        start,
        "build",
        str(root),
        "-q",  # what Sphinx does, page by page, is nobody's news; warnings are shown
        "-W",
        "-n",
        "--keep-going",
        *extra,
    ]
    # Most matrices in cells are small: a second thread gains little, and the other core
    # runs another chapter.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    all_ran = execute_book(root)
    print("All chapters have run; writing the pages.", flush=True)
    # Warnings and errors come on stderr; what Jupyter Book says when it is done, we do.
    status = subprocess.run(
        command, cwd=root, stdout=subprocess.DEVNULL, check=False
    ).returncode
    if status == 0 and not all_ran:
        # it failed once and ran through in Sphinx: outputs that depend on chance
        status = 1
    if status != 0:
        (root / "_build" / ".doctrees" / "environment.pickle").unlink(missing_ok=True)
    return status


def main() -> int:
    """Build, and say where the site is and how long it took."""
    start = time.monotonic()
    print(
        "Building the book: cells that have not run since the last change run now.",
        flush=True,
    )
    status = build(extra=tuple(sys.argv[1:]))
    seconds = time.monotonic() - start
    if status == 0:
        print(
            f"The book is built ({seconds:.0f} s). Open "
            f"{ROOT / '_build' / 'html' / 'index.html'}"
        )
    else:
        print(
            f"The book does not build ({seconds:.0f} s): the warnings above "
            "say why; the tracebacks of cells "
            f"are in {ROOT / '_build' / 'html' / 'reports'}",
            file=sys.stderr,
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
