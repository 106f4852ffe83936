"""The drawing of the whole: its parts, and that its words fit their boxes."""

from xml.etree import ElementTree

import pytest

from crate_core.drawing import GROUPS, NARROW, PARTS, WIDE, formula, layer_drawing

CANVASES = {"wide": WIDE, "narrow": NARROW}
SVG = "{http://www.w3.org/2000/svg}"


def filled(svg: str) -> set[str]:
    """The names of the filled boxes of a drawing."""
    boxes = ElementTree.fromstring(svg).iter(f"{SVG}rect")
    return {box.get("data-part") for box in boxes if box.get("data-filled") is not None}


@pytest.mark.parametrize("canvas", CANVASES.values(), ids=CANVASES)
@pytest.mark.parametrize("name", [*PARTS, *GROUPS])
def test_the_named_part_is_filled_and_no_other(name: str, canvas) -> None:
    drawing = layer_drawing(name)
    assert filled(drawing.svg(canvas)) == set(GROUPS.get(name, (name,)))
    for part in GROUPS.get(name, (name,)):
        assert PARTS[part].heard in drawing.heard.split("Filled here:")[1]


def test_several_parts_or_none() -> None:
    assert filled(layer_drawing().svg()) == set()
    assert filled(layer_drawing(("rate", "layer")).svg()) == {
        "rate",
        "attention",
        "ista",
    }


def test_an_unknown_part_is_named_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match=r"no part 'softmax'.*attention.*whole"):
        layer_drawing("softmax")


def test_each_box_lies_on_its_canvas_and_on_no_other_box() -> None:
    for canvas in CANVASES.values():
        boxes = list(canvas.boxes.items())
        assert dict(boxes).keys() == PARTS.keys()
        for index, (name, (x, y, width, height)) in enumerate(boxes):
            assert x > 0
            assert y > 0
            assert x + width < canvas.width
            assert y + height < canvas.height
            for other, (x2, y2, width2, height2) in boxes[:index]:
                apart = (
                    x + width <= x2
                    or x2 + width2 <= x
                    or y + height <= y2
                    or y2 + height2 <= y
                )
                assert apart, (name, other)


def test_formulas_return_to_the_line_after_an_index() -> None:
    shifts = [
        float(piece.get("dy").removesuffix("em"))
        * float((piece.get("font-size") or "1em").removesuffix("em"))
        for piece in ElementTree.fromstring(f"<text>{formula('x_{k}^{2}+y')}</text>")
        if piece.get("dy")
    ]
    assert len(shifts) == 3
    assert sum(shifts) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("width", [780, 342])
def test_words_fit_their_boxes_in_a_browser(browser, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 800})
    html = layer_drawing("whole")._repr_mimebundle_()["text/html"]
    page.set_content(f"<body style='margin:0'>{html}</body>")
    shown = page.evaluate(
        """() => [...document.querySelectorAll("svg")]
             .filter((svg) => svg.getBoundingClientRect().width > 0)
             .map((svg) => [svg.getAttribute("class"),
               Math.min(...[...svg.querySelectorAll("text")].map((text) =>
                 parseFloat(text.getAttribute("font-size"))
                 * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width))])"""
    )
    assert [name for name, _ in shown] == [
        "drawing-wide" if width > 600 else "drawing-narrow"
    ]
    assert shown[0][1] >= 11.9  # pixels: 9 points
    spilled = page.evaluate(
        """() => [...document.querySelectorAll("rect[data-part]")].flatMap((box) => {
             const b = box.getBoundingClientRect(), found = [];
             let text = box.nextElementSibling;
             for (; text && text.tagName === "text"; text = text.nextElementSibling) {
               const t = text.getBoundingClientRect();
               if (t.left < b.left || t.right > b.right || t.top < b.top - 1
                   || t.bottom > b.bottom + 1) found.push(text.textContent);
             }
             return found;
           })"""
    )
    page.close()
    assert spilled == []
