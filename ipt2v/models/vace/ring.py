"""Attention over keys and values that go round a ring of ranks (arXiv 2310.01889), and the kernels that make it possible.

Every rank keeps its queries. While it attends over one block of keys and values, the next is on its way; the results are merged
by their log-sum-exps, in float32. Legend: B batch, N heads, Q queries, K keys of one block, D head width; 2 is (keys, values).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

# (queries BNQD, keys BNKD, values BNKD) -> (attention BNQD, log-sum-exp of the scores BNQ in float32)
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One implementation of Attend."""

    name: str
    attend: Attend


def num_valid_keys(length: int, block_size: int, num_blocks: int) -> tuple[int, ...]:
    """How many tokens of each block are not padding: pads are a suffix of the sequence, `length` tokens are not."""
    return tuple(min(max(length - block * block_size, 0), block_size) for block in range(num_blocks))


def ring_attention(
    query_BNQD: torch.Tensor,
    own_2BNKD: torch.Tensor,
    valid: Sequence[int],
    group: dist.ProcessGroup,
    attend: Attend,
) -> torch.Tensor:
    """[B,N,Q,D] float32: attention of own queries over the blocks of all ranks, of which block b has valid[b] keys."""
    num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    block_2BNKD = own_2BNKD
    # exp(-inf) = 0: nothing has been attended over yet
    output_BNQD = torch.zeros(query_BNQD.shape, dtype=torch.float32, device=query_BNQD.device)
    lse_BNQ = torch.full(query_BNQD.shape[:3], -torch.inf, device=query_BNQD.device)
    for step in range(num_ranks):
        coming = pass_on(block_2BNKD, group) if step < num_ranks - 1 else None
        num_keys = valid[(rank - step) % num_ranks]
        if num_keys:  # a softmax over no keys is no number
            found = attend(query_BNQD, *block_2BNKD[:, :, :, :num_keys].unbind(0))
            output_BNQD, lse_BNQ = merge(output_BNQD, lse_BNQ, *found)
        if coming is not None:
            block_2BNKD = coming()
    return output_BNQD


def merge(
    first_BNQD: torch.Tensor, first_lse_BNQ: torch.Tensor, second_BNQD: torch.Tensor, second_lse_BNQ: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two sets of keys from that over each (FlashAttention's online softmax, arXiv 2205.14135, section 3.1).

    The weight of the second, exp(b) / (exp(a) + exp(b)), is sigmoid(b - a).
    """
    weight_BNQ = torch.sigmoid(second_lse_BNQ - first_lse_BNQ)
    merged_BNQD = torch.lerp(first_BNQD, second_BNQD.float(), weight_BNQ[..., None])
    return merged_BNQD, torch.logaddexp(first_lse_BNQ, second_lse_BNQ)


def pass_on(block: torch.Tensor, group: dist.ProcessGroup) -> Callable[[], torch.Tensor]:
    """Start sending `block` to the next rank of the ring, and receiving that of the one before; call the result for it."""
    num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    successor = dist.get_global_rank(group, (rank + 1) % num_ranks)
    predecessor = dist.get_global_rank(group, (rank - 1) % num_ranks)
    received = torch.empty_like(block)
    requests = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, block, successor, group), dist.P2POp(dist.irecv, received, predecessor, group)]
    )

    def wait() -> torch.Tensor:
        for request in requests:
            request.wait()
        return received

    return wait


def choose_kernel(device: torch.device, dtype: torch.dtype) -> Kernel:
    """The best kernel that gives the log-sum-exp for tensors on a device; F.scaled_dot_product_attention does not."""
    if device.type == "cpu":
        return Kernel(name="aten flash attention for CPUs", attend=_aten_cpu)
    if dtype == torch.float32:  # no flash kernel takes it
        return Kernel(name="aten memory-efficient attention", attend=_aten_efficient)
    try:
        flash_attn = importlib.import_module("flash_attn")
    except ImportError:  # also raised where it is installed for another torch
        return Kernel(name="aten flash attention", attend=_aten_flash)
    return Kernel(name=f"flash-attn {flash_attn.__version__}", attend=_by_flash_attn(flash_attn.flash_attn_func))


def _aten_cpu(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)


def _aten_flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[:2]


def _aten_efficient(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    output, lse = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[:2]
    return output, lse[:, :, : query.shape[2]]  # it is padded to a multiple of 32


def _by_flash_attn(flash_attn_func: Callable[..., Any]) -> Attend:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inputs = (tensor.transpose(1, 2) for tensor in (query, key, value))  # its layout is BLND
        output, lse, _ = flash_attn_func(*inputs, return_attn_probs=True)
        return output.transpose(1, 2), lse

    return attend
