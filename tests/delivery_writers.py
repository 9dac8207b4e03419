"""Stand-ins for write_mp4 that test_delivery.py hands to the encoder's process, which imports this file and what it imports."""

from __future__ import annotations

import errno
import sys
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ipt2v.mp4 import write_mp4


def write_bytes(path: Path, frames_THWC: NDArray[np.uint8], *, fps: int) -> None:
    path.write_bytes(bytes([fps]) + frames_THWC.tobytes())


def write_modules(path: Path, frames_THWC: NDArray[np.uint8], *, fps: int) -> None:
    write_mp4(path, frames_THWC, fps=fps, crf=18)
    path.with_suffix(".modules").write_text(" ".join(sorted(sys.modules)))


def write_when_told(path: Path, frames_THWC: NDArray[np.uint8], *, fps: int) -> None:
    """Says that it has begun, and waits for the file `go` beside the target."""
    path.with_suffix(".begun").touch()
    while not path.with_name("go").exists():
        time.sleep(0.01)
    write_bytes(path, frames_THWC, fps=fps)


def refuse_the_second(path: Path, frames_THWC: NDArray[np.uint8], *, fps: int) -> None:
    if path.stem == "2":
        raise ValueError("width is\n  odd")
    write_bytes(path, frames_THWC, fps=fps)


def find_the_disk_full(path: Path, frames_THWC: NDArray[np.uint8], *, fps: int) -> None:
    raise OSError(errno.ENOSPC, f"{path}: disk full; free space and submit again, finished items are kept")


def write_slowly(path: Path, frames_THWC: NDArray[np.uint8], *, fps: int, seconds: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    time.sleep(seconds)
    write_bytes(path, frames_THWC, fps=fps)
