"""Reads many MP4s and record files to their last byte, in processes of their own, side by side.

In processes, because HDF5 can die of a damaged file (1 in 6,000 flipped bits) and takes its process with it. Knows no runs.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

from ipt2v import hdf5
from ipt2v.mp4 import Mp4Facts, examine_mp4

WAITING_PER_WORKER = 4

# (files that are read, of how many)
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class ToRead:
    """A file; with a run's digest one of records, without an MP4."""

    path: Path
    run_digest: str = ""


@dataclass(frozen=True, slots=True)
class Unreadable:
    """What is instead of facts where there are none."""

    problem: str


Read = Mp4Facts | dict[str, hdf5.Found] | Unreadable


def read_all(files: Sequence[ToRead], progress: Progress | None = None, num_workers: int = 0) -> dict[ToRead, Read]:
    """What is known of each file. As many processes as this one may use cores, if not told otherwise."""
    found: dict[ToRead, Read] = {}
    while left := [file for file in files if file not in found]:
        suspects: list[ToRead] = []
        for file, read in _read_by_pool(left, min(len(left), num_workers or len(os.sched_getaffinity(0))), suspects):
            found[file] = read
            if progress is not None:
                progress(len(found), len(files))
        for file in suspects:  # the process that read one of these has died
            found[file] = _read_alone(file)
    return found


def _read_by_pool(files: Sequence[ToRead], num_workers: int, suspects: list[ToRead]) -> Iterator[tuple[ToRead, Read]]:
    """Files as they are read, until all are, or a process dies: then those that were handed out are added to `suspects`."""
    coming, handed = iter(files), dict[Future[Read], ToRead]()
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("fork")) as pool:
        try:
            while True:
                while len(handed) < WAITING_PER_WORKER * num_workers and (file := next(coming, None)) is not None:
                    handed[pool.submit(_read, file)] = file
                if not handed:
                    return
                for future in wait(handed, return_when=FIRST_COMPLETED).done:
                    read = future.result()
                    yield handed.pop(future), read
        except BrokenProcessPool:
            suspects += handed.values() or files[:1]


def _read_alone(file: ToRead) -> Read:
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        try:
            return pool.submit(_read, file).result()
        except BrokenProcessPool:
            return Unreadable("not readable (so damaged that the process that reads it dies)")


def _read(file: ToRead) -> Read:
    try:
        return hdf5.check_file(file.path, run_digest=file.run_digest) if file.run_digest else examine_mp4(file.path)
    except (OSError, hdf5.UnreadableError) as error:
        return Unreadable(" ".join(str(error).replace(f"{file.path}: ", "").partition("; ")[0].split()))
