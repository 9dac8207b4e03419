"""Tokens swapped for heads, and back, among the ranks of a Ulysses group (DeepSpeed-Ulysses, arXiv 2309.14509).

Legend: B batch, s tokens of one rank, L = U*s tokens of the group, U ranks, N heads, n = N/U, D head width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def tokens_for_heads(x_BsND: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[B,s,N,D] of own tokens, all heads -> [B,U*s,N/U,D] of all tokens, own heads."""
    num_ranks = dist.get_world_size(group)
    if num_ranks == 1:
        return x_BsND
    send = torch.stack(x_BsND.chunk(num_ranks, dim=2)).contiguous()  # [U,B,s,n,D], part u for rank u
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    return torch.cat(received.unbind(0), dim=1)


def heads_for_tokens(x_BLnD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """[B,U*s,N/U,D] of all tokens, own heads -> [B,s,N,D] of own tokens, all heads."""
    num_ranks = dist.get_world_size(group)
    if num_ranks == 1:
        return x_BLnD
    send = torch.stack(x_BLnD.chunk(num_ranks, dim=1)).contiguous()
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    return torch.cat(received.unbind(0), dim=2)
