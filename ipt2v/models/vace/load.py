"""A published VACE folder -> two callables: animate (all ranks) and decode (one). Legend as in condition.py."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan, DPMSolverMultistepScheduler, UniPCMultistepScheduler, WanVACETransformer3DModel
from numpy.typing import NDArray

from ipt2v.config import VideoConfig
from ipt2v.models.umt5 import padded
from ipt2v.models.vace.condition import (
    SPATIAL_FACTOR,
    TEMPORAL_FACTOR,
    condition,
    decode,
    empty_video,
    encode,
    first_frame_video,
    fit,
    letterbox,
)
from ipt2v.models.vace.degrees import Degrees, check_degrees, degrees
from ipt2v.models.vace.denoise import Guidance, Progress, Scheduler, denoise, guided_velocity, unheard
from ipt2v.models.vace.hints import make_hints_lazy
from ipt2v.models.vace.ring import choose_kernel
from ipt2v.models.vace.split import parallelise
from ipt2v.parallel import Group
from ipt2v.records import FirstFrame

log = logging.getLogger(__name__)


class Animate(Protocol):
    """(first frame, seed) -> latents [16,t,h,w]; on all ranks."""

    def __call__(self, first_frame: FirstFrame, seed: int, progress: Progress = unheard) -> NDArray[np.float32]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Animator:
    """VACE, loaded."""

    animate: Animate
    decode: Callable[[NDArray[np.float32]], NDArray[np.uint8]]  # latents -> frames [T,H,W,3]; on any one rank


def load_animator(folder: Path, settings: VideoConfig, group: Group, split: Degrees | None = None) -> Animator:
    """Transformer, VAE and scheduler of a published folder, over all ranks of the group.

    The ranks are split as degrees() says, unless a split is named. Raises ValueError if they cannot share the model.
    """
    device, dtype = group.device, getattr(torch, settings.dtype)
    split = agreed_split(folder, settings, group, split)
    transformer, pair = load_transformer(folder, dtype, group, split)
    vae = AutoencoderKLWan.from_pretrained(folder / "vae", dtype=getattr(torch, settings.vae_dtype)).eval().to(device)
    scheduler = load_scheduler(folder, settings.scheduler, settings.flow_shift)
    with torch.inference_mode():
        empty_latents = encode(
            vae, empty_video(settings.num_frames, width=settings.width, height=settings.height)[0].to(device)
        )
    group.meet()  # one rank may have read its weights many minutes before another

    @torch.inference_mode()
    def animate(first_frame: FirstFrame, seed: int, progress: Progress = unheard) -> NDArray[np.float32]:
        video, mask, references = start_of(first_frame, settings)
        guidance = Guidance(
            positive_BLD=padded(first_frame.temporal, settings.max_text_tokens, dtype=dtype, device=device),
            negative_BLD=padded(first_frame.negative, settings.max_text_tokens, dtype=dtype, device=device),
            condition_BCthw=condition(vae, video, mask, references, empty_latents=empty_latents).to(dtype),
            conditioning_scale=settings.conditioning_scale,
            guidance_scale=settings.guidance_scale,
        )
        velocity = guided_velocity(transformer, guidance, pair)
        noise_BCthw = draw_noise(settings, transformer.config.in_channels, seed, num_references=len(references)).to(device)
        latents_BCthw = denoise(velocity, scheduler, noise_BCthw, settings.num_inference_steps, progress)
        return latents_BCthw[0, :, len(references) :].cpu().numpy()  # the references' own latents are no frames

    @torch.inference_mode()
    def decode_latents(latents_CTHW: NDArray[np.float32]) -> NDArray[np.uint8]:
        return decode(vae, torch.from_numpy(latents_CTHW)[None].to(device))

    return Animator(animate=animate, decode=decode_latents)


def agreed_split(folder: Path, settings: VideoConfig, group: Group, named: Degrees | None) -> Degrees:
    """The split of a group's ranks: the named one, checked, or the best one."""
    num_heads = WanVACETransformer3DModel.load_config(folder / "transformer")["num_attention_heads"]
    guided = settings.guidance_scale > 1
    if named is None:
        return degrees(group.world_size, group.num_nodes, num_heads, guided=guided)
    check_degrees(named, group.world_size, num_heads, guided=guided, num_nodes=group.num_nodes)
    return named


def load_transformer(
    folder: Path, dtype: torch.dtype, group: Group, split: Degrees
) -> tuple[WanVACETransformer3DModel, dist.ProcessGroup | None]:
    """VACE's transformer over the ranks of a split, its hints one at a time; and the CFG pair, if the split has one."""
    subgroups = group.split(cfg=split.cfg, ulysses=split.ulysses, ring=split.ring) if group.world_size > 1 else None
    transformer = WanVACETransformer3DModel.from_pretrained(folder / "transformer", dtype=dtype).eval().to(group.device)
    make_hints_lazy(transformer)
    if subgroups is None:
        return transformer, None
    kernel = choose_kernel(group.device, dtype)
    if split.sequence > 1:
        parallelise(transformer, subgroups, kernel)
    if group.is_first:
        ring = f", ring attention by {kernel.name}" if split.ring > 1 else ""
        log.info("video on %d ranks, %d nodes: %s%s", group.world_size, group.num_nodes, split, ring)
    return transformer, subgroups.cfg if split.cfg == 2 else None


def load_scheduler(folder: Path, name: Literal["unipc", "dpm++"], flow_shift: float) -> Scheduler:
    """The published scheduler, UniPC (arXiv 2302.04867), or DPM-Solver++ (arXiv 2211.01095) on the same flow; Wan2.1 has both.

    flow_shift goes in through the config: the scheduler reads it there when it is made, and nowhere later.
    """
    config = UniPCMultistepScheduler.load_config(folder / "scheduler")
    if name == "unipc":
        return UniPCMultistepScheduler.from_config(config, flow_shift=flow_shift)
    shared = {key: config[key] for key in ("num_train_timesteps", "solver_order") if key in config}
    return DPMSolverMultistepScheduler(
        **shared, flow_shift=flow_shift, use_flow_sigmas=True, prediction_type="flow_prediction", algorithm_type="dpmsolver++"
    )


def start_of(first_frame: FirstFrame, settings: VideoConfig) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """(video, mask, references), what the settings' condition makes of a record. Raises ValueError if it has no first frame."""
    size = {"width": settings.width, "height": settings.height}
    references = () if settings.condition == "first_frame" else (letterbox(first_frame.reference_HWC, **size),)
    if settings.condition == "reference":
        return *empty_video(settings.num_frames, **size), references
    if first_frame.image_HWC is None:
        raise ValueError(f"{first_frame.key}: the record has no first frame, and video.condition is {settings.condition!r}")
    return *first_frame_video(fit(first_frame.image_HWC, **size), settings.num_frames), references


def draw_noise(settings: VideoConfig, num_channels: int, seed: int, *, num_references: int = 0) -> torch.Tensor:
    """[1,C,r+t,h,w] float32 from a CPU generator, so that every rank, device and world size starts from the same noise."""
    num_latent_frames = (settings.num_frames - 1) // TEMPORAL_FACTOR + 1 + num_references
    size = (settings.height // SPATIAL_FACTOR, settings.width // SPATIAL_FACTOR)
    return torch.randn((1, num_channels, num_latent_frames, *size), generator=torch.Generator().manual_seed(seed))
