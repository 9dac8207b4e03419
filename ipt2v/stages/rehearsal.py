"""All arrays without models: the reference photo on a canvas with its prompt as caption, slowly panned; no score has a value.

Same records, files, ranks and steps as the real stages, so that everything around the models is proven before GPUs are paid
for: shards, queue, deliveries, faults, package, page. Legend: H height, W width, T frames, C=3 RGB.
"""

from __future__ import annotations

import hashlib
import textwrap
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ipt2v.config import Metric, RunConfig, ScoreConfig
from ipt2v.models.vace.position import Position
from ipt2v.parallel import Group
from ipt2v.records import Failure, FirstFrame, Item, ItemError, Made, TextEmbedding, Video, VideoLatents, item_seed
from ipt2v.references import load_photos

if TYPE_CHECKING:
    from ipt2v.metrics.measures import Family, Measure
    from ipt2v.models.vace.denoise import Progress

CAPTION_SHARE = 0.2  # of the height
ZOOM = 1.15  # the window that is panned is so much smaller than the picture
NOTE = "rehearsal: no model has seen this"


def make_first_frames(items: Sequence[Item], config: RunConfig, group: Group) -> Iterator[Made[FirstFrame] | Failure]:
    """A canvas for each item of this rank's share, or a failure where the photo does not decode."""
    size = (config.first_frame.width, config.first_frame.height)
    for item in items[group.rank :: group.world_size]:
        start = time.monotonic()
        try:
            photo_HWC = load_photos(item)[0]
        except ItemError as error:
            yield Failure(key=item.key, stage="first_frame", reason=str(error))
            continue
        record = FirstFrame(
            key=item.key,
            subject="A person",
            spatial_prompt="",
            temporal_prompt=item.prompt,
            image_HWC=canvas(photo_HWC, item.prompt, size) if config.starts_from_first_frame else None,
            reference_HWC=photo_HWC,
            similarity=None,
            attempts=(),
            notes=(NOTE,),
            temporal=TextEmbedding(text=item.prompt, embedding_LD=np.zeros((1, 8), dtype=np.float32)),
            negative=TextEmbedding(text=config.video.negative_prompt, embedding_LD=np.zeros((1, 8), dtype=np.float32)),
        )
        yield Made(record=record, seed=item_seed(config.seed, item.key, "first_frame"), seconds=time.monotonic() - start)


@dataclass(frozen=True, slots=True, kw_only=True)
class RehearsalStage:
    """As stages.video.VideoStage. The latents are the picture to pan over, [3,1,H,W] of 0..255."""

    config: RunConfig
    group: Group

    def make(self, starts: Iterable[tuple[FirstFrame, Position | None]], progress: Progress) -> Iterator[Made[VideoLatents]]:
        """Each video's picture, after as many steps as the run has, each as long as config.rehearsal says."""
        settings, size = self.config.video, (self.config.video.width, self.config.video.height)
        for first_frame, position in starts:
            start = time.monotonic()
            for num_done in range(position.num_done if position is not None else 0, settings.num_inference_steps):
                time.sleep(seconds_of(first_frame.key, self.config) / settings.num_inference_steps)
                self.group.meet()  # as in a denoiser's collectives
                progress(position_after(num_done + 1, settings.num_inference_steps))
            image_HWC = first_frame.image_HWC
            if image_HWC is None:
                image_HWC = canvas(first_frame.reference_HWC, first_frame.temporal_prompt, size)
            picture = Image.fromarray(image_HWC).resize(size, Image.Resampling.LANCZOS)
            latents_CTHW = np.asarray(picture, dtype=np.float32).transpose(2, 0, 1)[:, None]
            record = VideoLatents(key=first_frame.key, latents_CTHW=np.ascontiguousarray(latents_CTHW))
            seed = item_seed(self.config.seed, first_frame.key, "video")
            yield Made(record=record, seed=seed, seconds=time.monotonic() - start)

    def decode(self, latents: VideoLatents) -> Video:
        """A window that wanders from left to right."""
        image_HWC = latents.latents_CTHW[:, 0].transpose(1, 2, 0).astype(np.uint8)
        return Video(key=latents.key, frames_THWC=panned(image_HWC, self.config.video.num_frames), fps=self.config.video.fps)


def seconds_of(key: str, config: RunConfig) -> float:
    """How long a video takes: the same for a key each time, between `seconds` and `spread` times as much."""
    share = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4]) / 2**32
    return config.rehearsal.seconds * config.rehearsal.spread**share


def position_after(num_done: int, num_steps: int) -> Position:
    return Position(num_done=num_done, num_steps=num_steps, latents_BCthw=torch.zeros(1), tensors={}, numbers={})


def canvas(photo_HWC: NDArray[np.uint8], prompt: str, size: tuple[int, int]) -> NDArray[np.uint8]:
    """[H,W,3] uint8 RGB of (width, height): the photo whole, on gray, its prompt below."""
    width, height = size
    caption = round(height * CAPTION_SHARE)
    picture = Image.new("RGB", size, (128, 128, 128))
    photo = ImageOps.contain(Image.fromarray(photo_HWC), (width, height - caption))
    picture.paste(photo, ((width - photo.width) // 2, (height - caption - photo.height) // 2))
    pixels = max(8, caption // 5)
    lines = textwrap.wrap(prompt, max(8, round(width / (pixels * 0.5))))[:4]
    draw = ImageDraw.Draw(picture)
    draw.text((4, height - caption), "\n".join(lines), fill=(255, 255, 255), font=ImageFont.load_default(pixels))
    return np.array(picture, dtype=np.uint8)


def panned(image_HWC: NDArray[np.uint8], num_frames: int) -> NDArray[np.uint8]:
    """[T,H,W,3] uint8: frames of the image's own size, from its left edge to its right one."""
    height, width = image_HWC.shape[:2]
    large = np.asarray(Image.fromarray(image_HWC).resize((round(width * ZOOM), round(height * ZOOM)), Image.Resampling.LANCZOS))
    lefts = np.linspace(0, large.shape[1] - width, num_frames).round().astype(int)
    top = large.shape[0] - height
    return np.stack([large[top : top + height, left : left + width] for left in lefts])


def measures(wanted: Collection[Metric]) -> tuple[Family, ...]:
    """As metrics.measures.FAMILIES: the video is decoded, and each score is a row without a value."""
    from ipt2v.metrics.measures import Family
    from ipt2v.metrics.undefined import Undefined

    def load(config: ScoreConfig, weights_dir: Path, device: torch.device) -> Measure:
        return lambda video, metrics: {metric: Undefined(reason=NOTE) for metric in metrics}

    return (Family(metrics=frozenset(wanted), load=load),)
