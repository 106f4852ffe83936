"""The table of rules says what the code does."""

import re

import numpy as np
import pytest
from PIL import Image

from crate_core.data.parts import hidden, part_of
from crate_core.data.pictures import DarkPictureWarning, as_shown, image_extensions
from crate_core.data.rules import rules, rules_table
from crate_core.data.sources import ImageSource
from crate_core.training.recipe import PretrainConfig

RULES = rules()


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def test_words_of_parts() -> None:
    said = dict(
        re.findall(r"(train|validation|test): ((?:`\w+`(?:, )?)+)", RULES["parts"])
    )
    assert set(said) == {"train", "validation", "test"}
    for part, words in said.items():
        for word in quoted(words):
            for name in (word, word.upper(), f"x-{word}-00001", f"{word}2017"):
                assert part_of([name]) == part


def test_endings_and_what_systems_leave_behind() -> None:
    named = quoted(RULES["files"])
    endings = [name for name in named if name in image_extensions()]
    assert {".jpg", ".png"} < set(endings)
    assert f" {len(image_extensions())} endings" in RULES["files"]
    assert all(hidden(name) for name in named[len(endings) :])
    assert len(named) > len(endings)


@pytest.mark.parametrize("step", [0, 1])
def test_where_sixteen_bits_are_called_dark(step: int) -> None:
    class One(ImageSource):
        def __len__(self) -> int:
            return 1

        def name(self, index: int) -> str:
            return "it"

        def decode(self, index: int) -> Image.Image:
            return as_shown(Image.fromarray(np.full((2, 2), dark + step, np.uint16)))

    white, dark = (
        int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\d", RULES["16-bit grey"])
    )
    assert (
        np.asarray(as_shown(Image.fromarray(np.full((2, 2), white, np.uint16)))).min()
        == 255
    )
    if step:
        One().read(0)
    else:
        with pytest.warns(DarkPictureWarning, match="it: "):
            One().read(0)


def test_the_limit_is_pretrainings_own() -> None:
    (share,) = re.findall(r"(\d+)% of a part", RULES["what cannot be read"])
    assert PretrainConfig.from_preset("digits").max_unreadable == int(share) / 100


def test_the_table_has_a_row_for_each_rule() -> None:
    rows = rules_table().splitlines()
    assert len(rows) == len(RULES) + 2
    assert all(row.count("|") == 3 for row in rows)
