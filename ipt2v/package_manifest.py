"""What a package holds and how each video came to be, as one JSON file beside the archive; and what two of them differ in.

Has no times of its own, so that the same package has the same manifest. Knows no run folders.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ipt2v.atomic import write_text

FILE_NAME = "manifest.json"
VERSION = 1
# why a video may be another, in the order in which it is told
CAUSES = ("prompt", "spatial_prompt", "temporal_prompt", "seed", "code_version", "filled_from")
MAX_TEXT = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedVideo:
    """One video of a package."""

    key: str
    name: str  # in the archive
    archive: str
    sha256: str
    num_bytes: int
    run: str  # digest of the run that made it; a key of Manifest.runs
    filled_from: str | None  # name of that run's folder, if it is another
    prompt: str  # the test set's
    spatial_prompt: str | None
    temporal_prompt: str | None
    seed: int | None
    code_version: str | None
    scores: dict[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRun:
    """A run that videos are from."""

    folder: str
    config: dict[str, Any]  # as frozen
    weights: dict[str, str]  # folder name -> fingerprint


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """All of a package."""

    rules: dict[str, Any]
    runs: dict[str, PackedRun]  # by digest; the first is the one that was packed
    archives: dict[str, dict[str, str | int]]  # name -> sha256, bytes
    missing: tuple[str, ...]  # items without a video
    videos: tuple[PackedVideo, ...]
    version: int = field(default=VERSION)


def save_manifest(folder: Path, manifest: Manifest) -> None:
    write_text(folder / FILE_NAME, json.dumps(asdict(manifest), indent=1) + "\n")


def load_manifest(place: Path) -> Manifest:
    """Of a manifest's file, a folder with one, or a run folder. Raises ValueError if there is none, or it is none."""
    tried = (place, place / FILE_NAME, place / "package" / FILE_NAME)
    path = next((path for path in tried if path.is_file()), None)
    if path is None:
        raise ValueError(f"{place}: no {FILE_NAME} here, nor in package/; `ipt2v package RUN` writes one")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["version"] != VERSION:
            raise ValueError(f"version {found['version']}, expected {VERSION}")
        videos = tuple(PackedVideo(**video) for video in found["videos"])
        runs = {digest: PackedRun(**run) for digest, run in found["runs"].items()}
        return Manifest(**found | {"videos": videos, "runs": runs, "missing": tuple(found["missing"])})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a package's manifest ({error}); `ipt2v package RUN` writes it anew") from error


def differences(old: Manifest, new: Manifest) -> Iterator[str]:
    """A line for each thing that is not the same, and why, as far as the manifests know; none if nothing is."""
    yield from _changed_settings("rules", old.rules, new.rules)
    before, after = _first_run(old), _first_run(new)
    yield from _changed_settings("config", before.config, after.config)
    yield from _changed_settings("weights", before.weights, after.weights)
    ours, theirs = ({video.key: video for video in one.videos} for one in (old, new))
    yield from (f"removed {key} ({video.name})" for key, video in ours.items() if key not in theirs)
    yield from (f"added   {key} ({video.name})" for key, video in theirs.items() if key not in ours)
    for key, video in ours.items():
        if key in theirs and (reasons := _reasons((old, video), (new, theirs[key]))):
            yield f"changed {key}: {'; '.join(reasons)}"


def _first_run(manifest: Manifest) -> PackedRun:
    return next(iter(manifest.runs.values()), PackedRun(folder="", config={}, weights={}))


def _reasons(before: tuple[Manifest, PackedVideo], after: tuple[Manifest, PackedVideo]) -> list[str]:
    """What of a video is another; empty if it is the same file under the same name."""
    (old_manifest, old), (new_manifest, new) = before, after
    reasons = [f"name: {old.name} -> {new.name}"] if old.name != new.name else []
    if old.sha256 == new.sha256:
        return reasons
    causes = [
        f"{name}: {_short(getattr(old, name))} -> {_short(getattr(new, name))}"
        for name in CAUSES
        if getattr(old, name) != getattr(new, name)
    ]
    if old.run != new.run:
        weights = (old_manifest.runs[old.run].weights, new_manifest.runs[new.run].weights)
        causes += [line.replace("weights ", "weights: ", 1) for line in _changed_settings("weights", *weights)]
        causes.append(f"run: {old.run[:12]} -> {new.run[:12]}")
    told = "; ".join(causes) or "no cause known: same seed, prompts, weights, code and settings"
    return [*reasons, f"other pixels or bytes ({old.sha256[:12]} -> {new.sha256[:12]})", told]


def _changed_settings(kind: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    before, after = dict(_flat(old)), dict(_flat(new))
    for name in dict.fromkeys((*before, *after)):
        if before.get(name) != after.get(name):
            yield f"{kind} {name}: {_short(before.get(name))} -> {_short(after.get(name))}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _short(value: object) -> str:
    text = "nothing" if value is None else " ".join(str(value).split())
    return text if len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 3]}..."
