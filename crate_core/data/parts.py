r"""Which part of a data set a file or folder belongs to, by its name.

The Hugging Face Hub's rule, in any case: a part is named by one of its words,

* train: train, training;
* validation: validation, valid, val, dev;
* test: test, testing, eval, evaluation;

where digits, punctuation and spaces delimit words: ``Train``, ``val2017``,
``x-test-00000-of-00001`` name parts, ``latest`` and ``carnival`` do not.  A name that
speaks of two parts is refused.

Book: :ref:`ch-first-training`.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""The words that name each part."""

PART_OF_WORD = {word: part for part, words in WORDS.items() for word in words}

ACCEPTED = "; ".join(f"{part}: {', '.join(words)}" for part, words in WORDS.items())
"""The rule's words, for messages."""

RESOURCES = frozenset({"__macosx", "@eadir", "$recycle.bin", "lost+found"})
"""Folders that systems leave behind, in lower case."""

RESOURCE_FILES = frozenset({"thumbs.db", "desktop.ini"})
"""Files that systems leave behind, in lower case."""


def hidden(name: str) -> bool:
    """Whether a file or folder is hidden or a resource of some system."""
    return name.startswith(".") or name.lower() in RESOURCES | RESOURCE_FILES


def words(name: str) -> list[str]:
    """The words of a name, in lower case."""
    return [word for word in re.split(r"[\W\d_]+", name.lower()) if word]


def part_of(names: Iterable[str]) -> str | None:
    """The part that the names along a path speak of: "train", "validation", "test", or
    ``None``.

    Raises ``ValueError`` if they speak of several.
    """
    path = list(names)
    spoken = {PART_OF_WORD[w] for n in path for w in words(n) if w in PART_OF_WORD}
    if len(spoken) > 1:
        raise ValueError(
            f"{'/'.join(path)} speaks of {' and '.join(sorted(spoken))}; one part is "
            f"accepted ({ACCEPTED})"
        )
    return next(iter(spoken), None)


def exact_part(name: str) -> str | None:
    """The part that a name speaks of and says nothing else ("Train", "val2017")."""
    said = words(name)
    return PART_OF_WORD.get(said[0]) if len(said) == 1 else None


def chosen_parts(present: Sequence[str], what: str) -> tuple[str, str | None]:
    """Of the parts that there are, what to train on and what is held out: validation
    before test.

    Raises ``ValueError`` if there is none to train on.
    """
    if "train" not in present:
        raise ValueError(
            f"{what} has no part to train on, only {', '.join(sorted(present))}; "
            f"accepted names are {ACCEPTED}"
        )
    return "train", next((p for p in ("validation", "test") if p in present), None)


def unmixed(paths: Sequence[Path], root: Path) -> None:
    """Check that files which are read as one part do not name several, in their own
    names or in those of folders under ``root``.

    Raises ``ValueError`` naming one of each.
    """
    stems: dict[str | None, Path] = {}
    folders: dict[str, Path] = {}
    for path in paths:
        spoken = {PART_OF_WORD.get(word) for word in words(path.stem)} - {None}
        stems.setdefault(spoken.pop() if len(spoken) == 1 else None, path)
    for folder in {path.parent for path in paths}:
        for name in folder.relative_to(root).parts:
            if (part := exact_part(name)) is not None:
                folders.setdefault(part, folder)
    by_name = {part: p for part, p in stems.items() if part is not None}
    by_name = by_name if len(by_name) > 1 and None not in stems else {}
    held_out = folders.keys() - {"train"}
    if by_name or held_out:
        seen = " and ".join(map(str, (by_name or folders).values()))
        raise ValueError(
            f"{root} mixes parts, such as {seen}; accepted are train/ and val/ (or "
            f"test/) directly in the folder that is given ({ACCEPTED})"
        )


def parquet_parts(path: Path) -> dict[str, list[Path]]:
    """Parquet files by part, ``train`` first; hidden files are left out.

    Names of folders under ``path`` and of files speak.  Where no name does, all are
    "train"; files that name no part are "train" where others name held-out parts only,
    and are left out, as on the Hub, where others name "train".  A single file is
    "train", joined by those beside it whose name differs in the part's word and numbers
    only.

    Raises ``ValueError`` if a folder holds no parquet file, or a name speaks of two
    parts.
    """
    if path.is_file():
        parts = {"train": [path]}
        if part_of([path.stem]) == "train":
            rest = [word for word in words(path.stem) if word not in PART_OF_WORD]
            for other in sorted(path.parent.glob("[!.]*.parquet")):
                said = words(other.stem)
                named = {PART_OF_WORD[w] for w in said if w in PART_OF_WORD} - {"train"}
                if len(named) == 1 and rest == [
                    w for w in said if w not in PART_OF_WORD
                ]:
                    parts.setdefault(named.pop(), []).append(other)
        return parts
    found: dict[str | None, list[Path]] = {}
    for file in visible_parquet(path):
        names = file.relative_to(path).with_suffix("").parts
        found.setdefault(part_of(names), []).append(file)
    if not found:
        raise ValueError(f"the folder {path} holds no .parquet file")
    unnamed = found.pop(None, [])
    if "train" not in found and unnamed:
        found = {"train": unnamed, **found}
    chosen_parts([part for part in found if part is not None], f"hf:{path}")
    return {
        part: found[part] for part in ("train", "validation", "test") if part in found
    }


def visible_parquet(path: Path) -> list[Path]:
    """Parquet files under a folder, sorted; hidden and resource files are left out."""
    return [
        file
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() == ".parquet"
        and file.is_file()
        and not any(map(hidden, file.relative_to(path).parts))
    ]
