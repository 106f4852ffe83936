r"""The rules by which pictures, folders and tables are understood, as one table; what
is a number or a list in it is read from the code that applies it.

Book: :ref:`ch-first-training`.
"""

from crate_core.data.batches import MAX_UNREADABLE, SUBSTITUTES
from crate_core.data.named import IMAGE_COLUMNS, KEPT_ROWS, TORCHVISION_PARTS
from crate_core.data.parts import RESOURCE_FILES, RESOURCES, WORDS
from crate_core.data.pictures import DARK, SIXTEEN_BITS, image_extensions
from crate_core.data.sources import HELD_OUT, SPLIT_SEED
from crate_core.data.streamed import BUFFER

USUAL = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".gif", ".tif", ".bmp", ".jp2")
"""Endings that the table names, where Pillow decodes them here."""


def listed(words: tuple[str, ...] | list[str]) -> str:
    """Names as code, with commas."""
    return ", ".join(f"`{word}`" for word in words)


def rules() -> dict[str, str]:
    """Each rule in Markdown by what it is about.

    Book: :ref:`ch-first-training`.
    """
    parts = "; ".join(f"{part}: {listed(words)}" for part, words in WORDS.items())
    usual = [end for end in USUAL if end in image_extensions()]
    left_behind = listed(sorted(RESOURCES | RESOURCE_FILES))
    return {
        "files": (
            f"of a folder all with one of {len(image_extensions())} endings, in any "
            "case: those of formats that the installed Pillow decodes, "
            f"{listed(usual)} among them. Others are counted by ending. What a file "
            "holds is told by its content. "
            f"Hidden files and what systems leave behind ({left_behind}) never count"
        ),
        "links": (
            "followed, into hidden folders too; each real file counts once, whatever "
            "symbolic or hard links name it; links to nothing are counted"
        ),
        "parts": (
            f"folders, parquet files and splits by a word of their name ({parts}), in "
            "any case, between digits and punctuation; validation is held out before "
            "test. A name that speaks of two parts is refused"
        ),
        "no held-out part": (
            f"{HELD_OUT:.0%} are held out, drawn with seed {SPLIT_SEED} whatever the "
            "run's: of a folder from each class folder, of a table from all rows, "
            "whatever their labels"
        ),
        "classes of a folder": (
            "the folders directly in a part; a part without such folders has "
            "no labels. Pretraining needs none"
        ),
        "classes of a table": (
            "the column `label` in any case, else the only one of class labels; any "
            "values that can be hashed are classes, in sorted order. Null, NaN and "
            "negative class labels are no label; lists are none at all. Pretraining "
            "does not read the column"
        ),
        "image column": (
            f"{listed(IMAGE_COLUMNS)} in any case, in this order, else the only column "
            "of images; several without such a name are refused"
        ),
        "torchvision": f"the parts of {listed(sorted(TORCHVISION_PARTS))} themselves",
        "streams": (
            f"shuffled over a buffer of {BUFFER:,} rows; without a held-out part the "
            f"first rows are held out, a tenth, at most {KEPT_ROWS:,}, in "
            "evaluation of such a run too"
        ),
        "which way up": "as EXIF says; damaged EXIF turns nothing",
        "animations": "the first frame",
        "transparency": "laid on white",
        "CIELAB": "brought to sRGB",
        "16-bit grey": (
            f"white is {SIXTEEN_BITS:,}; the first picture that reaches no higher than "
            f"{DARK:,} is named in a warning: it is dark, or was not scaled"
        ),
        "floating point": (
            "white is 1 where all values lie in [0, 1], 255 where they lie in [0, 255] "
            "and reach 16; others cannot be read"
        ),
        "32-bit integers": "cannot be read: nothing says what white is (PGM files do)",
        "what cannot be read": (
            "is skipped by name; in training another picture takes its place (up to "
            f"{SUBSTITUTES} are tried), elsewhere it leaves the denominator. Above "
            f"{MAX_UNREADABLE:.0%} of a part work stops (`max_unreadable`), but for "
            "files that are named one by one"
        ),
    }


def rules_table() -> str:
    """:func:`rules` as a Markdown table."""
    rows = [f"| {name} | {rule} |" for name, rule in rules().items()]
    return "\n".join(["| What | Rule |", "|:--|:--|", *rows])
