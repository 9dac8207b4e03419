"""A transformers model cut into slices, one for each rank, by DeepSpeed. Knows no text."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig

from ipt2v.models.deepspeed_start import is_installed, running_deepspeed


def check_slices(folder: Path, num_ranks: int) -> None:
    """Raise ValueError if the model in `folder` cannot be cut for so many ranks, or none can here. Reads no tensors."""
    config = AutoConfig.from_pretrained(folder)
    heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
    both = math.gcd(heads, key_value_heads)
    if both % num_ranks:
        legal = ", ".join(str(number) for number in range(1, both + 1) if both % number == 0)
        raise ValueError(
            f"{num_ranks} ranks do not divide the {heads} attention heads and the {key_value_heads} key-value heads of "
            f"{folder.name}; use one of {legal}"
        )
    if not is_installed():
        raise ValueError(
            f"{folder.name} on {num_ranks} ranks needs deepspeed, which is not installed; "
            "pip install 'ipt2v[shard]', or use one rank"
        )


def own_slice(model: Any, device: torch.device) -> Any:
    """The transformers model `model` with this rank's slice of each matrix, on `device`, which is torch's current one.

    To be called on every rank with all of `model` on the CPU; it is used up. It is never whole on a device: DeepSpeed moves
    each slice as it is cut (TensorParallel_Layer.move in module_inject/layers.py), and the rest, whole on each rank
    (embedding, norms), after the last one (`.to(device)` in inference/engine.py).
    """
    buffers = dict(model.named_buffers())
    with running_deepspeed(device) as deepspeed:
        sliced = deepspeed.init_inference(model, config=_config(model.dtype)).module
    # It casts everything to model.dtype; but rotary frequencies are float32: in bfloat16, position 1000 is off by up to 2.
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        setattr(sliced.get_submodule(owner), leaf, buffer.to(device))
    return sliced


def _config(dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's settings for slices over all ranks."""
    world = dist.group.WORLD
    tensor_parallel = {
        "tp_size": dist.get_world_size(),
        "tp_group": world,
        # Without it DeepSpeed selects the GPU numbered LOCAL_RANK, which a task that was given one GPU of its own does not see.
        "mpu": SimpleNamespace(get_model_parallel_group=lambda: world),
        "tp_grain_size": 1,  # equal slices also where a rank's share is not a multiple of 64 columns
    }
    return {"tensor_parallel": tensor_parallel, "dtype": dtype, "replace_with_kernel_inject": False}
