"""What one rank holds of VACE, from transformer/config.json alone. No torch: the launcher may ask before it submits.

Weights are counted exactly. The rest is a lower bound of what lies side by side, not a measurement: who is refused would not
have fitted, who is let in may still run out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from ipt2v.config import VideoConfig
from ipt2v.models.vace.degrees import Degrees, degrees

Sizes = dict[str, Any]  # transformer/config.json, as published

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
NUM_VAE_PARAMETERS = 127e6  # of AutoencoderKLWan as published; whole on every rank
GATHERED_BLOCKS = 3  # FSDP2: the block that runs, the next one on its way, and the buffer that it is copied out of
ZERO_LIVE_PARAMETERS = 10**9  # DeepSpeed's default of stage3_max_live_parameters
VAE_CHANNELS, VAE_FRAMES = 96, 4  # of the VAE's last stage, which makes a chunk of 4 frames at full size
RANKS_PER_NODE = 8  # of the nodes that an error text proposes


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryGb:
    """What one rank holds, at least, in GB of 10^9 bytes."""

    weights: float  # its share of the transformer, and the VAE
    gathered: float  # what it puts together of others' shares while it computes
    activations: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{getattr(self, field.name):.1f} {field.name}" for field in fields(self))
        return f"{self.total:.1f} GB ({parts})"


def count_parameters(sizes: Sizes) -> int:
    """Number of parameters of diffusers' WanVACETransformer3DModel. Raises ValueError if it reads images beside the text."""
    return _of_root(sizes) + sizes["num_layers"] * _of_block(sizes) + sum(_of_vace_blocks(sizes))


def count_float32_parameters(sizes: Sizes) -> int:
    """How many of them stay in float32 whatever the dtype is: `_keep_in_fp32_modules` of diffusers' class."""
    width = _width(sizes)
    each = 6 * width + 2 * width * sizes["cross_attn_norm"]  # scale_shift_table and norm2
    num_blocks = sizes["num_layers"] + len(sizes["vace_layers"])
    return num_blocks * each + 2 * width + _linear(sizes["freq_dim"], width) + _linear(width, width)


def memory_gb(sizes: Sizes, settings: VideoConfig, split: Degrees) -> MemoryGb:
    """What one rank of a split holds, at least, while it makes a video."""
    num_bytes, in_float32 = BYTES[settings.dtype], count_float32_parameters(sizes)
    whole = (count_parameters(sizes) - in_float32) * num_bytes + in_float32 * 4
    sharding = settings.weights_sharding if split.world_size > 1 else "none"
    share = {"none": whole, "fsdp2": whole / split.world_size, "zero3": whole / split.world_size * (not settings.cpu_offload)}
    largest_block = max(_of_block(sizes), *_of_vace_blocks(sizes))
    gathered = {
        "none": 0,
        "fsdp2": min(whole, (_of_root(sizes) + GATHERED_BLOCKS * largest_block) * num_bytes),
        "zero3": min(whole, ZERO_LIVE_PARAMETERS * num_bytes),
    }
    return MemoryGb(
        weights=(share[sharding] + NUM_VAE_PARAMETERS * BYTES[settings.vae_dtype]) / 1e9,
        gathered=gathered[sharding] / 1e9,
        activations=_activation_bytes(sizes, settings, split) / 1e9,
    )


def check_memory(sizes: Sizes, settings: VideoConfig, split: Degrees, device_gb: float) -> None:
    """Raise ValueError if a device cannot hold what its rank needs; it says what would fit."""
    need = memory_gb(sizes, settings, split)
    if need.total <= device_gb:
        return
    ways = list(_ways_to_fit(sizes, settings, split, device_gb))
    raise ValueError(
        f"video: {settings.model} in {settings.dtype}, {settings.width}x{settings.height}x{settings.num_frames}, on {split} "
        f"needs at least {need} on each GPU, found {device_gb:.1f} GB; "
        + (f"what would fit: {', or '.join(ways)}" if ways else "nothing would fit; make a smaller video")
    )


def _ways_to_fit(sizes: Sizes, settings: VideoConfig, split: Degrees, device_gb: float) -> Iterator[str]:
    """Other settings, on these or on more ranks."""
    if settings.dtype == "float32":
        half = settings.model_copy(update={"dtype": "bfloat16"})
        if memory_gb(sizes, half, split).total <= device_gb:
            yield "video.dtype=bfloat16"
    for sharding, offload in (("fsdp2", False), ("zero3", True)):
        changed = settings.model_copy(update={"weights_sharding": sharding, "cpu_offload": offload})
        for more in _splits(sizes, settings, split):
            need = memory_gb(sizes, changed, more)
            if need.total <= device_gb:
                words = f"video.weights_sharding={sharding}" + " video.cpu_offload=true" * offload
                yield f"{words} on {more.world_size} ranks ({need.total:.1f} GB each)"
                break


def _splits(sizes: Sizes, settings: VideoConfig, split: Degrees) -> Iterator[Degrees]:
    """The one there is, if it has ranks that could share, and the best ones of 2, 4, 8, 16... ranks that are more."""
    if split.world_size > 1:
        yield split
    for world_size in (2, 4, 8, 16, 32, 64):
        num_nodes = max(1, world_size // RANKS_PER_NODE)
        if world_size > split.world_size:
            try:
                yield degrees(world_size, num_nodes, sizes["num_attention_heads"], guided=settings.guidance_scale > 1)
            except ValueError:
                continue


def _activation_bytes(sizes: Sizes, settings: VideoConfig, split: Degrees) -> float:
    """The larger of two moments: a block's feed-forward, and the VAE's last stage, which is not split over ranks.

    Tokens: hidden states, control states and a hint, and the feed-forward's inner values before and after the activation.
    """
    depth, height, width = sizes["patch_size"]
    frames = (settings.num_frames - 1) // 4 + 1 + (settings.condition != "first_frame")  # a reference is one more
    num_tokens = frames // depth * (settings.height // 8 // height) * (settings.width // 8 // width)
    local = -(-num_tokens // split.sequence)
    of_transformer = local * (3 * _width(sizes) + 2 * sizes["ffn_dim"]) * BYTES[settings.dtype]
    pixels = settings.width * settings.height * VAE_FRAMES
    of_vae = 2 * VAE_CHANNELS * pixels * BYTES[settings.vae_dtype]  # a convolution's input and output
    return max(of_transformer, of_vae) + _kept_text_bytes(sizes, settings, split)


def _kept_text_bytes(sizes: Sizes, settings: VideoConfig, split: Degrees) -> int:
    """Keys and values of the texts in every block, over all steps."""
    if not settings.speed.keep_text or settings.speed.compile != "off":
        return 0
    num_texts = 2 if settings.guidance_scale > 1 and split.cfg == 1 else 1
    num_blocks = sizes["num_layers"] + len(sizes["vace_layers"])
    return 2 * num_texts * num_blocks * settings.max_text_tokens * _width(sizes) * BYTES[settings.dtype]


def _width(sizes: Sizes) -> int:
    return sizes["num_attention_heads"] * sizes["attention_head_dim"]


def _linear(num_inputs: int, num_outputs: int) -> int:
    return (num_inputs + 1) * num_outputs


def _of_block(sizes: Sizes) -> int:
    """Self- and cross-attention with their norms of queries and keys, norm2, feed-forward, scale_shift_table."""
    width, inner = _width(sizes), sizes["ffn_dim"]
    attention = 4 * _linear(width, width) + 2 * width
    return 2 * attention + 2 * width * sizes["cross_attn_norm"] + _linear(width, inner) + _linear(inner, width) + 6 * width


def _of_vace_blocks(sizes: Sizes) -> list[int]:
    """Each as a block, with a projection for its hint; the first projects its input, too."""
    projection = _linear(_width(sizes), _width(sizes))
    return [_of_block(sizes) + projection * (2 if index == 0 else 1) for index in range(len(sizes["vace_layers"]))]


def _of_root(sizes: Sizes) -> int:
    """What lies outside of the blocks: embeddings of patches, control, time and text, and the output."""
    if sizes.get("image_dim") is not None or sizes.get("added_kv_proj_dim") is not None:
        raise ValueError(
            "transformer/config.json: found image_dim or added_kv_proj_dim, expected a VACE model, which has neither"
        )
    width, patch = _width(sizes), math.prod(sizes["patch_size"])
    patches = _linear(sizes["in_channels"] * patch, width) + _linear(sizes["vace_in_channels"] * patch, width)
    time = _linear(sizes["freq_dim"], width) + _linear(width, width) + _linear(width, 6 * width)
    text = _linear(sizes["text_dim"], width) + _linear(width, width)
    out_channels = sizes["out_channels"] or sizes["in_channels"]
    return patches + time + text + _linear(width, out_channels * patch) + 2 * width
