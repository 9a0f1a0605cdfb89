"""JobSets against the schemas of Kubernetes and JobSet, what follows an exit code, and the script's commands."""

import copy
import re
from pathlib import Path

import pytest
import yaml

from jaxhybrid.launch.gke import jobset
from jaxhybrid.launch.write import write_job
from jaxhybrid.settings.read import load_config
from tests.launch.jobs import Machine, make_job
from tests.launch.schema import problems

SCHEMA = yaml.safe_load((Path(__file__).parent / "jobset.yaml").read_text())
NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
JOBS = {
    "one slice": {},
    "several slices, spot": {"topology": "v6e:8x8", "slices": 3, "spot": True},
    "one machine, NFS": {"topology": "v5e:2x4", "bucket": None, "nfs": "10.0.0.2:/runs"},
    "two devices a chip": {"topology": "tpu7x:2x2x2"},
}


def documents(job):
    config_map, made = yaml.safe_load_all(jobset(job))
    return config_map, made


def pod_of(made):
    return made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


@pytest.mark.parametrize("given", JOBS.values(), ids=JOBS)
def test_a_jobset_is_one(given, tmp_path):
    job = make_job(**given)
    config_map, made = documents(job)
    assert not list(problems(made, SCHEMA))
    assert (made["apiVersion"], made["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert made["metadata"].keys() == {"name", "annotations"}
    assert NAME.fullmatch(made["metadata"]["name"])

    # What the schema does not say: names that lead somewhere, and as many pods as the slice has VMs.
    (replicated,) = made["spec"]["replicatedJobs"]
    one, pod = replicated["template"]["spec"], pod_of(made)
    (container,) = pod["containers"]
    assert replicated["replicas"] == job.slices
    assert one["parallelism"] == one["completions"] == job.slice.hosts
    chips = one["completions"] * container["resources"]["limits"]["google.com/tpu"]
    sizes = [int(size) for size in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")]
    assert chips == {2: sizes[0] * sizes[1], 3: sizes[0] * sizes[1] * sizes[-1]}[len(sizes)]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert pod["volumes"][0]["configMap"]["name"] == config_map["metadata"]["name"]
    assert pod["restartPolicy"] == "Never"  # pod failure policies are for no other
    assert ("cloud.google.com/gke-spot" in pod["nodeSelector"]) == job.spot
    assert any(tolerated["key"] == "cloud.google.com/gke-spot" for tolerated in pod["tolerations"]) == job.spot

    verb, path = container["args"]
    mounted = next(mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "config")
    assert (verb, path) == ("run", f"{mounted}/config.yaml")
    (tmp_path / "config.yaml").write_text(config_map["data"]["config.yaml"])
    config = load_config(tmp_path / "config.yaml")
    assert config == job.config
    runs = next(mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "runs")
    for inside in (config.run_dir, config.data.cache_dir, job.environment["HF_HOME"]):
        assert inside.startswith(f"{runs}/")


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("nodeselector", {}, "nodeselector is unknown"),
        ("nodeSelector", {"cloud.google.com/gke-spot": True}, "True is no string"),
        ("terminationGracePeriodSeconds", "300", "'300' is no integer"),
        ("volumes/1/csi/driver", None, "None is no string"),
        ("volumes/1/csi/volumeAttributes/bucketName", 7, "7 is no string"),
        ("containers/0/name", None, "None is no string"),
        ("containers/0/volumeMounts/0", {"name": "config"}, "mountPath is missing"),
        ("containers/0/resources/limits/google.com~tpu", [4], "[4] is neither"),
        ("containers/0/env/0", {"value": "1"}, "name is missing"),
        ("containers/0/command", "run", "'run' is no array"),
    ],
)
def test_a_mistake_in_a_pod_is_found(path, value, problem):
    _, made = documents(make_job())
    *parents, last = (int(part) if part.isdigit() else part.replace("~", "/") for part in path.split("/"))
    place = pod_of(made)
    for part in parents:
        place = place[part]
    place[last] = value
    (found,) = problems(made, SCHEMA)
    assert problem in found


def test_a_mistake_in_a_failure_policy_is_found():
    _, right = documents(make_job())
    for change in ({"action": "Restart"}, {"name": None}, {"onExitCodes": [2]}):
        made = copy.deepcopy(right)
        made["spec"]["failurePolicy"]["rules"][0] |= change
        assert list(problems(made, SCHEMA)), change


def action_after(made, code=None, condition=None):
    """What JobSet does when a pod has ended so, by the rules as Kubernetes and JobSet read them."""
    one = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    for number, rule in enumerate(one["podFailurePolicy"]["rules"]):
        codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions", [])
        if (codes and codes["operator"] == "In" and code in codes["values"]) or (
            condition in [found["type"] for found in conditions]
        ):
            what = f"has condition {condition}" if condition else f"failed with exit code {code}"
            reason, message = "PodFailurePolicy", f"Pod default/x {what} matching FailJob rule at index {number}"
            break
    for rule in made["spec"]["failurePolicy"]["rules"]:
        patterns = rule["onJobFailureMessagePatterns"]
        if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
            return rule["action"]
    return "RestartJobSet"


def test_what_follows_the_end_of_a_pod():
    _, made = documents(make_job())
    assert action_after(made, 2) == "FailJobSet"
    for code in (75, 134, 143):
        assert action_after(made, code) == "RestartJobSetAndIgnoreMaxRestarts"
    assert action_after(made, condition="DisruptionTarget") == "RestartJobSetAndIgnoreMaxRestarts"
    for code in (1, 137):
        assert action_after(made, code) == "RestartJobSet"
    assert 0 < made["spec"]["failurePolicy"]["maxRestarts"] < 20
    (container,) = pod_of(made)["containers"]
    rules = made["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert {rule["onExitCodes"]["containerName"] for rule in rules[:2]} == {container["name"]}


@pytest.fixture
def machine(tmp_path):
    """Nothing is there yet but a bucket; `state` is there when the JobSet is, and says what it ended as."""
    machine = Machine(tmp_path)
    gcloud = """
case "$*" in
  *buckets\\ describe*--raw*) cat hierarchical ;;
  *buckets\\ describe*) ;;
  *projects\\ describe*) echo 123 ;;
  *node-pools\\ describe*) grep -q "node-pools create $4 " calls ;;
  *\\ describe\\ *) exit 1 ;;
esac"""
    machine.command("gcloud", gcloud)
    kubectl = """
case "$*" in
  *jsonpath*) [[ ! -e state ]] || echo "JobSet:$(cat state)" ;;
  *delete\\ jobset*) rm -f state ;;
  *apply\\ --filename\\ jobset.yaml*) touch state ;;
esac"""
    machine.command("kubectl", kubectl)
    (tmp_path / "hierarchical").write_text("True\n")
    return machine


def written(folder, **given):
    write_job(make_job(**given), "gke", folder / "files")
    return folder / "files" / "pod.sh"


def test_create_makes_a_node_pool_for_each_slice(machine, tmp_path):
    script = written(tmp_path, slices=3, spot=True)
    done = machine.run(script, "create")
    assert done.returncode == 0, done.stderr
    pools = machine.calls("node-pools create")
    assert [re.search(r"create (\S+)", call)[1] for call in pools] == [
        f"llama-3-2-3b-instruct-{number}" for number in range(3)
    ]
    for pool in pools:
        assert "--machine-type ct5p-hightpu-4t --num-nodes 16 --tpu-topology 4x4x4 --spot" in pool
    assert machine.calls("subject/ns/default/sa/jaxhybrid")
    assert not machine.calls("resource-policies", "buckets create")
    assert machine.run(script, "create").returncode == 0
    assert len(machine.calls("node-pools create")) == 3  # they are there already


def test_create_of_two_devices_a_chip_has_its_topology_from_a_policy(machine, tmp_path):
    assert machine.run(written(tmp_path, **JOBS["two devices a chip"]), "create").returncode == 0
    (policy,), (pool,) = machine.calls("workload-policy"), machine.calls("node-pools create")
    assert "--accelerator-topology 2x2x2" in policy
    assert "--placement-policy llama-3-2-3b-instruct" in pool


def test_a_bucket_whose_folders_are_not_renamed_at_once_is_refused(machine, tmp_path):
    (tmp_path / "hierarchical").write_text("\n")
    done = machine.run(written(tmp_path), "create")
    assert done.returncode == 2
    assert "gs://my-runs has no hierarchical namespace" in done.stderr
    assert not machine.calls("node-pools create", "clusters create")


def test_start_keep_and_delete(machine, tmp_path):
    script = written(tmp_path)
    assert machine.run(script, "start").returncode == 0
    assert not machine.calls("delete jobset")
    assert machine.run(script, "create").returncode == 0
    assert machine.run(script, "start").returncode == 0
    assert not machine.calls("delete jobset")  # it is at work
    for ended, code in (("Failed", 1), ("Completed", 0)):
        (tmp_path / "state").write_text(ended)
        assert machine.run(script, "keep").returncode == code
        assert machine.run(script, "start").returncode == 0
        assert (tmp_path / "state").read_text() == ""
    assert len(machine.calls("delete jobset")) == 2
    assert len(machine.calls("node-pools delete")) == 2
    assert machine.run(script, "stop").returncode == 0
    for verb, wanted in (("keep", 1), ("start", 0)):
        done = machine.run(script, verb)
        assert done.returncode == wanted
        assert ("there is no run llama-3-2-3b-instruct to wait for" in done.stderr) == (verb == "keep")
    assert len(machine.calls("node-pools delete")) == 2
    assert machine.run(script, "delete").returncode == 0
    assert len(machine.calls("node-pools delete")) == 3


def test_without_a_verb_a_script_says_what_it_can(machine, tmp_path):
    done = machine.run(written(tmp_path))
    assert done.returncode == 2
    assert "bash pod.sh create" in done.stdout
    assert "set -e" not in done.stdout
