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
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PARALLEL_STATE = "xfuser.core.distributed.parallel_state"


@dataclass(frozen=True, slots=True, kw_only=True)
class Subgroups:
    """The groups of a split that this rank belongs to. Ranks are counted CFG outermost, then ring, then Ulysses."""

    cfg: ProcessGroup  # the guided and the unguided half's rank with the same tokens
    ring: ProcessGroup
    ulysses: ProcessGroup
    sequence: ProcessGroup  # ring x Ulysses: all ranks that share the tokens, in the tokens' order


def start(*, cfg: int, ulysses: int, ring: int, device_index: int, backend: str) -> Subgroups:
    """xDiT's groups for a split of all ranks; torch.distributed must be up. xDiT keeps one split, in globals: the last one."""
    parallel_state = _parallel_state()
    _forget(parallel_state)
    world = torch.distributed.get_world_size()
    # xDiT's local_rank is the device that it selects
    parallel_state.init_distributed_environment(
        rank=torch.distributed.get_rank(), world_size=world, local_rank=device_index, backend=backend
    )
    parallel_state.initialize_model_parallel(
        classifier_free_guidance_degree=cfg,
        sequence_parallel_degree=ulysses * ring,
        ulysses_degree=ulysses,
        ring_degree=ring,
        backend=backend,
    )
    sequence = parallel_state.get_sp_group()
    # without yunchang xDiT keeps silent and makes sequence-parallel groups of one
    assert (sequence.ulysses_world_size, sequence.ring_world_size) == (ulysses, ring), "xfuser does not see yunchang"
    return Subgroups(
        cfg=parallel_state.get_cfg_group().device_group,
        ring=sequence.ring_group,
        ulysses=sequence.ulysses_group,
        sequence=sequence.device_group,
    )


def stop() -> None:
    """Drop xDiT's groups, and torch.distributed with them; nothing if there are none."""
    if PARALLEL_STATE in sys.modules:
        parallel_state = _parallel_state()
        _forget(parallel_state)
        parallel_state.destroy_distributed_environment()


def _forget(parallel_state: types.ModuleType) -> None:
    parallel_state.destroy_model_parallel()
    # destroy_model_parallel of xfuser 0.7.0 leaves the group of pipeline stages, and a second split fails on it
    stages = parallel_state.__dict__["_PP"]
    if stages is not None:
        stages.destroy()
        parallel_state.__dict__["_PP"] = None


def _parallel_state() -> types.ModuleType:
    if not torch.cuda.is_available() and "xfuser" not in sys.modules:
        _import_without_accelerator()
    parallel_state = importlib.import_module(PARALLEL_STATE)
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
