"""SDXL: a spatial prompt -> a picture, and its faces redrawn. Legend: H height, W width, C=3 RGB."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from numpy.typing import NDArray

from ipt2v.config import FirstFrameConfig
from ipt2v.models.face_detailer import Box, detail, load_inpainter
from ipt2v.models.hyperlora.slots import Slots, install_slots
from ipt2v.models.sdxl_sampler import dpmpp_2m_karras
from ipt2v.models.sdxl_text import PromptEmbeds, embed_prompt

ImageHWC = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Painter:
    """SDXL, loaded; both give [H,W,3] uint8 RGB of the settings' size."""

    paint: Callable[[str, int], ImageHWC]  # (spatial prompt, seed)
    redraw: Callable[[ImageHWC, Sequence[Box], str, int], ImageHWC]  # (picture, boxes of faces, spatial prompt, seed)
    slots: Slots  # whom both paint; empty at first, which is the base model


def load_painter(folder: Path, settings: FirstFrameConfig, *, device: torch.device) -> Painter:
    """The pipeline of a published folder, and FaceDetailer over the same weights."""
    dtype = getattr(torch, settings.dtype)
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, dtype=dtype, add_watermarker=False).to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = dpmpp_2m_karras(pipeline)
    inpainter = load_inpainter(pipeline, settings.face_detailer)

    @lru_cache(maxsize=1)  # one prompt is painted and redrawn several times, then never again
    def embed(prompt: str) -> PromptEmbeds:
        return embed_prompt(pipeline, prompt, settings.negative_prompt)

    def paint(spatial_prompt: str, seed: int) -> ImageHWC:
        return _paint(pipeline, embed(spatial_prompt), settings, seed)

    def redraw(image_HWC: ImageHWC, boxes: Sequence[Box], spatial_prompt: str, seed: int) -> ImageHWC:
        return detail(image_HWC, boxes, inpainter(embed(spatial_prompt)), seed=seed, settings=settings.face_detailer)

    return Painter(paint=paint, redraw=redraw, slots=install_slots(pipeline.unet))


def unet_on_meta(folder: Path) -> UNet2DConditionModel:
    """The UNet of a published folder without its weights: names and sizes alone."""
    with torch.device("meta"):
        return UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))


@torch.inference_mode()
def _paint(pipeline: StableDiffusionXLPipeline, text: PromptEmbeds, settings: FirstFrameConfig, seed: int) -> ImageHWC:
    factor = pipeline.vae_scale_factor
    # drawn in float32 on the CPU, so that neither dtype nor device changes the picture's noise
    noise = torch.randn(
        (1, pipeline.unet.config.in_channels, settings.height // factor, settings.width // factor),
        generator=torch.Generator().manual_seed(seed),
    )
    images = pipeline(
        prompt_embeds=text.prompt_embeds,
        negative_prompt_embeds=text.negative_prompt_embeds,
        pooled_prompt_embeds=text.pooled_prompt_embeds,
        negative_pooled_prompt_embeds=text.negative_pooled_prompt_embeds,
        width=settings.width,
        height=settings.height,
        num_inference_steps=settings.num_inference_steps,
        guidance_scale=settings.guidance_scale,
        latents=noise.to(pipeline.device, getattr(torch, settings.dtype)),
        output_type="np",
    ).images
    return (images[0] * 255).round().astype(np.uint8)
