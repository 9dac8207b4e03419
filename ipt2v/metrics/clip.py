"""CLIP (Radford et al. 2021, arXiv 2103.00020) under the key names of OpenAI's weights; its towers also serve ViCLIP.

Knows no video, no text and no metric. Written from a description of the computation and the table of keys (clip_vit_l14).

Legend: B batch, C=3 RGB, H W pixels, N tokens, L length of a text, D width, E width of the shared space.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ipt2v.models.strict_load import Tensors, axis_size, count, fill, heads, load

# of the TorchScript archive: numbers that the tensors' shapes say as well
_BOOKKEEPING = ("input_resolution", "context_length", "vocab_size")
_HUGGING_FACE = {  # names of transformers' CLIPModel -> OpenAI's, applied one after the other
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.": "visual.conv1.",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.": "ln_final.",
    ".layer_norm1.": ".ln_1.",
    ".layer_norm2.": ".ln_2.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
    ".self_attn.": ".attn.",
}
_TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerSize:
    width: int
    mlp_width: int
    num_blocks: int
    num_heads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSize:
    """ViCLIP's text tower has 768, 3072, 12 blocks, 32 tokens of 49,408, and gives 768; CLIP's has 77 tokens."""

    transformer: TransformerSize
    context: int  # tokens of a text, with start, end and filling
    vocabulary: int
    out_width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSize:
    """ViT-L/14 has 1024, 4096, 24 blocks, patches of 14 pixels in a grid of 16, and gives 768."""

    transformer: TransformerSize
    patch: int  # pixels
    grid: int  # patches along a side
    out_width: int


class QuickGelu(nn.Module):
    """The approximation of GELU that CLIP was trained with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(1.702 * x)


class Attention(nn.Module):
    """Multi-head attention with one matrix for query, key and value."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.num_heads = size.num_heads
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * size.width, size.width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * size.width))
        self.out_proj = nn.Linear(size.width, size.width)

    def forward(self, x_BND: torch.Tensor, *, causal: bool) -> torch.Tensor:
        qkv = F.linear(x_BND, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in qkv)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.attn = Attention(size)
        self.ln_1, self.ln_2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        c_fc, c_proj = nn.Linear(size.width, size.mlp_width), nn.Linear(size.mlp_width, size.width)
        self.mlp = nn.Sequential(OrderedDict(c_fc=c_fc, gelu=QuickGelu(), c_proj=c_proj))

    def forward(self, x_BND: torch.Tensor, *, causal: bool) -> torch.Tensor:
        x_BND = x_BND + self.attn(self.ln_1(x_BND), causal=causal)
        return x_BND + self.mlp(self.ln_2(x_BND))


class Transformer(nn.Module):
    """[B,N,D] -> [B,N,D]; causal: a token sees itself and those before it."""

    def __init__(self, size: TransformerSize) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(size) for _ in range(size.num_blocks))

    def forward(self, x_BND: torch.Tensor, *, causal: bool = False) -> torch.Tensor:
        for block in self.resblocks:
            x_BND = block(x_BND, causal=causal)
        return x_BND


class TextTower(nn.Module):
    """Token ids [B,L] of full length -> features [B,E], not normalised."""

    def __init__(self, size: TextSize) -> None:
        super().__init__()
        self.context = size.context
        width = size.transformer.width
        self.positional_embedding = nn.Parameter(torch.zeros(size.context, width))
        self.text_projection = nn.Parameter(torch.zeros(width, size.out_width))
        self.transformer = Transformer(size.transformer)
        self.token_embedding = nn.Embedding(size.vocabulary, width)
        self.ln_final = nn.LayerNorm(width)

    def encode_text(self, ids_BL: torch.Tensor) -> torch.Tensor:
        x_BLD = self.token_embedding(ids_BL) + self.positional_embedding
        x_BLD = self.ln_final(self.transformer(x_BLD, causal=True))
        # the end of the text has the largest id there is; argmax takes the first
        return x_BLD[torch.arange(len(ids_BL), device=ids_BL.device), ids_BL.argmax(dim=1)] @ self.text_projection

    def forward(self, ids_BL: torch.Tensor) -> torch.Tensor:
        return self.encode_text(ids_BL)


class ImageTower(nn.Module):
    """Normalised images [B,3,H,W] of image_size -> features [B,E], not normalised."""

    def __init__(self, size: ImageSize) -> None:
        super().__init__()
        width = size.transformer.width
        self.image_size = size.grid * size.patch
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(1 + size.grid**2, width))
        self.proj = nn.Parameter(torch.zeros(width, size.out_width))
        self.conv1 = nn.Conv2d(3, width, size.patch, size.patch, bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(size.transformer)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        patches_BND = self.conv1(images_BCHW).flatten(2).transpose(1, 2)
        first_BND = self.class_embedding.expand(len(images_BCHW), 1, -1)
        x_BND = torch.cat([first_BND, patches_BND], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(x_BND))[:, 0]) @ self.proj


class CLIP(TextTower):
    """Both towers, as OpenAI's file has them: the text tower's keys lie at the root, beside `visual`."""

    def __init__(self, text: TextSize, image: ImageSize) -> None:
        super().__init__(text)
        self.visual = ImageTower(image)
        self.logit_scale = nn.Parameter(torch.zeros(()))

    def encode_image(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        return self.visual(images_BCHW)


def load_clip(path: Path) -> CLIP:
    """The network of ViT-L-14.pt, ViT-B-32.pt or a flat dict of their keys, or of Hugging Face's model.safetensors.

    Float32, on the CPU, in evaluation mode. OpenAI's .pt is a TorchScript archive in half precision, of which only the
    tensors are read. Raises ValueError if the file cannot be read or is not, key by key and shape by shape, a CLIP; OSError
    if there is none.
    """
    return load(path, build)


def build(tensors: Tensors) -> CLIP:
    """The network that holds exactly these tensors. Raises ValueError, naming the keys that do not fit."""
    if any(key.startswith("vision_model.") for key in tensors):
        tensors = _from_hugging_face(tensors)
    tensors = {key: tensor for key, tensor in tensors.items() if key not in _BOOKKEEPING}
    with torch.device("meta"):
        network = CLIP(read_text_size(tensors, ""), read_image_size(tensors, "visual."))
    fill(network, tensors)
    return network


def read_text_size(tensors: Tensors, prefix: str) -> TextSize:
    return TextSize(
        transformer=_read_transformer_size(tensors, f"{prefix}transformer.resblocks."),
        context=axis_size(tensors, f"{prefix}positional_embedding"),
        vocabulary=axis_size(tensors, f"{prefix}token_embedding.weight"),
        out_width=axis_size(tensors, f"{prefix}text_projection", 1),
    )


def read_image_size(tensors: Tensors, prefix: str, *, patch_axis: int = 3) -> ImageSize:
    num_positions = axis_size(tensors, f"{prefix}positional_embedding")
    grid = math.isqrt(max(0, num_positions - 1))
    if grid < 1 or grid**2 + 1 != num_positions:
        text = f"has {num_positions} rows, expected one and those of a square"
        raise ValueError(f"key {prefix}positional_embedding {text}; name another file")
    return ImageSize(
        transformer=_read_transformer_size(tensors, f"{prefix}transformer.resblocks."),
        patch=axis_size(tensors, f"{prefix}conv1.weight", patch_axis),
        grid=grid,
        out_width=axis_size(tensors, f"{prefix}proj", 1),
    )


def _read_transformer_size(tensors: Tensors, prefix: str) -> TransformerSize:
    mlp_width, width = (axis_size(tensors, f"{prefix}0.mlp.c_fc.weight", axis) for axis in (0, 1))
    return TransformerSize(width=width, mlp_width=mlp_width, num_blocks=count(tensors, prefix), num_heads=heads(width))


def _from_hugging_face(tensors: Tensors) -> Tensors:
    """The same tensors under OpenAI's names; an unknown key stays as it is, to be refused."""
    renamed: Tensors = {}
    for key, tensor in tensors.items():
        if key.endswith(".position_ids"):  # older files: 0, 1, 2, ...
            continue
        if key in _TRANSPOSED and tensor.ndim == 2:
            renamed[_TRANSPOSED[key]] = tensor.T.contiguous()
            continue
        name = key
        for theirs, ours in _HUGGING_FACE.items():
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    for kind in ("weight", "bias"):
        for query in [key for key in renamed if key.endswith(f".attn.q_proj.{kind}")]:
            names = [query.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
            if all(name in renamed for name in names):
                parts = [renamed.pop(name) for name in names]
                renamed[query.replace(f".q_proj.{kind}", f".in_proj_{kind}")] = torch.cat(parts)
    return renamed
