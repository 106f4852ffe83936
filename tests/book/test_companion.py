"""Sources, mathematics and players are shown as they are."""

import base64
import json
import re

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest
from matplotlib.figure import Figure

from crate_core import companion
from crate_core.claims import math_to_html
from crate_core.companion import (
    player,
    show_source,
    source_without_docstring,
)
from crate_core.theory.mixture import LowRankGaussianMixture
from crate_core.theory.rate import coding_rate


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """What a chapter would display, as mime bundles."""
    bundles: list[dict[str, str]] = []
    monkeypatch.setattr(
        companion, "display", lambda thing: bundles.append(thing._repr_mimebundle_())
    )
    return bundles


def test_mathematics_survives_escaping() -> None:
    assert math_to_html("$a<b$ & `x<y`") == r"\(a&lt;b\) &amp; <code>x&lt;y</code>"


def test_source_is_the_package_s_own_without_docstrings(
    shown: list[dict[str, str]],
) -> None:
    code = source_without_docstring(coding_rate)
    assert code.startswith("def coding_rate(")
    assert '"""' not in code
    assert "_half_log_det(" in code
    compile(source_without_docstring(LowRankGaussianMixture), "mixture", "exec")
    assert '"""' not in source_without_docstring(LowRankGaussianMixture)
    show_source(coding_rate)
    assert "crate_core/theory/rate.py" in shown[0]["text/html"]


def draw(index: int) -> Figure:
    figure, axes = plt.subplots(figsize=(2, 1))
    axes.plot([0, index])
    return figure


def test_player_carries_every_frame_and_no_outside_reference(
    shown: list[dict[str, str]],
) -> None:
    labels = [f"t = {index} </script>" for index in range(3)]
    player(draw, labels, alt="a line that rises", still=1)
    code = shown[0]["text/html"]
    (listed,) = re.findall(r"frames = (\[.*?\]), labels", code)
    frames = json.loads(listed)
    assert len(frames) == 3
    assert len(set(frames)) == 3
    assert all(
        base64.b64decode(frame.split(",")[1]).startswith(b"\x89PNG") for frame in frames
    )
    assert f'src="{frames[1]}"' in code
    assert "http" not in code
    assert code.count("</script>") == 1
    assert not plt.get_fignums()


def test_player_asks_for_a_description() -> None:
    with pytest.raises(ValueError, match="alt text"):
        player(draw, ["t = 0"], alt="")
