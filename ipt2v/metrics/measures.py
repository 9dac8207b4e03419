"""Every metric by its name: which networks it needs, what it is of, and how it is computed. Knows no run and no stage."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from ipt2v.config import Metric, ScoreConfig
from ipt2v.metrics.aesthetic import load_head
from ipt2v.metrics.amplitude import motion_amplitude
from ipt2v.metrics.amt import load_amt
from ipt2v.metrics.clip import load_clip
from ipt2v.metrics.clip_score import clip_score
from ipt2v.metrics.clip_tokens import load_vocabulary, token_ids
from ipt2v.metrics.delivered import Delivered, Values
from ipt2v.metrics.face_measures import FACE_METRICS, load_faces
from ipt2v.metrics.motion import DynamicDegree, dynamic_degree, motion_smoothness
from ipt2v.metrics.musiq import load_musiq
from ipt2v.metrics.quality import aesthetic_quality, imaging_quality, overall_consistency
from ipt2v.metrics.raft import load_raft
from ipt2v.metrics.viclip import load_viclip
from ipt2v.models.score_weights import file_of, vocabulary_of
from ipt2v.watch import beat

Measure = Callable[[Delivered, Collection[Metric]], Values]  # the wanted ones of its family, of one video
VICLIP_TOKENS, CLIP_TOKENS = 32, 77


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Metrics that are computed together, and what loads their networks onto a device."""

    metrics: frozenset[Metric]
    load: Callable[[ScoreConfig, Path, torch.device], Measure]


def _alive(network: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same, with a sign of life for each batch: on a CPU the flow of one video takes longer than a stall may."""

    def call(*images: torch.Tensor) -> torch.Tensor:
        beat()
        return network(*images)

    return call


def _texts(
    encode: Callable[[torch.Tensor], torch.Tensor], vocabulary_path: Path, *, context: int, device: torch.device
) -> Callable[[str], torch.Tensor]:
    """text(prompt) -> features [1,D]; each distinct prompt is encoded once."""
    vocabulary = load_vocabulary(vocabulary_path)

    @cache
    def text_1D(prompt: str) -> torch.Tensor:
        with torch.inference_mode():
            return encode(torch.tensor([token_ids(prompt, vocabulary, context=context)], device=device))

    return text_1D


def _amplitude(config: ScoreConfig, weights_dir: Path, device: torch.device) -> Measure:
    return lambda video, wanted: {"motion_amplitude": motion_amplitude(video.frames_THWC.numpy())}


def _consistency(config: ScoreConfig, weights_dir: Path, device: torch.device) -> Measure:
    network = load_viclip(file_of("viclip", weights_dir, config)).to(device)
    text_1D = _texts(network.encode_text, vocabulary_of("viclip", weights_dir, config), context=VICLIP_TOKENS, device=device)
    size = network.vision_encoder.image_size

    def measure(video: Delivered, wanted: Collection[Metric]) -> Values:
        embed = network.encode_video
        return {"oc": overall_consistency(video.frames_THWC, text_1D(video.prompt), embed, device=device, size=size)}

    return measure


def _likeness_to_text(config: ScoreConfig, weights_dir: Path, device: torch.device) -> Measure:
    network = load_clip(file_of("clip_b", weights_dir, config)).to(device)
    text_1D = _texts(network.encode_text, vocabulary_of("clip_b", weights_dir, config), context=CLIP_TOKENS, device=device)

    def measure(video: Delivered, wanted: Collection[Metric]) -> Values:
        return {"clip_score": clip_score(video.frames_THWC, text_1D(video.prompt), network.encode_image, device=device)}

    return measure


def _beauty(config: ScoreConfig, weights_dir: Path, device: torch.device) -> Measure:
    network = load_clip(file_of("clip_l", weights_dir, config)).to(device)
    head = load_head(file_of("aesthetic", weights_dir, config)).to(device)
    score = partial(aesthetic_quality, embed_images=_alive(network.encode_image), head=head, device=device)
    return lambda video, wanted: {"aq": score(video.frames_THWC, batch_size=config.batch_size)}


def _imaging(config: ScoreConfig, weights_dir: Path, device: torch.device) -> Measure:
    network = _alive(load_musiq(file_of("musiq", weights_dir, config)).to(device))
    return lambda video, wanted: {
        "iq": imaging_quality(video.frames_THWC, network, device=device, batch_size=config.batch_size)
    }


def _smoothness(config: ScoreConfig, weights_dir: Path, device: torch.device) -> Measure:
    network = _alive(load_amt(file_of("amt", weights_dir, config), device=device))
    return lambda video, wanted: {
        "ms": motion_smoothness(video.frames_THWC, network, device=device, batch_size=config.batch_size)
    }


def _motion(config: ScoreConfig, weights_dir: Path, device: torch.device) -> Measure:
    network = _alive(load_raft(file_of("raft", weights_dir, config), device=device))

    def measure(video: Delivered, wanted: Collection[Metric]) -> Values:
        found = dynamic_degree(video.frames_THWC, video.fps, network, device=device, batch_size=config.batch_size)
        if not isinstance(found, DynamicDegree):
            return {"dd": found, "motion_pixels": found}
        return {"dd": float(found.dynamic), "motion_pixels": found.motion_pixels}

    return measure


# what takes longest comes last: an element that is interrupted has more whole scores so
FAMILIES = (
    Family(metrics=frozenset({"motion_amplitude"}), load=_amplitude),
    Family(metrics=frozenset({"oc"}), load=_consistency),
    Family(metrics=frozenset({"clip_score"}), load=_likeness_to_text),
    Family(metrics=FACE_METRICS, load=load_faces),
    Family(metrics=frozenset({"aq"}), load=_beauty),
    Family(metrics=frozenset({"iq"}), load=_imaging),
    Family(metrics=frozenset({"ms"}), load=_smoothness),
    Family(metrics=frozenset({"dd", "motion_pixels"}), load=_motion),
)
