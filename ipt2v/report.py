"""One page to look at a run: reference, prompts, first frame and a still of the video for each item. Every text is escaped."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, PackageLoader
from numpy.typing import NDArray
from PIL import Image

from ipt2v import hdf5
from ipt2v.atomic import write_text
from ipt2v.mp4 import read_mp4
from ipt2v.records import FirstFrame, Item, ItemError
from ipt2v.references import load_reference
from ipt2v.run_dir import STAGES, RunDir

THUMBNAIL_PIXELS = 240
TOY_MARK = "TOY.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One item on the page; images are data URIs, empty if there is none."""

    key: str
    prompt: str
    reference: str
    cutout: str
    first_frame: FirstFrame | None
    first_frame_image: str
    still: str
    mp4: str  # relative to the page
    reason: str


def write_report(run: RunDir) -> Path:
    """Write RUN/report.html from the record files; the page's path."""
    config, environment = run.config(), run.environment()
    reasons = {failure.key: f"{failure.stage}: {failure.reason}" for failure in run.failures()}
    shards = [(shard, run.shard(shard)) for shard in range(environment.num_shards)]
    rows = [
        _row(run, environment.run_digest, shard, item, reasons.get(item.key, "")) for shard, items in shards for item in items
    ]
    done = {
        stage: sum(len(run.done(stage, shard, [item.key for item in items])) for shard, items in shards) for stage in STAGES
    }
    page = Environment(loader=PackageLoader("ipt2v"), autoescape=True).get_template("report.html")
    text = page.render(
        config=config,
        environment=environment,
        rows=rows,
        num_items=len(rows),
        done=done,
        toy=any((Path(environment.weights_dir) / folder / TOY_MARK).exists() for folder in environment.weights),
    )
    path = run.root / "report.html"
    write_text(path, text)
    return path


def _row(run: RunDir, run_digest: str, shard: int, item: Item, reason: str) -> Row:
    try:
        reference = _data_uri(load_reference(item))
    except (ItemError, ValueError) as error:
        reference, reason = "", reason or str(error)
    try:
        path = run.record_path("first_frame", shard, item.key)
        first_frame = hdf5.load_first_frame(path, item.key, run_digest=run_digest)
    except KeyError:
        first_frame = None
    mp4 = run.mp4_path(item.key)
    frames_THWC = read_mp4(mp4) if mp4.is_file() else None
    return Row(
        key=item.key,
        prompt=item.prompt,
        reference=reference,
        cutout="" if first_frame is None else _data_uri(first_frame.reference_HWC),
        first_frame=first_frame,
        first_frame_image="" if first_frame is None or first_frame.image_HWC is None else _data_uri(first_frame.image_HWC),
        still="" if frames_THWC is None else _data_uri(frames_THWC[len(frames_THWC) // 2]),
        mp4="" if frames_THWC is None else quote(mp4.relative_to(run.root).as_posix()),
        reason=reason,
    )


def _data_uri(image_HWC: NDArray[np.uint8]) -> str:
    image, buffer = Image.fromarray(image_HWC), io.BytesIO()
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
