"""The tokens of diffusers' stock VACE transformer split over ranks, Ulysses x ring, with weights and forward untouched.

Between patch embedding and output projection a rank holds its own tokens only. Self-attention alone needs the others': Ulysses
swaps tokens for heads, the ring passes keys and values round. Padding is exact: pads are a suffix of the sequence, no key or
value of theirs enters a softmax, and their rows are dropped at the end.
Legend: B batch, C channels, L tokens, s tokens of this rank, U Ulysses ranks, N heads, n = N/U, D head width; t h w patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import WanVACETransformer3DModel

from ipt2v.models.vace.ring import Kernel, num_valid_keys, ring_attention
from ipt2v.models.vace.ulysses import heads_for_tokens, tokens_for_heads
from ipt2v.xdit import Subgroups


def parallelise(transformer: WanVACETransformer3DModel, groups: Subgroups, kernel: Kernel) -> None:
    """Make `transformer` compute its forward over a sequence group; every rank gets the whole result. Once, after loading."""
    split = _Split(groups=groups, length=0)
    processor = SplitAttention(split, kernel)
    for block in (*transformer.blocks, *transformer.vace_blocks):
        block.attn1.set_processor(processor)
    transformer.rope.register_forward_hook(split.take_rotary)
    transformer.patch_embedding.register_forward_hook(split.take_patches)
    transformer.vace_patch_embedding.register_forward_hook(split.take_patches)
    transformer.proj_out.register_forward_hook(split.join)


@dataclass(slots=True)
class _Split:
    """Which tokens are this rank's. The length is set at the start of each forward, by the rotary embedding."""

    groups: Subgroups
    length: int

    def take(self, tensor_BLx: torch.Tensor) -> torch.Tensor:
        """This rank's slice of dim 1, zero-padded to the same size on every rank; the whole may be freed."""
        num_ranks, rank = dist.get_world_size(self.groups.sequence), dist.get_rank(self.groups.sequence)
        local = -(-self.length // num_ranks)
        padding = [0, 0] * (tensor_BLx.dim() - 2) + [0, local * num_ranks - tensor_BLx.shape[1]]
        return F.pad(tensor_BLx, padding).narrow(1, rank * local, local).clone(memory_format=torch.contiguous_format)

    def take_rotary(self, _module: Any, _args: Any, frequencies: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        self.length = frequencies[0].shape[1]
        return tuple(self.take(frequency) for frequency in frequencies)

    def take_patches(self, _module: Any, _args: Any, patches_BCthw: torch.Tensor) -> torch.Tensor:
        # the forward goes on with flatten(2).transpose(1, 2), which makes tokens of [B,C,s] as of [B,C,t,h,w]
        return self.take(patches_BCthw.flatten(2).transpose(1, 2)).transpose(1, 2)

    def join(self, _module: Any, _args: Any, local_BsC: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(local_BsC) for _ in range(dist.get_world_size(self.groups.sequence))]
        dist.all_gather(parts, local_BsC.contiguous(), group=self.groups.sequence)
        return torch.cat(parts, dim=1)[:, : self.length]


class SplitAttention:
    """Attention processor for attn1: as WanAttnProcessor, over the tokens of all ranks."""

    def __init__(self, split: _Split, kernel: Kernel) -> None:
        self.split = split
        self.kernel = kernel

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        ulysses = self.split.groups.ulysses
        rotary = kwargs["rotary_emb"] if "rotary_emb" in kwargs else args[2]
        query, key, value = projections(attn, hidden_states)
        query = attn.norm_q(query).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(key).unflatten(2, (attn.heads, -1))
        value = value.unflatten(2, (attn.heads, -1))
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        swapped = [tokens_for_heads(tensor, ulysses).transpose(1, 2) for tensor in (query, key, value)]
        output = heads_for_tokens(self.attention(*swapped).transpose(1, 2), ulysses)
        return attn.to_out[1](attn.to_out[0](output.flatten(2).type_as(hidden_states)))

    def attention(self, query_BnLD: torch.Tensor, key_BnLD: torch.Tensor, value_BnLD: torch.Tensor) -> torch.Tensor:
        """Attention of the queries of a Ulysses group over all keys, without the pads."""
        length, ring = self.split.length, self.split.groups.ring
        if dist.get_world_size(ring) == 1:
            return F.scaled_dot_product_attention(query_BnLD, key_BnLD[:, :, :length], value_BnLD[:, :, :length])
        valid = num_valid_keys(length, key_BnLD.shape[2], dist.get_world_size(ring))
        output = ring_attention(query_BnLD, torch.stack([key_BnLD, value_BnLD]), valid, ring, self.kernel.attend)
        return output.type_as(query_BnLD)  # before the swap back: what goes over the wire is in the model's dtype


def projections(attn: Any, hidden_BsC: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Query, key and value, in one product if fuse_qkv has joined their weights."""
    if attn.fused_projections:
        return attn.to_qkv(hidden_BsC).chunk(3, dim=-1)
    return attn.to_q(hidden_BsC), attn.to_k(hidden_BsC), attn.to_v(hidden_BsC)


def rotate(x_BsND: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding on interleaved pairs, as in diffusers' WanAttnProcessor."""
    first, second = x_BsND.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    rotated = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return rotated.flatten(-2).type_as(x_BsND)
