"""Links to the glossary say what the word means when the pointer rests on them.

A link made by ``{term}`` gets its entry's text as its title.
"""

from docutils import nodes
from sphinx.application import Sphinx


def meaning(definition: nodes.Node) -> str:
    """The words of an entry, without the links to chapters at its end."""
    words = (
        text.astext()
        for text in definition.findall(nodes.Text)
        if getattr(text.parent.parent, "attributes", {}).get("reftype") != "doc"
    )
    return " ".join("".join(words).split())


def entries(app: Sphinx) -> dict[str, str]:
    """The text of each glossary entry of the book, by the id of its term."""
    found: dict[str, str] = {}
    terms = app.env.domaindata["std"]["objects"]
    for page in {page for (kind, _), (page, _) in terms.items() if kind == "term"}:
        for item in app.env.get_doctree(page).findall(nodes.definition_list_item):
            definition = next(iter(item.findall(nodes.definition)), None)
            if definition is not None:
                text = meaning(definition)
                for term in item.findall(nodes.term):
                    found |= dict.fromkeys(term["ids"], text)
    return found


def add_titles(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Give each link to a glossary entry the entry's text as its title."""
    del docname
    links = [
        link
        for link in doctree.findall(nodes.reference)
        if any("std-term" in inner["classes"] for inner in link.findall(nodes.inline))
    ]
    if not links:
        return
    known = entries(app)
    for link in links:
        target = link.get("refid") or link.get("refuri", "").rpartition("#")[2]
        if target in known:
            link["reftitle"] = known[target]


def setup(app: Sphinx) -> dict[str, object]:
    """Register the extension."""
    app.connect("doctree-resolved", add_titles)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
