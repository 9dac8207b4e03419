"""Reads the layout of the 2026 challenge: eval.json, a list of objects with img and prompt.

Knows nothing of the other formats.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ipt2v.testsets.checks import Entry, anchored, inner_image, problem, read_utf8, text_fields

FILE_NAME = "eval.json"
KEYS = ("img", "prompt")


def read_evaljson(path: Path) -> Iterator[Entry]:
    """The entries of an eval.json. prompt_id is the entry's number, from 1: the challenge names the videos so."""
    file = anchored(path)
    if file.is_dir():
        file /= FILE_NAME
    for number, (line_number, value) in enumerate(_elements(file), start=1):
        place = f"{file}, line {line_number} (entry {number})"
        fields = text_fields(value, KEYS, (), place)
        yield Entry(
            identity=PurePosixPath(fields["img"]).stem,
            prompt_id=str(number),
            prompt=fields["prompt"].strip(),
            image=inner_image(file.parent, fields["img"], place, absolute_allowed=False),
            place=place,
        )


def _elements(file: Path) -> Iterator[tuple[int, object]]:
    """Each element of the file's list with the line that it starts on."""
    text = read_utf8(file)
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise problem(f"{file}, line {error.lineno}", f"malformed JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, brackets a thousand deep
        raise problem(file, f"malformed JSON: {error}") from error
    if not isinstance(values, list):
        raise problem(file, f"found a {type(values).__name__}, expected a list of objects with {', '.join(KEYS)}")
    return zip(_line_numbers(text, len(values)), values, strict=True)


def _line_numbers(text: str, num_elements: int) -> Iterator[int]:
    """The line that each element of a well-formed JSON list starts on; json.loads alone forgets them."""
    decoder = json.JSONDecoder()
    position, counted, line_number = text.index("[") + 1, 0, 1
    for _ in range(num_elements):
        while text[position] in " \t\r\n,":
            position += 1
        line_number += text.count("\n", counted, position)
        counted = position
        yield line_number
        _, position = decoder.raw_decode(text, position)
