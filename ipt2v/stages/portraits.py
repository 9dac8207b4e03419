"""Photos of a person -> who that is, the cut-out, and what HyperLoRA makes of the face. Knows no prompts and no painter.

Legend: H height, W width, C=3 RGB, N photos, Q queries, C coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ipt2v.config import HyperLoRAConfig
from ipt2v.models.face_conditioning import arcface_crop, clip_crop
from ipt2v.models.faces import Analyse, Face, largest
from ipt2v.models.hrnet.cutout import Cut
from ipt2v.models.hyperlora.load import HyperLoRA

ImageHWC = NDArray[np.uint8]

NO_FACE = "reference photo: no face is found in it"
NO_PERSON = "reference photo: no person is found in it, it is not cut out"
NO_LOOK = "HyperLoRA: no photo shows a face, the first frame is painted from the prompt alone"
NO_FACE_IN_CUTOUT = "cut-out: no face is found in it, HyperLoRA reads the photo as it was"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Look:
    """One photo's face as HyperLoRA sees it."""

    crop_HWC: ImageHWC  # for CLIP
    embedding: NDArray[np.float32]  # ArcFace's, [512] of length 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Portrait:
    """The person of some photos. The largest face of the first is meant wherever a photo shows several."""

    faces: tuple[Face, ...]  # of the first photo
    cutout_HWC: ImageHWC  # the first photo on white
    looks: tuple[Look, ...]  # of all photos with a face
    notes: tuple[str, ...]


def portray(photos: Sequence[ImageHWC], analyse: Analyse, cut: Cut, settings: HyperLoRAConfig) -> Portrait:
    """What the first frames need to know of a person's photos, the first of which is the reference."""
    faces, cutouts = analyse(photos[0]), [cut(photo_HWC) for photo_HWC in photos]
    looks, notes = [], [] if faces else [NO_FACE]
    if not cutouts[0].found:
        notes.append(NO_PERSON)
    for photo_HWC, cutout in zip(photos, cutouts, strict=True) if settings.enabled else ():
        look = look_at(cutout.image_HWC, analyse, settings)
        if look is None and (look := look_at(photo_HWC, analyse, settings)) is not None:
            notes.append(NO_FACE_IN_CUTOUT)
        looks += [] if look is None else [look]
    if settings.enabled and not looks:
        notes.append(NO_LOOK)
    return Portrait(faces=faces, cutout_HWC=cutouts[0].image_HWC, looks=tuple(looks), notes=tuple(dict.fromkeys(notes)))


def look_at(image_HWC: ImageHWC, analyse: Analyse, settings: HyperLoRAConfig) -> Look | None:
    """The face of a picture as HyperLoRA was trained to see it; None if there is none."""
    faces = analyse(image_HWC)
    if not faces:
        return None
    # not the one with the best score, as HyperLoRA's own code: the largest names the subject, and is what paintings are
    # compared with, so it must be the one that is painted
    face = largest(faces)
    crop_HWC = clip_crop(image_HWC, face.landmarks_106, remove_background=settings.remove_background)
    # found anew in a crop, as in training: its five points come out a little different at that scale
    again = analyse(arcface_crop(image_HWC, face.landmarks_106))
    return Look(crop_HWC=crop_HWC, embedding=(largest(again) if again else face).embedding)


def coefficients_of(looks: Sequence[Look], hyperlora: HyperLoRA) -> torch.Tensor:
    """HyperLoRA's coefficients [Q,C] of one person, averaged over the photos; float32, on the CPU."""
    pixels_NCHW = hyperlora.preprocess([look.crop_HWC for look in looks])
    embeddings_NE = torch.from_numpy(np.stack([look.embedding for look in looks]))
    return hyperlora.look(pixels_NCHW, embeddings_NE).cpu()
