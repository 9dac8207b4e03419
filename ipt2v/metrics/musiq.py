"""MUSIQ (Ke et al. 2021, arXiv 2108.05997), the quality of an image, under the key names of its published PyTorch weights.

Knows no video and no metric. Written from a description of the computation and the table of keys (musiq_spaq), not from
pyiqa, whose licence forbids it; within 1e-5, of 0..100, of VBench's scores on equal weights (tests/bench/vbench_parity.py).

Legend: B images, C=3 RGB, H W pixels, N tokens of all scales, P=32 side of a patch, h w cells of it, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ipt2v.models.strict_load import Tensors, axis_size, count, fill, heads, load

PATCH = 32  # pixels
LONGER_SIDES = (224, 384, None)  # of the scales, pixels; None: as it is
_GRID = 10  # the hash of positions, num_patches of the paper's section 3.2: row 10 of 10 and column 10 of 10
_GROUPS = 32  # of every group norm
_ROOT_EPS, _BLOCK_EPS, _ENCODER_EPS = 1e-6, 1e-4, 1e-6
_CELLS = 8  # a patch after the stem: a convolution and a pooling of stride 2


@dataclass(frozen=True, slots=True, kw_only=True)
class MUSIQSize:
    """What differs between one MUSIQ and another; the published one has 64, 256, 384, 1152 and 14 blocks."""

    stem_width: int
    block_width: int
    width: int
    mlp_width: int
    num_blocks: int
    num_heads: int


class StandardConv(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding, whose weights are standardised (Qiao et al. 2019, arXiv 1903.10520)."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        std, mean = torch.std_mean(self.weight, dim=(1, 2, 3), keepdim=True)  # n - 1 in the deviation
        return F.conv2d(
            same_padded(x, self.kernel_size[0], self.stride[0]), (self.weight - mean) / (std + 1e-5), None, self.stride
        )


class Bottleneck(nn.Module):
    """The one residual block of the stem; what the shortcut passes through is widened as well."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        narrow = in_channels
        self.conv1, self.gn1 = StandardConv(in_channels, narrow, 1), nn.GroupNorm(_GROUPS, narrow, _BLOCK_EPS)
        self.conv2, self.gn2 = StandardConv(narrow, narrow, 3), nn.GroupNorm(_GROUPS, narrow, _BLOCK_EPS)
        self.conv3, self.gn3 = StandardConv(narrow, out_channels, 1), nn.GroupNorm(_GROUPS, out_channels, _BLOCK_EPS)
        self.conv_proj = StandardConv(in_channels, out_channels, 1)
        self.gn_proj = nn.GroupNorm(_GROUPS, out_channels, _BLOCK_EPS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.gn1(self.conv1(x)))
        y = F.relu(self.gn2(self.conv2(y)))
        return F.relu(self.gn3(self.conv3(y)) + self.gn_proj(self.conv_proj(x)))


class Attention(nn.Module):
    """Every token of an image looks at every other, of all scales."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part(x_BND).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, mlp_width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x_BND)))


class Block(nn.Module):
    def __init__(self, size: MUSIQSize) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(size.width, _ENCODER_EPS) for _ in range(2))
        self.attention = Attention(size.width, size.num_heads)
        self.mlp = Mlp(size.width, size.mlp_width)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        x_BND = x_BND + self.attention(self.norm1(x_BND))
        return x_BND + self.mlp(self.norm2(x_BND))


class Encoder(nn.Module):
    """Tokens, where each lies and of which scale it is -> the class token after all blocks, [B,D]."""

    def __init__(self, size: MUSIQSize) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.zeros(1, 1, size.width))
        self.posembed_input = nn.ParameterDict({"position_emb": torch.zeros(1, _GRID**2, size.width)})
        self.scaleembed_input = nn.ParameterDict({"scale_emb": torch.zeros(len(LONGER_SIDES), size.width)})
        self.transformer = nn.ModuleDict({f"encoderblock_{index}": Block(size) for index in range(size.num_blocks)})
        self.encoder_norm = nn.LayerNorm(size.width, _ENCODER_EPS)

    def forward(self, tokens_BND: torch.Tensor, position_N: torch.Tensor, scale_N: torch.Tensor) -> torch.Tensor:
        tokens_BND = tokens_BND + self.posembed_input["position_emb"][0, position_N]
        tokens_BND = tokens_BND + self.scaleembed_input["scale_emb"][scale_N]
        x_BND = torch.cat([self.cls.expand(len(tokens_BND), -1, -1), tokens_BND], dim=1)
        for block in self.transformer.values():
            x_BND = block(x_BND)
        return self.encoder_norm(x_BND[:, 0])


class MUSIQ(nn.Module):
    """Images of one size, [B,3,H,W] float RGB in 0..1 -> their quality [B], nominally 0..100, higher is better."""

    def __init__(self, size: MUSIQSize) -> None:
        super().__init__()
        self.conv_root = StandardConv(3, size.stem_width, 7, stride=2)
        self.gn_root = nn.GroupNorm(_GROUPS, size.stem_width, _ROOT_EPS)
        self.block1 = Bottleneck(size.stem_width, size.block_width)
        self.embedding = nn.Linear(_CELLS**2 * size.block_width, size.width)
        self.transformer_encoder = Encoder(size)
        self.head = nn.Linear(size.width, 1)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        patches_BNCPP, position_N, scale_N = multi_scale_patches(2 * (images_BCHW - 0.5))
        cells = self.stem(patches_BNCPP.flatten(0, 1))
        # row, column, channel: the order in which TensorFlow flattens
        tokens = self.embedding(cells.permute(0, 2, 3, 1).flatten(1))
        tokens_BND = tokens.unflatten(0, patches_BNCPP.shape[:2])
        return self.head(self.transformer_encoder(tokens_BND, position_N, scale_N))[:, 0]

    def stem(self, patches: torch.Tensor) -> torch.Tensor:
        """[B*N,3,P,P] -> [B*N,channels,h,w]."""
        x = F.relu(self.gn_root(self.conv_root(patches)))
        return self.block1(F.max_pool2d(same_padded(x, 3, 2), 3, 2))  # zeros are the least there is after a ReLU


def same_padded(x: torch.Tensor, kernel: int, stride: int) -> torch.Tensor:
    """With TensorFlow's SAME padding: ceil(n / stride) outputs, and the odd pixel of zeros at the right and the bottom."""
    totals = [max(0, (math.ceil(n / stride) - 1) * stride + kernel - n) for n in (x.shape[-1], x.shape[-2])]
    return F.pad(x, [part for total in totals for part in (total // 2, total - total // 2)])


def multi_scale_patches(images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised images -> patches_BNCPP of all scales, smallest first, their hashed positions [N] and scales [N].

    The published code fills scales 0 and 1 up to 49 and 144 tokens that are masked out of every attention; they never reach
    the score, so they are left out. Raises ValueError if an image is so thin that it vanishes at the smallest scale.
    """
    parts = [_patches(_resized(images_BCHW, side)) for side in LONGER_SIDES]
    position_N = torch.cat([hashed_positions(rows, columns) for _, rows, columns in parts]).to(images_BCHW.device)
    scale_N = torch.cat([torch.full((rows * columns,), scale) for scale, (_, rows, columns) in enumerate(parts)])
    return torch.cat([patches for patches, _, _ in parts], dim=1), position_N, scale_N.to(images_BCHW.device)


def hashed_positions(num_rows: int, num_columns: int) -> torch.Tensor:
    """Where each patch of a grid, row by row, lies in the grid of 10 x 10 learned positions: section 3.2 of the paper."""
    rows, columns = (torch.arange(n) * _GRID // n for n in (num_rows, num_columns))
    return (rows[:, None] * _GRID + columns).flatten()


def _resized(images_BCHW: torch.Tensor, longer_side: int | None) -> torch.Tensor:
    """Bicubic, not antialiased, not clamped; a small image is enlarged."""
    if longer_side is None:
        return images_BCHW
    height, width = images_BCHW.shape[-2:]
    ratio = longer_side / max(height, width)
    size = (round(height * ratio), round(width * ratio))
    if not all(size):
        raise ValueError(
            f"image {width}x{height}: vanishes when its longer side becomes {longer_side} pixels; too thin to score"
        )
    return F.interpolate(images_BCHW, size=size, mode="bicubic", align_corners=False)


def _patches(images_BCHW: torch.Tensor) -> tuple[torch.Tensor, int, int]:
    """(patches_BNCPP row by row, number of rows, of columns); the border is mid grey, half of it on either side."""
    padded = same_padded(images_BCHW, PATCH, PATCH)
    cut = padded.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # B C rows columns P P
    return cut.permute(0, 2, 3, 1, 4, 5).flatten(1, 2), cut.shape[2], cut.shape[3]


def load_musiq(path: Path) -> MUSIQ:
    """The network of a file in the layout of musiq_spaq_ckpt-358bb6af.pth, float32, on the CPU, in evaluation mode.

    Raises ValueError if the file cannot be read or is not, key by key and shape by shape, a MUSIQ of one score; OSError if
    there is none.
    """
    return load(path, build)


def build(tensors: Tensors) -> MUSIQ:
    """The network that holds exactly these tensors. Raises ValueError, naming the keys that do not fit."""
    with torch.device("meta"):
        network = MUSIQ(read_size(tensors))
    fill(network, tensors)
    return network


def read_size(tensors: Tensors) -> MUSIQSize:
    blocks = "transformer_encoder.transformer.encoderblock_"
    stem_width, block_width = (axis_size(tensors, f"{name}.weight") for name in ("conv_root", "block1.conv3"))
    if stem_width % _GROUPS or block_width % _GROUPS or not stem_width or not block_width:
        raise ValueError(f"a stem of widths {stem_width}, {block_width}, expected multiples of {_GROUPS}; name another file")
    width = axis_size(tensors, "transformer_encoder.cls", 2)
    return MUSIQSize(
        stem_width=stem_width,
        block_width=block_width,
        width=width,
        mlp_width=axis_size(tensors, f"{blocks}0.mlp.fc1.weight"),
        num_blocks=count(tensors, blocks),
        num_heads=heads(width),
    )
