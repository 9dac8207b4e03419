"""Array 2's element: animate one claimed item after the other on all ranks, save how far each is, deliver it.

Denoising is what the GPUs are paid for: records are read and written by a thread, MP4s by a process, both meanwhile.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from ipt2v import hdf5
from ipt2v.claims import Claim, Claims, agreed
from ipt2v.delivery import Encoder, background_encoder, turns
from ipt2v.first_frames import FirstFrames
from ipt2v.leases import leases
from ipt2v.models.vace.position import Position
from ipt2v.mp4 import write_mp4
from ipt2v.parallel import Group, is_loss_of_a_rank
from ipt2v.position_file import save_position
from ipt2v.records import FirstFrame, Made, Video, VideoLatents
from ipt2v.run_dir import owner_of
from ipt2v.watch import beat, beating, on_interruption
from ipt2v.work import Work

if TYPE_CHECKING:
    from ipt2v.stages.rehearsal import RehearsalStage
    from ipt2v.stages.video import VideoStage

MAX_REASON = 500  # characters of an exception's text

log = logging.getLogger(__name__)


def make_videos(work: Work, group: Group) -> bool:
    """Make what is left, of this shard and then of others; seal what is whole. Whether time ran out before. On all ranks."""
    with ExitStack() as stack:
        claims = None
        if group.is_first:
            mine = stack.enter_context(leases(work.run.leases_path, owner_of(work.shard)))
            claims = Claims(work=work, leases=mine)
        undecoded = group.from_first(() if claims is None else claims.undecoded())
        claimed = agreed(None if claims is None else claims.videos(), group)
        first = next(claimed, None)
        if undecoded or first is not None:
            _load_and_deliver(work, group, undecoded, chain([] if first is None else [first], claimed), claims)
        if claims is None:
            return group.from_first(False)
        claims.seal()
        return group.from_first(claims.out_of_time)


def _load_and_deliver(
    work: Work, group: Group, undecoded: tuple[str, ...], claimed: Iterator[Claim], claims: Claims | None
) -> None:
    with background_encoder(write_mp4, crf=work.config.video.crf) as encoder, ThreadPoolExecutor(1) as files:
        stage = _load(work, group)
        life = group.from_first(uuid.uuid4().hex[:12])
        first_frames = FirstFrames(work=work) if claims is None else claims.first_frames
        delivery = Delivery(
            work=work, group=group, stage=stage, encoder=encoder, files=files, life=life, first_frames=first_frames
        )
        with on_interruption(delivery.steps.save):
            deliver(delivery, undecoded, claimed, claims)


def _load(work: Work, group: Group) -> VideoStage | RehearsalStage:
    if work.config.rehearsal.enabled:
        from ipt2v.stages.rehearsal import RehearsalStage

        return RehearsalStage(config=work.config, group=group)
    from ipt2v.models.quiet import quiet_libraries
    from ipt2v.stages import video

    quiet_libraries()
    return video.load(work.config, work.weights_dir, group)


@dataclass(slots=True, kw_only=True)
class Steps:
    """How far the video in work is. Rank 0 saves it, every few steps and when the scheduler warns."""

    work: Work
    is_first: bool
    files: ThreadPoolExecutor
    claim: Claim | None = None
    started: float = 0.0
    last: Position | None = None
    saving: Future[None] | None = None

    def begin(self, claim: Claim) -> None:
        self.claim, self.started, self.last = claim, time.monotonic() - claim.seconds, None

    def note(self, position: Position) -> None:
        beat()
        every, settings = self.work.config.video.save_every_steps, self.work.config.video
        # What a step cache has kept is on each rank alone: such a video starts again at step 0.
        if not self.is_first or not every or settings.step_cache.threshold:
            return
        self.last = position if position.num_done < position.num_steps else None
        busy = self.saving is not None and not self.saving.done()
        if self.last is not None and position.num_done % every == 0 and not busy:
            self.saving = self.files.submit(self.save)

    def save(self) -> None:
        """Write down where the video is. Losing this costs steps, no video: so it never raises."""
        claim, position = self.claim, self.last
        if claim is None or position is None:
            return
        path, digest = self.work.run.position_path(claim.key), self.work.environment.run_digest
        try:
            seconds = time.monotonic() - self.started
            save_position(path, position, key=claim.key, run_digest=digest, seconds=seconds)
        except OSError as error:
            log.warning("video %s: step %d not saved: %s", claim.key, position.num_done, error)

    def counted(self, made: Made[VideoLatents]) -> Made[VideoLatents]:
        """What was made, with the seconds that others have spent on it."""
        return made if self.claim is None else replace(made, seconds=made.seconds + self.claim.seconds)


@dataclass(slots=True, kw_only=True)
class Delivery:
    """What turns first frames into latents and latents into MP4s, on one of the ranks."""

    work: Work
    group: Group
    stage: VideoStage | RehearsalStage
    encoder: Encoder
    files: ThreadPoolExecutor  # one thread that writes records while a video is denoised
    first_frames: FirstFrames
    life: str = ""  # the same on all ranks, another after each start of the element
    steps: Steps = field(init=False)
    due: list[Callable[[], None]] = field(default_factory=list)  # what is to be written once the GPUs are at work again
    writes: list[Future[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.steps = Steps(work=self.work, is_first=self.group.is_first, files=self.files)

    def own(self, batch: Sequence[Any]) -> Sequence[Any]:
        """What of a batch this rank decodes, if there is one for it."""
        return batch[self.group.rank : self.group.rank + 1]

    def decode(self, records: Iterable[VideoLatents]) -> list[Video]:
        """The videos of this rank, when everything that was recorded so far is on the disk: no MP4 comes before its latents."""
        self.start_writes()
        videos = [self.stage.decode(latents) for latents in beating(records)]
        self.settle()
        return videos

    def starts(self, claimed: Iterable[Claim]) -> Iterator[tuple[FirstFrame, Position | None]]:
        """Each claim's first frame, read while the video before it was denoised."""
        for claim in claimed:
            self.steps.begin(claim)
            yield self.first_frames.get(claim.key, claim.shard), claim.position

    def note(self, position: Position) -> None:
        """A step of the video in work is done. Files are written and read now: between videos, all ranks would wait for it."""
        self.steps.note(position)
        self.start_writes()
        upcoming = None if self.steps.claim is None else self.steps.claim.upcoming
        if upcoming is not None:
            self.first_frames.fetch(*upcoming)

    def settle(self) -> None:
        """Wait until all records are written. Raises what one has raised, or an MP4 that could not be written."""
        self.start_writes()
        while self.writes:
            self.writes.pop(0).result()

    def write(self, act: Callable[..., None], *values: Any) -> None:
        """Have something written during the next video; settle() tells how it went, at the next turn, where all hear of it."""
        self.due.append(partial(act, *values))

    def start_writes(self) -> None:
        """Have the thread write what is due; it does so even if the element ends by an exception."""
        self.writes += map(self.files.submit, self.due)
        self.due.clear()

    def hand_over(self, video: Video) -> None:
        self.write(self._hand_over, video)

    def _hand_over(self, video: Video) -> None:
        run = self.work.run
        run.failure_path("score", video.key).unlink(missing_ok=True)  # of an MP4 that was there before
        self.encoder.hand_over(video, run.mp4_path(video.key))

    def finish(self) -> None:
        """Wait until all is on the disk. Raises OSError if something could not be written."""
        self.settle()
        self.encoder.drain()


def deliver(delivery: Delivery, undecoded: tuple[str, ...], claimed: Iterable[Claim], claims: Claims | None) -> None:
    """Decode what has latents only, make what is claimed, and return when all MP4s are there. `claims` on rank 0 alone."""
    group = delivery.group
    _decode_lost(delivery, undecoded)
    try:
        _animate(delivery, claimed, claims)
    except Exception as error:
        _note_crash(delivery, error)
        raise
    finally:  # the scheduler's warning too raises: what is finished is written before the process ends
        delivery.start_writes()
    group.agree(delivery.finish, OSError)  # nobody seals before all MP4s are there


def _decode_lost(delivery: Delivery, undecoded: tuple[str, ...]) -> None:
    """Deliver what an earlier run has denoised and no more."""
    work, batches = delivery.work, turns(undecoded, delivery.group.world_size).values()
    keys = [key for batch in batches for key in delivery.own(batch)]

    def decode_own() -> None:
        for key in beating(keys):
            delivery.settle()  # no more frames in memory than the encoder lets wait
            delivery.hand_over(delivery.stage.decode(work.load(hdf5.load_video_latents, "video", key)))

    delivery.group.agree(decode_own, OSError)


def _animate(delivery: Delivery, claimed: Iterable[Claim], claims: Claims | None) -> None:
    """One video after the other on all ranks; in between each rank decodes one of those that are finished.

    A record is written while the next video is denoised: its fsync may wait for a shared disk, and all ranks with it.
    """
    finished: list[VideoLatents] = []
    for made in delivery.stage.make(delivery.starts(claimed), delivery.note):
        finished.append(made.record)
        if claims is not None:
            claims.took.append(made.seconds)
            delivery.write(_save, delivery, delivery.steps.counted(made))
            log.info("video %s %.1f s", made.record.key, made.seconds)
        if len(finished) == delivery.group.world_size:
            _decode_in_turn(delivery, finished)
    _decode_in_turn(delivery, finished)


def _save(delivery: Delivery, made: Made[VideoLatents]) -> None:
    path = delivery.work.run.part_path("video", made.record.key)
    hdf5.save_video_latents(path, made.record, delivery.work.provenance(made, delivery.group))
    delivery.work.run.position_path(made.record.key).unlink(missing_ok=True)


def _decode_in_turn(delivery: Delivery, finished: list[VideoLatents]) -> None:
    for video in delivery.group.agree(partial(delivery.decode, delivery.own(finished)), OSError):
        delivery.hand_over(video)
    finished.clear()


def _note_crash(delivery: Delivery, error: Exception) -> None:
    """Hold it against the item in work, unless a disk or another rank is to blame."""
    claim = delivery.steps.claim
    if claim is None or isinstance(error, OSError) or is_loss_of_a_rank(error):
        return
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:MAX_REASON]}"
    delivery.work.run.note_crash(claim.key, delivery.life, f"{reason} (rank {delivery.group.rank} on {os.uname().nodename})")
