"""AMT-S (Li et al. 2023, arXiv 2304.09790), the frame interpolation behind VBench's motion smoothness, under its key names.

Knows neither videos nor scores. Upstream's code is CC BY-NC and was not opened: this is written from a functional description
in words and the key table of amt-s.pth; within 1e-7 of VBench's scores on equal weights (tests/bench/vbench_parity.py). The
weights are for research only.

Legend: B pairs, H W pixels, h w = an eighth of them, K hypotheses, P places, 2 = x then y, C=3 RGB. A map named f1..f4 has
1/2..1/16 of the sides. flow0 and flow1 lead from the new frame to the first and to the second, in pixels of their own map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ipt2v.metrics import correlation
from ipt2v.models.strict_load import Tensors, axis_size, fill, load

STRIDE = 16  # both sides must be multiples
_MIDDLE = 0.5
_SLOPE = 0.1  # of the leaky ReLU in the update blocks
_PER_HYPOTHESIS = 8  # channels of decoder1: 2 flow0, 2 flow1, 1 mask, 3 residual


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateSize:
    """Channels inside the three update blocks."""

    correlation: int  # convc1
    flow: tuple[int, int]  # convf1, convf2
    motion: int  # conv
    hidden: int  # gru and the heads


@dataclass(frozen=True, slots=True, kw_only=True)
class AMTSize:
    """What differs between one AMT of the small kind and another; in brackets those of AMT-S."""

    feature_widths: tuple[int, int, int]  # at 1/2, 1/4, 1/8 (32 64 96)
    features: int  # what is correlated (84)
    pyramid: tuple[int, int, int, int]  # f1..f4 (20 32 44 56)
    decoders: tuple[int, int, int, int]  # decoder1..decoder4 (60 96 132 112)
    side: int  # channels that a decoder's residual block treats twice (20)
    update: UpdateSize
    radius: int  # of the correlation window, in cells (3)
    num_hypotheses: int  # (3)
    comb: int  # (18)


class Bottleneck(nn.Module):
    """Three convolutions 1x1, 3x3, 1x1, each followed by instance norm and ReLU, beside a shortcut."""

    def __init__(self, in_channels: int, channels: int, *, stride: int) -> None:
        super().__init__()
        narrow = channels // 4
        self.conv1 = nn.Conv2d(in_channels, narrow, 1)
        self.conv2 = nn.Conv2d(narrow, narrow, 3, stride, padding=1)
        self.conv3 = nn.Conv2d(narrow, channels, 1)
        shortcut = nn.Conv2d(in_channels, channels, 1, stride), nn.InstanceNorm2d(channels)
        self.downsample = nn.Identity() if stride == 1 else nn.Sequential(*shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for conv in (self.conv1, self.conv2, self.conv3):
            y = F.relu(F.instance_norm(conv(y)))
        return F.relu(self.downsample(x) + y)


class FeatureEncoder(nn.Module):
    """What is correlated: [B,3,H,W] -> [B,features,h,w]."""

    def __init__(self, size: AMTSize) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, size.feature_widths[0], 7, 2, padding=3)
        for index, (a, b) in enumerate(pairwise([size.feature_widths[0], *size.feature_widths]), start=1):
            blocks = Bottleneck(a, b, stride=1 if index == 1 else 2), Bottleneck(b, b, stride=1)
            self.add_module(f"layer{index}", nn.Sequential(*blocks))
        self.conv2 = nn.Conv2d(size.feature_widths[-1], size.features, 1)

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        x = F.relu(F.instance_norm(self.conv1(image_BCHW)))
        for index in (1, 2, 3):
            x = self.get_submodule(f"layer{index}")(x)
        return self.conv2(x)


class ContextEncoder(nn.Module):
    """[B,3,H,W] -> f1, f2, f3, f4."""

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        for index, (a, b) in enumerate(pairwise([3, *widths]), start=1):
            self.add_module(f"pyramid{index}", nn.Sequential(_conv_prelu(a, b, stride=2), _conv_prelu(b, b)))

    def forward(self, image_BCHW: torch.Tensor) -> list[torch.Tensor]:
        maps = [image_BCHW]
        for stage in self.children():
            maps.append(stage(maps[-1]))
        return maps[1:]


class SideResidual(nn.Module):
    """A residual block whose last `side` channels get two convolutions more."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.side = side
        self.conv1, self.conv2 = _conv_prelu(channels, channels), _conv_prelu(side, side)
        self.conv3, self.conv4 = _conv_prelu(channels, channels), _conv_prelu(side, side)
        self.conv5 = nn.Conv2d(channels, channels, 3, padding=1)
        self.prelu = nn.PReLU(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for on_all, on_side in ((self.conv1, self.conv2), (self.conv3, self.conv4)):
            y = on_all(y)
            y = torch.cat([y[:, : -self.side], on_side(y[:, -self.side :])], 1)
        return self.prelu(x + self.conv5(y))


class Decoder(nn.Module):
    """Twice the width and height: [B,in,a,b] -> [B,out,2a,2b]."""

    def __init__(self, in_channels: int, width: int, out_channels: int, *, side: int) -> None:
        super().__init__()
        larger = nn.ConvTranspose2d(width, out_channels, 4, 2, padding=1)
        self.convblock = nn.Sequential(_conv_prelu(in_channels, width), SideResidual(width, side), larger)

    def forward(self, *parts: torch.Tensor) -> torch.Tensor:
        return self.convblock(torch.cat(parts, 1))


class Update(nn.Module):
    """Changes of the feature and of both flows, from the correlation around the flows."""

    def __init__(self, size: AMTSize, feature: int) -> None:
        super().__init__()
        update, num_values = size.update, 2 * correlation.NUM_LEVELS * (2 * size.radius + 1) ** 2
        self.convc1 = nn.Conv2d(num_values, update.correlation, 1)
        self.convf1 = nn.Conv2d(4, update.flow[0], 7, padding=3)
        self.convf2 = nn.Conv2d(*update.flow, 3, padding=1)
        self.conv = nn.Conv2d(update.correlation + update.flow[1], update.motion, 3, padding=1)
        self.gru = _two_convs(update.motion + 4 + feature, update.hidden, update.hidden)
        self.feat_head = _two_convs(update.hidden, update.hidden, feature)
        self.flow_head = _two_convs(update.hidden, update.hidden, 4)

    def forward(
        self, feature: torch.Tensor, flow_B4hw: torch.Tensor, corr: torch.Tensor, *, scale: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`scale` is how many times finer the feature is than h w; both changes have the feature's size."""
        corr = F.leaky_relu(self.convc1(corr), _SLOPE)
        flow = F.leaky_relu(self.convf2(F.leaky_relu(self.convf1(flow_B4hw), _SLOPE)), _SLOPE)
        motion = F.leaky_relu(self.conv(torch.cat([corr, flow], 1)), _SLOPE)
        hidden = self.gru(torch.cat([motion, flow_B4hw, resize(feature, 1 / scale)], 1))
        return resize(self.feat_head(hidden), scale), scale * resize(self.flow_head(hidden), scale)


class AMT(nn.Module):
    """A frame between two others."""

    def __init__(self, size: AMTSize) -> None:
        super().__init__()
        self.radius, self.num_hypotheses = size.radius, size.num_hypotheses
        f1, f2, f3, f4 = size.pyramid
        d1, d2, d3, d4 = size.decoders
        self.feat_encoder = FeatureEncoder(size)
        self.encoder = ContextEncoder(size.pyramid)
        # in: a feature and both context maps, then both flows, or the time; out: both flows, then the next feature
        self.decoder4 = Decoder(2 * f4 + 1, d4, 4 + f3, side=size.side)
        self.decoder3 = Decoder(3 * f3 + 4, d3, 4 + f2, side=size.side)
        self.decoder2 = Decoder(3 * f2 + 4, d2, 4 + f1, side=size.side)
        self.decoder1 = Decoder(3 * f1 + 4, d1, _PER_HYPOTHESIS * size.num_hypotheses, side=size.side)
        self.update4, self.update3, self.update2 = Update(size, f3), Update(size, f2), Update(size, f1)
        rgb = 3 * size.num_hypotheses
        last = nn.Conv2d(size.comb, 3, 3, padding=1)
        self.comb_block = nn.Sequential(nn.Conv2d(rgb, size.comb, 3, padding=1), nn.PReLU(size.comb), last)

    def forward(self, first_BCHW: torch.Tensor, second_BCHW: torch.Tensor, *, time: float = _MIDDLE) -> torch.Tensor:
        """The frames at `time`, in 0..1 exclusive, between the first ones (0) and the second (1): [B,3,H,W] float 0..1.

        Frames are [B,3,H,W] float 0..1. Raises ValueError unless H and W are multiples of 16 and at least 128.
        """
        correlation.check_sides(first_BCHW, STRIDE)
        mean_B111 = torch.cat([first_BCHW, second_BCHW], 3).mean((1, 2, 3), keepdim=True)
        first, second = first_BCHW - mean_B111, second_BCHW - mean_B111
        both = torch.cat([first, second])
        volume_BPhw = correlation.correlation_BPhw(*self.feat_encoder(both).chunk(2))
        backward_BPhw = volume_BPhw.flatten(2).transpose(1, 2).unflatten(2, volume_BPhw.shape[2:])
        pyramids = correlation.pyramid(volume_BPhw), correlation.pyramid(backward_BPhw)
        maps = [tuple(both_maps.chunk(2)) for both_maps in self.encoder(both)]
        flow_B4hw, feature = self._coarse_to_fine(maps, pyramids, time)
        last = self.decoder1(feature, *_warped(maps[0], flow_B4hw), flow_B4hw)
        return self._merged((first, second), last, 2 * resize(flow_B4hw, 2), mean_B111)

    def _coarse_to_fine(
        self, maps: list[tuple[torch.Tensor, ...]], pyramids: tuple[list[torch.Tensor], ...], time: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both flows [B,4,H/2,W/2] and a feature of the same size, from f4 up to f2."""
        plane = torch.full_like(maps[3][0][:, :1], time)
        flow, feature = self.decoder4(*maps[3], plane).split_with_sizes([4, maps[2][0].shape[1]], 1)
        flow, feature = self._updated(self.update4, flow, feature, pyramids, time)
        steps = (self.decoder3, self.update3, maps[2], maps[1]), (self.decoder2, self.update2, maps[1], maps[0])
        for decoder, update, context, next_context in steps:
            out = decoder(feature, *_warped(context, flow), flow)
            change, feature = out.split_with_sizes([4, next_context[0].shape[1]], 1)
            flow = change + 2 * resize(flow, 2)
            flow, feature = self._updated(update, flow, feature, pyramids, time)
        return flow, feature

    def _updated(
        self,
        update: Update,
        flow: torch.Tensor,
        feature: torch.Tensor,
        pyramids: tuple[list[torch.Tensor], ...],
        time: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        forward, backward = pyramids
        num_places = forward[0].shape[2] * forward[0].shape[3]
        scale = round((flow.shape[2] * flow.shape[3] / num_places) ** 0.5)
        flow_B4hw = resize(flow, 1 / scale) / scale
        grid_2hw = correlation.grid_2hw(flow_B4hw)
        # the way from the first frame to the second is flow1 / time, and back flow0 / (1 - time), if motion is even
        there = correlation.look_up(forward, grid_2hw + flow_B4hw[:, 2:] * (1 / time), self.radius)
        back = correlation.look_up(backward, grid_2hw + flow_B4hw[:, :2] * (1 / (1 - time)), self.radius)
        feature_change, flow_change = update(feature, flow_B4hw, torch.cat([there, back], 1), scale=scale)
        return flow + flow_change, feature + feature_change

    def _merged(
        self, frames: tuple[torch.Tensor, torch.Tensor], last: torch.Tensor, flow_B4HW: torch.Tensor, mean_B111: torch.Tensor
    ) -> torch.Tensor:
        """The K blends of both warped frames, their mean, and what a last look at all of them adds."""
        k = self.num_hypotheses
        change0, change1, logits, residual = last.split_with_sizes([2 * k, 2 * k, k, 3 * k], 1)
        blends = []
        for one in range(k):
            flow0 = change0[:, 2 * one : 2 * one + 2] + flow_B4HW[:, :2]
            flow1 = change1[:, 2 * one : 2 * one + 2] + flow_B4HW[:, 2:]
            mask_B1HW = logits[:, one : one + 1].sigmoid()
            blend = mask_B1HW * warp(frames[0], flow0) + (1 - mask_B1HW) * warp(frames[1], flow1)
            blends.append(blend + mean_B111 + residual[:, 3 * one : 3 * one + 3])
        merged_BCHW = torch.stack(blends).mean(0) + self.comb_block(torch.cat(blends, 1))
        return merged_BCHW.clamp(0, 1)


def _warped(maps: tuple[torch.Tensor, ...], flow_B4HW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both frames' maps as they would lie in the new frame."""
    first, second = maps
    return warp(first, flow_B4HW[:, :2]), warp(second, flow_B4HW[:, 2:])


def warp(image_BCHW: torch.Tensor, flow_B2HW: torch.Tensor) -> torch.Tensor:
    """The image read, bilinearly, at each pixel plus its flow (pixels); beyond the edge lies what is at the edge."""
    height, width = image_BCHW.shape[-2:]
    y = torch.linspace(-1, 1, height, dtype=flow_B2HW.dtype, device=flow_B2HW.device)[:, None]
    x = torch.linspace(-1, 1, width, dtype=flow_B2HW.dtype, device=flow_B2HW.device)
    grid_BHW2 = torch.stack([x + flow_B2HW[:, 0] / ((width - 1) / 2), y + flow_B2HW[:, 1] / ((height - 1) / 2)], -1)
    return F.grid_sample(image_BCHW, grid_BHW2, padding_mode="border", align_corners=True)


def resize(x: torch.Tensor, scale: float) -> torch.Tensor:
    """Bilinear, without smoothing first; values stay as they are, so a flow still has to be scaled."""
    return x if scale == 1 else F.interpolate(x, scale_factor=scale, mode="bilinear", align_corners=False)


def load_amt(path: Path, *, device: torch.device) -> AMT:
    """The network of amt-s.pth, float32, for evaluation.

    Raises ValueError if the file cannot be read or is not, key by key and shape by shape, an AMT-S of any width.
    """
    return load(path, make_amt).to(device)


def make_amt(tensors: Tensors) -> AMT:
    """The network that these tensors are of. Raises ValueError if they are of no AMT-S."""
    with torch.device("meta"):
        network = AMT(_read_size(tensors))
    fill(network, tensors)
    return network


def _read_size(tensors: Tensors) -> AMTSize:
    def size(key: str, axis: int = 0) -> int:
        return axis_size(tensors, f"{key}.weight", axis)

    num_values, last = size("update4.convc1", 1), size("decoder1.convblock.2", 1)
    if num_values % 2 or last % _PER_HYPOTHESIS:
        found = f"update4.convc1 takes {num_values} channels and decoder1.convblock.2 gives {last}"
        raise ValueError(f"{found}, expected an even number and a multiple of {_PER_HYPOTHESIS}; name another file")
    one, two, three = (size(f"feat_encoder.layer{index}.0.conv3") for index in (1, 2, 3))
    f1, f2, f3, f4 = (size(f"encoder.pyramid{index}.0.0") for index in (1, 2, 3, 4))
    d1, d2, d3, d4 = (size(f"decoder{index}.convblock.0.0") for index in (1, 2, 3, 4))
    return AMTSize(
        feature_widths=(one, two, three),
        features=size("feat_encoder.conv2"),
        pyramid=(f1, f2, f3, f4),
        decoders=(d1, d2, d3, d4),
        side=size("decoder4.convblock.1.conv2.0"),
        update=UpdateSize(
            correlation=size("update4.convc1"),
            flow=(size("update4.convf1"), size("update4.convf2")),
            motion=size("update4.conv"),
            hidden=size("update4.gru.0"),
        ),
        radius=correlation.radius_of(num_values // 2),
        num_hypotheses=last // _PER_HYPOTHESIS,
        comb=size("comb_block.0"),
    )


def _conv_prelu(in_channels: int, out_channels: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 3, stride, padding=1), nn.PReLU(out_channels))


def _two_convs(in_channels: int, width: int, out_channels: int) -> nn.Sequential:
    first, second = nn.Conv2d(in_channels, width, 3, padding=1), nn.Conv2d(width, out_channels, 3, padding=1)
    return nn.Sequential(first, nn.LeakyReLU(_SLOPE), second)
