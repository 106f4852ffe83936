"""``crate inspect``: the page has every section, is well formed, and asks for nothing
outside itself.
"""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from crate_core.cli import main
from crate_core.inspection.page import inspection_report, shipped_pictures
from crate_core.inspection.sections import SHOWN, falls
from crate_core.model.build import fresh_model
from crate_core.model.config import CrateMAEConfig, FrameConfig, ViTMAEConfig

DIGITS = CrateMAEConfig.preset("digits", dim=16, depth=2, heads=2)
COLOUR = CrateMAEConfig.preset("cifar10-tiny", dim=16, depth=2, heads=2)
SHALLOW = CrateMAEConfig.preset(
    "digits", dim=16, depth=2, heads=2, decoder_depth=1, normalize_targets=True
)
VIT = ViTMAEConfig.preset(
    "cifar10-tiny", dim=16, depth=2, heads=2, decoder_dim=8, decoder_heads=2
)
SECTIONS = [
    "Coding rates",
    "Sparsity",
    "Subspaces and dictionaries",
    "Effective rank of the tokens",
    "The attention step against the gradient",
    "Does the decoder invert the encoder?",
    "What the layers bring to removed patches",
    "Where the heads look",
    "Principal components of the tokens",
    "Between two pictures",
]
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Headings, pictures, links and the text of a page; raises when tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.tags: set[str] = set()
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if "style" not in self.open:
            self.words += data


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("config", "count", "sections"),
    [
        (DIGITS, 8, SECTIONS),
        # one picture: nothing to fit on, nothing to blend
        (SHALLOW, 1, [*SECTIONS[:6], *SECTIONS[7:9]]),
        (
            VIT,
            4,
            [
                title
                for title in SECTIONS
                if "decoder" not in title and "removed" not in title
            ],
        ),
    ],
    ids=["digits", "shallow decoder, one picture", "vit"],
)
def test_page_has_its_sections_and_stands_alone(
    config: FrameConfig, count: int, sections: list[str]
) -> None:
    text = inspection_report(
        fresh_model(config, 5),
        shipped_pictures(config, count),
        "my <model>",
        seeds=(0,),
    )
    page = Page(text)
    assert page.headings == sections
    assert len(page.images) == len(sections) + 1
    assert not page.tags & {"script", "link", "iframe", "object", "base"}
    assert "Inside my <model>" in page.words
    assert (
        re.findall(
            r"(?i)(?:https?:)?//|@import|url\(",
            re.sub(r"data:image/png;base64,[\w+/=]+", "", text),
        )
        == []
    )
    assert "prefers" in text or "color-scheme: light dark" in text
    assert len(text) < 3_000_000
    for image in page.images:
        kind, _, code = (image["src"] or "").partition(",")
        assert kind == "data:image/png;base64"
        picture = Image.open(io.BytesIO(base64.b64decode(code)))
        picture.load()
        assert min(picture.size) > 50
        assert len(image["alt"] or "") > 20
    assert "nan" not in page.words.lower().split()


def test_a_control_is_needed() -> None:
    with pytest.raises(ValueError, match="at least one seed"):
        inspection_report(
            fresh_model(DIGITS, 5), shipped_pictures(DIGITS, 2), "none", seeds=()
        )


@pytest.mark.parametrize(
    "config",
    [DIGITS, COLOUR, CrateMAEConfig.preset("tiny")],
    ids=["digits", "32", "224"],
)
def test_shipped_pictures_fit_the_model(config: CrateMAEConfig) -> None:
    pictures = shipped_pictures(config, 2 * SHOWN)
    side = config.image_size
    assert pictures.shape == (12, config.channels, side, side)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    assert pictures.flatten(1).std(dim=1).max() > 0.1
    assert (
        len(
            {
                tuple(picture.flatten()[:: side * side // 16].tolist())
                for picture in pictures
            }
        )
        > 8
    )


def test_other_channels_have_no_shipped_pictures() -> None:
    with pytest.raises(ValueError, match="2 channels are at hand: give some"):
        shipped_pictures(
            CrateMAEConfig.preset(
                "digits", channels=2, pixel_mean=(0.5, 0.5), pixel_std=(1.0, 1.0)
            )
        )


def test_falls_counts_steps_of_the_means() -> None:
    assert (
        falls(np.array([[3.0, 2.0, 2.5], [3.0, 4.0, 2.5]]))
        == "falls in 1 of 2 steps from layer to layer"
    )


# -- the command


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    fresh_model(DIGITS, 0).save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_command_writes_the_page(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    for name in ("a.png", "b.png"):
        Image.fromarray((torch.rand(20, 30, 3) * 255).byte().numpy()).save(
            tmp_path / name
        )
    (tmp_path / "bad.png").write_bytes(b"no picture")
    options = [
        "inspect",
        "--checkpoint",
        str(checkpoint),
        "--seeds",
        "1",
        "--device",
        "cpu",
    ]
    assert (
        main(
            [*options, "--images", "a.png", "bad.png", "b.png", "--output", "mine.html"]
        )
        == 0
    )
    assert "saved in mine.html" in capsys.readouterr().out
    page = Page((tmp_path / "mine.html").read_text(encoding="utf8"))
    assert page.headings == [title for title in SECTIONS if "removed" not in title]
    assert "2 of 8 x 8 pixels, 1 channels" in page.words
    assert "1 of 3 could not be read" in page.words
    assert "--output mine.html" in page.words
    assert main([*options, "--count", "5"]) == 0
    page = Page((tmp_path / "report.html").read_text(encoding="utf8"))
    assert "5 of 8 x 8 pixels" in page.words
    assert "scikit-learn's digits, held out" in page.words


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--images", "none.png"], "there is no file none.png"),
        (["--images", "none.png", "--data", "digits"], "either --images"),
        (["--data", "nothing"], "accepted are digits"),
        (["--eps", "0"], "eps"),
        (["--count", "0"], "count=0"),
        (["--seeds", "0"], "seeds=0"),
        (["--output", "no/where.html", "--count", "1", "--seeds", "1"], "no/"),
    ],
)
def test_bad_input_is_one_line(
    checkpoint: Path, options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(["inspect", "--checkpoint", str(checkpoint), "--device", "cpu", *options])
        == 2
    )
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_pictures_that_cannot_be_read_are_an_error_when_there_is_no_other(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    assert (
        main(
            [
                "inspect",
                "--checkpoint",
                str(checkpoint),
                "--device",
                "cpu",
                "--images",
                "bad.png",
            ]
        )
        == 2
    )
    assert "none of 1 pictures can be read" in capsys.readouterr().err
