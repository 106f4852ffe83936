"""Run the chapters whose outputs are not in the cache, several at a time, before Sphinx
reads them.

MyST-NB executes one page after the other. Here each page is read as MyST-NB reads it,
with the digest that `depcache` puts in its kernelspec, so that the cache finds under
its own key what was run here. What counts as an error is unchanged: a chapter that
fails is not cached, is reported here, and fails again when Sphinx reads it; a cell that
writes to stderr is found by MyST-NB in the cached outputs.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import yaml
from depcache import DATA_FOLDERS, is_notebook, page_digest, with_digest
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn, JupyterCacheAbstract
from jupyter_cache.executors.utils import single_nb_execution
from myst_nb.core.read import read_myst_markdown_notebook
from myst_parser.config.main import MdParserConfig
from nbformat import NotebookNode

MOST_WORKERS = 4


@dataclass(frozen=True)
class Executed:
    """A notebook with its outputs, or the traceback of what failed."""

    path: Path
    notebook: NotebookNode
    seconds: float
    error: str | None


def pages(root: Path) -> list[Path]:
    """The pages of the table of contents that have cells."""
    text = (root / "_toc.yml").read_text(encoding="utf8")
    toc = yaml.safe_load(text)
    names = [toc["root"]] + [
        chapter["file"] for part in toc.get("parts", []) for chapter in part["chapters"]
    ]
    names += [chapter["file"] for chapter in toc.get("chapters", [])]
    found = [root / f"{name}.md" for name in names]
    return [path for path in found if is_notebook(path.read_text(encoding="utf8"))]


def read_page(path: Path, root: Path, config: dict) -> NotebookNode:
    """The page as the notebook that MyST-NB makes of it in this book."""
    text = path.read_text(encoding="utf8")
    options = config["sphinx"]["config"]
    folders = options.get("depcache_data", DATA_FOLDERS)
    marked = with_digest(
        text, page_digest(text, root, options["depcache_packages"], folders)
    )
    return read_myst_markdown_notebook(
        marked, config=MdParserConfig(), add_source_map=True, path=path
    )


def to_log(log: Path) -> None:
    """Send what kernels say of themselves, on the process's own stderr, to a file.

    What a cell writes to stderr reaches its notebook by another way and still counts.
    """
    with log.open("a", encoding="utf8") as file:
        os.dup2(file.fileno(), 2)


def run_page(path: Path, notebook: NotebookNode, timeout: int) -> Executed:
    """Execute a notebook in its folder, as MyST-NB does."""
    done = single_nb_execution(
        notebook, cwd=str(path.parent), timeout=timeout, allow_errors=False
    )
    return Executed(path, notebook, done.time, done.exc_string)


def seconds_last_time(cache: JupyterCacheAbstract) -> dict[str, float]:
    """Path -> seconds, of pages that have run before, under whatever key."""
    return {
        r.uri: r.data.get("execution_seconds") or 0.0
        for r in cache.list_cache_records()
        if r.data
    }


def execute_pages(root: Path, paths: Iterable[Path], workers: int) -> list[Executed]:
    """Run the pages that the cache of the book at `root` does not hold; the failed ones
    are returned.
    """
    config = yaml.safe_load((root / "_config.yml").read_text(encoding="utf8"))
    cache = get_cache(root / "_build" / ".jupyter_cache")
    todo: dict[Path, tuple[NotebookNode, int]] = {}
    for path in paths:
        notebook = read_page(path, root, config)
        try:
            cache.match_cache_notebook(notebook)
        except KeyError:
            own = notebook.metadata.get("mystnb", {})
            todo[path] = (
                notebook,
                own.get("execution_timeout", config["execute"]["timeout"]),
            )
    last = seconds_last_time(cache)
    # The longest first, or it runs alone at the end; a page that has never run may be
    # one of those.
    order = sorted(todo, key=lambda path: -last.get(str(path), float("inf")))
    failed = []
    with ProcessPoolExecutor(
        max_workers=max(1, min(workers, len(order))),
        initializer=to_log,
        initargs=(root / "_build" / "kernels.log",),
    ) as pool:
        running = [pool.submit(run_page, path, *todo[path]) for path in order]
        for number, future in enumerate(as_completed(running), start=1):
            done = future.result()
            name = done.path.relative_to(root)
            if done.error is None:
                bundle = CacheBundleIn(
                    done.notebook,
                    str(done.path),
                    data={"execution_seconds": done.seconds},
                )
                cache.cache_notebook_bundle(
                    bundle, check_validity=False, overwrite=True
                )
                print(
                    f"[{number}/{len(order)}] {name} executed in {done.seconds:.0f} s",
                    flush=True,
                )
            else:
                failed.append(done)
                print(
                    f"[{number}/{len(order)}] {name} FAILED\n{done.error}", flush=True
                )
    return failed


def execute_book(root: Path) -> bool:
    """Run what has to run, on all cores up to `MOST_WORKERS`; whether every chapter ran
    through.
    """
    cores = (
        len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1
    )
    return not execute_pages(root, pages(root), min(cores, MOST_WORKERS))
