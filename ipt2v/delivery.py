"""Delivered videos: who decodes which, and a process that writes the MP4s while the next video is denoised.

Knows nothing of torch, models or run folders; the process imports what writes an MP4, numpy and no more.
"""

from __future__ import annotations

import errno
import importlib
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ipt2v.records import Video

# Videos of a rank that wait for its encoder, beyond the one that it works on: each is all its frames, 97 MB at 480p.
MAX_WAITING = 2
# What an encoder may take to finish its video when the run breaks off; 480p takes about 15 s.
LAST_VIDEO_SECONDS = 60

# (path, frames [T,H,W,3] uint8 RGB, fps=, ...) writes an MP4; the process finds it by its name, so it must be importable
Write = Callable[..., None]

_MAX_MESSAGE = 2**16  # bytes; a longer one would be cut off
_MAX_REASON = 2000
# Sent by terminals and schedulers to whole process groups: the rank decides what becomes of the run, not its encoder.
_SIGNALS_OF_THE_RANK = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def turns(keys: Sequence[str], num_ranks: int) -> dict[str, tuple[str, ...]]:
    """After which video which are decoded, the r-th of them by rank r: after every `num_ranks`, and the rest after the last."""
    batches = [tuple(keys[start : start + num_ranks]) for start in range(0, len(keys), num_ranks)]
    return {batch[-1]: batch for batch in batches}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One MP4 to write. The frames come beside it, as the descriptor of the memory that holds them."""

    key: str
    path: str
    shape_THWC: tuple[int, ...]
    fps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reply:
    """What became of a job."""

    key: str
    reason: str = ""  # why there is no MP4; empty if there is one
    number: int = 0  # errno, if the system refused it


@dataclass(frozen=True, slots=True, kw_only=True)
class Encoder:
    """The process that writes the MP4s of one rank, one after the other."""

    process: subprocess.Popen[bytes]
    channel: socket.socket
    keys: deque[str] = field(default_factory=deque)  # handed over and not yet answered, in order

    def hand_over(self, video: Video, path: Path) -> None:
        """Have the video written; waits while MAX_WAITING others wait. Raises OSError if an earlier one could not be."""
        self._hear(MAX_WAITING)
        frames = video.frames_THWC
        job = _Job(key=video.key, path=str(path), shape_THWC=frames.shape, fps=video.fps)
        self.keys.append(video.key)
        with _shared(frames) as descriptor:
            try:
                socket.send_fds(self.channel, [_packed(asdict(job))], [descriptor])
            except (BrokenPipeError, ConnectionResetError):
                self._hear(0)  # raises: what it said last, or that it is gone

    def drain(self) -> None:
        """Return when all MP4s are written. Raises OSError, naming the video, if one could not be."""
        self._hear(0)

    def _hear(self, num_left: int) -> None:
        """Take the answers that are there, and wait until no more than `num_left` are due."""
        while self.keys and (len(self.keys) > num_left or _events(self.channel)):
            message = _receive(self.channel)
            if not message:
                raise self._death()
            reply = _Reply(**json.loads(message))
            self.keys.remove(reply.key)
            if reply.number:
                raise OSError(reply.number, f"{reply.key}: {reply.reason}")
            if reply.reason:
                raise ChildProcessError(f"{reply.key}: no MP4 written: {reply.reason}; its latents are kept")

    def _death(self) -> ChildProcessError:
        code = self.process.wait(LAST_VIDEO_SECONDS)
        ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return ChildProcessError(f"{self.keys[0]}: the process that writes its MP4 {ended}; submit again, its latents are kept")


@contextmanager
def background_encoder(write: Write, **settings: float) -> Iterator[Encoder]:
    """A process that calls `write` with `settings` for each video handed over; all are written when the block ends well.

    When it does not, the MP4 in work is finished and those that wait are dropped: the next run decodes them again.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = _start(theirs.fileno())
    try:
        ours.send(_packed({"module": write.__module__, "name": write.__name__, "settings": settings}))
        encoder = Encoder(process=process, channel=ours)
        yield encoder
        encoder.drain()
    finally:
        ours.close()
        try:
            process.wait(LAST_VIDEO_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _start(descriptor: int) -> subprocess.Popen[bytes]:
    """A fresh interpreter: a fork would take along CUDA's and NCCL's state, which does not survive it.

    Not multiprocessing's spawn, which runs the caller's main module again and keeps a second process to track names.
    """
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    # -P: what lies in the working directory is imported only where it is for the rank
    command = [sys.executable, "-P", "-c", f"from ipt2v.delivery import serve; serve({descriptor})"]
    # The mask is inherited, so that there is no moment in which a signal ends the process.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS_OF_THE_RANK)
    try:
        return subprocess.Popen(
            command, pass_fds=[descriptor], stdin=subprocess.DEVNULL, env=os.environ | {"PYTHONPATH": paths}
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def serve(descriptor: int) -> None:
    """The encoder's side: write what comes until nobody is there any more."""
    with socket.socket(fileno=descriptor) as channel:
        write, message = None, _receive(channel)
        if message:
            told = json.loads(message)
            write = partial(getattr(importlib.import_module(told["module"]), told["name"]), **told["settings"])
        # When the rank has hung up, jobs may still wait: they are dropped, nobody would hear how they went.
        while write is not None and not _events(channel) & select.POLLHUP:
            try:
                message, descriptors, _, _ = socket.recv_fds(channel, _MAX_MESSAGE, 1)
                if not message:
                    return
                reply = _encode(write, _Job(**json.loads(message)), descriptors[0])
                channel.send(_packed(asdict(reply)))
            except ConnectionError:  # the rank is dead; a traceback here would be the last word in its log
                return


def _encode(write: Write, job: _Job, descriptor: int) -> _Reply:
    frames_THWC = _mapped(descriptor, job.shape_THWC)
    os.close(descriptor)
    try:
        write(Path(job.path), frames_THWC, fps=job.fps)
    except Exception as error:  # told to the rank, which raises it
        if isinstance(error, OSError) and (error.errno or 0) in errno.errorcode:  # FFmpeg's have numbers of their own
            place = f": {error.filename}" if error.filename else ""
            return _Reply(key=job.key, reason=f"{error.strerror}{place}", number=error.errno or 0)
        text = " ".join(str(error).split())[:_MAX_REASON]
        return _Reply(key=job.key, reason=f"{type(error).__name__}: {text}")
    return _Reply(key=job.key)


@contextmanager
def _shared(frames: NDArray[np.uint8]) -> Iterator[int]:
    """A descriptor of memory that holds the frames.

    It has no name, so that it is gone with the last process that holds it, however that ends; nor is it in /dev/shm, which
    containers keep small.
    """
    descriptor = os.memfd_create("ipt2v-frames")
    try:
        os.ftruncate(descriptor, frames.nbytes)
        np.copyto(_mapped(descriptor, frames.shape), frames, casting="no")
        yield descriptor
    finally:
        os.close(descriptor)


def _mapped(descriptor: int, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The memory as an array, which owns the mapping. The descriptor is not needed any more."""
    return np.frombuffer(mmap.mmap(descriptor, 0), dtype=np.uint8).reshape(shape)


def _packed(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode()


def _receive(channel: socket.socket) -> bytes:
    """The next message; empty if the other end is gone."""
    while True:
        try:
            return channel.recv(_MAX_MESSAGE)
        except ConnectionResetError:  # said once, before what the other end has still sent
            continue


def _events(channel: socket.socket) -> int:
    """What there is to read without waiting: POLLIN, POLLHUP or 0."""
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    return sum(event for _, event in poll.poll(0))
