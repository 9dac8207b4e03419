"""The commands of `ipt2v` about what leaves a run: its table, its page, the leaderboard's package, a data set."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli_options import RunArgument

if TYPE_CHECKING:
    from ipt2v.export_formats import Done
    from ipt2v.package_look import Look
    from ipt2v.package_reading import Progress

MAX_LINE = 600  # characters of a fault
MAX_LEFT_OUT = 20  # lines; the manifest has all

app = typer.Typer()


@app.command(
    epilog="Examples: ipt2v table runs/r2v-1a2b3c4d runs/t2i_i2v-5e6f7a8b;  ipt2v table runs/r2v-1a2b3c4d --out scores --vbench"
)
def table(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders; the others are compared with the first")],
    out: Annotated[
        Path | None, typer.Option("--out", file_okay=False, help="folder for table.md, .csv, .json; else the first run's")
    ] = None,
    vbench: Annotated[
        bool, typer.Option("--vbench", help="OC, AQ, IQ, MS and DD as VBench's leaderboard normalises them")
    ] = False,
) -> None:
    """Print scores as a table: mean and interval of each run, the paper's numbers beside, differences on equal items."""
    from ipt2v.atomic import write_text
    from ipt2v.run_dir import RunDir
    from ipt2v.table import as_csv, as_json, as_markdown, make_table, scored

    found = [scored(RunDir(run)) for run in runs]
    lines = make_table(found, normalised=vbench)
    text = as_markdown(lines)
    print(text, end="")
    folder = out or runs[0]
    for name, content in (("table.md", text), ("table.csv", as_csv(lines)), ("table.json", as_json(lines))):
        write_text(folder / name, content)
    for one in found:
        if one.num_missing:
            print(f"{one.name}: {one.num_missing} videos are not scored")
        if left := one.num_rejected - one.num_used_up:
            print(f"{one.name}: {left} videos are rejected; `ipt2v submit CONFIG --rejected` makes them again")
        if one.num_used_up:
            told = "are rejected and have had all takes (score.accept.max_takes): the best of them is delivered"
            print(f"{one.name}: {one.num_used_up} videos {told}")
    print(f"{folder / 'table.md'}, .csv and .json")


TestsetOption = Annotated[
    str | None,
    typer.Option("--testset", metavar="NAME|FILE", help="ipvg2025-facial, ipvg2025-fullbody, ipvg2026-facial, or a YAML file"),
]


@app.command(
    epilog="Examples: ipt2v package runs/vace_14b_480p-1a2b3c4d --testset ipvg2025-fullbody;  "
    "ipt2v package runs/vace_14b_480p-1a2b3c4d --fill runs/vace_1b_480p-5e6f7a8b. Exit code 1 if nothing was packed, or not all"
)
def package(
    run: RunArgument,
    testset: TestsetOption = None,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="pack what there is")] = False,
    fill: Annotated[
        Path | None, typer.Option("--fill", metavar="RUN", help="a run of the same items: gives what is missing or broken")
    ] = None,
) -> None:
    """Check every video and record to its last byte, zip the videos for the leaderboard, and write a page to look at.

    If something is wrong, all of it is named, a line each, and nothing is packed. Beside the archive: a manifest that says
    how each video was made, and checksums.
    """
    from ipt2v.package import RefusedError, write_package
    from ipt2v.package_settings import load_rules
    from ipt2v.report import write_report
    from ipt2v.run_dir import RunDir
    from launch.fault_text import printable

    opened = RunDir(run)
    rules = load_rules(testset, opened.environment().testset_format)
    try:
        with progress_bar("checking") as progress:
            other = None if fill is None else RunDir(fill)
            written = write_package(opened, rules=rules, allow_missing=allow_missing, fill=other, progress=progress)
    except RefusedError as error:
        print("\n".join(printable(line, MAX_LINE) for line in error.lines), file=sys.stderr)
        print(
            f"error: {run}: {len(error.lines)} problems, nothing packed; `ipt2v verify {run}` says how to mend it",
            file=sys.stderr,
        )
        raise typer.Exit(1) from None
    for line in (*(f"filled from {fill}: {what}" for what in written.filled.values()), *written.warnings):
        print(f"note: {printable(line, MAX_LINE)}")
    for archive in written.archives:
        print(f"{archive}  {written.num_videos} videos" + (f", {len(written.missing)} missing" if written.missing else ""))
    print(f"{write_report(opened)}")
    raise typer.Exit(1 if written.missing else 0)


@app.command(
    epilog="Examples: ipt2v verify runs/vace_14b_480p-1a2b3c4d;  ipt2v verify runs/vace_14b_480p-1a2b3c4d --repair. "
    "Exit code 1 if something is broken or missing"
)
def verify(
    run: RunArgument,
    testset: TestsetOption = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="put the broken aside, in RUN/broken: the next submission makes just that")
    ] = False,
) -> None:
    """Read every record to its last byte and every video to its last frame; name what is broken and how it is made again."""
    from ipt2v.package_look import frozen_faults, look_at
    from ipt2v.package_settings import load_rules
    from ipt2v.run_dir import RunDir
    from ipt2v.verify import strict, verdict
    from launch.fault_text import printable

    opened = RunDir(run)
    if faults := frozen_faults(opened):
        for fault in faults:
            print(f"{fault.line(opened.root)}; restore it: all else follows from it")
        print(f"{len(faults)} frozen files are not as they were frozen; nothing else was looked at")
        raise typer.Exit(1)
    rules = strict(load_rules(testset, opened.environment().testset_format))
    with progress_bar("reading") as progress:
        look = look_at(opened, rules, progress=progress)
    print("\n".join(printable(line, MAX_LINE) for line in verdict(look)))
    if look.problems():
        if repair:
            _put_aside(look)
        print("\n".join(_way_back(look, is_repaired=repair)))
    raise typer.Exit(1 if look.problems() else 0)


def _way_back(look: Look, *, is_repaired: bool) -> list[str]:
    """The commands that make again what is broken or missing, in their order."""
    from ipt2v.verify import failed_items
    from launch.retry import rename_lines, submit_command, submitted_root

    run, failed, commands = submitted_root(look.run), failed_items(look), list[str]()
    if not is_repaired and any(not fault.keys or not failed.keys() >= set(fault.keys) for fault in look.problems()):
        commands.append(shlex.join(["ipt2v", "verify", str(run), "--repair"]))
    if failed:
        commands.append(shlex.join(["ipt2v", "retry", str(run), "--failed"]))
    return [*rename_lines(look.run), "made again by:", *(f"  {line}" for line in (*commands, submit_command(look.run)))]


def _put_aside(look: Look) -> None:
    """Raises ValueError if somebody is at work on the run, or may be."""
    from ipt2v.verify import repair
    from launch.lock import run_lock
    from launch.queue import is_idle

    with run_lock(look.run, "verify --repair"):
        if not is_idle(look.run):
            raise ValueError(f"{look.run.root}: elements wait or run, or squeue does not answer; `ipt2v cancel` them, or wait")
        done = repair(look)
    print(f"put aside: {len(done.moved)} files" + (f", now in {done.folder}" if done.moved else ""))


@app.command(
    epilog="Example: ipt2v diff old/manifest.json runs/vace_14b_480p-1a2b3c4d. Exit code 1 if they differ, as of diff(1)"
)
def diff(
    old: Annotated[Path, typer.Argument(metavar="PACKAGE", help="a manifest.json, its folder, or a run folder")],
    new: Annotated[Path, typer.Argument(metavar="PACKAGE", help="the same, of what came later")],
) -> None:
    """Say what changed between two packages: videos added, removed or changed, and why; settings."""
    from ipt2v.package_manifest import differences, load_manifest
    from launch.fault_text import printable

    lines = [printable(line, MAX_LINE) for line in differences(load_manifest(old), load_manifest(new))]
    print("\n".join(lines) or "the same")
    raise typer.Exit(1 if lines else 0)


@app.command(
    epilog="Examples: ipt2v report runs/vace_14b_480p-1a2b3c4d;  "
    "ipt2v report runs/vace_14b_480p-1a2b3c4d runs/vace_1b_480p-5e6f7a8b"
)
def report(
    run: RunArgument,
    other: Annotated[Path | None, typer.Argument(metavar="RUN2", help="another run, to stand beside the first")] = None,
) -> None:
    """Write RUN/report.html: pictures, prompts, videos and scores of every item, to search and sort; of two runs, in step."""
    from ipt2v.report import shared_keys, write_report
    from ipt2v.run_dir import RunDir

    opened, beside = RunDir(run), None if other is None else RunDir(other)
    print(f"{write_report(opened, beside)}")
    if beside is not None:
        print(f"{len(shared_keys(opened, beside))} items are in both runs")


@contextmanager
def progress_bar(what: str) -> Iterator[Progress | None]:
    """To be told of files that are done; nothing where nobody looks."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # refreshed by us: the processes that read are forked, which another thread does not survive
    with Bar(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total, refresh=True)


class ExportFormat(StrEnum):
    """What a data set is made of."""

    webdataset = "webdataset"
    parquet = "parquet"
    folder = "folder"


@app.command(
    epilog="Examples: ipt2v export runs/vace_14b_480p-1a2b3c4d --to webdataset --out shared;  "
    "ipt2v export runs/vace_14b_480p-1a2b3c4d --to folder --out shared --with-references. "
    "Exit code 1 if items without a video were left out"
)
def export(
    run: RunArgument,
    to: Annotated[ExportFormat, typer.Option("--to", help="tars for WebDataset, Parquet, or plain files with a listing")],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="a new folder; an earlier export of the run is replaced")],
    shard_mb: Annotated[int, typer.Option("--shard-mb", min=1, help="megabytes of a tar or a Parquet file, at most")] = 1000,
    with_references: Annotated[
        bool,
        typer.Option("--with-references", help="the test set's photos, too, as PNG; only if its licence lets you pass them on"),
    ] = False,
) -> None:
    """Share a run as a data set: videos as delivered, first frames as PNG, prompts, seeds, scores, and how each was made.

    The reference photos are the test set's and are not ours to pass on: they are left out unless you say --with-references.
    Beside the data: manifest.json, with the SHA-256 of each file and what was left out. Nothing is decoded: `ipt2v verify`
    says first whether all is whole.
    """
    from ipt2v.export import ExportOptions, write_export
    from ipt2v.run_dir import RunDir
    from launch.fault_text import printable

    opened, options = RunDir(run), ExportOptions(to=to.value, shard_mb=shard_mb, with_references=with_references)
    is_rehearsal = opened.config().rehearsal.enabled
    with progress_bar("exporting") as progress:
        told = None if progress is not None or to == ExportFormat.folder else _print_shard
        export = write_export(opened, out, options, progress=progress, told=told)
    for one in export.left_out[:MAX_LEFT_OUT]:
        print(printable(f"left out: {one.key}: {one.reason}", MAX_LINE), file=sys.stderr)
    if (more := len(export.left_out) - MAX_LEFT_OUT) > 0:
        print(f"left out: {more} more; {export.folder / 'manifest.json'} names them", file=sys.stderr)
    if is_rehearsal:
        print("note: a rehearsal: no model has made these videos")
    left = f", {len(export.left_out)} left out" if export.left_out else ""
    print(f"{export.folder}  {export.num_items} videos{left}, {len(export.files)} files, {export.num_bytes / 1e9:.2f} GB")
    raise typer.Exit(1 if export.left_out else 0)


def _print_shard(done: Done, num_bytes: int) -> None:
    print(f"{done.name}  {done.num_items} videos, {num_bytes / 1e6:.0f} MB", flush=True)
