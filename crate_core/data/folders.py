r"""Image folders: which files, which class, which part.

* **Files**: every one whose name ends as a format that the installed Pillow decodes
  (:func:`crate_core.data.pictures.image_extensions`); what is left out is counted by
  ending.  Hidden and resource files never count.
* **Links** are followed, each real file counts once a part, whatever symbolic or hard
  links name it.  A link to what the folder holds anyway is left out (not one into a
  hidden store or to a file without an ending, as git-annex and the Hub's cache have
  them), and so is a training picture that the held-out part links to.  Links that lead
  nowhere are counted.
* **Classes** are the folders directly in a part; one without a readable file is named.
* **Parts** are told by the names of folders, see :mod:`crate_core.data.parts`.

Book: :ref:`ch-first-training`.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import numpy as np

from crate_core.data.parts import (
    ACCEPTED,
    WORDS,
    chosen_parts,
    exact_part,
    hidden,
    part_of,
    unmixed,
    words,
)
from crate_core.data.pictures import image_extensions
from crate_core.data.sources import HELD_OUT, FileImages, ImageData, split_source
from crate_core.records import shortened


@dataclass
class Found:
    """Image files of one part by class, ``""`` for those that lie in it directly, with
    the real file behind each, and what was left out: other files by ending, links that
    lead to files counted already, links that lead nowhere.
    """

    root: Path
    by_class: dict[str, dict[Path, str]] = field(default_factory=dict)
    other: Counter[str] = field(default_factory=Counter)
    repeated: int = 0
    broken: int = 0

    def left_out(self) -> list[str]:
        """What was left out, in words."""
        said = []
        if self.other:
            kinds = ", ".join(f"{n} {end}" for end, n in self.other.most_common(5))
            total = self.other.total()
            said.append(f"{counted(total, 'file')} of other kinds ({kinds})")
        if self.repeated:
            said.append(f"{counted(self.repeated, 'link')} to what is counted already")
        if self.broken:
            said.append(f"{counted(self.broken, 'link')} to nothing")
        empty = [name for name, files in self.by_class.items() if name and not files]
        if empty:
            shown = ", ".join(f"{name}/" for name in empty[:5])
            said.append(
                f"{counted(len(empty), 'folder')} without a readable image ({shown})"
            )
        return said


def counted(number: int, noun: str) -> str:
    """ "1 file", "20 files"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def subfolders(directory: Path) -> list[str]:
    """Names of the folders in a directory that are not hidden, sorted."""
    return sorted(
        entry.name
        for entry in os.scandir(directory)
        if entry.is_dir() and not hidden(entry.name)
    )


def held_anyway(behind: str, root: str) -> bool:
    """True if a walk of ``root`` reaches the link's target ``behind`` anyway, or the
    target contains ``root`` (a loop); both are paths without links.
    """
    real, top = Path(behind), Path(root)
    if not real.is_relative_to(top):
        return top.is_relative_to(real)
    if any(hidden(name) for name in real.relative_to(top).parts):
        return False
    return real.is_dir() or real.suffix.lower() in image_extensions()


class Link(Enum):
    """A link that a walk does not follow."""

    REPEATED = "leads to what the walked folder holds anyway, or leads back"
    BROKEN = "leads nowhere"


class RealFiles:
    """The name of the real file behind a name: of hard links the first one met."""

    def __init__(self) -> None:
        self.first: dict[tuple[int, int], str] = {}

    def name(self, path: str, device: int, inode: int) -> str:
        """The name of a file without symbolic links, which its folder lists as
        ``inode`` of ``device``.
        """
        known = self.first.setdefault((device, inode), path)
        # some file systems give one number to many files
        return known if known == path or os.path.samefile(known, path) else path


def walk(
    directory: Path, real: str, root: str, stack: tuple[str, ...], files: RealFiles
) -> Iterator[tuple[Path, str | Link]]:
    """Files under a directory with the real file behind each, or what sort of link it
    is that is not followed.

    ``real`` is the directory without links.  Raises ``OSError`` for a folder that
    cannot be read.
    """
    device = os.stat(real).st_dev
    for entry in sorted(os.scandir(directory), key=lambda e: e.name):
        if hidden(entry.name):
            continue
        path, behind = directory / entry.name, os.path.join(real, entry.name)
        if entry.is_symlink():
            behind = os.path.realpath(path)
            if not os.path.exists(behind):
                yield path, Link.BROKEN
                continue
            if behind in stack or held_anyway(behind, root):
                yield path, Link.REPEATED
                continue
        if entry.is_dir():
            yield from walk(path, behind, root, (*stack, behind), files)
        elif entry.is_symlink() and entry.is_file():
            state = os.stat(behind)
            yield path, files.name(behind, state.st_dev, state.st_ino)
        elif entry.is_file():
            yield path, files.name(behind, device, entry.inode())


def image_files(directory: Path, files: RealFiles | None = None) -> Found:
    """All image files of one part, at any depth, sorted, by class folder; ``files`` has
    what other parts were found to hold.

    Raises ``OSError`` for a folder that cannot be read.
    """
    files = RealFiles() if files is None else files
    found = Found(directory)
    root = os.path.realpath(directory)
    seen: set[str] = set()
    for name in subfolders(directory):
        inside = directory / name
        if not inside.is_symlink() or not held_anyway(os.path.realpath(inside), root):
            found.by_class[name] = {}
    for path, behind in walk(directory, root, root, (root,), files):
        parts = path.relative_to(directory).parts
        if behind is Link.BROKEN:
            found.broken += 1
        elif behind is Link.REPEATED:
            found.repeated += 1
        elif path.suffix.lower() not in image_extensions():
            found.other[path.suffix.lower() or "without an ending"] += 1
        elif behind in seen:
            found.repeated += 1
        else:
            seen.add(behind)
            of_class = parts[0] if len(parts) > 1 else ""
            found.by_class.setdefault(of_class, {})[path] = behind
    return found


def class_folders(found: Found) -> tuple[FileImages, list[str]]:
    """Pictures of one part: labelled by its class folders, or unlabelled when they lie
    in it directly.

    Raises
    ------
    ValueError
        If there is no image file, there are both class folders of images and images
        beside them, or names speak of several parts.
    """
    directory = found.root
    loose = sorted(found.by_class.get("", {}))
    by_class = {
        name: sorted(files)
        for name, files in sorted(found.by_class.items())
        if name and files
    }
    if not by_class and not loose:
        what = "is empty" if not any(directory.iterdir()) else "holds no image file"
        if found.broken:
            what += f", but {counted(found.broken, 'link')} to nothing"
        raise ValueError(
            f"the folder {directory} {what}; accepted are files named "
            f"*{', *'.join(image_extensions())}"
        )
    if by_class and loose:
        raise ValueError(
            f"the folder {directory} holds {len(loose)} images, such as "
            f"{loose[0].name}, beside class folders of images, such as "
            f"{next(iter(by_class))}/; accepted are class folders, or images only"
        )
    paths = loose or [path for files in by_class.values() for path in files]
    unmixed(paths, directory)
    if loose:
        return FileImages(loose), []
    labels = np.repeat(
        np.arange(len(by_class)), [len(files) for files in by_class.values()]
    )
    return FileImages(paths, labels), list(by_class)


def part_folders(root: Path) -> dict[str, str]:
    """Folders of a data set by the part that they name; empty if none does.

    A name that says nothing but a part ("Train", "val2017") is one; names with other
    words in them ("my-train") are if every folder has one.  Class folders beside
    ``train`` alone, and held-out parts without it, are refused, as are two folders of
    one part: ``ValueError``.
    """
    names = subfolders(root)
    parts = {name: exact_part(name) for name in names}
    spoken = [[w for w in words(name) if is_part(w)] for name in names]
    if names and all(len(words) == 1 for words in spoken) and not any(parts.values()):
        rest = {tuple(w for w in words(name) if not is_part(w)) for name in names}
        if len(rest) == 1 and len(names) > 1:
            parts = {name: part_of([name]) for name in names}
    by_part: dict[str, str] = {}
    for name, part in parts.items():
        if part is None:
            continue
        if part in by_part:
            raise ValueError(
                f"{by_part[part]}/ and {name}/ of {root} both name the part {part}; "
                "one of them is accepted"
            )
        by_part[part] = name
    if not by_part:
        return {}
    others = [n for n, part in parts.items() if part is None and holds_image(root / n)]
    if others and ("train" not in by_part or len(by_part) == 1):
        raise ValueError(
            f"{root} holds {', '.join(f'{n}/' for n in by_part.values())}, by name a "
            f"part, beside {', '.join(f'{n}/' for n in others[:3])}; accepted are "
            f"class folders, or parts ({ACCEPTED}) with class folders in them"
        )
    chosen_parts(list(by_part), f"the folder {root}")
    return by_part


def is_part(word: str) -> bool:
    """Whether a word names a part."""
    return any(word in words for words in WORDS.values())


def holds_image(directory: Path) -> bool:
    """Whether there is an image file under a directory."""
    real = os.path.realpath(directory)
    return any(
        path.suffix.lower() in image_extensions()
        for path, behind in walk(directory, real, real, (real,), RealFiles())
        if behind
    )


def folder(path: str | Path) -> ImageData:
    """Images in a folder: class folders with or without ``train/`` and ``val/`` (or
    ``test/``), or images only.

    Without ``val/`` or ``test/`` a tenth of each class (of all, without classes) is
    held out; with both, ``test/`` is not read.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    ValueError
        If it is empty or holds no images (the message names the accepted extensions),
        or names leave open which part is which.

    Parts may have different classes, or one of them none: pretraining needs no labels.
    ``notes`` say so.

    Book: :ref:`ch-first-training`.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise FileNotFoundError(f"there is no folder {root}")
    if not root.is_dir():
        raise ValueError(f"{root} is a file; give the folder that holds the images")
    parts = part_folders(root)
    train_part, held_out_part = (
        chosen_parts(list(parts), str(root)) if parts else ("", None)
    )
    train_root = root / parts[train_part] if parts else root
    real = RealFiles()
    found = image_files(train_root, real)
    if held_out_part is None:
        source, classes = class_folders(found)
        return split_source(
            source, classes, HELD_OUT, f"folder {train_root}", found.left_out()
        )
    held_out_root = root / parts[held_out_part]
    if os.path.realpath(train_root) == os.path.realpath(held_out_root):
        raise ValueError(f"{train_root} and {held_out_root} are the same folder")
    held = image_files(held_out_root, real)
    apart = {behind for files in held.by_class.values() for behind in files.values()}
    both = 0
    for name, files in found.by_class.items():
        kept = {p: behind for p, behind in files.items() if behind not in apart}
        both += len(files) - len(kept)
        found.by_class[name] = kept
    source, own = class_folders(found)
    held_out, held_out_classes = class_folders(held)
    # what is trained on has the first numbers, whatever is held out
    classes = own + [name for name in held_out_classes if name not in own]
    if held_out.labels is not None:
        numbers = np.array([classes.index(name) for name in held_out_classes])
        held_out.labels = numbers[held_out.labels]
    left_out = [
        f"{said} in {f.root.name}/" for f in (found, held) for said in f.left_out()
    ]
    if both:
        left_out.append(f"{both:,} training pictures that are held out too")
    used = {train_root.name, held_out_root.name}
    left_out += [
        f"the folder {name}/"
        for name in subfolders(root)
        if name not in used and holds_image(root / name)
    ]
    description = (
        f"folder {root}: {len(source):,} in {train_root.name}/ to train on, "
        f"{len(held_out):,} held out in {held_out_root.name}/"
    )
    notes = differing_classes(
        {f"{train_root.name}/": own, f"{held_out_root.name}/": held_out_classes}
    )
    return ImageData(
        source,
        held_out,
        tuple(classes),
        description,
        tuple(left_out),
        notes=tuple(notes),
    )


def differing_classes(classes: Mapping[str, Sequence[str]]) -> list[str]:
    """What the class folders of two parts, by the part's name, say that is not the
    same, in words: nothing where both have the same, or none.
    """
    (one, other), said = classes.items(), []
    for (part, names), (beside, others) in ((one, other), (other, one)):
        odd = [name for name in others if name not in names]
        if odd and not names:
            said.append(f"{part} has no class folders: its pictures have no labels")
        elif odd:
            said.append(
                f"{part} lacks {len(odd):,} classes of {beside} ({shortened(odd)})"
            )
    return said
