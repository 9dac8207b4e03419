"""Whether a file of weights is what it should be: size, safetensors header, hash. Opens no tensor, knows no network."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ipt2v.models.published import published_files

RECORD = "ipt2v_files.json"  # beside the weights: where they were fetched, and what each file is there
TENSOR_SUFFIXES = (".safetensors", ".onnx", ".pth", ".pt", ".bin", ".gz")  # .gz: CLIP's merges, as fixed as its tensors
_MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit, MAX_HEADER_SIZE in its lib.rs
_CHUNK_BYTES = 1 << 22

Tick = Callable[[int], object]  # is told how many further bytes were read


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What is known of a file beforehand."""

    size: int | None = None  # bytes
    sha256: str | None = None
    git_sha1: str | None = None  # of git's blob: all that the hub states of a file outside git-lfs
    why: str = ""  # who says so, and what to do if they are wrong


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What was fetched into a folder."""

    sources: dict[str, str] = field(default_factory=dict)  # repository -> its commit, or URL -> sha256 of what came
    # path below the folder -> the file; None (null in JSON) lets anything pass, for a file of one's own under a published name
    files: dict[str, Expected | None] = field(default_factory=dict)


def read_record(folder: Path) -> Record:
    """The folder's record; an empty one if it was not fetched. Raises ValueError if it cannot be read."""
    path = folder / RECORD
    if not path.is_file():
        return Record()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        files = {
            name: entry if entry is None else Expected(**{key: entry.get(key) for key in ("size", "sha256", "git_sha1")})
            for name, entry in values["files"].items()
        }
        return Record(sources=dict(values["sources"]), files=files)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not readable ({error}); delete it and fetch the folder again") from None


def write_record(folder: Path, record: Record) -> None:
    files = {
        name: one and {key: getattr(one, key) for key in ("size", "sha256", "git_sha1") if getattr(one, key) is not None}
        for name, one in sorted(record.files.items())
    }
    scratch = folder / f".{RECORD}.{os.getpid()}"
    scratch.write_text(json.dumps({"sources": record.sources, "files": files}, indent=1) + "\n", encoding="utf-8")
    os.replace(scratch, folder / RECORD)


def expected_files(folder: Path) -> dict[str, Expected | None]:
    """path below `folder` -> what is known of it: by the folder's record, else by the table of published files."""
    why = "; if it is another checkpoint on purpose, give its folder another name"
    table: dict[str, Expected | None] = {
        row.path: Expected(size=None if row.rounded else row.size, sha256=row.sha256, why=why)
        for row in published_files(folder.name)
        if row.path.endswith(TENSOR_SUFFIXES)  # texts are revised in place, and a hand-made copy may have the newer one
    }
    return table | read_record(folder).files


def problem_of(path: Path, expected: Expected | None, tick: Tick | None = None) -> str | None:
    """What is wrong with a file, as words that follow its name; None if nothing is.

    Without an `expected` it need only be there. All of it is read only if there is a `tick`.
    """
    if not path.is_file():
        return "is missing"
    if expected is None:
        return None
    size = path.stat().st_size
    if expected.size not in (None, size):
        return f"has {size:,} bytes, expected {expected.size:,}{expected.why}"
    problem = _header_problem(path) if path.suffix == ".safetensors" else None
    return problem or (_hash_problem(path, expected, tick) if tick else None)


def hash_of(path: Path, name: str, tick: Tick | None = None) -> str:
    """A file's "sha256", or "git_sha1": that of the blob which git would make of it."""
    digest = hashlib.sha256() if name == "sha256" else hashlib.sha1(f"blob {path.stat().st_size}\0".encode())
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            if tick:
                tick(len(chunk))
    return digest.hexdigest()


def _hash_problem(path: Path, expected: Expected, tick: Tick) -> str | None:
    for name, known in (("sha256", expected.sha256), ("git_sha1", expected.git_sha1)):
        if known is not None and (found := hash_of(path, name, tick)) != known:
            return f"has {name} {found[:16]}..., expected {known[:16]}...: delete it and fetch it again{expected.why}"
    return None


def _header_problem(path: Path) -> str | None:
    """What the header of a safetensors file says against the file: 8 bytes of length, JSON, and then the tensors to the end."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        if start == b"version ":  # "version https://git-lfs...", which is what a clone without git-lfs leaves
            return "is a git-lfs pointer, not the file itself"
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > _MAX_HEADER_BYTES:
            return f"is no safetensors file: {size:,} bytes without a header"
        header = file.read(length)
    if len(header) < length:
        return f"is cut off: {size:,} bytes end within its header"
    try:
        ends = [entry["data_offsets"][1] for name, entry in json.loads(header).items() if name != "__metadata__"]
        whole = 8 + length + max(ends, default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return "has a damaged safetensors header"
    return None if size == whole else f"has {size:,} bytes, its safetensors header says {whole:,}"


def readable_size(num_bytes: int) -> str:
    """A size to read, as the hub writes it: powers of 1000."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.{1 if num_bytes < 100 * factor else 0}f} {unit}"
    return f"{num_bytes} B"
