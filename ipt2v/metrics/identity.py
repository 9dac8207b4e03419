"""How much the person of a video looks like the one of the reference photo, from face embeddings. Knows no network.

Legend: N frames, D width of an embedding. An embedding is of the frame's largest face, and None where there is no face.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ipt2v.metrics.undefined import Undefined

CONSISID_FRAMES = 16
NO_FACE = "no face in any frame"
NO_REFERENCE = "no face in the reference photo"

Embedding = NDArray[np.float32]  # [D]


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """The likeness of a video. The paper leaves detector, sampling and frames without a face open; this is our reading."""

    arc_sim: float | Undefined  # mean cosine over the frames with a face, -1..1
    face_rate: float  # share of all frames with a face, 0..1: a video may be like the photo in the one frame that shows a face
    drift: float | Undefined  # mean cosine of the last third minus that of the first: below 0, the person is lost on the way


def identity(reference_D: Embedding | None, frames: Sequence[Embedding | None]) -> Identity:
    """Likeness of the frames, in their order. A video without a face has none, rather than 0. Raises ValueError if empty."""
    if not frames:
        raise ValueError("found a video of 0 frames, expected at least one")
    face_rate = sum(one is not None for one in frames) / len(frames)
    if reference_D is None:
        return Identity(arc_sim=Undefined(reason=NO_REFERENCE), face_rate=face_rate, drift=Undefined(reason=NO_REFERENCE))
    cosines = [None if one is None else cosine(reference_D, one) for one in frames]
    third = len(frames) // 3
    first, last = _mean(cosines[:third]), _mean(cosines[len(frames) - third :])
    both = isinstance(first, float) and isinstance(last, float)
    return Identity(
        arc_sim=_mean(cosines),
        face_rate=face_rate,
        drift=last - first if both else Undefined(reason="no face in the first or the last third"),  # type: ignore[operator]
    )


def consisid_similarity(
    reference_D: Embedding | None, num_frames: int, embed: Callable[[int], Embedding | None]
) -> float | Undefined:
    """ConsisID's FaceSim, which the challenge's Face-Arc and Face-Cur are: 16 frames, cosines below 0 count as 0.

    Frames without a face are left out, and 0.0 is the value of a video without any, as in their code. `embed` is asked for the
    frames by number. Differs from `identity`, so it has a name of its own.
    """
    if reference_D is None:
        return Undefined(reason=NO_REFERENCE)
    embeddings = [embed(index) for index in consisid_frames(num_frames)]
    cosines = [max(0.0, cosine(reference_D, one)) for one in embeddings if one is not None]
    return float(np.mean(cosines)) if cosines else 0.0


def consisid_distance(reference_D: NDArray[np.float32], faces: Sequence[NDArray[np.float32] | None]) -> float | Undefined:
    """What ConsisID calls FID: squared distance of two Inception features, averaged over the frames with a face.

    One face against one face: of the Fréchet distance nothing is left but the distance of the means. Around 150 to 250.
    """
    distances = [float(np.sum((reference_D.astype(np.float64) - one) ** 2)) for one in faces if one is not None]
    return float(np.mean(distances)) if distances else Undefined(reason=NO_FACE)


def consisid_frames(num_frames: int) -> list[int]:
    """Numbers of the frames that ConsisID looks at: 16, evenly from the first to the last; some twice in a short video."""
    return [int(index) for index in np.linspace(0, num_frames - 1, CONSISID_FRAMES)]


def cosine(one_D: Embedding, other_D: Embedding) -> float:
    """-1..1, in float64. Raises ValueError for an embedding of length 0: no network gives one for a face."""
    one, other = one_D.astype(np.float64), other_D.astype(np.float64)
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    if not lengths:
        raise ValueError("found an embedding of zeros, expected one with a direction; the recogniser's file may be damaged")
    return float(one @ other) / lengths


def _mean(cosines: Sequence[float | None]) -> float | Undefined:
    known = [one for one in cosines if one is not None]
    return float(np.mean(known)) if known else Undefined(reason=NO_FACE)
