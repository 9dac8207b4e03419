"""What a score is of: a delivered video, and what it is held against. Knows no network and no file."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ipt2v.config import Metric
from ipt2v.metrics.undefined import Undefined

Values = dict[Metric, float | Undefined]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Delivered:
    """One video as its MP4 has it. Legend: T frames, H W pixels, C=3 RGB."""

    frames_THWC: torch.Tensor  # uint8 0..255, on the CPU
    fps: float
    prompt: str  # the test set's, not what the LLM made of it: what the organisers score with
    reference_HWC: NDArray[np.uint8]  # the photo, 0..255
    first_frame_HWC: NDArray[np.uint8] | None  # the painting that it starts from, before it went through the video model
