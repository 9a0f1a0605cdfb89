"""One run on one kind of machine: what the files of every launcher are written from."""

import re
import signal
from dataclasses import dataclass
from pathlib import Path

from jaxhybrid.errors import EXIT_TRY_AGAIN, ConfigError, TopologyError
from jaxhybrid.launch.slices import Generation, Slice
from jaxhybrid.model.partition import check_batches, mesh_sizes
from jaxhybrid.settings.run import RunConfig

MOUNT = "/mnt/runs"  # where the storage is on every host of a cloud
LONGEST_NAME = 36  # names of node pools, which have a number besides, have at most 40 characters
TOLD = int(128 + signal.SIGTERM)  # exit code of a run that was told to stop, as before a preemption
LOST = (EXIT_TRY_AGAIN, int(128 + signal.SIGABRT))  # exit codes where another host has not come or was lost
GO_ON = (*LOST, TOLD)


@dataclass(frozen=True)
class Bucket:
    """Object storage, mounted with Cloud Storage FUSE."""

    name: str


@dataclass(frozen=True)
class Nfs:
    """A Filestore instance or another NFS server."""

    server: str
    path: str


@dataclass(frozen=True)
class Job:
    """A run, the machines, and where its results go."""

    name: str  # of the JobSet, the queued resource, the Slurm job
    config: RunConfig  # as the hosts read it
    slice: Slice
    slices: int = 1
    image: str = ""
    storage: Bucket | Nfs | None = None  # None: the cluster's own disk, which all nodes see
    zone: str = ""
    spot: bool = False

    @property
    def tpu(self) -> Generation:
        """The kind of TPU; jobs on a cloud have one."""
        assert self.slice.tpu is not None
        return self.slice.tpu

    @property
    def region(self) -> str:
        return self.zone.rpartition("-")[0]

    @property
    def environment(self) -> dict[str, str]:
        """Variables of every process. Programs and downloads are kept, so that a restart has them."""
        return {"HF_HOME": f"{MOUNT}/huggingface", "JAX_COMPILATION_CACHE_DIR": f"{MOUNT}/programs"}


def cloud_job(
    config: RunConfig,
    where: Slice,
    slices: int,
    *,
    image: str | None,
    bucket: str | None,
    nfs: str | None,
    zone: str | None,
    spot: bool,
) -> Job:
    """A job whose hosts mount their storage at MOUNT and take the package from an image.

    Raises:
        ConfigError: something is missing or cannot be on the hosts; names the option or the setting.
        TopologyError: the mesh does not fit the slices.
    """
    if where.tpu is None:
        raise TopologyError(f"Topology {where.name}: GPU nodes are launched with --on slurm.")
    image = _given(image, "--image", r"[a-z0-9][a-z0-9._/:@-]*", "us-east5-docker.pkg.dev/PROJECT/REPOSITORY/jaxhybrid")
    zone = _given(zone, "--zone", r"[a-z]+-[a-z]+\d+-[a-z]", "us-east5-a")
    if (bucket is None) == (nfs is None):
        raise ConfigError("Give one of --bucket NAME and --nfs SERVER:/PATH: the run folder must be on a shared disk.")
    if bucket is not None:
        bucket = bucket.removeprefix("gs://").rstrip("/")
        storage: Bucket | Nfs = Bucket(_given(bucket, "--bucket", r"[a-z0-9][a-z0-9._-]{1,61}[a-z0-9]", "my-runs"))
    else:
        server, _, path = _given(nfs, "--nfs", r"[A-Za-z0-9.-]+:/[\w./-]*", "10.0.0.2:/runs").partition(":")
        storage = Nfs(server, path)
    data = config.data.model_copy(update={"cache_dir": f"{MOUNT}/tokens"})
    there = config.model_copy(update={"run_dir": f"{MOUNT}/{config.name}", "data": data})
    _check_paths(there)
    job = Job(_name(config.name), there, where, slices, image, storage, zone, spot)
    _check_mesh(job)
    return job


def slurm_job(config: RunConfig, where: Slice) -> Job:
    """A job on the nodes of a cluster whose own disk they all see.

    Raises:
        TopologyError: TPUs, or the mesh does not fit.
        ConfigError: the name is not one for a cluster.
    """
    if where.tpu is not None:
        raise TopologyError(f"Topology {where.name}: TPUs are launched with --on gke or --on tpu-vm.")
    job = Job(_name(config.name), config, where)
    _check_mesh(job)
    return job


def _given(value: str | None, option: str, pattern: str, example: str) -> str:
    if value is None:
        raise ConfigError(f"{option} must be given, for example {option} {example}.")
    if not re.fullmatch(pattern, value):
        raise ConfigError(f"{option} {value!r} is none; for example {option} {example}.")
    return value


def _name(run: str) -> str:
    """The name of a run as Kubernetes and Google Cloud take it."""
    name = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    if not re.match("[a-z]", name) or len(name) > LONGEST_NAME:
        raise ConfigError(
            f"name {run!r} gives no name for a job: it must begin with a letter and have at most {LONGEST_NAME} "
            "characters. Choose another name=NAME."
        )
    return name


def _check_paths(config: RunConfig) -> None:
    """Refuses files of this machine, which the hosts do not have."""
    ids = ("teacher", "data.tokenizer")  # a bare name may be one of the hub
    ruler = config.evaluate.ruler
    named = {
        "teacher": [config.teacher],
        "data.train": config.data.train,
        "data.heldout": config.data.heldout or (),
        "data.tokenizer": [config.data.tokenizer or ""],
        "export.folder": [config.export.folder or ""],
        "evaluate.completion.sources": config.evaluate.completion.sources,
        "evaluate.lm_eval.task_folder": [config.evaluate.lm_eval.task_folder or ""],
        "evaluate.ruler.essays": ruler.essays,
        "evaluate.ruler.squad": [ruler.squad or ""],
        "evaluate.ruler.hotpotqa": [ruler.hotpotqa or ""],
    }
    for key, values in named.items():
        for value in values:
            if not value or value == "pydoc" or value.startswith(("hub:", "demo:", f"{MOUNT}/")):
                continue
            if key not in ids or value[0] in "/.~" or Path(value).exists():
                raise ConfigError(
                    f"{key} {value} would be a file of each host. Put it into the storage and name it there, below "
                    f"{MOUNT}, or use the hub."
                )


def _check_mesh(job: Job) -> None:
    """Refuses a mesh that is not as large as the slices, or over which the batches do not divide."""
    where = job.slice.name if job.slices == 1 else f"{job.slices} x {job.slice.name}"
    devices, at = job.slices * job.slice.devices, "mesh: "
    try:
        sizes, at = mesh_sizes(job.config.mesh.sizes, devices, job.slices), ""
        check_batches(job.config.batches(devices), sizes)
    except TopologyError as error:
        raise TopologyError(f"{where} has {devices} devices. {at}{error}") from error
