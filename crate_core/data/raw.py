r"""ImageNet as it is downloaded, and data sets laid out like it: what there is to
prepare, and which class each held-out picture has.

* **Folders**: any that :func:`crate_core.data.folders.folder` reads, class folders with
  or without ``train/`` and ``val/``.
* **Archives**: ``ILSVRC2012_img_train.tar`` (a tar file of one tar file a class) and
  ``ILSVRC2012_img_val.tar`` beside each other, read in place; torchvision would unpack
  them first, to as much disk again.
* **A flat** ``val/``: labels come from the devkit (its archive or folder), from
  ``meta.bin`` that torchvision leaves, from Kaggle's ``LOC_val_solution.csv``, each
  looked for beside the pictures, or from a file that is given: a class a line, in the
  order of the sorted file names, or a file name and its class a line.

Book: :ref:`ch-pretraining`.
"""

import io
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crate_core.data.folders import folder
from crate_core.data.pictures import image_extensions
from crate_core.data.sources import ImageSource

TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VAL_ARCHIVE = "ILSVRC2012_img_val.tar"

LABEL_FILES = (
    "ILSVRC2012_devkit_t12.tar.gz",
    "ILSVRC2012_devkit_t12",
    "meta.bin",
    "LOC_val_solution.csv",
)
"""Where labels of a flat ``val/`` are looked for, in this order: in the folder and the
three above it (Kaggle's download has the pictures in ``ILSVRC/Data/CLS-LOC``).
"""

GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
SYNSETS = "meta.mat"


@dataclass(frozen=True, slots=True)
class Original:
    """A picture to prepare: ``size`` bytes of the file ``path`` from ``offset`` on, all
    of it where the size is -1; its ``name`` and class.
    """

    path: str
    name: str
    of_class: str | None
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """The bytes of its file."""
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def __str__(self) -> str:
        return self.path if self.size < 0 else f"{self.path}: {self.name}"


@dataclass(frozen=True)
class RawData:
    """Pictures of each part ("train", "val"), the names of the classes, what was left
    out, what else to say, and how a part was held out.
    """

    parts: Mapping[str, Sequence[Original]]
    classes: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    how: str = ""


def raw_data(source: str | Path, labels: str | Path | None = None) -> RawData:
    """What there is to prepare in a folder.

    Parameters
    ----------
    source : a folder of one of the kinds of the module.
    labels : where the labels of a flat held-out part are: a file, or the devkit.

    Raises
    ------
    FileNotFoundError
        If the folder or the labels are not there.
    ValueError
        If it holds no pictures, or labels do not fit them.

    Book: :ref:`ch-pretraining`.
    """
    root = Path(source).expanduser()
    if (root / TRAIN_ARCHIVE).is_file():
        parts = {"train": class_archives(root / TRAIN_ARCHIVE)}
        if (root / VAL_ARCHIVE).is_file():
            parts["val"] = members(root / VAL_ARCHIVE)
        left_out: tuple[str, ...] = ()
        notes: tuple[str, ...] = ()
        how = "archives, read in place"
    else:
        data = folder(root)
        parts = {
            "train": originals(data.train, data.classes),
            "val": originals(data.held_out, data.classes),
        }
        left_out, notes = data.left_out, data.notes
        how = data.description
    if any(picture.of_class is None for picture in parts.get("val", [])) and any(
        picture.of_class is not None for picture in parts["train"]
    ):
        found = Path(labels).expanduser() if labels is not None else found_labels(root)
        if found is None:
            looked = ", ".join(LABEL_FILES)
            notes = (f"val has no labels: none of {looked} is in {root}; --labels",)
        else:
            parts["val"] = labelled(parts["val"], found)
            notes = (f"labels of val from {found}",)
    elif labels is not None:
        raise ValueError(f"labels={str(labels)!r}: val/ has class folders already")
    names = {
        str(picture.of_class)
        for part in parts.values()
        for picture in part
        if picture.of_class
    }
    if strange := sorted(n for n in names if n in (".", "..") or set(n) & set("/\\")):
        raise ValueError(f"{strange[0]!r} cannot be the name of a class folder")
    return RawData(parts, tuple(sorted(names)), left_out, notes, how)


def originals(source: ImageSource, classes: Sequence[str]) -> list[Original]:
    """The pictures of a part of a folder."""
    labels = source.labels
    return [
        Original(
            source.name(i),
            Path(source.name(i)).name,
            None if labels is None else classes[labels[i]],
        )
        for i in range(len(source))
    ]


def members(archive: Path, of_class: str | None = None) -> list[Original]:
    """The image files of a tar file, by name.

    Raises ``ValueError`` if it is damaged, or holds none.
    """
    try:
        with tarfile.open(archive) as opened:
            found = tar_pictures(opened, archive, 0, of_class)
    except tarfile.TarError as error:
        raise ValueError(f"{archive} is not a readable tar file: {error}") from error
    if not found:
        raise ValueError(f"{archive} holds no image file")
    return found


def tar_pictures(
    opened: tarfile.TarFile, archive: Path, start: int, of_class: str | None
) -> list[Original]:
    """The image files of an open tar file that begins at byte ``start`` of an archive,
    sorted by name.
    """
    found = [
        Original(
            str(archive),
            Path(member.name).name,
            of_class,
            start + member.offset_data,
            member.size,
        )
        for member in opened
        if member.isfile() and Path(member.name).suffix.lower() in image_extensions()
    ]
    return sorted(found, key=lambda picture: picture.name)


def class_archives(archive: Path) -> list[Original]:
    """The pictures of a tar file that holds one tar file for each class.

    Raises ``ValueError`` if it is damaged, or holds none.
    """
    found: list[Original] = []
    try:
        with tarfile.open(archive) as opened:
            inner = [m for m in opened if m.isfile() and m.name.endswith(".tar")]
            for member in sorted(inner, key=lambda m: m.name):
                file = opened.extractfile(member)
                assert file is not None  # it is a file
                with tarfile.open(fileobj=file) as inside:
                    name = Path(member.name).stem
                    found += tar_pictures(inside, archive, member.offset_data, name)
    except tarfile.TarError as error:
        raise ValueError(f"{archive} is not a readable tar file: {error}") from error
    if not found:
        raise ValueError(f"{archive} holds no tar file of a class with images")
    return found


def found_labels(root: Path) -> Path | None:
    """The first of the files that hold labels of ``val/``, in a folder or above it."""
    folders = [root.absolute(), *root.absolute().parents[:3]]
    places = [place / name for name in LABEL_FILES for place in folders]
    return next((path for path in places if path.exists()), None)


def labelled(pictures: Sequence[Original], labels: Path) -> list[Original]:
    """Pictures with the classes that a label file or devkit gives them.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it does not fit the pictures; the message names the first that lacks a label.
    """
    if not labels.exists():
        raise FileNotFoundError(f"there is no file {labels}")
    rows = label_rows(labels)
    ordered = sorted(pictures, key=lambda picture: picture.name)
    if all(len(row) == 1 for row in rows):
        if len(rows) != len(ordered):
            raise ValueError(
                f"{labels} has {len(rows):,} classes, one a line, for "
                f"{len(ordered):,} pictures"
            )
        classes = [row[0] for row in rows]
    else:
        by_name = {Path(row[0]).stem: row[1] for row in rows if len(row) > 1}
        missing = [
            picture for picture in ordered if Path(picture.name).stem not in by_name
        ]
        if missing:
            raise ValueError(
                f"{labels} has no label of {len(missing):,} of {len(ordered):,} "
                f"pictures, such as {missing[0].name}"
            )
        classes = [by_name[Path(picture.name).stem] for picture in ordered]
    return [
        Original(picture.path, picture.name, name, picture.offset, picture.size)
        for picture, name in zip(ordered, classes, strict=True)
    ]


def label_rows(labels: Path) -> list[list[str]]:
    """The words of each line of a label file, or one class a line of a devkit or of
    torchvision's ``meta.bin``.
    """
    if labels.name == "meta.bin":
        from torchvision.datasets.imagenet import load_meta_file

        return [[wnid] for wnid in load_meta_file(str(labels.parent), labels.name)[1]]
    if labels.is_dir():
        found = {path.name: path for path in labels.rglob("*") if path.is_file()}
        if GROUND_TRUTH not in found or SYNSETS not in found:
            raise ValueError(
                f"{labels} holds no {GROUND_TRUTH} and {SYNSETS}, as the devkit does"
            )
        files = {name: found[name].read_bytes() for name in (GROUND_TRUTH, SYNSETS)}
        return devkit_rows(files)
    if tarfile.is_tarfile(labels):
        with tarfile.open(labels) as archive:
            files = {}
            for member in archive:
                name = Path(member.name).name
                if name in (GROUND_TRUTH, SYNSETS) and member.isfile():
                    file = archive.extractfile(member)
                    files[name] = b"" if file is None else file.read()
        if len(files) < 2:
            raise ValueError(f"{labels} holds no {GROUND_TRUTH} and {SYNSETS}")
        return devkit_rows(files)
    lines = labels.read_text(encoding="utf8").splitlines()
    rows = [[word for word in re.split(r"[\s,]+", line) if word] for line in lines]
    rows = [row for row in rows if row and row[0] != "ImageId"]
    if rows and all(len(row) == 1 and row[0].isdecimal() for row in rows):
        beside = labels.parent / SYNSETS
        if not beside.is_file():
            raise ValueError(
                f"{labels} holds numbers; what they stand for says {SYNSETS} of the "
                "devkit, which has to lie beside it"
            )
        return devkit_rows(
            {GROUND_TRUTH: labels.read_bytes(), SYNSETS: beside.read_bytes()}
        )
    return rows


def devkit_rows(files: Mapping[str, bytes]) -> list[list[str]]:
    """Classes by WordNet ID, one a picture, from the devkit's list of numbers and its
    table of what they stand for.
    """
    from scipy.io import loadmat

    table = loadmat(io.BytesIO(files[SYNSETS]), squeeze_me=True)["synsets"]
    # numbers, WordNet IDs and, fifth, how many kinds a class has: none, if it is a leaf
    wnids = {int(row[0]): str(row[1]) for row in table if int(row[4]) == 0}
    numbers = [int(line) for line in files[GROUND_TRUTH].split()]
    if strange := set(numbers) - set(wnids):
        raise ValueError(f"{GROUND_TRUTH}: {SYNSETS} has no class {min(strange)}")
    return [[wnids[number]] for number in numbers]


def names_apart(pictures: Iterable[Original]) -> list[str]:
    """Names of files, CLASS/STEM or STEM, that differ on systems too which do not tell
    capitals from small letters: a name that is taken gets a number.
    """
    taken: set[str] = set()
    names = []
    for picture in pictures:
        stem = Path(picture.name).stem
        name = stem if picture.of_class is None else f"{picture.of_class}/{stem}"
        free, number = name, 2
        while free.casefold() in taken:
            free, number = f"{name}-{number}", number + 1
        taken.add(free.casefold())
        names.append(free)
    return names
