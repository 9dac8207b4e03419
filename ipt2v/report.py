"""One page to look at a run, or at two side by side: collects what the page shows from records, videos and scores.

What cannot be read is told on the page and spoils no page. How it looks is report_page's business; knows no scheduler.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ipt2v import hdf5
from ipt2v.atomic import write_text
from ipt2v.config import AcceptConfig
from ipt2v.effort import Effort, effort_of, effort_of_scores
from ipt2v.manifest import natural_key
from ipt2v.mp4 import middle_frame
from ipt2v.records import FirstFrame, Item, ItemError, Score
from ipt2v.references import load_reference
from ipt2v.report_page import Card, Page, RunFacts, Shown, StageFacts, render
from ipt2v.run_dir import RECORDED_STAGES, STAGES, RunDir, StageCount
from ipt2v.table import Line, make_table, scored
from ipt2v.takes import Take, best_takes, broken_rules

TOY_MARK = "TOY.txt"
MAX_THUMBNAIL_BYTES = 6 * 1024  # 4,000 of them are a page that opens in a second
THUMBNAIL_TRIES = ((240, 80), (240, 65), (240, 50), (200, 40), (160, 30), (96, 30))  # longer side in pixels, JPEG quality
MAX_THREADS = 16

RecordT = TypeVar("RecordT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where to find what is known of one item."""

    item: Item
    run_digest: str
    records: Mapping[str, Path]  # stage -> file that holds its record
    mp4: Path  # which need not be there
    failure: str
    scores: tuple[Score, ...]
    rejected: bool  # by the run's rules


@dataclass(frozen=True, slots=True, kw_only=True)
class Photo:
    """A reference photo, small; or why it cannot be shown."""

    jpeg: bytes
    trouble: str


def write_report(run: RunDir, other: RunDir | None = None) -> Path:
    """Write RUN/report.html from the record files, with `other` beside it if given; the page's path."""
    runs = (run,) if other is None else (run, other)
    names = [one.root.absolute().name for one in runs]
    if len(set(names)) < len(names):
        names = [str(one.root) for one in runs]
    shown = tuple(_look_at(one, name, page_folder=run.root) for one, name in zip(runs, names, strict=True))
    path = run.root / "report.html"
    write_text(path, render(Page(runs=shown, table=_table(runs, names))))
    return path


def shared_keys(run: RunDir, other: RunDir) -> list[str]:
    """The items that are in both runs, in the order of the first."""
    theirs = {item.key for item in other.manifest()}
    return [item.key for item in run.manifest() if item.key in theirs]


def _look_at(run: RunDir, name: str, *, page_folder: Path) -> Shown:
    config, environment = run.config(), run.environment()
    problems: list[str] = []
    sources = _sources(run, problems)
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as pool:
        photos = _photos([one.item for one in sources], pool)
        found = list(pool.map(partial(_card, photos, page_folder), sources))
    efforts = [effort for _, mine in found for effort in mine]
    counts = _counts(run, problems)
    facts = RunFacts(
        name=name,
        digest=environment.run_digest,
        code_version=environment.code_version,
        frozen=environment.created,
        last_record=_utc(max(effort.finished for effort in efforts)) if efforts else "",
        num_frames=config.video.num_frames,
        width=config.video.width,
        height=config.video.height,
        fps=config.video.fps,
        is_toy=any((Path(environment.weights_dir) / folder / TOY_MARK).exists() for folder in environment.weights),
        is_rehearsal=config.rehearsal.enabled,
        stages=tuple(_stage_facts(stage, mine, efforts) for stage, mine in counts.items()),
        problems=tuple(dict.fromkeys(problems)),
    )
    cards = {source.item.key: card for source, (card, _) in zip(sources, found, strict=True)}
    return Shown(facts=facts, cards=cards)


def _sources(run: RunDir, problems: list[str]) -> list[Sources]:
    """Of every item, sorted as people count."""
    environment, found, scoring = run.environment(), [], _tried(run.scoring, problems)
    accept = AcceptConfig() if scoring is None else scoring.config.accept
    failures = {failure.key: f"{failure.stage}: {failure.reason}" for failure in run.failures()}
    for shard in range(environment.num_shards):
        items = run.shard(shard)
        keys = [item.key for item in items]
        paths = {stage: _tried(run.record_paths, problems, stage, shard, keys) or {} for stage in RECORDED_STAGES}
        takes = _tried(best_takes, problems, run, shard, keys) or {}
        for item in items:
            take = takes.get(item.key, Take(number=1, mp4=run.mp4_path(item.key), rows=()))
            records = {stage: mine[item.key] for stage, mine in paths.items() if item.key in mine}
            found.append(
                Sources(
                    item=item,
                    run_digest=environment.run_digest,
                    records=take.records(records),
                    mp4=take.mp4,
                    failure=failures.get(item.key, ""),
                    scores=take.rows,
                    rejected=bool(take.rows and broken_rules(take.rows, accept)),
                )
            )
    return sorted(found, key=lambda one: (natural_key(one.item.identity), natural_key(one.item.prompt_id)))


def _tried(read: Callable[..., RecordT], problems: list[str], *arguments: object) -> RecordT | None:
    """What `read` gives; None, and a line more in `problems`, if a file is damaged."""
    try:
        return read(*arguments)
    except Exception as error:  # a damaged file makes HDF5 raise nearly anything
        problems.append(str(error) if isinstance(error, ValueError | OSError) else repr(error))
        return None


def _photos(items: Iterable[Item], pool: ThreadPoolExecutor) -> dict[str, Photo]:
    """path -> photo, each opened once: the prompts of a person share one."""
    firsts = {item.reference: item for item in reversed(list(items))}
    return dict(zip(firsts, pool.map(_photo, firsts.values()), strict=True))


def _photo(item: Item) -> Photo:
    try:
        return Photo(jpeg=thumbnail(load_reference(item)), trouble="")
    except (ItemError, ValueError) as error:
        return Photo(jpeg=b"", trouble=str(error).removeprefix(f"{item.key}: "))


def _card(photos: Mapping[str, Photo], page_folder: Path, source: Sources) -> tuple[Card, list[Effort]]:
    item, photo = source.item, photos[source.item.reference]
    troubles = [photo.trouble] if photo.trouble else []
    frame = _record(hdf5.load_first_frame, source, "first_frame", troubles)
    made = {stage: _record(hdf5.load_provenance, source, stage, troubles) for stage in RECORDED_STAGES}
    tried = [_tried(effort_of, troubles, one, stage) for stage, one in made.items() if one is not None]
    if source.scores:
        tried.append(_tried(effort_of_scores, troubles, source.scores))
    efforts = [effort for effort in tried if effort is not None]
    middle_HWC = _tried(middle_frame, troubles, source.mp4) if source.mp4.is_file() else None
    card = Card(
        prompt=item.prompt,
        reference=photo.jpeg,
        still=b"" if middle_HWC is None else thumbnail(middle_HWC),
        video="" if middle_HWC is None else relative_url(source.mp4, page_folder),
        failure=source.failure,
        troubles=tuple(dict.fromkeys(troubles)),
        scores={row.metric: row.value for row in source.scores},
        no_score={row.metric: row.reason for row in source.scores if row.reason is not None},
        seconds={effort.stage: effort.seconds for effort in efforts},
        rejected=source.rejected,
    )
    return card if frame is None else _with_first_frame(card, frame), efforts


def _record(load: Callable[..., RecordT], source: Sources, stage: str, troubles: list[str]) -> RecordT | None:
    """A record, if there is one that can be read."""
    if stage not in source.records:
        return None
    path, key, found = source.records[stage], source.item.key, list[str]()
    record = _tried(partial(load, run_digest=source.run_digest), found, path, key)
    troubles += [text if str(path) in text else f"{path}: record {key} cannot be read ({text})" for text in found]
    return record


def _with_first_frame(card: Card, frame: FirstFrame) -> Card:
    return replace(
        card,
        spatial_prompt=frame.spatial_prompt,
        temporal_prompt=frame.temporal_prompt,
        notes=frame.notes,
        cutout=thumbnail(frame.reference_HWC),
        first_frame=b"" if frame.image_HWC is None else thumbnail(frame.image_HWC),
        similarity=frame.similarity,
        num_attempts=len(frame.attempts),
    )


def _utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _counts(run: RunDir, problems: list[str]) -> dict[str, list[StageCount]]:
    """stage -> progress of each shard. Of a shard whose file cannot be read nothing counts as done."""
    counts: dict[str, list[StageCount]] = {stage: [] for stage in _tried(run.stages, problems) or STAGES[:2]}
    for shard in range(run.environment().num_shards):
        keys = run.shard_keys(shard)
        for stage, mine in counts.items():
            unread = StageCount(stage=stage, shard=shard, done=0, failed=0, missing=len(keys))
            mine.append(_tried(run.count, problems, stage, shard, keys) or unread)
    return counts


def _stage_facts(stage: str, counts: Sequence[StageCount], efforts: Iterable[Effort]) -> StageFacts:
    mine = [effort for effort in efforts if effort.stage == stage]
    return StageFacts(
        stage=stage,
        done=sum(count.done for count in counts),
        failed=sum(count.failed for count in counts),
        missing=sum(count.missing for count in counts),
        seconds=sum(effort.seconds for effort in mine),
        gpu_hours=sum(effort.rank_seconds for effort in mine if effort.on_gpu) / 3600,
        cpu_rank_hours=sum(effort.rank_seconds for effort in mine if not effort.on_gpu) / 3600,
    )


def _table(runs: Sequence[RunDir], names: Sequence[str]) -> tuple[Line, ...]:
    """The table of those runs that have scores; empty if none has."""
    found = [(_tried(scored, [], run), name) for run, name in zip(runs, names, strict=True)]
    with_scores = [replace(one, name=name) for one, name in found if one is not None]
    lines = make_table(with_scores) if with_scores else []
    once = {(line.kind, line.label): line for line in reversed(lines)}  # both may repeat one of the paper's
    return tuple(reversed(once.values()))


def relative_url(path: Path, folder: Path) -> str:
    """The way from a page in `folder` to a file, quoted: names may hold # ? % or blanks."""
    way = os.path.relpath(path.absolute(), folder.absolute())
    return "/".join(quote(part, safe="") for part in Path(way).parts)


def thumbnail(image_HWC: NDArray[np.uint8]) -> bytes:
    """A JPEG file of at most MAX_THUMBNAIL_BYTES, but for pictures of noise; the last try is as small as it gets."""
    image, data = Image.fromarray(image_HWC), b""
    for pixels, quality in THUMBNAIL_TRIES:
        buffer = io.BytesIO()
        image.thumbnail((pixels, pixels))  # leaves alone what is small enough
        image.save(buffer, "JPEG", quality=quality, optimize=True)
        data = buffer.getvalue()
        if len(data) <= MAX_THUMBNAIL_BYTES:
            break
    return data
