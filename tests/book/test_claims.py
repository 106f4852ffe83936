"""A claim holds for what was measured and for nothing that it says it refuses."""

import html
import json
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from crate_core import claims
from crate_core.claims import CLAIM_KINDS, as_words, check_claim, claim, plain


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """What a chapter would display, as mime bundles."""
    bundles: list[dict[str, str]] = []
    monkeypatch.setattr(
        claims, "show", lambda thing: bundles.append(thing._repr_mimebundle_())
    )
    return bundles


def state(label: str = "clm-test", kind: str = "numerical", **check: Any) -> None:
    claim(
        label,
        "$a < b$ and `c`",
        conditions="always",
        kind=kind,
        evidence="looked",
        **check,
    )


@given(
    measured=st.floats(allow_nan=False),
    others=st.lists(st.floats(allow_nan=False), min_size=1),
    bound=st.floats(allow_nan=False),
)
def test_passes_exactly_when_measured_holds_and_every_alternative_fails(
    measured: float, others: list[float], bound: float
) -> None:
    refuses = {f"number {index}": value for index, value in enumerate(others)}
    right = measured < bound and not any(value < bound for value in others)
    if right:
        check_claim("clm-test", measured, lambda x: x < bound, refuses)
    else:
        with pytest.raises(AssertionError, match="clm-test"):
            check_claim("clm-test", measured, lambda x: x < bound, refuses)


def test_says_which_alternative_was_not_refused() -> None:
    with pytest.raises(AssertionError, match=r"does not refuse 'the same' \(0.5\)"):
        check_claim("clm-t", 0.4, lambda x: x < 1, {"other": 2.0, "the same": 0.5})


MEASURED = {"slope": torch.tensor(2.0), "last": np.float64(1e-9)}
PARTS = {
    "order": lambda m: abs(m["slope"] - 2) < 0.1,
    "small": lambda m: m["last"] < 1e-6,
}


def test_each_part_needs_an_alternative_that_it_alone_refuses() -> None:
    euler, coarse = {"slope": 1.0}, {"last": 1e-3}
    check_claim("clm-t", MEASURED, PARTS, {"Euler": euler, "coarse": coarse})
    with pytest.raises(AssertionError, match="the part 'small' alone"):
        check_claim("clm-t", MEASURED, PARTS, {"a": euler, "both": euler | coarse})
    with pytest.raises(AssertionError, match="in its part 'small', does not hold"):
        check_claim("clm-t", MEASURED | coarse, PARTS, {"Euler": euler})


def test_alternatives_of_a_mapping_replace_some_of_it() -> None:
    def near(m: dict[str, float]) -> bool:
        assert set(m) == {"slope", "last"}
        return all(part(m) for part in PARTS.values())

    check_claim("clm-t", MEASURED, near, {"Euler": {"slope": 1.0}})
    with pytest.raises(ValueError, match=r"replaces \['order'\].*'last', 'slope'"):
        check_claim("clm-t", MEASURED, near, {"Euler": {"order": 1.0}})
    with pytest.raises(ValueError, match="'Euler' must be a mapping"):
        check_claim("clm-t", MEASURED, near, {"Euler": 1.0})


@pytest.mark.parametrize(
    "nothing",
    [
        float("nan"),
        torch.tensor([1.0, float("nan")]),
        np.array([float("nan")]),
        [1.0, float("nan")],
    ],
)
def test_an_alternative_that_is_no_number_shows_nothing(nothing: Any) -> None:
    with pytest.raises(ValueError, match="'broken' holds a NaN"):
        check_claim("clm-t", 1.0, lambda x: x == 1.0, {"broken": nothing})


def test_what_goes_wrong_in_a_predicate_names_the_claim() -> None:
    with pytest.raises(ValueError, match=r"clm-t on 'measured'.*KeyError") as caught:
        check_claim("clm-t", {"a": 1}, lambda m: m["b"] > 0, {"zero": {"a": 0}})
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(ValueError, match=r"true or false, got 0\.5"):
        check_claim("clm-t", 0.5, lambda x: x, {"zero": 0})
    with pytest.raises(ValueError, match="must answer true or false"):
        check_claim("clm-t", torch.zeros(2), lambda x: x == 0, {"one": torch.ones(2)})


def test_a_claim_refuses_something() -> None:
    with pytest.raises(ValueError, match="at least one alternative"):
        check_claim("clm-t", 0.4, lambda x: x < 1, {})


def test_claim_is_shown_only_when_it_holds(shown: list[dict[str, str]]) -> None:
    state(measured=0.5, holds=lambda x: x < 1, refuses={"$x$ doubled": 2.0})
    code = shown[0]["text/html"]
    assert 'id="clm-test"' in code
    assert r"<dd>\(x\) doubled (2)</dd>" in code
    with pytest.raises(AssertionError, match="clm-test"):
        state(measured=2.0, holds=lambda x: x < 1, refuses={"doubled": 4.0})
    assert len(shown) == 1


def test_box_carries_what_the_ledger_reads(shown: list[dict[str, str]]) -> None:
    state(
        measured=[0.5, 1],
        holds=lambda x: max(x) < 2,
        refuses={'the "other"': [3, 4], "b": [5]},
        recorded="results/rates.json",
        minor=True,
    )
    (data,) = re.findall(r'data-claim="([^"]*)"', shown[0]["text/html"])
    assert json.loads(html.unescape(data)) == {
        "alternatives": ['the "other"', "b"],
        "recorded": "results/rates.json",
        "minor": True,
    }
    assert "refuses: the" in shown[0]["text/plain"]
    with pytest.raises(ValueError, match=r"recorded must be results/"):
        state(
            measured=1,
            holds=lambda x: x == 1,
            refuses={"zero": 0},
            recorded="rates.json",
        )


@pytest.mark.parametrize("kind", CLAIM_KINDS)
def test_every_kind_needs_a_check_except_what_was_not_reproduced(
    kind: str, shown: list[dict[str, str]]
) -> None:
    check = {"measured": 1, "holds": lambda x: x == 1, "refuses": {"zero": 0}}
    if kind == "not reproduced":
        state(kind=kind)
        with pytest.raises(ValueError, match="has no check"):
            state(kind=kind, **check)
    else:
        state(kind=kind, **check)
        with pytest.raises(ValueError, match="needs its check"):
            state(kind=kind)
    assert f"claim-{kind.replace(' ', '-')}" in shown[0]["text/html"]


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of"):
        state(kind="obvious")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("check", "said"),
    [
        ({"measured": 1.0, "holds": True}, "must be a predicate"),
        ({"holds": True}, "must be a predicate"),
        (
            {"holds": lambda x: x == 1, "refuses": {"zero": 0}},
            "measured=... is missing",
        ),
        ({"measured": 1, "holds": lambda x: x == 1}, "at least one alternative"),
    ],
)
def test_half_a_check_is_refused(check: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        state(**check)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.tensor(0.123456), "0.123"),
        (np.int64(3), "3"),
        (True, "true"),
        ({"a": torch.tensor(1), "b": [0.5, 2]}, "a 1, b 0.5, 2"),
        (torch.zeros(3), ""),
        (list(range(7)), ""),
        (None, ""),
    ],
)
def test_values_are_shown_short(value: Any, words: str) -> None:
    assert as_words(plain(value)) == words
