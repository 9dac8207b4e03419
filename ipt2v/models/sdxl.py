"""SDXL: a spatial prompt -> the first frame. Legend: H height, W width, C=3 RGB."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionXLPipeline
from numpy.typing import NDArray

from ipt2v.config import FirstFrameConfig

Paint = Callable[[str, int], NDArray[np.uint8]]  # (spatial prompt, seed) -> image_HWC


def load_painter(folder: Path, settings: FirstFrameConfig, *, device: torch.device) -> Paint:
    """paint(spatial_prompt, seed) -> [H,W,3] uint8 RGB of the settings' size."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(
        folder, dtype=getattr(torch, settings.dtype), add_watermarker=False
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    # = dpmpp_2m with karras sigmas, the sampler of HyperLoRA's text-to-image workflow
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config,
        algorithm_type="dpmsolver++",
        solver_type="midpoint",
        solver_order=2,
        use_karras_sigmas=True,
        final_sigmas_type="zero",
    )
    factor = pipeline.vae_scale_factor

    @torch.inference_mode()
    def paint(spatial_prompt: str, seed: int) -> NDArray[np.uint8]:
        # drawn in float32 on the CPU, so that neither dtype nor device changes the picture's noise
        noise = torch.randn(
            (1, pipeline.unet.config.in_channels, settings.height // factor, settings.width // factor),
            generator=torch.Generator().manual_seed(seed),
        )
        images = pipeline(
            prompt=spatial_prompt,
            negative_prompt=settings.negative_prompt,
            width=settings.width,
            height=settings.height,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            latents=noise.to(device, getattr(torch, settings.dtype)),
            output_type="np",
        ).images
        return (images[0] * 255).round().astype(np.uint8)

    return paint
