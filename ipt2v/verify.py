"""Puts aside what is broken in a run, so that the next submission makes just that. Nothing is ever deleted.

Knows nothing of models and schedulers; that nobody is at work on the run is for the caller to see to.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from ipt2v import hdf5
from ipt2v.package_look import Fault, Look
from ipt2v.package_settings import Check, PackageRules
from ipt2v.run_dir import RECORDED_STAGES, RunDir

REMEDIES = {  # by kind of fault: what `repair` and the next submission make of it
    "missing": "made by the next submission",
    "video": "decoded again from its latents",
    "part": "made again",
    "record": "made again; the good records of the file are kept",
    "list": "the file is written anew from its records",
    "file": "its items are made again",
    "take": "put aside with all of this take: the best of the others is delivered",
    "extra": "put aside",
    "scores": "measured again",
}
HAS_FAILED = {  # by stage: of an item that no submission makes, as its failure record says that it cannot be made
    "first_frame": "`ipt2v retry {run} --failed`, then submit, tries it again; {photo}",
    "video": "`ipt2v retry {run} --failed`, then submit, makes it",
}


@dataclass(slots=True, kw_only=True)
class Repair:
    """What is put aside, and where."""

    run: RunDir
    folder: Path
    moved: list[Path] = field(default_factory=list)  # relative to the run

    def put_aside(self, path: Path) -> None:
        """Move a file, or a take's folder, below the folder, under the name that it had in the run."""
        if path.exists():
            target = self._target(path)
            os.replace(path, target)

    def keep_copy(self, path: Path) -> None:
        """The same for a file that will be replaced: it stays in place until then."""
        target = self._target(path)
        try:
            os.link(path, target)
        except OSError:  # no hard links on this file system
            shutil.copy2(path, target)

    def _target(self, path: Path) -> Path:
        name = path.relative_to(self.run.root)
        self.moved.append(name)
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        return self.folder / name


def strict(rules: PackageRules) -> PackageRules:
    """The rules with every record and score looked at: a package may do without, a run's integrity may not."""
    required = {name: Check() for name in ("records", "scores", "extra")}
    return rules.model_copy(update={"checks": rules.checks.model_copy(update=required)})


def photo_advice(run: RunDir) -> str:
    """What to do about an item that has failed in first_frame: what fails for good there is the reading of its photo."""
    packed = f"`ipt2v package RUN2 --fill {shlex.quote(str(run.root))}`"
    return (
        "with the same photo it fails again, with another one it is another run, RUN2, and this one stays as it is: "
        f"{packed} packs RUN2 with the videos of this one where they are of the same photo and prompt"
    )


def verdict(look: Look) -> list[str]:
    """A line for each fault with what becomes of it, and one that sums up."""
    root, faults, failed = look.run.root, look.problems(), failed_items(look)
    lines = [f"note: {fault.line(root)}" for fault in look.problems("warn")]
    lines += [f"{fault.line(root)}; {_remedy(look.run, fault, failed)}" for fault in faults]
    found = f"{len(faults)} problems" if faults else "whole"
    old = f"; {look.num_unchecked} older records have no checksum: known to be readable, no more" if look.num_unchecked else ""
    return [*lines, f"{root}: {look.num_files} files read: {found}{old}"]


def failed_items(look: Look) -> dict[str, str]:
    """key -> stage, of broken and missing items with a failure record: neither `repair` nor a submission makes them."""
    wanted = [key for fault in look.problems() if fault.kind in ("missing", "video") for key in fault.keys]
    lifted = {key for fault in look.problems() if fault.stage == "first_frame" for key in fault.keys}  # by `repair`
    no_frame, no_video = (look.run.failed(stage, wanted) for stage in RECORDED_STAGES)
    return dict.fromkeys(no_video - lifted, "video") | dict.fromkeys(no_frame, "first_frame")


def _remedy(run: RunDir, fault: Fault, failed: Mapping[str, str]) -> str:
    stages = [failed[key] for key in fault.keys if key in failed] if fault.kind in ("missing", "video") else []
    if not stages:
        return REMEDIES[fault.kind]
    return HAS_FAILED[stages[0]].format(run=shlex.quote(str(run.root)), photo=photo_advice(run))


def repair(look: Look) -> Repair:
    """Put aside each broken file, and what was made from a broken record; files of several records keep the good ones."""
    run, faults = look.run, look.problems()
    stamp, folder, number = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ"), run.root / "broken", 0
    while (folder / f"{stamp}{number or ''}").exists():
        number += 1
    done = Repair(run=run, folder=folder / f"{stamp}{number or ''}")
    for path in dict.fromkeys(fault.path for fault in faults if fault.kind in ("record", "list")):
        _write_anew(look, done, path, [fault for fault in faults if fault.path == path])
    for fault in faults:
        if fault.kind in ("part", "file", "extra", "scores"):
            done.put_aside(fault.path)
        if fault.kind == "take":
            done.put_aside(fault.path.parent)
        if fault.stage == "first_frame":  # of which a video could not be made
            for key in fault.keys:
                done.put_aside(run.failure_path("video", key))
    again = _videos_to_make(look)
    for key in again:
        done.put_aside(run.mp4_path(key))
        done.put_aside(run.failure_path("score", key))
    _forget_scores(look, again)
    return done


def _write_anew(look: Look, done: Repair, shard_file: Path, faults: list[Fault]) -> None:
    """A sealed shard without its broken records; aside as a whole if there is no good one."""
    kept = look.good_keys.get(shard_file, set()) - {key for fault in faults if fault.kind == "record" for key in fault.keys}
    good = [key for key in look.items if key in kept]
    if not good:
        done.put_aside(shard_file)
        return
    done.keep_copy(shard_file)
    hdf5.seal(shard_file, [(key, shard_file) for key in good])


def _videos_to_make(look: Look) -> list[str]:
    """Items whose MP4 is broken, or has lost the latents that it was decoded from."""
    faults = [fault for fault in look.problems() if fault.stage == "video" and fault.kind != "list"]
    lost = dict.fromkeys(key for fault in faults for key in fault.keys)
    return [key for key in lost if key in look.items and look.run.mp4_path(key).is_file()]


def _forget_scores(look: Look, keys: list[str]) -> None:
    by_shard: dict[int, list[str]] = {}
    for key in keys:
        by_shard.setdefault(look.shard_of[key], []).append(key)
    for store in look.run.all_scores():
        for shard, mine in by_shard.items():
            store.forget(shard, mine)
