"""insightface's face models: a photo -> its faces, with gender, 106 landmarks and ArcFace embedding.

Knows neither files outside the model pack nor the network. By onnxruntime alone, not by the insightface package, which would
download what is missing, needs OpenCV's libGL on every node, writes the environment when imported, and depends on the build of
onnxruntime without CUDA; the formulas are those of insightface 2.1 (MIT), and a test compares the two.

Legend: H height, W width, C=3 RGB, N candidates, D=512 width of an embedding. For a point (x, y) in arithmetic stands the
complex number x + iy; a similarity transform is then z -> turn * z + shift.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

ImageHWC = NDArray[np.uint8]
Blob = NDArray[np.float32]  # [1,3,height,width], what every model of the pack takes

# role -> file names, the first that exists is taken: antelopev2's, then buffalo_l's
PACK_FILES: dict[str, tuple[str, ...]] = {
    "detection": ("scrfd_10g_bnkps.onnx", "det_10g.onnx"),
    "landmarks": ("2d106det.onnx",),
    "gender": ("genderage.onnx",),
    "recognition": ("glintr100.onnx", "w600k_r50.onnx"),  # two spaces of embeddings that cannot be compared
}
DETECTION_SIZES = (640, 512, 384, 256)  # tried in this order: a face that fills the photo is found at a small size only
SCORE_THRESHOLD, OVERLAP_THRESHOLD = 0.5, 0.4  # det_thresh of prepare, nms_thresh of SCRFD; insightface 2.1
_STRIDES, _ANCHORS_PER_CELL = (8, 16, 32), 2  # SCRFD of 9 outputs, insightface 2.1 model_zoo/scrfd.py
_LANDMARK_SIZE, _GENDER_SIZE, ARCFACE_SIZE = 192, 96, 112  # sides of the models' inputs, pixels
_ARCFACE_POINTS = np.array(  # eyes, nose, corners of the mouth in the 112x112 crop, insightface 2.1 utils/face_align.py
    [38.2946 + 51.6963j, 73.5318 + 51.5014j, 56.0252 + 71.7366j, 41.5493 + 92.3655j, 70.7299 + 92.2041j]
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Face:
    """One face of a photo; positions are in pixels of the photo, and may lie outside of it."""

    box_xyxy: NDArray[np.float32]  # [4]
    score: float  # the detector's confidence, 0..1
    landmarks_106: NDArray[np.float32]  # [106,2], x and y
    is_male: bool
    embedding: NDArray[np.float32]  # [D], length 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Detection:
    """Where a face is; positions in pixels of the photo."""

    box_xyxy: NDArray[np.float32]  # [4]
    score: float
    points: NDArray[np.complex128]  # [5], eyes, nose, corners of the mouth


FoundT = TypeVar("FoundT", Face, Detection)
Analyse = Callable[[ImageHWC], tuple[Face, ...]]  # image_HWC 0..255 RGB -> its faces, best score first
Detect = Callable[[ImageHWC, int], tuple[Detection, ...]]  # (image_HWC, side of the detector's input in pixels)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recogniser:
    """The pack's detector and its ArcFace alone: what is asked of every frame of a video."""

    detect: Detect
    embed: Callable[[ImageHWC, Detection], NDArray[np.float32]]  # [D], length 1


def load_recogniser(pack: Path) -> Recogniser:
    """The two models by themselves, on the CPU. Raises ValueError if a file of the pack is missing."""
    files = pack_files(pack)
    detection, recognition = (_session(files[role], "cpu") for role in ("detection", "recognition"))
    return Recogniser(
        detect=lambda image_HWC, side: _detect(image_HWC, side, detection),
        embed=lambda image_HWC, found: _embed(image_HWC, found, recognition),
    )


def load_face_analysis(pack: Path, *, device: Literal["cpu", "cuda"] = "cpu") -> Analyse:
    """analyse(image_HWC) -> every face found at the first of DETECTION_SIZES that finds any, best score first.

    Raises ValueError if a file of the pack is missing, or if this onnxruntime cannot use the device.
    """
    sessions = {role: _session(path, device) for role, path in pack_files(pack).items()}

    def detect(image_HWC: ImageHWC, side: int) -> tuple[Detection, ...]:
        return _detect(image_HWC, side, sessions["detection"])

    def analyse(image_HWC: ImageHWC) -> tuple[Face, ...]:
        return tuple(_describe(image_HWC, one, sessions) for one in detect_at_first_size(detect, image_HWC))

    return analyse


def pack_folder(pack: Path) -> Path:
    """Where the pack's files are: in it, or, as the archive has it, in a folder inside called antelopev2 or like the pack."""
    nested = (Path(pack) / name for name in ("antelopev2", Path(pack).name))
    return next((folder for folder in nested if folder.is_dir()), Path(pack))


def pack_files(pack: Path) -> dict[str, Path]:
    """role -> file, for the roles of PACK_FILES.

    Raises ValueError, naming the first missing file and where it comes from, if the pack is not complete.
    """
    folder = pack_folder(pack)
    found = {
        role: present[0]
        for role, names in PACK_FILES.items()
        if (present := [folder / name for name in names if (folder / name).is_file()])
    }
    for role, names in PACK_FILES.items():
        if role not in found:
            raise ValueError(
                f"face model {folder / names[0]}{' or ' if names[1:] else ''}{' or '.join(names[1:])} ({role}) is missing; it "
                "comes in antelopev2.zip (or buffalo_l.zip) from github.com/deepinsight/insightface, model_zoo (the models are "
                f"for non-commercial research only): unpack it to {pack}"
            )
    return found


def largest(faces: Sequence[FoundT]) -> FoundT:
    """The face with the largest box; of equals the first. Raises ValueError if there is none."""
    return max(faces, key=lambda face: _area(face.box_xyxy))


def subject_of(faces: Sequence[Face]) -> Literal["A man", "A woman", "A person"]:
    """How a prompt calls the person with the largest face; "A person" if there is no face."""
    if not faces:
        return "A person"
    return "A man" if largest(faces).is_male else "A woman"


def similarity(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Cosine of the angle between two embeddings, -1..1."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return float(np.clip(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)), -1, 1))


# ---------------------------------------------------------------------------------------------------- detection


def detect_at_first_size(detect: Detect, image_HWC: ImageHWC) -> tuple[Detection, ...]:
    """What is detected at the first of DETECTION_SIZES that finds anything; () if none does."""
    return next(filter(None, (detect(image_HWC, side) for side in DETECTION_SIZES)), ())


def _detect(image_HWC: ImageHWC, side: int, session: InferenceSession) -> tuple[Detection, ...]:
    blob, scale = _detector_input(image_HWC, side)
    return best_of_overlapping(_detections(_run(session, blob), side=side, scale=scale))


def best_of_overlapping(detections: Sequence[Detection]) -> tuple[Detection, ...]:
    """Best score first, without those that overlap a better one by more than OVERLAP_THRESHOLD (non-maximum suppression)."""
    kept: list[Detection] = []
    for one in sorted(detections, key=lambda one: -one.score):
        if all(_overlap(one.box_xyxy, better.box_xyxy) <= OVERLAP_THRESHOLD for better in kept):
            kept.append(one)
    return tuple(kept)


def _overlap(a_xyxy: NDArray[np.float32], b_xyxy: NDArray[np.float32]) -> float:
    """Intersection over union; the pixels at both ends count, as in insightface's nms."""
    low, high = np.maximum(a_xyxy[:2], b_xyxy[:2]), np.minimum(a_xyxy[2:], b_xyxy[2:])
    shared = float(np.prod(np.maximum(high - low + 1, 0)))
    return shared / (_area(a_xyxy, end_pixel=1) + _area(b_xyxy, end_pixel=1) - shared)


def _area(box_xyxy: NDArray[np.float32], end_pixel: int = 0) -> float:
    return float(np.prod(box_xyxy[2:] - box_xyxy[:2] + end_pixel))


def _detector_input(image_HWC: ImageHWC, side: int) -> tuple[Blob, float]:
    """The photo in the upper left of a black square, as the detector takes it, and its scale; its shape is kept."""
    height, width = image_HWC.shape[:2]
    if height > width:
        new_height, new_width = side, max(1, int(side / (height / width)))
    else:
        new_height, new_width = max(1, int(side * (height / width))), side
    square_HWC = np.zeros((side, side, 3), np.float32)
    # pixels are squares, their centres are halves; nothing is averaged when shrinking: the models were trained so
    x_W = ((np.arange(new_width) + 0.5) * (width / new_width) - 0.5).clip(0, width - 1)
    y_H = ((np.arange(new_height) + 0.5) * (height / new_height) - 0.5).clip(0, height - 1)
    square_HWC[:new_height, :new_width] = _sample(image_HWC, *np.meshgrid(x_W, y_H))
    return _blob(square_HWC, mean=127.5, std=128.0), new_height / height


def _detections(outputs: Sequence[NDArray[np.float32]], *, side: int, scale: float) -> list[Detection]:
    """What SCRFD's 9 outputs say: for each stride scores, then for each boxes, then for each points, in units of the stride."""
    found = []
    for level, stride in enumerate(_STRIDES):
        scores_N = outputs[level].reshape(-1)
        sides_N4 = outputs[level + 3].reshape(-1, 4) * stride  # from the anchor to left, top, right, bottom
        offsets_N5 = (outputs[level + 6].reshape(-1, 5, 2) * stride) @ np.array([1, 1j])
        for index in np.flatnonzero(scores_N >= SCORE_THRESHOLD):
            row, column = divmod(int(index) // _ANCHORS_PER_CELL, side // stride)
            anchor = np.array([column, row, column, row], np.float32) * stride
            box_xyxy = (anchor + sides_N4[index] * np.array([-1, -1, 1, 1], np.float32)) / scale
            points = (complex(anchor[0], anchor[1]) + offsets_N5[index]) / scale
            found.append(Detection(box_xyxy=box_xyxy.astype(np.float32), score=float(scores_N[index]), points=points))
    return found


# ---------------------------------------------------------------------------------------------------- description


def _describe(image_HWC: ImageHWC, found: Detection, sessions: dict[str, InferenceSession]) -> Face:
    turn, shift = box_to_crop(found.box_xyxy, _LANDMARK_SIZE)
    crop_HWC = _crop(image_HWC, turn, shift, _LANDMARK_SIZE)
    output = _run(sessions["landmarks"], _blob(crop_HWC, mean=0.0, std=1.0))[0].reshape(-1, 2)
    in_crop = ((output + 1) * (_LANDMARK_SIZE // 2)) @ np.array([1, 1j])
    landmarks = (in_crop - shift) / turn

    crop_HWC = _crop(image_HWC, *box_to_crop(found.box_xyxy, _GENDER_SIZE), _GENDER_SIZE)
    female, male, _age = _run(sessions["gender"], _blob(crop_HWC, mean=0.0, std=1.0))[0].reshape(-1)

    return Face(
        box_xyxy=found.box_xyxy,
        score=found.score,
        landmarks_106=np.stack([landmarks.real, landmarks.imag], axis=1).astype(np.float32),
        is_male=bool(male > female),
        embedding=_embed(image_HWC, found, sessions["recognition"]),
    )


def _embed(image_HWC: ImageHWC, found: Detection, session: InferenceSession) -> NDArray[np.float32]:
    crop_HWC = aligned(image_HWC, found, ARCFACE_SIZE)
    embedding = _run(session, _blob(crop_HWC, mean=127.5, std=127.5))[0].reshape(-1)
    return (embedding / np.linalg.norm(embedding)).astype(np.float32)


def aligned(image_HWC: ImageHWC, found: Detection, size: int) -> NDArray[np.float32]:
    """[size,size,3], 0..255 in whole levels: the face, turned and scaled; insightface's norm_crop of a multiple of 112."""
    turn, shift = align(found.points)
    return _crop(image_HWC, turn * (size / ARCFACE_SIZE), shift * (size / ARCFACE_SIZE), size)


def box_to_crop(box_xyxy: NDArray[np.float32], size: int) -> tuple[complex, complex]:
    """(turn, shift) of the photo's points -> points of a crop of size x size, 1.5 times the box's longer side around it."""
    left, top, right, bottom = map(float, box_xyxy)
    turn = size / (1.5 * max(right - left, bottom - top))  # insightface 2.1 model_zoo/landmark.py
    return complex(turn), size / 2 * (1 + 1j) - turn * complex(left + right, top + bottom) / 2


def align(points: NDArray[np.complex128]) -> tuple[complex, complex]:
    """(turn, shift) that bring the 5 points nearest to _ARCFACE_POINTS, in the sum of squares.

    The least-squares similarity transform of Umeyama 1991 (doi 10.1109/34.88573): complex linear regression in two dimensions.
    """
    centred = points - points.mean()
    turn = np.vdot(centred, _ARCFACE_POINTS) / np.vdot(centred, centred).real
    return complex(turn), complex(_ARCFACE_POINTS.mean() - turn * points.mean())


def _crop(image_HWC: ImageHWC, turn: complex, shift: complex, size: int) -> NDArray[np.float32]:
    """[size,size,3], 0..255: the photo under z -> turn * z + shift; black where there is no photo."""
    x, y = np.meshgrid(np.arange(size), np.arange(size))
    source = (x + 1j * y - shift) / turn
    return _sample(image_HWC, source.real, source.imag)


def _sample(image_HWC: ImageHWC, x_HW: NDArray[np.float64], y_HW: NDArray[np.float64]) -> NDArray[np.float32]:
    """The photo between its pixels, bilinear, in whole levels 0..255; each neighbour outside of the photo counts as black."""
    height, width = image_HWC.shape[:2]
    left, top = np.floor(x_HW).astype(int), np.floor(y_HW).astype(int)
    total_HWC = np.zeros((*x_HW.shape, 3), np.float32)
    for row, column in ((top, left), (top, left + 1), (top + 1, left), (top + 1, left + 1)):
        weight_HW = (1 - np.abs(x_HW - column)) * (1 - np.abs(y_HW - row))
        weight_HW *= (row >= 0) & (row < height) & (column >= 0) & (column < width)
        pixels_HWC = image_HWC[row.clip(0, height - 1), column.clip(0, width - 1)]
        total_HWC += weight_HW.astype(np.float32)[..., None] * pixels_HWC
    return np.rint(total_HWC)


def _blob(image_HWC: NDArray[np.float32], *, mean: float, std: float) -> Blob:
    return np.ascontiguousarray(((image_HWC - np.float32(mean)) / np.float32(std)).transpose(2, 0, 1)[None])


# ---------------------------------------------------------------------------------------------------- onnxruntime


def _run(session: InferenceSession, blob: Blob) -> list[NDArray[np.float32]]:
    return session.run(None, {session.get_inputs()[0].name: blob})


def _session(path: Path, device: Literal["cpu", "cuda"]) -> InferenceSession:
    import onnxruntime

    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
    if provider not in onnxruntime.get_available_providers():
        known = ", ".join(onnxruntime.get_available_providers())
        raise ValueError(f"{device}: onnxruntime has no {provider}, only {known}; use cpu, or install onnxruntime-gpu")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors; below are warnings on every unused initializer
    # a number, because otherwise onnxruntime pins threads to cores that a SLURM job may not own, and some of its builds hang
    # (onnxruntime issues 8313, 10736); above 8 nothing is gained
    options.intra_op_num_threads = min(len(os.sched_getaffinity(0)), 8)
    session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    if session.get_providers()[0] != provider:  # it falls back to the CPU without an exception
        raise ValueError(f"{device}: onnxruntime could not load {provider}; use cpu, or install its CUDA libraries")
    return session
