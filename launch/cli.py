"""The command `ipt2v`, and those of its commands that make something; others are in cli_runs, cli_delivery and cli_weights.

Each command imports what it needs when it runs, so that --help answers at once.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch import cli_delivery, cli_runs, cli_weights
from launch.cli_options import (
    ClusterOption,
    ConfigArgument,
    DeadlineOption,
    OverridesArgument,
    Place,
    PlaceOption,
    RehearseOption,
    RunArgument,
    RunsOption,
    ShardsOption,
    WeightsOption,
)

if TYPE_CHECKING:
    from ipt2v.models.vace.degrees import Degrees
    from ipt2v.models.vace.memory import MemoryGb
    from ipt2v.run_dir import RunDir
    from launch.cluster import Cluster
    from launch.freeze import Prepared
    from launch.plan import Living, Submission
    from launch.queue import Submitted

app = typer.Typer(
    help="A test set of (photo, prompt) pairs to a leaderboard-ready set of videos, as three dependent job arrays.",
    epilog="Start with: ipt2v demo. Then: ipt2v weights toy weights; ipt2v plan configs/vace_14b_480p.yaml --on slurm",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_runs.app)
app.add_typer(cli_delivery.app)
app.add_typer(cli_weights.app, name="weights")


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
    from launch.queue import living
    from launch.submit import sbatch_text

    prepared, site = _prepare(config, _rehearsed(overrides, rehearse), cluster, shards, weights, runs)
    _check_ranks(prepared, site, on)
    todo = _todo(prepared, living(prepared.run, for_slurm=on == Place.slurm))
    has_models = not prepared.config.rehearsal.enabled
    state = "goes on" if prepared.run.root.exists() else "new"
    print(f"run    {prepared.run.root} ({state})\nitems  {summary(prepared.counts())} in {len(prepared.shards)} shards")
    for number, submission in enumerate(todo, 1):
        resources = site.resources(submission.stage)
        ranks = f"{1 if on == Place.here else resources.num_tasks} ranks per element"
        if submission.stage == "video" and on != Place.here and has_models:
            split, need = _split(prepared, site)
            ranks += f" ({split}; at least {need} on each)"
        waits = f", element i after element i of array {number - 1}" if submission.after else ""
        waits += f", each after its shard's element in array {submission.living.job_id}" if submission.living else ""
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
    rejected: Annotated[
        bool, typer.Option("--rejected", help="make what score.accept rejects again, with another seed")
    ] = False,
) -> None:
    """Make what is missing of a run; submitting again goes on with it. Finished items are never made twice."""
    from ipt2v.run_dir import free_leases_of_the_dead, seal_leftovers
    from launch.freeze import freeze
    from launch.lock import run_lock
    from launch.progress import wait_for_queue
    from launch.queue import living, settle
    from launch.rejects import reject

    prepared, site = _prepare(config, _rehearsed(overrides, rehearse), cluster, shards, weights, runs)
    _check_submission(prepared, site, on, rejected=rejected)
    run = freeze(prepared)
    print(f"run    {run.root}", flush=True)
    with run_lock(run, f"submit --on {on}"):
        if on == Place.slurm:
            settle(run, final=True)
        arrays = living(run, for_slurm=on == Place.slurm)
        free_leases_of_the_dead(run, {shard for array in arrays if array.stage == "video" for shard in array.live})
        if rejected:
            print("\n".join(reject(run, {shard for array in arrays for shard in array.live})), flush=True)
        for problem in seal_leftovers(run, prepared.counts(), {array.stage for array in arrays}):
            print(problem, file=sys.stderr)
        problems = _start(run, site, _todo(prepared, arrays), on)
    if wait and on == Place.slurm:
        wait_for_queue(run)
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
    from launch.progress import wait_for_queue

    opened, site = RunDir(run.absolute()), load_cluster(cluster)
    opened.shard(shard)
    if on == Place.here or site.video.num_tasks == 1:
        raise ValueError("verify-split: one rank against one rank says nothing; name a --cluster file with more for a video")
    path = opened.split_check_path(shard)
    path.unlink(missing_ok=True)
    with run_lock(opened, f"verify-split --on {on}"):
        problems = _start(opened, site, (Submission(stage=VERIFY_SPLIT, shards=(shard,), after=False),), on)
    if on == Place.slurm:
        wait_for_queue(opened)
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
    folders = {"runs_dir": _free_for_a_folder(runs or Path(site.runs_dir)), "weights_dir": weights or Path(site.weights_dir)}
    prepared = prepare(site, config=settings, num_elements=elements, on_slurm=on == Place.slurm, **folders)
    try:
        code = look_at_nodes(prepared)
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr)
        raise typer.Exit(1) from None
    raise typer.Exit(code)


@app.command(epilog="Example: ipt2v demo --on slurm --cluster configs/cluster/devcluster.yaml")
def demo(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="folder for its weights, test set and run")] = Path("demo"),
    config: Annotated[Path, typer.Option("--config", help="what to make")] = Path("configs/demo.yaml"),
    on: PlaceOption = Place.local,
    cluster: ClusterOption = Path("configs/cluster/local.yaml"),
) -> None:
    """Run the whole system on two photographs and toy weights: all three arrays, package, table, and a page to look at."""
    from launch.demo import SCORES, prepare_demo

    _check_demo_settings(config, cluster)  # before anything is written
    testset, weights = prepare_demo(_free_for_a_folder(folder))
    overrides = [f"testset.path={testset}", SCORES]
    submit(config, overrides, on, cluster, None, weights, folder / "runs", wait=True)
    prepared, _ = _prepare(config, overrides, cluster, None, weights, folder / "runs")
    cli_delivery.table([prepared.run.root])
    try:
        cli_delivery.package(prepared.run.root)
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
    runs_dir = _free_for_a_folder(runs or Path(site.runs_dir))
    prepared = prepare(
        load_settings(RunConfig, config, tuple(overrides or ())),
        weights_dir=weights or Path(site.weights_dir),
        runs_dir=runs_dir,
        num_shards=shards or site.num_shards,
    )
    return prepared, site


def _free_for_a_folder(folder: Path) -> Path:
    """`folder`, which is one or can become one. Raises ValueError, naming what is in the way, if it cannot."""
    for path in (folder, *folder.parents):
        try:
            if path.is_dir():
                break
            if path.exists():
                raise ValueError(f"{folder}: expected a folder, but {path} is a file; name another, or move the file away")
        except OSError as error:  # a name that is too long, no permission
            raise ValueError(f"{folder}: cannot be a folder ({error.strerror}); name another") from None
    return folder


def _check_demo_settings(config: Path, cluster: Path | None) -> None:
    """Raises ValueError if the demo's settings are not there, or not right."""
    from ipt2v.config import RunConfig, load_settings
    from launch.cluster import load_cluster

    for path in (config, cluster):
        if path is not None and not path.exists():
            where = "demo reads configs/, so call it in the repository's root, or name --config and --cluster"
            raise ValueError(f"{path}: no such settings file; {where}")
    load_settings(RunConfig, config, ("testset.path=demo",))
    load_cluster(cluster)


def _rehearsed(overrides: list[str] | None, rehearse: bool) -> list[str]:
    return [*(overrides or ()), *(["rehearsal.enabled=true"] if rehearse else [])]


def _todo(prepared: Prepared, arrays: tuple[Living, ...]) -> tuple[Submission, ...]:
    """What to submit beside what is in the queue."""
    from launch.plan import plan_submissions
    from launch.progress import ranges

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


def _check_submission(prepared: Prepared, site: Cluster, on: Place, *, rejected: bool) -> None:
    """Raises ValueError, before anything is written, if there is something that a submission cannot do."""
    _check_ranks(prepared, site, on)
    accept = prepared.config.score.accept
    if rejected and not (accept.at_least or accept.at_most):
        raise ValueError("--rejected: no rules to reject by; set score.accept.at_least or at_most in the settings")


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
