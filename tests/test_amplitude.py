"""How far things move: a texture shifted by a known number of pixels moves by that, and what stands still by nothing.

OpenS2V-Eval itself is not run here. Legend: T frames, H W pixels, C=3 RGB.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
from helpers import run_python

from ipt2v.metrics.amplitude import motion_amplitude
from ipt2v.metrics.undefined import Undefined

cv2 = pytest.importorskip("cv2", reason="OpenCV is what computes the flow", exc_type=ImportError)

MARGIN = 32


def texture(height: int, width: int) -> np.ndarray:
    """Coloured noise, blurred so that a shift by some pixels can be followed."""
    noise_HWC = np.random.default_rng(0).normal(size=(height, width, 3))
    for axis in (0, 0, 1, 1):
        noise_HWC = sum(np.roll(noise_HWC, shift, axis) for shift in (-1, 0, 1))
    return np.clip(128 + 50 * noise_HWC / noise_HWC.std(), 0, 255).astype(np.uint8)


def moving(right: int, down: int, num_frames: int = 4, size: tuple[int, int] = (96, 128)) -> np.ndarray:
    """[T,H,W,3]: a texture larger than the picture, shifted by so many pixels from frame to frame."""
    height, width = size
    large_HWC = texture(height + 2 * MARGIN, width + 2 * MARGIN)
    corners = ((MARGIN - down * index, MARGIN - right * index) for index in range(num_frames))
    return np.stack([large_HWC[top : top + height, left : left + width] for top, left in corners])


def test_what_stands_still_has_no_amplitude() -> None:
    """A flat picture by nothing, a textured one by what the algorithm's own rounding makes of it."""
    grey = np.full((3, 96, 128, 3), 90, dtype=np.uint8)
    assert motion_amplitude(grey) == 0.0
    assert motion_amplitude(moving(0, 0)) == pytest.approx(0.0, abs=0.005)


@pytest.mark.parametrize(("right", "down", "expected"), [(2, 0, 2.0), (0, 2, 2.0), (-2, 0, 2.0), (3, 4, 5.0), (2, -2, 8**0.5)])
def test_a_shift_by_some_pixels_is_an_amplitude_of_them(right: int, down: int, expected: float) -> None:
    assert motion_amplitude(moving(right, down)) == pytest.approx(expected, abs=0.2)


def test_the_amplitude_is_the_mean_over_the_pairs() -> None:
    still_then_moving = np.concatenate([moving(0, 0, 3)[:2], moving(2, 0, 3)])  # pairs: still, still, moving, moving
    assert motion_amplitude(still_then_moving) == pytest.approx(1.0, abs=0.1)


def test_the_flow_is_that_of_opens2vs_parameters() -> None:
    frames_THWC = moving(2, 1, 2)
    before_HW, after_HW = (cv2.cvtColor(frame_HWC, cv2.COLOR_RGB2GRAY) for frame_HWC in frames_THWC)
    sizes = {"pyr_scale": 0.5, "levels": 3, "winsize": 15, "iterations": 3, "poly_n": 5, "poly_sigma": 1.2, "flags": 0}
    flow_HW2 = cv2.calcOpticalFlowFarneback(before_HW, after_HW, flow=None, **sizes).astype(np.float64)
    assert motion_amplitude(frames_THWC) == pytest.approx(np.sqrt((flow_HW2**2).sum(2)).mean(), rel=1e-6)


@pytest.mark.slow
def test_a_tensor_is_as_good_as_an_array() -> None:
    import torch

    frames_THWC = moving(2, 0, 2)
    assert motion_amplitude(torch.from_numpy(frames_THWC)) == motion_amplitude(frames_THWC)


def test_the_number_of_opencvs_threads_stays_and_does_not_count() -> None:
    frames_THWC, num_threads = moving(2, 0, 2), cv2.getNumThreads()
    try:
        cv2.setNumThreads(1)
        alone = motion_amplitude(frames_THWC)
        assert cv2.getNumThreads() == 1
    finally:
        cv2.setNumThreads(num_threads)
    assert motion_amplitude(frames_THWC) == alone


@pytest.mark.parametrize("num_frames", [0, 1])
def test_one_frame_has_no_amplitude(num_frames: int) -> None:
    found = motion_amplitude(moving(0, 0)[:num_frames])
    assert found == Undefined(reason=f"frames: found {num_frames}, at least 2 needed")


@pytest.mark.parametrize("wrong", [np.zeros((2, 9, 9, 3)), np.zeros((9, 9, 3), np.uint8), np.zeros((2, 3, 9, 9), np.uint8)])
def test_what_is_no_video_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[T,H,W,3\]"):
        motion_amplitude(wrong)


def test_without_opencv_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)  # what Python itself takes for "cannot be imported"
    with pytest.raises(ValueError, match="pip install opencv-python-headless"):
        motion_amplitude(moving(0, 0))


@pytest.mark.slow
def test_opencv_is_not_imported_before_it_is_needed() -> None:
    assert run_python("import sys, ipt2v.metrics.amplitude\nprint('cv2' in sys.modules)").strip() == "False"
