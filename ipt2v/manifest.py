"""The list of a run's items: as JSONL, as one digest, and split into shards.

Knows nothing of how a test set is laid out, nor of who makes which shard.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from ipt2v.records import Item, Photo

MORE_PHOTOS = "more_photos"  # left out where there are none
FIELDS = tuple(sorted(field.name for field in fields(Item) if field.name != MORE_PHOTOS))  # all of them text
PHOTO_FIELDS = tuple(sorted(field.name for field in fields(Photo)))  # all of them text
_FIELD_SET = frozenset(FIELDS)
_PHOTO_FIELD_SET = frozenset(PHOTO_FIELDS)
_DIGITS = re.compile(r"([0-9]+)")


def natural_key(name: str) -> tuple[tuple[str | int, ...], str]:
    """Sorts as people count: id2 before id10. Names that count the same (id1, id01) keep one fixed order."""
    parts = _DIGITS.split(name)  # text and digits alternate, so that texts meet texts and numbers numbers
    return tuple(int(part) if index % 2 else part for index, part in enumerate(parts)), name


def in_natural_order(items: Iterable[Item]) -> tuple[Item, ...]:
    """The same items sorted by identity, then by prompt_id, as people count."""
    return tuple(sorted(items, key=lambda item: (natural_key(item.identity), natural_key(item.prompt_id))))


def of_some_identities(items: Sequence[Item], num_identities: int | None) -> tuple[Item, ...]:
    """The items of so many identities, spread evenly over those that there are; all for None.

    Raises ValueError if there are fewer.
    """
    names = list(dict.fromkeys(item.identity for item in items))
    if num_identities is None:
        return tuple(items)
    if num_identities > len(names):
        raise ValueError(f"testset.identities: found {num_identities}, expected at most the {len(names)} of the test set")
    chosen = {names[index * len(names) // num_identities] for index in range(num_identities)}
    return tuple(item for item in items if item.identity in chosen)


def dumps_manifest(items: Iterable[Item]) -> str:
    """The manifest's text: one JSON object an item, in the given order; the same items give the same bytes."""
    return "".join(json.dumps(_record(item), ensure_ascii=False, sort_keys=True) + "\n" for item in items)


def _record(item: Item) -> dict[str, object]:
    record: dict[str, object] = {name: getattr(item, name) for name in FIELDS}
    return record | {MORE_PHOTOS: [asdict(photo) for photo in item.more_photos]} if item.more_photos else record


def write_manifest(items: Iterable[Item], path: Path) -> None:
    """Writes the manifest in place; who needs it whole or not at all renames it there."""
    path.write_text(dumps_manifest(items), encoding="utf-8", newline="\n")


def read_manifest(path: Path) -> tuple[Item, ...]:
    """The items of a manifest, in the order they were written. Raises ValueError with file and line if one is malformed."""
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line_number = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line_number}: not UTF-8 at byte {error.start}; write the manifest anew") from error
    line_numbers: dict[tuple[str, str], int] = {}
    items = []
    # not splitlines: U+2028 and U+0085 stand unescaped inside prompts
    for line_number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), start=1):
        item = _parse_item(line, f"{path}, line {line_number}")
        first = line_numbers.setdefault((item.identity, item.prompt_id), line_number)
        if first != line_number:
            raise ValueError(f"{path}, line {line_number}: {item.key!r} is also on line {first}; write the manifest anew")
        items.append(item)
    return tuple(items)


def _parse_item(line: str, place: str) -> Item:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: malformed JSON: {error}; write the manifest anew") from error
    if not isinstance(record, dict):
        raise ValueError(f"{place}: found a {type(record).__name__}, expected an object; write the manifest anew")
    texts = {name: value for name, value in record.items() if name != MORE_PHOTOS}
    if texts.keys() != _FIELD_SET:
        expected = f"{', '.join(FIELDS)} and, if there are any, {MORE_PHOTOS}"
        raise ValueError(f"{place}: fields {', '.join(sorted(record)) or 'none'}, expected {expected}")
    for name, value in texts.items():
        if not isinstance(value, str):
            raise ValueError(f"{place}: {name} is {value!r:.60} ({type(value).__name__}), expected text")
    return Item(**texts, more_photos=_parse_photos(record[MORE_PHOTOS], place) if MORE_PHOTOS in record else ())


def _parse_photos(value: object, place: str) -> tuple[Photo, ...]:
    expected = f"a list of at least one object with the texts {', '.join(PHOTO_FIELDS)}; write the manifest anew"
    if not isinstance(value, list) or not value:
        raise ValueError(f"{place}: {MORE_PHOTOS} is {value!r:.60} ({type(value).__name__}), expected {expected}")
    for index, photo in enumerate(value):
        is_photo = isinstance(photo, dict) and photo.keys() == _PHOTO_FIELD_SET
        if not is_photo or not all(isinstance(text, str) for text in photo.values()):
            raise ValueError(f"{place}: {MORE_PHOTOS}[{index}] is {photo!r:.60} ({type(photo).__name__}), expected {expected}")
    return tuple(Photo(**photo) for photo in value)


def manifest_digest(items: Iterable[Item]) -> str:
    """SHA-256 of what the items ask for, 64 hex digits: the same in any order and wherever the photos lie."""
    # photos in their order: another one rounds their average in another way
    asked = sorted((item.identity, item.prompt_id, item.prompt, *(photo.sha256 for photo in item.photos)) for item in items)
    # as JSON, so that no two lists run together into the same bytes
    return hashlib.sha256(json.dumps(asked).encode("ascii")).hexdigest()


def shard_by_identity(items: Sequence[Item], num_shards: int) -> tuple[tuple[Item, ...], ...]:
    """The items split into num_shards lists of about the same length; an identity never straddles two.

    The largest identities go first, each onto the shard with the fewest items (Graham's LPT rule, 1969).
    """
    by_identity: dict[str, list[Item]] = {}
    for item in items:
        by_identity.setdefault(item.identity, []).append(item)
    if not 1 <= num_shards <= len(by_identity):
        known = f"expected 1..{len(by_identity)}, the number of identities"
        raise ValueError(f"num_shards: {num_shards} for {len(by_identity)} identities; {known}")
    largest_first = sorted(by_identity, key=lambda identity: (-len(by_identity[identity]), natural_key(identity)))
    lightest = [(0, shard_index) for shard_index in range(num_shards)]
    shards: list[list[Item]] = [[] for _ in range(num_shards)]
    for identity in largest_first:
        num_items, shard_index = lightest[0]
        shards[shard_index] += by_identity[identity]
        heapq.heapreplace(lightest, (num_items + len(by_identity[identity]), shard_index))
    return tuple(in_natural_order(shard) for shard in shards)
