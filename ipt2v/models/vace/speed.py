"""Switches that make the VACE transformer faster and change its results by rounding at most; each is off until it is called.

Must not know settings, ranks or steps. What skips work, and so changes pixels by more than rounding, is in step_cache.py.
Legend: B batch, L tokens, N heads, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import WanVACETransformer3DModel
from torch import nn
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_efficient_attention, can_use_flash_attention
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Not "reduce-overhead" and "max-autotune": their CUDA graphs write each output over the last one, which hints on their way
# through the VACE blocks and the residuals of a step cache outlive.
CompileMode = Literal["default", "max-autotune-no-cudagraphs"]

# 9.15.1, torch's own limit: below it does not prefer cuDNN (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, torch 2.13)
CUDNN_VERSION = 91501


# ---- one product for queries, keys and values


def fuse_qkv(transformer: WanVACETransformer3DModel) -> None:
    """Make one matrix product of the three for queries, keys and values, in every self-attention. Once, after loading.

    Afterwards the parameters `*.attn1.to_{q,k,v}.{weight,bias}` are gone, and `*.attn1.to_qkv.{weight,bias}` has their rows in
    this order: published weights no longer load into the transformer, and there is no way back. No weight is in memory twice,
    but for one block's while it is fused. A processor that asks attn1 for to_q, to_k and to_v, not for to_qkv, gets the same
    numbers, by three products. Raises ValueError, with nothing changed, if a projection is no plain layer of whole weights.
    """
    blocks = {"blocks": transformer.blocks, "vace_blocks": transformer.vace_blocks}
    attentions = {f"{kind}.{index}.attn1": block.attn1 for kind, of in blocks.items() for index, block in enumerate(of)}
    for name, attention in attentions.items():
        for projection in ("to_q", "to_k", "to_v"):
            _check_whole(f"{name}.{projection}", getattr(attention, projection))
    for attention in attentions.values():
        _fuse(attention)


def _check_whole(name: str, layer: Any) -> None:
    """Raise ValueError unless `layer` is a torch.nn.Linear with all its weights here."""
    if type(layer) is not nn.Linear:  # also not a subclass: LoRA and quantised layers compute something else
        raise ValueError(f"{name}: found {type(layer).__name__}, expected Linear; fuse once, and merge LoRA weights before")
    # FSDP2 keeps a rank's rows as a DTensor; ZeRO-3 leaves an empty tensor with an id
    if isinstance(layer.weight, DTensor) or hasattr(layer.weight, "ds_id"):
        raise ValueError(f"{name}: found weights that the ranks share, expected whole ones; set weights_sharding to none")


def _fuse(attention: Any) -> None:
    attention.fuse_projections()  # diffusers': adds to_qkv, a copy, and its own processor uses it from now on
    attention.to_qkv.requires_grad_(attention.to_q.weight.requires_grad)
    first = 0
    for name in ("to_q", "to_k", "to_v"):
        rows = slice(first, first + getattr(attention, name).out_features)
        delattr(attention, name)  # frees the weights; what takes its place has none, and is no module
        setattr(attention, name, _Rows(attention.to_qkv, rows))
        first = rows.stop


@dataclass(frozen=True, slots=True)
class _Rows:
    """One of the three projections, out of the fused one."""

    fused: nn.Linear
    rows: slice

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.fused.weight[self.rows], self.fused.bias[self.rows])


# ---- compiled blocks


def compile_blocks(transformer: WanVACETransformer3DModel, *, mode: CompileMode = "default", backend: str = "inductor") -> None:
    """Compile every main and VACE block by itself when it first runs. Once, after everything else that changes the transformer.

    Equal blocks share one compiled program ("regional compilation", https://docs.pytorch.org/tutorials/recipes/
    regional_compilation.html), so there are few, and each new number of tokens compiles them anew. What lies between the blocks
    (hints, a split's slices, a step cache) is not compiled. torch keeps what it has compiled on disk for later processes; on a
    cluster, TORCHINDUCTOR_CACHE_DIR should name a folder of the node: torch's default is in /tmp, and nothing here sets it.
    Inductor needs a C++ compiler on a CPU, and triton on a GPU; backend "eager" needs neither, and only traces.
    """
    for block in (*transformer.blocks, *transformer.vace_blocks):
        block.compile(mode=mode, dynamic=False, backend=backend)


# ---- which attention kernel


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a device's torch says it can run, for attention without a mask."""

    device_type: str  # "cpu", "cuda"
    compute_capability: tuple[int, int] = (0, 0)  # (9, 0) is Hopper
    cudnn_version: int = 0  # 91501 is 9.15.1
    has_cudnn: bool = False
    has_flash: bool = False
    has_efficient: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBackend:
    """torch's kernels for F.scaled_dot_product_attention, best first; a call that the first cannot take goes to the next."""

    order: tuple[SDPBackend, ...]

    @property
    def name(self) -> str:
        """Of the best one, for the log."""
        return _NAMES[self.order[0]]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, these kernels are used, and no others; torch keeps the choice for the whole process."""
        with sdpa_kernel(list(self.order), set_priority=True):
            yield


_NAMES = {
    SDPBackend.CUDNN_ATTENTION: "cuDNN attention",
    SDPBackend.FLASH_ATTENTION: "flash attention",
    SDPBackend.EFFICIENT_ATTENTION: "memory-efficient attention",
    SDPBackend.MATH: "attention by single operations",
}


def attention_backend(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, *, num_heads: int = 40, head_width: int = 128
) -> AttentionBackend:
    """The kernels to use on a device for heads of one dtype and width; by default, those of VACE-14B."""
    return choose(capabilities(device, torch.empty(1, num_heads, 128, head_width, dtype=dtype, device=device)))


def capabilities(device: torch.device, example_BNLD: torch.Tensor) -> Capabilities:
    """What torch says of queries, keys and values like the example, which is on the device."""
    if device.type != "cuda":
        return Capabilities(device_type=device.type, has_flash=device.type == "cpu")
    params = SDPAParams(example_BNLD, example_BNLD, example_BNLD, None, 0.0, False, False)
    return Capabilities(
        device_type="cuda",
        compute_capability=torch.cuda.get_device_capability(device),
        cudnn_version=torch.backends.cudnn.version() or 0,
        has_cudnn=can_use_cudnn_attention(params),
        has_flash=can_use_flash_attention(params),
        has_efficient=can_use_efficient_attention(params),
    )


def choose(found: Capabilities) -> AttentionBackend:
    """cuDNN's kernel where it is made for the GPU, else flash, memory-efficient, or single operations, which always run."""
    # torch prefers it on these two alone: its flash kernel is FlashAttention-2 (arXiv 2307.08691), made before Hopper
    prefers_cudnn = found.compute_capability in ((9, 0), (10, 0)) and found.cudnn_version >= CUDNN_VERSION
    runs = {
        SDPBackend.CUDNN_ATTENTION: found.has_cudnn and prefers_cudnn,
        SDPBackend.FLASH_ATTENTION: found.has_flash,
        SDPBackend.EFFICIENT_ATTENTION: found.has_efficient,
        SDPBackend.MATH: True,
    }
    return AttentionBackend(order=tuple(backend for backend, it_runs in runs.items() if it_runs))
