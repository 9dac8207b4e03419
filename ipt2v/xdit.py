"""xDiT's process groups, also where xfuser refuses to be imported. The one file that imports xfuser.

xfuser 0.7.0 imports only on a machine with an accelerator: its package __init__ pulls in every pipeline, triton (undeclared)
and a CUDA version check. On a CPU build of torch we leave that __init__ unexecuted, stub the one module that needs triton and
answer the version check; process groups then work over gloo, unchanged. May go once `import xfuser` works on a CPU.
Never import xfuser.runner: it writes RANK, WORLD_SIZE and MASTER_PORT.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import types
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def start_ulysses(*, rank: int, world_size: int, device_index: int, backend: str) -> ProcessGroup:
    """xDiT's Ulysses group over all ranks; torch.distributed must be up. Once in a process: xDiT keeps it in globals."""
    parallel_state = _parallel_state()
    # xDiT's local_rank is the device that it selects
    parallel_state.init_distributed_environment(rank=rank, world_size=world_size, local_rank=device_index, backend=backend)
    parallel_state.initialize_model_parallel(
        sequence_parallel_degree=world_size, ulysses_degree=world_size, ring_degree=1, backend=backend
    )
    return parallel_state.get_sp_group().ulysses_group


def stop() -> None:
    """Drop xDiT's groups, and torch.distributed with them."""
    parallel_state = _parallel_state()
    parallel_state.destroy_model_parallel()
    parallel_state.destroy_distributed_environment()


def _parallel_state() -> types.ModuleType:
    if not torch.cuda.is_available() and "xfuser" not in sys.modules:
        _import_without_accelerator()
    parallel_state = importlib.import_module("xfuser.core.distributed.parallel_state")
    logging.getLogger(parallel_state.__name__).setLevel(logging.WARNING)  # it logs at DEBUG
    return parallel_state


def _import_without_accelerator() -> None:
    from packaging import version

    block_mask = types.ModuleType("xfuser.core.sparge_attention.block_mask")
    block_mask.__dict__["get_block_map_meansim"] = None
    sys.modules[block_mask.__name__] = block_mask
    spec = importlib.util.find_spec("xfuser")
    assert spec is not None, "xfuser is in install_requires"
    sys.modules["xfuser"] = importlib.util.module_from_spec(spec)
    envs = importlib.import_module("xfuser.envs")
    envs.variables["CUDA_VERSION"] = lambda: version.parse("99")  # "is it at least 11.3?"
    # else sequence-parallel groups silently report a Ulysses degree of 1
    envs.PACKAGES_CHECKER.packages_info["has_long_ctx_attn"] = True
