"""The denoising loop: noise -> latents. Knows neither pixels nor text.

Legend: B=1, C channels, t h w latent frames and pixels, L tokens, D width of a text embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from diffusers import WanVACETransformer3DModel

from ipt2v.models.vace.position import Position, go_to, position_of

if TYPE_CHECKING:
    from ipt2v.models.vace.position import Scheduler

Velocity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (latents, timestep) -> velocity, as latents
Progress = Callable[[Position], None]  # after each step, on every rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """What steers every step, in the transformer's dtype."""

    positive_BLD: torch.Tensor  # embedding of the temporal prompt, padded
    negative_BLD: torch.Tensor
    condition_BCthw: torch.Tensor
    conditioning_scale: float  # weight of every VACE hint
    guidance_scale: float  # w of classifier-free guidance (arXiv 2207.12598); 1 turns it off


def unheard(_position: Position) -> None:
    """Nobody wants to know how far it is."""


@torch.inference_mode()
def denoise(
    velocity: Velocity,
    scheduler: Scheduler,
    noise_BCthw: torch.Tensor,
    num_inference_steps: int,
    progress: Progress = unheard,
    start: Position | None = None,
) -> torch.Tensor:
    """Latents [1,16,t,h,w] float32; equal, bit for bit, to WanVACEPipeline(output_type="latent") on the same noise.

    From `start`, if there is one, with the steps that are left: equal to all of them in one go.
    """
    scheduler.set_timesteps(num_inference_steps, device=noise_BCthw.device)
    latents_BCthw, num_done = noise_BCthw, 0
    if start is not None:
        go_to(scheduler, start)
        latents_BCthw, num_done = start.latents_BCthw.to(noise_BCthw.device), start.num_done
    for step_index, timestep in enumerate(scheduler.timesteps[num_done:], num_done):
        found = velocity(latents_BCthw, timestep)
        latents_BCthw = scheduler.step(found, timestep, latents_BCthw, return_dict=False)[0]
        progress(position_of(scheduler, latents_BCthw, step_index + 1))
    return latents_BCthw


def guided_velocity(
    transformer: WanVACETransformer3DModel, guidance: Guidance, pair: dist.ProcessGroup | None = None
) -> Velocity:
    """The velocity under guidance. In a CFG pair, rank 0 runs the positive and rank 1 the negative embedding."""
    text_BLD, no_text_BLD, weight = guidance.positive_BLD, guidance.negative_BLD, guidance.guidance_scale
    scales = torch.full(
        (len(transformer.config.vace_layers),),
        guidance.conditioning_scale,
        device=guidance.condition_BCthw.device,
        dtype=transformer.dtype,
    )

    def forward(latents_BCthw: torch.Tensor, timestep: torch.Tensor, text_BLD: torch.Tensor) -> torch.Tensor:
        inputs: dict[str, Any] = {
            "hidden_states": latents_BCthw.to(transformer.dtype),
            "timestep": timestep.expand(1),
            "encoder_hidden_states": text_BLD,
            "control_hidden_states": guidance.condition_BCthw,
            "control_hidden_states_scale": scales,
            "return_dict": False,
        }
        return transformer(**inputs)[0]

    def velocity(latents_BCthw: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        if weight <= 1:
            return forward(latents_BCthw, timestep, text_BLD)
        if pair is None:
            guided, unguided = (forward(latents_BCthw, timestep, text) for text in (text_BLD, no_text_BLD))
        else:
            own = forward(latents_BCthw, timestep, (text_BLD, no_text_BLD)[dist.get_rank(pair)])
            guided, unguided = gathered(own, pair)
        return unguided + weight * (guided - unguided)

    return velocity


def gathered(own: torch.Tensor, group: dist.ProcessGroup) -> list[torch.Tensor]:
    """Each rank's tensor, in the group's order."""
    parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own.contiguous(), group=group)
    return parts
