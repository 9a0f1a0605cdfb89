"""The script for TPU VMs, on a machine whose gcloud plays preemptions and workers that end."""

import subprocess

import pytest

from jaxhybrid.launch.write import write_job
from jaxhybrid.settings.read import load_config
from tests.launch.jobs import IMAGE, Machine, make_job

# A request waits, is there, and does what `worlds` says each time its two workers are asked: what each answers, or what
# has happened to the request; STOP and START before it: somebody has given that verb. A start puts two containers there
# that run.
GCLOUD = r"""
touch state containers
case "$*" in
  *queued-resources\ list*)
    [[ ! -e unreachable ]] || { rm unreachable; exit 1; }
    cat state
    sed -i 's/WAITING_FOR_RESOURCES/ACTIVE/' state
    ;;
  *queued-resources\ create*) cat asked 2> /dev/null > state || echo WAITING_FOR_RESOURCES > state ;;
  *queued-resources\ delete*) : > state; : > containers ;;
  *docker\ inspect*)
    [[ -s containers ]] || { echo none; echo none; exit; }
    world=$(sed -n 1p worlds)
    sed -i 1d worlds
    [[ $world != STOP\ * ]] || { touch files/stopped; world=${world#STOP }; }
    [[ $world != START\ * ]] || { rm files/stopped; world=${world#START }; }
    case $world in
      LOST) exit 255 ;;
      SUSPENDED) echo SUSPENDED > state; exit 255 ;;
      *) tr , '\n' <<< "$world" ;;
    esac
    ;;
  *docker\ run*) [[ ! -e no-image ]] || exit 1; echo started > containers ;;
  *scp*)
    cp "$5" copied-config
    cp "$6" copied-environment
    [[ ! -e no-worker ]] || exit 1
    ;;
esac"""
WHAT = ("create", "delete", "docker run")


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    machine.command("gcloud", GCLOUD)
    return machine


def keep(
    machine: Machine, *worlds: str, short: str = "0", **given
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """`pod.sh keep` in these worlds, and what it did to the request and its workers, in order."""
    (machine.folder / "worlds").write_text("".join(f"{world}\n" for world in worlds))
    write_job(make_job(**({"bucket": None, "nfs": "10.0.0.2:/runs"} | given)), "tpu-vm", machine.folder / "files")
    done = machine.run(machine.folder / "files" / "pod.sh", "keep", HF_TOKEN="secret", SHORT_SECONDS=short)
    calls = machine.calls("queued-resources create", "queued-resources delete", "docker run")
    return done, [next(what for what in WHAT if what in call) for call in calls]


def test_a_run_is_kept_through_preemptions_and_connections_that_fail(machine):
    done, did = keep(
        machine,
        "running 0,running 0",
        "LOST",
        "dead 0,dead 0",
        "exited 143,exited 143",
        "running 0,exited 134",
        "exited 134,exited 75",
        "SUSPENDED",
        "running 0,running 0",
        "exited 0,exited 0",
        spot=True,
    )
    assert done.returncode == 0, done.stderr
    run = "docker run"
    assert did == ["create", run, run, run, "delete", "create", run, "delete"]
    assert (machine.folder / "state").read_text() == ""
    (first, second) = machine.calls("queued-resources create")
    assert first == second
    assert (
        "--type v5p --topology 4x4x4 --runtime-version v2-alpha-tpuv5 --node-id llama-3-2-3b-instruct --spot" in first
    )
    assert "secret" not in "".join(machine.calls("gcloud"))
    assert "HF_TOKEN=secret" in (machine.folder / "copied-environment").read_text()
    assert load_config(machine.folder / "copied-config") == make_job(bucket=None, nfs="10.0.0.2:/runs").config


def test_what_somebody_has_to_put_right_is_shown_and_the_tpus_are_deleted(machine):
    done, did = keep(machine, "exited 2,exited 2")
    assert done.returncode == 2
    assert did == ["create", "docker run", "delete"]
    assert "somebody has to put something right" in done.stderr
    assert machine.calls("docker logs --tail 30")


def test_a_fault_is_tried_a_few_times(machine):
    lost = ["exited 134,exited 134", "exited 143,exited 75"]
    always = ["exited 1,exited 134", "exited 134,exited 137", "exited 139,exited 143", "exited 0,exited 1"]
    done, did = keep(machine, *lost, *always, *["exited 1,exited 1"] * 9)
    assert done.returncode == 1
    # Once as it begins, twice for a worker that was lost, and five times more.
    assert did == ["create", *["docker run"] * 8, "delete"]
    assert "the run has failed 5 times more" in done.stderr


def test_a_worker_lost_at_once_again_and_again_is_a_fault(machine):
    done, did = keep(machine, "exited 143,exited 75", *["exited 134,exited 75"] * 9, short="600")
    assert done.returncode == 1
    assert did == ["create", *["docker run"] * 7, "delete"]


def test_a_start_that_fails_is_tried_a_few_times(machine):
    (machine.folder / "no-image").touch()
    done, did = keep(machine)
    assert done.returncode == 1
    assert did == ["create", *["docker run"] * 5, "delete"]
    assert "the start has failed 5 times one after another" in done.stderr


def test_a_run_that_somebody_has_stopped_begins_again_when_somebody_starts_it(machine):
    ended = "exited 143,exited 143"
    done, did = keep(machine, "running 0,running 0", f"STOP {ended}", ended, f"START {ended}", "exited 0,exited 0")
    assert done.returncode == 0, done.stderr
    assert did == ["create", *["docker run"] * 2, "delete"]
    assert done.stdout.count("is stopped; the TPUs cost") == 2


def test_tpus_of_a_stopped_run_are_not_asked_for_again(machine):
    done, did = keep(machine, "STOP exited 143,exited 143", "SUSPENDED")
    assert done.returncode == 0, done.stderr
    assert did == ["create", "docker run", "delete"]


def test_stop_and_delete_leave_a_mark_that_start_removes(machine):
    folder = machine.folder / "files"
    write_job(make_job(bucket=None, nfs="10.0.0.2:/runs"), "tpu-vm", folder)
    for verb, there in (("stop", True), ("start", False), ("delete", True), ("start", False)):
        assert machine.run(folder / "pod.sh", verb).returncode == 0
        assert (folder / "stopped").exists() == there
    machine.run(folder / "pod.sh", "stop")
    write_job(make_job(bucket=None, nfs="10.0.0.2:/runs"), "tpu-vm", folder)  # other settings
    assert (folder / "stopped").exists()


@pytest.mark.parametrize("fails", [False, True])
def test_no_token_is_left_behind(machine, fails):
    write_job(make_job(), "tpu-vm", machine.folder / "files")
    if fails:
        (machine.folder / "no-worker").touch()
    (machine.folder / "tmp").mkdir()
    given = {"HF_TOKEN": "secret", "TMPDIR": str(machine.folder / "tmp")}
    done = machine.run(machine.folder / "files" / "pod.sh", "start", **given)
    assert (done.returncode != 0) == fails
    assert "secret" in (machine.folder / "copied-environment").read_text()
    assert not list((machine.folder / "tmp").iterdir())
    assert bool(machine.calls("docker run")) != fails


def test_a_request_that_fails_is_shown_and_deleted(machine):
    (machine.folder / "asked").write_text("FAILED")
    done, did = keep(machine)
    assert done.returncode == 1
    assert did == ["create", "delete"]
    assert machine.calls("queued-resources describe")


def test_a_state_that_cannot_be_asked_for_is_not_taken_for_gone(machine):
    write_job(make_job(bucket=None, nfs="10.0.0.2:/runs"), "tpu-vm", machine.folder / "files")
    (machine.folder / "state").write_text("ACTIVE\n")
    (machine.folder / "unreachable").touch()
    done = machine.run(machine.folder / "files" / "pod.sh", "delete")
    assert done.returncode == 0
    assert machine.calls("queued-resources delete")


def test_each_slice_is_a_node(machine):
    done, did = keep(machine, *["exited 0,exited 0"] * 3, topology="v6e:8x8", slices=3)
    assert done.returncode == 0, done.stderr
    assert did == ["create", *["docker run"] * 3, "delete"]
    (create,) = machine.calls("queued-resources create")
    assert "--node-count 3 --node-prefix llama-3-2-3b-instruct" in create
    assert {call.split()[5] for call in machine.calls("tpu-vm ssh")} == {f"llama-3-2-3b-instruct-{n}" for n in range(3)}
    assert len(machine.calls(f"{IMAGE} run /etc/jaxhybrid/config.yaml")) == 3


@pytest.mark.parametrize("given", [{}, {"bucket": None, "nfs": "10.0.0.2:/runs"}])
def test_what_the_workers_run_is_bash(given, tmp_path):
    """The text between the quotes of `on_all`, as the workers get it."""
    machine = Machine(tmp_path)
    machine.command("gcloud", '[[ "$*" != *docker\\ run* ]] || printf %s "${@: -1}" > remote')
    write_job(make_job(**given), "tpu-vm", tmp_path / "files")
    assert machine.run(tmp_path / "files" / "pod.sh", "start").returncode == 0
    assert subprocess.run(["bash", "-n", tmp_path / "remote"]).returncode == 0
    remote = (tmp_path / "remote").read_text()
    if given:
        assert "mount -t nfs -o hard 10.0.0.2:/runs /mnt/runs\n" in remote
    else:
        options = "--implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0"
        assert f"gcsfuse -o allow_other {options} my-runs /mnt/runs\n" in remote
        assert "gcsfuse-'$(lsb_release -cs)' main" in remote
