"""The commands `ipt2v weights ...`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launch.cli_options import ConfigArgument, OverridesArgument

app = typer.Typer(help="Folders of model weights.", no_args_is_help=True, rich_markup_mode=None)
WeightsFolderOption = Annotated[Path, typer.Option("--weights", metavar="DIR", help="folder of weights")]


@app.command(
    "list",
    epilog="Examples: ipt2v weights list;  ipt2v weights list configs/vace_14b_480p.yaml hyperlora.enabled=false --files",
)
def weights_list(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="only what this run and its scores read")] = None,
    overrides: OverridesArgument = None,
    files: Annotated[bool, typer.Option("--files", help="every file that is known of, with size and sha256")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="for programs; with all files")] = False,
) -> None:
    """Print every folder of weights that we know: what reads it, its size, where it is published, under which licence."""
    from ipt2v.config import RunConfig, load_settings
    from launch.weights import dump_rows, print_rows, rows

    listed = rows(load_settings(RunConfig, config, tuple(overrides or ())) if config else None)
    if as_json:
        print(dump_rows(listed))
    else:
        print_rows(listed, files=files)


@app.command(
    "fetch",
    epilog="Examples: ipt2v weights fetch configs/vace_14b_480p.yaml --weights /shared/weights;  ipt2v weights fetch Qwen3-8B. "
    "Then: ipt2v weights check CONFIG --weights /shared/weights --hash",
)
def weights_fetch(
    what: Annotated[
        list[str], typer.Argument(metavar="CONFIG|FOLDER...", help="all of a run and its scores (KEY=VALUE on top), or folders")
    ],
    weights: WeightsFolderOption = Path("weights"),
) -> None:
    """Fetch published weights; needs network, so on a login node. What is there and whole is not fetched again."""
    from ipt2v.models.fetch import fetch
    from launch.weights import wanted_folders

    fetch(wanted_folders(what), weights)


@app.command("check", epilog="Example: ipt2v weights check configs/vace_14b_480p.yaml --weights /shared/weights")
def weights_check(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    weights: WeightsFolderOption = Path("weights"),
    hashes: Annotated[bool, typer.Option("--hash", help="read every file: minutes for 100 GB")] = False,
) -> None:
    """Say what is missing or damaged of what a run and its scores load; exit code 1 if anything is. submit looks, too."""
    from ipt2v.config import RunConfig, load_settings
    from launch.weights import check

    raise typer.Exit(check(weights, load_settings(RunConfig, config, tuple(overrides or ())), hashes=hashes))


@app.command("toy")
def weights_toy(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder to write them below")],
    seed: Annotated[int, typer.Option(help="of the random weights")] = 0,
) -> None:
    """Write tiny random checkpoints in the published layouts: the real loading code runs, the pictures are noise."""
    from ipt2v.metrics.toy_weights import write_all_toy_weights

    for written in write_all_toy_weights(folder, seed=seed):
        print(written)
