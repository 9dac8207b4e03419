"""Which networks each score needs, and which files they load. Opens no file, imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from ipt2v.config import Metric, ScoreConfig, ScoreModelsConfig

VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"  # CLIP's merges, the same for both of its kin that read words
# role, which is a field of ScoreModelsConfig -> files below its folder, the network first; of a face pack the catalogue tells
SCORE_FILES: dict[str, tuple[str, ...]] = {
    "faces": (),
    "curricular": ("glint360k_curricular_face_r101_backbone.bin",),
    "inception": ("inception_v3_google-0cc3c7bd.pth",),
    "viclip": ("ViClip-InternVid-10M-FLT.pth", VOCABULARY),
    "clip_l": ("ViT-L-14.pt",),
    "clip_b": ("ViT-B-32.pt", VOCABULARY),
    "aesthetic": ("sa_0_4_vit_l_14_linear.pth",),
    "musiq": ("musiq_spaq_ckpt-358bb6af.pth",),
    "amt": ("amt-s.pth",),
    "raft": ("raft-things.pth",),
}
METRIC_ROLES: dict[Metric, tuple[str, ...]] = {
    "arc_sim": ("faces",),
    "face_rate": ("faces",),
    "oc": ("viclip",),
    "aq": ("clip_l", "aesthetic"),
    "iq": ("musiq",),
    "ms": ("amt",),
    "dd": ("raft",),
    "motion_pixels": ("raft",),
    "face_arc": ("faces",),
    "face_cur": ("faces", "curricular"),
    "face_distance": ("faces", "inception"),
    "clip_score": ("clip_b",),
    "first_frame_arc_sim": ("faces",),
    "drift": ("faces",),
    "motion_amplitude": (),
}


def roles_of(metrics: Iterable[Metric]) -> tuple[str, ...]:
    """The roles that the metrics need together, each once, in the order of ScoreModelsConfig."""
    needed = {role for metric in metrics for role in METRIC_ROLES[metric]}
    return tuple(role for role in ScoreModelsConfig.model_fields if role in needed)


def metrics_of(role: str) -> tuple[Metric, ...]:
    """The metrics that need a role."""
    return tuple(metric for metric, roles in METRIC_ROLES.items() if role in roles)


def folder_of(role: str, config: ScoreConfig) -> str:
    """Name of the weights folder that a role reads."""
    return str(config.models.model_dump()[role])


def file_of(role: str, weights_dir: Path, config: ScoreConfig) -> Path:
    """The file of a role's network; a face pack, which is a folder, has no such file."""
    return weights_dir / folder_of(role, config) / SCORE_FILES[role][0]


def vocabulary_of(role: str, weights_dir: Path, config: ScoreConfig) -> Path:
    """The file of merges beside a role's network that reads words."""
    assert VOCABULARY in SCORE_FILES[role], f"{role} reads no words"
    return weights_dir / folder_of(role, config) / VOCABULARY
