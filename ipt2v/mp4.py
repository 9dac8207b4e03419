"""Frames <-> MP4 (H.264, yuv420p, faststart) by PyAV. Legend: T frames, H height, W width, C=3 RGB."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

from ipt2v.atomic import replacing

# x264 is deterministic for a given number of threads, not across numbers: fixed, so that equal frames make equal bytes.
NUM_ENCODER_THREADS = 4
# With its macroblock tree on, x264 (PyAV 18.1's) reads memory that it has not written: about 1 in 200 encodes of the same 96x64
# frames came out with other bytes, none of 2,400 with it off. At the same crf the file is larger, the picture no worse.
X264_PARAMETERS = "mbtree=0"
BLOCK = 8  # pixels


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


def middle_frame(path: Path) -> NDArray[np.uint8]:
    """Frame T // 2 of an MP4 of T frames, [H,W,3] uint8 RGB 0..255, without decoding more than it takes.

    Raises ValueError, naming the file, if it does not decode as far as that; of what follows it says nothing.
    """
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            frame_ticks = Fraction(stream.duration or 0, max(1, stream.frames))
            middle = (stream.start_time or 0) + stream.frames // 2 * frame_ticks
            container.seek(int(middle), stream=stream)  # to the last frame before it that is whole in itself
            earliest = middle - frame_ticks / 2  # a container rounds its times
            for packet in container.demux(stream):
                is_before = packet.pts is not None and packet.pts < earliest
                # on the way there nobody needs the frames that no other is made from
                stream.codec_context.skip_frame = "NONREF" if is_before else "DEFAULT"
                for frame in packet.decode():
                    if frame.pts is None or frame.pts >= earliest:
                        return frame.to_ndarray(format="rgb24")
        raise ValueError(f"{path}: ends before its middle; delete it and submit again to make it anew")
    except (av.error.FFmpegError, IndexError, OSError) as error:
        raise ValueError(f"{path}: not a decodable MP4 ({error}); delete it and submit again to make it anew") from error


def read_fps(path: Path) -> float:
    """Frames a second, as the container says."""
    with av.open(str(path)) as container:
        return float(container.streams.video[0].average_rate or 0)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Mp4Facts:
    """All that may be asked of a file that is delivered; what could not be found out is 0, and `error` says why."""

    sha256: str
    num_bytes: int
    container: str = ""
    faststart: bool = False
    codec: str = ""
    pixel_format: str = ""
    num_video_streams: int = 0
    num_audio_streams: int = 0
    num_other_streams: int = 0
    num_frames: int = 0
    width: int = 0
    height: int = 0
    fps: float = 0.0
    seconds: float = 0.0
    mean_luma: float = 0.0  # of all pixels, 0..255; black is 16
    motion: float = 0.0  # how far, in levels of luma, the latter half of the video gets from its middle frame
    error: str = ""  # why it does not decode to its end


def examine_mp4(path: Path) -> Mp4Facts:
    """Every fact, by reading and decoding all of the file. Raises OSError if there is none, or it cannot be read."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    boxes = tuple(top_boxes(path))
    facts: dict[str, Any] = {
        "sha256": sha256,
        "num_bytes": path.stat().st_size,
        "container": _container_name(boxes),
        "faststart": _places(boxes, "moov") < _places(boxes, "mdat"),
    }
    try:
        with av.open(str(path)) as container:
            facts |= _stream_facts(container)
            facts |= _decoded_facts(container)
    except Exception as error:  # a damaged header makes PyAV raise nearly anything: UnicodeDecodeError of a tag, for one
        facts["error"] = f"does not open ({getattr(error, 'strerror', None) or error})"
    return Mp4Facts(**facts)


def top_boxes(path: Path) -> Iterator[tuple[str, bytes]]:
    """(type, first 8 bytes of the content) of each box of the top level: ISO/IEC 14496-12, 4.2. Ends where one is malformed."""
    with path.open("rb") as file:
        end, place = file.seek(0, 2), 0
        while place + 8 <= end:
            file.seek(place)
            head = file.read(24)
            size, kind, start = int.from_bytes(head[:4]), head[4:8].decode("latin-1"), 8
            if size == 1:  # the true size follows
                size, start = int.from_bytes(head[8:16]), 16
            elif size == 0:  # up to the end
                size = end - place
            if size < start:
                return
            yield kind, head[start : start + 8]
            place += size


def _container_name(boxes: tuple[tuple[str, bytes], ...]) -> str:
    """mp4, or the type of the first box with its brand: FFmpeg's one reader takes QuickTime and 3GP for the same."""
    if not boxes:
        return "unknown"
    kind, content = boxes[0]
    brand = content[:4].decode("latin-1")
    is_mp4 = kind == "ftyp" and brand.startswith(("iso", "mp4", "avc"))
    return "mp4" if is_mp4 else f"{kind} {brand}".strip() if kind == "ftyp" else "unknown"


def _places(boxes: tuple[tuple[str, bytes], ...], kind: str) -> float:
    return next((place for place, (found, _) in enumerate(boxes) if found == kind), float("inf"))


def _stream_facts(container: av.container.InputContainer) -> dict[str, Any]:
    kinds = [stream.type for stream in container.streams]
    stream = container.streams.video[0]
    if stream.codec_context is None:  # PyAV's types do not say so
        raise ValueError("its codec is unknown")
    return {
        "num_video_streams": kinds.count("video"),
        "num_audio_streams": kinds.count("audio"),
        "num_other_streams": len(kinds) - kinds.count("video") - kinds.count("audio"),
        "codec": stream.codec_context.codec.canonical_name,
        "pixel_format": str(stream.codec_context.pix_fmt),
        "width": stream.codec_context.width,
        "height": stream.codec_context.height,
        "fps": float(stream.average_rate or 0),
        "seconds": float((stream.duration or 0) * stream.time_base),
    }


def _decoded_facts(container: av.container.InputContainer) -> dict[str, Any]:
    """Luma of every frame; one thread, as files are examined side by side."""
    stream = container.streams.video[0]
    stream.codec_context.thread_count = 1
    stream.codec_context.options = {"err_detect": "explode"}  # else FFmpeg paints over what is missing
    pictures, errors = list[NDArray[np.uint16]](), list[str]()
    size = (stream.codec_context.width, stream.codec_context.height)
    try:
        for packet in container.demux(stream):
            if packet.is_corrupt:
                errors.append(f"cut short or damaged after {len(pictures)} frames")
            for frame in packet.decode():
                if frame.is_corrupt:
                    errors.append(f"frame {len(pictures)} is damaged")
                if (frame.width, frame.height) != size:
                    errors.append(f"frame {len(pictures)} is {frame.width}x{frame.height}, unlike {size[0]}x{size[1]}")
                pictures.append(_block_sums(frame))
    except av.error.FFmpegError as error:
        errors.append(f"does not decode after {len(pictures)} frames ({error.strerror})")
    return {
        "num_frames": len(pictures),
        "mean_luma": float(np.mean([picture.mean() for picture in pictures])) / BLOCK**2 if pictures else 0.0,
        "motion": _motion(pictures),
        "error": errors[0] if errors else "",
    }


def _block_sums(frame: av.VideoFrame) -> NDArray[np.uint16]:
    """Luma summed over squares of BLOCK pixels; what is left at the right and bottom edge is left out."""
    if frame.format.name not in ("yuv420p", "yuvj420p", "yuv422p", "yuv444p", "nv12", "gray"):
        frame = frame.reformat(format="gray")  # its first plane may not be luma of 8 bits
    plane, height, width = frame.planes[0], frame.height // BLOCK, frame.width // BLOCK
    luma_HW = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[: height * BLOCK, : width * BLOCK]
    rows = np.add.reduce(luma_HW.reshape(height, BLOCK, width * BLOCK), axis=1, dtype=np.uint16)
    return np.add.reduce(rows.reshape(height, width, BLOCK), axis=2, dtype=np.uint16)


def _motion(pictures: list[NDArray[np.uint16]]) -> float:
    """How far, in levels of luma, the latter half of a video gets from its middle frame.

    Blocks and not pixels, the latter half and not the first frame: an encoder goes on refining a picture that stands still.
    """
    latter = pictures[len(pictures) // 2 :]
    same = [picture.astype(np.int32) for picture in latter if picture.shape == latter[0].shape]
    return max((float(np.abs(picture - same[0]).mean()) for picture in same), default=0.0) / BLOCK**2
