"""IQ, AQ and OC of one video as VBench computes them, around any networks: what they see, and what becomes of their answers.

Knows no network and no file. Written from a description of what VBench 45e79ec1 (Apache-2.0) computes; within 1e-5 of its own
code on equal weights (tests/bench/vbench_parity.py). VBench resizes by torchvision without antialias, which F.interpolate
repeats: as floats for IQ and AQ, but for OC as uint8, which clamps and rounds.

Legend: T frames, B of them at a time, H W pixels, C=3 RGB, S side of a square, D width of a feature.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

from ipt2v.metrics.undefined import Undefined

# [B,3,H,W] float 0..1, all of one size -> quality [B], nominally 0..100: a MUSIQ trained on SPAQ, or a stand-in
ScoreImages = Callable[[torch.Tensor], torch.Tensor]
# [B,3,S,S] normalised for CLIP -> features [B,D] of any length: the image tower of CLIP ViT-L/14, or a stand-in
EmbedImages = Callable[[torch.Tensor], torch.Tensor]
# features [B,D] of length 1 -> beauty [B,1], nominally 0..10: LAION's first linear head, or a stand-in
Head = Callable[[torch.Tensor], torch.Tensor]
# [1,8,3,S,S] normalised for CLIP -> features [1,D] of any length: the video tower of ViCLIP, or a stand-in
EmbedVideo = Callable[[torch.Tensor], torch.Tensor]

CLIP_SIZE = 224  # pixels, input of ViT-L/14
IQ_LONGER_SIDE = 512  # pixels; VBench imaging_quality.py, its default mode "longer"
OC_FRAMES = 8
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@torch.inference_mode()
def imaging_quality(
    frames_THWC: torch.Tensor, score_images: ScoreImages, *, device: torch.device, batch_size: int = 8
) -> float | Undefined:
    """IQ: the mean quality of all frames, [T,H,W,3] uint8 RGB, nominally 0..1, not clamped; higher is better.

    It is a hundredth of what VBench writes for one video, and what it writes for all of them. Undefined: no frames, a quality
    that is not finite. Raises ValueError for other input.
    """
    check_frames(frames_THWC, batch_size)
    batches = (_pixels(frames_BHWC, device) for frames_BHWC in _batches(frames_THWC, batch_size))
    return mean_score(score_images(fitted(pixels_BCHW) / 255) / 100 for pixels_BCHW in batches)


@torch.inference_mode()
def aesthetic_quality(
    frames_THWC: torch.Tensor,
    embed_images: EmbedImages,
    head: Head,
    *,
    device: torch.device,
    batch_size: int = 32,
    size: int = CLIP_SIZE,
) -> float | Undefined:
    """AQ: the mean beauty of all frames, [T,H,W,3] uint8 RGB, nominally 0..1, not clamped; higher is prettier.

    `size` is S. Undefined: no frames, a beauty that is not finite. Raises ValueError for other input.
    """
    check_frames(frames_THWC, batch_size)

    def scores(frames_BHWC: torch.Tensor) -> torch.Tensor:
        features_BD = embed_images(clip_pixels(_pixels(frames_BHWC, device), as_uint8=False, size=size))
        return head(F.normalize(features_BD.float(), dim=1)) / 10

    return mean_score(scores(frames_BHWC) for frames_BHWC in _batches(frames_THWC, batch_size))


@torch.inference_mode()
def overall_consistency(
    frames_THWC: torch.Tensor,
    text_1D: torch.Tensor,
    embed_video: EmbedVideo,
    *,
    device: torch.device,
    size: int = CLIP_SIZE,
) -> float | Undefined:
    """OC: the cosine of a video, [T,H,W,3] uint8 RGB, and the features of its prompt; -1..1, neither scaled nor clamped.

    `text_1D` is what the same ViCLIP makes of clip_tokens.token_ids(prompt, context=32): VBench sees about 25 words of it.
    `size` is S. Undefined: no frames, a cosine that is not finite. Raises ValueError for other input.
    """
    check_frames(frames_THWC, 1)
    if not len(frames_THWC):
        return Undefined(reason="no frames")
    chosen_BCHW = _pixels(frames_THWC[middle_frames(len(frames_THWC))], device)
    video_1D = embed_video(clip_pixels(chosen_BCHW, as_uint8=True, size=size)[None]).float()
    return mean_score([F.normalize(video_1D, dim=1) @ F.normalize(text_1D.to(device).float(), dim=1).T])


def middle_frames(num_frames: int, count: int = OC_FRAMES) -> list[int]:
    """Indices of the middle frames of `count` equal parts; of a shorter video every frame, then the last one again."""
    num_parts = min(count, num_frames)
    edges = np.linspace(0, num_frames, num_parts + 1).astype(int).tolist()
    indices = [(a + b - 1) // 2 for a, b in pairwise(edges)]
    return indices + indices[-1:] * (count - num_parts)


def fitted(pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """The same with a longer side of 512 pixels, if it had more: bilinear, no antialias, not rounded.

    Both sides are cut to integers as in VBench; where 512 / n * n falls short of 512 in floats, the longer becomes 511.
    """
    height, width = pixels_BCHW.shape[-2:]
    if max(height, width) <= IQ_LONGER_SIDE:
        return pixels_BCHW
    scale = IQ_LONGER_SIDE / max(height, width)
    size = (max(1, int(scale * height)), max(1, int(scale * width)))
    return F.interpolate(pixels_BCHW, size=size, mode="bilinear", align_corners=False)


def clip_pixels(pixels_BCHW: torch.Tensor, *, as_uint8: bool, size: int = CLIP_SIZE) -> torch.Tensor:
    """Pixels 0..255 -> [B,3,S,S] normalised for CLIP: shorter side to S, bicubic, no antialias, and the centre cut out.

    `as_uint8`: what bicubic overshoots is clamped to 0..255 and rounded, as torchvision does with uint8 but not with floats.
    """
    height, width = pixels_BCHW.shape[-2:]
    longer = int(size * max(height, width) / min(height, width))
    resized_size = (size, longer) if height <= width else (longer, size)
    resized = F.interpolate(pixels_BCHW, size=resized_size, mode="bicubic", align_corners=False)
    if as_uint8:
        resized = resized.clamp(0, 255).round()
    top, left = (round((side - size) / 2) for side in resized_size)  # halves go to the even number
    return normalised_for_clip(resized[:, :, top : top + size, left : left + size] / 255)


def normalised_for_clip(pixels_BCHW: torch.Tensor) -> torch.Tensor:
    """Float 0..1 -> what every CLIP was trained on."""
    mean, std = (torch.tensor(rgb, device=pixels_BCHW.device).view(3, 1, 1) for rgb in (_CLIP_MEAN, _CLIP_STD))
    return (pixels_BCHW - mean) / std


def check_frames(frames_THWC: torch.Tensor, batch_size: int) -> None:
    """Raises ValueError unless the frames are uint8 [T,H,W,3] of at least one pixel; T may be 0."""
    if frames_THWC.dtype != torch.uint8 or frames_THWC.ndim != 4 or frames_THWC.shape[3] != 3 or 0 in frames_THWC.shape[1:]:
        raise ValueError(f"frames are {frames_THWC.dtype} {tuple(frames_THWC.shape)}, expected uint8 [T,H,W,3]")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: expected at least 1")


def _batches(frames_THWC: torch.Tensor, batch_size: int) -> tuple[torch.Tensor, ...]:
    return frames_THWC.split(batch_size) if len(frames_THWC) else ()  # split makes one empty batch of nothing


def _pixels(frames_BHWC: torch.Tensor, device: torch.device) -> torch.Tensor:
    """[B,3,H,W] float 0..255; moved as uint8, a quarter of the bytes."""
    return frames_BHWC.to(device).permute(0, 3, 1, 2).float().contiguous()


def mean_score(batches: Iterable[torch.Tensor]) -> float | Undefined:
    """Over all frames, each counted once. Undefined: no score, or one that is not finite."""
    scores = [score for batch in batches for score in batch.flatten().tolist()]
    if not scores:
        return Undefined(reason="no frames")
    if num_bad := sum(not math.isfinite(score) for score in scores):
        return Undefined(reason=f"the network gave no finite number for {num_bad} of {len(scores)} inputs")
    return math.fsum(scores) / len(scores)
