"""Frames <-> MP4 (H.264, yuv420p, faststart) by PyAV. Legend: T frames, H height, W width, C=3 RGB."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from ipt2v.atomic import replacing

# x264 is deterministic for a given number of threads, not across numbers: fixed, so that equal frames make equal bytes.
NUM_ENCODER_THREADS = 4
# With its macroblock tree on, x264 (PyAV 18.1's) reads memory that it has not written: about 1 in 200 encodes of the same 96x64
# frames came out with other bytes, none of 2,400 with it off. At the same crf the file is larger, the picture no worse.
X264_PARAMETERS = "mbtree=0"


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoFacts:
    """What a full decode of an MP4 found."""

    num_frames: int
    width: int
    height: int
    fps: float
    codec: str
    pixel_format: str
    num_streams: int


def write_mp4(path: Path, frames_THWC: NDArray[np.uint8], *, fps: int, crf: int) -> None:
    """Write [T,H,W,3] uint8 RGB 0..255 as one H.264 stream, whole or not at all; equal frames give equal bytes."""
    _, height, width, _ = frames_THWC.shape
    options = {"crf": str(crf), "preset": "medium", "x264-params": X264_PARAMETERS}
    with replacing(path) as scratch, av.open(str(scratch), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = NUM_ENCODER_THREADS
        stream.codec_context.time_base = Fraction(1, fps)
        for frame_HWC in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode(None))


def read_mp4(path: Path) -> NDArray[np.uint8]:
    """All frames of an MP4, [T,H,W,3] uint8 RGB 0..255."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def inspect_mp4(path: Path) -> VideoFacts:
    """Facts of an MP4, found by decoding all of it. Raises ValueError, naming the file, if it does not decode."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            num_frames = sum(1 for _ in container.decode(stream))
            context = stream.codec_context
            return VideoFacts(
                num_frames=num_frames,
                width=context.width,
                height=context.height,
                fps=float(stream.average_rate or 0),
                codec=context.codec.canonical_name,
                pixel_format=str(context.pix_fmt),
                num_streams=len(container.streams),
            )
    except (av.error.FFmpegError, IndexError, OSError) as error:
        raise ValueError(f"{path}: not a decodable MP4 ({error}); delete it and submit again to make it anew") from error
