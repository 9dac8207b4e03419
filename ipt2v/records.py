"""The values that travel between stages: frozen, typed, stdlib + numpy.

Knows nothing of files, torch or schedulers. Shape legend: T frames, H height, W width, C=3 RGB, L tokens, D width of a text
embedding; latents are [C,T,H,W] of the video VAE.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

RecordT = TypeVar("RecordT")


class ItemError(Exception):
    """This item cannot be made, its neighbours can. The text is the reason that the failure record keeps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Photo:
    """One photo of a person."""

    path: str  # absolute
    sha256: str  # of its bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One pair to make: a reference photo and a prompt. The person may have further photos."""

    identity: str
    prompt_id: str
    prompt: str
    reference: str  # absolute path of the photo
    reference_sha256: str  # of the photo's bytes, so that a run knows when somebody has changed it
    more_photos: tuple[Photo, ...] = ()  # of the same person; HyperLoRA averages over all

    @property
    def key(self) -> str:
        return f"{self.identity}/{self.prompt_id}"

    @property
    def photos(self) -> tuple[Photo, ...]:
        """All photos of the person; the first is the reference."""
        return Photo(path=self.reference, sha256=self.reference_sha256), *self.more_photos


def item_seed(base_seed: int, key: str, purpose: str) -> int:
    """Seed of one random draw, 0..2**63-1: from what is drawn, never from rank, order, shard or time.

    `purpose` ("paint", "video", ...) keeps the draws of one item independent of each other.
    """
    digest = hashlib.sha256(f"{base_seed}\0{purpose}\0{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch.Generator.manual_seed takes a signed 64-bit number


def take_seed(base_seed: int, key: str, take: int) -> int:
    """The base seed of an item's take: the run's own for take 1, and for each that follows a rejected one another."""
    return base_seed if take == 1 else item_seed(base_seed, key, f"take {take}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the LLM said."""

    text: str
    finished: bool  # False: it was cut off at max_new_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEmbedding:
    """The video model's view of one text, without padding."""

    text: str
    embedding_LD: NDArray[np.float32] | NDArray[np.uint16]  # uint16 holds the bits of bfloat16

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One painting of a first frame."""

    seed: int
    similarity: float | None  # ArcFace cosine to the reference, -1..1; None if a face to compare is missing


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstFrame:
    """What array 1 gives to array 2 for one item."""

    key: str
    subject: str  # "A man", "A woman" or "A person"
    spatial_prompt: str  # empty where nothing is painted
    temporal_prompt: str
    image_HWC: NDArray[np.uint8] | None  # 0..255 RGB; None where the video starts from the reference alone
    reference_HWC: NDArray[np.uint8]  # 0..255 RGB, the person cut out on white: what reference-to-video starts from
    similarity: float | None  # of the attempt that was kept
    attempts: tuple[Attempt, ...]  # paintings made to choose from, in their order
    notes: tuple[str, ...]  # what fell back to something else on the way, and why
    temporal: TextEmbedding
    negative: TextEmbedding
    take: int = 1  # above 1: as many videos of the item but one were rejected before


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoLatents:
    """The committed record of a video: what its frames were, or can again be, decoded from."""

    key: str
    latents_CTHW: NDArray[np.float32]  # as the transformer left them, before the VAE's mean and standard deviation


@dataclass(frozen=True, slots=True, kw_only=True)
class Video:
    """One finished video. Not `Clip`: CLIP is a metric here."""

    key: str
    frames_THWC: NDArray[np.uint8]  # 0..255 RGB
    fps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One metric of one delivered video."""

    key: str
    metric: str
    value: float | None
    reason: str | None  # why there is no value
    seconds: float  # wall time; of metrics that are computed together, a share
    device: str
    created: str  # UTC, ISO 8601
    video_sha256: str  # of the MP4 that was measured
    scorer: str  # digest of what measured: metric, weights, version of the formula


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """An item that a stage could not make, and why."""

    key: str
    stage: str
    reason: str


def reason_kind(reason: str, key: str) -> str:
    """What failures of one kind have in common: the reason without the item's name, numbers, and what is quoted."""
    for word in (key, key.partition("/")[0]):
        reason = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", "ITEM", reason)
    return re.sub(r"0x[0-9a-fA-F]+|\d+(?:\.\d+)?", "N", re.sub(r"'[^']*'|\"[^\"]*\"|\S*/\S+", "X", reason))


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """How a record came to be; saved beside it."""

    run_digest: str
    code_version: str
    weights: dict[str, str]  # folder name -> fingerprint of its files
    packages: dict[str, str]  # name -> version of what computes
    seed: int
    seconds: float  # wall time spent on this record
    device: str
    num_ranks: int
    created: str  # UTC, ISO 8601


@dataclass(frozen=True, slots=True, kw_only=True)
class Made(Generic[RecordT]):
    """A record as a stage yields it, with what its provenance cannot know otherwise."""

    record: RecordT
    seed: int
    seconds: float
