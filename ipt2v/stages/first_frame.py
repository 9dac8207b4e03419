"""Array 1: portray the people, decouple the prompts, embed them for the video model, paint the first frames."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from ipt2v.config import RunConfig
from ipt2v.models.faces import Analyse, load_face_analysis, subject_of
from ipt2v.models.hrnet.cutout import Cut, keep_whole, load_cutter
from ipt2v.models.llm import Generate, follow, lead, load_generator
from ipt2v.models.umt5 import load_text_encoder
from ipt2v.models.zero3 import is_shared, ready_for_zero3
from ipt2v.parallel import Group, release
from ipt2v.records import Answer, Failure, FirstFrame, Item, ItemError, Made, TextEmbedding
from ipt2v.references import load_photos
from ipt2v.stages.decouple import Decoupled, decouple
from ipt2v.stages.painting import Photos, Picture, load_painting
from ipt2v.stages.portraits import Portrait, portray
from ipt2v.watch import beating

STAGE = "first_frame"

# (messages, how to answer them) -> answers; those that are known already are not asked again
Remember = Callable[[Sequence[str], Generate], list[Answer]]


def make(
    items: Sequence[Item],
    config: RunConfig,
    weights_dir: Path,
    group: Group,
    remember: Remember,
    takes: Mapping[str, int] = MappingProxyType({}),
) -> Iterator[Made[FirstFrame] | Failure]:
    """One first frame or failure for each item of this rank's share; `takes` has the take of those beyond their first.

    One model after the other, so that the largest alone sets the memory. The painter is slow and comes last, so that each
    painted item is a finished record; all others go over all items before it. Several ranks hold a part of the LLM each, and
    of the text encoder if set so, for GPUs that cannot hold it whole; they share the people among them for everything else.
    """
    mine, device = own_share(items, group), group.device
    photos, failures = read_photos(mine)
    yield from failures
    good = [item for item in mine if item.photos in photos]
    if not good:
        # other ranks may need this one's part of the LLM and of the text encoder
        split_prompts((), config, weights_dir, group, remember)
        embed((), config, weights_dir, group)
        return
    start = time.monotonic()
    analyse = load_face_analysis(weights_dir / config.faces.model)  # on the CPU: onnxruntime for CUDA is another package
    portraits = portray_all(photos, config, weights_dir, device, analyse)
    photos.clear()
    pairs = [(item.prompt, subject_of(portraits[item.photos].faces)) for item in good]
    decoupled = split_prompts(pairs, config, weights_dir, group, remember)
    texts = [config.video.negative_prompt, *(one.temporal for one in decoupled)]
    embeddings = embed(texts, config, weights_dir, group)
    paint = load_painting(portraits, config, weights_dir, device, analyse, takes)
    shared_seconds = (time.monotonic() - start) / len(good)

    for item, prompts in zip(good, decoupled, strict=True):
        start, portrait = time.monotonic(), portraits[item.photos]
        picture = paint(item, prompts.spatial)
        record = record_of(item, portrait, prompts, picture, (embeddings[prompts.temporal], embeddings[texts[0]]))
        record = replace(record, take=takes.get(item.key, 1))
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
    hyperlora = config.hyperlora if config.starts_from_first_frame else config.hyperlora.model_copy(update={"enabled": False})
    portraits = {key: portray(pixels, analyse, cut, hyperlora) for key, pixels in beating(photos.items())}
    del cut
    release(device)
    return portraits


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
    with ready_for_zero3(config.decouple, group):
        if group.is_first:
            with lead(generate, group) as ask:
                pairs, settings, spatial = list(chain(*everyones)), config.decouple, config.starts_from_first_frame
                known = decouple(pairs, settings, lambda messages: remember(messages, ask), spatial=spatial)
            answers = iter(known)
            decoupled = [list(islice(answers, len(one))) for one in everyones]
        else:
            follow(generate, group)
        loaded.clear()
        release(group.device)
    return group.from_first(decoupled)[group.rank]


def own_share(items: Sequence[Item], group: Group) -> list[Item]:
    """The items of this rank: all of a person's, of every world_size-th person."""
    people = {photos: index for index, photos in enumerate(dict.fromkeys(item.photos for item in items))}
    return [item for item in items if people[item.photos] % group.world_size == group.rank]


def embed(texts: Sequence[str], config: RunConfig, weights_dir: Path, group: Group) -> dict[str, TextEmbedding]:
    """Embedding of each distinct text; the text encoder is gone when it returns, and not loaded for nothing.

    To be called on every rank, each with texts of its own.
    """
    distinct, sharing = list(dict.fromkeys(texts)), config.text_encoder
    num_forwards = len(distinct)
    if is_shared(sharing, group.world_size):
        num_forwards = max(group.gather(num_forwards))
    if not num_forwards:
        return {}
    folder, num_ranks = weights_dir / config.video.model, group.world_size
    with ready_for_zero3(sharing, group):
        encode = load_text_encoder(folder, config.video, device=group.device, sharing=sharing, num_ranks=num_ranks)
        embeddings = {text: encode(text) for text in beating(distinct)}
        for _ in range(num_forwards - len(distinct)):
            encode("")  # ranks with more texts need this one's part of the weights
        del encode
        release(group.device)
    return embeddings
