"""Array 1: decouple the prompts, embed them for the video model, paint the first frames."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ipt2v.config import RunConfig
from ipt2v.models.llm import Decoupled, load_decoupler
from ipt2v.models.sdxl import load_painter
from ipt2v.models.umt5 import load_text_encoder
from ipt2v.records import Failure, FirstFrame, Item, ItemError, Made, TextEmbedding, item_seed
from ipt2v.references import load_reference

STAGE = "first_frame"
UNKNOWN_SUBJECT = "A person"


def make(
    items: Sequence[Item], config: RunConfig, weights_dir: Path, device: torch.device
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
    decoupled = decouple(good, config, weights_dir, device)
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
            temporal=embeddings[prompts.temporal],
            negative=embeddings[config.video.negative_prompt],
        )
        yield Made(record=record, seed=seed, seconds=shared_seconds + time.monotonic() - start)


def decouple(items: Sequence[Item], config: RunConfig, weights_dir: Path, device: torch.device) -> list[Decoupled]:
    """Spatial and temporal prompt of each item; the LLM is gone when it returns."""
    ask = load_decoupler(weights_dir / config.decouple.model, config.decouple, base_seed=config.seed, device=device)
    answers = ask([(item.prompt, UNKNOWN_SUBJECT) for item in items])
    del ask
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
