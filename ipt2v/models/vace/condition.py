"""VACE's Video Condition Unit, in memory: pure functions of tensors and of the VAE they are given.

Legend: B=1, C channels (3 RGB, 16 latent, 96 condition), T frames, t latent frames (T = 4(t-1)+1), H W pixels, h w latent
pixels (H = 8h, W = 8w). Pixels are -1..1; the empty frame is 0.0 exactly, the gray between (VACE's frameref.py: 127.5 of 255).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.video_processor import VideoProcessor
from numpy.typing import NDArray
from PIL import Image, ImageOps

SPATIAL_FACTOR = 8  # vae_stride[1:] = (8, 8), Wan2.1 wan_t2v_14B.py
TEMPORAL_FACTOR = 4  # vae_stride[0]


def fit(image_HWC: NDArray[np.uint8], *, width: int, height: int) -> NDArray[np.uint8]:
    """The image at exactly width x height: scaled to cover, centre kept. VACE itself never upscales."""
    if image_HWC.shape[:2] == (height, width):
        return image_HWC
    return np.asarray(ImageOps.fit(Image.fromarray(image_HWC), (width, height), Image.Resampling.LANCZOS))


def first_frame_video(image_HWC: NDArray[np.uint8], num_frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(video [1,3,T,H,W] float32 -1..1, mask [1,1,T,H,W]): frame 0 is the image, kept (0); the rest gray, to be made (1)."""
    height, width, _ = image_HWC.shape
    image_CHW = torch.from_numpy(image_HWC.astype(np.float32) / 255).permute(2, 0, 1)
    video_BCTHW = torch.zeros(1, 3, num_frames, height, width)
    video_BCTHW[0, :, 0] = 2 * image_CHW - 1
    mask_BCTHW = torch.ones(1, 1, num_frames, height, width)
    mask_BCTHW[:, :, 0] = 0
    return video_BCTHW, mask_BCTHW


def encode(vae: AutoencoderKLWan, video_BCTHW: torch.Tensor) -> torch.Tensor:
    """Normalised latents [1,16,t,h,w] of pixels -1..1, in the VAE's dtype: (mode - mean) / std, as WanVACEPipeline does."""
    mean, inverse_std = _statistics(vae, video_BCTHW.device)
    latents = vae.encode(video_BCTHW.to(vae.dtype)).latent_dist.mode()
    return ((latents.float() - mean) * inverse_std).to(vae.dtype)


def decode(vae: AutoencoderKLWan, latents_BCthw: torch.Tensor) -> NDArray[np.uint8]:
    """Frames [T,H,W,3] uint8 of normalised latents [1,16,t,h,w]."""
    latents = latents_BCthw.to(vae.dtype)
    mean, inverse_std = (value.to(vae.dtype) for value in _statistics(vae, latents.device))
    video_BCTHW = vae.decode(latents / inverse_std + mean, return_dict=False)[0]
    video_THWC = (video_BCTHW[0].permute(1, 2, 3, 0) * 0.5 + 0.5).clamp(0, 1)
    return (video_THWC.float().cpu().numpy() * 255).round().astype(np.uint8)


def fold_mask(mask_BCTHW: torch.Tensor) -> torch.Tensor:
    """[1,64,t,h,w]: each latent pixel's 8x8 mask pixels as channels, time sampled to the latent frames.

    nearest-exact over time takes frames 1, 5, 9, ..., so latent frame 0 reads 1 (to be made) although frame 0 is kept: VACE and
    WanVACEPipeline.prepare_masks do so, and the model was trained with it; the first frame conditions through its latents.
    """
    _, _, num_frames, height, width = mask_BCTHW.shape
    h, w, n = height // SPATIAL_FACTOR, width // SPATIAL_FACTOR, SPATIAL_FACTOR
    folded = mask_BCTHW[0, 0].view(num_frames, h, n, w, n).permute(2, 4, 0, 1, 3).flatten(0, 1)
    num_latent_frames = (num_frames - 1) // TEMPORAL_FACTOR + 1
    return F.interpolate(folded[None], size=(num_latent_frames, h, w), mode="nearest-exact")


def empty_video(num_frames: int, *, width: int, height: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(video, mask) as first_frame_video gives them, with nothing in it: all gray, all to be made."""
    return torch.zeros(1, 3, num_frames, height, width), torch.ones(1, 1, num_frames, height, width)


def letterbox(image_HWC: NDArray[np.uint8], *, width: int, height: int) -> torch.Tensor:
    """[3,H,W] float32 -1..1: the whole image, as large as it fits, on white; as WanVACEPipeline.preprocess_conditions does."""
    # first at its own size, cut down to what the VAE can halve three times
    image_BCHW = VideoProcessor(vae_scale_factor=SPATIAL_FACTOR).preprocess(Image.fromarray(image_HWC))
    scale = min(height / image_BCHW.shape[2], width / image_BCHW.shape[3])
    fitted_height, fitted_width = (int(side * scale) for side in image_BCHW.shape[2:])
    fitted_BCHW = F.interpolate(image_BCHW, size=(fitted_height, fitted_width), mode="bilinear", align_corners=False)
    canvas_CHW = torch.ones(3, height, width)
    top, left = (height - fitted_height) // 2, (width - fitted_width) // 2
    canvas_CHW[:, top : top + fitted_height, left : left + fitted_width] = fitted_BCHW[0]
    return canvas_CHW


def condition(
    vae: AutoencoderKLWan,
    video_BCTHW: torch.Tensor,
    mask_BCTHW: torch.Tensor,
    references: Sequence[torch.Tensor] = (),
    *,
    empty_latents: torch.Tensor,
) -> torch.Tensor:
    """[1,96,r+t,h,w]: latents of what is kept, latents of what is to be made, folded mask; before them r reference images.

    Frames may be kept, empty or a control signal (pose, depth, ...): `video_BCTHW` -1..1 holds their pixels, `mask_BCTHW` is 1
    where the model makes them anew. References are [3,H,W] each, from letterbox. Whatever is all gray has `empty_latents`,
    encode() of an empty video of this size, which need be made only once.
    """
    device = empty_latents.device
    made_BCTHW = (mask_BCTHW > 0.5).to(video_BCTHW.dtype)
    parts = [video_BCTHW * (1 - made_BCTHW), video_BCTHW * made_BCTHW]
    latents = [encode(vae, part.to(device)) if part.any() else empty_latents for part in parts]
    mask = fold_mask(mask_BCTHW).to(device, empty_latents.dtype)
    result = torch.cat([*latents, mask], dim=1)
    for reference_CHW in references:  # the last one comes first, as in WanVACEPipeline
        reference = encode(vae, reference_CHW[None, :, None].to(device))
        channels_after = result.shape[1] - reference.shape[1]
        result = torch.cat([F.pad(reference, [0] * 6 + [0, channels_after]), result], dim=2)
    return result


def _statistics(vae: AutoencoderKLWan, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    mean = torch.tensor(vae.config.latents_mean, device=device).view(1, -1, 1, 1, 1)
    return mean, 1.0 / torch.tensor(vae.config.latents_std, device=device).view(1, -1, 1, 1, 1)
