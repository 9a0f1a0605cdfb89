"""One run on many hosts: starting together, agreeing, one writer, stopping at the same step, and ending together.

A process is one of `jax.distributed`'s; the first one is number 0. What they tell each other here is JSON and goes
through JAX's coordination service, so no device waits for it. Every process must make the same calls in the same order,
from its main thread. A process alone makes none: every function then does the obvious thing.
"""

import atexit
import contextlib
import itertools
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
from jax._src import clusters, distributed  # the public API has neither the cluster's size nor the service's store
from jax.experimental import multihost_utils

from jaxhybrid import errors, lifelines
from jaxhybrid.errors import JaxHybridError, RunError

JOIN_SECONDS = 300  # for all processes to come
HEARTBEAT_SECONDS = 45  # without a sign of life a process counts as dead, and JAX ends the others
GRACE_SECONDS = 10  # for a process to end by itself after another one has failed
DEATH_SECONDS = 3  # in which all know of a death that a collective failed for
VISIBLE_SECONDS = 30  # for a new file to be seen by the other hosts
FOREVER_MS = 7 * 24 * 3600 * 1000  # one host may tokenise for days; who dies meanwhile is found by the heartbeat
MARK = "seen-by-all"  # in a run folder
FAILED, LEFT, LINES = "jaxhybrid/failed", "jaxhybrid/left/", "jaxhybrid/lifelines"

_exchanges = itertools.count()
_stop_checks = itertools.count(1)
_ended = threading.Event()
_death = threading.Event()


class _Local:
    """What this process knows of itself."""

    by_itself = False  # inside `by_first`, where the others only wait
    stopping = False


# --- starting


def initialize(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the other processes of this run, named or found by JAX (TPU pods, GKE, Slurm, Open MPI). Before any device.

    A process that is named alone (`processes=1`), or that is in no cluster or the only one there, stays by itself.

    Args:
        coordinator: HOST:PORT of the first process.
        processes: how many there are.
        process: which one this is, from 0.

    Raises:
        RunError: the arguments are not enough, or the cluster does not say how many processes there are.
    """
    if jax.distributed.is_initialized() or processes == 1:
        return
    named = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    in_cluster = _processes_of_cluster() if None in named.values() else None
    if all(value is None for value in named.values()) and in_cluster in (None, 1):
        return
    missing = [option for option, value in named.items() if value is None]
    if in_cluster is None and missing:
        raise RunError(f"{', '.join(missing)} must be given, too: no cluster was found that would tell.")
    where = coordinator or "the first process"
    count = processes or in_cluster
    too_few = threading.Timer(JOIN_SECONDS, _give_up, [f"{where} after {JOIN_SECONDS} s", count])
    too_few.daemon = True
    too_few.start()
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            initialization_timeout=JOIN_SECONDS + 60,  # ours speaks first
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
        multihost_utils.sync_global_devices("joined")  # their devices reach each other, and do so from now on
    except ValueError as error:
        raise RunError(f"The processes cannot be joined: {error}") from error
    finally:
        too_few.cancel()
    _hold_lifeline()
    watch = threading.Thread(target=_watch, name="watch hosts", daemon=True)
    watch.start()
    atexit.register(_ended.set)
    atexit.register(lifelines.goodbye)


def _processes_of_cluster() -> int | None:
    for cluster in clusters.ClusterEnv._cluster_types:
        try:
            if not cluster.opt_in_only_method and cluster.is_env_present():
                return cluster.get_process_count()
        except Exception as error:  # a metadata server or an API that does not answer, a missing permission
            raise RunError(
                f"{cluster.__name__} was found but does not say how many processes there are ({error}). Name them with "
                "--coordinator, --processes and --process; --processes 1 is a process by itself."
            ) from error
    return None


def _give_up(where: str, count: int | None) -> None:
    _tell(
        f"error: not all of {count} processes have come to {where}. Start the same command on every host, with "
        "another --process each where they are named, and let the port through; --processes 1 is a process by itself."
    )
    os._exit(errors.EXIT_TRY_AGAIN)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- who is who


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return distributed.global_state.process_id == 0


def count() -> int:
    """How many processes there are."""
    return distributed.global_state.num_processes


def are_joined() -> bool:
    """Whether there is a coordination service: stops are agreed on and other processes' failures are seen."""
    return _service() is not None


def _service() -> Any:
    return distributed.global_state.client


def say(text: str) -> None:
    """Prints, once for all hosts."""
    if is_first():
        print(text, flush=True)


# --- telling each other


def gather(value: Any, what: str) -> list[Any]:
    """Every process's `value` (JSON), in the order of the processes. `what` must be the same on all of them."""
    client = _service()
    if client is None or _Local.by_itself:
        if jax.process_count() > 1 and not _Local.by_itself:
            raise RunError("Several processes without jax.distributed.initialize(): call it before anything else.")
        return [value]
    number = next(_exchanges)
    folder = f"jaxhybrid/exchange/{number}/"
    client.key_value_set(f"{folder}{jax.process_index()}", json.dumps([what, value]))
    client.wait_at_barrier(f"jaxhybrid {number}", FOREVER_MS)
    found = {int(key.rsplit("/", 1)[1]): json.loads(text) for key, text in client.key_value_dir_get(folder)}
    if is_first() and number:
        client.key_value_delete(f"jaxhybrid/exchange/{number - 1}/")  # all are past it
    told = [found[process] for process in range(count())]
    if any(name != what for name, _ in told):
        raise RuntimeError(f"processes are at different places: {[name for name, _ in told]}")
    return [value for _, value in told]


def barrier(what: str) -> None:
    """Until every process is here."""
    gather(None, what)


def broadcast(value: Any, what: str) -> Any:
    """The first process's `value` (JSON)."""
    return gather(value if is_first() else None, what)[0]


def agree(values: dict[str, Any], what: str) -> None:
    """Refuses to go on when processes hold different `values` (JSON).

    Raises:
        RunError: on all of them; names what differs, each value, and the hosts that have it.
    """
    hosts, told = zip(*gather([platform.node(), values], f"agree on {what}"))
    lines = []
    for key in sorted(set().union(*told)):
        holders: dict[str, list[str]] = {}
        for process, (host, own) in enumerate(zip(hosts, told)):
            holders.setdefault(json.dumps(own.get(key)), []).append(f"{process} ({host})")
        if len(holders) > 1:
            lines.append(f"  {key}: " + "; ".join(f"{value} on {_some(held)}" for value, held in holders.items()))
    if lines:
        raise _shared(
            RunError(f"The hosts have different {what}:\n" + "\n".join(lines) + "\nMake them the same on all hosts.")
        )


def _some(names: list[str]) -> str:
    return f"process {', '.join(names[:4])}" + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def by_first[T](work: Callable[[], T], what: str) -> T:
    """What `work` gives on the first process (JSON), or the error that it raises, on all of them.

    The others wait for it. What `work` itself asks of this module it is answered as a process alone.
    """
    if not are_joined() or _Local.by_itself:
        return work()
    outcome: dict[str, Any] = {}
    raised: JaxHybridError | None = None
    if is_first():
        _Local.by_itself = True
        try:
            outcome = {"value": work()}
        except JaxHybridError as error:
            raised, outcome = error, {"error": type(error).__name__, "text": str(error)}
        finally:
            _Local.by_itself = False
    outcome = broadcast(outcome, what)
    if "error" in outcome:
        raise _shared(raised or getattr(errors, outcome["error"], RunError)(outcome["text"]))
    return outcome["value"]


@contextmanager
def first_in_turn(what: str) -> Iterator[None]:
    """The block on the first process, then on all others: what it makes they find, where they see the same disk."""
    if not is_first():
        barrier(what)
    try:
        yield
    finally:
        if is_first():
            barrier(what)


def require_shared(folder: Path) -> None:
    """Refuses a folder that is another one on other hosts.

    Raises:
        RunError: some process does not see what the first one writes into it; names it.
    """
    if count() == 1:
        return

    def write() -> str:
        path = folder / f".{MARK}.{platform.node()}-{os.getpid()}-0.tmp"  # as drafts are called
        path.touch()
        return path.name

    mark = folder / by_first(write, "mark the run folder")
    until = time.monotonic() + VISIBLE_SECONDS
    while not (seen := mark.exists()) and time.monotonic() < until:
        time.sleep(0.2)
    told = enumerate(gather([platform.node(), seen], "see the mark"))
    blind = [f"{process} ({host})" for process, (host, found) in told if not found]
    by_first(lambda: mark.unlink(), "unmark the run folder")
    if blind:
        raise _shared(
            RunError(
                f"{folder} is not the same folder on all hosts: {_some(blind)} does not see what the first process "
                "writes there. Choose a run_dir that all hosts share (NFS, Filestore, Lustre, a mounted bucket)."
            )
        )


def _shared[E: JaxHybridError](error: E) -> E:
    error.shared = True
    return error


# --- stopping, and ending together


def stop_agreed() -> bool:
    """Whether this is where all processes stop, since one of them was sent SIGTERM. From then on always true.

    They must call it equally often; the notice takes a second or two to become an agreement.
    """
    if are_joined() and not _Local.stopping:
        _Local.stopping = multihost_utils.reached_preemption_sync_point(next(_stop_checks))
    return _Local.stopping


def report_failure(error: BaseException) -> None:
    """Tells the other processes that this one cannot go on: they may be waiting for it, and end within seconds, with
    the exit code that it has."""
    await_death(error)
    if are_joined() and not getattr(error, "shared", False):
        text = f"process {jax.process_index()} on {platform.node()} failed: {type(error).__name__}: {error}"
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first, or the service is gone
            _service().key_value_set(FAILED, json.dumps([errors.exit_code(error), text, False]))


@contextmanager
def failures_reported() -> Iterator[None]:
    """Reports at once what the block raises; closing files and writers may then wait for other processes in vain."""
    try:
        yield
    except BaseException as error:
        report_failure(error)
        raise


def leave(error: BaseException) -> None:
    """Ends this process for an error; if it is one that the others do not have, without waiting for them."""
    code = errors.exit_code(error)
    if not are_joined() or getattr(error, "shared", False):
        sys.exit(code)
    report_failure(error)
    _end(code)


def _watch() -> None:
    """Ends this process when another one has reported a failure and it does not end by itself."""
    client = _service()
    while not _ended.wait(1):
        try:
            code, failure, dead = json.loads(client.key_value_try_get(FAILED))
        except jax.errors.JaxRuntimeError:  # none yet
            continue
        if dead:
            _death.set()
        if dead or not _ended.wait(GRACE_SECONDS):
            _tell(f"error: {failure}")
            _end(code)


def _hold_lifeline() -> None:
    """From now on a death is known at once, and to all."""
    client = _service()
    if is_first():
        client.key_value_set(LINES, json.dumps(lifelines.serve(_died)))
        return
    port, key = json.loads(client.blocking_key_value_get(LINES, 1000 * JOIN_SECONDS))
    coordinator = distributed.global_state.coordinator_address
    assert coordinator is not None
    host = coordinator.rsplit(":", 1)[0].strip("[]")
    try:
        lifelines.connect((host, port), key, jax.process_index(), platform.node())
    except OSError as error:
        _tell(
            f"warning: process {jax.process_index()} on {platform.node()} does not reach the first one at "
            f"{host}:{port} ({error}). If it dies, the others end {HEARTBEAT_SECONDS} s later and say less of it."
        )


def _died(process: int, host: str) -> None:
    """Ends all processes, from a thread of the first one."""
    _death.set()
    client = _service()
    text = (
        f"process {process} on {host} has died: it was killed, ran out of memory or crashed (its own log may say why). "
        "The same command goes on from the newest checkpoint."
    )
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # another failure was first
        client.key_value_set(FAILED, json.dumps([errors.EXIT_TRY_AGAIN, text, True]))
    client.key_value_set(f"{LEFT}{process}", "")
    _tell(f"error: {text}")
    _end(errors.EXIT_TRY_AGAIN)


def await_death(error: BaseException) -> None:
    """Where a collective failed because a process has died, that is what is said: this one ends here."""
    if are_joined() and isinstance(error, jax.errors.JaxRuntimeError) and _death.wait(DEATH_SECONDS):
        threading.Event().wait()  # for the thread that knows of it


def _end(code: int) -> None:
    """At once. The first process, which has the service, lets the others read first why."""
    lifelines.goodbye()
    client = _service()
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(Exception):
        client.key_value_set(f"{LEFT}{jax.process_index()}", "")
        until = time.monotonic() + 2 * GRACE_SECONDS
        while is_first() and len(client.key_value_dir_get(LEFT)) < count() and time.monotonic() < until:
            time.sleep(0.2)
    os._exit(code)
