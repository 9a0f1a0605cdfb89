"""The files of a job, rendered and put into a folder of their own."""

import shlex
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from jaxhybrid.errors import EXIT_PUT_RIGHT, RunError, TopologyError
from jaxhybrid.files import make_folder, write_text
from jaxhybrid.launch.gke import ACCOUNT, CONTAINER, FUSE_OPTIONS, jobset
from jaxhybrid.launch.job import LOST, MOUNT, TOLD, Bucket, Job
from jaxhybrid.settings.read import to_yaml

Launcher = Literal["gke", "tpu-vm", "slurm"]
FILES = frozenset({"Dockerfile", "config.yaml", "environment", "job.sh", "jobset.yaml", "pod.sh"})  # of all launchers
STOPPED = "stopped"  # the mark of a run on TPU VMs that somebody has stopped; it stays
WAY_OUT = "choose another --output"


def write_job(job: Job, launcher: Launcher, folder: Path) -> list[Path]:
    """Writes what starts `job` into `folder`, in place of what an earlier call has written there.

    Raises:
        TopologyError: the launcher does not have such machines.
        RunError: the folder holds something else, or cannot be written.
    """
    texts = _WRITERS[launcher](job, folder)
    others = sorted({entry.name for entry in folder.iterdir()} - FILES - {STOPPED}) if folder.is_dir() else []
    if others:
        raise RunError(f"{folder} holds {', '.join(others[:3])}, which no launch has written; {WAY_OUT}.")
    make_folder(folder, WAY_OUT)
    for name in FILES - texts.keys():
        (folder / name).unlink(missing_ok=True)
    for name, text in texts.items():
        write_text(folder / name, text, WAY_OUT)
    return [folder / name for name in texts]


def _gke(job: Job, folder: Path) -> dict[str, str]:
    return {
        "config.yaml": to_yaml(job.config),
        "jobset.yaml": jobset(job),
        "pod.sh": _render(
            "gke.sh",
            job,
            machine=_node_pool(job),
            needs_policy=_needs_policy(job),
            account=ACCOUNT,
            container=CONTAINER,
        ),
        "Dockerfile": _render("Dockerfile", job, folder=folder),
    }


def _tpu_vm(job: Job, folder: Path) -> dict[str, str]:
    if not job.tpu.kind:
        raise TopologyError(f"Topology {job.slice.name}: there are no TPU VMs of it; use --on gke.")
    nodes = [job.name] if job.slices == 1 else [f"{job.name}-{number}" for number in range(job.slices)]
    # gcsfuse's own spelling of what its driver in GKE takes: metadata-cache:ttl-secs:0 -> --metadata-cache-ttl-secs=0
    mount = ["--" + "=".join(option.replace(":", "-", 1).split(":")) for option in FUSE_OPTIONS]
    return {
        "config.yaml": to_yaml(job.config),
        "environment": "".join(f"{name}={value}\n" for name, value in job.environment.items()),
        "pod.sh": _render(
            "tpu_vm.sh",
            job,
            nodes=nodes,
            request=_request(job),
            stopped=STOPPED,
            fuse_options=mount,
            inspected="{{.State.Status}} {{.State.ExitCode}}",
        ),
        "Dockerfile": _render("Dockerfile", job, folder=folder),
    }


def _slurm(job: Job, folder: Path) -> dict[str, str]:
    # sbatch runs a copy of the script in a folder of its own.
    return {
        "config.yaml": to_yaml(job.config),
        "job.sh": _render("slurm.sh", job, folder=shlex.quote(str(folder.absolute()))),
    }


_WRITERS = {"gke": _gke, "tpu-vm": _tpu_vm, "slurm": _slurm}


def _request(job: Job) -> list[str]:
    """Options of `gcloud compute tpus queued-resources create`."""
    one, several = ["--node-id", '"$NAME"'], ["--node-count", str(job.slices), "--node-prefix", '"$NAME"']
    kind = ["--type", job.tpu.kind, "--topology", job.slice.shape, "--runtime-version", job.tpu.runtime]
    return kind + (one if job.slices == 1 else several) + ["--spot"] * job.spot


def _node_pool(job: Job) -> list[str]:
    """Options of `gcloud container node-pools create` for one slice."""
    options = ["--machine-type", f"{job.tpu.machine}{job.slice.per_host}t", "--num-nodes", str(job.slice.hosts)]
    if job.slice.hosts > 1:  # GKE refuses a topology where the machine is the whole slice
        options += ["--tpu-topology", job.slice.shape]
    if _needs_policy(job):
        options += ["--placement-policy", '"$NAME"']
    if job.tpu.devices_per_chip == 2:  # its machines take no other disks
        options += ["--disk-type", "hyperdisk-balanced"]
    return options + ["--spot"] * job.spot


def _needs_policy(job: Job) -> bool:
    """Whether a node pool of several VMs has its topology from a policy of its own."""
    return job.tpu.devices_per_chip == 2 and job.slice.hosts > 1


def _render(name: str, job: Job, **values: Any) -> str:
    given = {
        "job": job,
        "bucket": job.storage.name if isinstance(job.storage, Bucket) else "",
        "mount": MOUNT,
        "stop": EXIT_PUT_RIGHT,
        "told": TOLD,
        "lost": " | ".join(map(str, LOST)),
        **values,
    }
    return _TEMPLATES.get_template(f"{name}.j2").render(given)


_TEMPLATES = Environment(
    loader=PackageLoader("jaxhybrid.launch"),
    undefined=StrictUndefined,
    autoescape=False,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
