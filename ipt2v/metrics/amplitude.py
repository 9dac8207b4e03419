"""How far things move between one frame and the next, by OpenCV's dense optical flow, on the CPU. Knows no network and no file.

Legend: T frames, H W pixels, C=3 RGB, 2 = x then y.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import torch
from numpy.typing import NDArray

from ipt2v.metrics.undefined import Undefined

FramesTHWC = NDArray[np.uint8] | torch.Tensor


def motion_amplitude(frames_THWC: FramesTHWC) -> float | Undefined:
    """Length of the flow from each frame of [T,H,W,3] uint8 RGB to the next, mean over pixels and pairs, in pixels per frame.

    At the frame rate and the size of the video: half as many frames a second or twice the size give twice as much. This is
    not OpenS2V-Eval's column of that name: get_motionscore.py (d19c2cea) averages the flow itself, x and y together, so that
    movements against each other cancel. Undefined: fewer than two frames. Raises ValueError for other input, or if there is no
    OpenCV.
    """
    lengths = [float(np.linalg.norm(flow_HW2, axis=2).mean(dtype=np.float64)) for flow_HW2 in _flows(frames_THWC)]
    if not lengths:
        return Undefined(reason=f"frames: found {len(frames_THWC)}, at least 2 needed")
    return math.fsum(lengths) / len(lengths)


def _flows(frames_THWC: FramesTHWC) -> Iterator[NDArray[np.float32]]:
    """[H,W,2] from each frame to the next, with the parameters of OpenS2V-Eval.

    OpenCV's number of threads stays what the process has: it changes the time but no digit, and is not ours to set.
    """
    frames = np.asarray(frames_THWC.cpu() if isinstance(frames_THWC, torch.Tensor) else frames_THWC)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape[1:]:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}, expected uint8 [T,H,W,3]")
    cv2 = _opencv()
    before_HW = None
    for frame_HWC in frames:
        now_HW = cv2.cvtColor(np.ascontiguousarray(frame_HWC), cv2.COLOR_RGB2GRAY)
        if before_HW is not None:
            # scale and number of the pyramid's levels, window, iterations, size and deviation of the polynomials, flags
            yield cv2.calcOpticalFlowFarneback(before_HW, now_HW, None, 0.5, 3, 15, 3, 5, 1.2, 0)
        before_HW = now_HW


def _opencv() -> ModuleType:
    try:
        import cv2
    except ImportError as error:  # not installed, or, of opencv-python, without the libraries of a desktop
        advice = (
            "pip install opencv-python-headless (or ipt2v[score]), but not beside opencv-python: the two overwrite each other"
        )
        raise ValueError(f"motion amplitude needs OpenCV, which cannot be imported ({error}): {advice}") from error
    return cv2
