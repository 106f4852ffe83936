"""Formulas set when the book is built: what is found, made of it, and refused."""

import pytest
import typeset

pytestmark = pytest.mark.repository

PAGE = r"""<html><head><title>On \(x\)</title><script>var a = "\(no\)";</script></head>
<body><!-- \(no\) --><p title="\(no\)">See \(a &lt; b\) and <code>\(no\)</code>.</p>
<div class="math">
<span class="eqno">(1)</span>\[\begin{split}c
= \RR\end{split}\]</div><pre>\[no\]</pre></body></html>"""
FOUND = {
    ("a < b", False): "<b>1</b>",
    ("\\begin{split}c\n= \\RR\\end{split}", True): "<b>2</b>",
}


def test_formulas_are_found_in_text_only() -> None:
    assert typeset.formulas(PAGE) == set(FOUND)
    page = typeset.with_formulas(PAGE, FOUND.__getitem__)
    assert '<p title="\\(no\\)">See <b>1</b> and <code>\\(no\\)</code>.</p>' in page
    assert '<span class="eqno">(1)</span><b>2</b></div>' in page
    assert page.count("no") == PAGE.count("no")
    assert typeset.formulas(page) == set()


def test_formulas_are_set_with_the_macros_of_the_book() -> None:
    asked = [(r"\norm{x} \in \RR", False), (r"\mathbb{R}", True), (r"\frac{a", False)]
    macros = {"RR": r"\mathbb{R}", "norm": [r"\lVert #1 \rVert", 1]}
    done, css = typeset.typeset([*asked, (r"\nothing", False)], {"macros": macros})
    inline, displayed, wrong = (done[one] for one in asked)
    assert inline.startswith("<mjx-container")
    assert "<math xmlns" in inline  # for those who listen
    assert 'display="true"' not in inline
    assert 'display="true"' in displayed
    assert "mjx-c211D" in inline  # the letter of the macro
    assert "mjx-c211D" in css
    assert typeset.error(inline) is typeset.error(displayed) is None
    assert "brace" in str(typeset.error(wrong))
    assert "nothing" in str(typeset.error(done[r"\nothing", False]))


def test_style_sheets_are_merged() -> None:
    merged = typeset.merged("a { b: c; }\n\nd { e: f }", "d {\n  e: f\n}\ng {h: i}")
    assert merged == "a { b: c; }\nd { e: f }\ng {h: i}\n"


def test_a_brace_in_a_string_ends_no_rule() -> None:
    rules = [
        'a::before { content: "{"; }',
        'b::before { content: "}"; }',
        r'c::before { content: "\""; }',
        'd[e="{"] { f: g }',
    ]
    assert typeset.merged("", "\n".join(rules)) == "\n".join(rules) + "\n"


def test_scripts_of_mathjax_are_found() -> None:
    page = (
        "<script>var a = 1;</script>\n<script>window.MathJax = {}</script>\n"
        '<script defer="defer" src="../_static/mathjax/none.js"></script>\n'
    )
    assert typeset.SCRIPTS.sub("", page) == "<script>var a = 1;</script>\n"
