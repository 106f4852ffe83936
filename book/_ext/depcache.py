"""Sphinx extension: a chapter executes again when, and only when, something that it
imports has changed.

MyST-NB caches the outputs of a page under a key made of its code cells and its
`kernelspec`. A page that calls a function of a local package keeps its old outputs when
that function changes. Here the `kernelspec` of each page, as Sphinx reads it, carries a
digest of

* the source of every module of the packages in `depcache_packages` that the page's
  cells import, directly or through another such module, also inside functions. A name
  imported from a package itself (`from crate_core import mssa`) is followed through the
  explicit re-exports of its `__init__.py` to the module that defines it, so that the
  `__init__.py` does not make everything depend on everything;
* the files under `depcache_data` folders (results of long runs, weights, data) that the
  page's source or one of those modules names, and the versions of the other
  distributions that they import;
* this extension's own version.

A page whose digest has changed since it was last read is read again. What it cannot
see: modules imported under a computed name, and files whose name is computed. `make
clean` forgets all outputs.
"""

import ast
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

import jupytext
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

VERSION = "1"

# Folders whose files a page depends on when it, or a module that it imports, names
# them.
DATA_FOLDERS = ["results", "crate_core/weights", "crate_core/live"]

# Import names whose distribution is called something else.
DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow"}


@dataclass(frozen=True)
class Package:
    """One local package: its name, its folder, and where the names of its `__init__.py`
    are defined.
    """

    name: str
    folder: Path

    def module_path(self, module: str) -> Path | None:
        """The file of a module of this package, given by its full dotted name; None if
        there is none.
        """
        parts = module.split(".")[1:]
        for path in (
            self.folder.joinpath(*parts[:-1], f"{parts[-1]}.py")
            if parts
            else self.folder / "__init__.py",
            self.folder.joinpath(*parts, "__init__.py"),
        ):
            if path.is_file():
                return path
        return None

    def modules(self) -> set[str]:
        """The full names of all modules, the package itself left out."""
        names = set()
        for path in self.folder.rglob("*.py"):
            parts = path.relative_to(self.folder).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if parts:
                names.add(".".join((self.name, *parts)))
        return names

    def layout(self) -> tuple[frozenset[str], str]:
        """What, besides a module's own text, decides which modules it imports: which
        modules there are, and what `__init__.py` re-exports.
        """
        init = self.folder / "__init__.py"
        text = init.read_text(encoding="utf8") if init.is_file() else ""
        return frozenset(self.modules()), text

    def exports(self) -> dict[str, str]:
        """Name re-exported by `__init__.py` -> full name of the module
        it comes from.
        """
        init = self.folder / "__init__.py"
        if not init.is_file():
            return {}
        names: dict[str, str] = {}
        for node in ast.walk(ast.parse(init.read_text(encoding="utf8"))):
            if isinstance(node, ast.ImportFrom):
                source = absolute_module(node, self.name, is_package=True)
                for alias in node.names:
                    submodule = f"{source}.{alias.name}"
                    is_module = self.module_path(submodule) is not None
                    names[alias.asname or alias.name] = (
                        submodule if is_module else source
                    )
        return names


def absolute_module(node: ast.ImportFrom, importer: str, is_package: bool) -> str:
    """The full name of the module in `from module import ...`, relative imports
    resolved against `importer`.
    """
    if node.level == 0:
        return node.module or ""
    drop = node.level - 1 if is_package else node.level
    parts = importer.split(".")
    base = parts[: len(parts) - drop]
    return ".".join([*base, *([node.module] if node.module else [])])


def direct_imports(
    tree: ast.AST, package: Package, importer: str = "__main__"
) -> set[str]:
    """Full names of the modules of `package` that this code imports itself, anywhere in
    it.
    """
    exports = package.exports()
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == package.name:
                    found |= package.modules()  # any attribute of it may be used
                elif alias.name.startswith(f"{package.name}."):
                    found.add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            path = (
                package.module_path(importer)
                if importer.startswith(package.name)
                else None
            )
            source = absolute_module(
                node,
                importer,
                is_package=path is not None and path.name == "__init__.py",
            )
            if source == package.name:
                for alias in node.names:
                    if alias.name == "*":
                        found |= package.modules()
                    elif alias.name in exports:
                        found.add(exports[alias.name])
                    elif package.module_path(f"{source}.{alias.name}") is not None:
                        found.add(f"{source}.{alias.name}")
            elif source.startswith(f"{package.name}."):
                found.add(source)
                for alias in node.names:
                    if package.module_path(f"{source}.{alias.name}") is not None:
                        found.add(f"{source}.{alias.name}")
    return {module for module in found if package.module_path(module) is not None}


def transitive_imports(tree: ast.AST, package: Package) -> set[str]:
    """Full names of the modules of `package` that this code imports, directly or
    through one of them.
    """
    found: set[str] = set()
    todo = direct_imports(tree, package)
    layout = package.layout()
    while todo:
        module = todo.pop()
        found.add(module)
        text = module_text(package, module)
        todo |= module_imports(package, module, text, layout)[0] - found
    return found


def module_text(package: Package, module: str) -> str:
    """The source of a module that there is."""
    path = package.module_path(module)
    assert path is not None
    return path.read_text(encoding="utf8")


@cache
def module_imports(
    package: Package, module: str, text: str, layout: tuple[frozenset[str], str]
) -> tuple[frozenset[str], frozenset[str]]:
    """What a module of this text imports itself: full names of modules of the package,
    and top-level names of everything. Many pages ask it of one module.
    """
    del layout  # the answer is another one where it is another one
    tree = ast.parse(text)
    own = direct_imports(tree, package, module)
    return frozenset(own), frozenset(foreign_imports(tree))


def foreign_imports(tree: ast.AST) -> set[str]:
    """Top-level names of everything imported anywhere in this code."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def code_cells(text: str) -> Iterator[tuple[int, str]]:
    """(Index, source) of the code cells of a MyST-Markdown page; in cells that are not
    plain Python, IPython's magics and shell lines are left out.
    """
    for index, cell in enumerate(jupytext.reads(text, fmt="md:myst").cells):
        if cell.cell_type == "code":
            try:
                ast.parse(cell.source)  # a line of plain Python may begin with % too
                yield index, cell.source
            except SyntaxError:
                yield index, re.sub(r"(?m)^\s*[%!].*$", "pass", cell.source)


def page_code(text: str) -> ast.Module:
    """The syntax tree of all code cells of a page that can be parsed; a broken cell
    fails when it executes.
    """
    body: list[ast.stmt] = []
    for _, source in code_cells(text):
        try:
            body += ast.parse(source).body
        except SyntaxError:
            continue
    return ast.Module(body=body, type_ignores=[])


@cache
def named_patterns(text: str, folder: str) -> frozenset[str]:
    """What a text names under a folder, `*` allowed."""
    found = re.findall(rf"\b{re.escape(folder)}/[\w.*/-]*[\w*]", text)
    return frozenset(found)


def named_files(text: str, root: Path, folders: Iterable[str]) -> set[Path]:
    """Files under `folders` that the text names."""
    return {
        path
        for folder in folders
        for name in named_patterns(text, folder)
        for path in root.glob(name)
        if path.is_file()
    }


def is_notebook(text: str) -> bool:
    """Whether the page has cells: its front matter has a kernelspec."""
    front = re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)
    return (
        front is not None and re.search(r"(?m)^kernelspec:", front.group(1)) is not None
    )


def page_digest(
    text: str, root: Path, packages: Iterable[str], folders: Iterable[str]
) -> str:
    """The digest of everything outside the page that its outputs depend on."""
    digest = hashlib.sha256(VERSION.encode())
    tree = page_code(text)
    foreign = foreign_imports(tree)
    data = named_files(text, root, folders)
    for name in packages:
        package = Package(name, root / name)
        layout = package.layout()
        for module in sorted(transitive_imports(tree, package)):
            source = module_text(package, module)
            digest.update(f"{module}\0{source}\0".encode())
            foreign |= module_imports(package, module, source, layout)[1]
            data |= named_files(source, root, folders)
    for path in sorted(data):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    for name in sorted(foreign):
        try:
            version = metadata.version(DISTRIBUTIONS.get(name, name))
        except metadata.PackageNotFoundError:
            continue  # the standard library, or a local module
        digest.update(f"{name}={version}".encode())
    return digest.hexdigest()[:16]


def with_digest(text: str, digest: str) -> str:
    """The page with the digest in its kernelspec; no line is added, so that line
    numbers in messages stay.
    """
    if not is_notebook(text):
        return text
    marked, count = re.subn(
        r"(?m)^(  display_name: .*)$", rf"\1 [{digest}]", text, count=1
    )
    return (
        marked
        if count
        else re.sub(
            r"(?m)^kernelspec:$", f"kernelspec:\n  digest: {digest}", text, count=1
        )
    )


def digest_of(app: Sphinx, text: str) -> str:
    """The digest of a page of this book."""
    return page_digest(
        text, Path(app.srcdir), app.config.depcache_packages, app.config.depcache_data
    )


def mark_page(app: Sphinx, docname: str, source: list[str]) -> None:
    """On reading a page: put its digest where the cache looks."""
    if is_notebook(source[0]):
        digest = digest_of(app, source[0])
        digests(app.env)[docname] = digest
        source[0] = with_digest(source[0], digest)


def outdated_pages(
    app: Sphinx,
    env: BuildEnvironment,
    added: set[str],
    changed: set[str],
    removed: set[str],
) -> list[str]:
    """Pages to read again, since what they import has changed."""
    known = digests(env)
    pages = []
    for docname in set(env.found_docs) - added - changed - removed:
        text = Path(env.doc2path(docname)).read_text(encoding="utf8")
        if is_notebook(text) and known.get(docname) != digest_of(app, text):
            pages.append(docname)
    return pages


def digests(env: BuildEnvironment) -> dict[str, str]:
    """Docname -> digest at the last reading, kept with Sphinx's environment."""
    if not hasattr(env, "depcache_digests"):
        env.depcache_digests = {}  # type: ignore[attr-defined]
    return env.depcache_digests  # type: ignore[attr-defined]


def forget_page(app: Sphinx, env: BuildEnvironment, docname: str) -> None:
    """Drop what is known of a page that is read again or gone."""
    del app
    digests(env).pop(docname, None)


def merge_pages(
    app: Sphinx, env: BuildEnvironment, docnames: Iterable[str], other: BuildEnvironment
) -> None:
    """Take over what a parallel reader has found."""
    del app
    digests(env).update(
        {name: digests(other)[name] for name in docnames if name in digests(other)}
    )


def setup(app: Sphinx) -> dict[str, object]:
    """Register the extension."""
    app.add_config_value("depcache_packages", [], "env")
    app.add_config_value("depcache_data", DATA_FOLDERS, "env")
    app.connect("source-read", mark_page, priority=100)
    app.connect("env-get-outdated", outdated_pages)
    app.connect("env-purge-doc", forget_page)
    app.connect("env-merge-info", merge_pages)
    return {
        "version": VERSION,
        "env_version": 1,
        "parallel_read_safe": True,
        "parallel_write_safe": True,
    }
