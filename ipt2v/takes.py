"""Videos that were rejected, kept beside those that were made after them: of all takes of an item the best is delivered.

    takes/<key>/<number>/{video.mp4, scores.csv, first_frame.h5, video.h5}

A take has its number for a seed, so that it can be made again. Knows no metric but by its name.
"""

from __future__ import annotations

import filecmp
import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ipt2v import hdf5
from ipt2v.atomic import fsync
from ipt2v.config import AcceptConfig
from ipt2v.records import Score
from ipt2v.run_dir import RECORDED_STAGES, RunDir
from ipt2v.score_dir import read_scores, write_scores


@dataclass(frozen=True, slots=True, kw_only=True)
class Take:
    """One video of an item."""

    number: int  # from 1
    mp4: Path
    rows: tuple[Score, ...]
    kept: Path | None = None  # its folder, if it was rejected once; else its records are where all are

    def records(self, present: Mapping[str, Path]) -> Mapping[str, Path]:
        """stage -> file that holds this take's record; `present` are those of the run itself."""
        return present if self.kept is None else {stage: self.kept / f"{stage}.h5" for stage in RECORDED_STAGES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """An item none of whose takes is good enough."""

    key: str
    shard: int
    num_takes: int
    present: Take | None  # the one that lies where all videos do, with its rows; None while there is none
    reasons: tuple[str, ...]  # of the best of them


def broken_rules(rows: Iterable[Score], accept: AcceptConfig) -> tuple[str, ...]:
    """What a video fails to meet; () if it is accepted."""
    return tuple(text for text, missed in _rules(rows, accept) if missed)


def shortfall(rows: Iterable[Score], accept: AcceptConfig) -> tuple[int, float]:
    """How far from accepted a video is: number of broken rules, then what is missing, as a share of each bound."""
    missed = [one for _, one in _rules(rows, accept) if one]
    return len(missed), sum(missed)


def _rules(rows: Iterable[Score], accept: AcceptConfig) -> list[tuple[str, float]]:
    """(as text, what is missing: 0 if it is met, infinite without a value) of each rule."""
    values = {row.metric: row.value for row in rows}
    found = []
    for sign, word, bounds in ((1, "below", accept.at_least), (-1, "above", accept.at_most)):
        for metric, bound in bounds.items():
            value = values.get(metric)
            value = value if value is not None and math.isfinite(value) else None  # max(0.0, nan) is 0: it would meet any bound
            missed = math.inf if value is None else max(0.0, sign * (bound - value)) / max(abs(bound), 1e-9)
            found.append((f"{metric} {'has no value' if value is None else f'{value:.3f} is {word} {bound:g}'}", missed))
    return found


def kept_takes(run: RunDir, key: str) -> list[Take]:
    """The rejected takes of an item, oldest first."""
    folders = sorted((path for path in run.takes_path(key).glob("[0-9]*")), key=lambda path: int(path.name))
    return [
        Take(number=int(path.name), mp4=path / "video.mp4", rows=tuple(read_scores(path / "scores.csv")), kept=path)
        for path in folders
    ]


def takes_of(run: RunDir, shard: int, keys: Collection[str]) -> dict[str, list[Take]]:
    """Every take of each key that has a video, oldest first, so the present one is the last; it has no rows if none is known.

    What another way of scoring has measured of the same MP4 stands in for rows of an item with other takes to compare it to.
    """
    store, kept = run.scores(), {key: kept_takes(run, key) for key in run.numbers_of_takes(keys)}
    rows = _by_key([] if store is None else store.rows(shard, keys))
    rows |= _rows_elsewhere(run, shard, [key for key in kept if key not in rows and run.mp4_path(key).exists()])
    found = {}
    for key in keys:
        takes, mp4, mine = kept.get(key, []), run.mp4_path(key), tuple(rows.get(key, ()))
        if mp4.exists():
            number = 1 + max((take.number for take in takes), default=0)
            if takes and _is_present(run, shard, key, takes[-1]):
                copy = takes.pop()
                number, mine = copy.number, mine or copy.rows
            takes.append(Take(number=number, mp4=mp4, rows=mine))
        if takes:
            found[key] = takes
    return found


def best_takes(run: RunDir, shard: int, keys: Collection[str]) -> dict[str, Take]:
    """The take that is delivered of each key that has a video: the one nearest to accepted, of equals the first.

    A new take that is not scored yet does not replace an older one. Without rules it is the present one, or else the newest.
    """
    scoring = run.scoring()
    accept = AcceptConfig() if scoring is None else scoring.config.accept
    return {key: _best(takes, accept) for key, takes in takes_of(run, shard, keys).items()}


def _best(takes: Sequence[Take], accept: AcceptConfig) -> Take:
    if not (accept.at_least or accept.at_most):
        return takes[-1]
    judged = [take for take in takes if take.rows or take.kept is not None]
    return min(judged or takes, key=lambda take: shortfall(take.rows, accept))


def _rows_elsewhere(run: RunDir, shard: int, keys: Collection[str]) -> dict[str, list[Score]]:
    """What any way of scoring has measured of the present MP4 of each key, the newest of each metric."""
    found = {}
    for key, rows in _by_key(row for store in run.all_scores() if keys for row in store.rows(shard, keys)).items():
        with run.mp4_path(key).open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        same = [row for row in sorted(rows, key=lambda row: row.created) if row.video_sha256 == sha256]
        found[key] = list({row.metric: row for row in same}.values())
    return found


def _by_key(rows: Iterable[Score]) -> dict[str, list[Score]]:
    found: dict[str, list[Score]] = {}
    for row in rows:
        found.setdefault(row.key, []).append(row)
    return found


def rejected(run: RunDir) -> list[Rejected]:
    """Items whose best take is not good enough, in order of shard and key; those that have no more takes left, too.

    Raises ValueError for a run without rules.
    """
    scoring = run.scoring()
    if scoring is None or not (scoring.config.accept.at_least or scoring.config.accept.at_most):
        raise ValueError(f"{run.root}: no rules to reject by; set score.accept.at_least or at_most in its config, and submit")
    found = []
    for shard in range(run.environment().num_shards):
        for key, takes in takes_of(run, shard, run.shard_keys(shard)).items():
            rows = _best(takes, scoring.config.accept).rows
            reasons = broken_rules(rows, scoring.config.accept) if rows else ()
            if reasons:
                present = None if takes[-1].kept else takes[-1]
                found.append(Rejected(key=key, shard=shard, num_takes=len(takes), present=present, reasons=reasons))
    return found


def half_forgotten(run: RunDir, shard: int, keys: Collection[str]) -> set[str]:
    """Whose newest kept take is the one that the run itself still has a record of: make_room has died before its end."""
    last = {key: kept[-1] for key in keys if (kept := kept_takes(run, key))}
    return {key for key, take in last.items() if _has_record_of(run, shard, key, take)}


def make_room(run: RunDir, shard: int, keys: Sequence[str]) -> None:
    """Keep the present take of each key, and forget that it was made: the next submission makes another.

    Whoever dies in here may call it again: a take is complete under its name, and on the disk before anything is forgotten.
    Raises KeyError for a key whose video has no record.
    """
    for key in keys:
        _keep(run, shard, key)
    for key in keys:
        run.mp4_path(key).unlink(missing_ok=True)
        run.position_path(key).unlink(missing_ok=True)
    for store in run.all_scores():
        store.forget(shard, keys)
    for stage in reversed(RECORDED_STAGES):  # a video without a first frame would not be missed
        _forget_records(run, stage, shard, keys)


def _keep(run: RunDir, shard: int, key: str) -> None:
    present, kept = run.mp4_path(key), kept_takes(run, key)
    if not present.exists() or (kept and _is_present(run, shard, key, kept[-1])):
        return
    first_frame = run.record_path("first_frame", shard, key)
    # its own number even if older takes were put aside: the next take has the number, and so the seed, after the newest kept
    own = hdf5.load_first_frame(first_frame, key, run_digest=run.environment().run_digest).take
    number = max(own, *(1 + take.number for take in kept), 1)
    folder = run.takes_path(key)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".", dir=folder))
    scratch.chmod(0o755)
    try:
        shutil.copyfile(present, scratch / "video.mp4")
        fsync(scratch / "video.mp4")
        for stage in RECORDED_STAGES:
            hdf5.seal(scratch / f"{stage}.h5", [(key, run.record_path(stage, shard, key))])
        write_scores(scratch / "scores.csv", takes_of(run, shard, [key])[key][-1].rows)  # the folder is on the disk, too
        os.rename(scratch, folder / str(number))
        for place in (folder, *folder.parents[:3]):  # up to the run: all of them may be new
            fsync(place)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_present(run: RunDir, shard: int, key: str, take: Take) -> bool:
    """Whether the item's present video is this kept one, not yet forgotten."""
    present = run.mp4_path(key)
    same = take.mp4.exists() and present.exists() and filecmp.cmp(take.mp4, present, shallow=False)
    return same and _has_record_of(run, shard, key, take)


def _has_record_of(run: RunDir, shard: int, key: str, take: Take) -> bool:
    """Whether the run's own first frame, which make_room forgets last, is the one of this kept take.

    Told by when and how it was made: its take number says 1 in older records and in those of a rehearsal.
    """
    digest = run.environment().run_digest
    try:
        paths = (take.records({})["first_frame"], run.record_path("first_frame", shard, key))
        copied, own = (hdf5.load_provenance(path, key, run_digest=digest) for path in paths)
    except (OSError, KeyError, ValueError):  # not there, or damaged, which `verify` says
        return False
    return copied == own


def _forget_records(run: RunDir, stage: str, shard: int, keys: Collection[str]) -> None:
    for key in keys:
        run.part_path(stage, key).unlink(missing_ok=True)
    sealed = run.sealed_path(stage, shard)
    if not sealed.exists():
        return
    left = [key for key in hdf5.sealed_keys(sealed) if key not in set(keys)]
    if left:
        hdf5.seal(sealed, [(key, sealed) for key in left])
    else:
        sealed.unlink()
