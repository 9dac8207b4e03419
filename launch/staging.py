"""Weights on a node's own disk: one rank copies what a stage loads, all ranks of the node read it there.

Must not know a scheduler, or what is in the files: the catalogue lists them, the caller names the array element.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import random
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from ipt2v.models.catalogue import stage_files
from ipt2v.run_dir import RunDir

log = logging.getLogger(__name__)

LOCK = ".lock"
_UNMAPPED_UID = 65534  # how root's files look inside a container without root: user_namespaces(7)

Files = Mapping[str, os.stat_result]  # path below the folder of weights -> the shared file, before anything is copied


def weights_on_node(run: RunDir, stage: str, local_weights_dir: str, *, element: str, speaks: bool) -> Path:
    """The folder that this rank is to read weights from: a copy on the node's own disk, or the run's own if that cannot be.

    To be called on every rank. The first of a node to come copies what is missing, the others wait and find it done. A copy
    that cannot be made costs a warning, never the run: from the rank that tried, or, where all find the same, from those with
    `speaks`. `element` names the array element and its start: what one of its ranks has found impossible on a node the next
    ones do not try again. Ranks of different nodes may read from different folders: equal bytes, so equal results.
    Raises ValueError if this is no run folder or its settings were changed.
    """
    source, config = Path(run.environment().weights_dir), run.config()
    try:
        files = {name: (source / name).stat() for name in stage_files(stage, source, config)}
        folder = own_folder(local_weights_dir, source)
        return folder if _fill(folder, source, files, element) else source
    except (OSError, ValueError) as error:
        if speaks:
            _warn(error, source)
        return source


def own_folder(local_weights_dir: str, source: Path) -> Path:
    """The folder on this node for copies from `source`, made if it is not there; nobody else may write to it.

    Raises ValueError if a variable in the name is not set here, or a folder on the way belongs to another user: in a shared
    /tmp anybody may have planted it, or a symlink, to have us read weights of his. Raises OSError if it cannot be made.
    """
    expanded = os.path.expandvars(local_weights_dir)
    if "$" in expanded or not os.path.isabs(expanded):
        raise ValueError(
            f"{local_weights_dir} is {expanded!r} on {socket.gethostname()}, expected an absolute path; is the variable set?"
        )
    parent = Path(os.path.abspath(expanded))
    # of the real path: a link to the newest of several folders of weights is another source once it is moved on
    digest = hashlib.sha256(os.path.realpath(source).encode()).hexdigest()[:12]
    folder = parent / f"ipt2v-{os.getuid()}-{digest}"
    _refuse_foreign(parent)
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with suppress(FileExistsError):  # another rank was first, or it is from an earlier job
        folder.mkdir(mode=0o700)
    _refuse_foreign(folder)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ValueError(
            f"{folder} is {stat.filemode(found.st_mode)} of uid {found.st_uid}, expected a folder of uid "
            f"{os.getuid()} that nobody else may write to; remove it, or name another"
        )
    return folder


def order_on(host: str, names: Iterable[str]) -> list[str]:
    """The names in an order that is this host's own.

    Many nodes start at the same moment. In one order for all they would all read the same file, which lies on a few of the
    shared file system's servers, while the others have nothing to do.
    """
    shuffled = sorted(names)
    random.Random(host).shuffle(shuffled)
    return shuffled


def _refuse_foreign(folder: Path) -> None:
    """Raise ValueError if the folder or one above it, links included, belongs to another user than us and root."""
    for path in (*reversed(folder.parents), folder):
        if os.path.lexists(path) and (owner := path.lstat().st_uid) not in (os.getuid(), 0, _UNMAPPED_UID):
            raise ValueError(f"{path} belongs to uid {owner}, expected uid {os.getuid()} or root; name a folder of your own")


def _fill(folder: Path, source: Path, files: Files, element: str) -> bool:
    """Whether the folder holds all files, copied now or found there. Raises OSError if there are no locks on this disk."""
    with (folder / LOCK).open("ab+", buffering=0) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel gives it back when the copier dies
        lock.seek(0)
        # the lock file lists the elements that do without: the ranks of a node would else fill the disk one after the other
        if element.encode() in lock.read().splitlines():
            return False
        try:
            _copy_missing(folder, source, files)
        except OSError as error:
            _warn(error, source)
            with suppress(OSError):  # the disk may be full to the last byte
                lock.write(f"{element}\n".encode())
            return False
        return True


def _copy_missing(folder: Path, source: Path, files: Files) -> None:
    """Copy what is not there as it is in the source; to be called with the lock. Raises OSError if not all can be copied."""
    _drop_strangers(folder, source)
    missing = [name for name, shared in files.items() if not _is_copy(folder / name, shared)]
    if not missing:
        return
    needed_gb, free_gb = sum(files[name].st_size for name in missing) / 1e9, shutil.disk_usage(folder).free / 1e9
    if needed_gb > free_gb:
        raise OSError(f"{folder} has {free_gb:.3g} GB free, {needed_gb:.3g} GB are needed")
    start = time.monotonic()
    for name in order_on(socket.gethostname(), missing):
        _copy(source / name, folder / name, files[name])
    seconds = time.monotonic() - start
    speed = needed_gb / max(seconds, 1e-9)
    log.info("%d files of weights, %.3g GB, in %.1f s, %.2g GB/s to %s", len(missing), needed_gb, seconds, speed, folder)


def _drop_strangers(folder: Path, source: Path) -> None:
    """Remove what the source does not have: parts of a killed copier, files since taken out of it, which a loader might prefer.

    Links too, so that none leads out of the folder. What another stage or run has copied from the same source stays.
    """
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder before the folder
        is_link = path.is_symlink()
        if path != folder / LOCK and (is_link or not (source / path.relative_to(folder)).exists()):
            path.rmdir() if path.is_dir() and not is_link else path.unlink()


def _is_copy(path: Path, shared: os.stat_result) -> bool:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(found.st_mode) and (found.st_size, found.st_mtime_ns) == (shared.st_size, shared.st_mtime_ns)


def _copy(source: Path, target: Path, shared: os.stat_result) -> None:
    """Copy one file; under its final name it is whole. No fsync: after a power cut its size or its time would be wrong."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    try:
        shutil.copyfile(source, part)  # inside the kernel, by sendfile
        # read now: some sites delete from local disks what nobody has read for days
        os.utime(part, ns=(time.time_ns(), shared.st_mtime_ns))
        if not _is_copy(part, shared):
            raise OSError(
                f"{source}: its copy differs in size or time; it was changed meanwhile, or the disk keeps no such times"
            )
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _warn(error: Exception, source: Path) -> None:
    log.warning("local_weights_dir: %s; weights are read from %s", error, source)
