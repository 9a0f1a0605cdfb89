"""Runs of two processes: what one process gives, written once; stopped, failing and disagreeing together."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from jaxhybrid import hosts
from jaxhybrid.errors import EXIT_TRY_AGAIN, RunError, exit_code
from jaxhybrid.run_folder import RunFolder
from jaxhybrid.settings.read import load_config
from jaxhybrid.train.interrupt import Interrupted
from jaxhybrid.train.loop import go_to, place_of
from tests.runs import START, close, exported, free_port, read, records
from tests.tiny import write_config

GLOO = re.compile(r"\[Gloo\]|peer ranks")  # what JAX's collectives on CPUs print, from several threads
# One process compiles for both. JAX's key of a program has the devices as its process sees them, which would forbid it.
SHARED_PROGRAMS = """
from jax._src import cache_key
cache_key._hash_accelerator_config = cache_key._hash_devices
"""
# SIGTERM in the middle of distillation; slowly from there on, for the notice takes a second or two.
STOP_IN_DISTILL = """
import os, signal, time
from jaxhybrid.train import loop

class Recorder(loop.Recorder):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.here = settings["label"] == "distill"

    def write(self, record):
        super().write(record)
        if self.here and record["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        if self.here and record["step"] >= 3:
            time.sleep(0.7)

loop.Recorder = Recorder
"""
JOINED = """
import os, signal, sys, time
from pathlib import Path
import jax
from jaxhybrid import hosts
from jaxhybrid.errors import DataError, RunError
hosts.GRACE_SECONDS, hosts.VISIBLE_SECONDS, hosts.HEARTBEAT_SECONDS = 1, 1, 5
me, port = int(sys.argv[1]), sys.argv[2]
hosts.initialize(f"localhost:{port}", 2, me)
"""


def together(
    codes: Sequence[str], commands: Sequence[Sequence[str | Path]], folder: Path, environment: dict[str, str]
) -> list[subprocess.CompletedProcess[str]]:
    """Python processes of these codes, at the same time, to their end."""
    folder.mkdir(exist_ok=True)
    running = []
    for number, (code, command) in enumerate(zip(codes, commands)):
        out, err = ((folder / f"{number}.{name}").open("w") for name in ("out", "err"))
        arguments = [sys.executable, "-c", code, *map(str, command)]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | environment
        running.append(subprocess.Popen(arguments, stdout=out, stderr=err, cwd=folder, env=environment))
    try:
        codes_of_exit = [process.wait(300) for process in running]
    finally:
        for process in running:
            process.kill()
    return [
        subprocess.CompletedProcess([], code, *((folder / f"{number}.{name}").read_text() for name in ("out", "err")))
        for number, code in enumerate(codes_of_exit)
    ]


def joined(folder: Path, code: str, begin: str = JOINED) -> list[subprocess.CompletedProcess[str]]:
    """Two processes of one device each, joined, that run `code`."""
    port = free_port()
    return together([begin + code] * 2, [(str(me), str(port)) for me in range(2)], folder, {"JAX_NUM_CPU_DEVICES": "1"})


def start_two(whole, folder: Path, *arguments: str | Path, own=((), ()), before=("", "")):
    """`jaxhybrid` in two processes of four devices each; what is each one's `own` comes last."""
    port = free_port()
    commands = [
        [*arguments, *own[me], "--coordinator", f"localhost:{port}", "--processes", 2, "--process", me]
        for me in range(2)
    ]
    environment = whole.environment | {"JAX_NUM_CPU_DEVICES": "4", "JAX_SHARE_BINARY_BETWEEN_HOSTS": "1"}
    return together([f"{START}{SHARED_PROGRAMS}{extra}\nmain()" for extra in before], commands, folder, environment)


def last_lines(done: subprocess.CompletedProcess[str]) -> str:
    return done.stderr[-4000:]


def test_two_processes_stopped_on_the_way_give_what_one_gives(whole, tmp_path):
    run, tokens = tmp_path / "run", tmp_path / "tokens"
    command = ("run", whole.config, f"run_dir={run}", f"data.cache_dir={tokens}")
    stopped = start_two(whole, tmp_path / "stopped", *command, before=("", STOP_IN_DISTILL))
    assert [done.returncode for done in stopped] == [143, 143], [*map(last_lines, stopped)]
    assert "Traceback" not in stopped[0].stderr + stopped[1].stderr
    message = next(line for line in stopped[0].stderr.splitlines() if line.startswith("error: "))
    step = int(message.split("after step ")[1].split()[0])
    assert 3 < step < 10
    assert (run / "distill" / "checkpoints" / str(step)).is_dir()
    assert not (run / "distill" / "done.json").exists()
    assert "distill stopped by signal 15" in message
    assert "the log of the first process says why" in stopped[1].stderr

    resumed = start_two(whole, tmp_path / "resumed", *command)
    assert [done.returncode for done in resumed] == [0, 0], [*map(last_lines, resumed)]
    assert "score layer" not in resumed[0].stderr
    for stage in ("align", "distill", "finetune"):
        close(records(run / stage), records(whole.run / stage))
    for name in ("scores.json", "layers.json", "evaluation.json"):
        close(read(run / name), read(whole.run / name))
    for stage in ("align", "score", "distill", "finetune"):
        ours, theirs = read(run / stage / "done.json"), read(whole.run / stage / "done.json")
        assert ours["mean_segment_tokens"] == theirs["mean_segment_tokens"]
    close(exported(run), exported(whole.run))
    assert (run / "report" / "index.html").exists()

    # Written and said once, and nothing left over.
    assert len(list(run.glob("align/tensorboard/*"))) == 1
    assert len(list(run.glob("distill/tensorboard/*"))) == 2  # two starts
    assert len(list(tokens.iterdir())) == 1
    assert not list(tmp_path.rglob(".*"))
    assert "evaluation" not in resumed[1].stdout
    assert "exported to" in resumed[0].stdout
    for done in (stopped[1], resumed[1]):
        assert not [line for line in done.stdout.splitlines() if line.strip() and not GLOO.search(line)]
        assert "tok/s" not in done.stderr


def test_processes_of_different_configs_are_refused(whole, tmp_path):
    own = [(f"run_dir={tmp_path / 'run'}", f"align.learning_rate={rate}") for rate in (0.5, 0.25)]
    done = start_two(whole, tmp_path / "logs", "align", whole.config, own=own)
    assert [process.returncode for process in done] == [2, 2], [*map(last_lines, done)]
    assert "error: The hosts have different configs:\n  align.learning_rate: 0.5 on process 0" in done[0].stderr
    assert "0.25 on process 1" in done[0].stderr
    assert "align.learning_rate" not in done[1].stderr
    assert not (tmp_path / "run").exists()


def test_processes_tell_each_other_and_stop_together_between_loops(tmp_path):
    done = joined(
        tmp_path / "logs",
        """
assert hosts.gather({"me": me}, "numbers") == [{"me": 0}, {"me": 1}]
assert hosts.broadcast(me + 5, "number") == 5
hosts.agree({"same": [1, "a"]}, "values")
assert hosts.by_first(lambda: [hosts.gather(me, "inside"), me], "work") == [[0], 0]
folder = Path("shared"); folder.mkdir(exist_ok=True)
with hosts.first_in_turn("file"):
    if me == 1: assert (folder / "made").exists()
    else: time.sleep(0.5); (folder / "made").touch()
def fail(): raise DataError("no text")
try: hosts.by_first(fail, "fail")
except DataError as error: assert error.shared and str(error) == "no text"
hosts.require_shared(folder)
assert sorted(os.listdir(folder)) == ["made"]
own = Path(f"own{me}"); own.mkdir()
try: hosts.require_shared(own)
except RunError as error: assert "process 1 (" in str(error) and "not the same folder" in str(error)
else: sys.exit(9)
hosts.say(f"said by {me}")

from jaxhybrid.train.interrupt import Interrupted, stop_between
stop_between("align")
if me == 1: os.kill(os.getpid(), signal.SIGTERM)
time.sleep(3)
try:
    for stage in ("score", "distill", "finetune"): stop_between(stage)
except Interrupted as error: hosts.leave(error)
""",
    )
    assert [process.returncode for process in done] == [143, 143], [*map(last_lines, done)]
    assert "said by 0" in done[0].stdout
    assert "said" not in done[1].stdout


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RunError("no space"), 2),
        (OSError("no space"), 1),
        (Interrupted("stopped", 15), 143),
        (SystemExit(75), 75),
        (SystemExit("text"), 1),
        (KeyboardInterrupt(), 1),
    ],
)
def test_exit_codes(error, code):
    assert exit_code(error) == code


def test_a_process_that_fails_ends_the_others_with_its_code(tmp_path):
    done = joined(
        tmp_path / "logs",
        """
class Late(RunError):
    exit_code = 75

if me == 1:
    hosts.leave(Late("no space"))
hosts.barrier("in vain")
""",
    )
    assert [process.returncode for process in done] == [75, 75], [*map(last_lines, done)]
    assert "failed: Late: no space" in done[0].stderr


def test_a_process_that_is_killed_ends_the_others_at_once(tmp_path):
    done = joined(
        tmp_path / "logs",
        """
if me == 1:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    hosts.barrier("in vain")
except BaseException as error:
    hosts.await_death(error)
    raise
""",
        JOINED.replace("HEARTBEAT_SECONDS = 1, 1, 5", "HEARTBEAT_SECONDS = 1, 1, 3600"),
    )
    assert done[1].returncode == -signal.SIGKILL
    assert done[0].returncode == EXIT_TRY_AGAIN, last_lines(done[0])
    assert re.findall(r"^error: process 1 on .* has died", done[0].stderr, re.MULTILINE)
    assert "Traceback" not in done[0].stderr


def test_a_process_that_is_lost_ends_the_others(tmp_path):
    """With no connection that would tell: a host that is gone closes none."""
    done = joined(
        tmp_path / "logs",
        """
if me == 1:
    os.kill(os.getpid(), signal.SIGKILL)
hosts.barrier("in vain")
""",
        JOINED.replace("hosts.initialize", "hosts._hold_lifeline = lambda: None\nhosts.initialize"),
    )
    assert done[1].returncode == -signal.SIGKILL
    assert done[0].returncode not in (0, -signal.SIGKILL)
    assert "stopped sending heartbeats" in done[0].stderr


def test_an_unreachable_first_process_is_told(tmp_path):
    begin = JOINED.replace("hosts.initialize", "if me: hosts.lifelines.connect = refuse\nhosts.initialize")
    refuse = 'def refuse(*given): raise OSError("no route")\n'
    done = joined(tmp_path / "logs", 'hosts.barrier("both")', begin.replace("me, port =", f"{refuse}me, port ="))
    assert [process.returncode for process in done] == [0, 0], [*map(last_lines, done)]
    assert "warning: process 1 on " in done[1].stderr
    assert "no route" in done[1].stderr
    assert "error" not in done[0].stderr


def test_too_few_processes_are_named(tmp_path):
    code = JOINED.replace("hosts.initialize", "hosts.JOIN_SECONDS = 2\nif me == 0: hosts.initialize")
    first, _ = joined(tmp_path / "logs", "", code)
    assert first.returncode == EXIT_TRY_AGAIN
    assert "error: not all of 2 processes have come to localhost:" in first.stderr


class Stream:
    def __init__(self, state):
        self.state = state

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state


@pytest.mark.parametrize("states", [[{"document": 3}, {"document": 4}], [{"document": 3}, {"document": 3}]])
def test_a_stream_goes_on_where_this_process_was(monkeypatch, states):
    monkeypatch.setattr(hosts, "gather", lambda value, what: states)
    place, stream = place_of(Stream(states[0])), Stream(None)
    assert ("of_each_process" in place) == (states[0] != states[1])
    monkeypatch.setattr("jax.process_index", lambda: 1)
    go_to(place, stream)
    assert stream.state == states[1]


def test_the_mark_of_a_killed_process_is_removed(tmp_path, monkeypatch):
    config = load_config(write_config(tmp_path / "config.yaml", tmp_path / "teacher"), [])
    monkeypatch.setattr(hosts, "count", lambda: 2)
    with monkeypatch.context() as killed:
        killed.setattr(Path, "unlink", lambda *given, **options: None)
        RunFolder.open(config)
    run = tmp_path / "run"
    (mark,) = run.glob(".*")
    mark.rename(run / mark.name.replace(str(os.getpid()), "999999999"))
    RunFolder.open(config)
    assert not list(run.glob(".*"))
