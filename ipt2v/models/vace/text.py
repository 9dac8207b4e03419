"""What follows from a video's text alone, computed once and kept: its embedding, and the keys and values of each block.

A rank of a split computes them whole, however few tokens of the video it has: with 8 ranks they are a hundredth of its work.
"""

from __future__ import annotations

import weakref
from collections import deque

import torch
from diffusers import WanVACETransformer3DModel
from torch import nn

TEXTS = 2  # of a video: the prompt and the negative prompt


def keep_text(transformer: WanVACETransformer3DModel) -> None:
    """From here on a text is known by the tensor that it comes in, which must not be changed in place. Equal bit for bit."""
    _remember(transformer.condition_embedder.text_embedder)
    for block in (*transformer.blocks, *transformer.vace_blocks):
        _remember(block.attn2.to_k)
        _remember(block.attn2.to_v)


def _remember(module: nn.Module) -> None:
    """Let a module return what it has returned for the same tensor, one of the last TEXTS."""
    forward = module.forward
    known: deque[tuple[weakref.ref[torch.Tensor], torch.Tensor]] = deque(maxlen=TEXTS)

    def once(text_BLD: torch.Tensor) -> torch.Tensor:
        for text, result in known:
            if text() is text_BLD:
                return result
        result = forward(text_BLD)
        known.append((weakref.ref(text_BLD), result))
        return result

    module.forward = once
