"""ViCLIP (Wang et al. 2023, arXiv 2307.06942), a video and a text in one space, under the key names of its published weights.

Knows no file of a video, no words and no metric. Written from a description of the computation and the table of keys
(viclip); within 1e-7 of VBench's code on equal weights (tests/bench/vbench_parity.py).

Legend: B batch, T=8 frames, C=3 RGB, H W pixels, N patches of a frame, L=32 tokens of a text, D width, E=768 shared space.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ipt2v.metrics.clip import ImageSize, TextSize, TextTower, Transformer, read_image_size, read_text_size
from ipt2v.models.strict_load import Tensors, axis_size, fill, load


class VideoTower(nn.Module):
    """Normalised frames [B,T,3,H,W], T = num_frames, H = W = image_size -> features [B,E], not normalised."""

    def __init__(self, size: ImageSize, num_frames: int) -> None:
        super().__init__()
        width = size.transformer.width
        self.num_frames, self.image_size = num_frames, size.grid * size.patch
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + size.grid**2, width))
        self.temporal_positional_embedding = nn.Parameter(torch.zeros(1, num_frames, width))
        self.proj = nn.Parameter(torch.zeros(width, size.out_width))
        kernel = (1, size.patch, size.patch)
        self.conv1 = nn.Conv3d(3, width, kernel, kernel, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(size.transformer)

    def forward(self, frames_BTCHW: torch.Tensor) -> torch.Tensor:
        expected = (self.num_frames, 3, self.image_size, self.image_size)
        if frames_BTCHW.shape[1:] != expected:
            raise ValueError(f"frames of shape {tuple(frames_BTCHW.shape)}, expected [B,{','.join(map(str, expected))}]")
        patches_BTND = self.conv1(frames_BTCHW.transpose(1, 2)).flatten(3).permute(0, 2, 3, 1)
        patches_BTND = patches_BTND + self.positional_embedding[1:] + self.temporal_positional_embedding[:, :, None]
        # one class token for the whole video, at no time of it
        first_BND = (self.class_embedding + self.positional_embedding[0]).expand(len(frames_BTCHW), 1, -1)
        x_BND = torch.cat([first_BND, patches_BTND.flatten(1, 2)], dim=1)  # attention does not mind the order of patches
        return self.ln_post(self.transformer(self.ln_pre(x_BND))[:, 0]) @ self.proj


class ViCLIP(nn.Module):
    """Both towers; `temp` is a temperature of training that nothing reads."""

    def __init__(self, text: TextSize, image: ImageSize, num_frames: int) -> None:
        super().__init__()
        self.vision_encoder = VideoTower(image, num_frames)
        self.text_encoder = TextTower(text)
        self.temp = nn.Parameter(torch.zeros(()))

    def encode_video(self, frames_BTCHW: torch.Tensor) -> torch.Tensor:
        return self.vision_encoder(frames_BTCHW)

    def encode_text(self, ids_BL: torch.Tensor) -> torch.Tensor:
        return self.text_encoder(ids_BL)


def load_viclip(path: Path) -> ViCLIP:
    """The network of a file in the layout of ViClip-InternVid-10M-FLT.pth, float32, on the CPU, in evaluation mode.

    Raises ValueError if the file cannot be read or is not, key by key and shape by shape, a ViCLIP; OSError if there is none.
    """
    return load(path, build)


def build(tensors: Tensors) -> ViCLIP:
    """The network that holds exactly these tensors. Raises ValueError, naming the keys that do not fit."""
    text, image = read_text_size(tensors, "text_encoder."), read_image_size(tensors, "vision_encoder.", patch_axis=4)
    num_frames = axis_size(tensors, "vision_encoder.temporal_positional_embedding", 1)
    with torch.device("meta"):
        network = ViCLIP(text, image, num_frames)
    fill(network, tensors)
    return network
