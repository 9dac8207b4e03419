"""CLIPScore of one video as ConsisID and the challenge compute it, around any CLIP. Knows no network, no prompt and no file.

Written from ConsisID b6132de4 eval/get_clipscore.py (Apache-2.0), which was not run beside it here; the pixels are those of
transformers' CLIPImageProcessorPil, and a test compares the two.

Legend: T frames, B=16 of them, H W pixels, C=3 RGB, S side of a square, D width of a feature.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ipt2v.metrics.quality import CLIP_SIZE, EmbedImages, check_frames, mean_score, normalised_for_clip
from ipt2v.metrics.undefined import Undefined

CLIP_SCORE_FRAMES = 16
_LOGIT_SCALE = 100.0  # exp(logit_scale) of the published ViT-B/32, where its training capped it


@torch.inference_mode()
def clip_score(
    frames_THWC: torch.Tensor,
    text_1D: torch.Tensor,
    embed_images: EmbedImages,
    *,
    device: torch.device,
    size: int = CLIP_SIZE,
) -> float | Undefined:
    """100 times the cosine of a prompt and a frame, mean over 16 frames of [T,H,W,3] uint8 RGB; -100..100, in truth 20..35.

    `text_1D` is what the same CLIP ViT-B/32 makes of clip_tokens.token_ids(prompt, context=77), `embed_images` its image tower,
    and `size` is S. ConsisID reads frames by OpenCV and shows them to CLIP with red and blue exchanged, a mistake that is not
    repeated here: numbers differ a little from theirs. Undefined: no frames, a cosine that is not finite. Raises ValueError for
    other input.
    """
    check_frames(frames_THWC, 1)
    if not len(frames_THWC):
        return Undefined(reason="no frames")
    chosen_BHWC = frames_THWC[clip_score_frames(len(frames_THWC))]
    images_BD = embed_images(clip_processor_pixels(chosen_BHWC, size=size).to(device)).float()
    cosines_B1 = F.normalize(images_BD, dim=1) @ F.normalize(text_1D.to(device).float(), dim=1).T
    return mean_score([_LOGIT_SCALE * cosines_B1])


def clip_score_frames(num_frames: int) -> list[int]:
    """Numbers of the frames that ConsisID's CLIPScore looks at, 16 from the first on, never the last of a longer video."""
    return [index * num_frames // CLIP_SCORE_FRAMES for index in range(CLIP_SCORE_FRAMES)]


def clip_processor_pixels(frames_BHWC: torch.Tensor, *, size: int = CLIP_SIZE) -> torch.Tensor:
    """[B,3,S,S] float32 on the CPU of frames, [B,H,W,3] uint8 RGB, as transformers' CLIPProcessor normalises them for CLIP.

    Shorter side to S by PIL: bicubic with antialias, rounded to uint8, unlike `quality.clip_pixels`; then the centre cut out,
    half pixels towards the upper left.
    """
    height, width = frames_BHWC.shape[1:3]
    longer = int(size * max(height, width) / min(height, width))
    rows, columns = (size, longer) if height <= width else (longer, size)
    top, left = (rows - size) // 2, (columns - size) // 2
    resized = [
        np.asarray(Image.fromarray(frame_HWC).resize((columns, rows), Image.Resampling.BICUBIC))
        for frame_HWC in frames_BHWC.cpu().numpy()
    ]
    cut_BHWC = torch.from_numpy(np.stack(resized)[:, top : top + size, left : left + size])
    return normalised_for_clip(cut_BHWC.permute(0, 3, 1, 2).float() / 255)
