"""First frames, read by a thread while a video is denoised: what may come next is in memory when it does."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from ipt2v import hdf5
from ipt2v.records import FirstFrame
from ipt2v.work import Work

_reader: Callable[[], ThreadPoolExecutor] = partial(ThreadPoolExecutor, max_workers=1, thread_name_prefix="first-frames")


@dataclass(slots=True, kw_only=True)
class FirstFrames:
    """The first frame that was asked for last."""

    work: Work
    _thread: ThreadPoolExecutor = field(default_factory=_reader)
    _last: tuple[tuple[str, int], Future[FirstFrame]] | None = None

    def fetch(self, key: str, shard: int) -> Future[FirstFrame]:
        """Have it read, unless it is the last one."""
        if self._last is None or self._last[0] != (key, shard):
            reading = self._thread.submit(self.work.load, hdf5.load_first_frame, "first_frame", key, shard)
            self._last = ((key, shard), reading)
        return self._last[1]

    def get(self, key: str, shard: int) -> FirstFrame:
        """Raises UnreadableError if its record is damaged."""
        return self.fetch(key, shard).result()
