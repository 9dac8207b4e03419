"""Inception-v3 (Szegedy et al. 2015, arXiv 1512.00567) up to its pooled feature, under the key names of torchvision's file.

Knows no detector and no metric. Written from torchvision 0.28.0 models/inception.py (BSD-3); on equal random weights its
features were those of torchvision to the last bit, on the CPU.

Legend: B faces, C=3 RGB, H W pixels, D=2048 width of a feature.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ipt2v.models.strict_load import Tensors, axis_size, fill, load

INPUT_SIZE = 299  # pixels
_INPUT = ""
_NORM_EPS = 1e-3  # TensorFlow's, not torch's 1e-5
# torchvision's `transform_input`, for pixels normalised by ImageNet's mean and deviation -> those of Inception, -1..1
_SCALE, _SHIFT = (0.229 / 0.5, 0.224 / 0.5, 0.225 / 0.5), ((0.485 - 0.5) / 0.5, (0.456 - 0.5) / 0.5, (0.406 - 0.5) / 0.5)

Kernel = tuple[int, int]  # rows, columns


@dataclass(frozen=True, slots=True)
class Layout:
    """The convolutions of a block; its output are those that no other takes in, in this order, and the pool."""

    convolutions: Mapping[str, tuple[str, Kernel]]  # name -> what it takes in, kernel
    halves: bool = False  # the resolution: the last convolutions have stride 2 and no padding, and the pool is a maximum

    @property
    def last(self) -> tuple[str, ...]:
        taken = {source for source, _ in self.convolutions.values()}
        return tuple(name for name in self.convolutions if name not in taken)


_A = Layout(
    {
        "branch1x1": (_INPUT, (1, 1)),
        "branch5x5_1": (_INPUT, (1, 1)),
        "branch5x5_2": ("branch5x5_1", (5, 5)),
        "branch3x3dbl_1": (_INPUT, (1, 1)),
        "branch3x3dbl_2": ("branch3x3dbl_1", (3, 3)),
        "branch3x3dbl_3": ("branch3x3dbl_2", (3, 3)),
    }
)
_B = Layout(
    {
        "branch3x3": (_INPUT, (3, 3)),
        "branch3x3dbl_1": (_INPUT, (1, 1)),
        "branch3x3dbl_2": ("branch3x3dbl_1", (3, 3)),
        "branch3x3dbl_3": ("branch3x3dbl_2", (3, 3)),
    },
    halves=True,
)
_C = Layout(
    {
        "branch1x1": (_INPUT, (1, 1)),
        "branch7x7_1": (_INPUT, (1, 1)),
        "branch7x7_2": ("branch7x7_1", (1, 7)),
        "branch7x7_3": ("branch7x7_2", (7, 1)),
        "branch7x7dbl_1": (_INPUT, (1, 1)),
        "branch7x7dbl_2": ("branch7x7dbl_1", (7, 1)),
        "branch7x7dbl_3": ("branch7x7dbl_2", (1, 7)),
        "branch7x7dbl_4": ("branch7x7dbl_3", (7, 1)),
        "branch7x7dbl_5": ("branch7x7dbl_4", (1, 7)),
    }
)
_D = Layout(
    {
        "branch3x3_1": (_INPUT, (1, 1)),
        "branch3x3_2": ("branch3x3_1", (3, 3)),
        "branch7x7x3_1": (_INPUT, (1, 1)),
        "branch7x7x3_2": ("branch7x7x3_1", (1, 7)),
        "branch7x7x3_3": ("branch7x7x3_2", (7, 1)),
        "branch7x7x3_4": ("branch7x7x3_3", (3, 3)),
    },
    halves=True,
)
_E = Layout(
    {
        "branch1x1": (_INPUT, (1, 1)),
        "branch3x3_1": (_INPUT, (1, 1)),
        "branch3x3_2a": ("branch3x3_1", (1, 3)),
        "branch3x3_2b": ("branch3x3_1", (3, 1)),
        "branch3x3dbl_1": (_INPUT, (1, 1)),
        "branch3x3dbl_2": ("branch3x3dbl_1", (3, 3)),
        "branch3x3dbl_3a": ("branch3x3dbl_2", (1, 3)),
        "branch3x3dbl_3b": ("branch3x3dbl_2", (3, 1)),
    }
)
_POOL = "branch_pool"  # the convolution after the mean pool, of a block that keeps the resolution
# name -> kernel, stride, padding, whether a maximum pool follows
_STEM: dict[str, tuple[int, int, int, bool]] = {
    "Conv2d_1a_3x3": (3, 2, 0, False),
    "Conv2d_2a_3x3": (3, 1, 0, False),
    "Conv2d_2b_3x3": (3, 1, 1, True),
    "Conv2d_3b_1x1": (1, 1, 0, False),
    "Conv2d_4a_3x3": (3, 1, 0, True),
}
_BLOCKS: dict[str, Layout] = {
    **{f"Mixed_5{letter}": _A for letter in "bcd"},
    "Mixed_6a": _B,
    **{f"Mixed_6{letter}": _C for letter in "bcde"},
    "Mixed_7a": _D,
    **{f"Mixed_7{letter}": _E for letter in "bc"},
}
_AUXILIARY, _AUXILIARY_SOURCE = "AuxLogits", "Mixed_6e"


@dataclass(frozen=True, slots=True, kw_only=True)
class InceptionSize:
    """What differs between one network and another."""

    widths: Mapping[str, int]  # convolution, as in convolutions() -> channels it gives
    num_classes: int  # 1000, of the two heads


class Convolution(nn.Module):
    """A convolution without bias, its norm, and what is above 0."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: Kernel, *, stride: int = 1, padding: Kernel = (0, 0)
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=_NORM_EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)))


class Block(nn.ModuleDict):
    """One of the eleven mixed blocks; `widths` are those of its own convolutions."""

    def __init__(self, layout: Layout, in_channels: int, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.layout = layout
        for name, (source, kernel) in layout.convolutions.items():
            shrinks = layout.halves and name in layout.last
            padding = (0, 0) if shrinks else (kernel[0] // 2, kernel[1] // 2)
            taken = widths[source] if source else in_channels
            self[name] = Convolution(taken, widths[name], kernel, stride=2 if shrinks else 1, padding=padding)
        if not layout.halves:
            self[_POOL] = Convolution(in_channels, widths[_POOL], (1, 1))
        self.out_channels = sum(widths[name] for name in layout.last) + (in_channels if layout.halves else widths[_POOL])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        done = {_INPUT: x}
        for name, (source, _) in self.layout.convolutions.items():
            done[name] = self[name](done[source])
        pooled = F.max_pool2d(x, 3, 2) if self.layout.halves else self[_POOL](F.avg_pool2d(x, 3, 1, 1))
        return torch.cat([*(done[name] for name in self.layout.last), pooled], dim=1)


class Inception(nn.ModuleDict):
    """Images [B,3,299,299] float, as scaled by `pixels` -> pooled features [B,D] float, each at least 0.

    `fc` and the auxiliary head are in the file and so are loaded, but nothing is asked of them.
    """

    def __init__(self, size: InceptionSize) -> None:
        super().__init__()
        channels = 3
        for name, (kernel, stride, padding, _) in _STEM.items():
            width = size.widths[name]
            self[name] = Convolution(channels, width, (kernel, kernel), stride=stride, padding=(padding, padding))
            channels = width
        for name, layout in _BLOCKS.items():
            prefix = f"{name}."
            own = {key.removeprefix(prefix): width for key, width in size.widths.items() if key.startswith(prefix)}
            block = Block(layout, channels, own)
            self[name], channels = block, block.out_channels
            if name == _AUXILIARY_SOURCE:
                self[_AUXILIARY] = _auxiliary(channels, size)
        self["fc"] = nn.Linear(channels, size.num_classes)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        x = images_BCHW
        for name, (*_, is_pooled) in _STEM.items():
            x = self[name](x)
            x = F.max_pool2d(x, 3, 2) if is_pooled else x
        for name in _BLOCKS:
            x = self[name](x)
        return F.adaptive_avg_pool2d(x, 1).flatten(1)


def _auxiliary(channels: int, size: InceptionSize) -> nn.ModuleDict:
    """The second head, which only training looked at."""
    first, second = (size.widths[f"{_AUXILIARY}.conv{index}"] for index in (0, 1))
    layers = {"conv0": Convolution(channels, first, (1, 1)), "conv1": Convolution(first, second, (5, 5))}
    return nn.ModuleDict({**layers, "fc": nn.Linear(second, size.num_classes)})


@torch.inference_mode()
def inception_features(network: nn.Module, faces_BHWC: torch.Tensor) -> torch.Tensor:
    """Features [B,D] float32, on the network's device, of aligned faces, [B,H,W,3] uint8 RGB; ConsisID aligns to 224 pixels.

    They are what ConsisID's "FID" compares. Raises ValueError if the faces have another shape or dtype.
    """
    weights = next(network.parameters())
    return network(pixels(faces_BHWC).to(weights.device)).float()


def pixels(faces_BHWC: torch.Tensor) -> torch.Tensor:
    """[B,3,299,299] float32 on the CPU, as ConsisID (24f64488, eval/get_facesim_fid.py) shows faces to Inception.

    PIL's bilinear resize to a square, then 0..1, and then `transform_input`, which torchvision switches on with the published
    weights. That expects ImageNet's normalisation before it, which ConsisID leaves out: the network sees -0.19..0.43 instead
    of -1..1. It stays so here, as the numbers of ConsisID and the challenge come from it.
    """
    if faces_BHWC.dtype != torch.uint8 or faces_BHWC.ndim != 4 or faces_BHWC.shape[3] != 3 or 0 in faces_BHWC.shape:
        raise ValueError(f"faces: found {faces_BHWC.dtype} {tuple(faces_BHWC.shape)}, expected uint8 [B,H,W,3]")
    resized = [
        np.asarray(Image.fromarray(face_HWC).resize((INPUT_SIZE, INPUT_SIZE), Image.Resampling.BILINEAR))
        for face_HWC in faces_BHWC.cpu().numpy()
    ]
    faces_BCHW = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).contiguous() / 255
    scale, shift = (torch.tensor(rgb).view(3, 1, 1) for rgb in (_SCALE, _SHIFT))
    return faces_BCHW * scale + shift


def load_inception(path: Path) -> Inception:
    """The network of a file in the layout of inception_v3_google-0cc3c7bd.pth, float32, on the CPU, to evaluate.

    Raises ValueError if the file cannot be read or is not, key by key and shape by shape, such a network; OSError if there is
    none.
    """
    return load(path, build)


def build(tensors: Tensors) -> Inception:
    """The network that holds exactly these tensors. Raises ValueError, naming the keys that do not fit."""
    with torch.device("meta"):
        network = Inception(read_size(tensors))
    fill(network, tensors)
    return network


def read_size(tensors: Tensors) -> InceptionSize:
    widths = {name: axis_size(tensors, f"{name}.conv.weight") for name in convolutions()}
    return InceptionSize(widths=widths, num_classes=axis_size(tensors, "fc.weight"))


def convolutions() -> Iterator[str]:
    """The names of all 94 + 2 of the auxiliary head: Conv2d_1a_3x3, ..., Mixed_7c.branch_pool, AuxLogits.conv0, ..."""
    yield from _STEM
    for block, layout in _BLOCKS.items():
        yield from (f"{block}.{name}" for name in layout.convolutions)
        if not layout.halves:
            yield f"{block}.{_POOL}"
    yield from (f"{_AUXILIARY}.conv{index}" for index in (0, 1))
