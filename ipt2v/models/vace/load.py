"""A published VACE folder -> two callables: animate (all ranks) and decode (one). Legend as in condition.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from diffusers import AutoencoderKLWan, DPMSolverMultistepScheduler, UniPCMultistepScheduler
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
from ipt2v.models.vace.degrees import Degrees
from ipt2v.models.vace.denoise import Guidance, Progress, denoise, guided_velocity, unheard
from ipt2v.models.vace.engine import agreed_split, load_engine
from ipt2v.models.vace.position import Position
from ipt2v.parallel import Group
from ipt2v.records import FirstFrame

if TYPE_CHECKING:
    from ipt2v.models.vace.position import Scheduler


class Animate(Protocol):
    """(first frame, seed) -> latents [16,t,h,w]; on all ranks, and from the same start."""

    def __call__(
        self, first_frame: FirstFrame, seed: int, progress: Progress = unheard, start: Position | None = None
    ) -> NDArray[np.float32]: ...


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
    engine = load_engine(folder, settings, group, agreed_split(folder, settings, group, split))
    vae = AutoencoderKLWan.from_pretrained(folder / "vae", dtype=getattr(torch, settings.vae_dtype)).eval().to(device)
    scheduler = load_scheduler(folder, settings.scheduler, settings.flow_shift)
    with torch.inference_mode():
        empty_BCTHW, _ = empty_video(settings.num_frames, width=settings.width, height=settings.height)
        empty_latents = encode(vae, empty_BCTHW.to(device))  # once, for all videos
    group.meet()  # one rank may have read its weights many minutes before another

    @torch.inference_mode()
    def animate(
        first_frame: FirstFrame, seed: int, progress: Progress = unheard, start: Position | None = None
    ) -> NDArray[np.float32]:
        video, mask, references = start_of(first_frame, settings)
        guidance = Guidance(
            positive_BLD=padded(first_frame.temporal, settings.max_text_tokens, dtype=dtype, device=device),
            negative_BLD=padded(first_frame.negative, settings.max_text_tokens, dtype=dtype, device=device),
            condition_BCthw=condition(vae, video, mask, references, empty_latents=empty_latents).to(dtype),
            conditioning_scale=settings.conditioning_scale,
            guidance_scale=settings.guidance_scale,
        )
        num_channels = engine.transformer.config.in_channels
        noise_BCthw = draw_noise(settings, num_channels, seed, num_references=len(references)).to(device)
        velocity = guided_velocity(engine.transformer, guidance, engine.pair)
        with engine.video():
            latents_BCthw = denoise(velocity, scheduler, noise_BCthw, settings.num_inference_steps, progress, start)
        return latents_BCthw[0, :, len(references) :].cpu().numpy()  # the references' own latents are no frames

    @torch.inference_mode()
    def decode_latents(latents_CTHW: NDArray[np.float32]) -> NDArray[np.uint8]:
        return decode(vae, torch.from_numpy(latents_CTHW)[None].to(device))

    return Animator(animate=animate, decode=decode_latents)


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
