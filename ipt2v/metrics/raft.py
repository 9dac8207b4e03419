"""RAFT (Teed and Deng 2020, arXiv 2003.12039), the optical flow behind VBench's dynamic degree, under its published key names.

Knows neither videos nor scores. Written from a functional description, the key table of raft-things.pth and the BSD-3
source of princeton-vl/RAFT (core/{raft,update,corr}.py). Once, by hand, equal random weights in a transcription of that
source gave the same bits on a CPU (136x152 pixels; 1, 4, 20 iterations); never run on the published weights here.

Legend: B pairs, H W pixels, h w = an eighth of them, 2 = x then y, C=3 RGB.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ipt2v.metrics import correlation
from ipt2v.models.strict_load import Tensors, axis_size, fill, load

NUM_ITERATIONS = 20  # VBench dynamic_degree.py: iters=20
STRIDE = 8  # pixels per cell; also the side of the square that the mask fills
_MASK_SCALE = 0.25  # core/update.py BasicUpdateBlock.forward
# torchvision's names for the same tensors (torchvision/models/optical_flow/raft.py), longest first
_TORCHVISION_RENAMED = {
    "feature_encoder.": "fnet.",
    "context_encoder.": "cnet.",
    "update_block.motion_encoder.convcorr1.0.": "update_block.encoder.convc1.",
    "update_block.motion_encoder.convcorr2.0.": "update_block.encoder.convc2.",
    "update_block.motion_encoder.convflow1.0.": "update_block.encoder.convf1.",
    "update_block.motion_encoder.convflow2.0.": "update_block.encoder.convf2.",
    "update_block.motion_encoder.conv.0.": "update_block.encoder.conv.",
    **{
        f"update_block.recurrent_block.convgru{n}.conv{gate}.": f"update_block.gru.conv{gate}{n}."
        for n in (1, 2)
        for gate in "zrq"
    },
    "mask_predictor.convrelu.0.": "update_block.mask.0.",
    "mask_predictor.conv.": "update_block.mask.2.",
    ".convnormrelu.0.": ".conv1.",
    ".convnormrelu.1.": ".norm1.",
    "net.conv.": "net.conv2.",
    **{f".convnormrelu{n}.{index}.": f".{kind}{n}." for n in (1, 2) for index, kind in enumerate(("conv", "norm"))},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSize:
    """Channels of one encoder; those of "things" have 64 96 128 and 256."""

    widths: tuple[int, int, int]  # at 1/2, 1/4, 1/8
    out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RAFTSize:
    """What differs between one RAFT and another of the large kind; "things" has radius 4 and hidden 128."""

    features: EncoderSize
    context: EncoderSize  # its output is the first hidden state, then what stays the same in all iterations
    radius: int  # of the correlation window, in cells
    correlation: tuple[int, int]  # channels of convc1, convc2
    flow: tuple[int, int]  # channels of convf1, convf2
    motion: int  # channels of the motion features, without the 2 of the flow itself
    hidden: int
    flow_head: int
    mask_head: int


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with norms beside a shortcut, which is convolved too where the block has stride 2."""

    def __init__(self, in_channels: int, channels: int, *, stride: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm1, self.norm2 = norm(channels), norm(channels)
        if stride == 1:
            self.downsample: nn.Module = nn.Identity()
        else:
            # one norm under two names, as published; of two different ones in a file the later of these lines counts
            self.norm3 = norm(channels)
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride), self.norm3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.downsample(x) + F.relu(self.norm2(self.conv2(y))))


class Encoder(nn.Module):
    """[B,3,H,W] float in -1..1 -> [B,out,h,w]."""

    def __init__(self, size: EncoderSize, *, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, size.widths[0], 7, 2, padding=3)
        self.norm1 = norm(size.widths[0])
        for index, (a, b) in enumerate(pairwise([size.widths[0], *size.widths]), start=1):
            first = ResidualBlock(a, b, stride=1 if index == 1 else 2, norm=norm)
            self.add_module(f"layer{index}", nn.Sequential(first, ResidualBlock(b, b, stride=1, norm=norm)))
        self.conv2 = nn.Conv2d(size.widths[-1], size.out, 1)

    def forward(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm1(self.conv1(image_BCHW)))
        for index in (1, 2, 3):
            x = self.get_submodule(f"layer{index}")(x)
        return self.conv2(x)


class MotionEncoder(nn.Module):
    """What the correlation around the present flow, and that flow, say about the motion."""

    def __init__(self, size: RAFTSize) -> None:
        super().__init__()
        (c1, c2), (f1, f2) = size.correlation, size.flow
        self.convc1 = nn.Conv2d(correlation.NUM_LEVELS * (2 * size.radius + 1) ** 2, c1, 1)
        self.convc2 = nn.Conv2d(c1, c2, 3, padding=1)
        self.convf1 = nn.Conv2d(2, f1, 7, padding=3)
        self.convf2 = nn.Conv2d(f1, f2, 3, padding=1)
        self.conv = nn.Conv2d(c2 + f2, size.motion, 3, padding=1)

    def forward(self, flow_B2hw: torch.Tensor, corr: torch.Tensor) -> torch.Tensor:
        corr = F.relu(self.convc2(F.relu(self.convc1(corr))))
        flow = F.relu(self.convf2(F.relu(self.convf1(flow_B2hw))))
        return torch.cat([F.relu(self.conv(torch.cat([corr, flow], 1))), flow_B2hw], 1)


class SeparableGRU(nn.Module):
    """A gated recurrent unit in two passes: along rows (1x5), then along columns (5x1)."""

    def __init__(self, hidden: int, inputs: int) -> None:
        super().__init__()
        for index, kernel in enumerate(((1, 5), (5, 1)), start=1):
            for gate in "zrq":
                padding = (kernel[0] // 2, kernel[1] // 2)
                self.add_module(f"conv{gate}{index}", nn.Conv2d(hidden + inputs, hidden, kernel, padding=padding))

    def forward(self, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        for index in (1, 2):
            z, r, q = (self.get_submodule(f"conv{gate}{index}") for gate in "zrq")
            hx = torch.cat([h, x], 1)
            update, reset = torch.sigmoid(z(hx)), torch.sigmoid(r(hx))
            h = (1 - update) * h + update * torch.tanh(q(torch.cat([reset * h, x], 1)))
        return h


class FlowHead(nn.Module):
    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(hidden, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv2(F.relu(self.conv1(x)))


class UpdateBlock(nn.Module):
    """One iteration: a new hidden state and the change of the flow."""

    def __init__(self, size: RAFTSize) -> None:
        super().__init__()
        self.encoder = MotionEncoder(size)
        self.gru = SeparableGRU(size.hidden, size.context.out - size.hidden + size.motion + 2)
        self.flow_head = FlowHead(size.hidden, size.flow_head)
        mask = nn.Conv2d(size.mask_head, 9 * STRIDE**2, 1)
        self.mask = nn.Sequential(nn.Conv2d(size.hidden, size.mask_head, 3, padding=1), nn.ReLU(), mask)

    def forward(
        self, hidden: torch.Tensor, context: torch.Tensor, corr: torch.Tensor, flow_B2hw: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.gru(hidden, torch.cat([context, self.encoder(flow_B2hw, corr)], 1))
        return hidden, self.flow_head(hidden)


class RAFT(nn.Module):
    """Where each pixel of one frame has gone in another."""

    def __init__(self, size: RAFTSize) -> None:
        super().__init__()
        self.size = size
        self.fnet = Encoder(size.features, norm=nn.InstanceNorm2d)
        self.cnet = Encoder(size.context, norm=nn.BatchNorm2d)
        self.update_block = UpdateBlock(size)

    def forward(
        self, first_BCHW: torch.Tensor, second_BCHW: torch.Tensor, *, num_iterations: int = NUM_ITERATIONS
    ) -> torch.Tensor:
        """The flow from the first frames to the second, [B,2,H,W] float32 in pixels; x to the right, y down.

        Frames are [B,3,H,W] float 0..255. Raises ValueError unless H and W are multiples of 8 and at least 128.
        """
        correlation.check_sides(first_BCHW, STRIDE)
        first, second = (2 * (frame / 255.0) - 1.0 for frame in (first_BCHW, second_BCHW))
        # an instance norm sees one frame at a time, so that both frames may share a batch
        features_first, features_second = self.fnet(torch.cat([first, second])).chunk(2)
        levels = correlation.pyramid(correlation.correlation_BPhw(features_first, features_second))
        hidden, context = self.cnet(first).split([self.size.hidden, self.size.context.out - self.size.hidden], 1)
        hidden, context = torch.tanh(hidden), F.relu(context)
        start_2hw = correlation.grid_2hw(hidden)
        place_B2hw = start_2hw.expand(len(hidden), -1, -1, -1)
        for _ in range(num_iterations):
            corr = correlation.look_up(levels, place_B2hw, self.size.radius)
            hidden, change = self.update_block(hidden, context, corr, place_B2hw - start_2hw)
            place_B2hw = place_B2hw + change
        # upstream enlarges after every iteration, for training; nothing reads but the last
        return upsample(place_B2hw - start_2hw, _MASK_SCALE * self.update_block.mask(hidden))


def upsample(flow_B2hw: torch.Tensor, logits_BMhw: torch.Tensor) -> torch.Tensor:
    """[B,2,8h,8w]: every pixel's flow is a mean of the 3x3 cells around its own, weighted by a softmax; zero beyond the edge.

    The M = 9*8*8 logits are, slow to fast: neighbour (row by row), row of the pixel in its cell, column in its cell.
    """
    batch, _, h, w = flow_B2hw.shape
    weights = logits_BMhw.view(batch, 1, 9, STRIDE, STRIDE, h, w).softmax(2)
    neighbours = F.unfold(STRIDE * flow_B2hw, 3, padding=1).view(batch, 2, 9, 1, 1, h, w)
    flow_B2yxhw = (weights * neighbours).sum(2)
    return flow_B2yxhw.permute(0, 1, 4, 2, 5, 3).reshape(batch, 2, STRIDE * h, STRIDE * w)


def load_raft(path: Path, *, device: torch.device) -> RAFT:
    """The network of raft-things.pth, or of torchvision's raft_large under torchvision's names, float32, for evaluation.

    Raises ValueError if the file cannot be read or is not, key by key and shape by shape, a large RAFT of any width.
    """
    return load(path, make_raft).to(device)


def make_raft(tensors: Tensors) -> RAFT:
    """The network that these tensors (keys without `module.`) are of. Raises ValueError if they are of no large RAFT."""
    tensors = _official(tensors)
    with torch.device("meta"):
        network = RAFT(_read_size(tensors))
    fill(network, tensors)
    return network


def _official(tensors: Tensors) -> Tensors:
    """The same tensors under the keys of princeton-vl; an unknown key stays as it is, to be refused."""
    if not any(key.startswith("feature_encoder.") for key in tensors):
        return tensors
    renamed = {}
    for name, tensor in tensors.items():
        key = name
        for theirs, ours in _TORCHVISION_RENAMED.items():
            key = key.replace(theirs, ours)
        renamed[key] = tensor
    # torchvision leaves out the second name of the shortcut's norm
    norms = {key: tensor for key, tensor in renamed.items() if key.startswith("cnet.") and ".downsample.1." in key}
    return renamed | {key.replace(".downsample.1.", ".norm3."): tensor for key, tensor in norms.items()}


def _read_size(tensors: Tensors) -> RAFTSize:
    def encoder(name: str) -> EncoderSize:
        one, two, three = (axis_size(tensors, f"{name}.layer{index}.0.conv1.weight") for index in (1, 2, 3))
        return EncoderSize(widths=(one, two, three), out=axis_size(tensors, f"{name}.conv2.weight"))

    def num_outputs(name: str) -> int:
        return axis_size(tensors, f"update_block.{name}.weight")

    context, hidden = encoder("cnet"), num_outputs("gru.convz1")
    if context.out <= hidden:
        raise ValueError(f"cnet.conv2 has {context.out} channels, expected more than the {hidden} of the hidden state")
    return RAFTSize(
        features=encoder("fnet"),
        context=context,
        radius=correlation.radius_of(axis_size(tensors, "update_block.encoder.convc1.weight", 1)),
        correlation=(num_outputs("encoder.convc1"), num_outputs("encoder.convc2")),
        flow=(num_outputs("encoder.convf1"), num_outputs("encoder.convf2")),
        motion=num_outputs("encoder.conv"),
        hidden=hidden,
        flow_head=num_outputs("flow_head.conv1"),
        mask_head=num_outputs("mask.0"),
    )
