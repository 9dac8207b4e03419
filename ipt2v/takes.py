"""Videos that were rejected, kept beside those that were made after them: of all takes of an item the best is delivered.

    takes/<key>/<number>/{video.mp4, scores.csv, first_frame.h5, video.h5}

A take has its number for a seed, so that it can be made again. Knows no metric but by its name.
"""

from __future__ import annotations

import filecmp
import math
import os
import shutil
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ipt2v import hdf5
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
    num_takes: int
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


def best_takes(run: RunDir, shard: int, keys: Collection[str]) -> dict[str, Take]:
    """The take that is delivered of each key that has a video: the one nearest to accepted, of equals the first.

    A new take that is not scored yet does not replace an older one. Without rules, or takes kept, it is the one there is.
    """
    scoring, store = run.scoring(), run.scores()
    rows: dict[str, list[Score]] = {}
    for row in [] if store is None else store.rows(shard, keys):
        rows.setdefault(row.key, []).append(row)
    accept = AcceptConfig() if scoring is None else scoring.config.accept
    with_takes = run.numbers_of_takes(keys)
    best = {}
    for key in keys:
        takes = kept_takes(run, key) if key in with_takes else []
        if run.mp4_path(key).exists() and (key in rows or not takes):
            number = 1 + max((take.number for take in takes), default=0)
            takes.append(Take(number=number, mp4=run.mp4_path(key), rows=tuple(rows.get(key, ()))))
        if takes:
            best[key] = min(takes, key=lambda take: shortfall(take.rows, accept))
    return best


def rejected(run: RunDir) -> list[Rejected]:
    """Items whose best take is not good enough, in order of shard and key; those that have no more takes left, too.

    Raises ValueError for a run without rules.
    """
    scoring = run.scoring()
    if scoring is None or not (scoring.config.accept.at_least or scoring.config.accept.at_most):
        raise ValueError(f"{run.root}: no rules to reject by; set score.accept.at_least or at_most in its config, and submit")
    found = []
    for shard in range(run.environment().num_shards):
        for key, take in best_takes(run, shard, run.shard_keys(shard)).items():
            reasons = broken_rules(take.rows, scoring.config.accept) if take.rows else ()
            if reasons:
                num_takes = len(kept_takes(run, key)) + run.mp4_path(key).exists()
                found.append(Rejected(key=key, num_takes=num_takes, reasons=reasons))
    return found


def make_room(run: RunDir, shard: int, keys: Sequence[str]) -> None:
    """Keep the present take of each key, and forget that it was made: the next submission makes another.

    Whoever dies in here may call it again: a take is complete under its name, and kept before anything is forgotten.
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
    if not present.exists() or (kept and filecmp.cmp(kept[-1].mp4, present, shallow=False)):
        return
    folder = run.takes_path(key)
    folder.mkdir(parents=True, exist_ok=True)
    number = 1 + max((take.number for take in kept), default=0)
    scratch = Path(tempfile.mkdtemp(prefix=".", dir=folder))
    scratch.chmod(0o755)
    try:
        shutil.copyfile(present, scratch / "video.mp4")
        for stage in RECORDED_STAGES:
            hdf5.seal(scratch / f"{stage}.h5", [(key, run.record_path(stage, shard, key))])
        store = run.scores()
        write_scores(scratch / "scores.csv", [] if store is None else store.rows(shard, [key]))
        os.rename(scratch, folder / str(number))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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
