"""The LLM: messages -> answers. Knows no prompts of a test set, and no files but its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from ipt2v.config import DecoupleConfig
from ipt2v.records import Answer, item_seed


def load_generator(
    folder: Path, settings: DecoupleConfig, *, base_seed: int, device: torch.device
) -> Callable[[Sequence[str]], list[Answer]]:
    """generate(user messages) -> the model's answers, thinking off; each sampled from a seed of its own message."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, settings.dtype)).eval().to(device)
    # In place of the checkpoint's own generation_config.json (Qwen3: temperature 0.6, top_k 20), which so has no say.
    model.generation_config = GenerationConfig(
        do_sample=False,  # the sampling is done by seeded_sampling, below
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    end_tokens = torch.tensor(model.generation_config.eos_token_id, device=device)  # one, or a list

    @torch.inference_mode()
    def generate_batch(messages: Sequence[str]) -> list[Answer]:
        # Qwen3 adds the empty think block only when the generation prompt is added (transformers #37949)
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
            for message in messages
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
        seeds = [item_seed(base_seed, message, "decouple") for message in messages]
        sampling = seeded_sampling(settings.temperature, settings.top_p, seeds)
        output = model.generate(**inputs, logits_processor=sampling)
        tokens = output[:, inputs["input_ids"].shape[1] :]
        finished = torch.isin(tokens, end_tokens).any(dim=1).tolist()
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [Answer(text=text, finished=done) for text, done in zip(texts, finished, strict=True)]

    def generate(messages: Sequence[str]) -> list[Answer]:
        size = settings.batch_size
        return [answer for i in range(0, len(messages), size) for answer in generate_batch(messages[i : i + size])]

    return generate


def seeded_sampling(temperature: float, top_p: float, seeds: Sequence[int]) -> LogitsProcessorList:
    """Logits processors after which the greedy choice is a sample at `temperature` and `top_p`, one seed for each row.

    Gumbel-max: argmax(logits + Gumbel noise) is distributed as softmax(logits). transformers' own sampling draws from torch's
    global generator, so an answer would depend on what was asked before it and beside it. Temperature 0 is greedy.
    """
    if temperature == 0:
        return LogitsProcessorList()
    return LogitsProcessorList([TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p), _GumbelNoise(seeds)])


class _GumbelNoise(LogitsProcessor):
    """transformers wants its class: a bare function cannot stand in a LogitsProcessorList's type."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU, so the device does not matter

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        noise = torch.stack([torch.empty(scores.shape[1]).exponential_(generator=one).log_().neg_() for one in self.generators])
        return scores.float() + noise.to(scores.device)  # type: ignore[return-value]
