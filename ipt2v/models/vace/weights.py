"""The transformer's published tensors on the ranks: read tensor by tensor, once for each node, and checked before the first.

Which rank keeps what is in sharding.py. No tensor is in host memory twice, and none waits there for the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from diffusers import WanVACETransformer3DModel
from safetensors import SafetensorError, safe_open

from ipt2v.parallel import Group
from ipt2v.watch import collective_timeout

T = TypeVar("T")

NAME = "diffusion_pytorch_model.safetensors"  # diffusers' SAFETENSORS_WEIGHTS_NAME
ALIGNMENT = 64  # bytes, of all memory that torch allocates itself
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """Where a published tensor lies."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # in safetensors' words

    def read(self, name: str, dtype: torch.dtype, device: torch.device, rows: slice | None = None) -> torch.Tensor:
        """The tensor, or rows of it, straight onto the device."""
        with safe_open(self.file, framework="pt", device=str(device)) as file:
            tensor = (file.get_tensor(name) if rows is None else file.get_slice(name)[rows]).to(dtype)
        # On a CPU it is a view of the file, which aligns to 8 bytes; products of matrices round otherwise at less than 16.
        return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


Checkpoint = dict[str, Stored]  # by name; file by file, and in the order in which a file holds them


def empty_transformer(folder: Path) -> WanVACETransformer3DModel:
    """The transformer of a folder's config.json, its parameters on the meta device, its buffers on the CPU.

    Buffers are in no checkpoint: rotary frequencies are computed when the model is made, as in diffusers' from_pretrained.
    """
    with init_empty_weights(include_buffers=False):
        transformer = WanVACETransformer3DModel.from_config(WanVACETransformer3DModel.load_config(folder))
    return transformer.eval().requires_grad_(False)


def dtype_of(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter in a model of `dtype`: diffusers keeps some in float32, by a word of their name."""
    kept = set(WanVACETransformer3DModel._keep_in_fp32_modules)
    return torch.float32 if kept.intersection(name.split(".")) else dtype


def find_checkpoint(folder: Path, transformer: WanVACETransformer3DModel) -> Checkpoint:
    """Where each tensor of the transformer lies in a folder. Reads headers only.

    Raises ValueError, naming file and key, unless the folder holds exactly the transformer's tensors in their shapes.
    """
    index = folder / f"{NAME}.index.json"
    expected = {name: tuple(parameter.shape) for name, parameter in transformer.state_dict().items()}
    file_of = _read_index(index) if index.is_file() else dict.fromkeys(expected, NAME)
    found: Checkpoint = {}
    for file in sorted(set(file_of.values())):
        for name, stored in _stored_in(folder / file):
            if name in found:
                raise ValueError(f"{stored.file}: {name}: found a second time, expected once; it is in {found[name].file.name}")
            if name in expected or not _is_ignored(name):
                found[name] = stored
    missing = [f"{folder / file_of.get(name, index.name)}: {name}: missing" for name in expected if name not in found]
    misfits = {name: _misfit(stored, expected.get(name)) for name, stored in found.items()}
    faults = missing + [f"{found[name].file}: {name}: {misfit}" for name, misfit in misfits.items() if misfit]
    if faults:
        rest = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ValueError(f"{faults[0]}{rest}; fetch the folder again, or take the config.json that belongs to it")
    return found


def _misfit(stored: Stored, shape: tuple[int, ...] | None) -> str:
    """Why a tensor is not one of a parameter of this shape; "" if it is."""
    if shape is None:
        return "unexpected, the model has no such parameter"
    if stored.shape != shape:
        return f"found shape {list(stored.shape)}, expected {list(shape)}"
    return "" if stored.dtype in FLOATS else f"found {stored.dtype}, expected one of {', '.join(FLOATS)}"


def _is_ignored(name: str) -> bool:
    """Whether diffusers' from_pretrained lets the key pass, too, though the model has no such parameter."""
    return any(word in name for word in WanVACETransformer3DModel._keys_to_ignore_on_load_unexpected)


def _read_index(index: Path) -> dict[str, str]:
    """Which file each tensor is in, as diffusers writes it."""
    try:
        return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index}: not readable as an index of safetensors files ({error!r}); fetch it again") from None


def _stored_in(path: Path) -> Iterator[tuple[str, Stored]]:
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.offset_keys():  # in the order of the bytes: a file is read from its start to its end
                tensor = file.get_slice(name)
                yield name, Stored(file=path, shape=tuple(tensor.get_shape()), dtype=tensor.get_dtype())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not readable as safetensors ({error}); fetch it again") from None


def read_whole(checkpoint: Checkpoint, dtype: torch.dtype, group: Group) -> dict[str, torch.Tensor]:
    """Every tensor, on every rank's device. The first rank of each node reads, and sends to the others of its node."""
    with _node_of(group) as node:
        return {name: _shared(name, stored, dtype_of(name, dtype), group, node) for name, stored in checkpoint.items()}


def _shared(
    name: str, stored: Stored, dtype: torch.dtype, group: Group, node: tuple[int, dist.ProcessGroup] | None
) -> torch.Tensor:
    if node is None:
        return stored.read(name, dtype, group.device)
    reader, ranks = node
    if group.rank == reader:
        tensor = stored.read(name, dtype, group.device).contiguous()
    else:
        tensor = torch.empty(stored.shape, dtype=dtype, device=group.device)
    dist.broadcast(tensor.view(-1).view(torch.uint8), src=reader, group=ranks)  # as bytes: gloo does not know every dtype
    return tensor


@contextmanager
def _node_of(group: Group) -> Iterator[tuple[int, dist.ProcessGroup] | None]:
    """(the rank that reads, the ranks) of this rank's node; None if it is alone there. To be called on all ranks."""
    per_node = group.world_size // group.num_nodes
    if per_node == 1:
        yield None
        return
    timeout = collective_timeout()  # a new group does not take over the world's
    # every rank makes every node's group, in the same order: torch asks for it
    nodes = [dist.new_group(range(first, first + per_node), timeout=timeout) for first in range(0, group.world_size, per_node)]
    own = group.rank // per_node
    try:
        yield own * per_node, nodes[own]
    finally:
        dist.destroy_process_group(nodes[own])  # NCCL's buffers are hundreds of MB
