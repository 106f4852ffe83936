r"""What each page of the built site weighs in a browser:
``python benchmarks/pages.py [--site _build/html]``.

For each page, opened from the disk in headless Chromium at 1,400 and at 390 pixels:
kilobytes of the page and of what it loads before anyone scrolls, milliseconds of the
renderer's main thread until it is quiet, layout shift (the sum of Chromium's entries),
height, and what axe finds.  Prints a table and writes ``results/pages.json``.
"""

import argparse
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, sync_playwright

from crate_core.records import provenance, write_json

ROOT = Path(__file__).resolve().parents[1]
WIDTHS = {"wide": 1400, "narrow": 390}
SHIFT = """() => new Promise(done => {
  let sum = 0;
  new PerformanceObserver(list => {
    for (const entry of list.getEntries())
      if (!entry.hadRecentInput) sum += entry.value;
  }).observe({type: "layout-shift", buffered: true});
  setTimeout(() => done(sum), 200);
})"""


def pages() -> list[str]:
    """The pages of the table of contents."""
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf8"))
    parts = [
        chapter["file"] for part in contents["parts"] for chapter in part["chapters"]
    ]
    return [contents["root"], *parts]


def measured(browser: Browser, file: Path, width: int) -> dict[str, Any]:
    """One page, loaded once in a new context."""
    context = browser.new_context(
        viewport={"width": width, "height": 900}, offline=True
    )
    page = context.new_page()
    loaded: set[str] = set()
    page.on("request", lambda request: loaded.add(request.url))
    session = context.new_cdp_session(page)
    session.send("Performance.enable")
    page.goto(file.as_uri(), wait_until="load")
    page.wait_for_timeout(500)
    metrics = session.send("Performance.getMetrics")["metrics"]
    seconds = {entry["name"]: entry["value"] for entry in metrics}["TaskDuration"]
    shift = page.evaluate(SHIFT)
    height = page.evaluate("document.documentElement.scrollHeight")
    found = Axe().run(page).response["violations"]
    context.close()
    paths = [unquote(urlsplit(url).path) for url in loaded if url.startswith("file:")]
    files = {Path(path) for path in paths}
    return {
        "kilobytes": sum(f.stat().st_size for f in files if f.is_file()) / 1000,
        "cpu_ms": 1000 * seconds,
        "layout_shift": shift,
        "height": height,
        "axe": {violation["id"]: len(violation["nodes"]) for violation in found},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--site", type=Path, default=ROOT / "_build" / "html")
    parser.add_argument("--output", type=Path, default=Path("results/pages.json"))
    options = parser.parse_args()
    record: dict[str, Any] = {"pages": {}}
    print(f"{'page':24}{'kB':>7}{'CPU ms':>14}{'shift':>12}{'height':>16}  axe")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        for name in pages():
            file = (options.site / f"{name}.html").resolve()
            at = {
                side: measured(browser, file, width) for side, width in WIDTHS.items()
            }
            record["pages"][name] = at
            wide, narrow = at["wide"], at["narrow"]
            print(
                f"{Path(name).stem:24}{wide['kilobytes']:7.0f}"
                f"{wide['cpu_ms']:8.0f}{narrow['cpu_ms']:6.0f}"
                f"{wide['layout_shift']:7.3f}{narrow['layout_shift']:6.3f}"
                f"{wide['height']:8}{narrow['height']:8}  "
                f"{json.dumps(wide['axe'] | narrow['axe'])}",
                flush=True,
            )
        browser.close()
    command = shlex.join(["python", "benchmarks/pages.py", *sys.argv[1:]])
    record["provenance"] = provenance(command, "cpu")
    write_json(options.output, record)


if __name__ == "__main__":
    main()
