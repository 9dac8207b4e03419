"""The commands of `ipt2v` about a run folder that is there: look at it, explain it, let it go on, cancel it."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from launch.cli_options import RunArgument

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
    from ipt2v.run_dir import STAGES, VERIFY_SPLIT, RunDir
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
    if stage not in (known := (*STAGES, VERIFY_SPLIT)):
        raise ValueError(f"logs: stage {stage!r} unknown; known: {', '.join(known)}")
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
    from launch.lock import Locked, end_local_driver, run_lock
    from launch.queue import cancel as cancel_jobs

    opened = RunDir(run)
    opened.environment()  # a mistyped folder must not look like an idle run
    try:
        with run_lock(opened, "cancel"):  # else a submitter would go on with what it has in mind
            ids = cancel_jobs(opened)
    except Locked as error:
        if not error.what.endswith(("--on local", "--on here")):  # those stay for as long as the run takes
            raise
        end_local_driver(opened, error)  # else it would start the next element
        ids = [f"`ipt2v {error.what}` (process {error.pid})", *cancel_jobs(opened)]
    print(f"cancelled {', '.join(ids)}" if ids else "nothing to cancel: no job of this run waits or runs")
