"""Reads a test set into items: the table of formats and the one entry point.

Knows nothing of pixels: ipt2v/references.py decodes the photos.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ipt2v.manifest import in_natural_order
from ipt2v.records import Item
from ipt2v.testsets.checks import Entry, checked_items, listing, problem, readable, sniff_image
from ipt2v.testsets.evaljson import FILE_NAME, read_evaljson
from ipt2v.testsets.tables import read_csv, read_jsonl
from ipt2v.testsets.tree import identity_folders, is_identity_folder, read_tree

__all__ = ["FORMATS", "Format", "archive_template", "detect_format", "read_testset", "sniff_image"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Format:
    """One layout of a test set, and the names that its videos get in the archive."""

    name: str
    read: Callable[[Path], Iterable[Entry]]
    archive_template: str


FORMATS: tuple[Format, ...] = (
    Format(name="tree", read=read_tree, archive_template="{identity}/{prompt_id}.mp4"),
    Format(name="evaljson", read=read_evaljson, archive_template="{prompt_id}.mp4"),
    Format(name="jsonl", read=read_jsonl, archive_template="{identity}/{prompt_id}.mp4"),
    Format(name="csv", read=read_csv, archive_template="{identity}/{prompt_id}.mp4"),
)

_FORMAT_OF_SUFFIX = {".jsonl": "jsonl", ".csv": "csv", ".json": "evaljson"}


def read_testset(path: Path, format: str = "auto") -> tuple[Item, ...]:
    """The items of a test set in natural order: id2 before id10, prompt2 before prompt10.

    Raises ValueError at the first thing that is wrong, naming file, line, what was found and what was expected.
    """
    row = _row(detect_format(path) if format == "auto" else format)
    with readable(path):
        items = checked_items(row.read(path))
    if not items:
        raise problem(path, f"empty test set: no items found, reading it as {row.name!r}")
    return in_natural_order(items)


def archive_template(format: str) -> str:
    """The name of one video inside the archive, with {identity} and {prompt_id} to fill in."""
    return _row(format).archive_template


def detect_format(path: Path) -> str:
    """The name of a test set's format, by what its path is. Raises ValueError with what was found if that is not clear."""
    with readable(path):
        return _detected(path)


def _detected(path: Path) -> str:
    if path.is_file():
        if path.suffix.lower() not in _FORMAT_OF_SUFFIX:
            raise problem(path, f"format unclear: suffix {path.suffix!r}, expected {', '.join(_FORMAT_OF_SUFFIX)}; {_choice()}")
        return _FORMAT_OF_SUFFIX[path.suffix.lower()]
    if not path.is_dir():
        raise problem(path, "no such file or folder; give the path of a test set")
    fitting = [name for name, fits in (("evaljson", _holds_evaljson), ("tree", _holds_tree)) if fits(path)]
    if len(fitting) != 1:
        kind = f"a folder that fits {' and '.join(fitting) or 'no format'}"
        raise problem(path, f"format unclear: {kind}, it holds {listing(path)}; expected one format; {_choice()}")
    return fitting[0]


def _holds_evaljson(folder: Path) -> bool:
    return (folder / FILE_NAME).is_file()


def _holds_tree(folder: Path) -> bool:
    return any(is_identity_folder(inner) for inner in identity_folders(folder))


def _row(name: str) -> Format:
    for row in FORMATS:
        if row.name == name:
            return row
    raise ValueError(f"format {name!r} unknown; known: {', '.join(row.name for row in FORMATS)}")


def _choice() -> str:
    return f"say which: {', '.join(row.name for row in FORMATS)}"
