"""Array 1: decouple the prompts, embed them for the video model, paint the first frames."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ipt2v.config import RunConfig
from ipt2v.models.face_detailer import boxes_of
from ipt2v.models.faces import Analyse, Face, largest, load_face_analysis, similarity, subject_of
from ipt2v.models.llm import load_generator
from ipt2v.models.sdxl import Painter, load_painter
from ipt2v.models.umt5 import load_text_encoder
from ipt2v.records import Answer, Attempt, Failure, FirstFrame, Item, ItemError, Made, TextEmbedding, item_seed
from ipt2v.references import load_reference
from ipt2v.stages.decouple import Decoupled, decouple

STAGE = "first_frame"
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
    analyse = load_face_analysis(weights_dir / config.faces.model)  # on the CPU: onnxruntime for CUDA is another package
    people = {path: analyse(image_HWC) for path, image_HWC in photos.items()}
    pairs = [(item.prompt, subject_of(people[item.reference])) for item in good]
    decoupled = split_prompts(pairs, config, weights_dir, device, remember)
    texts = [config.video.negative_prompt, *(one.temporal for one in decoupled)]
    embeddings = embed(texts, config, weights_dir, device)
    shared_seconds = (time.monotonic() - start) / len(good)

    painter = load_painter(weights_dir / config.first_frame.model, config.first_frame, device=device)
    for item, prompts, (_, subject) in zip(good, decoupled, pairs, strict=True):
        start = time.monotonic()
        picture = paint_best(item.key, prompts.spatial, people[item.reference], config, painter, analyse)
        record = FirstFrame(
            key=item.key,
            subject=subject,
            spatial_prompt=prompts.spatial,
            temporal_prompt=prompts.temporal,
            image_HWC=picture.image_HWC,
            similarity=picture.attempt.similarity,
            attempts=picture.attempts,
            notes=(() if people[item.reference] else (NO_FACE,)) + prompts.notes,
            temporal=embeddings[prompts.temporal],
            negative=embeddings[config.video.negative_prompt],
        )
        yield Made(record=record, seed=picture.attempt.seed, seconds=shared_seconds + time.monotonic() - start)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """The best of some attempts."""

    image_HWC: NDArray[np.uint8]
    attempt: Attempt  # that made it
    attempts: tuple[Attempt, ...]


def paint_best(key: str, prompt: str, people: Sequence[Face], config: RunConfig, painter: Painter, analyse: Analyse) -> Picture:
    """Of at most max_attempts paintings the one whose face is most like the reference's, the first above enough_similarity.

    Without a face in the reference there is nothing to choose by: the first painting is kept.
    """
    settings = config.first_frame
    best: Picture | None = None
    attempts: list[Attempt] = []
    for number in range(settings.max_attempts):
        seed = item_seed(config.seed, key, f"paint {number}")
        image_HWC = painter.paint(prompt, seed)
        if settings.face_detailer.enabled:
            boxes = boxes_of(analyse(image_HWC), settings.face_detailer)
            image_HWC = painter.redraw(image_HWC, boxes, prompt, item_seed(config.seed, key, f"redraw {number}"))
        attempts.append(Attempt(seed=seed, similarity=likeness(people, analyse(image_HWC) if people else ())))
        if best is None or _rank(attempts[-1]) > _rank(best.attempt):
            best = Picture(image_HWC=image_HWC, attempt=attempts[-1], attempts=())
        if not people or _rank(best.attempt) > settings.enough_similarity:
            break
    assert best is not None
    return replace(best, attempts=tuple(attempts))


def likeness(people: Sequence[Face], painted: Sequence[Face]) -> float | None:
    """ArcFace cosine between the largest faces of the reference and of a painting; None where one has no face."""
    if not people or not painted:
        return None
    return similarity(largest(people).embedding, largest(painted).embedding)


def _rank(attempt: Attempt) -> float:
    return -2.0 if attempt.similarity is None else attempt.similarity  # a painting with a face before one without


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
