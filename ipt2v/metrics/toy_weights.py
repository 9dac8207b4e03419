"""Folders of tiny random checkpoints that scores read, in the published layouts. Must not know who loads them.

They are written as models/toy.py writes those of runs, by which they are marked, seeded and replaced.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from ipt2v.models.score_weights import SCORE_FILES, VOCABULARY
from ipt2v.models.toy import WRITERS, Writers, write_toy_folders


def write_all_toy_weights(root: Path, *, seed: int = 0) -> tuple[Path, ...]:
    """The folders that runs and their scores read. The same seed gives the same bytes; older toys are replaced.

    Raises FileExistsError, before anything is written, if a folder exists that is not marked as a toy.
    """
    return write_toy_folders(root, {**WRITERS, **SCORE_WRITERS}, seed=seed)


def write_toy_scores(root: Path, *, seed: int = 0) -> tuple[Path, ...]:
    """The folders that scores read, as write_all_toy_weights writes them."""
    return write_toy_folders(root, SCORE_WRITERS, seed=seed)


def _seed() -> int:
    """The next one, from the random state that the folder's name has seeded."""
    import torch

    return int(torch.randint(2**31, ()))


def _write_face_pack(folder: Path) -> None:
    from ipt2v.models.toy_faces import toy_face_pack

    sides = (640, 512, 384, 320, 256)  # 320: where ConsisID looks
    toy_face_pack(folder, seed=_seed(), seen_at=sides, detector="det_10g.onnx", recogniser="w600k_r50.onnx")


def _write_network(folder: Path, *, role: str) -> None:
    """The network of a role, and the merges if it reads words."""
    import torch

    from ipt2v.metrics import toy_motion, toy_quality

    tensors: dict[str, Callable[[int], object]] = {
        "curricular": toy_quality.toy_curricular,
        "inception": toy_quality.toy_inception,
        "viclip": toy_quality.toy_viclip,
        "clip_l": toy_quality.toy_clip,
        "clip_b": toy_quality.toy_clip,
        "aesthetic": toy_quality.toy_head,
        "musiq": toy_quality.toy_musiq,
        "amt": toy_motion.toy_amt,
        "raft": toy_motion.toy_raft,
    }
    network, *beside = SCORE_FILES[role]
    torch.save(tensors[role](_seed()), folder / network)
    if VOCABULARY in beside:
        (folder / VOCABULARY).write_bytes(toy_quality.toy_merges())


SCORE_WRITERS: Writers = {
    "buffalo_l": _write_face_pack,
    "CurricularFace": functools.partial(_write_network, role="curricular"),
    "Inception-v3": functools.partial(_write_network, role="inception"),
    "ViCLIP": functools.partial(_write_network, role="viclip"),
    "CLIP-ViT-L-14": functools.partial(_write_network, role="clip_l"),
    "CLIP-ViT-B-32": functools.partial(_write_network, role="clip_b"),
    "LAION-aesthetic": functools.partial(_write_network, role="aesthetic"),
    "MUSIQ-SPAQ": functools.partial(_write_network, role="musiq"),
    "AMT-S": functools.partial(_write_network, role="amt"),
    "RAFT-things": functools.partial(_write_network, role="raft"),
}
