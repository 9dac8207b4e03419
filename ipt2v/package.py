"""Finished videos -> the leaderboard's archive, with a manifest and checksums beside it.

Nothing is written unless all is right. Knows neither models nor schedulers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unicodedata import normalize

from ipt2v.atomic import write_text
from ipt2v.manifest import in_natural_order, natural_key
from ipt2v.package_look import Look, look_at
from ipt2v.package_manifest import FILE_NAME, Manifest, PackedRun, PackedVideo, load_manifest, save_manifest
from ipt2v.package_reading import Progress
from ipt2v.package_settings import PackageRules, load_rules, member_name
from ipt2v.package_zip import Member, check_space, packed_bytes, split, write_zip
from ipt2v.records import Item
from ipt2v.run_dir import RunDir

CHECKSUMS_NAME = "sha256.txt"


class RefusedError(ValueError):
    """A run that is not packed; `lines` name everything that is wrong, one each."""

    def __init__(self, run: RunDir, lines: list[str]) -> None:
        more = f" and {len(lines) - 1} more" if len(lines) > 1 else ""
        super().__init__(f"{run.root}: not packed: {lines[0]}{more}")
        self.lines = lines


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """What write_package wrote."""

    archives: tuple[Path, ...]
    num_videos: int
    missing: tuple[str, ...]  # keys without a video
    filled: dict[str, str] = field(default_factory=dict)  # key -> why it was taken from the other run
    warnings: tuple[str, ...] = ()

    @property
    def archive(self) -> Path:
        """The only one, or the first."""
        return self.archives[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where an item's video is taken from."""

    item: Item
    look: Look
    name: str  # in the archive
    is_filled: bool

    @property
    def member(self) -> Member:
        path = self.look.delivered[self.item.key]
        facts = self.look.facts[path]
        return Member(name=self.name, path=path, sha256=facts.sha256, num_bytes=facts.num_bytes)


def write_package(
    run: RunDir,
    *,
    rules: PackageRules | None = None,
    allow_missing: bool = False,
    fill: RunDir | None = None,
    progress: Progress | None = None,
) -> Package:
    """Check every delivered MP4 by decoding it, and zip them under the names that the leaderboard wants.

    `fill` is a run of the same items that gives what is missing or broken; what is missing in both may be allowed, too. Raises
    RefusedError if anything is wrong that the rules require, or a video is missing (unless allowed), and ValueError if a frozen
    file of a run has been changed.
    """
    look = look_at(run, rules or load_rules(None, run.environment().testset_format), progress=progress)
    names, problems = _names(look)
    wrong = _wrong(look)
    other = None if fill is None or not wrong else look_at(fill, look.rules, only=wrong, progress=progress)
    filled, unfit = ({}, {}) if other is None else _filled(look, other, wrong)
    missing = tuple(key for key in look.missing if key not in filled)
    left_out = set(missing) if allow_missing else set[str]()
    for fault in look.problems():
        is_left_out = fault.kind == "missing" and left_out >= set(fault.keys)
        if not is_left_out and not (fault.keys and filled.keys() >= set(fault.keys)):
            problems.append(fault.line(run.root))
    problems += [line for key, line in unfit.items() if key not in left_out]
    if problems:
        raise RefusedError(run, problems)
    sources = [
        Source(item=look.items[key], look=other if other and key in filled else look, name=name, is_filled=key in filled)
        for key, name in names.items()
        if key not in missing
    ]
    archives = _write(look, sources, missing)
    warnings = (*(fault.line(run.root) for fault in look.problems("warn")), *_notes(look, names))
    return Package(archives=archives, num_videos=len(sources), missing=missing, filled=filled, warnings=warnings)


def _wrong(look: Look) -> dict[str, str]:
    """What another run may give: items that have something wrong with them, and what."""
    faults = [fault for fault in look.problems() if fault.kind != "extra"]
    return {key: fault.line(look.run.root) for fault in reversed(faults) for key in fault.keys if key in look.items}


def _filled(look: Look, other: Look, wrong: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Of the items in `wrong` those that the other run gives, and what is wrong with the rest there."""
    root, there = other.run.root, _wrong(other)
    filled, unfit = dict[str, str](), dict[str, str]()
    for key, what in wrong.items():
        mine, theirs = look.items[key], other.items.get(key)
        if theirs is None:
            unfit[key] = f"{root}: {key}: not to be filled from here: the run has no such item"
        elif (mine.prompt, mine.reference_sha256) != (theirs.prompt, theirs.reference_sha256):
            unfit[key] = f"{root}: {key}: not to be filled from here: another prompt or photo"
        elif key in there:
            unfit[key] = f"{root}: {there[key]}"
        else:
            filled[key] = what
    return filled, unfit


def _names(look: Look) -> tuple[dict[str, str], list[str]]:
    """key -> name in the archive, in the archive's order; and what is wrong with names."""
    names, problems, owners = dict[str, str](), list[str](), dict[str, str]()
    for key, number in _numbers(look).items():
        try:
            name = member_name(look.rules, look.items[key], number)
        except ValueError as error:
            problems.append(str(error))
            continue
        owner = owners.setdefault(normalize("NFC", name), key)
        if owner != key:
            problems.append(f"{key!r} and {owner!r} would both be {name!r} in the archive: rules.member must tell them apart")
        names[key] = name
    return dict(sorted(names.items(), key=lambda pair: natural_key(pair[1]))), problems


def _numbers(look: Look) -> dict[str, int]:
    """{n} of each item: its place in eval.json, which is its prompt_id there, or in natural order; from 1."""
    if look.environment.testset_format == "evaljson":
        return {key: int(item.prompt_id) for key, item in look.items.items()}
    return {item.key: number for number, item in enumerate(in_natural_order(look.items.values()), start=1)}


def _notes(look: Look, names: dict[str, str]) -> Iterator[str]:
    """What is no fault, but may surprise who sends the package."""
    if look.config.testset.identities is not None:
        yield f"the run is of {look.config.testset.identities} identities only (testset.identities), not of the whole test set"
    folded: dict[str, str] = {}
    for name in names.values():
        if (first := folded.setdefault(name.casefold(), name)) != name:
            yield f"{name} and {first} are one file where upper and lower case are the same"
    if look.config.rehearsal.enabled:
        yield "a rehearsal: no model has made these videos"


def _write(look: Look, sources: list[Source], missing: tuple[str, ...]) -> tuple[Path, ...]:
    """Archives, checksums and manifest; the manifest last, so that a package with one is whole."""
    folder, members = look.run.package_path, [source.member for source in sources]
    parts = split(members, look.rules.max_part_bytes)
    check_space(folder, sum(map(packed_bytes, parts)))
    stem = look.rules.archive.removesuffix(".zip")
    names = [look.rules.archive if len(parts) == 1 else f"{stem}-{n}of{len(parts)}.zip" for n in range(1, len(parts) + 1)]
    old = _old_archives(folder)
    for name in (FILE_NAME, CHECKSUMS_NAME):
        (folder / name).unlink(missing_ok=True)
    archives: dict[str, dict[str, str | int]] = {}
    for name, part in zip(names, parts, strict=True):
        sha256 = write_zip(folder / name, part)
        archives[name] = {"sha256": sha256, "num_bytes": (folder / name).stat().st_size}
    for name in old - set(names):
        (folder / name).unlink(missing_ok=True)
    lines = [(member.name, member.sha256) for member in members] + [(name, one["sha256"]) for name, one in archives.items()]
    write_text(folder / CHECKSUMS_NAME, "".join(f"{sha256}  {name}\n" for name, sha256 in lines))
    archive_of = {member.name: name for name, part in zip(names, parts, strict=True) for member in part}
    save_manifest(folder, _manifest(look, sources, archive_of, archives, missing))
    return tuple(folder / name for name in names)


def _old_archives(folder: Path) -> set[str]:
    """What an earlier package has left and this one may not overwrite."""
    try:
        return {Path(name).name for name in load_manifest(folder).archives}
    except ValueError:
        return set()


def _manifest(
    look: Look,
    sources: list[Source],
    archive_of: dict[str, str],
    archives: dict[str, dict[str, str | int]],
    missing: tuple[str, ...],
) -> Manifest:
    looks = dict.fromkeys((look.run, *(source.look.run for source in sources)))
    runs = {}
    for run in looks:
        environment = run.environment()
        config = run.config().model_dump(mode="json", exclude={"score"})
        runs[environment.run_digest] = PackedRun(folder=run.root.name, config=config, weights=environment.weights)
    return Manifest(
        rules=look.rules.model_dump(mode="json"),
        runs=runs,
        archives=archives,
        missing=missing,
        videos=tuple(_packed(source, archive_of[source.name]) for source in sources),
    )


def _packed(source: Source, archive: str) -> PackedVideo:
    look, key, member = source.look, source.item.key, source.member
    record, first_frame = look.records["video"].get(key), look.records["first_frame"].get(key)
    provenance = None if record is None else record.provenance
    texts = {} if first_frame is None else first_frame.texts
    return PackedVideo(
        key=key,
        name=source.name,
        archive=archive,
        sha256=member.sha256,
        num_bytes=member.num_bytes,
        run=look.environment.run_digest,
        filled_from=look.run.root.name if source.is_filled else None,
        prompt=source.item.prompt,
        spatial_prompt=texts.get("spatial_prompt"),
        temporal_prompt=texts.get("temporal_prompt"),
        seed=None if provenance is None else provenance.seed,
        code_version=None if provenance is None else provenance.code_version,
        scores={row.metric: row.value for row in look.scores[key]},
    )
