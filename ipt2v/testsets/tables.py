"""Reads test sets that are one row a pair: JSONL and CSV, with the columns identity, prompt_id, prompt, image.

In JSONL image may be a list, the main photo first; CSV, whose cells are single texts, stays with one photo.
Knows nothing of the other formats.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from ipt2v.testsets.checks import Entry, anchored, check_columns, inner_image, problem, read_utf8, text_fields

COLUMNS = ("identity", "prompt_id", "prompt", "image")
OPTIONAL = ("prompt_id",)

Row = tuple[str, Mapping[str, str], tuple[str, ...]]  # place; columns, the main photo alone as image; further photos


def read_jsonl(path: Path) -> Iterator[Entry]:
    """The entries of a file with one JSON object a line; empty lines are left alone."""
    file = anchored(path)
    return _entries(file.parent, _jsonl_rows(file))


def read_csv(path: Path) -> Iterator[Entry]:
    """The entries of a comma-separated file with a header line; quoted cells may span lines."""
    file = anchored(path)
    return _entries(file.parent, _csv_rows(file))


def _jsonl_rows(file: Path) -> Iterator[Row]:
    # not splitlines: U+2028 and U+0085 may stand inside a JSON text
    for line_number, line in enumerate(read_utf8(file).split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{file}, line {line_number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise problem(place, f"malformed JSON: {error}; expected one object a line") from error
        images: tuple[str, ...] = ()
        if isinstance(value, dict) and isinstance(value.get("image"), list):
            images = _listed_images(value["image"], place)
            value["image"] = images[0]
        yield place, text_fields(value, COLUMNS, OPTIONAL, place), images[1:]


def _listed_images(values: list[object], place: str) -> tuple[str, ...]:
    expected = "expected text in quotes or a list of at least one; name the main photo first"
    if not values:
        raise problem(place, f"image is an empty list, {expected}")
    images = tuple(value for value in values if isinstance(value, str))
    if len(images) < len(values):
        wrong = next(value for value in values if not isinstance(value, str))
        raise problem(place, f"image is a list with {wrong!r:.60} ({type(wrong).__name__}), {expected}")
    return images


def _csv_rows(file: Path) -> Iterator[Row]:
    header: list[str] = []
    for place, cells in _csv_lines(file):
        if not header:
            header = [cell.strip() for cell in cells]
            check_columns(header, COLUMNS, OPTIONAL, place)
        elif len(cells) != len(header):
            raise problem(place, f"malformed CSV: {len(cells)} cells, expected {len(header)}; quote cells that hold commas")
        else:
            row = dict(zip(header, cells, strict=True))
            yield place, {name: cell for name, cell in row.items() if cell.strip() or name not in OPTIONAL}, ()


def _csv_lines(file: Path) -> Iterator[tuple[str, list[str]]]:
    """Each row that is not empty, with the line that it starts on."""
    reader = csv.reader(io.StringIO(read_utf8(file), newline=""), strict=True)
    while True:
        place = f"{file}, line {reader.line_num + 1}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise problem(place, f"malformed CSV: {error}; check the quotes from this line on") from error
        if cells:
            yield place, cells


def _entries(folder: Path, rows: Iterable[Row]) -> Iterator[Entry]:
    """The entries of all rows; a row without prompt_id gets prompt1, prompt2... by its order within its identity."""
    num_prompts: Counter[str] = Counter()
    for place, row, more_images in rows:
        identity = row["identity"].strip()
        num_prompts[identity] += 1
        image, *others = (
            inner_image(folder, name.strip(), place, absolute_allowed=True) for name in (row["image"], *more_images)
        )
        yield Entry(
            identity=identity,
            prompt_id=row.get("prompt_id", f"prompt{num_prompts[identity]}").strip(),
            prompt=row["prompt"].strip(),
            image=image,
            place=place,
            more_images=tuple(others),
        )
