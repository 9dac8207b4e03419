"""The denoising loop: noise -> latents. Knows neither pixels nor text.

Legend: B=1, C channels, t h w latent frames and pixels, L tokens, D width of a text embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UniPCMultistepScheduler, WanVACETransformer3DModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """What steers every step, in the transformer's dtype."""

    positive_BLD: torch.Tensor  # embedding of the temporal prompt, padded
    negative_BLD: torch.Tensor
    condition_BCthw: torch.Tensor
    conditioning_scale: float  # weight of every VACE hint
    guidance_scale: float  # w of classifier-free guidance; 1 turns it off


@torch.inference_mode()
def denoise(
    transformer: WanVACETransformer3DModel,
    scheduler: UniPCMultistepScheduler,
    noise_BCthw: torch.Tensor,
    guidance: Guidance,
    num_inference_steps: int,
) -> torch.Tensor:
    """Latents [1,16,t,h,w] float32; equal, bit for bit, to WanVACEPipeline(output_type="latent") on the same noise."""
    scheduler.set_timesteps(num_inference_steps, device=noise_BCthw.device)
    latents_BCthw = noise_BCthw
    scales = torch.full(
        (len(transformer.config.vace_layers),), guidance.conditioning_scale, device=noise_BCthw.device, dtype=transformer.dtype
    )
    for timestep in scheduler.timesteps:
        inputs: dict[str, Any] = {
            "hidden_states": latents_BCthw.to(transformer.dtype),
            "timestep": timestep.expand(1),
            "control_hidden_states": guidance.condition_BCthw,
            "control_hidden_states_scale": scales,
            "return_dict": False,
        }
        velocity = transformer(encoder_hidden_states=guidance.positive_BLD, **inputs)[0]
        if guidance.guidance_scale > 1:
            unguided = transformer(encoder_hidden_states=guidance.negative_BLD, **inputs)[0]
            velocity = unguided + guidance.guidance_scale * (velocity - unguided)
        latents_BCthw = scheduler.step(velocity, timestep, latents_BCthw, return_dict=False)[0]
    return latents_BCthw
