"""A published VACE folder -> two callables: animate (all ranks) and decode (one). Legend as in condition.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanVACETransformer3DModel
from numpy.typing import NDArray

from ipt2v.config import VideoConfig
from ipt2v.models.umt5 import padded
from ipt2v.models.vace.condition import SPATIAL_FACTOR, TEMPORAL_FACTOR, condition, decode, encode, fit
from ipt2v.models.vace.degrees import check_degree
from ipt2v.models.vace.denoise import Guidance, denoise
from ipt2v.models.vace.ulysses import parallelise
from ipt2v.parallel import Group
from ipt2v.records import FirstFrame


@dataclass(frozen=True, slots=True, kw_only=True)
class Animator:
    """VACE, loaded."""

    animate: Callable[[FirstFrame, int], NDArray[np.float32]]  # (first frame, seed) -> latents [16,t,h,w]; on all ranks
    decode: Callable[[NDArray[np.float32]], NDArray[np.uint8]]  # latents -> frames [T,H,W,3]; on any one rank


def load_animator(folder: Path, settings: VideoConfig, group: Group) -> Animator:
    """Transformer, VAE and scheduler of a published folder. Raises ValueError if the ranks do not divide the heads."""
    device, dtype = group.device, getattr(torch, settings.dtype)
    num_heads = WanVACETransformer3DModel.load_config(folder / "transformer")["num_attention_heads"]
    check_degree(group.world_size, num_heads, model=folder.name)
    transformer = WanVACETransformer3DModel.from_pretrained(folder / "transformer", dtype=dtype).eval().to(device)
    if group.ulysses is not None:
        parallelise(transformer, group.ulysses)
    vae = AutoencoderKLWan.from_pretrained(folder / "vae", dtype=getattr(torch, settings.vae_dtype)).eval().to(device)
    # flow_shift goes in through the config: the scheduler reads it there when it is made, and nowhere later
    scheduler = UniPCMultistepScheduler.from_pretrained(folder / "scheduler", flow_shift=settings.flow_shift)
    with torch.inference_mode():
        empty_latents = encode(vae, torch.zeros(1, 3, settings.num_frames, settings.height, settings.width, device=device))

    @torch.inference_mode()
    def animate(first_frame: FirstFrame, seed: int) -> NDArray[np.float32]:
        image_HWC = fit(first_frame.image_HWC, width=settings.width, height=settings.height)
        guidance = Guidance(
            positive_BLD=padded(first_frame.temporal, settings.max_text_tokens, dtype=dtype, device=device),
            negative_BLD=padded(first_frame.negative, settings.max_text_tokens, dtype=dtype, device=device),
            condition_BCthw=condition(vae, image_HWC, num_frames=settings.num_frames, empty_latents=empty_latents).to(dtype),
            conditioning_scale=settings.conditioning_scale,
            guidance_scale=settings.guidance_scale,
        )
        noise_BCthw = draw_noise(settings, transformer.config.in_channels, seed).to(device)
        return denoise(transformer, scheduler, noise_BCthw, guidance, settings.num_inference_steps)[0].cpu().numpy()

    @torch.inference_mode()
    def decode_latents(latents_CTHW: NDArray[np.float32]) -> NDArray[np.uint8]:
        return decode(vae, torch.from_numpy(latents_CTHW)[None].to(device))

    return Animator(animate=animate, decode=decode_latents)


def draw_noise(settings: VideoConfig, num_channels: int, seed: int) -> torch.Tensor:
    """[1,C,t,h,w] float32 from a CPU generator, so that every rank, device and world size starts from the same noise."""
    num_latent_frames = (settings.num_frames - 1) // TEMPORAL_FACTOR + 1
    size = (settings.height // SPATIAL_FACTOR, settings.width // SPATIAL_FACTOR)
    return torch.randn((1, num_channels, num_latent_frames, *size), generator=torch.Generator().manual_seed(seed))
