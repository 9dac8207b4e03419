"""Array 1: decouple the prompts, embed them for the video model, paint the first frames."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ipt2v.config import RunConfig
from ipt2v.models.llm import load_generator
from ipt2v.models.sdxl import load_painter
from ipt2v.models.umt5 import load_text_encoder
from ipt2v.records import Answer, Failure, FirstFrame, Item, ItemError, Made, TextEmbedding, item_seed
from ipt2v.references import load_reference
from ipt2v.stages.decouple import Decoupled, decouple

STAGE = "first_frame"
UNKNOWN_SUBJECT = "A person"


# (messages, how to answer them) -> answers; those that are known already are not asked again
Remember = Callable[[Sequence[str], Callable[[Sequence[str]], list[Answer]]], list[Answer]]


def make(
    items: Sequence[Item], config: RunConfig, weights_dir: Path, device: torch.device, remember: Remember
) -> Iterator[Made[FirstFrame] | Failure]:
    """One first frame or failure for each item.

    One model after the other, so that the largest alone sets the memory: the LLM and the text encoder are fast and go over all
    items first; the painter is slow and comes last, so that each painted item is a finished record.
    """
    good = []
    for item in items:
        try:
            load_reference(item)
        except ItemError as error:
            yield Failure(key=item.key, stage=STAGE, reason=str(error))
        else:
            good.append(item)
    if not good:
        return
    start = time.monotonic()
    decoupled = split_prompts(good, config, weights_dir, device, remember)
    texts = [config.video.negative_prompt, *(one.temporal for one in decoupled)]
    embeddings = embed(texts, config, weights_dir, device)
    shared_seconds = (time.monotonic() - start) / len(good)

    paint = load_painter(weights_dir / config.first_frame.model, config.first_frame, device=device)
    for item, prompts in zip(good, decoupled, strict=True):
        start, seed = time.monotonic(), item_seed(config.seed, item.key, "paint")
        record = FirstFrame(
            key=item.key,
            subject=UNKNOWN_SUBJECT,
            spatial_prompt=prompts.spatial,
            temporal_prompt=prompts.temporal,
            image_HWC=paint(prompts.spatial, seed),
            similarity=None,
            attempts=1,
            notes=prompts.notes,
            temporal=embeddings[prompts.temporal],
            negative=embeddings[config.video.negative_prompt],
        )
        yield Made(record=record, seed=seed, seconds=shared_seconds + time.monotonic() - start)


def split_prompts(
    items: Sequence[Item], config: RunConfig, weights_dir: Path, device: torch.device, remember: Remember
) -> list[Decoupled]:
    """Spatial and temporal prompt of each item. The LLM is loaded when something is to be asked, and gone on return."""
    loaded: list[Callable[[Sequence[str]], list[Answer]]] = []

    def generate(messages: Sequence[str]) -> list[Answer]:
        if not loaded:
            folder = weights_dir / config.decouple.model
            loaded.append(load_generator(folder, config.decouple, base_seed=config.seed, device=device))
        return loaded[0](messages)

    pairs = [(item.prompt, UNKNOWN_SUBJECT) for item in items]
    answers = decouple(pairs, config.decouple, lambda messages: remember(messages, generate))
    loaded.clear()
    _free(device)
    return answers


def embed(texts: Sequence[str], config: RunConfig, weights_dir: Path, device: torch.device) -> dict[str, TextEmbedding]:
    """Embedding of each distinct text; the text encoder is gone when it returns."""
    encode = load_text_encoder(weights_dir / config.video.model, config.video, device=device)
    embeddings = {text: encode(text) for text in dict.fromkeys(texts)}
    del encode
    _free(device)
    return embeddings


def _free(device: torch.device) -> None:
    gc.collect()  # closures and modules refer to each other in circles
    if device.type == "cuda":
        torch.cuda.empty_cache()
