"""What every reader of a test set shares: text that is UTF-8, names that can be file names, photos that are photos.

Knows nothing of how a test set is laid out on disk.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ipt2v.manifest import natural_key
from ipt2v.records import Item, Photo

MAX_NAME_CHARS = 100
MAX_NAME_BYTES = 200  # names become file names: 255 bytes on ext4, XFS and Lustre, less what we append
HEAD_BYTES = 12  # RIFF, four bytes of length, WEBP

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One pair as a reader found it; its values are not checked yet."""

    identity: str
    prompt_id: str
    prompt: str
    image: Path  # absolute
    place: str  # file, and line where the format has lines
    more_images: tuple[Path, ...] = ()  # absolute; further photos of the identity


def problem(place: str | Path, text: str) -> ValueError:
    """The error for something found at `place`, on one line that any terminal can print."""
    line = f"{place}: {text}".replace("\n", "\\n")
    return ValueError(line.encode("utf-8", "backslashreplace").decode("utf-8"))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turns what the system says of a file or folder of the test set at `path` into one line: no permission, a long name."""
    try:
        yield
    except OSError as error:
        place = path if error.filename is None else Path(os.fsdecode(error.filename))
        raise problem(place, f"cannot be read ({error.strerror}); check the path and its permissions") from error


def read_utf8(path: Path) -> str:
    """The text of a file, without the byte order mark that some editors put first."""
    with readable(path):
        data = path.read_bytes()
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line_number = data.count(b"\n", 0, error.start) + 1
        found = f"byte 0x{data[error.start]:02x} at offset {error.start} (line {line_number})"
        raise problem(path, f"not UTF-8: {found}; save the file as UTF-8") from error


def anchored(path: Path) -> Path:
    """The path from the root on. Symlinks stay: on a cluster they may be the only name that all nodes share."""
    return path.resolve() if ".." in path.parts else path.absolute()


def listing(folder: Path) -> str:
    """What a folder holds, for a message: the first six names, folders with a slash."""
    names = sorted((path.name + "/" * path.is_dir() for path in folder.iterdir()), key=natural_key)
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "") or "nothing"


def is_text(value: str) -> bool:
    """False for the lone surrogates of "\\ud800" in JSON and of file names that are not UTF-8: nothing can write them."""
    return not _SURROGATE.search(value)


def _holds_control(name: str) -> bool:
    return any(unicodedata.category(character) in ("Cc", "Zl", "Zp") for character in name)


_NAME_FAULTS: tuple[tuple[str, Callable[[str], bool]], ...] = (
    ("is empty", lambda name: not name.strip()),
    (f"is longer than {MAX_NAME_CHARS} characters", lambda name: len(name) > MAX_NAME_CHARS),
    (f"is longer than {MAX_NAME_BYTES} bytes", lambda name: len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES),
    ("holds a path separator", lambda name: "/" in name or "\\" in name),
    ("holds '..'", lambda name: ".." in name),
    ("starts with a dot", lambda name: name.startswith(".")),
    ("holds a control character", _holds_control),
    ("is not UTF-8 text", lambda name: not is_text(name)),
    ("starts or ends with a blank", lambda name: name != name.strip()),
)


def check_name(kind: str, name: str, place: str) -> None:
    """Passes a name that can be a file name everywhere.

    Raises ValueError with the place, the name, its length and what is wrong with it.
    """
    for fault, is_faulty in _NAME_FAULTS:
        if is_faulty(name):
            shown = name if len(name) <= 40 else name[:37] + "..."
            rule = f"expected 1..{MAX_NAME_CHARS} characters that can be a file name; rename it"
            raise problem(place, f"{kind} {shown!r} ({len(name)} characters) {fault}; {rule}")


def check_prompt(prompt: str, place: str) -> None:
    """Passes a prompt that a text model and a record file can take."""
    if not prompt:
        raise problem(place, "prompt is empty; write one or remove the entry")
    if "\0" in prompt:
        raise problem(place, f"prompt holds a NUL character at {prompt.index(chr(0))}; remove it")
    if not is_text(prompt):
        raise problem(place, "prompt holds half a character (a lone surrogate, \\ud800..\\udfff); write it whole")


def check_columns(found: Sequence[str], known: Sequence[str], optional: Sequence[str], place: str) -> None:
    """Passes columns (or JSON keys) that are all known, each there once, none missing."""
    for name in found:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"did you mean {nearest[0]!r}? " if nearest else ""
            raise problem(place, f"column {name!r} unknown; {hint}known: {', '.join(known)}")
        if found.count(name) > 1:
            raise problem(place, f"column {name!r} is there {found.count(name)} times; keep one")
    for name in known:
        if name not in found and name not in optional:
            raise problem(place, f"column {name!r} missing; found: {', '.join(found) or 'none'}; add it")


def text_fields(value: object, known: Sequence[str], optional: Sequence[str], place: str) -> dict[str, str]:
    """The fields of one JSON object, all of them text; an optional field that is null counts as left out."""
    if not isinstance(value, dict):
        raise problem(place, f"found a {type(value).__name__}, expected an object with {', '.join(known)}")
    check_columns(list(value), known, optional, place)
    fields = {name: field for name, field in value.items() if field is not None or name not in optional}
    for name, field in fields.items():
        if not isinstance(field, str):
            raise problem(place, f"{name} is {field!r:.60} ({type(field).__name__}), expected text in quotes")
    return fields


def inner_image(folder: Path, name: str, place: str, *, absolute_allowed: bool) -> Path:
    """The path of an image named in a test set's file. A relative one may not lead out of the test set's folder."""
    if not name or "\0" in name or not is_text(name):
        raise problem(place, f"image {name!r} is no path; name a PNG, JPEG or WEBP file")
    if Path(name).is_absolute():
        if not absolute_allowed:
            raise problem(place, f"image {name!r} is absolute, expected a path relative to {folder}")
        return Path(name)
    try:
        target, root = (folder / name).resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of symlinks, before Python 3.13
        raise problem(place, f"image {name!r} leads nowhere ({error}); mend the path") from error
    if not target.is_relative_to(root):
        raise problem(place, f"image {name!r} leads out of the test set to {target}, expected a file inside {root}")
    return folder / name


def sniff_image(head: bytes) -> str | None:
    """Kind of photo by a file's first 12 bytes: "png", "jpeg", "webp" or None. File names lie: `.png` often holds JPEG."""
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    return None


def image_sha256(path: Path, place: str) -> str:
    """SHA-256 of a photo's bytes, 64 hex digits. Raises ValueError if the file is missing or its content is no photo."""
    try:
        if not path.is_file():
            raise problem(place, f"image {path} missing: no such file; add it or correct the path")
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise problem(place, f"image {path} cannot be read ({error.strerror}); check its name and permissions") from error
    if sniff_image(head) is None:
        raise problem(place, f"image {path} starts with {head!r}, expected the content of a PNG, JPEG or WEBP file")
    return digest


def checked_items(entries: Iterable[Entry]) -> list[Item]:
    """The items of all entries, in their order; each photo is read once, however many prompts it has."""
    places: dict[str, str] = {}
    digests: dict[Path, str] = {}
    items = []
    for entry in entries:
        check_name("identity", entry.identity, entry.place)
        check_name("prompt_id", entry.prompt_id, entry.place)
        check_prompt(entry.prompt, entry.place)
        item = _item(entry, _photos(entry, digests))
        if item.key in places:
            raise problem(entry.place, f"duplicate key {item.key!r}, first seen at {places[item.key]}; remove or rename one")
        places[item.key] = entry.place
        items.append(item)
    return items


def _photos(entry: Entry, digests: dict[Path, str]) -> tuple[Photo, ...]:
    """The entry's photos, the main one first; `digests` holds those of all photos that were read, and grows."""
    photos: dict[str, Photo] = {}
    for image in (entry.image, *entry.more_images):
        if image not in digests:
            digests[image] = image_sha256(image, entry.place)
        path, sha256 = os.fspath(image), digests[image]
        if not is_text(path):
            raise problem(entry.place, f"image {path!r}: the path is not UTF-8; rename the folder or the file")
        if sha256 in photos:  # it would count twice in the average over the photos
            same = f"image {path} has the same content as {photos[sha256].path}"
            raise problem(entry.place, f"{same}, expected different photos of the person; remove one")
        photos[sha256] = Photo(path=path, sha256=sha256)
    return tuple(photos.values())


def _item(entry: Entry, photos: tuple[Photo, ...]) -> Item:
    return Item(
        identity=entry.identity,
        prompt_id=entry.prompt_id,
        prompt=entry.prompt,
        reference=photos[0].path,
        reference_sha256=photos[0].sha256,
        more_photos=photos[1:],
    )
