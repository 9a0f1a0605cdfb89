"""A job as a JobSet for Google Kubernetes Engine: one job for each slice, one pod for each VM."""

from typing import Any

import yaml

from jaxhybrid.errors import EXIT_PUT_RIGHT
from jaxhybrid.launch.job import GO_ON, MOUNT, Bucket, Job
from jaxhybrid.settings.read import to_yaml

ACCOUNT = "jaxhybrid"  # Kubernetes service account that may use the bucket
CONTAINER = "jaxhybrid"
CONFIG_FOLDER = "/etc/jaxhybrid"
GRACE_SECONDS = 300  # from SIGTERM to SIGKILL, to write a checkpoint; spot VMs have 15 s whatever is written here
RESTARTS = 5  # after what is neither a stop nor a lost host
# What one host has written the others see at once; on large machines the default is that they never look again.
FUSE_OPTIONS = ("implicit-dirs", "metadata-cache:ttl-secs:0", "metadata-cache:negative-ttl-secs:0")


def jobset(job: Job) -> str:
    """The ConfigMap with the run's config and the JobSet, as one YAML file for `kubectl apply`."""
    documents = [_config_map(job), _jobset(job)]
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Texts of several lines as such, and no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def _config_map(job: Job) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": job.name},
        "data": {"config.yaml": to_yaml(job.config)},
    }


def _jobset(job: Job) -> dict[str, Any]:
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": job.name,
            # One job takes one node pool, which is one slice.
            "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": RESTARTS,
                "rules": [
                    _rule("putRight", "FailJobSet", _PUT_RIGHT),
                    _rule("goOn", "RestartJobSetAndIgnoreMaxRestarts", *_ENDED),
                ],
            },
            "replicatedJobs": [{"name": "slice", "replicas": job.slices, "template": {"spec": _job(job)}}],
        },
    }


# The rules of a job by which a pod's end is told to the JobSet; their numbers are in the messages of failed jobs.
_PUT_RIGHT, *_ENDED = range(3)


def _pod_rules() -> list[dict[str, Any]]:
    def ended_with(*codes: int) -> dict[str, Any]:
        return {"containerName": CONTAINER, "operator": "In", "values": list(codes)}

    return [
        {"action": "FailJob", "onExitCodes": ended_with(EXIT_PUT_RIGHT)},
        {"action": "FailJob", "onExitCodes": ended_with(*GO_ON)},
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]


def _rule(name: str, action: str, *numbers: int) -> dict[str, Any]:
    """A rule of the JobSet for jobs that failed by one of the pod rules of these numbers."""
    return {
        "name": name,
        "action": action,
        "onJobFailureReasons": ["PodFailurePolicy"],
        "onJobFailureMessagePatterns": [f"rule at index {number}$" for number in numbers],
    }


def _job(job: Job) -> dict[str, Any]:
    annotations = {"gke-gcsfuse/volumes": "true"} if isinstance(job.storage, Bucket) else {}
    if annotations:  # the mount's own container may take what it needs
        annotations |= {f"gke-gcsfuse/{limit}-limit": "0" for limit in ("cpu", "memory", "ephemeral-storage")}
    return {
        "parallelism": job.slice.hosts,
        "completions": job.slice.hosts,
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": _pod_rules()},
        "template": {"metadata": {"annotations": annotations}, "spec": _pod(job)},
    }


def _pod(job: Job) -> dict[str, Any]:
    tolerations = [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}]
    selector = {
        "cloud.google.com/gke-tpu-accelerator": job.tpu.accelerator,
        "cloud.google.com/gke-tpu-topology": job.slice.shape,
    }
    if job.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        spot = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        tolerations.append(spot)
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "serviceAccountName": ACCOUNT,
        "nodeSelector": selector,
        "tolerations": tolerations,
        "containers": [_container(job)],
        "volumes": [{"name": "config", "configMap": {"name": job.name}}, {"name": "runs", **_volume(job)}],
    }


def _container(job: Job) -> dict[str, Any]:
    token = {"secretKeyRef": {"name": "huggingface", "key": "token", "optional": True}}
    return {
        "name": CONTAINER,
        "image": job.image,
        "imagePullPolicy": "Always",  # the same name may be another image by now, and all hosts must have the same
        "args": ["run", f"{CONFIG_FOLDER}/config.yaml"],
        "env": [
            *({"name": name, "value": value} for name, value in job.environment.items()),
            {"name": "HF_TOKEN", "valueFrom": token},
        ],
        "securityContext": {"privileged": True},  # TPUs lock more memory than a plain container may
        "resources": {"limits": {"google.com/tpu": job.slice.per_host}},
        "volumeMounts": [{"name": "config", "mountPath": CONFIG_FOLDER}, {"name": "runs", "mountPath": MOUNT}],
    }


def _volume(job: Job) -> dict[str, Any]:
    if isinstance(job.storage, Bucket):
        attributes = {"bucketName": job.storage.name, "mountOptions": ",".join(FUSE_OPTIONS)}
        return {"csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": attributes}}
    assert job.storage is not None
    return {"nfs": {"server": job.storage.server, "path": job.storage.path}}
