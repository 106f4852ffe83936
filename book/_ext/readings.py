"""What extensions read out of built pages, kept from one build to the next.

Parsing a page of a megabyte takes a second.  A page that is as the last build left it
is not parsed again: what was read out of it then is taken, also where that was before
its formulas were set.  It is kept beside Sphinx's own memory of the pages, for the code
that read it.
"""

import hashlib
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

FILE = "readings.json"


def digest(text: str) -> str:
    """A short name of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Readings:
    """Readings of the pages under a folder, by the page's name and the reader."""

    def __init__(self, folder: Path, file: Path) -> None:
        self.folder, self.file = folder, file
        self.kept = json.loads(file.read_text()) if file.is_file() else {}
        self.now: dict[str, dict[str, Any]] = {}

    def of(self, name: str, read: Callable[[str], Any]) -> Any:
        """What `read` makes of a page's HTML: something that JSON can hold."""
        html = (self.folder / name).read_text(encoding="utf8")
        source = inspect.getsourcefile(read)
        assert source is not None
        reader = f"{read.__qualname__} {digest(Path(source).read_text())}"
        kept = self.kept.get(name, {})
        known = self.now.setdefault(name, {})
        if kept.get("page") == digest(html) and reader in kept["readings"]:
            known[reader] = kept["readings"][reader]
        else:
            known[reader] = read(html)
        return known[reader]

    def save(self) -> None:
        """Keep what this build read, for pages as they are now."""
        told = {
            name: {
                "page": digest((self.folder / name).read_text(encoding="utf8")),
                "readings": known,
            }
            for name, known in self.now.items()
        }
        self.file.write_text(json.dumps(told))


def readings(app: Sphinx) -> Readings:
    """The readings of this build."""
    if not hasattr(app, "page_readings"):
        file = Path(app.doctreedir) / FILE
        app.page_readings = Readings(Path(app.outdir), file)  # type: ignore[attr-defined]
    return app.page_readings  # type: ignore[attr-defined]


def save(app: Sphinx, exception: Exception | None) -> None:
    """Keep the readings once no extension changes a page any more."""
    if exception is None and app.builder.name == "html":
        readings(app).save()


def setup(app: Sphinx) -> dict[str, object]:
    """Register the extension."""
    app.connect("build-finished", save, priority=990)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
