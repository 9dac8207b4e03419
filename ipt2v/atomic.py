"""Files that are either whole under their final name or not there; knows nothing of what is in them."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch path beside `path`, renamed to it when the block ends well, removed when it does not.

    fsync of the file before the rename and of the folder after it: without the second a power cut may forget the rename
    (Pillai et al., OSDI'14). The scratch name starts with a dot and carries the pid, so that writers never share it and no
    reader takes it for a record. Raises OSError (ENOSPC, ...) as it comes; nothing is then left under the final name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield scratch
        _fsync(scratch)
        os.replace(scratch, path)
        _fsync(path.parent)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
