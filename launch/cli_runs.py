"""The commands of `ipt2v` about a run folder that is there: look at it, explain it, let it go on, cancel it, pack it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli_options import RunArgument

if TYPE_CHECKING:
    from ipt2v.package_look import Look
    from ipt2v.package_reading import Progress

MAX_LINE = 600  # characters of a fault

app = typer.Typer()


@app.command(
    epilog="Examples: ipt2v status runs/vace_14b_480p-1a2b3c4d;  ipt2v status runs/vace_14b_480p-1a2b3c4d --watch. "
    "Exit code 1 if an item has failed. Rates are of active time: pauses of more than half an hour do not count"
)
def status(
    run: RunArgument,
    as_json: Annotated[bool, typer.Option("--json", help="for programs: a list of shards")] = False,
    with_rates: Annotated[bool, typer.Option("--rates", help="with --json: an object that has rates and failures too")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="a live view, until Ctrl-C; lines of text without a terminal")] = False,
    every: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="with --watch: between two looks")] = 5.0,
) -> None:
    """What is done, failed and missing, how fast, at what price, until when: from record files, and squeue if it answers."""
    from ipt2v.run_dir import RunDir
    from launch.progress import count_all
    from launch.status import Memory, json_rows, look_at, look_at_queue, status_lines
    from launch.status import as_json as all_facts

    if (as_json and watch) or (with_rates and not as_json):
        raise ValueError(
            "status: --json and --watch exclude each other, and --rates is for --json: the text has the rates always"
        )
    opened = RunDir(run)
    if watch:
        try:
            from launch.dashboard import watch as watch_run

            watch_run(opened, every)
        except KeyboardInterrupt:
            raise typer.Exit(0) from None
    opened.environment()  # a mistyped folder is no run, whatever the queue says
    queue = look_at_queue(opened)
    if as_json and not with_rates:
        counts = count_all(opened)
        print(json.dumps(json_rows(counts, queue), indent=1))
    else:
        look = look_at(opened, queue, Memory())
        counts = list(look.counts)
        print(json.dumps(all_facts(look), indent=1) if as_json else "\n".join(status_lines(look)))
    raise typer.Exit(1 if any(count.failed for count in counts) else 0)


@app.command(
    epilog="Examples: ipt2v logs runs/vace_14b_480p-1a2b3c4d;  ipt2v logs runs/vace_14b_480p-1a2b3c4d video 3 --rank 1 -f"
)
def logs(
    run: RunArgument,
    stage: Annotated[str | None, typer.Argument(help="first_frame, video or score; without it all logs are listed")] = None,
    shard: Annotated[int | None, typer.Argument(help="0-based")] = None,
    rank: Annotated[int, typer.Option(help="0-based; rank 0 writes the records")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="show what is written, until the element is over")] = False,
) -> None:
    """Print the logs of one rank of one shard, oldest submission first; or list all logs, those of failed elements first."""
    from ipt2v.run_dir import RunDir
    from launch.evidence import gather
    from launch.logs import follow as follow_logs
    from launch.logs import list_logs, print_logs
    from launch.queue import log_files

    opened = RunDir(run)
    opened.environment()
    if stage is None or shard is None:
        if stage is not None or follow:
            raise ValueError("logs: name STAGE and SHARD, as in `ipt2v logs RUN video 3`; with neither, all logs are listed")
        print("\n".join(list_logs(gather(opened))) or f"{run}: no log yet; `ipt2v status {run}` tells what has started")
        return
    opened.shard(shard)
    if follow:
        try:
            print(follow_logs(opened, stage, shard, rank))
        except KeyboardInterrupt:
            raise typer.Exit(0) from None
        return
    files = log_files(opened, stage, shard, rank)
    if not files:
        raise ValueError(f"{run}: no log of {stage} shard {shard} rank {rank} yet; `ipt2v status {run}` tells what has started")
    print_logs(files)


@app.command(
    epilog="Examples: ipt2v why runs/vace_14b_480p-1a2b3c4d id001/prompt1;  ipt2v why runs/vace_14b_480p-1a2b3c4d video 3"
)
def why(
    run: RunArgument,
    what: Annotated[list[str], typer.Argument(metavar="ITEM|STAGE SHARD", help="an item (id001/prompt1), or an element")],
) -> None:
    """Explain in plain words what has become of an item or an element: with the lines of the logs, and what to do."""
    from ipt2v.run_dir import RunDir
    from launch.evidence import why_lines

    print("\n".join(why_lines(RunDir(run), tuple(what))))


@app.command(epilog="Example: ipt2v nodes runs/vace_14b_480p-1a2b3c4d")
def nodes(run: RunArgument) -> None:
    """List the nodes on which elements have failed, and the line that keeps the bad ones out of the next submission."""
    from ipt2v.run_dir import RunDir
    from launch.evidence import all_faults, gather
    from launch.fault_text import node_lines

    opened = RunDir(run)
    opened.environment()
    known = gather(opened)
    print("\n".join((*node_lines(tuple(all_faults(known))), *(f"not known: {line}" for line in known.lost))))


@app.command(
    epilog="Examples: ipt2v retry runs/vace_14b_480p-1a2b3c4d --failed --stage video;  "
    "ipt2v retry runs/vace_14b_480p-1a2b3c4d id001/prompt1"
)
def retry(
    run: RunArgument,
    keys: Annotated[list[str] | None, typer.Argument(metavar="KEY", help="items: id001/prompt1")] = None,
    failed: Annotated[bool, typer.Option("--failed", help="all items that have failed")] = False,
    stage: Annotated[str | None, typer.Option("--stage", help="only what failed in first_frame, in video, or in score")] = None,
) -> None:
    """Let the next submission make failed items again. Their failure records and crash notes are kept in failure/retried."""
    from ipt2v.run_dir import STAGES, RunDir
    from launch.retry import retry as put_aside
    from launch.retry import retry_lines

    opened = RunDir(run)
    opened.environment()
    if stage not in (None, *STAGES):
        raise ValueError(f"--stage {stage!r} unknown; known: {', '.join(STAGES)}")
    if bool(keys) == failed:
        raise ValueError(f"retry: name items, or --failed for all {len(opened.failures())} that have failed")
    retried = put_aside(opened, keys or (), STAGES if stage is None else (stage,))
    print("\n".join(retry_lines(opened, retried)))


@app.command()
def cancel(run: RunArgument) -> None:
    """Cancel what waits or runs of a run. Finished items stay; `submit` goes on with the rest."""
    from ipt2v.run_dir import RunDir
    from launch.lock import Locked, run_lock
    from launch.queue import cancel as cancel_jobs

    opened = RunDir(run)
    opened.environment()  # a mistyped folder must not look like an idle run
    try:
        with run_lock(opened, "cancel"):  # else a submitter would go on with what it has in mind
            ids = cancel_jobs(opened)
    except Locked as error:
        if not error.what.endswith(("--on local", "--on here")):  # those stay for as long as the run takes
            raise
        ids = cancel_jobs(opened)
    print(f"cancelled {', '.join(ids)}" if ids else "nothing to cancel: no job of this run waits or runs")


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
    from launch.retry import submit_command

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
        print("made again by:" + ("" if repair else f"\n  ipt2v verify {run} --repair") + f"\n  {submit_command(opened)}")
    raise typer.Exit(1 if look.problems() else 0)


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
