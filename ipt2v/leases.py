"""Who works on what, among processes that share nothing but a folder: a lease is a file, kept fresh while its holder lives.

Taken by link(2), which fails if the name is there, on NFS too; renewed by touching it; free again when nobody has touched it
for `seconds`. Two holders are possible for a moment when one was thought dead: what they make must be equal and written
atomically. Knows nothing of what is leased.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

# NFS may show a file's time up to a minute late (acregmax): a lease that is renewed every 45 s must not look dead by then.
LEASE_SECONDS = 180.0
RENEWALS = 4  # of a lease, in the time after which it would be free

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Leases:
    """The leases in one folder, as seen by one owner. Names may have slashes."""

    folder: Path
    owner: str  # the same after a restart: it takes its own leases back at once
    seconds: float = LEASE_SECONDS
    held: set[str] = field(default_factory=set)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.lease"

    def take(self, name: str) -> bool:
        """Whether the lease is ours from now on. False if somebody else who lives has it, or we have it already."""
        if name in self.held:
            return False
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
        mine.write_text(self.owner, encoding="utf-8")
        try:
            taken = _link(mine, path) or (self._bury(path, mine.stat().st_mtime) and _link(mine, path))
        finally:
            mine.unlink()
        if taken:
            self.held.add(name)
        return taken

    def drop(self, name: str) -> None:
        """Give a lease of ours back."""
        self.held.discard(name)
        with contextlib.suppress(OSError):
            if self.path(name).read_text(encoding="utf-8") == self.owner:
                self.path(name).unlink()

    def renew(self) -> None:
        """Touch all that we hold. One that is gone, or another's by now, is not ours any more."""
        for name in tuple(self.held):
            try:
                if self.path(name).read_text(encoding="utf-8") != self.owner:
                    raise FileNotFoundError
                os.utime(self.path(name))
            except FileNotFoundError:
                self.held.discard(name)
                log.warning("lease of %s lost to another element, which took this one for dead; what both make is equal", name)
            except OSError as error:
                log.warning("lease of %s not renewed: %s", name, error)

    def _bury(self, path: Path, now: float) -> bool:
        """Take away a lease that is free: our own from an earlier life, or one that was left. `now` by the files' own clock."""
        try:
            seen, owner = path.stat(), path.read_text(encoding="utf-8")
            if owner != self.owner and now - seen.st_mtime < self.seconds:
                return False
            grave = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
            os.rename(path, grave)
        except FileNotFoundError:
            return True  # given back meanwhile
        found = grave.stat()
        if (found.st_ino, found.st_mtime_ns) != (seen.st_ino, seen.st_mtime_ns):  # a faster one's lease: he gets it back
            _link(grave, path)
            grave.unlink()
            return False
        grave.unlink()
        return True


def free_leases(folder: Path, owners: Collection[str]) -> None:
    """Take away every lease but those of `owners`: the others are known to be dead, so nobody need wait until it shows."""
    for path in folder.rglob("*.lease"):
        with contextlib.suppress(OSError):
            if path.read_text(encoding="utf-8") not in owners:
                path.unlink()


def is_held(folder: Path, name: str, seconds: float = LEASE_SECONDS) -> bool:
    """Whether somebody seems to be at work on it. By this machine's clock, which may differ a little from the files'."""
    try:
        return time.time() - (folder / f"{name}.lease").stat().st_mtime < seconds
    except FileNotFoundError:
        return False


@contextmanager
def leases(folder: Path, owner: str, seconds: float = LEASE_SECONDS) -> Iterator[Leases]:
    """Leases that a thread renews; all are given back when the block ends, however it ends."""
    mine, ended = Leases(folder=folder, owner=owner, seconds=seconds), threading.Event()

    def renew() -> None:
        while not ended.wait(seconds / RENEWALS):
            mine.renew()

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield mine
    finally:
        ended.set()
        thread.join()
        for name in tuple(mine.held):
            mine.drop(name)


def _link(source: Path, path: Path) -> bool:
    """Whether `path` is now the file; False if there is one already."""
    try:
        os.link(source, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        return _create(source, path)  # a file system without links
    return True


def _create(source: Path, path: Path) -> bool:
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError:
        return False
    return True
