"""Is a run what it says it is? Frozen files, every record to its last byte, every MP4 to its last frame, scores.

Changes nothing; knows nothing of models and schedulers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ipt2v.config import RunConfig
from ipt2v.hdf5 import Found
from ipt2v.mp4 import Mp4Facts
from ipt2v.package_reading import Progress, Read, ToRead, Unreadable, read_all
from ipt2v.package_settings import Level, PackageRules, problems_of
from ipt2v.records import Item, Score, item_seed, take_seed
from ipt2v.run_dir import RECORDED_STAGES, Environment, RunDir
from ipt2v.score_dir import ScoreDir, read_scores
from ipt2v.takes import Take, best_takes

PART = -1  # in place of a shard: a file of one record
MAX_TAKES = 100  # of an item, whose seeds are known as the run's own
Kind = Literal["frozen", "missing", "video", "part", "record", "list", "file", "take", "extra", "scores"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that is wrong with one file."""

    kind: Kind
    path: Path
    what: str
    keys: tuple[str, ...] = ()  # items that it concerns
    stage: str = ""
    shard: int = PART
    level: Level = "required"

    def line(self, root: Path) -> str:
        """File, item where the file's name does not say it, and what is wrong."""
        place = self.path.relative_to(root) if self.path.is_relative_to(root) else self.path
        item = f"{self.keys[0]}: " if self.kind == "record" and self.keys else ""
        return f"{place}: {item}{self.what}"


@dataclass(slots=True, kw_only=True)
class Look:
    """A run as it was found."""

    run: RunDir
    rules: PackageRules
    config: RunConfig
    environment: Environment
    items: dict[str, Item]
    shard_of: dict[str, int]
    is_whole: bool  # every item was looked at
    faults: list[Fault] = field(default_factory=list)
    delivered: dict[str, Path] = field(default_factory=dict)  # key -> the MP4 of its best take
    scores: dict[str, tuple[Score, ...]] = field(default_factory=dict)  # key -> what was measured of that MP4
    facts: dict[Path, Mp4Facts] = field(default_factory=dict)
    records: dict[str, dict[str, Found]] = field(
        default_factory=lambda: {stage: {} for stage in RECORDED_STAGES}
    )  # the good ones
    missing: list[str] = field(default_factory=list)  # items without an MP4
    good_keys: dict[Path, set[str]] = field(default_factory=dict)  # of each file of records
    num_files: int = 0
    num_unchecked: int = 0  # records of older files, without a checksum

    def problems(self, level: Level = "required") -> list[Fault]:
        return [fault for fault in self.faults if fault.level == level]


def frozen_faults(run: RunDir) -> list[Fault]:
    """What of the frozen files is not as it was frozen. Raises ValueError if there is no run folder."""
    if not run.environment_path.is_file():
        run.environment()
    checks = ((run.environment_path, run.environment), (run.config_path, run.config), (run.manifest_path, run.manifest))
    faults = []
    for path, read in checks:
        try:
            read()
        except (ValueError, TypeError, KeyError, OSError) as error:
            faults.append(Fault(kind="frozen", path=path, what=told(error, path)))
            if path == run.environment_path:  # the others are compared with it
                return faults
    return faults or list(_shard_faults(run))


def _shard_faults(run: RunDir) -> Iterator[Fault]:
    items, seen = {item.key: item for item in run.manifest()}, dict[str, Path]()
    for shard in range(run.environment().num_shards):
        path = run.shard_path(shard)
        try:
            mine = run.shard(shard)
        except (ValueError, OSError) as error:
            yield Fault(kind="frozen", path=path, what=told(error, path))
            continue
        for item in mine:
            if items.get(item.key) != item:
                yield Fault(kind="frozen", path=path, what=f"{item.key} is not as in manifest.jsonl")
            if seen.setdefault(item.key, path) != path:
                yield Fault(kind="frozen", path=path, what=f"{item.key} is in {seen[item.key].name}, too")
    lost = [key for key in items if key not in seen]
    if lost:
        what = f"{len(lost)} items are in no readable list of shards/ ({lost[0]}, ...)"
        yield Fault(kind="frozen", path=run.manifest_path, what=what)


def told(error: Exception, path: Path) -> str:
    """An error's text, in one line, without the name of the file that it is about."""
    return " ".join(str(error).replace(f"{path}: ", "").split())


def look_at(run: RunDir, rules: PackageRules, *, only: Collection[str] | None = None, progress: Progress | None = None) -> Look:
    """Everything that is wrong with a run; `only` with these items. Raises ValueError if a frozen file has been changed."""
    if faults := frozen_faults(run):
        raise ValueError(f"{faults[0].path}: {faults[0].what}")
    shards = {shard: run.shard(shard) for shard in range(run.environment().num_shards)}
    items = {item.key: item for mine in shards.values() for item in mine if only is None or item.key in only}
    shard_of = {item.key: shard for shard, mine in shards.items() for item in mine if item.key in items}
    look = Look(
        run=run,
        rules=rules,
        config=run.config(),
        environment=run.environment(),
        items=items,
        shard_of=shard_of,
        is_whole=only is None,
    )
    for key, take in _delivered(look).items():
        look.delivered[key], look.scores[key] = take.mp4, take.rows
    videos = {run.mp4_path(key): key for key in items if run.mp4_path(key).is_file()}
    takes = {path: key for key, path in look.delivered.items() if path not in videos}
    stored = list(_stored(look)) if rules.checks.records.rule != "off" else []
    in_takes = [(stage, path.with_name(f"{stage}.h5")) for path in takes for stage in RECORDED_STAGES if stored]
    digest = look.environment.run_digest
    records = [path for _, _, path in stored] + [path for _, path in in_takes]
    files = [ToRead(path, digest) for path in records] + [ToRead(path) for path in videos | takes]
    read = read_all(files, progress)
    look.num_files = len(files)
    for stage, shard, path in stored:
        _judge_records(look, stage, shard, path, read[ToRead(path, digest)])
    for path, key in (videos | takes).items():
        _judge_video(look, key, path, read[ToRead(path)])
    _find_missing(look, set(videos.values()))
    for stage, path in in_takes:
        _judge_take(look, stage, takes[path.with_name("video.mp4")], path, read[ToRead(path, digest)])
    look.faults += _strays(look) if look.is_whole else ()
    _compare_scores(look)
    return look


def _delivered(look: Look) -> dict[str, Take]:
    """The take of each item that has an MP4: of those that were kept the best, if it is better than the present one."""
    by_shard: dict[int, list[str]] = {}
    for key, shard in look.shard_of.items():
        by_shard.setdefault(shard, []).append(key)
    best = {key: take for shard, keys in by_shard.items() for key, take in best_takes(look.run, shard, keys).items()}
    return {key: best[key] for key in look.items if key in best and best[key].mp4.is_file()}


def _judge_take(look: Look, stage: str, key: str, path: Path, read: Read) -> None:
    """A record of a take that was kept: it says how the delivered video was made."""
    found = read.get(key, Found(problem=f"holds no record of {key}")) if isinstance(read, dict) else None
    what = read.problem if isinstance(read, Unreadable) else found.problem if found else "no file of records"
    if found is not None and not what:
        what = _provenance_problem(look, stage, key, PART, found)
    if what or found is None:
        level = look.rules.checks.records.rule
        look.faults.append(Fault(kind="take", path=path, what=what, keys=(key,), level=level))
    else:
        look.records[stage][key] = found


def _stored(look: Look) -> Iterator[tuple[str, int, Path]]:
    """(stage, shard, file) of every file of records; -1 for a part."""
    for stage in RECORDED_STAGES:
        for shard in sorted(set(look.shard_of.values())):
            if (path := look.run.sealed_path(stage, shard)).is_file():
                yield stage, shard, path
        parts = (look.run.part_path(stage, key) for key in look.items)
        yield from ((stage, PART, path) for path in parts if path.is_file())


def _judge_records(look: Look, stage: str, shard: int, path: Path, read: Read) -> None:
    """Keep the good records of a file, and say what is wrong with the others."""
    about = {"path": path, "stage": stage, "shard": shard, "level": look.rules.checks.records.rule}
    if not isinstance(read, dict):
        what = read.problem if isinstance(read, Unreadable) else "no file of records"
        keys = tuple(key for key in look.items if shard in (PART, look.shard_of[key]))
        keys = tuple(key for key in keys if shard != PART or look.run.part_path(stage, key) == path)
        look.faults.append(Fault(kind="part" if shard == PART else "file", what=what, keys=keys, **about))  # type: ignore[arg-type]
        return
    for key, found in read.items():
        if key not in look.items and not look.is_whole:
            continue
        if problem := found.problem or _provenance_problem(look, stage, key, shard, found):
            kind = "part" if shard == PART else "record"
            look.faults.append(Fault(kind=kind, what=problem, keys=(key,), **about))  # type: ignore[arg-type]
            continue
        look.num_unchecked += not found.has_checksum
        look.records[stage].setdefault(key, found)
        look.good_keys.setdefault(path, set()).add(key)
        if not found.is_listed:
            what = f"holds {key}, but its list of keys does not say so"
            look.faults.append(Fault(kind="list", what=what, keys=(key,), **about))  # type: ignore[arg-type]


def _provenance_problem(look: Look, stage: str, key: str, shard: int, found: Found) -> str:
    """What of a record's own story is not the run's."""
    if key not in look.items or shard not in (PART, look.shard_of[key]):
        return "of no item of this file"
    provenance = found.provenance
    assert provenance is not None, "a record without a problem has its provenance"
    weights = look.environment.weights
    other = sorted(
        name for name in weights.keys() | provenance.weights.keys() if weights.get(name) != provenance.weights.get(name)
    )
    if other:
        return f"made with other weights than the run was frozen with: {', '.join(other)}"
    seeds = (item_seed(take_seed(look.config.seed, key, take), key, "video") for take in range(1, MAX_TAKES + 1))
    if stage == "video" and provenance.seed not in seeds:
        return f"made with seed {provenance.seed}, which is none of this item's"
    return ""


def _judge_video(look: Look, key: str, path: Path, read: Read) -> None:
    is_present = path == look.run.mp4_path(key)
    about = {"kind": "video" if is_present else "take", "path": path, "keys": (key,), "stage": "video" if is_present else ""}
    if not isinstance(read, Mp4Facts):
        what = read.problem if isinstance(read, Unreadable) else "no MP4"
        look.faults.append(Fault(what=what, **about))  # type: ignore[arg-type]
        return
    look.facts[path] = read
    found = problems_of(read, look.rules.checks, look.config)
    look.faults += [Fault(what=one.text, level=one.level, **about) for one in found]  # type: ignore[arg-type]


def _find_missing(look: Look, videos: Collection[str]) -> None:
    """Items without a video, and videos without the records that say how they were made."""
    told = {key for fault in look.faults if fault.kind in ("record", "part", "file") for key in fault.keys}
    failures = {failure.key: failure for failure in look.run.failures()}
    for key in look.items:
        path, stage, level = look.run.mp4_path(key), "video", "required"
        if key not in look.delivered:
            what = "missing"
            if key in look.records["video"]:
                what += ": its latents are there, and are decoded by the next submission"
            elif key in failures:
                what += f": failed in {failures[key].stage}: {' '.join(failures[key].reason.split())}"
            look.missing.append(key)
            look.faults.append(Fault(kind="missing", path=path, what=what, keys=(key,), stage=stage))
            continue
        for stage in RECORDED_STAGES if key in videos else ():
            level = look.rules.checks.records.rule
            if level != "off" and key not in look.records[stage] and key not in told:
                kind = "missing" if stage == "first_frame" else "video"
                what = f"no {stage} record says how it was made"
                look.faults.append(Fault(kind=kind, path=path, what=what, keys=(key,), stage=stage, level=level))  # type: ignore[arg-type]


def _strays(look: Look) -> list[Fault]:
    """MP4s and records that are of no item: nobody reads them, but somebody has put them there."""
    run, level = look.run, look.rules.checks.extra.rule
    if level == "off":
        return []
    known = {run.mp4_path(key) for key in look.items} | {
        run.part_path(stage, key) for stage in RECORDED_STAGES for key in look.items
    }
    found = [path for path in (run.root / "video").rglob("*") if path.suffix.lower() == ".mp4"]
    found += [path for stage in RECORDED_STAGES for path in (run.root / stage / "parts").rglob("*.h5")]
    return [
        Fault(kind="extra", path=path, what="of no item of the test set", level=level)
        for path in sorted(found)
        if path not in known and not path.name.startswith(".") and not path.is_dir()  # an identity may be called x.mp4
    ]


def _compare_scores(look: Look) -> None:
    """Scores that are of other bytes than those that are there: one of both has changed since."""
    level = look.rules.checks.scores.rule
    if level == "off":
        return
    for store in look.run.all_scores():
        for path in _score_files(store):
            try:
                rows = read_scores(path)
            except ValueError as error:
                look.faults.append(Fault(kind="scores", path=path, what=told(error, path), level=level))
                continue
            for key, sha256 in {row.key: row.video_sha256 for row in rows}.items():
                mp4 = look.run.mp4_path(key)
                if mp4 in look.facts and sha256 != look.facts[mp4].sha256:
                    what = f"sha256 {look.facts[mp4].sha256[:12]}, but its scores were measured of {sha256[:12]}"
                    look.faults.append(Fault(kind="video", path=mp4, what=what, keys=(key,), stage="video", level=level))


def _score_files(store: ScoreDir) -> list[Path]:
    found = [*store.folder.glob("*.csv"), *(store.folder / "parts").rglob("*.csv")]
    return sorted(path for path in found if not path.is_dir())
