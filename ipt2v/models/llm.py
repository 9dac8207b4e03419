"""The LLM: messages -> answers. Knows no prompts of a test set, and no files but its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
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
from ipt2v.models.tensor_parallel import check_slices, own_slice
from ipt2v.models.zero3 import is_shared, load_zero3
from ipt2v.parallel import Group
from ipt2v.records import Answer, item_seed
from ipt2v.watch import beat

Generate = Callable[[Sequence[str]], list[Answer]]


def load_generator(
    folder: Path, settings: DecoupleConfig, *, base_seed: int, device: torch.device, num_ranks: int = 1
) -> Generate:
    """generate(user messages) -> the model's answers, thinking off; each sampled from a seed of its own message.

    With several ranks each holds a part of the model, for GPUs that cannot hold it whole. All of them load it, and then call
    generate with the same messages in the same order (`lead`, `follow`); all get the same answers. These are one rank's if
    weights_sharding is zero3 (load and ask in `ready_for_zero3`). Of slices they may differ in half precision, as sums are
    rounded slice by slice. Raises ValueError if the model cannot be cut so, or DeepSpeed is not installed.
    """
    tokenizer, model = _load(folder, settings, device, num_ranks)
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
        if num_ranks > 1:
            sampling.append(_ChoiceOfRank0())
        output = model.generate(**inputs, logits_processor=sampling)
        tokens = output[:, inputs["input_ids"].shape[1] :]
        finished = torch.isin(tokens, end_tokens).any(dim=1).tolist()
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [Answer(text=text, finished=done) for text, done in zip(texts, finished, strict=True)]

    def generate(messages: Sequence[str]) -> list[Answer]:
        size = settings.batch_size
        return [answer for i in range(0, len(messages), size) for answer in generate_batch(messages[i : i + size])]

    return generate


def _load(folder: Path, settings: DecoupleConfig, device: torch.device, num_ranks: int) -> tuple[Any, Any]:
    """(tokenizer, model on `device`, or this rank's part of it)."""
    shared, dtype = is_shared(settings, num_ranks), getattr(torch, settings.dtype)
    if num_ranks > 1 and not shared:
        check_slices(folder, num_ranks)  # before minutes of loading
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    if shared:
        model = load_zero3(load, dtype, device, cpu_offload=settings.cpu_offload)
    else:
        model = load().to(device) if num_ranks == 1 else own_slice(load(), device)
    # In place of the checkpoint's own generation_config.json (Qwen3: temperature 0.6, top_k 20), which so has no say.
    model.generation_config = GenerationConfig(
        do_sample=False,  # the sampling is done by seeded_sampling, below
        max_new_tokens=settings.max_new_tokens,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer, model


@contextmanager
def lead(generate: Generate, group: Group) -> Iterator[Generate]:
    """`generate` for rank 0, which alone knows what is to be asked; each batch is asked on all ranks of the group.

    The others are in `follow` with their own `generate`, until this context ends. They wait for one batch after another as
    long as a collective may take (watch.collective_timeout).
    """
    followers_listen = True

    def ask(messages: Sequence[str]) -> list[Answer]:
        nonlocal followers_listen
        if not messages:
            return []
        beat()
        group.from_first(list(messages))
        followers_listen = False
        answers = generate(messages)
        followers_listen = True
        return answers

    try:
        yield ask
    finally:
        # After a failure inside of generate they are inside of it too: they would not hear it, and sending could hang us.
        if followers_listen:
            group.from_first(list[str]())


def follow(generate: Generate, group: Group) -> None:
    """Answer, on another rank than 0, whatever rank 0's `lead` asks, until there is nothing more."""
    while messages := group.from_first(list[str]()):
        beat()
        generate(messages)


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


class _ChoiceOfRank0(LogitsProcessor):
    """Leaves each rank the token that rank 0 would choose: one that chose another would fall out of step, and all would hang.

    Their scores should be equal, as sums over all ranks, or as results of equal weights; but that is a promise of no backend.
    """

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        choice_B1 = scores.argmax(dim=-1, keepdim=True)
        dist.broadcast(choice_B1, src=0)
        return torch.full_like(scores, -torch.inf).scatter(1, choice_B1, 0.0)  # type: ignore[return-value]
