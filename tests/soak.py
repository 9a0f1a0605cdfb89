"""Runs that are harmed at random moments and end like runs that were left alone: `python -m tests.soak --help`."""

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np

from jaxhybrid.files import remove
from jaxhybrid.report.inspection import inspect_run
from jaxhybrid.settings.stages import STAGES
from tests.harms import flip
from tests.runs import Workshop, close, exported, free_port, read, records, write_text
from tests.tiny import stage, write_config, write_teacher

PHASES = ("start", "align", "score", "select", "distill", "finetune", "evaluate", "export", "report")
SOAKED = Path(__file__).with_name("soaked.py")
SECONDS = 300  # for one start
LIMITS = (0, 3_000, 60_000)  # bytes of a file that a full disk still takes
KINDS = {1: ("kill", "term", "full", "cut", "flip"), 2: ("kill", "term", "full", "cut", "flip", "kill-one", "term-one")}
# What a run writes, in groups of which each is as likely to be damaged as any other.
WRITTEN = {
    "checkpoint": ("*/checkpoints/*/**/*", "score/candidates/*/*/*/**/*"),
    "params": ("*/params/**/*",),
    "metrics": ("*/metrics.jsonl", "score/candidates/*/metrics.jsonl"),
    "teacher states": ("score/teacher-*",),
    "results": ("*.json", "*/done.json", "score/scores/*.json"),
    "tokens": ("tokens/*/*",),
    "for people": ("export/*", "report/*", "*/tensorboard/*"),
    "config": ("config.yaml",),
}
# What messages ask to delete.
WAYS_OUT = (
    r"[Dd]elete the folder (/\S+?)[.,;]?(?: |$)",
    r"(/\S+)/metrics\.jsonl\b.*or the folder to start over",
    r"(/\S+) was made with another config",
    r"(/\S+) holds something that is not an earlier export",
    r"(/\S+) is an earlier export with other files",
    r"(/\S+?\.(?:json|yaml))\b.*(?:Delete it| again)",
)


class Failed(Exception):
    """What the soak is there to find."""


@dataclass(frozen=True)
class Harm:
    kind: str
    phase: str
    act: int = 0  # on files of the run, counted from the beginning of the phase; 0: by the clock
    seconds: float = 0.0
    seed: int = 0  # of what else there is to choose
    written: str = ""  # the group of files that one is damaged of; any


@dataclass(frozen=True)
class Ended:
    """One start: where it was struck, and how its processes ended."""

    struck: str | None
    codes: list[int]
    out: list[str]
    err: list[str]
    phases: dict[str, tuple[int, float]]  # acts and seconds

    @property
    def errors(self) -> list[str]:
        return self._lines("error: ")

    @property
    def warnings(self) -> list[str]:
        return self._lines("warning: ")

    def _lines(self, beginning: str) -> list[str]:
        """Once each. What a thread of orbax prints at the same moment may stand before it on its line."""
        lines = (line for text in self.err for line in text.splitlines())
        return list(dict.fromkeys(line[line.index(beginning) :] for line in lines if beginning in line))


def start(workshop: Workshop, run: Path, processes: int, harm: Harm | None = None, devices: int = 8) -> Ended:
    """The command that a run is begun and gone on with, until its processes have ended; `harm` strikes on the way."""
    command = ["run", workshop.config, f"run_dir={run}", f"data.cache_dir={run / 'tokens'}"]
    own: list[list[str | int]] = [[]]
    environment = os.environ | workshop.environment | {"JAX_NUM_CPU_DEVICES": str(devices // processes)}
    if processes > 1:
        port = free_port()
        own = [
            ["--coordinator", f"localhost:{port}", "--processes", processes, "--process", i] for i in range(processes)
        ]
        environment["JAX_SHARE_BINARY_BETWEEN_HOSTS"] = "1"
    said, say = os.pipe()
    hear, answer = os.pipe()
    unwatched = {"processes": processes}
    watched = unwatched | {"say": say, "hear": hear, "folder": str(run)} | (asdict(harm) if harm else {})
    running = [
        subprocess.Popen(
            [sys.executable, "-P", str(SOAKED), *map(str, [*command, *arguments])],
            env=environment | {"SOAK": json.dumps(unwatched if number else watched)},
            cwd=workshop.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=() if number else (say, hear),
        )
        for number, arguments in enumerate(own)
    ]
    os.close(say)
    os.close(hear)
    struck, phases = None, {}
    late = threading.Timer(SECONDS, lambda: [process.kill() for process in running])
    late.start()
    with ThreadPoolExecutor(processes) as pool, open(said) as lines:
        ends = [pool.submit(process.communicate) for process in running]
        for line in map(json.loads, lines):
            if "struck" in line:
                struck = f"{line['struck']}, {line['where']}"
                strike(harm, running)
                os.write(answer, b".")
            else:
                acts, seconds = phases.get(line["phase"], (0, 0.0))
                phases[line["phase"]] = acts + line["acts"], seconds + line["seconds"]
        out, err = zip(*(end.result() for end in ends))
    os.close(answer)
    if not late.is_alive():
        raise Failed(f"not at its end after {SECONDS} s:\n{err[0][-3000:]}")
    late.cancel()
    return Ended(struck, [process.returncode for process in running], list(out), list(err), phases)


def strike(harm: Harm, running: list[subprocess.Popen[str]]) -> None:
    rng = random.Random(harm.seed)
    one = rng.choice(running)
    match harm.kind:
        case "kill-one":
            one.kill()
        case "term-one":
            one.terminate()
        case "term":
            for process in running:
                process.terminate()
        case "full":
            limit = rng.choice(LIMITS)
            for process in running:
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
        case "kill" | "cut" | "flip":
            for process in running:
                process.kill()


def check_end(harm: Harm, ended: Ended) -> None:
    """Whether the processes ended as docs/hosts.md has it; those that had time to may have finished."""
    expected = {"kill": {-9}, "cut": {-9}, "flip": {-9}, "term": {143, -15, 2}, "term-one": {143, -15, 2}, "full": {2}}
    if harm.kind in expected and not set(ended.codes) <= {0, *expected[harm.kind]}:
        raise Failed(f"exit codes {ended.codes} after {harm.kind}:\n" + "\n".join(text[-3000:] for text in ended.err))
    # Not after `full`: orbax has threads that print theirs, and a fault of ours is exit code 1.
    if harm.kind in ("term", "term-one") and any("Traceback" in text for text in ended.err):
        raise Failed(f"a traceback after {harm.kind}:\n" + "\n".join(text[-3000:] for text in ended.err))
    if harm.kind == "full" and any(ended.codes) and not any("again" in error for error in ended.errors):
        raise Failed(f"no way out after {harm.kind}:\n" + "\n".join(text[-3000:] for text in ended.err))


def damage(harm: Harm, run: Path) -> str:
    """Cuts a file of the run short, or flips a bit of it; which."""
    rng = random.Random(harm.seed)
    chosen = [WRITTEN[harm.written]] if harm.written else WRITTEN.values()
    groups = [sorted({path for pattern in patterns for path in run.glob(pattern)}) for patterns in chosen]
    groups = [[path for path in group if path.is_file() and path.stat().st_size] for group in groups]
    if not any(groups):
        return "nothing is written yet"
    path = rng.choice(rng.choice([group for group in groups if group]))
    whole = path.read_bytes()
    kept = rng.randrange(len(whole))
    path.write_bytes(whole[:kept] if harm.kind == "cut" else flip(whole, np.random.default_rng(harm.seed)))
    return f"{path.relative_to(run)} of {len(whole)} bytes" + (f" cut to {kept}" if harm.kind == "cut" else "")


def obey(messages: list[str], run: Path) -> list[str]:
    """Deletes what the messages ask to delete."""
    deleted = []
    for message in messages:
        found = next((match for way_out in WAYS_OUT if (match := re.search(way_out, message))), None)
        path = Path(found[1]) if found else None
        if path is None or not path.is_relative_to(run):
            raise Failed(f"no way out: {message}")
        remove(path)
        deleted.append(str(path.relative_to(run.parent)))
    return deleted


class Soak:
    """Harmed runs in a workshop. `tell` gets a line for each harm."""

    def __init__(self, workshop: Workshop, tell=print, devices: int = 8):
        self.workshop, self.tell, self.devices, self.began, self.number = workshop, tell, devices, time.monotonic(), 0

    def run(self, run: Path, harms: list[Harm], processes: list[int]) -> None:
        """One run, each of its starts harmed and with so many processes; then to its end."""
        counts = cycle(processes)
        line = ""
        for harm in harms:
            count = next(c for c in counts if harm.kind in KINDS[c])
            ended, line = self._until(run, count, harm, line)
            if not ended.struck:  # it was at its end before
                harm = replace(harm, act=1)
                ended, line = self._until(run, count, harm, line)
            check_end(harm, ended)
            hit = damage(harm, run) if harm.kind in ("cut", "flip") else ""
            self.number += 1
            line = f"{self.number:3d}  {time.monotonic() - self.began:4.0f} s  {run.name} ({count})  {harm.kind:8}  "
            line += (
                f"{ended.struck or 'not struck'}; {hit or f'exit {ended.codes}'}; {' '.join(ended.errors)} next start: "
            )
        for _ in range(5):
            _, line = self._until(run, next(counts), None, line)
            damaged = inspect_run(run, check=True)["damaged"]
            if not damaged:
                return
            self.tell(f"     at its end {run.name} has damage: {damaged}; deleted: {obey(damaged, run)}")
        raise Failed(f"{run} stays damaged: {damaged}")

    def _until(self, run: Path, count: int, harm: Harm | None, line: str) -> tuple[Ended, str]:
        """Starts until one is struck or done, doing what the others ask for."""
        for _ in range(8):
            ended = start(self.workshop, run, count, harm, self.devices)
            said = ended.warnings if ended.struck else ended.warnings + ended.errors
            if line or said:
                self.tell(f"{line}{'; '.join(said) or 'nothing'}")
            line = ""
            if ended.struck or not any(ended.codes):
                return ended, line
            if set(ended.codes) != {2} or not ended.errors:
                raise Failed(f"exit {ended.codes}:\n" + "\n".join(text[-3000:] for text in ended.err))
            self.tell(f"     deleted: {obey(ended.errors[:1], run)}")
        raise Failed(f"{run} does not go on: {ended.errors}")


def compare(run: Path, whole: Path, exact: bool) -> None:
    """Raises Failed where results differ, records are lost or twice there, or something is left over."""
    ours, theirs = results(run), results(whole)
    if ours.keys() != theirs.keys():
        raise Failed(f"{run}: results that only one has: {sorted(ours.keys() ^ theirs.keys())}")
    for name, value in theirs.items():
        try:
            if not exact:
                close(ours[name], value)
            elif isinstance(value, np.ndarray):
                np.testing.assert_array_equal(ours[name], value)
            else:
                assert ours[name] == value
        except AssertionError as error:
            raise Failed(f"{run}: {name} differs {error}") from error
    if left := files(run) - files(whole):
        raise Failed(f"{run}: left over: {sorted(left)}")


def results(run: Path) -> dict[str, Any]:
    """All that a run gives, by name, without how fast it was."""
    scores = sorted((run / "score" / "scores").glob("*.json"))
    paths = [run / "scores.json", run / "layers.json", run / "evaluation.json", *scores]
    found: dict[str, Any] = {path.name: read(path) for path in paths}
    for name in STAGES:
        done = read(run / name / "done.json")
        kept = done.keys() - {"checksum", "seconds", "tokens_per_second", "peak_memory_bytes", "compiled_programs"}
        found |= {f"records of {name}": records(run / name), f"{name}/done.json": {key: done[key] for key in kept}}
    return found | exported(run)


def files(run: Path) -> set[str]:
    """All there is, but for the names that TensorBoard and orbax choose and what was set aside."""
    kept = (p.relative_to(run) for p in run.rglob("*") if ".damaged" not in str(p))
    return {str(p) for p in kept if not re.search(r"tensorboard/events|params/.*/|^tokens(/[^.]|$)", str(p))}


def prepare(workshop: Workshop) -> None:
    """A smaller teacher and a shorter run than the tests', whose candidates are scored in two rounds."""
    teacher = write_teacher(workshop.folder / "teacher", layers=2)
    data = {"train": str(write_text(workshop.folder / "text.jsonl")), "heldout_tokens": 2048}
    often = {"checkpoint_every": 2, "log_every": 1}
    write_config(
        workshop.config,
        teacher,
        data=data,
        align=stage(tokens=8 * 64 * 8, **often),
        score=stage(
            tokens=8 * 64 * 8,
            budgets=[1],
            heldout_tokens=500,
            evaluate_every=2,
            checkpoint_every=2,
            stop_when_stable={"window": 2},
        ),
        distill=stage(tokens=8 * 64 * 8, **often),
        finetune=stage(tokens=8 * 64 * 6, **often),
    )


def deal(rng: random.Random, count: int, processes: int, phases: dict[str, tuple[int, float]]) -> list[Harm]:
    """So many harms, in all phases from the first to the last; each kind as often as any other."""
    kinds = list(islice(cycle(rng.sample(KINDS[processes], len(KINDS[processes]))), count))
    rng.shuffle(kinds)
    dealt = []
    for number, kind in enumerate(kinds):
        phase = PHASES[int((number + rng.random()) * len(PHASES) / count)]
        acts, seconds = phases[phase]
        act = rng.randint(1, max(acts, 1)) if rng.random() < 0.5 else 0
        dealt.append(Harm(kind, phase, act, rng.random() * seconds, rng.randrange(1 << 30)))
    return dealt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--harms", type=int, default=30)
    parser.add_argument(
        "--folder", type=Path, help="where all is kept; default: a new folder that is removed at the end"
    )
    given = parser.parse_args()
    began = time.monotonic()
    folder = (given.folder or Path(tempfile.mkdtemp(prefix="soak-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    workshop, rng = Workshop(folder), random.Random(given.seed)
    print(f"soak: seed {given.seed}, {given.harms} harms, in {folder}")
    prepare(workshop)
    whole, phases = {}, {}
    for processes in (1, 2):
        whole[processes] = folder / f"whole-{processes}"
        remove(whole[processes])
        ended = start(workshop, whole[processes], processes)
        if any(ended.codes):
            raise Failed("\n".join(ended.err))
        phases[processes] = ended.phases
        print(
            f"undisturbed with {processes}: "
            + ", ".join(f"{name} {acts} acts {s:.1f} s" for name, (acts, s) in ended.phases.items())
        )
    try:
        compare(whole[2], whole[1], exact=True)
        print("one process and two give the same bits")
    except Failed as error:
        print(f"one process and two differ in bits: {' '.join(str(error).split())[:200]}")
        compare(whole[2], whole[1], exact=False)
    soak, done = Soak(workshop), Counter()
    shares = [given.harms * (i + 1) // 3 - given.harms * i // 3 for i in range(3)]
    for name, counts, share in zip(("one", "two", "mixed"), ([1], [2], [1, 2]), shares):
        harms = deal(rng, share, max(counts), phases[max(counts)]) if share else []
        soak.run(folder / name, harms, counts)
        compare(folder / name, whole[counts[0]], exact=len(counts) == 1)
        print(
            f"{name}: {share} harms, and the results of the undisturbed run"
            + (" to the bit" if len(counts) == 1 else "")
        )
        done.update(harm.kind for harm in harms)
    print(f"soak: seed {given.seed}, {sum(done.values())} harms in {time.monotonic() - began:.0f} s: {dict(done)}")
    if not given.folder:
        remove(folder)


if __name__ == "__main__":
    main()
