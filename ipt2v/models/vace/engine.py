"""VACE's transformer over the ranks of an element, with the settings' speed switches. Knows neither pixels nor text."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanVACETransformer3DModel
from torch.distributed import ProcessGroup

from ipt2v.config import VideoConfig
from ipt2v.models.vace.degrees import Degrees, check_degrees, degrees
from ipt2v.models.vace.hints import make_hints_lazy
from ipt2v.models.vace.memory import check_memory
from ipt2v.models.vace.ring import Kernel, choose_kernel
from ipt2v.models.vace.sharding import load_weights
from ipt2v.models.vace.speed import AttentionBackend, attention_backend, compile_blocks, fuse_qkv
from ipt2v.models.vace.split import parallelise
from ipt2v.models.vace.step_cache import CacheRule, StepCache, cache_steps
from ipt2v.models.vace.text import keep_text
from ipt2v.parallel import Group
from ipt2v.xdit import Subgroups

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """The transformer, ready to run on every rank."""

    transformer: WanVACETransformer3DModel
    pair: ProcessGroup | None  # the two ranks that share guidance, if there are
    num_steps: int
    num_passes: int  # forwards of a step on this rank
    cache: StepCache | None
    attention: AttentionBackend | None  # None: torch's own choice
    speaks: bool  # this rank logs

    @contextmanager
    def video(self) -> Iterator[None]:
        """Around the denoising of each video."""
        if self.cache is not None:
            self.cache.reset(self.num_steps, self.num_passes)
        with self.attention.applied() if self.attention is not None else nullcontext():
            yield
        if self.cache is not None and self.speaks:
            log.info("%s", self.cache.saved())


def agreed_split(folder: Path, settings: VideoConfig, group: Group, named: Degrees | None) -> Degrees:
    """The split of a group's ranks: the named one, checked, or the best one. Its GPUs must have the memory for it."""
    sizes = WanVACETransformer3DModel.load_config(folder / "transformer")
    num_heads, guided = sizes["num_attention_heads"], settings.guidance_scale > 1
    if named is None:
        split = degrees(group.world_size, group.num_nodes, num_heads, guided=guided)
    else:
        split = named
        check_degrees(split, group.world_size, num_heads, guided=guided, num_nodes=group.num_nodes)
    if group.device.type == "cuda":
        # the smallest GPU's, on every rank: all go on, or none
        num_bytes = min(group.gather(torch.cuda.get_device_properties(group.device).total_memory))
        check_memory(sizes, settings, split, num_bytes / 1e9)
    return split


def load_engine(folder: Path, settings: VideoConfig, group: Group, split: Degrees) -> Engine:
    """The transformer of a published folder over the ranks of a split, its hints one at a time.

    The order matters: weights are fused while they are plain, the cache wraps lazy hints, and compiling comes last.
    """
    subgroups = group.split(cfg=split.cfg, ulysses=split.ulysses, ring=split.ring) if group.world_size > 1 else None
    transformer = load_weights(folder / "transformer", settings, group)
    if settings.speed.fuse_qkv:
        fuse_qkv(transformer)
    if settings.speed.keep_text and settings.speed.compile == "off":
        keep_text(transformer)
    make_hints_lazy(transformer)
    kernel = choose_kernel(group.device, getattr(torch, settings.dtype))
    if subgroups is not None and split.sequence > 1:
        parallelise(transformer, subgroups, kernel)
    cache = _cache(transformer, settings, subgroups)
    if settings.speed.compile != "off":
        compile_blocks(transformer, mode=settings.speed.compile)
    engine = Engine(
        transformer=transformer,
        pair=subgroups.cfg if subgroups is not None and split.cfg == 2 else None,
        num_steps=settings.num_inference_steps,
        num_passes=2 if settings.guidance_scale > 1 and split.cfg == 1 else 1,
        cache=cache,
        attention=_attention(transformer, settings, group.device),
        speaks=group.is_first,
    )
    if group.is_first:
        facts = ", ".join(_facts(settings, engine, split, kernel))
        log.info("video on %d ranks, %d nodes: %s", group.world_size, group.num_nodes, facts)
    return engine


def _cache(transformer: WanVACETransformer3DModel, settings: VideoConfig, subgroups: Subgroups | None) -> StepCache | None:
    rule = settings.step_cache
    if not rule.threshold:
        return None
    return cache_steps(transformer, CacheRule(**rule.model_dump()), subgroups)


def _attention(transformer: WanVACETransformer3DModel, settings: VideoConfig, device: torch.device) -> AttentionBackend | None:
    if not settings.speed.best_attention:
        return None
    sizes = transformer.config
    return attention_backend(
        device, getattr(torch, settings.dtype), num_heads=sizes.num_attention_heads, head_width=sizes.attention_head_dim
    )


def _facts(settings: VideoConfig, engine: Engine, split: Degrees, kernel: Kernel) -> Iterator[str]:
    """What the log should know of how videos are computed."""
    yield str(split)
    if split.ring > 1:
        yield f"ring attention by {kernel.name}"
    if settings.weights_sharding != "none":
        yield f"weights by {settings.weights_sharding}"
    if engine.attention is not None:
        yield f"attention by {engine.attention.name}"
    if settings.speed.fuse_qkv:
        yield "fused projections"
    if settings.speed.compile != "off":
        yield f"compiled ({settings.speed.compile})"
