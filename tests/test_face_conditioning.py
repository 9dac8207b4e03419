"""The crops that HyperLoRA sees: where they are to the pixel, what of the photo they hold, and what the mask keeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ipt2v.models.face_conditioning import (
    OUTLINE,
    Square,
    arcface_crop,
    arcface_square,
    clip_crop,
    clip_square,
    crop,
    face_square,
    keep_face,
    outline,
    soft_mask,
)


def landmarks_at(x: float, y: float, **moved: tuple[float, float]) -> np.ndarray:
    """All landmarks at one point, but for `moved`: _<index> = (x, y)."""
    points = np.full((106, 2), (x, y), np.float32)
    for name, point in moved.items():
        points[int(name[1:])] = point
    return points


def face(x: float, y: float, radius: float) -> np.ndarray:
    """Landmarks of a round face: the outline on a circle, in order, all others in the middle."""
    points = landmarks_at(x, y)
    angles = np.linspace(0, 2 * np.pi, len(OUTLINE), endpoint=False)
    points[list(OUTLINE)] = np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1)
    return points


def photo(width: int = 120, height: int = 90, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---- where


def test_the_outline_goes_once_around_the_jaw_and_back_over_the_brows() -> None:
    jaw = [1, *range(9, 17), 2, 3, 4, 5, 6, 7, 8, 0, 24, 23, 22, 21, 20, 19, 18, 32, 31, 30, 29, 28, 27, 26, 25, 17]
    assert list(OUTLINE) == [*jaw, 101, 105, 104, 103, 102, 50, 51, 49, 48, 43]
    assert sorted(OUTLINE)[:33] == list(range(33))
    assert len(set(OUTLINE)) == 43
    points_N2 = np.arange(212, dtype=np.float32).reshape(106, 2)
    assert np.array_equal(outline(points_N2)[:, 0] / 2, OUTLINE)


@pytest.mark.parametrize(
    ("origin", "crop_box", "paste_position"),
    [
        # the one outlying point of 43 moves the mean by 43 / 43 = 1; half a side is 0.8 * 43 = 34.4
        ((100.0, 100.0), (67, 66, 135, 134), (66, 65)),  # from 66.6, 65.6: rounded to crop, cut off to paste
        ((99.75, 100.25), (66, 66, 135, 135), (66, 65)),  # from 66.35, 65.85
        ((10.0, 10.0), (-23, -24, 45, 44), (-23, -24)),  # from -23.4, -24.4: cut off towards 0
        ((10.25, 9.75), (-23, -25, 46, 44), (-23, -24)),  # from -23.15, -24.65
    ],
)
def test_the_square_around_the_face(origin, crop_box, paste_position) -> None:
    square = face_square(landmarks_at(*origin, _0=(origin[0] + 43, origin[1])))
    assert square.crop_box == crop_box
    assert square.paste_position == paste_position


def test_the_square_of_the_face_ignores_landmarks_inside_it_and_that_of_clip_does_not() -> None:
    points, moved = landmarks_at(100, 200, _0=(143, 200)), landmarks_at(100, 200, _0=(143, 200), _33=(180, 240))
    assert face_square(points) == face_square(moved)
    assert clip_square(points) != clip_square(moved)


def test_the_squares_of_clip_and_arcface() -> None:
    points = landmarks_at(100, 200, _33=(180, 240))  # 80 wide, 40 high, around 140, 220
    assert clip_square(points) == Square(x=140, y=220 - 0.125 * 60, half=60)
    assert clip_square(points).crop_box == (80, 152, 200, 272)  # from 152.5 and 272.5: halves go to the even number
    assert arcface_square(points).crop_box == (20, 92, 260, 332)  # the same centre, twice as wide


@given(
    x=st.floats(-50, 150, width=32), y=st.floats(-50, 150, width=32), half=st.floats(0.5, 90, width=32), data=st.integers(0, 9)
)
def test_a_crop_is_what_pil_cuts_at_the_unrounded_edges(x: float, y: float, half: float, data: int) -> None:
    square, image_HWC = Square(x=x, y=y, half=half), photo(seed=data)
    expected = Image.fromarray(image_HWC).crop((x - half, y - half, x + half, y + half))
    assert np.array_equal(crop(image_HWC, square), np.asarray(expected))


@given(x=st.floats(-99, 999), y=st.floats(-99, 999), half=st.floats(1, 500))
def test_the_face_is_pasted_at_most_one_pixel_from_where_it_was(x: float, y: float, half: float) -> None:
    square = Square(x=x, y=y, half=half)
    assert {abs(a - b) for a, b in zip(square.crop_box, square.paste_position, strict=False)} <= {0, 1}


def test_beyond_the_photo_a_crop_is_black() -> None:
    image_HWC = np.full((20, 20, 3), 255, np.uint8)
    corner_HWC = crop(image_HWC, Square(x=0, y=0, half=4))
    assert corner_HWC.shape == (8, 8, 3)
    assert corner_HWC[4:, 4:].min() == 255
    assert not corner_HWC[:4].any()
    assert not corner_HWC[:, :4].any()


# ---- what


@pytest.mark.parametrize("radius", [20, 33.3, 80])
def test_the_mask_is_white_in_the_face_black_around_it_and_soft_between(radius: float) -> None:
    points = face(150, 140, radius)
    square = face_square(points)
    mask_HW = np.asarray(soft_mask(outline(points), square, width=320, height=300))
    side = len(mask_HW)
    assert mask_HW.shape == (side, side)
    assert abs(side - 2 * 0.8 * 2 * radius) <= 2
    ys, xs = np.mgrid[:side, :side] + 0.5
    distance = np.hypot(xs - side / 2, ys - side / 2) / radius
    assert mask_HW[distance < 0.7].min() == 255  # from 3 times the blur's radius inwards all is white: no holes
    assert mask_HW[distance > 1.3].max() == 0
    assert abs(int(mask_HW[side // 2, int(side / 2 + radius)]) - 127) < 40


@pytest.mark.parametrize("radius", [60, 90, 150])
def test_the_soft_edge_is_as_wide_as_a_gaussian_of_15_in_512_pixels(radius: float) -> None:
    points = face(300, 300, radius)
    mask_HW = np.asarray(soft_mask(outline(points), face_square(points), width=600, height=600)).astype(float)
    side = len(mask_HW)
    half_row = mask_HW[side // 2, side // 2 :]
    ten, ninety = (np.interp(-level * 255, -half_row, np.arange(len(half_row))) for level in (0.1, 0.9))
    # between 10% and 90% an edge blurred with sigma is 2 * 1.2816 sigma wide; the face's roundness adds little
    assert (ten - ninety) / side == pytest.approx(2 * 1.2816 * 15 / 512, rel=0.1)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_coordinates_are_cut_off_and_any_float_dtype_gives_the_same_mask(dtype: Any) -> None:
    points = face(60.4, 50.7, 20.3)
    square = face_square(points)
    masks = [
        np.asarray(soft_mask(xy, square, width=120, height=90))
        for xy in (outline(points), outline(points).astype(dtype), np.trunc(outline(points)))
    ]
    assert np.array_equal(masks[0], masks[1])
    assert np.array_equal(masks[0], masks[2])
    assert np.array_equal(keep_face(photo(), points), keep_face(photo(), points.astype(dtype)))


@pytest.mark.parametrize("centre", [(60.3, 44.8), (3.0, 44.0), (60.0, 2.5), (118.0, 88.0), (60.0, 45.5)])
def test_only_the_face_is_left_on_gray_blended_by_the_mask(centre: tuple[float, float]) -> None:
    image_HWC, points = photo(), face(*centre, 18)
    square = face_square(points)
    part_HWC = np.asarray(Image.fromarray(image_HWC).crop(square.crop_box)).astype(float)
    mask_HW1 = np.asarray(soft_mask(outline(points), square, width=120, height=90))[..., None] / 255
    left, top = square.paste_position
    expected = np.full((90, 120, 3), 0x7F, float)
    for y, x in np.ndindex(*part_HWC.shape[:2]):
        if 0 <= top + y < 90 and 0 <= left + x < 120:
            expected[top + y, left + x] = mask_HW1[y, x] * part_HWC[y, x] + (1 - mask_HW1[y, x]) * 0x7F
    np.testing.assert_allclose(keep_face(image_HWC, points), expected, atol=1)


def test_the_background_matters_to_clip_only_if_it_is_kept() -> None:
    points = face(60, 45, 18)
    image_HWC, other_HWC = photo(), photo()
    other_HWC[:, :35] = other_HWC[:, 85:] = 0
    for same, remove_background in ((True, True), (False, False)):
        crops = [clip_crop(one, points, remove_background=remove_background) for one in (image_HWC, other_HWC)]
        assert np.array_equal(*crops) == same
    assert not np.array_equal(arcface_crop(image_HWC, points), arcface_crop(other_HWC, points))


def test_clip_sees_gray_around_the_face_and_black_beyond_the_photo() -> None:
    crop_HWC = clip_crop(photo(), face(60, 10, 20), remove_background=True)
    assert crop_HWC.shape == (60, 60, 3)  # 2 * 0.75 * 40
    assert not crop_HWC[:23].any()  # from -23.75 on
    assert np.all(crop_HWC[25:, 0] == 0x7F)


def test_the_photo_is_left_as_it_was() -> None:
    image_HWC, points = photo(), face(60, 45, 18)
    clip_crop(image_HWC, points, remove_background=True)
    arcface_crop(image_HWC, points)
    assert np.array_equal(image_HWC, photo())
    assert np.array_equal(points, face(60, 45, 18))


@pytest.mark.parametrize("points", [np.zeros((68, 2)), np.zeros((106, 3)), np.full((106, 2), np.nan)])
def test_other_landmarks_are_refused(points: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"landmarks: found shape .* expected 106 finite"):
        keep_face(photo(), points.astype(np.float32))
