"""The live figures in headless Chromium, from the disk and without a network: they
compute what the package computes, obey the keyboard, and leave their still where no
script runs.

Without Chromium these tests skip.
"""

import math
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from crate_core.live.figure import FIGURES, live_html
from crate_core.live.parts import Choice, Control, LiveFigure, Slider

pytestmark = [pytest.mark.repository]

FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
]
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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium; no browser is downloaded."""
    executable = shutil.which("chromium") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the test extra")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield chromium
        chromium.close()


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


def test_scripts_and_python_name_the_same_files() -> None:
    folder = Path(__file__).resolve().parents[2] / "crate_core" / "live"
    named = {figure.script for figure in FIGURES.values()} | {"helper.js"}
    assert {path.name for path in folder.glob("*.js")} == named
    for figure in FIGURES.values():
        text = (folder / figure.script).read_text(encoding="utf8")
        assert re.search(rf'L\.define\("{figure.name}"', text)
        # a chapter's cache sees a script change only if its path stands in the source
        module = (folder / figure.script).with_suffix(".py")
        assert f"crate_core/live/{figure.script}" in module.read_text(encoding="utf8")


def test_an_unknown_figure_is_refused() -> None:
    with pytest.raises(ValueError, match="there are"):
        live_html("denoise")
