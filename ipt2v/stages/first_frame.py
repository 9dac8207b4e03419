"""Array 1: portray the people, decouple the prompts, embed them for the video model, paint the first frames."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ipt2v.config import RunConfig
from ipt2v.models.face_detailer import boxes_of
from ipt2v.models.faces import Analyse, Face, largest, load_face_analysis, similarity, subject_of
from ipt2v.models.hrnet.cutout import Cut, keep_whole, load_cutter
from ipt2v.models.hyperlora.load import load_hyperlora
from ipt2v.models.hyperlora.network import IdentityLoRA
from ipt2v.models.llm import Generate, follow, lead, load_generator
from ipt2v.models.sdxl import Painter, load_painter, unet_on_meta
from ipt2v.models.umt5 import load_text_encoder
from ipt2v.parallel import Group
from ipt2v.records import Answer, Attempt, Failure, FirstFrame, Item, ItemError, Made, Photo, TextEmbedding, item_seed
from ipt2v.references import load_photos
from ipt2v.stages.decouple import Decoupled, decouple
from ipt2v.stages.portraits import Portrait, coefficients_of, portray

STAGE = "first_frame"
PEOPLE_AT_ONCE = 32  # 1.5 GB of LoRAs

# (messages, how to answer them) -> answers; those that are known already are not asked again
Remember = Callable[[Sequence[str], Generate], list[Answer]]
Photos = tuple[Photo, ...]  # of one person, the reference first
Identity = Callable[[Photos], IdentityLoRA | None]  # None: the person's face is not known


def make(
    items: Sequence[Item], config: RunConfig, weights_dir: Path, group: Group, remember: Remember
) -> Iterator[Made[FirstFrame] | Failure]:
    """One first frame or failure for each item of this rank's share.

    One model after the other, so that the largest alone sets the memory. The painter is slow and comes last, so that each
    painted item is a finished record; all others go over all items before it. Several ranks hold a slice of the LLM each, for
    GPUs that cannot hold it whole, and share the people among them for everything else.
    """
    mine, device = own_share(items, group), group.device
    photos, failures = read_photos(mine)
    yield from failures
    good = [item for item in mine if item.photos in photos]
    if not good:
        split_prompts((), config, weights_dir, group, remember)  # other ranks may need this one's slice of the LLM
        return
    start = time.monotonic()
    analyse = load_face_analysis(weights_dir / config.faces.model)  # on the CPU: onnxruntime for CUDA is another package
    portraits = portray_all(photos, config, weights_dir, device, analyse)
    photos.clear()
    pairs = [(item.prompt, subject_of(portraits[item.photos].faces)) for item in good]
    decoupled = split_prompts(pairs, config, weights_dir, group, remember)
    texts = [config.video.negative_prompt, *(one.temporal for one in decoupled)]
    embeddings = embed(texts, config, weights_dir, device)
    identity = load_identities(portraits, config, weights_dir, device)
    shared_seconds = (time.monotonic() - start) / len(good)

    painter = load_painter(weights_dir / config.first_frame.model, config.first_frame, device=device)
    become = becoming(painter, identity, config)
    for item, prompts in zip(good, decoupled, strict=True):
        start, portrait = time.monotonic(), portraits[item.photos]
        prompt = become(item.photos) + prompts.spatial
        picture = paint_best(item.key, prompt, portrait.faces, config, painter, analyse)
        record = record_of(item, portrait, prompts, picture, (embeddings[prompts.temporal], embeddings[texts[0]]))
        yield Made(record=record, seed=picture.attempt.seed, seconds=shared_seconds + time.monotonic() - start)


def record_of(
    item: Item, portrait: Portrait, prompts: Decoupled, picture: Picture, texts: tuple[TextEmbedding, TextEmbedding]
) -> FirstFrame:
    """All that is known of an item at the end of array 1; `texts` are the temporal and the negative prompt."""
    return FirstFrame(
        key=item.key,
        subject=subject_of(portrait.faces),
        spatial_prompt=prompts.spatial,
        temporal_prompt=prompts.temporal,
        image_HWC=picture.image_HWC,
        reference_HWC=portrait.cutout_HWC,
        similarity=picture.attempt.similarity,
        attempts=picture.attempts,
        notes=portrait.notes + prompts.notes,
        temporal=texts[0],
        negative=texts[1],
    )


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


def read_photos(items: Sequence[Item]) -> tuple[dict[Photos, tuple[NDArray[np.uint8], ...]], list[Failure]]:
    """Photos -> their pixels, each [H,W,3] uint8 RGB, where all decode; a failure for each item where one does not."""
    pixels: dict[Photos, tuple[NDArray[np.uint8], ...]] = {}
    failures = []
    for item in items:
        try:
            if item.photos not in pixels:
                pixels[item.photos] = load_photos(item)
        except ItemError as error:
            failures.append(Failure(key=item.key, stage=STAGE, reason=str(error)))
    return pixels, failures


def portray_all(
    photos: Mapping[Photos, Sequence[NDArray[np.uint8]]],
    config: RunConfig,
    weights_dir: Path,
    device: torch.device,
    analyse: Analyse,
) -> dict[Photos, Portrait]:
    """The portrait of each person; HRNet is gone when it returns."""
    settings = config.cutout
    cut: Cut = keep_whole
    if settings.enabled:
        cut = load_cutter(
            weights_dir / settings.model / settings.file,
            device=device,
            align_corners=settings.align_corners,
            feather_pixels=settings.feather_pixels,
            largest_component=settings.largest_component,
            input_size=settings.input_size,
        )
    portraits = {key: portray(pixels, analyse, cut, config.hyperlora) for key, pixels in photos.items()}
    del cut
    _free(device)
    return portraits


def load_identities(
    portraits: Mapping[Photos, Portrait], config: RunConfig, weights_dir: Path, device: torch.device
) -> Identity:
    """identity(photos) -> the person's LoRA; HyperLoRA's networks have made the coefficients and are gone when it returns.

    The LoRAs of PEOPLE_AT_ONCE are mixed together when the first is asked for: the bases, 3 GB, are read once for all of them.
    """
    settings = config.hyperlora
    known = {photos: portrait.looks for photos, portrait in portraits.items() if portrait.looks}
    if not settings.enabled or not known:
        return lambda photos: None
    unet = unet_on_meta(weights_dir / config.first_frame.model)
    hyperlora = load_hyperlora(weights_dir / settings.model, unet, variant=settings.variant, device=device)
    coefficients = {photos: coefficients_of(looks, hyperlora) for photos, looks in known.items()}
    mix = hyperlora.mix
    del hyperlora
    _free(device)
    order, ready = list(coefficients), dict[Photos, IdentityLoRA]()

    def identity(photos: Photos) -> IdentityLoRA | None:
        if photos in coefficients and photos not in ready:
            start = order.index(photos)
            people = order[start : start + PEOPLE_AT_ONCE]
            ready.clear()
            ready.update(zip(people, mix([coefficients[one] for one in people]), strict=True))
        return ready.get(photos)

    return identity


def becoming(painter: Painter, identity: Identity, config: RunConfig) -> Callable[[Photos], str]:
    """become(photos): from now on the painter paints this person. What it gives belongs in front of the spatial prompts."""

    @lru_cache(maxsize=1)  # a person's items follow each other: one LoRA for all of them
    def become(photos: Photos) -> str:
        lora = identity(photos)
        if lora is None:
            painter.slots.clear()
            return ""
        painter.slots.set_identity(lora, config.hyperlora.weight)
        return config.hyperlora.trigger_words

    return become


def split_prompts(
    pairs: Sequence[tuple[str, str]], config: RunConfig, weights_dir: Path, group: Group, remember: Remember
) -> list[Decoupled]:
    """Spatial and temporal prompt of each (prompt, subject). The LLM is loaded if there is something to ask, and gone then.

    To be called on every rank, each with pairs of its own: rank 0 asks for all.
    """
    loaded: list[Generate] = []
    everyones = group.gather(list(pairs))

    def generate(messages: Sequence[str]) -> list[Answer]:
        if not loaded:
            folder, num_ranks = weights_dir / config.decouple.model, group.world_size
            loaded.append(
                load_generator(folder, config.decouple, base_seed=config.seed, device=group.device, num_ranks=num_ranks)
            )
        return loaded[0](messages)

    decoupled: list[list[Decoupled]] = []
    if group.is_first:
        with lead(generate, group) as ask:
            known = decouple(list(chain(*everyones)), config.decouple, lambda messages: remember(messages, ask))
        answers = iter(known)
        decoupled = [list(islice(answers, len(one))) for one in everyones]
    else:
        follow(generate, group)
    loaded.clear()
    _free(group.device)
    return group.from_first(decoupled)[group.rank]


def own_share(items: Sequence[Item], group: Group) -> list[Item]:
    """The items of this rank: all of a person's, of every world_size-th person."""
    people = {photos: index for index, photos in enumerate(dict.fromkeys(item.photos for item in items))}
    return [item for item in items if people[item.photos] % group.world_size == group.rank]


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
