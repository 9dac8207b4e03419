"""VBench's two scores of movement, dynamic degree and motion smoothness, from frames and any flow or interpolation.

Knows no network and no file. Written from vbench/dynamic_degree.py (Apache-2.0) and, for smoothness, from a description of
what VBench computes; within 1e-6 of VBench's own code on equal weights (tests/bench/vbench_parity.py).

Legend: T frames, B pairs, H W pixels, Hp Wp padded, C=3 RGB, 2 = x then y.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ipt2v.metrics.correlation import MIN_SIDE_PIXELS
from ipt2v.metrics.undefined import Undefined

# from the first frames to the second, [B,3,Hp,Wp] float 0..255 -> [B,2,Hp,Wp] float in pixels: a RAFT, or a stand-in
Flow = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
# half way between the first frames and the second, [B,3,Hp,Wp] float 0..1 -> the same: an AMT, or a stand-in
Interpolate = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

FLOW_MULTIPLE, INTERPOLATION_MULTIPLE = 8, 16  # what RAFT and AMT-S divide a side by

# VBench dynamic_degree.py: get_frames, get_score, set_params
_SAMPLED_FPS = 8
_FASTEST_SHARE = 0.05
_THRESHOLD_PIXELS, _REFERENCE_SIDE_PIXELS = 6.0, 256
_MOVING_PAIRS, _REFERENCE_FRAMES = 4, 16


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicDegree:
    """Whether a video moves, and how the verdict came about."""

    dynamic: bool
    motion_pixels: float  # flow of a pair's fastest 5% of pixels, mean over all pairs; between sampled frames, not per frame
    num_moving_pairs: int  # those above threshold_pixels
    num_pairs: int
    num_needed: int  # moving pairs; 0 for two sampled frames, which are dynamic even when nothing moves, as in VBench
    threshold_pixels: float


@torch.inference_mode()
def dynamic_degree(
    frames_THWC: torch.Tensor, fps: float, flow: Flow, *, device: torch.device, batch_size: int = 4
) -> DynamicDegree | Undefined:
    """Whether [T,H,W,3] uint8 RGB frames at `fps` move, as VBench decides it from the flow at about 8 frames a second.

    `flow` gets `batch_size` pairs at a time, on the device. Undefined: fewer than two sampled frames (VBench says static),
    sides under 121 pixels (VBench compares NaN and says static), a flow that is not finite. Raises ValueError for other
    input.
    """
    _check(frames_THWC, batch_size)
    if fps <= 0:
        raise ValueError(f"fps {fps}: expected a positive number")
    sampled_THWC = frames_THWC[:: sampling_interval(fps)]
    if len(sampled_THWC) < 2:
        return Undefined(reason=f"{len(frames_THWC)} frames at {fps:g} fps: two that are {sampling_interval(fps)} apart needed")
    if too_small := _too_small(frames_THWC, FLOW_MULTIPLE):
        return too_small
    scores = []
    for first_BHWC, second_BHWC in _pairs(sampled_THWC[:-1], sampled_THWC[1:], batch_size):
        first, second = (padded(_pixels(one, device), FLOW_MULTIPLE) for one in (first_BHWC, second_BHWC))
        scores += fastest(flow(first, second)).tolist()
    if not all(map(_is_finite, scores)):
        return Undefined(reason="the flow is not finite")
    return verdict(scores, height=frames_THWC.shape[1], width=frames_THWC.shape[2])


@torch.inference_mode()
def motion_smoothness(
    frames_THWC: torch.Tensor, interpolate: Interpolate, *, device: torch.device, batch_size: int = 4
) -> float | Undefined:
    """How well every second frame of [T,H,W,3] uint8 RGB can be told from its neighbours, in 0..1, as in VBench; 1 is exactly.

    `interpolate` gets `batch_size` pairs at a time, on the device. The last frame of an even number is not looked at, and the
    frame rate does not count. Undefined: fewer than 3 frames, sides under 113 pixels, a prediction that is not finite. Raises
    ValueError for other input.
    """
    _check(frames_THWC, batch_size)
    if len(frames_THWC) < 3:
        return Undefined(reason=f"{len(frames_THWC)} frames: at least 3 needed")
    if too_small := _too_small(frames_THWC, INTERPOLATION_MULTIPLE):
        return too_small
    even_THWC, odd_THWC = frames_THWC[::2], frames_THWC[1::2]
    _, height, width, _ = frames_THWC.shape
    total = 0
    for start, (first_BHWC, second_BHWC) in enumerate(_pairs(even_THWC[:-1], even_THWC[1:], batch_size)):
        first, second = (padded(_unit(_pixels(one, device)), INTERPOLATION_MULTIPLE) for one in (first_BHWC, second_BHWC))
        predicted_BCHW = cropped(interpolate(first, second), height, width)
        if not bool(predicted_BCHW.isfinite().all()):
            return Undefined(reason="the interpolated frame is not finite")
        real_BHWC = odd_THWC[start * batch_size :][: len(first_BHWC)].to(device)
        total += int((truncated(predicted_BCHW).int() - real_BHWC.permute(0, 3, 1, 2).int()).abs().sum())
    mean_absolute_error = total / ((len(even_THWC) - 1) * height * width * 3)
    return (255 - mean_absolute_error) / 255


def sampling_interval(fps: float) -> int:
    """Every which frame dynamic degree looks at; halves go to the even number, as Python rounds (20 fps: 2, 28 fps: 4)."""
    return max(1, round(fps / _SAMPLED_FPS))


def verdict(scores: list[float], *, height: int, width: int) -> DynamicDegree:
    """The verdict from each pair's score in pixels, at least one, and the sides of the frames before padding."""
    threshold_pixels = _THRESHOLD_PIXELS * (min(height, width) / _REFERENCE_SIDE_PIXELS)
    # the sampled frames count, not the pairs; halves go to the even number
    num_needed = round(_MOVING_PAIRS * ((len(scores) + 1) / _REFERENCE_FRAMES))
    num_moving_pairs = sum(score > threshold_pixels for score in scores)
    return DynamicDegree(
        dynamic=num_moving_pairs >= num_needed,
        motion_pixels=sum(scores) / len(scores),
        num_moving_pairs=num_moving_pairs,
        num_pairs=len(scores),
        num_needed=num_needed,
        threshold_pixels=threshold_pixels,
    )


def fastest(flow_B2HW: torch.Tensor) -> torch.Tensor:
    """[B] float64: how far, in pixels, the fastest 5% of each flow's pixels went, on average."""
    speed_BP = flow_B2HW.square().sum(1).sqrt().flatten(1)
    # float64: a mean of equal speeds is that speed, on either side of a threshold
    return speed_BP.topk(int(speed_BP.shape[1] * _FASTEST_SHARE)).values.mean(1, dtype=torch.float64)


def padded(frame_BCHW: torch.Tensor, multiple: int) -> torch.Tensor:
    """The edge repeated until both sides are multiples; of an odd number of rows or columns the larger half is last."""
    height, width = frame_BCHW.shape[-2:]
    more_rows, more_columns = -height % multiple, -width % multiple
    left, top = more_columns // 2, more_rows // 2
    return F.pad(frame_BCHW, (left, more_columns - left, top, more_rows - top), mode="replicate")


def cropped(frame_BCHW: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """What `padded` made larger, at its own size again."""
    top, left = (frame_BCHW.shape[-2] - height) // 2, (frame_BCHW.shape[-1] - width) // 2
    return frame_BCHW[..., top : top + height, left : left + width]


def truncated(frame_BCHW: torch.Tensor) -> torch.Tensor:
    """Float 0..1 -> uint8 0..255, cut off and not rounded: rounding moves the score by up to 1e-3."""
    return (frame_BCHW * 255.0).clamp(0, 255).to(torch.uint8)


def _unit(pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """0..255 -> 0..1."""
    # by a number, CUDA would multiply by 1/255 instead, and a value that should survive the truncation might not
    return pixels_BCHW / torch.full((), 255.0, device=pixels_BCHW.device)


def _pixels(frames_BHWC: torch.Tensor, device: torch.device) -> torch.Tensor:
    """[B,3,H,W] float 0..255; moved as uint8, a quarter of the bytes."""
    return frames_BHWC.to(device).permute(0, 3, 1, 2).float().contiguous()


def _pairs(first: torch.Tensor, second: torch.Tensor, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    yield from zip(first.split(batch_size), second.split(batch_size), strict=True)


def _check(frames_THWC: torch.Tensor, batch_size: int) -> None:
    if frames_THWC.dtype != torch.uint8 or frames_THWC.ndim != 4 or frames_THWC.shape[3] != 3:
        raise ValueError(f"frames are {frames_THWC.dtype} {tuple(frames_THWC.shape)}, expected uint8 [T,H,W,3]")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: expected at least 1")


def _too_small(frames_THWC: torch.Tensor, multiple: int) -> Undefined | None:
    _, height, width, _ = frames_THWC.shape
    if all(side + -side % multiple >= MIN_SIDE_PIXELS for side in (height, width)):
        return None
    return Undefined(reason=f"{width}x{height} pixels: {MIN_SIDE_PIXELS - multiple + 1} needed on either side")


def _is_finite(score: float) -> bool:
    return abs(score) < float("inf")
