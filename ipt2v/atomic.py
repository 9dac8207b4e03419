"""Files that are either whole under their final name or not there; knows nothing of what is in them."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch path beside `path`, renamed to it when the block ends well, removed when it does not.

    fsync of the file before the rename and of the folder after it: without the second a power cut may forget the rename
    (Pillai et al., OSDI'14). The scratch name starts with a dot and carries the pid, so that writers never share it and no
    reader takes it for a record. Raises OSError, in one line, if the disk or a quota is full; any other error as it comes.
    Nothing new is then under the final name.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield scratch
            fsync(scratch)
            os.replace(scratch, path)
            fsync(path.parent)
        finally:
            scratch.unlink(missing_ok=True)
    except Exception as error:  # h5py and PyAV have their own, with a page of text
        if not _is_disk_full(error):
            raise
        raise OSError(errno.ENOSPC, f"{path}: disk full; free space and submit again, finished items are kept") from error


def write_text(path: Path, text: str) -> None:
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def fsync(path: Path) -> None:
    """Until what is in the file, or in the folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether the error, or one that it came from, says that the disk or a quota is full."""
    while error is not None:
        # h5py says it in its text alone when a file fails to close
        if getattr(error, "errno", None) in _DISK_FULL or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
