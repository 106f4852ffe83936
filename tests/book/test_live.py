"""The live figures in headless Chromium, from the disk and without a network: they
compute what the package computes, obey the keyboard, and leave their still where no
script runs.

Without Chromium these tests skip.
"""

import importlib
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

from crate_core.live.figure import FIGURES, live_html
from crate_core.live.model import network
from crate_core.live.parts import Choice, Control, LiveFigure, Slider

pytestmark = [pytest.mark.repository]
ROOT = Path(__file__).resolve().parents[2]

NAMES = sorted(FIGURES)
SETTINGS = 6
"""States of the controls at which page and package are compared, for each figure."""

CLOSE = {"model": 1e-4}
"""Relative difference allowed, where it is not the 1e-6 of double precision."""

MOVED: dict[str, list[dict[str, Any]]] = {
    "denoise-compress": [
        {"space": "plane", "tokens": 5, "moved": {"0": [1.5, -0.4], "3": [0.2, 0.9]}},
        {"space": "many", "tokens": 7, "moved": {"6": [0.3, 0.8]}},
    ],
    "model": [
        {"hidden": [i % 3 % 2 for i in range(64)], "patch": 5, "trained": False},
        {"hidden": [0] * 64, "patch": 0, "head": "3", "layer": "2"},
        {"hidden": [int(i > 20) for i in range(64)], "picture": "flower"},
    ],
    "ista": [{"start": [-0.2, 0.5]}, {"start": [1.9, 1.7], "eta": 2.5}],
}
"""States that only the plot itself can set: what was dragged."""


def some_value(control: Control, chance: random.Random) -> Any:
    """A value that the reader can set."""
    if isinstance(control, Slider):
        part = chance.randint(0, control.steps) / control.steps
        value = control.low + (control.high - control.low) * part
        if control.log:
            value = control.low * (control.high / control.low) ** part
        return round(value) if control.whole else value
    if isinstance(control, Choice):
        return chance.choice(control.options)[0]
    return chance.random() < 0.5


def states(figure: LiveFigure) -> list[dict[str, Any]]:
    """The first state, what was dragged, and random states of the controls."""
    chance = random.Random(figure.name)
    some = [
        {control.name: some_value(control, chance) for control in figure.controls}
        for _ in range(SETTINGS)
    ]
    return [
        figure.state | change for change in [{}, *MOVED.get(figure.name, []), *some]
    ]


def differences(ours: Any, pages: Any, close: float, where: str = "") -> list[str]:
    """Where two nested results differ by more than ``close``, relative to the largest
    entry of the list that an entry stands in.
    """
    if isinstance(ours, dict):
        if set(ours) != set(pages):
            return [f"{where}: names {sorted(set(ours) ^ set(pages))}"]
        return [
            text
            for name, value in ours.items()
            for text in differences(value, pages[name], close, f"{where}.{name}")
        ]
    if isinstance(ours, list) and ours and isinstance(ours[0], dict | list):
        if len(ours) != len(pages):
            return [f"{where}: {len(ours)} and {len(pages)} entries"]
        return [
            text
            for index, (one, other) in enumerate(zip(ours, pages, strict=True))
            for text in differences(one, other, close, f"{where}[{index}]")
        ]
    if isinstance(ours, list):
        if len(ours) != len(pages):
            return [f"{where}: {len(ours)} and {len(pages)} entries"]
        size = max([abs(value) for value in ours if math.isfinite(value)], default=0.0)
        return [
            f"{where}[{index}]: {one} and {other}"
            for index, (one, other) in enumerate(zip(ours, pages, strict=True))
            if one != other and not abs(one - other) <= close * max(size, 1e-12)
        ]
    if isinstance(ours, str | bool | None):
        return [] if ours == pages else [f"{where}: {ours} and {pages}"]
    return (
        []
        if math.isclose(ours, pages, rel_tol=close, abs_tol=1e-12)
        else [f"{where}: {ours} and {pages}"]
    )


DRAWN = ["attention", "denoise_compress", "flow", "layer"]


@pytest.mark.parametrize("name", DRAWN)
def test_drawn_tokens_do_not_depend_on_the_page(name: str) -> None:
    """Chapters set other default types; one figure stands in two chapters."""
    inputs = importlib.import_module(f"crate_core.live.{name}").inputs.__wrapped__
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        in_double = inputs()
        torch.set_default_dtype(torch.float32)
        assert inputs() == in_double
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one page for each figure, and a page that has them all."""
    folder = tmp_path_factory.mktemp("live")
    head = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>t</title>'
        '<meta name="viewport" content="width=device-width">'
        '<body style="font-family: sans-serif">'
    )
    pieces = {name: live_html(name) for name in NAMES}
    for name, piece in pieces.items():
        (folder / f"{name}.html").write_text(f"{head}<main>{piece}</main>", "utf8")
    return folder


class Tab:
    """One page in the browser, and what went wrong there."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.trouble: list[str] = []
        self.context = browser.new_context(offline=True, **options)
        self.page = self.context.new_page()
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on(
            "console",
            lambda said: (
                self.trouble.append(said.text) if said.type == "error" else None
            ),
        )
        self.page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith(("file:", "data:", "blob:"))
                else self.trouble.append(request.url[:200])
            ),
        )
        self.page.goto(path.as_uri())

    def __enter__(self) -> "Tab":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


@pytest.mark.parametrize("name", NAMES)
def test_the_page_computes_what_the_package_computes(
    browser: Any, written: Path, name: str
) -> None:
    figure = FIGURES[name]
    with Tab(browser, written / f"{name}.html") as tab:
        tab.page.wait_for_selector(f"[data-live-figure={name}].live-on")
        for state in states(figure):
            pages = tab.page.evaluate(
                "([name, state]) => crateLive.numbers(name, state)", [name, state]
            )
            found = differences(figure.numbers(state), pages, CLOSE.get(name, 1e-6))
            assert not found, (state, found[:5])
        assert tab.trouble == []


@pytest.mark.parametrize("name", NAMES)
def test_the_controls_obey_the_keyboard(browser: Any, written: Path, name: str) -> None:
    figure = FIGURES[name]
    with Tab(browser, written / f"{name}.html") as tab:
        tab.page.wait_for_selector(f"[data-live-figure={name}].live-on")
        for control in figure.controls:
            field = tab.page.locator(f"#live-{name}-{control.name}")
            label = tab.page.locator(f"label[for=live-{name}-{control.name}]")
            assert label.inner_text().strip()
            read = "name => crateLive.view(name).state"
            before = tab.page.evaluate(read, name)[control.name]
            field.focus()
            if isinstance(control, Slider):
                key = "ArrowLeft" if control.value == control.high else "ArrowRight"
                tab.page.keyboard.press(key)
                assert field.get_attribute("aria-valuetext")
            elif isinstance(control, Choice):
                last = control.options[-1][0] == control.value
                tab.page.keyboard.press("ArrowUp" if last else "ArrowDown")
            else:
                tab.page.keyboard.press("Space")
            assert tab.page.evaluate(read, name)[control.name] != before, control.name
        tab.page.get_by_role("button", name="Reset").click()
        assert tab.page.evaluate(read, name) == figure.state
        assert tab.trouble == []


@pytest.mark.parametrize("width", [342, 780])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_wider_than_the_column(
    browser: Any, written: Path, name: str, width: int
) -> None:
    viewport = {"width": width + 16, "height": 900}
    with Tab(browser, written / f"{name}.html", viewport=viewport) as tab:
        tab.page.wait_for_selector(f"[data-live-figure={name}].live-on")
        wide = tab.page.evaluate(
            """() => Array.from(document.querySelectorAll(
                "main :is(svg, text, label, output, input, button, select, p, canvas)"))
              .filter(e => !e.closest("[clip-path]"))
              .filter(e => e.getBoundingClientRect().right > innerWidth + 1
                || e.getBoundingClientRect().left < -1)
              .map(e => e.outerHTML.slice(0, 120))"""
        )
        assert wide == []
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width + 16


@pytest.mark.parametrize("name", NAMES)
def test_without_scripts_the_still_stays(
    browser: Any, written: Path, name: str
) -> None:
    with Tab(browser, written / f"{name}.html", java_script_enabled=False) as tab:
        still = tab.page.locator(f"[data-live-figure={name}] .live-still img")
        assert still.is_visible()
        box = still.bounding_box()
        assert box["width"] > 200
        assert box["height"] > 100
        assert (still.get_attribute("alt") or "").strip() == FIGURES[name].alt
        assert tab.trouble == []


def test_drag_and_arrow_keys_move_a_token(browser: Any, written: Path) -> None:
    name = "denoise-compress"
    with Tab(browser, written / f"{name}.html") as tab:
        tab.page.wait_for_selector(f"[data-live-figure={name}].live-on")
        moved = "() => crateLive.view('denoise-compress').state.moved"
        assert tab.page.evaluate(moved) == {}
        tab.page.locator("svg.live-plot").focus()
        tab.page.keyboard.press("PageDown")
        tab.page.wait_for_timeout(50)
        tab.page.keyboard.press("ArrowUp")
        assert set(tab.page.evaluate(moved)) == {"1"}
        token = tab.page.locator("svg.live-plot circle[style*=grab]").first
        box = token.bounding_box()
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        tab.page.mouse.move(x, y)
        tab.page.mouse.down()
        tab.page.mouse.move(x + 40, y + 30)
        tab.page.mouse.up()
        assert set(tab.page.evaluate(moved)) == {"0", "1"}
        assert tab.trouble == []


def test_patches_hide_by_click_by_space_and_by_ratio(
    browser: Any, written: Path
) -> None:
    with Tab(browser, written / "model.html") as tab:
        tab.page.wait_for_selector("[data-live-figure=model].live-on")
        read = "() => crateLive.view('model').state"
        first = tab.page.evaluate(read)["hidden"]
        plot = tab.page.locator("svg.live-plot")
        box = plot.locator("image").first.bounding_box()
        side = box["width"] / 8
        # the third patch of the second row
        tab.page.mouse.click(box["x"] + 2.5 * side, box["y"] + 1.5 * side)
        state = tab.page.evaluate(read)
        changed = [i for i in range(64) if state["hidden"][i] != first[i]]
        assert changed == [10]
        assert state["patch"] == 10
        assert state["ratio"] == sum(state["hidden"]) / 64
        plot.focus()
        tab.page.keyboard.press("ArrowRight")
        tab.page.keyboard.press("Space")
        state = tab.page.evaluate(read)
        assert state["patch"] == 11
        assert state["hidden"][11] != first[11]
        tab.page.locator("#live-model-ratio").focus()
        tab.page.keyboard.press("End")
        assert sum(tab.page.evaluate(read)["hidden"]) == 60
        once = tab.page.evaluate(read)["hidden"]
        tab.page.get_by_role("button", name="Hide other patches").click()
        again = tab.page.evaluate(read)["hidden"]
        assert sum(again) == 60
        assert again != once
        assert tab.trouble == []


def test_the_readers_own_picture_is_completed_and_stays(
    browser: Any, written: Path, tmp_path: Path
) -> None:
    # halves of two colours, wider than high: the middle square is taken
    picture = np.zeros((64, 96, 3), dtype=np.uint8)
    picture[:, :48] = (200, 40, 40)
    picture[:, 48:] = (40, 40, 200)
    Image.fromarray(picture).save(tmp_path / "own.png")
    with Tab(browser, written / "model.html") as tab:
        tab.page.wait_for_selector("[data-live-figure=model].live-on")
        tab.page.locator("#live-model-own").set_input_files(tmp_path / "own.png")
        tab.page.wait_for_function("crateLive.view('model').state.picture === 'own'")
        found = tab.page.evaluate(
            "() => crateLive.numbers('model', crateLive.view('model').state)"
        )
        model = network(True)
        middle = torch.from_numpy(picture[::2, 16:80:2]).permute(2, 0, 1)[None]
        images = model.standardize(middle)
        hidden = 0.9 * torch.tensor([FIGURES["model"].state["hidden"]])
        with torch.no_grad():
            ours = model(images, 0.75, hidden.float()).logits[0].tolist()
        # the browser may have averaged at the edge between the colours: most patches
        wrong = differences(ours, found["predicted"], 0.05)
        assert len(wrong) < 0.1 * 64 * 48
        assert tab.trouble == []


def test_motion_runs_only_when_it_is_wanted(browser: Any, written: Path) -> None:
    play = "button.live-play"
    read = "() => crateLive.view('flow').state.time"
    with Tab(browser, written / "flow.html") as tab:
        tab.page.wait_for_selector("[data-live-figure=flow].live-on")
        before = tab.page.evaluate(read)
        tab.page.wait_for_timeout(200)
        assert tab.page.evaluate(read) == before
        tab.page.locator(play).click()
        tab.page.wait_for_function(f"({read})() > {before}")
        tab.page.locator(play).click()
        assert tab.page.locator(play).inner_text() == "Play"
    with Tab(browser, written / "flow.html", reduced_motion="reduce") as tab:
        tab.page.wait_for_selector("[data-live-figure=flow].live-on")
        assert tab.page.locator(play).count() == 0
        assert tab.page.locator("#live-flow-time").count() == 1


def test_paper_gets_the_still(browser: Any, written: Path) -> None:
    with Tab(browser, written / "window.html") as tab:
        tab.page.wait_for_selector("[data-live-figure=window].live-on")
        assert not tab.page.locator(".live-still img").is_visible()
        tab.page.emulate_media(media="print")
        assert tab.page.locator(".live-still img").is_visible()
        assert not tab.page.locator(".live-stage").is_visible()


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of what `make lab` starts, in a copy of the chapters (Jupyter saves
    them), with one more notebook that shows a live figure.
    """
    if find_spec("jupyterlab") is None:
        pytest.skip("JupyterLab is not installed: pip install -e '.[book]'")
    if shutil.which("make") is None:
        pytest.skip("no make here")
    folder = tmp_path_factory.mktemp("lab")
    for name in ("book", "results"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("Makefile", "jupytext.toml"):
        shutil.copy(ROOT / name, folder / name)
    cell = nbformat.v4.new_code_cell(
        "from crate_core.live.figure import live_figure\nlive_figure('window')"
    )
    last = nbformat.v4.new_code_cell("1 + 1")
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(
        cells=[cell, last], metadata={"kernelspec": kernel}
    )
    nbformat.write(notebook, folder / "live.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"--no-browser --ServerApp.token=t --port={port} --port-retries=0"
    server = subprocess.Popen(
        ["make", "lab", f"VENV={sys.prefix}", f"LAB_ARGS={options}"],
        cwd=folder,
        # the reader's own settings of Jupyter stay out
        env=os.environ | {"PYTHONPATH": str(ROOT), "JUPYTER_CONFIG_DIR": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(240):
            assert server.poll() is None, "JupyterLab did not start"
            try:
                urllib.request.urlopen(f"{address}/api/status?token=t", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        else:
            pytest.fail("JupyterLab did not answer within two minutes")
        yield f"{address}/lab/tree/{{}}?token=t"
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # make, and what it started
        server.wait(30)


@contextmanager
def kernel_answers(page: Any) -> Iterator[None]:
    """Waits until the kernel of the notebook that the body opens has answered.

    JupyterLab says "idle" also while there is no kernel yet, and what is run then is
    dropped without a word.
    """
    answers: list[str] = []

    def listen(channel: Any) -> None:
        if "/channels" in channel.url:
            channel.on("framereceived", lambda _: answers.append(channel.url))

    page.on("websocket", listen)
    yield
    for _ in range(1200):
        if answers:
            return
        page.wait_for_timeout(100)
    pytest.fail("the kernel did not answer within two minutes")


def test_in_jupyterlab_arrow_keys_move_the_slider_and_not_the_cell(
    browser: Any, jupyter: str
) -> None:
    context = browser.new_context(viewport={"width": 1200, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(120_000)
    with kernel_answers(page):
        page.goto(jupyter.format("live.ipynb"))
    page.locator(".jp-Notebook .jp-CodeCell").first.click()
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("[data-live-figure=window].live-on")
    slider = page.locator("#live-window-noise")
    slider.focus()
    read = "() => crateLive.view('window').state.noise"
    before = page.evaluate(read)
    selected = (
        "() => [...document.querySelectorAll('.jp-Cell')].findIndex(c => "
        "c.matches('.jp-mod-active'))"
    )
    cell = page.evaluate(selected)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowUp")
    assert page.evaluate(read) > before
    assert page.evaluate(selected) == cell
    page.locator("[data-live-figure=window] svg.live-plot").focus()
    tokens = page.evaluate("() => crateLive.view('window').state.tokens")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("() => crateLive.view('window').state.tokens") > tokens
    assert page.evaluate(selected) == cell
    context.close()


def test_a_chapter_opens_by_a_click_and_runs(browser: Any, jupyter: str) -> None:
    context = browser.new_context(viewport={"width": 1300, "height": 900})
    page = context.new_page()
    page.set_default_timeout(120_000)
    page.goto(jupyter.format("book") + "&reset")  # no notebook of another test
    with kernel_answers(page):
        page.locator(".jp-DirListing-item", has_text="notation.md").dblclick()
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.locator(".lm-MenuBar-item", has_text="Run").click()
    page.get_by_text("Run All Cells", exact=True).click()
    prompts = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]"
    page.wait_for_function(
        f"() => {prompts}.length > 2 && "
        f"{prompts}.every(e => /\\d/.test(e.textContent))",
        timeout=240_000,
    )
    assert page.locator("[data-mime-type='application/vnd.jupyter.error']").count() == 0
    context.close()


def test_scripts_and_python_name_the_same_files() -> None:
    folder = ROOT / "crate_core" / "live"
    named = {figure.script for figure in FIGURES.values()} | {"helper.js"}
    assert {path.name for path in folder.glob("*.js")} == named
    shared = (folder / "figure.py").read_text(encoding="utf8")
    assert "crate_core/live/helper.js" in shared
    assert "crate_core/live/live.css" in shared
    for figure in FIGURES.values():
        text = (folder / figure.script).read_text(encoding="utf8")
        assert re.search(rf'L\.define\("{figure.name}"', text)
        # a chapter's cache sees a script change only if its path stands in the source
        module = (folder / figure.script).with_suffix(".py")
        assert f"crate_core/live/{figure.script}" in module.read_text(encoding="utf8")


def test_an_unknown_figure_is_refused() -> None:
    with pytest.raises(ValueError, match="there are"):
        live_html("denoise")
