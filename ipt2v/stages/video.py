"""Array 2: animate first frames over one group of ranks. All ranks walk through the same items in the same order."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ipt2v.config import RunConfig
from ipt2v.models.vace.denoise import Progress
from ipt2v.models.vace.load import Animator, load_animator
from ipt2v.models.vace.position import Position
from ipt2v.parallel import Group
from ipt2v.records import FirstFrame, Made, Video, VideoLatents, item_seed, take_seed

STAGE = "video"


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoStage:
    """The video model, loaded, and what the run asks of it."""

    config: RunConfig
    animator: Animator

    def make(self, starts: Iterable[tuple[FirstFrame, Position | None]], progress: Progress) -> Iterator[Made[VideoLatents]]:
        """The latents of each video, on every rank, from where somebody has come with it; `progress` hears of each step."""
        for first_frame, position in starts:
            start, seed = time.monotonic(), video_seed(self.config, first_frame)
            latents_CTHW = self.animator.animate(first_frame, seed, progress, position)
            record = VideoLatents(key=first_frame.key, latents_CTHW=latents_CTHW)
            yield Made(record=record, seed=seed, seconds=time.monotonic() - start)

    def decode(self, latents: VideoLatents) -> Video:
        """The video that latents hold; on any one rank, without the others."""
        frames_THWC = self.animator.decode(latents.latents_CTHW)
        return Video(key=latents.key, frames_THWC=frames_THWC, fps=self.config.video.fps)


def video_seed(config: RunConfig, first_frame: FirstFrame) -> int:
    """Of the noise that a video starts from."""
    return item_seed(take_seed(config.seed, first_frame.key, first_frame.take), first_frame.key, "video")


def load(config: RunConfig, weights_dir: Path, group: Group) -> VideoStage:
    """Load the video model on every rank of the group."""
    return VideoStage(config=config, animator=load_animator(weights_dir / config.video.model, config.video, group))
