"""A portrait and a spatial prompt -> a first frame: the best of some attempts of SDXL with the person's LoRA.

Knows neither temporal prompts nor records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from ipt2v.config import RunConfig
from ipt2v.models.face_detailer import boxes_of
from ipt2v.models.faces import Analyse, Face, largest, similarity
from ipt2v.models.hyperlora.load import load_hyperlora
from ipt2v.models.hyperlora.network import IdentityLoRA
from ipt2v.models.sdxl import Painter, load_painter, unet_on_meta
from ipt2v.parallel import release
from ipt2v.records import Attempt, Item, Photo, item_seed, take_seed
from ipt2v.stages.portraits import Portrait, coefficients_of

PEOPLE_AT_ONCE = 32  # 1.5 GB of LoRAs

Photos = tuple[Photo, ...]  # of one person, the reference first
Identity = Callable[[Photos], IdentityLoRA | None]  # None: the person's face is not known
Paint = Callable[[Item, str], "Picture"]  # (item, spatial prompt)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """The best of some attempts."""

    image_HWC: NDArray[np.uint8] | None  # None: nothing was to be painted
    attempt: Attempt  # that made it
    attempts: tuple[Attempt, ...]


def load_painting(
    portraits: Mapping[Photos, Portrait],
    config: RunConfig,
    weights_dir: Path,
    device: torch.device,
    analyse: Analyse,
    takes: Mapping[str, int],
) -> Paint:
    """paint(item, spatial prompt) -> the picture that the item's video starts from; of reference-to-video there is none."""

    def seeded(key: str) -> RunConfig:
        return config.model_copy(update={"seed": take_seed(config.seed, key, takes.get(key, 1))})

    if not config.starts_from_first_frame:
        return lambda item, prompt: Picture(
            image_HWC=None,
            attempt=Attempt(seed=item_seed(seeded(item.key).seed, item.key, "paint 0"), similarity=None),
            attempts=(),
        )
    identity = load_identities(portraits, config, weights_dir, device)
    painter = load_painter(weights_dir / config.first_frame.model, config.first_frame, device=device)
    become = becoming(painter, identity, config)

    def paint(item: Item, prompt: str) -> Picture:
        prompt = become(item.photos) + prompt
        return paint_best(item.key, prompt, portraits[item.photos].faces, seeded(item.key), painter, analyse)

    return paint


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
    release(device)
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
