"""`jaxhybrid` as tests/soak.py starts it: tells how far it is, and at its moment stands still until it is answered.

A moment is an act on a file of the run (opened to be written, renamed, removed; a folder made), counted from the
beginning of a phase, or so many seconds after that beginning. The SOAK variable has, as JSON:

    processes     of this run
    say, hear     file descriptors: lines of JSON out, a byte in; without them nothing is told
    folder        whose files count
    phase, act, seconds      the moment; `act` 0: by the clock; no `phase`: there is none
"""

import json
import os
import sys
import threading
import time
from functools import wraps

sys.modules["torch"] = None  # as on most machines that train

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}
SOAK = json.loads(os.environ["SOAK"])


class Watch:
    """Counts acts and seconds of each phase."""

    def __init__(self, phases):
        self.phases, self.lock, self.target, self.armed = phases, threading.Lock(), SOAK.get("phase"), False
        self.enter(phases[0], told=False)

    def enter(self, phase, told=True):
        """Tells of the phase that ends; another one begins."""
        if told:
            self.tell()
        self.phase, self.acts, self.began = phase, 0, time.monotonic()
        if self.target and not self.armed and self.phases.index(phase) >= self.phases.index(self.target):
            self.armed, self.left = True, SOAK["act"]
            if not self.left:
                timer = threading.Timer(SOAK["seconds"], self.strike, ["by the clock"])
                timer.daemon = True
                timer.start()

    def tell(self):
        say(phase=self.phase, acts=self.acts, seconds=time.monotonic() - self.began)

    def see(self, event, arguments):
        """An audit hook."""
        if event == "open":
            path, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event in CHANGES:
            path = arguments[0]
        else:
            return
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(SOAK["folder"]):
            return
        self.acts += 1
        if self.armed and SOAK["act"]:
            self.left -= 1
            if self.left == 0:
                self.strike(f"{event} {os.path.relpath(path, SOAK['folder'])}")

    def strike(self, where):
        with self.lock:
            if self.target is None:
                return
            self.target = None
        say(struck=self.phase, where=where)
        os.read(SOAK["hear"], 1)


def say(**line):
    os.write(SOAK["say"], json.dumps(line).encode() + b"\n")


def watch(pipeline):
    """Phases are the stages of a run, what is before them, and the report."""
    stages = ("align", "score", "select", "distill", "finetune", "evaluate", "export")
    seen = Watch(("start", *stages, "report"))

    def entering(name, work):
        @wraps(work)
        def begun(*arguments, **options):
            seen.enter(name)
            return work(*arguments, **options)

        return begun

    for name in stages:
        setattr(pipeline.Pipeline, name, entering(name, getattr(pipeline.Pipeline, name)))
    pipeline.write_report = entering("report", pipeline.write_report)
    sys.addaudithook(seen.see)
    return seen


def main():
    from jax._src import cache_key

    from jaxhybrid import cli, hosts, pipeline

    hosts.JOIN_SECONDS, hosts.HEARTBEAT_SECONDS, hosts.GRACE_SECONDS, hosts.VISIBLE_SECONDS = 60, 10, 2, 5
    if SOAK["processes"] > 1:
        # One process compiles for both. JAX's key of a program has the devices as its process sees them.
        cache_key._hash_accelerator_config = cache_key._hash_devices
    seen = watch(pipeline) if "say" in SOAK else None
    try:
        cli.main()
    finally:
        if seen:
            seen.tell()


if __name__ == "__main__":
    main()
