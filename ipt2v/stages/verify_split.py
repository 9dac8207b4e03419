"""One video on all ranks of a group and again on one rank: how far apart are the latents? A split may change rounding only."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ipt2v.config import RunConfig, VideoConfig
from ipt2v.models.vace.engine import agreed_split
from ipt2v.models.vace.load import load_animator
from ipt2v.parallel import Group, release
from ipt2v.records import FirstFrame
from ipt2v.stages.video import video_seed

MAX_STEPS = 4  # a wrong split shows in the first; more would only take the one rank longer


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitCheck:
    """What was compared, and what was found."""

    key: str
    num_ranks: int
    num_nodes: int
    split: str
    dtype: str
    device: str
    num_inference_steps: int
    max_error: float  # largest absolute difference of the latents
    mean_error: float
    largest_value: float  # of the one rank's latents
    seconds_split: float  # of a video's steps, the models loaded
    seconds_alone: float


def check_split(first_frame: FirstFrame, config: RunConfig, weights_dir: Path, group: Group) -> SplitCheck | None:
    """The check on rank 0, None on the others. To be called on all ranks."""
    settings = config.video.model_copy(update={"num_inference_steps": min(MAX_STEPS, config.video.num_inference_steps)})
    folder, seed = weights_dir / settings.model, video_seed(config, first_frame)
    split = agreed_split(folder, settings, group, None)  # on all ranks: they compare their GPUs' memory
    found, seconds_split = _animate(folder, settings, group, first_frame, seed)
    if not group.is_first:
        return None
    alone = Group(rank=0, world_size=1, num_nodes=1, device=group.device)
    expected, seconds_alone = _animate(folder, settings, alone, first_frame, seed)
    difference = np.abs(found.astype(np.float64) - expected)
    return SplitCheck(
        key=first_frame.key,
        num_ranks=group.world_size,
        num_nodes=group.num_nodes,
        split=str(split),
        dtype=settings.dtype,
        device=str(group.device),
        num_inference_steps=settings.num_inference_steps,
        max_error=float(difference.max()),
        mean_error=float(difference.mean()),
        largest_value=float(np.abs(expected).max()),
        seconds_split=seconds_split,
        seconds_alone=seconds_alone,
    )


def _animate(
    folder: Path, settings: VideoConfig, group: Group, first_frame: FirstFrame, seed: int
) -> tuple[NDArray[np.float32], float]:
    """(latents, seconds); the model is gone when it returns."""
    animate = load_animator(folder, settings, group).animate
    start = time.monotonic()
    latents_CTHW = animate(first_frame, seed)
    seconds = time.monotonic() - start
    del animate
    release(group.device)
    return latents_CTHW, seconds
