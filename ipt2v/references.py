"""Decodes an item's photos into RGB pixels.

Knows nothing of faces or models. Shape legend: H height, W width, C=3 RGB.
"""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ipt2v.records import Item, ItemError, Photo

FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 100_000_000
MIN_SIDE_PIXELS = 16

# what Pillow's three decoders raised on randomly damaged photos
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)

_ORIENTATION_TAG = 0x0112  # EXIF 2.3, table 4
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_reference(item: Item) -> NDArray[np.uint8]:
    """The item's main photo, upright, [H,W,3] uint8 RGB, 0..255; what is transparent becomes white. Of an animation, frame one.

    Raises ItemError if the photo cannot be decoded or has no usable size, ValueError if it is not the file of this run.
    """
    return _load(item.photos[0], item.key)


def load_photos(item: Item) -> tuple[NDArray[np.uint8], ...]:
    """All of the item's photos, the main one first, each as load_reference gives it; their sizes may differ.

    Raises what load_reference raises, for the first photo that something is wrong with.
    """
    return tuple(_load(photo, item.key) for photo in item.photos)


def _load(photo: Photo, key: str) -> NDArray[np.uint8]:
    data = _unchanged_bytes(photo, key)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image, photo, key)
            image.load()
            return np.array(_upright(_rgb_on_white(image), _orientation(image)), dtype=np.uint8)
    except _DECODE_ERRORS as error:
        raise ItemError(f"{key}: reference {photo.path} cannot be decoded: {error}; replace the photo") from error


def _unchanged_bytes(photo: Photo, key: str) -> bytes:
    try:
        data = Path(photo.path).read_bytes()
    except OSError as error:
        found = f"reference {photo.path} cannot be read ({error.strerror})"
        raise ValueError(f"{key}: {found}; restore it or make a new run") from error
    found_sha256 = hashlib.sha256(data).hexdigest()
    if found_sha256 != photo.sha256:
        digests = f"sha256 {found_sha256[:12]}, expected {photo.sha256[:12]}"
        raise ValueError(f"{key}: reference {photo.path} has changed: {digests}; restore it or make a new run")
    return data


def _check_size(image: Image.Image, photo: Photo, key: str) -> None:
    """Looks at the header alone: a photo that is too large must not be decoded first."""
    width, height = image.size
    if width * height > MAX_PIXELS or min(width, height) < MIN_SIDE_PIXELS:
        limits = f"expected at least {MIN_SIDE_PIXELS} px a side and at most {MAX_PIXELS // 1_000_000} megapixels"
        raise ItemError(f"{key}: reference {photo.path} is {width}x{height} px, {limits}; replace the photo")


def _rgb_on_white(image: Image.Image) -> Image.Image:
    """The same picture in RGB, composited on white: the references of the challenge are cut-outs on white."""
    if image.mode.startswith("I"):
        return Image.fromarray(_gray8(image)).convert("RGB")
    # PNG marks transparency in palettes and in modes without alpha (tRNS) too; Pillow keeps it in info
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _gray8(image: Image.Image) -> NDArray[np.uint8]:
    """16-bit gray as [H,W] uint8. Not by convert(): Pillow clips at 255 instead of scaling."""
    gray16_HW = np.asarray(image).astype(np.int64)
    gray8_HW = (gray16_HW * 255 + 32767) // 65535
    if "transparency" in image.info:
        gray8_HW[gray16_HW == image.info["transparency"]] = 255
    return gray8_HW.clip(0, 255).astype(np.uint8)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1..8; 1 if there is none. Not ImageOps.exif_transpose: a damaged EXIF block spoils no pixel."""
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except _DECODE_ERRORS:
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
