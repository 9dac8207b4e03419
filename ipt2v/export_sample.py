"""What of a run is shared: of each item the delivered video, its first frame, and all that is known of how it was made.

Knows no format in which it is shared, and passes on no path of this machine. Shape legend: H height, W width, C=3 RGB.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ipt2v import hdf5
from ipt2v.records import FirstFrame, Item, ItemError, Provenance, Score
from ipt2v.references import FORMATS, load_reference
from ipt2v.run_dir import RECORDED_STAGES, RunDir
from ipt2v.takes import Take, best_takes
from ipt2v.testsets.checks import check_name

TEXT_BYTES = 20_000  # more than prompts, provenance, scores and headers take


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One metric of a shared video."""

    value: float | None
    reason: str | None  # why there is no value
    scorer: str | None  # digest of what measured


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """All that is shared of an item but its pictures."""

    number: int  # place in the run's list of items, from 0: stays as it is when what is left out is made later
    key: str
    identity: str
    prompt_id: str
    prompt: str  # the test set's
    spatial_prompt: str
    temporal_prompt: str
    subject: str
    take: int
    seed: int  # of the video
    first_frame_seed: int
    similarity: float | None  # ArcFace cosine of the first frame to the reference, -1..1
    width: int
    height: int
    num_frames: int
    fps: float
    video_sha256: str
    reference_sha256: str  # of the photo's file, so that who has the test set knows which it was
    scores: dict[str, Measured]
    video: Provenance
    first_frame: Provenance

    def as_json(self) -> bytes:
        return (json.dumps(asdict(self), indent=1, allow_nan=False) + "\n").encode("ascii")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One shared item."""

    facts: Facts
    mp4: bytes  # as it was delivered
    png: bytes | None  # the first frame; None where the video started from the reference alone
    reference_png: bytes | None  # None unless it was asked for

    def members(self) -> dict[str, bytes]:
        """File name suffix -> content, of all that there is."""
        all_four = {"json": self.facts.as_json(), "mp4": self.mp4, "png": self.png, "reference.png": self.reference_png}
        return {suffix: data for suffix, data in all_four.items() if data is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """An item that is not shared."""

    key: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where all of an item lies."""

    number: int
    item: Item
    take: Take
    records: Mapping[str, Path]  # first_frame, video -> the file with its record, of those that there are
    metrics: tuple[str, ...]  # of the run: every item has the same, so that tables have the same columns


def find_sources(run: RunDir) -> list[Source | LeftOut]:
    """Every item of the run, in its order. Raises ValueError if a frozen file was changed or a name cannot be a file's."""
    items, shards = run.manifest(), range(run.environment().num_shards)
    run.config()  # raises if it is not as it was frozen
    for item in items:
        check_name("identity", item.identity, str(run.manifest_path))
        check_name("prompt_id", item.prompt_id, str(run.manifest_path))
    takes: dict[str, Take] = {}
    stored: dict[str, dict[str, Path]] = {stage: {} for stage in RECORDED_STAGES}
    for shard in shards:
        keys = run.shard_keys(shard)
        takes |= best_takes(run, shard, keys)
        for stage in RECORDED_STAGES:
            stored[stage] |= run.record_paths(stage, shard, keys)
    scoring = run.scoring()
    metrics = () if scoring is None else scoring.config.metrics
    failures = {failure.key: f"failed in {failure.stage}: {failure.reason}" for failure in run.failures()}
    return [
        Source(
            number=number,
            item=item,
            take=takes[item.key],
            records=takes[item.key].records({stage: mine[item.key] for stage, mine in stored.items() if item.key in mine}),
            metrics=metrics,
        )
        if item.key in takes
        else LeftOut(key=item.key, reason=failures.get(item.key, "no video yet"))
        for number, item in enumerate(items)
    ]


def read_samples(
    sources: Iterable[Source | LeftOut], *, run_digest: str, with_references: bool = False
) -> Iterator[Sample | LeftOut]:
    """What is shared, one item after the other; an item of which anything cannot be read is left out whole."""
    for source in sources:
        if isinstance(source, LeftOut):
            yield source
            continue
        try:
            yield _read(source, run_digest, with_references)
        except (ItemError, ValueError, OSError) as error:
            yield LeftOut(key=source.item.key, reason=" ".join(str(error).split()))


def _read(source: Source, run_digest: str, with_references: bool) -> Sample:
    item, key = source.item, source.item.key
    frame, made = _load_records(source, run_digest)
    mp4 = source.take.mp4.read_bytes()
    sha256 = hashlib.sha256(mp4).hexdigest()
    facts = Facts(
        number=source.number,
        key=key,
        identity=item.identity,
        prompt_id=item.prompt_id,
        prompt=item.prompt,
        spatial_prompt=frame.spatial_prompt,
        temporal_prompt=frame.temporal_prompt,
        subject=frame.subject,
        take=source.take.number,
        seed=made["video"].seed,
        first_frame_seed=made["first_frame"].seed,
        similarity=frame.similarity,
        video_sha256=sha256,
        reference_sha256=item.reference_sha256,
        scores=_scores(source, sha256),
        video=made["video"],
        first_frame=made["first_frame"],
        **_sizes(mp4, source.take.mp4),
    )
    png = None if frame.image_HWC is None else _png(frame.image_HWC)
    return Sample(facts=facts, mp4=mp4, png=png, reference_png=_png(load_reference(item)) if with_references else None)


def _load_records(source: Source, run_digest: str) -> tuple[FirstFrame, dict[str, Provenance]]:
    """The first frame, and how it and the video came to be. Raises ValueError if a record is missing or damaged."""
    key, made = source.item.key, dict[str, Provenance]()
    for stage in RECORDED_STAGES:
        if stage not in source.records:
            raise ValueError(f"no {stage} record says how the video was made")
        try:
            made[stage] = hdf5.load_provenance(source.records[stage], key, run_digest=run_digest)
            if stage == "first_frame":
                frame = hdf5.load_first_frame(source.records[stage], key, run_digest=run_digest)
        except ValueError:
            raise
        except Exception as error:  # a damaged file makes HDF5 raise nearly anything
            raise ValueError(f"{source.records[stage]}: record {key} is not readable ({error!r})") from error
    return frame, made


def _scores(source: Source, sha256: str) -> dict[str, Measured]:
    rows = {row.metric: row for row in source.take.rows}
    unknown = Measured(value=None, reason="not measured yet", scorer=None)
    return {metric: _measured(rows[metric], sha256) if metric in rows else unknown for metric in source.metrics}


def _measured(row: Score, sha256: str) -> Measured:
    value, reason = row.value, row.reason
    if row.video_sha256 != sha256:
        value, reason = None, "was measured of another file than this video"
    elif value is not None and not math.isfinite(value):
        value, reason = None, f"{value} is no number"
    return Measured(value=value, reason=reason, scorer=row.scorer)


def _sizes(mp4: bytes, path: Path) -> dict[str, Any]:
    """What the container says; nothing is decoded. Raises ValueError if it is no container."""
    try:
        with av.open(io.BytesIO(mp4), format="mp4") as container:
            stream = container.streams.video[0]
            sizes = {"width": stream.codec_context.width, "height": stream.codec_context.height, "num_frames": stream.frames}
            return {**sizes, "fps": float(stream.average_rate or 0)}
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(f"{path}: not a readable MP4 ({error}); delete it and submit again to make it anew") from error


def _png(image_HWC: NDArray[np.uint8]) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image_HWC).save(data, "PNG", compress_level=3)  # a third of the time of 6, and 7% more bytes
    return data.getvalue()


def most_bytes(source: Source, *, picture_bytes: int, with_references: bool) -> int:
    """What a sample takes, at most: PNG makes no picture much larger than its pixels. 0 if a file of it cannot be read."""
    try:
        num_bytes = source.take.mp4.stat().st_size + picture_bytes + TEXT_BYTES
        if with_references:
            with Image.open(source.item.reference, formats=FORMATS) as image:  # reads the header alone
                num_bytes += 3 * image.width * image.height
    except (OSError, Image.DecompressionBombError):
        return 0
    return num_bytes
