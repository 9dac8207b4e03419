"""HyperLoRA's networks, under the parameter names of the published files. Knows no files and no UNet.

Legend: N photos, E ArcFace embedding, P CLIP patches + 1, W width of CLIP, K identity tokens, X their width,
Q queries, D dim of the resampler, C coefficients, I in, O out, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")
TOKENS_PER_MODULE = 2 * len(PROJECTIONS)  # one for lora_down and one for lora_up of each projection
ALPHA_PER_RANK = 0.5  # HyperLoRA's LoRAs have alpha = rank / 2

Factors = tuple[Tensor, Tensor]  # A_RI = lora_down.weight, B_OR = lora_up.weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """What the shapes of the published tensors say; in brackets the published values."""

    embedding: int  # 512, of ArcFace
    id_tokens: int  # 16
    id_width: int  # 1024
    clip_width: int  # 1024, of CLIP ViT-L/14
    dim: int  # 1024
    inner: int  # 768 = 12 heads of 64
    feed_forward: int  # 4096
    depth: int  # 4
    queries: int  # 1120 = 8 x 140 attentions of SDXL
    coefficients: int  # 128
    head_dim: int = 64  # the one size that no shape tells


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityLoRA:
    """One person as low-rank changes of the UNet's attention projections: dW = weight * scale * B @ A."""

    factors: dict[str, Factors]  # path of the Linear in the UNet -> A, B
    scale: float = ALPHA_PER_RANK


def id_projector(sizes: Sizes) -> nn.Sequential:
    """Embeddings [N,E] -> identity tokens [N,K,X]."""
    return nn.Sequential(
        nn.Linear(sizes.embedding, sizes.id_tokens * sizes.id_width),
        nn.Unflatten(-1, (sizes.id_tokens, sizes.id_width)),
        nn.LayerNorm(sizes.id_width),
    )


class ResamplerLayer(nn.Module):
    """Latents that look at themselves, at the identity tokens and at the CLIP tokens."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.norm_attn1, self.norm_attn2_l, self.norm_attn2_x = (nn.LayerNorm(sizes.dim) for _ in range(3))
        self.norm_attn3_l, self.norm_attn3_y, self.norm_ff = (nn.LayerNorm(sizes.dim) for _ in range(3))
        self.attn1, self.attn2, self.attn3 = (_attention(sizes) for _ in range(3))
        self.ff = FeedForward(sizes.dim, inner_dim=sizes.feed_forward, activation_fn="gelu")

    def forward(self, latents_NQD: Tensor, id_NKD: Tensor, clip_NPD: Tensor) -> Tensor:
        latents_NQD = latents_NQD + self.attn1(self.norm_attn1(latents_NQD))
        latents_NQD = latents_NQD + self.attn2(self.norm_attn2_l(latents_NQD), self.norm_attn2_x(id_NKD))
        latents_NQD = latents_NQD + self.attn3(self.norm_attn3_l(latents_NQD), self.norm_attn3_y(clip_NPD))
        return latents_NQD + self.ff(self.norm_ff(latents_NQD))


def _attention(sizes: Sizes) -> Attention:
    heads = sizes.inner // sizes.head_dim
    return Attention(sizes.dim, heads=heads, dim_head=sizes.head_dim, bias=False, out_bias=False)


class Resampler(nn.Module):
    """A perceiver: identity tokens and CLIP tokens of each photo -> the coefficients of the bases."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(1, sizes.queries, sizes.dim))
        self.proj_in = nn.Linear(sizes.id_width, sizes.dim)
        self.proj_in_2 = nn.Linear(sizes.clip_width, sizes.dim)
        self.proj_out = nn.Linear(sizes.dim, sizes.coefficients)
        self.layers = nn.ModuleList(ResamplerLayer(sizes) for _ in range(sizes.depth))

    def forward(self, id_NKX: Tensor, clip_NPW: Tensor) -> Tensor:
        id_NKD, clip_NPD = self.proj_in(id_NKX), self.proj_in_2(clip_NPW)
        latents_NQD = self.latents.expand(len(id_NKX), -1, -1)
        for layer in self.layers:
            latents_NQD = layer(latents_NQD, id_NKD, clip_NPD)
        return self.proj_out(latents_NQD)


def average(coefficients_NQC: Tensor) -> Tensor:
    """One person's coefficients [Q,C], each of length 1: the photos' mean first, its length second."""
    mean_QC = coefficients_NQC.mean(0)
    return mean_QC * torch.rsqrt(mean_QC.square().sum(-1, keepdim=True) + 1e-8)


def basis_shapes(sizes: Sizes, rank: int, in_out: Sequence[tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    """Key -> shape of every basis, given the (in, out) of the UNet's projections, PROJECTIONS of the first module first."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index, (num_in, num_out) in enumerate(in_out):
        down, up = basis_keys(index)
        shapes[down] = (sizes.coefficients, num_in, rank)
        shapes[up] = (sizes.coefficients, rank, num_out)
    return shapes


def basis_keys(index: int) -> tuple[str, str]:
    """Keys of the down and the up basis of the index-th projection."""
    prefix = f"{index // len(PROJECTIONS)}.{PROJECTIONS[index % len(PROJECTIONS)]}"
    return f"{prefix}.id_down_basis", f"{prefix}.id_up_basis"


def mix(read: Callable[[str], Tensor], people_PQC: Sequence[Tensor], paths: Sequence[str]) -> list[IdentityLoRA]:
    """Each person's LoRA: a factor is the sum of its bases, weighted by one query's coefficients.

    `read` gives a basis by its key: it is called once a key, however many people, and what it gives is dropped before the
    next call. A person's LoRA does not depend on the others.
    """
    loras: list[dict[str, Factors]] = [{} for _ in people_PQC]
    # one room for the float32 copies of all bases: fresh ones would lie between the factors, which stay, and so leave
    # the heap in pieces (1 GB of them at full size)
    room = people_PQC[0].new_empty(0)
    for index, path in enumerate(paths):
        pairs: list[list[Tensor]] = [[] for _ in people_PQC]
        for query, key in zip((2 * index, 2 * index + 1), basis_keys(index), strict=True):
            bases = read(key)
            room = room if room.numel() >= bases.numel() else room.new_empty(bases.numel())
            copied = room[: bases.numel()].view(len(bases), -1).copy_(bases.flatten(1))
            for pair, coefficients_QC in zip(pairs, people_PQC, strict=True):
                # a vector times a matrix, person by person: all at once would round by how many they are
                pair.append((coefficients_QC[query] @ copied).view(bases.shape[1:]).T.contiguous())
            del bases
        for lora, (down_RI, up_OR) in zip(loras, pairs, strict=True):
            lora[path] = (down_RI, up_OR)
    return [IdentityLoRA(factors=factors) for factors in loras]
