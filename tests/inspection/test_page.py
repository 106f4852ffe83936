"""``crate inspect``: the page has every section, is well formed, and asks for nothing
outside itself.
"""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from crate_core.cli import main
from crate_core.inspection.layers import inspect_layers, inspect_weights
from crate_core.inspection.page import (
    inspect_checkpoint,
    inspection_report,
    shipped_pictures,
)
from crate_core.inspection.sections import (
    SHOWN,
    falls,
    layer_sections,
    picture_sections,
    readout_sections,
)
from crate_core.model.build import fresh_model, load_model
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
    """Headings, pictures, links and the text of a page; raises when tags
    do not nest.
    """

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


# -- another device


class NoDouble(torch.Tensor):
    """Tensors that refuse float64 until they are on the CPU, as Apple's MPS does; so
    does all that follows from them.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = super().__torch_function__(func, types, args, kwargs)
        if func is torch.Tensor.cpu or (
            func is torch.Tensor.to and "cpu" in (*args, *(kwargs or {}).values())
        ):
            return found.as_subclass(torch.Tensor)
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, cls) and tensor.dtype == torch.float64:
                raise TypeError("the MPS framework doesn't support float64")
        return found


@pytest.mark.parametrize("config", [DIGITS, VIT], ids=["crate", "vit"])
def test_no_float64_where_the_device_has_none(config: FrameConfig) -> None:
    with pytest.raises(TypeError, match="float64"):
        torch.ones(2).as_subclass(NoDouble).double()
    model = fresh_model(config, 0)
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            own = weight.data.as_subclass(NoDouble)
            module._parameters[name] = torch.nn.Parameter(own, requires_grad=False)
    images = shipped_pictures(config, 6)
    assert isinstance(model(images, 0.5).loss, NoDouble)
    assert "Coding rates" in inspection_report(model, images, "x", seeds=[0])


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


def test_function_takes_a_path_or_a_model_and_gives_the_same_page(
    checkpoint: Path,
) -> None:
    said: list[str] = []
    from_path = inspect_checkpoint(checkpoint, "mine", count=3, seeds=1)
    from_model = inspect_checkpoint(
        load_model(checkpoint), "mine", count=3, seeds=1, report=said.append
    )
    pages = [Page(text) for text in (from_path, from_model)]
    assert pages[0].headings == pages[1].headings
    assert set(pages[0].headings) < set(SECTIONS)
    assert said == ["pictures: 3, scikit-learn's digits, held out"]
    assert "inspect_checkpoint" in pages[0].words, "the record names the function"
    # all but the time of day
    texts = [re.sub(r"\d{4}-\d\d-\d\dT[\d:.+]+", "", page.words) for page in pages]
    assert texts[0] == texts[1]
    other = Page(inspect_checkpoint(fresh_model(DIGITS, 1), "mine", count=3, seeds=1))
    assert re.sub(r"\d{4}-\d\d-\d\dT[\d:.+]+", "", other.words) != texts[0]


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


# -- what is drawn


SEEDS = (0, 1)
CURVES = {
    "Coding rates": [
        lambda r: r.layers.attended.total,
        lambda r: r.layers.attended.orthonormal,
        lambda r: r.layers.compressed.orthonormal - r.layers.tokens.orthonormal,
        lambda r: r.layers.directions,
    ],
    "Sparsity": [
        lambda r: r.between.nonzeros,
        lambda r: r.between.hoyer,
        lambda r: r.between.gini,
    ],
    "Effective rank of the tokens": [
        lambda r: r.between.participation,
        lambda r: r.between.entropy,
        lambda r: r.between.normed_participation,
    ],
    "The attention step against the gradient": [
        lambda r: r.layers.steps.gradient,
        lambda r: r.layers.steps.beyond,
        lambda r: r.layers.steps.residual,
        lambda r: r.layers.steps.random,
    ],
}


@pytest.fixture(scope="module")
def healthy() -> SimpleNamespace:
    """A model that differs from its controls in every measure, and what is drawn of
    them.
    """
    model = fresh_model(DIGITS, 5)
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    pictures = shipped_pictures(DIGITS, 8)
    controls = [fresh_model(DIGITS, seed) for seed in SEEDS]
    found, *others = (inspect_layers(one, pictures) for one in (model, *controls))
    weights, *of_controls = (inspect_weights(one) for one in (model, *controls))
    sections = layer_sections(found, others, weights, of_controls)
    sections += readout_sections(model, controls, pictures)
    sections += picture_sections(model, controls[0], pictures)
    return SimpleNamespace(
        found=found,
        others=others,
        weights=weights,
        of_controls=of_controls,
        sections={section.title: section for section in sections},
    )


def drawn(ax: Axes, label: str) -> np.ndarray:
    """The heights of the one line of a panel that has this label (an errorbar keeps its
    label on its container).
    """
    bars = {bar.get_label(): bar.lines[0] for bar in ax.containers}
    lines = {line.get_label(): line for line in ax.get_lines()}
    return np.asarray({**lines, **bars}[label].get_ydata())


@pytest.mark.parametrize("title", CURVES)
def test_curves_show_the_measures_of_their_own_network(
    healthy: SimpleNamespace, title: str
) -> None:
    axes = healthy.sections[title].figure.axes
    for ax, measure in zip(axes, CURVES[title], strict=True):
        own = measure(healthy.found).mean(axis=0)
        control = np.mean([measure(r).mean(axis=0) for r in healthy.others], axis=0)
        assert not np.allclose(own, control, rtol=1e-3)
        np.testing.assert_allclose(drawn(ax, "this model"), own)
        np.testing.assert_allclose(drawn(ax, "untrained"), control)
        (band,) = ax.collections[:1]
        heights = band.get_paths()[0].vertices[:, 1]
        ranges = [measure(r).mean(axis=0) for r in healthy.others]
        assert heights.min() == pytest.approx(np.min(ranges))
        assert heights.max() == pytest.approx(np.max(ranges))
    assert axes[0].get_legend() is not None


def test_weights_are_drawn_for_their_own_network(healthy: SimpleNamespace) -> None:
    names = (
        "coherence_max",
        "basis_defect",
        "written_cosine",
        "dictionary_norm",
        "dictionary_defect",
    )
    axes = healthy.sections["Subspaces and dictionaries"].figure.axes
    for ax, name in zip(axes, names, strict=True):
        own = getattr(healthy.weights, name)
        control = np.mean([getattr(w, name) for w in healthy.of_controls], axis=0)
        assert not np.allclose(own, control, rtol=1e-3)
        np.testing.assert_allclose(drawn(ax, "this model"), own)
        np.testing.assert_allclose(drawn(ax, "untrained"), control)


def test_inversion_shows_the_pairs_of_each_network(healthy: SimpleNamespace) -> None:
    own, control = healthy.found.inversion, healthy.others[0].inversion
    axes = healthy.sections["Does the decoder invert the encoder?"].figure.axes
    pairs = (own.centred, control.centred, own.paths, control.paths)
    for ax, matrix in zip(axes, pairs, strict=True):
        shown = np.asarray(ax.get_images()[0].get_array())
        np.testing.assert_allclose(shown, matrix.mean(axis=0))
        written = [float(text.get_text()) for text in ax.texts]
        np.testing.assert_allclose(written, matrix.mean(axis=0).ravel(), atol=0.005)
    assert not np.allclose(own.centred, control.centred, atol=0.01)


def test_numbers_of_a_healthy_model_are_finite_and_those_measured(
    healthy: SimpleNamespace,
) -> None:
    rows = {
        (title, name): values
        for title, section in healthy.sections.items()
        for name, values in section.rows
    }
    assert len(rows) > 15
    for key, values in rows.items():
        assert np.isfinite(values).all(), key
    np.testing.assert_array_equal(
        rows["Coding rates", "R^c, random subspaces"],
        healthy.found.layers.random_rate.mean(axis=0),
    )
    np.testing.assert_array_equal(
        rows["The attention step against the gradient", "shrink"],
        healthy.found.layers.steps.shrink.mean(axis=0),
    )
    assert (
        f"{healthy.found.between.nonzeros.mean(axis=0)[-1]:.0%} of the entries"
        in healthy.sections["Sparsity"].found
    )


def test_what_is_read_of_removed_patches_is_drawn(healthy: SimpleNamespace) -> None:
    (ax,) = healthy.sections["What the layers bring to removed patches"].figure.axes
    model, untrained = drawn(ax, "this model"), drawn(ax, "untrained")
    assert len(model) == len(untrained) == DIGITS.depth + 1
    assert not np.allclose(model, untrained)


def test_pictures_are_drawn(healthy: SimpleNamespace) -> None:
    for title in ("Where the heads look", "Principal components of the tokens"):
        shown = [
            np.asarray(image.get_array())
            for ax in healthy.sections[title].figure.axes
            for image in ax.get_images()
        ]
        assert len(shown) >= 3 * SHOWN
        assert all(np.isfinite(image).all() for image in shown)
        assert all(np.ptp(image) > 0 for image in shown)
