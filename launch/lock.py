"""A lock of one run, so that two submitters, or a submitter and `cancel`, do not work on it at once."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from ipt2v.run_dir import RunDir

END_SECONDS = 30.0  # that a driver may take to end
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class Locked(ValueError):
    """Somebody else is at work on the run; `what` is what they have called, and `pid` their process on `host`."""

    def __init__(self, message: str, *, what: str, host: str, pid: str) -> None:
        super().__init__(message)
        self.what, self.host, self.pid = what, host, pid


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


def end_local_driver(run: RunDir, found: Locked) -> None:
    """End the process that makes a run's elements on one machine, if it is this one. Raises ValueError if it is not."""
    if found.host != socket.gethostname() or not found.pid.isdecimal():
        raise ValueError(
            f"{run.root}: `ipt2v {found.what}` runs on host {found.host}, not here; there: kill {found.pid}"
        ) from found
    with suppress(ProcessLookupError):
        os.kill(int(found.pid), signal.SIGTERM)  # not SIGINT: what a shell has started in the background ignores it
    deadline = time.monotonic() + END_SECONDS
    while time.monotonic() < deadline:
        with suppress(Locked), run_lock(run, "cancel"):
            return
        time.sleep(0.1)
    raise ValueError(f"{run.root}: process {found.pid} does not end; kill -9 {found.pid}, then cancel again") from found


def _lock(run: RunDir, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        said = _holder(run)
        who = "`ipt2v {what}` (host {host}, process {pid}, since {since})".format(**said) if said else "another submitter"
        message = f"{run.root}: {who} is at work on this run; wait until that has ended"
        raise Locked(message, **{name: said.get(name, "") for name in ("what", "host", "pid")}) from None
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
