"""A photo and a face's 106 landmarks -> the two crops that HyperLoRA looks at, for CLIP and for ArcFace.

Pure functions of arrays; knows neither torch nor detectors. Legend: H height, W width, C=3 RGB; landmarks [106,2] are
(x, y) in pixels, in the order of insightface's 2d106det.

The numbers below are those of HyperLoRA's own preprocessing: with others its networks see faces of an unfamiliar scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

NUM_LANDMARKS = 106
# once around the face: the jaw from ear to ear by way of the chin (0), then the upper line of the brows back
JAW = (1, *range(9, 17), *range(2, 9), 0, *range(24, 17, -1), *range(32, 24, -1), 17)
BROWS = (101, 105, 104, 103, 102, 50, 51, 49, 48, 43)
OUTLINE = JAW + BROWS

FACE_SCALE = 0.8  # half side of the square around the outline, per its longer side
CLIP_SCALE = 0.75  # half side of CLIP's square, per the longer side of all landmarks
CLIP_RISE = 0.125  # how far that square is moved up, per its half side: there are no landmarks on the forehead
ARCFACE_SCALE = 2.0  # half side of ArcFace's square, per that of CLIP's: the face is detected once more in it
MASK_SIZE, MASK_BLUR = 512, 15  # the outline's edge is softened at this size, so alike for faces of any size
GRAY = (0x7F, 0x7F, 0x7F)


@dataclass(frozen=True, slots=True, kw_only=True)
class Square:
    """A square of pixels that may reach beyond the image."""

    x: float  # of the centre
    y: float
    half: float  # half a side

    @property
    def crop_box(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom, each rounded as PIL's crop rounds (halves to even)."""
        edges = (self.x - self.half, self.y - self.half, self.x + self.half, self.y + self.half)
        left, top, right, bottom = map(round, edges)
        return left, top, right, bottom

    @property
    def paste_position(self) -> tuple[int, int]:
        """Left and top, cut off towards 0: HyperLoRA pastes there, though it crops at crop_box, often 1 pixel off."""
        return int(self.x - self.half), int(self.y - self.half)


def clip_crop(image_HWC: NDArray[np.uint8], landmarks: NDArray[np.float32], *, remove_background: bool) -> NDArray[np.uint8]:
    """What CLIP sees: a square around the face, uint8 RGB, black beyond the image; the rest gray if so wished."""
    seen_HWC = keep_face(image_HWC, landmarks) if remove_background else image_HWC
    return crop(seen_HWC, clip_square(landmarks))


def arcface_crop(image_HWC: NDArray[np.uint8], landmarks: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Where to detect the face for ArcFace: a wider square, uint8 RGB with its background, black beyond the image."""
    return crop(image_HWC, arcface_square(landmarks))


def keep_face(image_HWC: NDArray[np.uint8], landmarks: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The image in #7f7f7f but for the face, which has a soft edge: hair, neck and background are gone."""
    square = face_square(landmarks)
    image = Image.fromarray(image_HWC)
    canvas = Image.new("RGB", image.size, GRAY)
    mask = soft_mask(outline(landmarks), square, width=image.width, height=image.height)
    canvas.paste(image.crop(square.crop_box), square.paste_position, mask)
    return np.asarray(canvas)


def soft_mask(outline_N2: NDArray[np.float32], square: Square, *, width: int, height: int) -> Image.Image:
    """The square's part of an image's mask, 0..255: 255 inside the outline, blurred at its edge."""
    mask = Image.new("L", (width, height), 0)
    # a list of floats: from an array PIL takes the bytes, and misreads any dtype but float32
    ImageDraw.Draw(mask).polygon([(float(x), float(y)) for x, y in outline_N2], fill=255)
    part = mask.crop(square.crop_box)
    blurred = part.resize((MASK_SIZE, MASK_SIZE)).filter(ImageFilter.GaussianBlur(MASK_BLUR))
    return blurred.resize(part.size)


def outline(landmarks: NDArray[np.float32]) -> NDArray[np.float32]:
    """The 43 landmarks [43,2] around the face, in order."""
    return _checked(landmarks)[list(OUTLINE)]


def face_square(landmarks: NDArray[np.float32]) -> Square:
    """The square around the outline; its centre is the mean of the outline's points, not of their bounding box."""
    points_N2 = outline(landmarks)
    x, y = points_N2.mean(axis=0)
    return Square(x=float(x), y=float(y), half=FACE_SCALE * _longer_side(points_N2))


def clip_square(landmarks: NDArray[np.float32]) -> Square:
    """The square that CLIP sees; its centre is above that of the landmarks' bounding box."""
    points_N2 = _checked(landmarks)
    x, y = (points_N2.min(axis=0) + points_N2.max(axis=0)) / 2
    half = CLIP_SCALE * _longer_side(points_N2)
    return Square(x=float(x), y=float(y) - CLIP_RISE * half, half=half)


def arcface_square(landmarks: NDArray[np.float32]) -> Square:
    """The square in which the face is detected for ArcFace, around CLIP's."""
    square = clip_square(landmarks)
    return Square(x=square.x, y=square.y, half=ARCFACE_SCALE * square.half)


def crop(image_HWC: NDArray[np.uint8], square: Square) -> NDArray[np.uint8]:
    """The square's pixels, black where it reaches beyond the image."""
    return np.asarray(Image.fromarray(image_HWC).crop(square.crop_box))


def _longer_side(points_N2: NDArray[np.float32]) -> float:
    return float((points_N2.max(axis=0) - points_N2.min(axis=0)).max())


def _checked(landmarks: NDArray[np.float32]) -> NDArray[np.float32]:
    if landmarks.shape != (NUM_LANDMARKS, 2) or not np.isfinite(landmarks).all():
        raise ValueError(
            f"landmarks: found shape {landmarks.shape} with {np.count_nonzero(~np.isfinite(landmarks))} numbers not finite, "
            f"expected {NUM_LANDMARKS} finite (x, y); take them from 2d106det"
        )
    return landmarks.astype(np.float32)
