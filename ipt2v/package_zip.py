"""Files -> a ZIP that is the same to the byte each time: stored, in the order given, one date, one mode. Streamed.

Knows nothing of runs or videos.
"""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ipt2v.atomic import replacing

EPOCH = (1980, 1, 1, 0, 0, 0)  # zip's earliest; a fixed time makes equal videos equal archives
MODE = 0o100644 << 16  # a file that all may read
UNIX = 3
COPY_BYTES = 2**20
ENTRY_BYTES = 200  # of headers around a file, at most, besides twice its name
END_BYTES = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """A file to pack, as it was when it was checked."""

    name: str
    path: Path
    sha256: str
    num_bytes: int

    @property
    def packed_bytes(self) -> int:
        """Of the archive that it takes, at most."""
        return self.num_bytes + ENTRY_BYTES + 2 * len(self.name.encode())


def packed_bytes(members: Iterable[Member]) -> int:
    """Size of an archive, at most."""
    return END_BYTES + sum(member.packed_bytes for member in members)


def split(members: Sequence[Member], max_bytes: int | None) -> list[list[Member]]:
    """The members in their order, in as many archives as it takes. Raises ValueError if one alone is too large."""
    parts: list[list[Member]] = [[]]
    for member in members:
        if max_bytes is not None and packed_bytes([member]) > max_bytes:
            raise ValueError(f"{member.path}: {member.num_bytes} bytes do not fit in an archive of at most {max_bytes}")
        if max_bytes is not None and packed_bytes([*parts[-1], member]) > max_bytes:
            parts.append([])
        parts[-1].append(member)
    return parts


def check_space(folder: Path, num_bytes: int) -> None:
    """Raise ValueError unless the disk has room for so many bytes."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ValueError(f"{folder}: the package takes {num_bytes / 1e9:.2f} GB, but the disk has {free / 1e9:.2f} GB free")


def write_zip(path: Path, members: Sequence[Member]) -> str:
    """Write the archive, whole or not at all; its SHA-256. Raises ValueError if a file is no longer as it was checked."""
    with replacing(path) as scratch:
        with zipfile.ZipFile(scratch, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:  # stored: H.264 does not deflate
            for member in members:
                _add(archive, member)
        return sha256_of(scratch)


def _add(archive: zipfile.ZipFile, member: Member) -> None:
    entry = zipfile.ZipInfo(member.name, EPOCH)
    entry.create_system, entry.external_attr, entry.file_size = UNIX, MODE, member.num_bytes
    hasher = hashlib.sha256()
    with member.path.open("rb") as source, archive.open(entry, "w", force_zip64=member.num_bytes >= 2**31) as target:
        while block := source.read(COPY_BYTES):
            hasher.update(block)
            target.write(block)
    if hasher.hexdigest() != member.sha256:
        raise ValueError(f"{member.path}: has been changed since it was checked; package again when nobody writes to the run")


def sha256_of(path: Path) -> str:
    """64 hex digits of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
