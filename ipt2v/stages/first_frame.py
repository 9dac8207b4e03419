"""Array 1: decouple the prompts, embed them for the video model, paint the first frames."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ipt2v.config import RunConfig
from ipt2v.models.faces import load_face_analysis, subject_of
from ipt2v.models.llm import load_generator
from ipt2v.models.sdxl import load_painter
from ipt2v.models.umt5 import load_text_encoder
from ipt2v.records import Answer, Failure, FirstFrame, Item, ItemError, Made, TextEmbedding, item_seed
from ipt2v.references import load_reference
from ipt2v.stages.decouple import Decoupled, decouple

STAGE = "first_frame"
UNKNOWN_SUBJECT = subject_of(())
NO_FACE = "reference photo: no face is found in it"


# (messages, how to answer them) -> answers; those that are known already are not asked again
Remember = Callable[[Sequence[str], Callable[[Sequence[str]], list[Answer]]], list[Answer]]


def make(
    items: Sequence[Item], config: RunConfig, weights_dir: Path, device: torch.device, remember: Remember
) -> Iterator[Made[FirstFrame] | Failure]:
    """One first frame or failure for each item.

    One model after the other, so that the largest alone sets the memory: the LLM and the text encoder are fast and go over all
    items first; the painter is slow and comes last, so that each painted item is a finished record.
    """
    photos, failures = read_photos(items)
    yield from failures
    good = [item for item in items if item.reference in photos]
    if not good:
        return
    start = time.monotonic()
    subjects = find_subjects(photos, weights_dir / config.faces.model)
    pairs = [(item.prompt, subjects[item.reference]) for item in good]
    decoupled = split_prompts(pairs, config, weights_dir, device, remember)
    texts = [config.video.negative_prompt, *(one.temporal for one in decoupled)]
    embeddings = embed(texts, config, weights_dir, device)
    shared_seconds = (time.monotonic() - start) / len(good)

    paint = load_painter(weights_dir / config.first_frame.model, config.first_frame, device=device)
    for item, prompts in zip(good, decoupled, strict=True):
        start, seed = time.monotonic(), item_seed(config.seed, item.key, "paint")
        record = FirstFrame(
            key=item.key,
            subject=subjects[item.reference],
            spatial_prompt=prompts.spatial,
            temporal_prompt=prompts.temporal,
            image_HWC=paint(prompts.spatial, seed),
            similarity=None,
            attempts=1,
            notes=((NO_FACE,) if subjects[item.reference] == UNKNOWN_SUBJECT else ()) + prompts.notes,
            temporal=embeddings[prompts.temporal],
            negative=embeddings[config.video.negative_prompt],
        )
        yield Made(record=record, seed=seed, seconds=shared_seconds + time.monotonic() - start)


def read_photos(items: Sequence[Item]) -> tuple[dict[str, NDArray[np.uint8]], list[Failure]]:
    """Path -> photo, [H,W,3] uint8 RGB, of those that decode; a failure for each item whose photo does not."""
    photos: dict[str, NDArray[np.uint8]] = {}
    failures = []
    for item in items:
        try:
            if item.reference not in photos:
                photos[item.reference] = load_reference(item)
        except ItemError as error:
            failures.append(Failure(key=item.key, stage=STAGE, reason=str(error)))
    return photos, failures


def find_subjects(photos: Mapping[str, NDArray[np.uint8]], pack: Path) -> dict[str, str]:
    """Path of each photo -> "A man", "A woman" or, where no face is found, "A person"."""
    analyse = load_face_analysis(pack)  # on the CPU: about a second a photo, and onnxruntime for CUDA is another package
    return {path: subject_of(analyse(image_HWC)) for path, image_HWC in photos.items()}


def split_prompts(
    pairs: Sequence[tuple[str, str]], config: RunConfig, weights_dir: Path, device: torch.device, remember: Remember
) -> list[Decoupled]:
    """Spatial and temporal prompt of each (prompt, subject). The LLM is loaded if there is something to ask, and gone then."""
    loaded: list[Callable[[Sequence[str]], list[Answer]]] = []

    def generate(messages: Sequence[str]) -> list[Answer]:
        if not loaded:
            folder = weights_dir / config.decouple.model
            loaded.append(load_generator(folder, config.decouple, base_seed=config.seed, device=device))
        return loaded[0](messages)

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
