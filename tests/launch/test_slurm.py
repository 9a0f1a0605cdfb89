"""The Slurm script under an `srun` that starts the tasks as Slurm does."""

import os
import re
import sys

import pytest

from jaxhybrid.launch.job import slurm_job
from jaxhybrid.launch.slices import find_slice
from jaxhybrid.launch.write import write_job
from jaxhybrid.settings.read import load_config
from tests.launch.jobs import RECIPE, Machine

SRUN = """
while [[ $1 == --* ]]; do shift; done
for ((task = 0; task < TASKS; task++)); do
  SLURM_NTASKS=$TASKS SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_STEP_NODELIST=localhost "$@" &
  tasks+=($!)
done
code=0
for task in "${tasks[@]}"; do
  wait "$task" || { ended=$?; ((ended > code)) && code=$ended; }
done
exit $code"""


@pytest.fixture
def machine(tmp_path):
    machine = Machine(tmp_path)
    machine.command("srun", SRUN)
    machine.command("scontrol", "")
    config = load_config(RECIPE, ["mesh={fsdp: 8, context: 2}", "evaluate.batch_size=8"])
    write_job(slurm_job(config, find_slice("h100:2x8")), "slurm", tmp_path / "files")
    return machine


def test_the_tasks_find_each_other(machine):
    say = "print(f'<{hosts.count()} of them, first: {hosts.is_first()}>')"
    code = f"from jaxhybrid import hosts; hosts.initialize(); {say}"
    machine.command("jaxhybrid", f'exec {sys.executable} -c "{code}"')
    job = str(os.getpid() % 4096)  # JAX takes the port from it
    alone = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": "1"}
    done = machine.run(machine.folder / "files" / "job.sh", TASKS="2", SLURM_JOB_ID=job, **alone)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"<2 of them, first: (\w+)>", done.stdout)) == ["False", "True"]
    assert not machine.calls("scontrol")
    assert len(machine.calls(f"jaxhybrid run {machine.folder}/files/config.yaml")) == 2


@pytest.mark.parametrize(
    ("codes", "restarts", "again"),
    [
        ("2 2", 0, False),
        ("143 143", 0, True),
        ("143 75", 40, True),
        ("0 134", 5, False),  # too soon
        ("2 134", 0, False),
        ("134 2", 0, False),
        ("1 134", 4, True),
        ("1 134", 5, False),
        ("1 143", 5, False),
        ("134 137", 5, False),
        ("0 0", 0, False),
    ],
)
def test_what_is_queued_again(machine, codes, restarts, again):
    machine.command("jaxhybrid", f"codes=({codes}); exit ${{codes[$SLURM_PROCID]}}")
    count = {"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}
    done = machine.run(machine.folder / "files" / "job.sh", TASKS="2", SLURM_JOB_ID="7", **count)
    ended = sorted(map(int, codes.split()))
    assert done.returncode == (2 if 2 in ended else ended[-1]), done.stderr
    assert machine.calls("scontrol") == ["scontrol requeue 7"] * again
    assert not list(machine.folder.glob("*.codes"))


def test_a_lost_node_after_a_while_is_no_fault(machine):
    machine.command("jaxhybrid", "exit 134")
    given = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "40", "SHORT_SECONDS": "0"}
    assert machine.run(machine.folder / "files" / "job.sh", TASKS="2", **given).returncode == 134
    assert machine.calls("scontrol") == ["scontrol requeue 7"]


def test_sigterm_to_a_task_comes_to_its_run_which_has_time_to_answer(machine):
    machine.command("jaxhybrid", "trap 'sleep 0.5; exit 143' TERM; kill -TERM $PPID; sleep 20 & wait")
    done = machine.run(machine.folder / "files" / "job.sh", TASKS="1", SLURM_JOB_ID="7", SLURM_RESTART_COUNT="40")
    assert done.returncode == 143, done.stderr
    assert machine.calls("scontrol") == ["scontrol requeue 7"]


def test_what_is_asked_of_slurm(machine):
    script = (machine.folder / "files" / "job.sh").read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script, re.MULTILINE))
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("2", "8", "8")
    assert asked["job-name"] == "llama-3-2-3b-instruct"
    assert asked["signal"] == "TERM@300"
    assert script.index("#SBATCH") < script.index("\nset ")  # Slurm reads them up to the first command
