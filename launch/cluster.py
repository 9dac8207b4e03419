"""Where to run, from YAML: resources of each stage and of the site. Nothing here may change a pixel."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, field_validator, model_validator

from ipt2v.config import Settings, load_settings
from ipt2v.run_dir import STAGES, VERIFY_SPLIT


class Resources(Settings):
    """What one array element gets; names and meanings as sbatch has them."""

    nodes: int = Field(1, ge=1)
    gpus_per_node: int = Field(0, ge=0)
    tasks_per_node: int | None = Field(None, ge=1)  # one for each GPU unless said otherwise
    cpus_per_task: int = Field(1, ge=1)
    mem_gb: float | None = Field(None, gt=0)  # of a node
    timeout_minutes: int = Field(60, ge=1)
    array_parallelism: int = Field(256, ge=1)  # elements that may run at once
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None

    @property
    def num_tasks_per_node(self) -> int:
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def num_tasks(self) -> int:
        return self.nodes * self.num_tasks_per_node


class Hardware(Settings):
    """What the site has, for the prices that `plan` prints. SLURM is not asked for it: that is what Resources say."""

    gpu: str | None = None  # a name of launch.cost.GPUS
    gpus_per_node: int | None = Field(None, ge=1)  # of a whole node; as many as a video element takes of it unless said
    nics_per_node: int = Field(1, ge=1)  # network cards of 400 Gbit/s
    num_nodes: int | None = Field(None, ge=1)  # that one may use at once; as many as the elements would take unless said


class Cluster(Settings):
    """A site: where weights and runs lie, how jobs are set up, what each stage gets."""

    weights_dir: str = "weights"
    runs_dir: str = "runs"
    # A folder on each node's own disk, $VARIABLES of the node's environment expanded: $TMPDIR, or /local/scratch/$USER. What a
    # stage loads is copied there first. A folder in memory (/dev/shm) counts against mem_gb; a container has to see the folder.
    local_weights_dir: str | None = None
    num_shards: int | None = Field(None, ge=1)  # array elements of each stage; one for each identity, at most 64, unless said
    setup: tuple[str, ...] = ()  # shell lines before the job, on the first node of an element
    container: tuple[str, ...] = ()  # words before python, for example [apptainer, exec, --nv, image.sif]
    signal_delay_seconds: int = Field(120, ge=1)  # time between the warning of a time limit or preemption and the end
    stall_minutes: float = Field(30, gt=0)  # a rank without a sign of life (a step, an item) for so long ends, with all stacks
    first_frame: Resources = Resources()
    video: Resources = Resources()
    score: Resources = Resources()
    hardware: Hardware = Hardware()

    @field_validator("local_weights_dir")
    @classmethod
    def _local_weights_dir_is_absolute(cls, folder: str | None) -> str | None:
        if folder is not None and not folder.startswith(("/", "$")):  # below the job's folder it would be on the shared disk
            raise ValueError(f"found {folder!r}, expected an absolute path, or one that starts with a $VARIABLE of the nodes")
        return folder

    @model_validator(mode="after")
    def _first_frame_is_on_one_node(self) -> Self:
        if self.first_frame.nodes != 1:
            raise ValueError(
                f"first_frame: found {self.first_frame.nodes} nodes per element, expected 1; "
                "use more shards instead (several GPUs of a node share the LLM, for GPUs that cannot hold it whole)"
            )
        return self

    @model_validator(mode="after")
    def _video_fits_the_hardware(self) -> Self:
        hardware, video = self.hardware, self.video
        pairs = (("gpus_per_node", hardware.gpus_per_node, video.gpus_per_node), ("num_nodes", hardware.num_nodes, video.nodes))
        for name, there, asked in pairs:
            if there is not None and there < asked:
                raise ValueError(f"hardware.{name}: found {there}, expected at least the {asked} that a video element asks for")
        return self

    def without(self, nodes: tuple[str, ...]) -> Cluster:
        """The same site, but no stage is given these nodes."""
        changed = {}
        for name in STAGES:
            resources: Resources = getattr(self, name)
            named = [resources.exclude] if resources.exclude else []
            changed[name] = resources.model_copy(update={"exclude": ",".join([*named, *nodes])})
        return self.model_copy(update=changed) if nodes else self

    def resources(self, stage: str) -> Resources:
        resources: Resources = getattr(self, "video" if stage == VERIFY_SPLIT else stage)
        return resources


def load_cluster(path: Path | None) -> Cluster:
    """The cluster that a file describes; without one, this machine with one rank for each stage."""
    return Cluster() if path is None else load_settings(Cluster, path)
