"""HRNetV2 for semantic segmentation (Wang et al. 2019, arXiv 1908.07919), under the key names of its published weights.

Knows neither files nor people. Legend: B batch, H W input pixels, h w = a quarter of them, K classes, C=3 RGB.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

_EXPANSION = 4  # of a ResNet bottleneck (He et al. 2015, table 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class HRNetSize:
    """What differs between one HRNetV2 and another; W48 has widths 48..384, modules 1 4 3 and four blocks everywhere."""

    stem_width: int
    bottleneck_width: int
    num_bottlenecks: int
    widths: tuple[int, ...]  # channels of the branches at 1/4, 1/8, 1/16, 1/32
    num_modules: tuple[int, ...]  # of stages 2, 3, 4
    num_blocks: tuple[tuple[int, ...], ...]  # of stages 2, 3, 4: of each branch
    num_classes: int


class Block(nn.Module):
    """A ResNet block: convolutions conv1, conv2, ... beside a shortcut; kernels 3 3 are a basic one, 1 3 1 a bottleneck."""

    def __init__(self, channels: Sequence[int], kernels: Sequence[int]) -> None:
        super().__init__()
        self.num_convs = len(kernels)
        for index, (kernel, (a, b)) in enumerate(zip(kernels, pairwise(channels), strict=True), start=1):
            self.add_module(f"conv{index}", _conv(a, b, kernel=kernel))
            self.add_module(f"bn{index}", nn.BatchNorm2d(b))
        self.downsample = nn.Identity() if channels[0] == channels[-1] else _conv_bn(channels[0], channels[-1], kernel=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for index in range(1, self.num_convs + 1):
            y = self.get_submodule(f"bn{index}")(self.get_submodule(f"conv{index}")(y))
            if index < self.num_convs:
                y = F.relu(y)
        return F.relu(y + self.downsample(x))


class HighResolutionModule(nn.Module):
    """Parallel branches, each at half the resolution of the one before, that then exchange what they found."""

    def __init__(self, widths: Sequence[int], num_blocks: Sequence[int], *, align_corners: bool) -> None:
        super().__init__()
        self.align_corners = align_corners
        self.branches = nn.ModuleList(
            nn.Sequential(*(Block((width, width, width), (3, 3)) for _ in range(count)))
            for width, count in zip(widths, num_blocks, strict=True)
        )
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(_fuse_layer(widths, to=i, source=j) for j in range(len(widths))) for i in range(len(widths))
        )

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        maps = [branch(x) for branch, x in zip(self.branches, maps, strict=True)]
        return [F.relu(self._fused(i, maps)) for i in range(len(maps))]

    def _fused(self, to: int, maps: list[torch.Tensor]) -> torch.Tensor:
        """The sum of all branches at the size of branch `to`; only what comes from a lower resolution still has to grow."""
        layers = self.fuse_layers.get_submodule(str(to)).children()
        terms = [_upsampled(layer(x), maps[to], self.align_corners) for layer, x in zip(layers, maps, strict=True)]
        return functools.reduce(torch.add, terms)


class HRNet(nn.Module):
    """Class scores at a quarter of the resolution: [B,3,H,W] float, normalised -> [B,K,h,w]."""

    def __init__(self, size: HRNetSize, *, align_corners: bool) -> None:
        super().__init__()
        self.num_classes, self.align_corners = size.num_classes, align_corners
        stem, narrow, widths = size.stem_width, size.bottleneck_width, size.widths
        wide, concatenated = narrow * _EXPANSION, sum(widths)
        self.conv1 = _conv(3, stem, stride=2)
        self.bn1 = nn.BatchNorm2d(stem)
        self.conv2 = _conv(stem, stem, stride=2)
        self.bn2 = nn.BatchNorm2d(stem)
        in_channels = [stem] + [wide] * (size.num_bottlenecks - 1)
        self.layer1 = nn.Sequential(*(Block((channels, narrow, narrow, wide), (1, 3, 1)) for channels in in_channels))
        self.transition1 = nn.ModuleList([_conv_bn(wide, widths[0], relu=True), _new_branch(wide, widths[1])])
        self.stage2 = _stage(size, 0, align_corners)
        self.transition2 = nn.ModuleList([*(nn.Identity() for _ in range(2)), _new_branch(widths[1], widths[2])])
        self.stage3 = _stage(size, 1, align_corners)
        self.transition3 = nn.ModuleList([*(nn.Identity() for _ in range(3)), _new_branch(widths[2], widths[3])])
        self.stage4 = _stage(size, 2, align_corners)
        head = nn.Conv2d(concatenated, concatenated, 1), nn.BatchNorm2d(concatenated), nn.ReLU()
        self.last_layer = nn.Sequential(*head, nn.Conv2d(concatenated, size.num_classes, 1))

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.bn1(self.conv1(image_BCHW)))
        maps = [self.layer1(F.relu(self.bn2(self.conv2(x))))]
        transitions = (self.transition1, self.transition2, self.transition3)
        for transition, stage in zip(transitions, (self.stage2, self.stage3, self.stage4), strict=True):
            # a new branch starts from the one of the lowest resolution
            maps = stage([step(x) for step, x in zip(transition, [*maps, maps[-1]], strict=True)])
        return self.last_layer(torch.cat([_upsampled(x, maps[0], self.align_corners) for x in maps], dim=1))


def _conv(in_channels: int, out_channels: int, *, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2, bias=False)


def _conv_bn(in_channels: int, out_channels: int, *, kernel: int = 3, stride: int = 1, relu: bool = False) -> nn.Sequential:
    layers = [_conv(in_channels, out_channels, kernel=kernel, stride=stride), nn.BatchNorm2d(out_channels)]
    return nn.Sequential(*layers, *([nn.ReLU()] if relu else []))


def _new_branch(in_channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(_conv_bn(in_channels, out_channels, stride=2, relu=True))


def _fuse_layer(widths: Sequence[int], *, to: int, source: int) -> nn.Module:
    """What branch `source` passes through on its way to branch `to`: 1x1 upwards, 3x3 of stride 2 per step downwards."""
    if source == to:
        return nn.Identity()
    if source > to:
        return _conv_bn(widths[source], widths[to], kernel=1)
    channels = [widths[source]] * (to - source) + [widths[to]]
    last = to - source - 1  # without ReLU: that comes after the sum
    return nn.Sequential(*(_conv_bn(a, b, stride=2, relu=step < last) for step, (a, b) in enumerate(pairwise(channels))))


def _stage(size: HRNetSize, index: int, align_corners: bool) -> nn.Sequential:
    widths, num_blocks = size.widths[: index + 2], size.num_blocks[index]
    modules = (HighResolutionModule(widths, num_blocks, align_corners=align_corners) for _ in range(size.num_modules[index]))
    return nn.Sequential(*modules)


def _upsampled(x: torch.Tensor, to: torch.Tensor, align_corners: bool) -> torch.Tensor:
    if x.shape[-2:] == to.shape[-2:]:
        return x
    return F.interpolate(x, size=to.shape[-2:], mode="bilinear", align_corners=align_corners)
