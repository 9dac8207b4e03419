"""The command `ipt2v`. Each command imports what it needs when it runs, so that --help answers at once."""

from __future__ import annotations

import json
import math
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ipt2v.models.vace.degrees import Degrees
    from ipt2v.models.vace.memory import MemoryGb
    from ipt2v.run_dir import RunDir
    from launch.cluster import Cluster
    from launch.freeze import Prepared
    from launch.plan import Submission
    from launch.queue import Submitted

app = typer.Typer(
    help="A test set of (photo, prompt) pairs to a leaderboard-ready set of videos, as two dependent job arrays.",
    epilog="Start with: ipt2v demo. Then: ipt2v weights toy weights; ipt2v plan configs/vace_14b_480p.yaml --on slurm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
weights_app = typer.Typer(help="Folders of model weights.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(weights_app, name="weights")


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
WeightsFolderOption = Annotated[Path, typer.Option("--weights", metavar="DIR", help="folder of weights")]
RunsOption = Annotated[Path | None, typer.Option("--runs", help="folder of run folders, over the cluster file's")]
RehearseOption = Annotated[
    bool, typer.Option("--rehearse", help="with placeholder pictures in place of the models: all but them is proven in minutes")
]
DeadlineOption = Annotated[
    float, typer.Option("--deadline", metavar="HOURS", min=0, show_default=False, help="time that there is for the videos")
]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="a run folder")]


@app.command(epilog="Example: ipt2v plan configs/vace_14b_480p.yaml --on slurm --cluster configs/cluster/h100.yaml")
def plan(  # noqa: PLR0913, PLR0917 - options of a command line
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    on: PlaceOption = Place.slurm,
    cluster: ClusterOption = None,
    shards: ShardsOption = None,
    weights: WeightsOption = None,
    runs: RunsOption = None,
    rehearse: RehearseOption = False,
    deadline: DeadlineOption = math.inf,
    splits: Annotated[bool, typer.Option("--splits", help="all ways to share a video, the refused ones, too")] = False,
) -> None:
    """Print what `submit` would do, sbatch scripts included, and what it costs; write and submit nothing."""
    from launch.progress import ranges, summary
    from launch.submit import sbatch_text

    prepared, site = _prepare(config, _rehearsed(overrides, rehearse), cluster, shards, weights, runs)
    todo, has_models = _todo(prepared, site, on), not prepared.config.rehearsal.enabled
    state = "goes on" if prepared.run.root.exists() else "new"
    print(f"run    {prepared.run.root} ({state})\nitems  {summary(prepared.counts())} in {len(prepared.shards)} shards")
    for number, submission in enumerate(todo, 1):
        resources = site.resources(submission.stage)
        ranks = f"{1 if on == Place.here else resources.num_tasks} ranks per element"
        if submission.stage == "video" and on != Place.here and has_models:
            split, need = _split(prepared, site)
            ranks += f" ({split}; at least {need} on each)"
        waits = f", element i after element i of array {number - 1}" if submission.after else ""
        waits += f", each after its first frames in array {submission.living.job_id}" if submission.living else ""
        print(f"\narray {number}: {submission.stage}, shards {ranges(submission.shards)}, {ranks}{waits}")
        if on == Place.slurm:
            after = f"<job id of array {number - 1}>" if submission.after else None
            print(_indented(sbatch_text(prepared.run, site, submission, after)))
    if not todo:
        print("\nnothing to submit: every item is made, failed, or in the queue")
    elif on != Place.here and has_models:
        print("\n" + "\n".join(_costs(prepared, site, todo, deadline, every=splits)))


@app.command(
    epilog="Examples: ipt2v submit configs/demo.yaml --on local;  "
    "ipt2v submit configs/vace_14b_480p.yaml testset.path=/data/testset --on slurm --cluster configs/cluster/h100.yaml. "
    "First on a few CPUs, without weights: the same with --rehearse"
)
def submit(  # noqa: PLR0913, PLR0917 - options of a command line
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    on: PlaceOption = Place.slurm,
    cluster: ClusterOption = None,
    shards: ShardsOption = None,
    weights: WeightsOption = None,
    runs: RunsOption = None,
    rehearse: RehearseOption = False,
    wait: Annotated[bool, typer.Option("--wait", help="with --on slurm: show progress until the queue is done")] = False,
) -> None:
    """Make what is missing of a run; submitting again goes on with it. Finished items are never made twice."""
    from ipt2v.run_dir import free_leases_of_the_dead
    from launch.freeze import freeze
    from launch.lock import run_lock
    from launch.queue import live_elements, settle

    prepared, site = _prepare(config, _rehearsed(overrides, rehearse), cluster, shards, weights, runs)
    _check_ranks(prepared, site, on)
    run = freeze(prepared)
    print(f"run    {run.root}", flush=True)
    with run_lock(run, f"submit --on {on}"):
        if on == Place.slurm:
            settle(run, final=True)
        free_leases_of_the_dead(run, {shard for stage, shard in live_elements(run) if stage == "video"})
        problems = _start(run, site, _todo(prepared, site, on), on)
    if wait:
        _wait(run, on)
    if on != Place.slurm or wait:
        _finish(run, problems)


@app.command(epilog="Example: ipt2v freeze configs/demo.yaml; python -m ipt2v runs/demo-1a2b3c4d first_frame 0")
def freeze(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    cluster: ClusterOption = None,
    shards: ShardsOption = None,
    weights: WeightsOption = None,
    runs: RunsOption = None,
) -> None:
    """Write the run folder and print its path, to make shards by hand; `submit` does this by itself."""
    from launch.freeze import freeze as write

    prepared, _ = _prepare(config, overrides, cluster, shards, weights, runs)
    print(write(prepared).root)


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
    stage: Annotated[str | None, typer.Argument(help="first_frame or video; without it all logs are listed")] = None,
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
    stage: Annotated[str | None, typer.Option("--stage", help="only what failed in first_frame, or in video")] = None,
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


@app.command(
    "verify-split",
    epilog="Example: ipt2v verify-split runs/vace_14b_480p-1a2b3c4d --on slurm --cluster configs/cluster/h100.yaml",
)
def verify_split(
    run: RunArgument,
    on: PlaceOption = Place.slurm,
    cluster: ClusterOption = None,
    shard: Annotated[int, typer.Option(min=0, help="whose first item is made; its first frame must be there")] = 0,
) -> None:
    """Denoise one video over the ranks of a video element and again on one rank, four steps each, and compare the latents."""
    from ipt2v.run_dir import VERIFY_SPLIT, RunDir
    from launch.cluster import load_cluster
    from launch.lock import run_lock
    from launch.plan import Submission

    opened, site = RunDir(run.absolute()), load_cluster(cluster)
    opened.shard(shard)
    if on == Place.here or site.video.num_tasks == 1:
        raise ValueError("verify-split: one rank against one rank says nothing; name a --cluster file with more for a video")
    path = opened.split_check_path(shard)
    path.unlink(missing_ok=True)
    with run_lock(opened, f"verify-split --on {on}"):
        problems = _start(opened, site, (Submission(stage=VERIFY_SPLIT, shards=(shard,), after=False),), on)
    _wait(opened, on)
    if not path.is_file():
        raise OSError("; ".join(problems) or f"verify-split wrote nothing; see `ipt2v logs {run} {VERIFY_SPLIT} {shard}`")
    for name, value in json.loads(path.read_text(encoding="utf-8")).items():
        print(f"{name:<20} {value:.3g}" if isinstance(value, float) else f"{name:<20} {value}")


@app.command(
    epilog="Examples: ipt2v preflight --cluster my_cluster.yaml;  ipt2v preflight configs/vace_14b_480p.yaml --cluster "
    "my_cluster.yaml --elements 4. Exit code 0: all good, 1: problems, with the `exclude:` line for the cluster file"
)
def preflight(
    config: Annotated[Path | None, typer.Argument(metavar="CONFIG", help="the weights that this run loads, too")] = None,
    overrides: OverridesArgument = None,
    on: PlaceOption = Place.slurm,
    cluster: ClusterOption = None,
    elements: Annotated[int, typer.Option("--elements", min=1, help="as many jobs at once: looks at more nodes")] = 1,
    weights: WeightsOption = None,
    runs: RunsOption = None,
) -> None:
    """Look at the nodes before a long run, in a job of two minutes with the resources of a video element.

    Versions, GPUs and their memory, matrix products, network, shared file system, clocks, disks, weights; bad nodes are named.
    """
    from ipt2v.config import RunConfig, load_settings
    from launch.cluster import load_cluster
    from launch.preflight import look_at_nodes, prepare

    if on == Place.here:
        raise ValueError("preflight: one process says nothing of nodes; --on slurm, or --on local for this machine")
    site = load_cluster(cluster)
    settings = load_settings(RunConfig, config, tuple(overrides or ())) if config else None
    folders = {"runs_dir": runs or Path(site.runs_dir), "weights_dir": weights or Path(site.weights_dir)}
    prepared = prepare(site, config=settings, num_elements=elements, on_slurm=on == Place.slurm, **folders)
    try:
        code = look_at_nodes(prepared)
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr)
        raise typer.Exit(1) from None
    raise typer.Exit(code)


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


@app.command()
def package(
    run: RunArgument,
    allow_missing: Annotated[bool, typer.Option("--allow-missing", help="pack what there is")] = False,
) -> None:
    """Check every video by decoding it, zip them for the leaderboard with checksums, and write a page to look at."""
    from ipt2v.package import write_package
    from ipt2v.report import write_report
    from ipt2v.run_dir import RunDir

    opened = RunDir(run)
    written = write_package(opened, allow_missing=allow_missing)
    print(f"{written.archive}  {written.num_videos} videos" + (f", {len(written.missing)} missing" if written.missing else ""))
    print(f"{write_report(opened)}")
    raise typer.Exit(1 if written.missing else 0)


@weights_app.command(
    "list",
    epilog="Examples: ipt2v weights list;  ipt2v weights list configs/vace_14b_480p.yaml hyperlora.enabled=false --files",
)
def weights_list(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]", help="only what this run reads")] = None,
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


@weights_app.command(
    "fetch",
    epilog="Examples: ipt2v weights fetch configs/vace_14b_480p.yaml --weights /shared/weights;  ipt2v weights fetch Qwen3-8B. "
    "Then: ipt2v weights check CONFIG --weights /shared/weights --hash",
)
def weights_fetch(
    what: Annotated[list[str], typer.Argument(metavar="CONFIG|FOLDER...", help="all of a run (KEY=VALUE on top), or folders")],
    weights: WeightsFolderOption = Path("weights"),
) -> None:
    """Fetch published weights; needs network, so on a login node. What is there and whole is not fetched again."""
    from ipt2v.models.fetch import fetch
    from launch.weights import wanted_folders

    fetch(wanted_folders(what), weights)


@weights_app.command("check", epilog="Example: ipt2v weights check configs/vace_14b_480p.yaml --weights /shared/weights")
def weights_check(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    weights: WeightsFolderOption = Path("weights"),
    hashes: Annotated[bool, typer.Option("--hash", help="read every file: minutes for 100 GB")] = False,
) -> None:
    """Say what is missing or damaged of the files that a run loads; exit code 1 if anything is. plan and submit do so too."""
    from ipt2v.config import RunConfig, load_settings
    from launch.weights import check

    raise typer.Exit(check(weights, load_settings(RunConfig, config, tuple(overrides or ())), hashes=hashes))


@weights_app.command("toy")
def weights_toy(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder to write them below")],
    seed: Annotated[int, typer.Option(help="of the random weights")] = 0,
) -> None:
    """Write tiny random checkpoints in the published layouts: the real loading code runs, the pictures are noise."""
    from ipt2v.models.toy import write_toy_weights

    for written in write_toy_weights(folder, seed=seed):
        print(written)


@app.command(epilog="Example: ipt2v demo --on slurm --cluster configs/cluster/devcluster.yaml")
def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder for its weights, test set and run")] = Path("demo"),
    config: Annotated[Path, typer.Option("--config", help="what to make")] = Path("configs/demo.yaml"),
    on: PlaceOption = Place.local,
    cluster: ClusterOption = Path("configs/cluster/local.yaml"),
) -> None:
    """Run the whole system on two photographs and toy weights: both arrays, package, and a page to look at."""
    from launch.demo import prepare_demo

    testset, weights = prepare_demo(folder)
    submit(config, [f"testset.path={testset}"], on, cluster, None, weights, folder / "runs", wait=True)
    prepared, _ = _prepare(config, [f"testset.path={testset}"], cluster, None, weights, folder / "runs")
    try:
        package(prepared.run.root)
    finally:
        print("\nToy weights are random: the pictures are noise. They show that everything runs, not how it looks.")


def main() -> None:
    """Run the command line. Exit code 0 for success, 1 for a run with failures, 2 for a wrong call or input."""
    try:
        app()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _prepare(
    config: Path,
    overrides: list[str] | None,
    cluster: Path | None,
    shards: int | None,
    weights: Path | None,
    runs: Path | None,
) -> tuple[Prepared, Cluster]:
    from ipt2v.config import RunConfig, load_settings
    from launch.cluster import load_cluster
    from launch.freeze import prepare

    site = load_cluster(cluster)
    prepared = prepare(
        load_settings(RunConfig, config, tuple(overrides or ())),
        weights_dir=weights or Path(site.weights_dir),
        runs_dir=runs or Path(site.runs_dir),
        num_shards=shards or site.num_shards,
    )
    return prepared, site


def _rehearsed(overrides: list[str] | None, rehearse: bool) -> list[str]:
    return [*(overrides or ()), *(["rehearsal.enabled=true"] if rehearse else [])]


def _todo(prepared: Prepared, site: Cluster, on: Place) -> tuple[Submission, ...]:
    """What to submit.

    Raises ValueError if the split of ranks is illegal, OSError if SLURM does not say what is in the queue.
    """
    from launch.plan import plan_submissions
    from launch.progress import ranges
    from launch.queue import living

    _check_ranks(prepared, site, on)
    arrays = living(prepared.run, for_slurm=on == Place.slurm)
    if busy := {shard for array in arrays for shard in array.live}:
        print(f"shards {ranges(tuple(sorted(busy)))} are waiting or running already; left alone")
    return plan_submissions(prepared.counts(), arrays)


def _check_ranks(prepared: Prepared, site: Cluster, on: Place) -> None:
    """Raises ValueError if the split of ranks is illegal."""
    config = prepared.config
    if on != Place.here and not config.rehearsal.enabled:
        weights_dir = Path(prepared.environment.weights_dir)
        if site.first_frame.num_tasks > 1 and config.asks_llm and config.decouple.weights_sharding == "tensor":
            from ipt2v.models.tensor_parallel import check_slices

            check_slices(weights_dir / config.decouple.model, site.first_frame.num_tasks)
        _split(prepared, site)


def _split(prepared: Prepared, site: Cluster) -> tuple[Degrees, MemoryGb]:
    """How the ranks of a video element share it, and what each holds. Raises ValueError, with what would do, if they cannot."""
    from ipt2v.models.catalogue import transformer_sizes
    from ipt2v.models.vace.degrees import degrees
    from ipt2v.models.vace.memory import memory_gb

    sizes = transformer_sizes(Path(prepared.environment.weights_dir), prepared.config)
    guided = prepared.config.video.guidance_scale > 1
    split = degrees(site.video.num_tasks, site.video.nodes, sizes["num_attention_heads"], guided=guided)
    return split, memory_gb(sizes, prepared.config.video, split)


def _costs(prepared: Prepared, site: Cluster, todo: tuple[Submission, ...], deadline: float, *, every: bool) -> list[str]:
    from launch.cost_table import cost_lines

    shards = tuple(sorted(shard for submission in todo if submission.stage == "video" for shard in submission.shards))
    return cost_lines(prepared, site, shards, deadline_hours=deadline, every=every)


def _start(run: RunDir, site: Cluster, todo: tuple[Submission, ...], on: Place) -> list[str]:
    from launch.evidence import bad_nodes
    from launch.local import run_here, run_local
    from launch.progress import ProgressLine
    from launch.submit import Submitter

    if on == Place.here:
        run_here(run, todo, ProgressLine(run))
    elif on == Place.local:
        return run_local(run, site, todo, ProgressLine(run))
    else:
        if todo and (nodes := bad_nodes(run)):
            print(f"left out: {','.join(nodes)}; `ipt2v nodes {run.root}` says why")
            site = site.without(nodes)
        Submitter(run=run, cluster=site).submit(todo, _print_submitted)
    return []


def _print_submitted(submitted: Submitted) -> None:
    waits = f", aftercorr:{submitted.after}" if submitted.after else ""
    print(f"array  {submitted.job_id}  {submitted.stage}, {len(submitted.shards)} elements{waits}", flush=True)


def _wait(run: RunDir, on: Place) -> None:
    """Until nothing of the run is in SLURM's queue; elsewhere there is none."""
    from launch.progress import ProgressLine, wait_for_queue
    from launch.queue import is_idle

    tick = ProgressLine(run)
    while on == Place.slurm and not is_idle(run):
        wait_for_queue(run, tick)


def _finish(run: RunDir, problems: list[str]) -> None:
    """Print how a finished submission stands; exit code 1 unless everything is made."""
    from launch.progress import count_all, summary

    counts = count_all(run)
    print(f"done   {summary(counts)}")
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    for failure in run.failures():
        print(f"failed: {failure.key} ({failure.stage}): {failure.reason}", file=sys.stderr)
    if any(count.failed or count.missing for count in counts):
        raise typer.Exit(1)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.strip().splitlines())
