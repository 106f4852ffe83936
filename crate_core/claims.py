r"""Claims of the book: a sentence, a check that can fail, and the box that shows both.

Needs nothing but Python until a claim is shown (IPython).  Book: :ref:`ch-ledger`.
"""

import html
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

CLAIM_KINDS = (
    "proved",
    "symbolic",
    "numerical",
    "counterexample",
    "small scale",
    "not reproduced",
)
"""How a claim of the book is known; see the page *Claims ledger*."""


class Rendered:
    """Something with an HTML form for the page and a plain form for terminals and
    print.
    """

    def __init__(self, as_html: str, as_text: str) -> None:
        self.as_html = as_html
        self.as_text = as_text

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/html": self.as_html, "text/plain": self.as_text}

    def __repr__(self) -> str:
        return self.as_text


def math_to_html(text: str) -> str:
    r"""Escape text for HTML, turn ``$...$`` into ``\(...\)`` for MathJax and
    back-quoted words into ``<code>``.
    """
    pieces = re.split(r"(\$[^$]+\$|`[^`]+`)", text)
    rendered = []
    for piece in pieces:
        if piece.startswith("$"):
            rendered.append(rf"\({html.escape(piece[1:-1])}\)")
        elif piece.startswith("`"):
            rendered.append(f"<code>{html.escape(piece[1:-1])}</code>")
        else:
            rendered.append(html.escape(piece))
    return "".join(rendered)


Predicate = Callable[[Any], bool]
"""What a claim says of a measured value: true or false."""


def plain(value: Any) -> Any:
    """A value without its library: tensors and arrays of no dimension as Python
    numbers, also inside mappings, lists and tuples; anything else as it is.
    """
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(plain(part) for part in value)
    if getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def as_words(value: Any) -> str:
    """A plain value as a box shows it: numbers to three digits, few of them; what is
    long, or nothing, is left out (an empty string).
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, int | str):
        return str(value)
    if isinstance(value, Mapping):
        pairs = [(name, as_words(part)) for name, part in value.items()]
        if len(pairs) <= 6 and all(words for _, words in pairs):
            return ", ".join(f"{name} {words}" for name, words in pairs)
    elif isinstance(value, list | tuple) and len(value) <= 6:
        parts = [as_words(part) for part in value]
        if all(parts):
            return ", ".join(parts)
    return ""


def _named(value: Any) -> str:
    """A value in an error message."""
    return as_words(value) or repr(value)


def _has_nan(value: Any) -> bool:
    """Whether any number in a plain value is not a number."""
    if isinstance(value, Mapping):
        return any(_has_nan(part) for part in value.values())
    if isinstance(value, list | tuple):
        return any(_has_nan(part) for part in value)
    if hasattr(value, "ndim"):
        return bool((value != value).any())  # only a NaN is not equal to itself
    return isinstance(value, float) and math.isnan(value)


def alternative_values(label: str, measured: Any, refuses: Mapping[str, Any]) -> dict:
    """What a claim's predicate is given for each alternative: its value, or, where a
    mapping was measured, the measured one with some entries replaced.

    Raises
    ------
    ValueError
        If an alternative of a mapping is not a mapping, replaces what was not measured,
        or holds a NaN (which every comparison refuses, so that it shows nothing).
    """
    values = {}
    for name, given in refuses.items():
        value = plain(given)
        if isinstance(measured, Mapping):
            if not isinstance(value, Mapping):
                raise ValueError(
                    f"{label}: {name!r} must be a mapping, since measured is one"
                )
            unknown = sorted(set(value) - set(measured))
            if unknown:
                raise ValueError(
                    f"{label}: {name!r} replaces {unknown}; measured are "
                    f"{sorted(measured)}"
                )
            value = {**measured, **value}
        if _has_nan(value):
            raise ValueError(f"{label}: {name!r} holds a NaN, which refutes nothing")
        values[name] = value
    return values


def _verdict(label: str, part: str, holds: Predicate, name: str, value: Any) -> bool:
    """The predicate's answer; what goes wrong inside it names the claim."""
    where = f"claim {label}{f', {part},' if part else ''} on {name!r}"
    try:
        answer = plain(holds(value))
    except Exception as error:
        raise ValueError(f"{where}: the predicate raised {error!r}") from error
    if not isinstance(answer, bool):
        raise ValueError(
            f"{where}: the predicate must answer true or false, got {answer!r}"
        )
    return answer


def check_claim(
    label: str,
    measured: Any,
    holds: Predicate | Mapping[str, Predicate],
    refuses: Mapping[str, Any],
) -> None:
    """Try a claim's predicate on what was measured and on each alternative.

    Parameters
    ----------
    label : the claim's name, for messages.
    measured : what the cell found; scalars of torch and NumPy become Python's.
    holds : the predicate, or a mapping from the parts of the sentence to a predicate
        each: then all must hold, and each part needs an alternative that it alone
        refuses.
    refuses : name -> value for which the sentence would be false.

    Raises
    ------
    AssertionError
        If the predicate does not hold for ``measured``, or holds for an alternative, or
        a part refuses no alternative alone.
    ValueError
        If there is no alternative, one is malformed (see ``alternative_values``), or
        the predicate raises or answers neither true nor false.

    Book: :ref:`ch-ledger`.
    """
    if not refuses:
        raise ValueError(
            f"{label}: refuses={{...}} must name at least one alternative, a value for "
            "which the sentence would be false"
        )
    parts = dict(holds) if isinstance(holds, Mapping) else {"": holds}
    measured = plain(measured)
    alternatives = alternative_values(label, measured, refuses)
    for part, predicate in parts.items():
        if not _verdict(label, part, predicate, "measured", measured):
            of = f", in its part {part!r}," if part else ""
            raise AssertionError(
                f"claim {label}{of} does not hold for what was measured "
                f"({_named(measured)})"
            )
    refusers = {
        name: {
            part
            for part, predicate in parts.items()
            if not _verdict(label, part, predicate, name, value)
        }
        for name, value in alternatives.items()
    }
    for name, by in refusers.items():
        if not by:
            value = alternatives[name]
            raise AssertionError(
                f"claim {label} does not refuse {name!r} ({_named(value)}):"
                " its check passes for that, too"
            )
    for part in parts:
        if {part} not in refusers.values():
            raise AssertionError(
                f"claim {label}: no alternative is refused by the part {part!r} alone"
            )


def claim_box(
    label: str,
    statement: str,
    kind: str,
    details: Mapping[str, Sequence[str]],
    *,
    alternatives: Sequence[str] = (),
    recorded: str = "",
    minor: bool = False,
) -> Rendered:
    """A claim as one element: the sentence with its kind, and a fold with the rest.

    The book's extensions add what only the page knows: the code of the check, links to
    the claim and to its row of the ledger, and one box around minor claims.
    """
    rows = "".join(
        f"<dt>{name}</dt>" + "".join(f"<dd>{math_to_html(line)}</dd>" for line in lines)
        for name, lines in details.items()
    )
    name, css = html.escape(label), kind.replace(" ", "-")
    data = {"alternatives": list(alternatives), "recorded": recorded, "minor": minor}
    box = (
        f'<div class="claim claim-{css}{" claim-minor" if minor else ""}" id="{name}" '
        f'role="note" data-claim="{html.escape(json.dumps(data))}">'
        f'<p class="claim-statement"><span class="claim-kind">{kind}</span> '
        f"{math_to_html(statement)}</p>"
        f'<details class="claim-fold"><summary>Conditions and check'
        f'<span class="claim-of"> of {name}</span></summary>'
        f"<dl>{rows}</dl></details></div>"
    )
    lines = [f"[{kind}] {statement}"]
    lines += [f"  {name.lower()}: {'; '.join(said)}" for name, said in details.items()]
    return Rendered(box, "\n".join(lines))


def show(thing: Rendered) -> None:
    """Display it in the notebook."""
    from IPython.display import display

    display(thing)


def claim(
    label: str,
    statement: str,
    *,
    conditions: str,
    kind: str,
    evidence: str,
    measured: Any = None,
    holds: Predicate | Mapping[str, Predicate] | None = None,
    refuses: Mapping[str, Any] | None = None,
    recorded: str | None = None,
    minor: bool = False,
) -> None:
    """Assert a claim of the text and show it as a box; the claims ledger collects these
    from the pages.

    The check has to be able to fail: it runs on what was measured, and on each
    alternative named, for which it must not pass.

    Parameters
    ----------
    label : unique name, ``clm-<chapter>-<what>``.
    statement : the sentence, true as it stands, TeX between dollar signs.
    conditions : where it holds.
    kind : one of ``CLAIM_KINDS``.
    evidence : how it is checked, and where the tolerance comes from.
    measured : what the cell found: a number, a tensor, or a mapping of several.
    holds : the predicate on it, or a mapping from parts of the sentence to predicates
        (see ``check_claim``).
    refuses : name of an alternative -> the value that it gives: the tokens unchanged, a
        term left out, untrained weights.  Where ``measured`` is a mapping, an
        alternative replaces some of its entries.
    recorded : the file of ``results/`` that ``measured`` was read from, when a build
        does not compute it again.
    minor : one line in a folded box of its cell, instead of a box in the open.

    Raises
    ------
    AssertionError
        If the predicate fails for what was measured, or passes for an alternative.
    ValueError
        For an unknown kind, a missing part, or a predicate that raises.

    Book: :ref:`ch-ledger`.
    """
    if kind not in CLAIM_KINDS:
        raise ValueError(f"kind must be one of {CLAIM_KINDS}, got {kind!r}")
    if recorded is not None and not recorded.startswith("results/"):
        raise ValueError(f"{label}: recorded must be results/..., got {recorded!r}")
    refuses = refuses or {}
    if kind == "not reproduced":
        if measured is not None or holds is not None or refuses:
            raise ValueError(
                f"{label}: a claim of kind 'not reproduced' has no check: leave out "
                "measured, holds and refuses"
            )
    elif holds is None:
        raise ValueError(
            f"{label}: a claim of kind {kind!r} needs its check, holds=..."
        )
    elif not (isinstance(holds, Mapping) or callable(holds)):
        raise ValueError(
            f"{label}: holds must be a predicate, lambda value: ..., or a mapping from "
            f"parts of the sentence to predicates, got {holds!r}"
        )
    elif measured is None:
        raise ValueError(f"{label}: measured=... is missing")
    else:
        check_claim(label, measured, holds, refuses)
    details = {"When": [conditions], "Checked": [evidence]}
    if words := as_words(plain(measured)):
        details["Measured"] = [words]
    if refuses:
        values = {name: as_words(plain(value)) for name, value in refuses.items()}
        details["Refuses"] = [
            f"{name} ({at})" if at else name for name, at in values.items()
        ]
    if recorded is not None:
        details["Recorded"] = [
            f"read from `{recorded}`; a build does not compute it again"
        ]
    show(
        claim_box(
            label,
            statement,
            kind,
            details,
            alternatives=list(refuses),
            recorded=recorded or "",
            minor=minor,
        )
    )
