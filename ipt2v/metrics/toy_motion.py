"""Random tensors in the layouts of raft-things.pth and amt-s.pth. Knows no files and no loader."""

from __future__ import annotations

import math

import torch
from torch import nn

from ipt2v.metrics.amt import AMT, AMTSize, UpdateSize
from ipt2v.metrics.raft import RAFT, EncoderSize, RAFTSize

TOY_RAFT = RAFTSize(
    features=EncoderSize(widths=(8, 12, 16), out=16),
    context=EncoderSize(widths=(8, 12, 16), out=20),
    radius=2,
    correlation=(16, 12),
    flow=(8, 6),
    motion=10,
    hidden=12,
    flow_head=16,
    mask_head=16,
)
TOY_AMT = AMTSize(
    feature_widths=(8, 12, 16),
    features=12,
    pyramid=(4, 6, 8, 10),
    decoders=(10, 12, 14, 16),
    side=4,
    update=UpdateSize(correlation=12, flow=(8, 6), motion=10, hidden=14),
    radius=2,
    num_hypotheses=3,
    comb=6,
)
_FAINT = 0.02  # of a last convolution: flows stay within the frame, and the new frame looks like its neighbours


def toy_raft(seed: int) -> dict[str, torch.Tensor]:
    """What raft-things.pth holds, of a tiny network. The same seed gives the same tensors; the global random state stays."""
    with torch.device("meta"):
        network = RAFT(TOY_RAFT)
    tensors = drawn(network, seed)
    for kind in ("weight", "bias"):
        tensors[f"update_block.flow_head.conv2.{kind}"] *= _FAINT
    # the published file has the norm of a shortcut under both its names
    tensors |= {key: tensors[key.replace(".norm3.", ".downsample.1.")] for key in tensors if ".norm3." in key}
    return {f"module.{key}": tensor for key, tensor in tensors.items()}


def toy_amt(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """What amt-s.pth holds, of a tiny network. The same seed gives the same tensors; the global random state stays."""
    with torch.device("meta"):
        network = AMT(TOY_AMT)
    tensors = drawn(network, seed)
    for index in (4, 3, 2):
        tensors[f"decoder{index}.convblock.2.weight"][:, :4] *= _FAINT  # both flows
        tensors[f"update{index}.flow_head.2.weight"] *= _FAINT
    for key in ("decoder1.convblock.2", "comb_block.2"):
        tensors[f"{key}.weight"] *= _FAINT
        tensors[f"{key}.bias"] *= _FAINT
    return {"state_dict": tensors}


def drawn(network: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: _draw(key, value.shape, generator) for key, value in network.state_dict().items()}


def _draw(key: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if not shape:
        return torch.tensor(1000)  # num_batches_tracked
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 4:
        return noise * math.sqrt(2 * shape[0] / shape.numel())  # He et al. 2015: a signal keeps its strength through ReLU
    if ".norm" in key or ".downsample.1." in key:
        return 0.8 + 0.2 * noise.abs() if key.endswith(("weight", "running_var")) else 0.1 * noise
    return 0.25 + 0.05 * noise if key.endswith("weight") else 0.1 * noise  # the slope of a PReLU, or a bias
