"""Commands about scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command(
    epilog="Examples: ipt2v table runs/r2v-1a2b3c4d runs/t2i_i2v-5e6f7a8b;  ipt2v table runs/r2v-1a2b3c4d --out scores --vbench"
)
def table(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="run folders; the others are compared with the first")],
    out: Annotated[
        Path | None, typer.Option("--out", help="folder for table.md, .csv, .json; the first run's unless said")
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
        if one.num_rejected:
            print(f"{one.name}: {one.num_rejected} videos are rejected; `ipt2v submit CONFIG --rejected` makes them again")
    print(f"{folder / 'table.md'}, .csv and .json")
