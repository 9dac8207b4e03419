"""The IR-101 face recogniser of CurricularFace (Huang et al. 2020, arXiv 2004.00288), under its published key names.

Knows no photo, no detector and no metric. Written from a description of the computation and the table of keys
(curricularface_ir101); parity with TFace's code on equal weights was not run here.

Legend: B faces, C=3 RGB, H=W=112 pixels, D=512 width of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ipt2v.models.strict_load import Tensors, axis_size, count, fill, load

FACE_SIZE = 112  # pixels
_NUM_STAGES = 4  # each halves the resolution
_CELLS = FACE_SIZE // 2**_NUM_STAGES


@dataclass(frozen=True, slots=True, kw_only=True)
class FaceSize:
    """What differs between one network and another; IR-101 has 64, then 3 13 30 3 units of 64 128 256 512, and gives 512."""

    stem_width: int
    widths: tuple[int, ...]  # of the units, one after the other
    out_width: int

    @property
    def channels(self) -> tuple[tuple[int, int], ...]:
        """(before, after) of every unit."""
        return tuple(zip((self.stem_width, *self.widths), self.widths, strict=False))

    @property
    def strides(self) -> tuple[int, ...]:
        """2 where a stage begins: at the first unit, and where the width changes."""
        return tuple(2 if index == 0 or a != b else 1 for index, (a, b) in enumerate(self.channels))


class Unit(nn.Module):
    """Norm, convolution, norm, slope, convolution, norm, beside a shortcut; nothing comes after the sum."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.Conv2d(in_channels, out_channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.PReLU(out_channels),
            nn.Conv2d(out_channels, out_channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut_layer = None
        if in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut_layer = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        kept = x[:, :, :: self.stride, :: self.stride] if self.shortcut_layer is None else self.shortcut_layer(x)
        return self.res_layer(x) + kept


class CurricularFace(nn.Module):
    """Aligned faces [B,3,112,112] float RGB in -1..1 -> embeddings [B,D], not normalised."""

    def __init__(self, size: FaceSize) -> None:
        super().__init__()
        first = nn.Conv2d(3, size.stem_width, 3, 1, 1, bias=False)
        self.input_layer = nn.Sequential(first, nn.BatchNorm2d(size.stem_width), nn.PReLU(size.stem_width))
        units = zip(size.channels, size.strides, strict=True)
        self.body = nn.Sequential(*(Unit(a, b, stride) for (a, b), stride in units))
        last = size.widths[-1]
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(last),
            nn.Identity(),  # dropout, when it was trained
            nn.Flatten(),
            nn.Linear(last * _CELLS**2, size.out_width),
            nn.BatchNorm1d(size.out_width, affine=False),
        )

    def forward(self, faces_BCHW: torch.Tensor) -> torch.Tensor:
        return self.output_layer(self.body(self.input_layer(faces_BCHW)))


@torch.inference_mode()
def embed_faces(network: nn.Module, faces_BHWC: torch.Tensor) -> torch.Tensor:
    """Embeddings [B,D] of length 1 of faces, [B,112,112,3] uint8 RGB, aligned by the eyes, the nose and the mouth.

    Faces and network lie on one device. Raises ValueError if the faces have another shape or dtype.
    """
    if faces_BHWC.dtype != torch.uint8 or faces_BHWC.shape[1:] != (FACE_SIZE, FACE_SIZE, 3):
        found = f"{faces_BHWC.dtype} {tuple(faces_BHWC.shape)}"
        raise ValueError(f"faces: found {found}, expected uint8 [B,{FACE_SIZE},{FACE_SIZE},3]")
    return F.normalize(network((faces_BHWC.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5), dim=1)


def load_curricular(path: Path) -> CurricularFace:
    """The network of a file in the layout of glint360k_curricular_face_r101_backbone.bin, float32, on the CPU, to evaluate.

    Raises ValueError if the file cannot be read or is not, key by key and shape by shape, such a network; OSError if there is
    none.
    """
    return load(path, build)


def build(tensors: Tensors) -> CurricularFace:
    """The network that holds exactly these tensors. Raises ValueError, naming the keys that do not fit."""
    with torch.device("meta"):
        network = CurricularFace(read_size(tensors))
    fill(network, tensors)
    return network


def read_size(tensors: Tensors) -> FaceSize:
    convolutions = [f"body.{index}.res_layer.1.weight" for index in range(count(tensors, "body."))]
    size = FaceSize(
        stem_width=axis_size(tensors, "input_layer.0.weight"),
        widths=tuple(axis_size(tensors, key) for key in convolutions),
        out_width=axis_size(tensors, "output_layer.3.weight"),
    )
    if (num_stages := size.strides.count(2)) != _NUM_STAGES:
        raise ValueError(f"units of {num_stages} widths in a row, expected {_NUM_STAGES}; name another file")
    return size
