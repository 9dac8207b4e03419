"""Words that several commands of `ipt2v` take, each with its help; knows nothing of what they are for."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Place(StrEnum):
    """Where the arrays run."""

    here = "here"
    local = "local"
    slurm = "slurm"


ConfigArgument = Annotated[Path, typer.Argument(metavar="CONFIG", help="what to make, a YAML file of configs/")]
OverridesArgument = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="settings on top: video.fps=24")]
PlaceOption = Annotated[Place, typer.Option("--on", help="this process, processes of this machine, or SLURM arrays")]
ClusterOption = Annotated[Path | None, typer.Option("--cluster", help="where to run, a YAML file of configs/cluster/")]
ShardsOption = Annotated[int | None, typer.Option("--shards", min=1, help="array elements of each stage")]
WeightsOption = Annotated[Path | None, typer.Option("--weights", help="folder of weights, over the cluster file's")]
RunsOption = Annotated[Path | None, typer.Option("--runs", help="folder of run folders, over the cluster file's")]
RehearseOption = Annotated[
    bool, typer.Option("--rehearse", help="with placeholder pictures in place of the models: all but them is proven in minutes")
]
DeadlineOption = Annotated[
    float, typer.Option("--deadline", metavar="HOURS", min=0, show_default=False, help="time that there is for the videos")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")]
