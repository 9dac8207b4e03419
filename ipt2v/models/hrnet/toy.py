"""Random tensors in the layout of the published LIP checkpoint. Knows no files and no loader."""

from __future__ import annotations

import math

import torch

from ipt2v.models.hrnet.network import HRNet, HRNetSize

TOY_SIZE = HRNetSize(
    stem_width=64,
    bottleneck_width=64,
    num_bottlenecks=1,
    widths=(8, 16, 32, 64),
    num_modules=(1, 1, 1),
    num_blocks=((1, 1), (1, 1, 1), (1, 1, 1, 1)),
    num_classes=20,
)


@torch.no_grad()
def toy_state_dict(seed: int) -> dict[str, torch.Tensor]:
    """A tiny network as hrnet_lip_5583_torch04.pth holds the real one; save it under a name with torch04 in it.

    Of a busy picture some parts are person, some not. The same seed gives the same tensors; the global random state stays.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        network = HRNet(TOY_SIZE, align_corners=False)
    shapes = {key: value.shape for key, value in network.state_dict().items() if not key.endswith(".num_batches_tracked")}
    tensors = {key: _draw(key, shape, generator) for key, shape in shapes.items()}
    background = tensors["last_layer.3.weight"][0]
    background.sub_(background.mean()).mul_(4)  # decides, and favours neither side
    # outweighs the 19 classes of the person
    tensors["last_layer.3.bias"][0] += math.log(TOY_SIZE.num_classes - 1)
    network.load_state_dict(tensors, assign=True)
    # as in training, the last norm gets to know what it has to centre; it writes that into `tensors`
    norm = network.eval().last_layer.get_submodule("1").train()
    assert isinstance(norm, torch.nn.BatchNorm2d)
    norm.momentum = 1.0
    network(torch.randn(1, 3, 128, 128, generator=generator))
    for statistic in ("running_mean", "running_var"):
        # the last bits, which depend on the machine, must not reach the file
        tensors[f"last_layer.1.{statistic}"].mul_(16).round_().div_(16)
    return {f"model.{key}": _with_signs(key, tensor, generator) for key, tensor in tensors.items()}


def _draw(key: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 4:
        return noise * math.sqrt(2 * shape[0] / shape.numel())  # He et al. 2015: a signal keeps its strength through ReLU
    if key.endswith("running_var") or key.endswith(".weight"):
        return 0.8 + 0.2 * noise.abs()
    return 0.1 * noise


def _with_signs(key: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """InPlaceABN takes the absolute value of its weight, so files hold either sign."""
    is_gamma = key.endswith(".weight") and tensor.ndim == 1
    return tensor * torch.randn(tensor.shape, generator=generator).sign() if is_gamma else tensor
