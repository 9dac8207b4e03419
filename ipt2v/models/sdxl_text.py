"""SDXL's text embeddings, of prompts of any length. Legend: K chunks, L = 77K tokens, D width.

diffusers cuts a prompt at 77 tokens, and a long list of phrases would lose its closing "close-up". ComfyUI, whose graphs
HyperLoRA was released with, does not: each 75 tokens go through the encoders by themselves, between a start and an end token,
and what comes out is put one behind the other; the pooled embedding is the first chunk's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

CHUNK_TOKENS = 75  # CLIP's 77 without start and end


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptEmbeds:
    """What SDXL's text encoders make of a prompt and a negative prompt, as diffusers' SDXL pipelines take it."""

    prompt_embeds: torch.Tensor  # [1,L,2048]
    negative_prompt_embeds: torch.Tensor  # [1,L,2048]
    pooled_prompt_embeds: torch.Tensor  # [1,1280]
    negative_pooled_prompt_embeds: torch.Tensor  # [1,1280]


@torch.inference_mode()
def embed_prompt(pipeline: StableDiffusionXLPipeline, prompt: str, negative_prompt: str) -> PromptEmbeds:
    """The embeddings of both prompts, in as many chunks as the longer needs; of one chunk, bit for bit the pipeline's own."""
    tokenizers = (pipeline.tokenizer, pipeline.tokenizer_2)
    tokens = [[_tokens(tokenizer, text) for tokenizer in tokenizers] for text in (prompt, negative_prompt)]
    num_chunks = max(1, *(-(-len(ids) // CHUNK_TOKENS) for both in tokens for ids in both))
    positive, pooled = _embed(pipeline, tokens[0], num_chunks)
    negative, negative_pooled = _embed(pipeline, tokens[1], num_chunks)
    return PromptEmbeds(
        prompt_embeds=positive,
        negative_prompt_embeds=negative,
        pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=negative_pooled,
    )


def _embed(pipeline: StableDiffusionXLPipeline, tokens: list[list[int]], num_chunks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """([1,L,D] of both encoders side by side, [1,1280] pooled by the second)."""
    parts_1LD, pooled_KD = [], torch.empty(0)
    encoders = ((pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2))
    for ids, (tokenizer, encoder) in zip(tokens, encoders, strict=True):
        output = encoder(_chunks(tokenizer, ids, num_chunks).to(encoder.device), output_hidden_states=True)
        pooled_KD = output[0]  # the second encoder's text_embeds; the first's is not used
        # the last but one layer: SDXL's own default, ComfyUI's "stop at clip layer -2"
        parts_1LD.append(output.hidden_states[-2].flatten(0, 1)[None])
    return torch.cat(parts_1LD, dim=-1), pooled_KD[:1]


def _tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids


def _chunks(tokenizer: Any, ids: list[int], num_chunks: int) -> torch.Tensor:
    """[K,77]: start, at most 75 tokens, end, padding; an empty chunk is start, end, padding."""
    rows = []
    for start in range(0, num_chunks * CHUNK_TOKENS, CHUNK_TOKENS):
        row = [tokenizer.bos_token_id, *ids[start : start + CHUNK_TOKENS], tokenizer.eos_token_id]
        rows.append(row + [tokenizer.pad_token_id] * (CHUNK_TOKENS + 2 - len(row)))
    return torch.tensor(rows)
