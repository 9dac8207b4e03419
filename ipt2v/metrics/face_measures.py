"""The scores of a video's faces, with their networks: each face is found once, whatever is asked of it.

Legend: T frames, H W pixels, C=3 RGB, S side of a crop.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ipt2v.config import Metric, ScoreConfig
from ipt2v.metrics.curricular import embed_faces, load_curricular
from ipt2v.metrics.delivered import Delivered, Values
from ipt2v.metrics.identity import (
    NO_FACE,
    NO_REFERENCE,
    Embedding,
    consisid_distance,
    consisid_frames,
    consisid_similarity,
    cosine,
    identity,
)
from ipt2v.metrics.inception import inception_features, load_inception
from ipt2v.metrics.undefined import Undefined
from ipt2v.models.faces import Detection, ImageHWC, Recogniser, aligned, detect_at_first_size, largest, load_recogniser
from ipt2v.models.score_weights import file_of

_OURS: frozenset[Metric] = frozenset({"arc_sim", "face_rate", "drift", "first_frame_arc_sim"})
_CONSISID: frozenset[Metric] = frozenset({"face_arc", "face_cur", "face_distance"})
FACE_METRICS = _OURS | _CONSISID
# ConsisID's eval (Apache-2.0): det_size, the grey border of a second try, the crop that CurricularFace's and Inception's input
# are made of
_CONSISID_SIDE, _CONSISID_BORDER, _CONSISID_GREY, _CONSISID_CROP = 320, 0.25, 128, 224


@dataclass(frozen=True, slots=True, kw_only=True)
class FaceMeasures:
    """Every score of faces, by the networks that were loaded."""

    recogniser: Recogniser
    curricular: Callable[[torch.Tensor], torch.Tensor] | None  # [B,112,112,3] uint8 -> embeddings [B,D]
    inception: Callable[[torch.Tensor], torch.Tensor] | None  # [B,S,S,3] uint8 -> features [B,D]

    def __call__(self, video: Delivered, wanted: Collection[Metric]) -> Values:
        """The wanted scores of one video."""
        values: Values = {}
        if not _OURS.isdisjoint(wanted):
            values |= self._ours(video, wanted)
        if not _CONSISID.isdisjoint(wanted):
            values |= self._consisid(video, wanted)
        return {metric: values[metric] for metric in wanted}

    def _ours(self, video: Delivered, wanted: Collection[Metric]) -> Values:
        reference = self._arcface(video.reference_HWC)
        values: Values = {"first_frame_arc_sim": self._first_frame(reference, video.first_frame_HWC)}
        if set(wanted) - set(values):
            found = identity(reference, [self._arcface(frame_HWC) for frame_HWC in video.frames_THWC.numpy()])
            values |= {"arc_sim": found.arc_sim, "face_rate": found.face_rate, "drift": found.drift}
        return values

    def _arcface(self, image_HWC: ImageHWC) -> Embedding | None:
        """Of the largest face, searched for as array 1 does in photos."""
        found = detect_at_first_size(self.recogniser.detect, image_HWC)
        return self.recogniser.embed(image_HWC, largest(found)) if found else None

    def _first_frame(self, reference_D: Embedding | None, image_HWC: ImageHWC | None) -> float | Undefined:
        if image_HWC is None:
            return Undefined(reason="the video does not start from a painted first frame")
        if reference_D is None:
            return Undefined(reason=NO_REFERENCE)
        painted_D = self._arcface(image_HWC)
        return Undefined(reason=NO_FACE) if painted_D is None else cosine(reference_D, painted_D)

    def _consisid(self, video: Delivered, wanted: Collection[Metric]) -> Values:
        """Face-Arc, Face-Cur and the distance that is called FID, of the same 16 faces."""
        reference = self._consisid_face(video.reference_HWC)
        frames = video.frames_THWC.numpy()
        face_of = cache(lambda index: self._consisid_face(frames[index]))  # a short video's frames are asked for twice
        values: Values = {}
        if "face_arc" in wanted:
            arc_of = partial(_of, self._arc_of)
            values["face_arc"] = consisid_similarity(arc_of(reference), len(frames), lambda index: arc_of(face_of(index)))
        if "face_cur" in wanted:
            cur_of = partial(_of, self._cur_of)
            values["face_cur"] = consisid_similarity(cur_of(reference), len(frames), lambda index: cur_of(face_of(index)))
        if "face_distance" in wanted:
            of_frames = [_of(self._inception_of, face_of(index)) for index in consisid_frames(len(frames))]
            features = _of(self._inception_of, reference)
            missing = Undefined(reason=NO_REFERENCE)
            values["face_distance"] = missing if features is None else consisid_distance(features, of_frames)
        return values

    def _consisid_face(self, image_HWC: ImageHWC) -> Face | None:
        for image in (image_HWC, bordered(image_HWC)):
            if found := self.recogniser.detect(image, _CONSISID_SIDE):
                return Face(image_HWC=image, found=largest(found))
        return None

    def _arc_of(self, face: Face) -> Embedding:
        return self.recogniser.embed(face.image_HWC, face.found)

    def _cur_of(self, face: Face) -> Embedding:
        assert self.curricular is not None
        crop_HWC = torch.from_numpy(face.crop())
        # half the size by an enlarger that looks at the nearest two pixels: their mean, as cv2.resize gives it
        halves = crop_HWC.float().unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).mean((1, 3))
        return self.curricular((halves + 0.5).floor().to(torch.uint8)[None])[0].cpu().numpy()

    def _inception_of(self, face: Face) -> NDArray[np.float32]:
        assert self.inception is not None
        return self.inception(torch.from_numpy(face.crop())[None])[0].cpu().numpy()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Face:
    """A face in the picture in which it was found."""

    image_HWC: ImageHWC
    found: Detection

    def crop(self) -> ImageHWC:
        """[S,S,3] uint8, eyes and mouth where ConsisID's networks expect them."""
        return aligned(self.image_HWC, self.found, _CONSISID_CROP).astype(np.uint8)


def _of(embed: Callable[[Face], Embedding], face: Face | None) -> Embedding | None:
    return None if face is None else embed(face)


def bordered(image_HWC: ImageHWC) -> ImageHWC:
    """With a grey border of a quarter of its sides all around: a face that fills the picture is found so."""
    height, width = (int(side * _CONSISID_BORDER) for side in image_HWC.shape[:2])
    return np.pad(image_HWC, ((height, height), (width, width), (0, 0)), constant_values=_CONSISID_GREY)


def load_faces(config: ScoreConfig, weights_dir: Path, device: torch.device) -> FaceMeasures:
    """The networks that the run's metrics need. Raises ValueError, naming the file, if one does not load."""
    recogniser = load_recogniser(weights_dir / config.models.faces)  # on the CPU, as in array 1

    def on_device(network: nn.Module, apply: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
        network = network.to(device)
        return lambda faces_BHWC: apply(network, faces_BHWC.to(device))

    curricular = inception = None
    if "face_cur" in config.metrics:
        curricular = on_device(load_curricular(file_of("curricular", weights_dir, config)), embed_faces)
    if "face_distance" in config.metrics:
        inception = on_device(load_inception(file_of("inception", weights_dir, config)), inception_features)
    return FaceMeasures(recogniser=recogniser, curricular=curricular, inception=inception)
