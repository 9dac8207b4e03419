"""Array 3's element: measure the delivered MP4s of a shard, one by one, and write down each score as it comes.

The next video is decoded while one is measured. Ranks, if there are several, share the videos.
"""

from __future__ import annotations

import hashlib
import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import av
import numpy as np
from numpy.typing import NDArray

from ipt2v import hdf5
from ipt2v.config import Metric, Scoring
from ipt2v.leases import is_held
from ipt2v.mp4 import read_fps, read_mp4
from ipt2v.parallel import Group
from ipt2v.records import Failure, Item, Score
from ipt2v.references import load_reference
from ipt2v.score_dir import ScoreDir, read_scores, write_scores
from ipt2v.watch import beat, seconds_left
from ipt2v.work import Work

if TYPE_CHECKING:
    from ipt2v.metrics.delivered import Delivered
    from ipt2v.metrics.measures import Family
    from ipt2v.stages.score import ScoreStage

PAUSE_SECONDS = 5.0  # between looks for a video that another element is still making
END_SECONDS = 10.0  # before the scheduler ends the element

log = logging.getLogger(__name__)


def make_scores(work: Work, group: Group) -> bool:
    """Measure what is left of the shard's videos, and seal it if it is whole. Whether time ran out before. On all ranks."""
    shard = _open_shard(work, group)
    while True:
        todo, is_more_coming = group.from_first(shard.look() if group.is_first else ((), False))
        shard.measure(todo[group.rank :: group.world_size])
        group.meet()
        out_of_time = group.anywhere(shard.out_of_time)
        if out_of_time or not is_more_coming:
            break
        beat()
        time.sleep(PAUSE_SECONDS)
    if group.is_first:
        shard.seal()
    return out_of_time


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A video to measure, decoded unless all its scores are known from another way of scoring the run."""

    item: Item
    sha256: str
    rows: dict[Metric, Score]
    video: Delivered | None


@dataclass(slots=True, kw_only=True)
class ScoreShard:
    """One shard's videos and their scores."""

    work: Work
    scoring: Scoring
    store: ScoreDir
    stage: ScoreStage
    scorers: dict[Metric, str]
    known: dict[str, list[Score]]  # of this and of other ways of scoring, by key
    took: list[float] = field(default_factory=list)  # seconds of each video
    out_of_time: bool = False

    def look(self) -> tuple[tuple[Item, ...], bool]:
        """What there is to measure now, and whether somebody is still making a video of the shard."""
        run, keys = self.work.run, self.work.keys
        left = set(keys) - self._over()
        held = {key for key in left if is_held(run.leases_path, key)}  # asked first: a lease ends when its MP4 is there
        delivered = run.done("video", self.work.shard, left)
        todo = tuple(item for item in self.work.items if item.key in delivered)
        return todo, bool(held - delivered)

    def measure(self, items: Sequence[Item]) -> None:
        """Scores of videos, or failures of those that do not decode."""
        for item, loaded in self._loaded_ahead(items):
            if self.took and seconds_left() < END_SECONDS + statistics.median(self.took):
                self.out_of_time = True
                return
            start = time.monotonic()
            if isinstance(loaded, Failure):
                self.work.run.save_failure(loaded)
                log.warning("score %s failed: %s", loaded.key, loaded.reason)
                continue
            for rows in (
                []
                if loaded.video is None
                else self.stage.score(
                    item.key,
                    loaded.sha256,
                    loaded.video,
                    [one for one in self.scoring.config.metrics if one not in loaded.rows],
                )
            ):
                loaded.rows.update({row.metric: row for row in rows})  # type: ignore[misc]
                write_scores(self.store.begun_path(item.key), loaded.rows.values())
                beat()
            self.store.finish(item.key, [loaded.rows[metric] for metric in self.scoring.config.metrics])
            self.took.append(time.monotonic() - start)
            log.info("score %s %.1f s", item.key, self.took[-1])

    def _loaded_ahead(self, items: Sequence[Item]) -> Iterator[tuple[Item, Loaded | Failure]]:
        with ThreadPoolExecutor(1) as decoder:
            ahead = [decoder.submit(self._load, item) for item in items[:1]]
            for item, after in zip(items, (*items[1:], None), strict=False):
                loaded = ahead.pop().result()
                if after is not None:
                    ahead.append(decoder.submit(self._load, after))
                yield item, loaded

    def _load(self, item: Item) -> Loaded | Failure:
        path = self.work.run.mp4_path(item.key)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        same = [row for row in self.known.get(item.key, []) if row.video_sha256 == sha256]
        good = {metric: row for metric, scorer in self.scorers.items() for row in same if row.scorer == scorer}
        if len(good) == len(self.scorers):
            return Loaded(item=item, sha256=sha256, rows=good, video=None)
        try:
            frames_THWC, fps = read_mp4(path), read_fps(path)
        except (av.error.FFmpegError, IndexError, ValueError) as error:
            if isinstance(error, OSError):  # the disk's fault, not the video's
                raise
            remedy = "delete it and submit again to make it anew"
            return Failure(key=item.key, stage="score", reason=f"{path} cannot be measured ({error}); {remedy}")
        return Loaded(item=item, sha256=sha256, rows=good, video=self._delivered(item, frames_THWC, fps))

    def _delivered(self, item: Item, frames_THWC: NDArray[np.uint8], fps: float) -> Delivered:
        """The video and what it is compared with. Raises ValueError if that is not as it was: nobody's video is to blame."""
        import torch

        from ipt2v.metrics.delivered import Delivered

        first_frame = None
        if "first_frame_arc_sim" in self.scorers:
            first_frame = self.work.load(hdf5.load_first_frame, "first_frame", item.key).image_HWC
        return Delivered(
            frames_THWC=torch.from_numpy(frames_THWC),
            fps=fps,
            prompt=item.prompt,
            reference_HWC=load_reference(item),
            first_frame_HWC=first_frame,
        )

    def _over(self) -> set[str]:
        run, keys = self.work.run, self.work.keys
        return self.store.done(self.work.shard, keys).union(*(run.failed(stage, keys) for stage in run.stages()))

    def seal(self) -> None:
        """One file for the shard, if nothing of it is left to measure."""
        if len(self._over()) == len(self.work.keys):
            self.store.seal(self.work.shard, self.work.keys)


def _open_shard(work: Work, group: Group) -> ScoreShard:
    """Raises ValueError for a run that is not scored."""
    scoring, store = work.run.scoring(), work.run.scores()
    if scoring is None or store is None:
        raise ValueError(f"{work.run.root}: this run is not scored; set score.metrics in its config, and submit again")
    from ipt2v.models.quiet import quiet_libraries
    from ipt2v.stages.score import ScoreStage, scorer_of

    quiet_libraries()
    return ScoreShard(
        work=work,
        scoring=scoring,
        store=store,
        stage=ScoreStage(scoring=scoring, weights_dir=work.weights_dir, device=group.device, families=_families(work, scoring)),
        scorers={metric: scorer_of(metric, scoring) for metric in scoring.config.metrics},
        known=_known_rows(work),
    )


def _families(work: Work, scoring: Scoring) -> tuple[Family, ...]:
    if work.config.rehearsal.enabled:
        from ipt2v.stages.rehearsal import measures

        return measures(scoring.config.metrics)
    from ipt2v.metrics.measures import FAMILIES

    return FAMILIES


def _known_rows(work: Work) -> dict[str, list[Score]]:
    """Every score of the shard's items that was ever written down, by key."""
    known: dict[str, list[Score]] = {}
    for store in work.run.all_scores():
        begun = [row for key in work.keys for row in read_scores(store.begun_path(key))]
        for row in [*store.rows(work.shard, work.keys), *begun]:
            known.setdefault(row.key, []).append(row)
    return known
