"""A lock of one run, so that two submitters, or a submitter and `cancel`, do not work on it at once."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from ipt2v.run_dir import RunDir

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class Locked(ValueError):
    """Somebody else is at work on the run; `what` is what they have called."""

    def __init__(self, message: str, what: str) -> None:
        super().__init__(message)
        self.what = what


@contextmanager
def run_lock(run: RunDir, what: str) -> Iterator[None]:
    """Hold the lock of a run. The kernel frees it however its holder ends, kill -9 included.

    Raises Locked, with who holds it, if it is taken. On a file system without locks a note is all that happens.
    """
    descriptor = os.open(_path(run), os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(run, descriptor)
        holder = {"what": what, "host": socket.gethostname(), "pid": os.getpid()}
        holder["since"] = datetime.now().astimezone().isoformat(timespec="seconds")
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _lock(run: RunDir, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        said = _holder(run)
        who = "`ipt2v {what}` (host {host}, process {pid}, since {since})".format(**said) if said else "another submitter"
        raise Locked(f"{run.root}: {who} is at work on this run; wait until that has ended", said.get("what", "")) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        print(f"note: {_path(run)}: no locks on this file system; do not submit this run twice at once", file=sys.stderr)


def _path(run: RunDir) -> Path:
    path = run.root / "jobs" / ".submit.lock"
    path.parent.mkdir(exist_ok=True)
    return path


def _holder(run: RunDir) -> dict[str, str]:
    with suppress(OSError, ValueError):
        said = json.loads(_path(run).read_text(encoding="utf-8"))
        return {name: str(said.get(name, "?")) for name in ("what", "host", "pid", "since")}
    return {}  # it has only just taken the lock
