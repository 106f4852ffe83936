"""Sphinx extension: what the site needs to work from a disk without a network.

* Proofs that are folded (`:class: dropdown`): sphinx-proof gives a proof no title,
  which the fold's script needs, and the same id to every proof of a page.
* The project's address: when `repository: {url: ...}` of `_config.yml` has one, the
  repository, edit and issue buttons come on. Without one they stay off.
"""

from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config

REPOSITORY_BUTTONS = (
    "use_repository_button",
    "use_edit_page_button",
    "use_issues_button",
)


def set_repository_buttons(app: Sphinx, config: Config) -> None:
    """Turn on the theme's repository buttons if, and only if, the project has an
    address.
    """
    options = config.html_theme_options
    for button in REPOSITORY_BUTTONS:
        options.setdefault(button, bool(options.get("repository_url")))


def mend_proofs(app: Sphinx, doctree: nodes.document) -> None:
    """Give each folded proof a title, and each part of a theorem or proof an id of its
    own.
    """
    del app
    proofs = [
        node for node in doctree.findall(nodes.admonition) if "proof" in node["classes"]
    ]
    for number, proof in enumerate(proofs, start=1):
        proof["ids"] = [f"proof-{number}"]
        if "dropdown" in proof["classes"]:
            first = next(iter(proof.findall(nodes.Text)), None)
            if first is not None and first.startswith("Proof. "):
                first.parent.replace(first, nodes.Text(first.removeprefix("Proof. ")))
            proof.insert(0, nodes.title("", "Proof"))
    parts = [
        node
        for node in doctree.findall(nodes.section)
        if "proof-content" in node["ids"]
    ]
    for number, part in enumerate(parts, start=1):
        part["ids"] = [f"proof-content-{number}"]


def drop_builtins(app: Sphinx, exception: Exception | None) -> None:
    """Take `builtins`, which has no page of source, out of the list of module sources.

    A documented alias of two types counts as a member of that module.
    """
    listing = Path(app.outdir, "_modules", "index.html")
    if exception is None and listing.is_file():
        text = listing.read_text(encoding="utf8")
        listing.write_text(
            text.replace('<li><a href="builtins.html">builtins</a></li>', ""),
            encoding="utf8",
        )


def setup(app: Sphinx) -> dict[str, object]:
    """Register the extension."""
    app.connect("config-inited", set_repository_buttons)
    app.connect("doctree-read", mend_proofs)
    app.connect("build-finished", drop_builtins)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
