"""Random weights in the layouts of the files of the metrics that are no flow or interpolation, and CLIP's merges.

Knows no files and no loader. The same seed gives the same tensors; the global random state stays.
"""

from __future__ import annotations

import gzip
import math

import torch
from torch import nn

from ipt2v.metrics.aesthetic import AestheticHead
from ipt2v.metrics.clip import CLIP, ImageSize, TextSize, TransformerSize
from ipt2v.metrics.curricular import CurricularFace, FaceSize
from ipt2v.metrics.inception import Inception, InceptionSize, convolutions
from ipt2v.metrics.musiq import MUSIQ, MUSIQSize
from ipt2v.metrics.viclip import ViCLIP

_MERGES = ("t h", "th e</w>", "i n", "a n", "an d</w>", "e r</w>", "w a", "wa l", "wal k", "walk s</w>", "o f</w>", "p e")
_VOCABULARY = 2 * 256 + len(_MERGES) + 2  # every byte within and at the end of a word, the merges, two markers
_TRANSFORMER = TransformerSize(width=64, mlp_width=96, num_blocks=2, num_heads=1)
_OUT_WIDTH = 48

TOY_MUSIQ = MUSIQSize(stem_width=32, block_width=64, width=64, mlp_width=96, num_blocks=2, num_heads=1)
TOY_IMAGE = ImageSize(transformer=_TRANSFORMER, patch=28, grid=8, out_width=_OUT_WIDTH)  # 224 pixels, as the real one
TOY_VICLIP_TEXT, TOY_CLIP_TEXT = (
    TextSize(transformer=_TRANSFORMER, context=context, vocabulary=_VOCABULARY, out_width=_OUT_WIDTH) for context in (32, 77)
)
TOY_FACE = FaceSize(stem_width=4, widths=(4, 6, 6, 8, 10), out_width=16)
TOY_INCEPTION = InceptionSize(widths={name: 3 + index % 4 for index, name in enumerate(convolutions())}, num_classes=7)
_TOY_FRAMES = 8


def toy_musiq(seed: int) -> dict[str, torch.Tensor]:
    """What musiq_spaq_ckpt-358bb6af.pth holds, of a tiny network; its scores lie near 50 of 0..100."""
    with torch.device("meta"):
        network = MUSIQ(TOY_MUSIQ)
    tensors = drawn(network, seed)
    tensors["head.weight"] *= 5
    tensors["head.bias"].fill_(50)
    return tensors


def toy_viclip(seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """What ViClip-InternVid-10M-FLT.pth holds, of a tiny network whose vocabulary is that of toy_merges."""
    with torch.device("meta"):
        network = ViCLIP(TOY_VICLIP_TEXT, TOY_IMAGE, _TOY_FRAMES)
    return {"model": drawn(network, seed)}


def toy_clip(seed: int) -> dict[str, torch.Tensor]:
    """What ViT-L-14.pt holds, of a tiny network whose vocabulary is that of toy_merges; half precision, but no TorchScript."""
    with torch.device("meta"):
        network = CLIP(TOY_CLIP_TEXT, TOY_IMAGE)
    return {key: tensor.half() for key, tensor in drawn(network, seed).items()}


def toy_head(seed: int) -> dict[str, torch.Tensor]:
    """What sa_0_4_vit_l_14_linear.pth holds, for the features of toy_clip; its scores lie near 5 of 0..10."""
    tensors = drawn(AestheticHead(_OUT_WIDTH, 1), seed)
    tensors["weight"] *= math.sqrt(_OUT_WIDTH)  # against features of length 1
    tensors["bias"].fill_(5)
    return tensors


def toy_curricular(seed: int) -> dict[str, torch.Tensor]:
    """What glint360k_curricular_face_r101_backbone.bin holds, of a tiny network."""
    with torch.device("meta"):
        network = CurricularFace(TOY_FACE)
    return drawn(network, seed)


def toy_inception(seed: int) -> dict[str, torch.Tensor]:
    """What inception_v3_google-0cc3c7bd.pth holds, of a tiny network whose features differ from face to face."""
    with torch.device("meta"):
        network = Inception(TOY_INCEPTION)
    gain = 1.7  # half of a signal is below 0 and lost; sqrt(2) makes up for it in wide layers, but not in these
    return {key: gain * value if key.endswith("conv.weight") else value for key, value in drawn(network, seed).items()}


def toy_merges() -> bytes:
    """A bpe_simple_vocab_16e6.txt.gz of a few merges, the same bytes every time."""
    lines = ('"bpe_simple_vocab_16e6.txt#version: 0.2', *_MERGES, "")
    return gzip.compress("\n".join(lines).encode("utf-8"), mtime=0)


def drawn(network: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {key: _draw(key, value.shape, generator) for key, value in network.state_dict().items()}


def _draw(key: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if key.endswith("num_batches_tracked"):
        return torch.tensor(1000)
    noise = torch.randn(shape, generator=generator)
    if key.endswith(("_embedding", "_embedding.weight", "_emb")):
        return noise  # looked up, or added to what a norm has made of length 1
    if key.endswith(("proj", "text_projection")):
        return noise / math.sqrt(shape[0])  # multiplied from the right
    if len(shape) > 1:
        return noise * math.sqrt(shape[0] / shape.numel())  # a signal keeps its strength
    if key.endswith((".weight", "running_var")):
        return 0.8 + 0.2 * noise.abs()
    return 0.1 * noise
