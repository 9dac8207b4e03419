"""The transformer's weights on the ranks: whole on each (none), or shared by all and gathered when needed (fsdp2, zero3)."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers import WanVACETransformer3DModel
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from ipt2v.config import VideoConfig
from ipt2v.models.deepspeed_start import is_installed, running_deepspeed
from ipt2v.models.vace.weights import Checkpoint, Stored, dtype_of, empty_transformer, find_checkpoint, read_whole
from ipt2v.models.zero3 import add_hooks, zero3_config
from ipt2v.parallel import Group


def load_weights(folder: Path, settings: VideoConfig, group: Group) -> WanVACETransformer3DModel:
    """The transformer of a published folder, with this rank's share of the weights on its device; to be called on all ranks.

    What it computes is the same however the weights are shared. Raises ValueError, on all ranks and before a tensor is read, if
    folder, settings and ranks do not fit.
    """
    transformer, dtype = empty_transformer(folder), getattr(torch, settings.dtype)

    def find() -> Checkpoint:
        _check_ranks(settings, group)
        return find_checkpoint(folder, transformer)

    checkpoint = group.agree(find, ValueError)
    for name, buffer in list(transformer.named_buffers()):
        _put(transformer, name, buffer.to(group.device))
    if settings.weights_sharding == "none" or group.world_size == 1:
        transformer.load_state_dict(read_whole(checkpoint, dtype, group), assign=True)
    elif settings.weights_sharding == "fsdp2":
        _shard_by_rows(transformer, checkpoint, dtype, group)
    else:
        _shard_by_deepspeed(transformer, checkpoint, settings, group)
    return transformer


def _check_ranks(settings: VideoConfig, group: Group) -> None:
    """Raise ValueError if these ranks cannot share weights as the settings say."""
    if settings.cpu_offload and group.world_size == 1:
        raise ValueError(
            "video: found cpu_offload on one rank, expected 2 or more; DeepSpeed's start needs torch's process group"
        )
    if settings.weights_sharding != "zero3" or group.world_size == 1:
        return
    if not is_installed():
        raise ValueError("video: weights_sharding zero3 needs deepspeed, which is not installed; pip install 'ipt2v[shard]'")
    # DeepSpeed 0.19.8 takes the GPU numbered LOCAL_RANK, in zero.Init and in its engine
    local_rank = os.environ.get("LOCAL_RANK")
    if group.device.type == "cuda" and local_rank != str(group.device.index):
        raise ValueError(
            f"video: weights_sharding zero3: found GPU {group.device.index} for LOCAL_RANK {local_rank}, expected the "
            "same number; let each task see all GPUs of its node, or use weights_sharding fsdp2"
        )


def _shard_by_rows(transformer: WanVACETransformer3DModel, checkpoint: Checkpoint, dtype: torch.dtype, group: Group) -> None:
    """FSDP2 over all ranks, a block at a time; each rank reads its own rows, and nothing is sent.

    A block's float32 and bfloat16 parameters are gathered together, as bytes: FSDP2 asks for one dtype only of those which are
    trained, and none is. So sharded and whole weights are equal bit for bit in every dtype.
    """
    for name, parameter in list(transformer.named_parameters()):
        _put(transformer, name, nn.Parameter(parameter.to(dtype_of(name, dtype)), requires_grad=False))
    # made from the group: init_device_mesh of torch 2.13 may select the GPU numbered LOCAL_RANK, which a task may not see
    world = dist.group.WORLD
    assert world is not None and group.world_size == dist.get_world_size(), "weights are shared by all ranks"
    mesh = DeviceMesh.from_group(world, group.device.type)
    for module in (*transformer.blocks, *transformer.vace_blocks, transformer):
        # the root, too: by default it stays whole after the first forward
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    shards = {}
    for name, sharded in transformer.state_dict().items():
        rows = own_rows(sharded.shape[0], group)
        own = checkpoint[name].read(name, sharded.dtype, group.device, rows)
        shards[name] = DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=sharded.shape, stride=sharded.stride())
    transformer.load_state_dict(shards, assign=True)


def own_rows(num_rows: int, group: Group) -> slice:
    """The rows that FSDP2 gives to a rank: torch.chunk's, so that the last ranks may have fewer, or none."""
    each = -(-num_rows // group.world_size)
    return slice(min(group.rank * each, num_rows), min((group.rank + 1) * each, num_rows))


def _shard_by_deepspeed(
    transformer: WanVACETransformer3DModel, checkpoint: Checkpoint, settings: VideoConfig, group: Group
) -> None:
    """ZeRO-3 over all ranks; rank 0 reads each tensor, which is sent whole to all, of which each keeps its part.

    Layer by layer: inside `with zero.Init():` DeepSpeed would make every parameter, and the rotary frequencies, of one dtype.
    """
    dtype, config = getattr(torch, settings.dtype), zero3_config(group.device, cpu_offload=settings.cpu_offload)
    with running_deepspeed(group.device) as deepspeed:
        for prefix, layer in _layers(transformer):
            names = [f"{prefix}.{leaf}".removeprefix(".") for leaf, _ in layer.named_parameters(recurse=False)]
            for name in names:
                _put(transformer, name, _on_first(name, checkpoint[name], dtype_of(name, dtype), group))
            if names:
                deepspeed.zero.Init(module=layer, config_dict_or_path=config)  # sends rank 0's values, keeps this rank's part
        add_hooks(deepspeed, transformer, config)


def _layers(transformer: WanVACETransformer3DModel) -> list[tuple[str, nn.Module]]:
    """All layers, by name: the largest first, as each is whole on all ranks for a moment; none before those inside of it."""
    layers = list(transformer.named_modules())
    inner = [(name, layer) for name, layer in layers if next(layer.children(), None) is None]
    outer = [(name, layer) for name, layer in layers if next(layer.children(), None) is not None]
    inner.sort(key=lambda named: sum(parameter.numel() for parameter in named[1].parameters()), reverse=True)
    return inner + outer[::-1]


def _on_first(name: str, stored: Stored, dtype: torch.dtype, group: Group) -> nn.Parameter:
    """The tensor on rank 0, room for it on the others."""
    if group.is_first:
        tensor = stored.read(name, dtype, group.device)
    else:
        tensor = torch.empty(stored.shape, dtype=dtype, device=group.device)
    return nn.Parameter(tensor, requires_grad=False)


def _put(transformer: WanVACETransformer3DModel, name: str, value: torch.Tensor) -> None:
    """Replace a parameter or a buffer, which stays one."""
    owner, _, leaf = name.rpartition(".")
    setattr(transformer.get_submodule(owner), leaf, value)
