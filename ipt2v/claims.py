"""What an element of array 2 makes next: items that are ready and that nobody is at work on. Rank 0 decides for all.

An item is claimed by a lease, so that elements never make the same one at the same time. Its own shard comes first; then what
the elements of other shards have not come to, so that no GPU is idle while there is work.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field

from ipt2v import hdf5
from ipt2v.first_frames import FirstFrames
from ipt2v.leases import Leases
from ipt2v.models.vace.position import Position
from ipt2v.parallel import Group
from ipt2v.position_file import load_position
from ipt2v.records import Failure
from ipt2v.run_dir import seal_shard
from ipt2v.watch import seconds_left
from ipt2v.work import Work

MAX_CRASHES = 3  # of elements while they made an item: then it counts as failed
DELIVERY_SECONDS = 60.0  # for decoding the last videos and writing their MP4s, before the scheduler ends the element

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """An item that this element is to make, and how far somebody has come with it."""

    key: str
    shard: int
    position: Position | None
    seconds: float  # spent up to the position
    upcoming: tuple[str, int] | None  # key and shard of what may be next, to be read meanwhile


@dataclass(slots=True, kw_only=True)
class Claims:
    """What is there to make for this element, as rank 0 sees it."""

    work: Work
    leases: Leases
    took: list[float] = field(default_factory=list)  # seconds of each video of this element
    shards: list[int] = field(default_factory=list)  # from which something was taken
    out_of_time: bool = False
    first_frames: FirstFrames = field(init=False)

    def __post_init__(self) -> None:
        self.first_frames = FirstFrames(work=self.work)

    def undecoded(self) -> tuple[str, ...]:
        """The keys of the own shard that have latents but no MP4, and nobody at work on it."""
        work, keys = self.work, self.work.keys
        delivered = work.run.done("video", work.shard, keys)
        recorded = work.recorded("video", keys)
        return tuple(key for key in keys if key in recorded - delivered and self.leases.take(key))

    def videos(self) -> Iterator[Claim]:
        """One item after the other, each ours until its MP4 is there."""
        num_shards, own = self.work.environment.num_shards, self.work.shard
        for shard in [own, *((own + offset) % num_shards for offset in range(1, num_shards))]:
            keys = videos_to_make(self.work) if shard == own else self._left_by_others(shard)
            for key, after in zip(keys, (*keys[1:], None), strict=False):
                self._drop_delivered()
                if not self._take(key, shard):
                    continue
                # the first is begun however late it is: what is saved of it brings the run forward
                if self.took and seconds_left() < DELIVERY_SECONDS + statistics.median(self.took):
                    self.leases.drop(key)
                    self.out_of_time = True
                    return
                yield self._claim(key, shard, None if after is None else (after, shard))

    def _left_by_others(self, shard: int) -> tuple[str, ...]:
        """What another element has not come to; from the end, where it is last. What has crashed one is left to its own."""
        run, keys = self.work.run, self.work.run.shard_keys(shard)
        try:
            over = run.recorded("video", shard, keys) | run.failed("video", keys)
            ready = run.recorded("first_frame", shard, keys) - over
        except hdf5.UnreadableError as error:
            log.warning("%s; left to shard %d", error, shard)
            return ()
        return tuple(key for key in reversed(keys) if key in ready and not run.crashes(key))

    def _take(self, key: str, shard: int) -> bool:
        if not self.leases.take(key):
            return False
        run = self.work.run
        if self._is_over(key, shard) or not self._opens(key, shard):  # somebody was faster; or nobody can make it
            self.leases.drop(key)
            return False
        crashes = run.crashes(key)
        if len(crashes) >= MAX_CRASHES:
            run.save_failure(Failure(key=key, stage="video", reason=f"{len(crashes)} elements crashed in it: {crashes[-1]}"))
            self.leases.drop(key)
            return False
        return True

    def _is_over(self, key: str, shard: int) -> bool:
        return key in self.work.run.recorded("video", shard, [key]) | self.work.run.failed("video", [key])

    def _opens(self, key: str, shard: int) -> bool:
        """Whether the first frame can be read. If not, the item has failed; another shard's own element will see to that."""
        try:
            self.first_frames.get(key, shard)
        except hdf5.UnreadableError as error:
            if shard == self.work.shard:
                self.work.run.save_failure(Failure(key=key, stage="video", reason=str(error)))
            log.warning("%s; %s", error, "failed" if shard == self.work.shard else f"left to shard {shard}")
            return False
        return True

    def _claim(self, key: str, shard: int, upcoming: tuple[str, int] | None) -> Claim:
        found = load_position(self.work.run.position_path(key), key=key, run_digest=self.work.environment.run_digest)
        position, seconds = found if found is not None and self.work.config.video.save_every_steps else (None, 0.0)
        if position is not None:
            log.info("video %s goes on after step %d of %d", key, position.num_done, position.num_steps)
        if shard not in self.shards:
            self.shards.append(shard)
            if shard != self.work.shard:
                log.info("video shard %d is taken: now what is left of shard %d", self.work.shard, shard)
        return Claim(key=key, shard=shard, position=position, seconds=seconds, upcoming=upcoming)

    def seal(self) -> None:
        """Seal each shard that we have worked on and that is whole; of two elements that could, one does."""
        run = self.work.run
        for shard in {self.work.shard, *self.shards}:
            keys, lease = run.shard_keys(shard), f"seal-{shard:03d}"
            whole = len(run.recorded("video", shard, keys) | self._failed(keys)) == len(keys)
            if whole and self.leases.take(lease):
                seal_shard(run, "video", shard, keys)
                self.leases.drop(lease)
                for key in keys:  # who was killed has left some
                    if run.mp4_path(key).exists():
                        self.leases.path(key).unlink(missing_ok=True)

    def _failed(self, keys: tuple[str, ...]) -> set[str]:
        return self.work.run.failed("first_frame", keys) | self.work.run.failed("video", keys)

    def _drop_delivered(self) -> None:
        for key in tuple(self.leases.held):
            if self.work.run.mp4_path(key).exists():
                self.leases.drop(key)


def videos_to_make(work: Work) -> tuple[str, ...]:
    """Keys of the work's shard without latents. Raises ValueError if array 1 is not done with the shard."""
    keys = work.keys
    first_frames, failed = work.recorded("first_frame", keys), work.run.failed("first_frame", keys)
    early = [key for key in keys if key not in first_frames | failed]
    if early:
        raise ValueError(
            f"video shard {work.shard}: {len(early)} of {len(keys)} first frames are missing ({early[0]}, ...); "
            f"first run `python -m ipt2v {work.run.root} first_frame {work.shard}`"
        )
    over = work.recorded("video", keys) | work.run.failed("video", keys)
    return tuple(key for key in keys if key in first_frames - over)


def agreed(claims: Iterator[Claim] | None, group: Group) -> Iterator[Claim]:
    """Rank 0's claims, on every rank: another rank may already see a new file and skip it, and the group would hang."""
    while (claim := group.from_first(None if claims is None else next(claims, None))) is not None:
        yield claim
