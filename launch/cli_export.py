"""The command that shares a finished run as a data set."""

from __future__ import annotations

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.cli_options import RunArgument

if TYPE_CHECKING:
    from ipt2v.export_formats import Done

MAX_LINE = 600  # characters of a reason
MAX_LEFT_OUT = 20  # lines; the manifest has all

app = typer.Typer()


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
    from launch.cli_runs import progress_bar
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
