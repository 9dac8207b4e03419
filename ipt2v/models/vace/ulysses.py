"""Ulysses sequence parallelism for diffusers' stock VACE transformer, weights and forward untouched.

Tokens are split over the ranks between patch embedding and output projection; self-attention swaps them for heads and back
(DeepSpeed-Ulysses, arXiv 2309.14509). Padding is exact: pads are a suffix of the sequence and leave keys and values before the
softmax. Legend: B batch, L tokens, s tokens of this rank, P ranks, N heads, n = N/P, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import WanVACETransformer3DModel


def parallelise(transformer: WanVACETransformer3DModel, group: dist.ProcessGroup) -> None:
    """Make `transformer` compute its forward over `group`; every rank gets the whole result. Once, after loading."""
    split = _Split(group=group, rank=dist.get_rank(group), num_ranks=dist.get_world_size(group), length=0)
    for block in (*transformer.blocks, *transformer.vace_blocks):
        block.attn1.set_processor(UlyssesAttention(split))
    transformer.rope.register_forward_hook(split.take_rotary)
    # only the first VACE block reads the hidden states; its hints stay local and are added to local hidden states
    transformer.vace_blocks[0].register_forward_pre_hook(split.take_control)
    transformer.blocks[0].register_forward_pre_hook(split.take_hidden)
    transformer.proj_out.register_forward_hook(split.join)


@dataclass(slots=True)
class _Split:
    """Which tokens are this rank's. The length is set at the start of each forward, by the rotary embedding."""

    group: dist.ProcessGroup
    rank: int
    num_ranks: int
    length: int

    def take(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's slice of dim 1, zero-padded to the same size on every rank."""
        local = -(-tensor.shape[1] // self.num_ranks)
        padding = [0, 0] * (tensor.dim() - 2) + [0, local * self.num_ranks - tensor.shape[1]]
        return F.pad(tensor, padding).narrow(1, self.rank * local, local)

    def take_rotary(self, _module: Any, _args: Any, frequencies: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        self.length = frequencies[0].shape[1]
        return tuple(self.take(frequency) for frequency in frequencies)

    def take_hidden(self, _module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.take(args[0]), *args[1:])

    def take_control(self, _module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, text, control, *rest = args
        return (self.take(hidden), text, self.take(control), *rest)

    def join(self, _module: Any, _args: Any, local: torch.Tensor) -> torch.Tensor:
        parts = [torch.empty_like(local) for _ in range(self.num_ranks)]
        dist.all_gather(parts, local.contiguous(), group=self.group)
        return torch.cat(parts, dim=1)[:, : self.length]


class UlyssesAttention:
    """Attention processor for attn1: as WanAttnProcessor, with tokens swapped for heads around the softmax."""

    def __init__(self, split: _Split) -> None:
        self.split = split

    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rotary = kwargs["rotary_emb"] if "rotary_emb" in kwargs else args[2]
        query = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        key = attn.norm_k(attn.to_k(hidden_states)).unflatten(2, (attn.heads, -1))
        value = attn.to_v(hidden_states).unflatten(2, (attn.heads, -1))
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        query, key, value = (tokens_for_heads(tensor, self.split.group) for tensor in (query, key, value))
        key, value = key[:, : self.split.length], value[:, : self.split.length]  # pads never enter the softmax
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
        output = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        output = heads_for_tokens(output, self.split.group).flatten(2).type_as(hidden_states)
        return attn.to_out[1](attn.to_out[0](output))


def rotate(x_BLND: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding on interleaved pairs, as in diffusers' WanAttnProcessor."""
    first, second = x_BLND.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    rotated = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return rotated.flatten(-2).type_as(x_BLND)


def tokens_for_heads(x_BsND: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[B,s,N,D] of own tokens, all heads -> [B,P*s,N/P,D] of all tokens, own heads."""
    num_ranks = dist.get_world_size(group)
    send = torch.stack(x_BsND.chunk(num_ranks, dim=2)).contiguous()  # [P,B,s,n,D], part p for rank p
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    return torch.cat(received.unbind(0), dim=1)


def heads_for_tokens(x_BLnD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[B,P*s,N/P,D] of all tokens, own heads -> [B,s,N,D] of own tokens, all heads."""
    num_ranks = dist.get_world_size(group)
    send = torch.stack(x_BLnD.chunk(num_ranks, dim=1)).contiguous()
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    return torch.cat(received.unbind(0), dim=2)
