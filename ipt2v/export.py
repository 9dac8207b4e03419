"""A run as a data set: a folder of tars, Parquet files or plain files, with a manifest; whole under its name, or not there.

Knows neither models nor schedulers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from ipt2v.atomic import fsync
from ipt2v.export_formats import FORMATS, MANIFEST, Done, Format
from ipt2v.export_sample import LeftOut, Sample, Source, find_sources, most_bytes, read_samples
from ipt2v.run_dir import RunDir

FORM = "ipt2v-export-1"  # of the manifest

# (items that are dealt with, of how many)
Progress = Callable[[int, int], None]
# a file that is complete, its bytes
Told = Callable[[Done, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What is wanted of an export."""

    to: str  # of FORMATS
    shard_mb: int = 1000
    with_references: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What write_export wrote."""

    folder: Path
    num_items: int
    files: dict[str, dict[str, str | int]]  # name -> sha256, bytes, items
    left_out: tuple[LeftOut, ...]

    @property
    def num_bytes(self) -> int:
        return sum(int(file["bytes"]) for file in self.files.values())


def write_export(
    run: RunDir, out: Path, options: ExportOptions, *, progress: Progress | None = None, told: Told | None = None
) -> Export:
    """Write every item that has a video; the others are left out, and listed.

    Raises ValueError if the folder is of somebody else, the disk too small, a library missing, or there is nothing to write.
    """
    form = _format(options.to)
    out, environment, sources = out.resolve(), run.environment(), find_sources(run)
    digest = environment.run_digest
    check_target(out, digest)
    _check_space(run, out, sources, options)
    left_out = list[LeftOut]()
    files = dict[str, dict[str, str | int]]()
    found = read_samples(sources, run_digest=digest, with_references=options.with_references)
    with new_folder(out, digest) as scratch:
        samples = _samples(found, left_out, len(sources), progress)
        with closing(samples), closing(form.write(scratch, _stem(run), samples, options.shard_mb * 10**6)) as written:
            for done in written:
                files[done.name] = _sealed(scratch, done)
                if told is not None:
                    told(done, int(files[done.name]["bytes"]))
        num_items = sum(int(file["items"]) for file in files.values())
        if not num_items:
            why = f"{left_out[0].key}: {left_out[0].reason}" if left_out else "it has no items"
            raise ValueError(f"{run.root}: nothing to export: {why}")
        export = Export(folder=out, num_items=num_items, files=files, left_out=tuple(left_out))
        _save_manifest(scratch, run, options, export)
    return export


def _format(name: str) -> Format:
    """The row of FORMATS. Raises ValueError if there is none, or its library is not installed."""
    if name not in FORMATS:
        raise ValueError(f"export: format {name!r} unknown; known: {', '.join(FORMATS)}")
    library = FORMATS[name].library
    if library and find_spec(library) is None:
        raise ValueError(f"export: --to {name} needs {library}, which is not installed; pip install 'ipt2v[export]'")
    return FORMATS[name]


def _stem(run: RunDir) -> str:
    """What shards are called: the run's folder, without what readers of shards take for a pattern."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", run.root.resolve().name)


def _samples(
    found: Iterator[Sample | LeftOut], left_out: list[LeftOut], num_items: int, progress: Progress | None
) -> Generator[Sample, None, None]:
    """The samples; what is left out goes to `left_out`."""
    for number, one in enumerate(found, start=1):
        if isinstance(one, LeftOut):
            left_out.append(one)
        else:
            yield one
        if progress is not None:
            progress(number, num_items)


def _sealed(folder: Path, done: Done) -> dict[str, str | int]:
    with (folder / done.name).open("rb") as file:
        os.fsync(file.fileno())
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"sha256": sha256, "bytes": file.tell(), "items": done.num_items}


def _save_manifest(folder: Path, run: RunDir, options: ExportOptions, export: Export) -> None:
    """No times and no paths: the same run gives the same bytes."""
    environment, store = run.environment(), run.scores()
    manifest = {
        "form": FORM,
        **asdict(options),
        "run": run.root.resolve().name,
        "run_digest": environment.run_digest,
        "manifest_digest": environment.manifest_digest,
        "code_version": environment.code_version,
        "weights": environment.weights,
        "scores": None if store is None else store.folder.name,
        "is_rehearsal": run.config().rehearsal.enabled,
        "num_items": export.num_items,
        "num_left_out": len(export.left_out),
        "left_out": [asdict(one) for one in export.left_out],
        "files": export.files,
    }
    with (folder / MANIFEST).open("x", encoding="ascii", newline="\n") as file:
        file.write(json.dumps(manifest, indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())


def check_target(out: Path, run_digest: str) -> None:
    """Raise ValueError unless the folder is absent, empty, or nothing but an earlier export of the run."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out}: a file; name a folder that is not there yet")
    present = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_symlink() or not path.is_dir()}
    if not present and not any(out.iterdir()):
        return
    try:
        old = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        is_ours, files = (old["form"], old["run_digest"]) == (FORM, run_digest), {*old["files"], MANIFEST}
    except (OSError, ValueError, KeyError, TypeError):
        is_ours, files = False, set()
    if not is_ours:
        raise ValueError(f"{out}: not empty, and no export of this run; name a folder that is not there yet")
    if strangers := sorted(present - files):
        raise ValueError(f"{out}: {strangers[0]!r} is not of the export that is there; move it away, or name another folder")


def _check_space(run: RunDir, out: Path, sources: Sequence[Source | LeftOut], options: ExportOptions) -> None:
    """Raise ValueError unless the disk has room for all of it, beside an older export."""
    config = run.config()
    picture_bytes = max(3 * size.width * size.height for size in (config.video, config.first_frame))
    there = [source for source in sources if isinstance(source, Source)]
    references = options.with_references
    num_bytes = sum(most_bytes(source, picture_bytes=picture_bytes, with_references=references) for source in there)
    folder = out
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        need = f"takes up to {num_bytes / 1e9:.2f} GB"
        raise ValueError(
            f"{out}: the export {need}, but its disk has {free / 1e9:.2f} GB free; free some, or name another disk"
        )


@contextmanager
def new_folder(out: Path, run_digest: str) -> Iterator[Path]:
    """A scratch folder beside `out`, which takes its place when the block ends well, and is removed when it does not."""
    scratch = out.with_name(f".{out.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}.tmp")
    scratch.mkdir(parents=True)
    try:
        yield scratch
        for folder in (scratch, *(path for path in scratch.rglob("*") if path.is_dir())):
            fsync(folder)
        check_target(out, run_digest)  # again: it took long
        _put_in_place(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _put_in_place(scratch: Path, out: Path) -> None:
    """Who is killed between the two renames finds the older export, whole, under its hidden name."""
    old = scratch.with_suffix(".old")
    if out.exists():
        os.rename(out, old)
    try:
        os.rename(scratch, out)
    except BaseException:
        if old.exists() and not out.exists():
            os.rename(old, out)
        raise
    fsync(out.parent)
    shutil.rmtree(old, ignore_errors=True)
