"""Whether faster forms of a distillation step leave the curve of its KL as it was.

    python benchmarks/kl_curves.py configs/demo.yaml --align 4 --steps 8 distill.batch_size=8  # on a CPU, too

    # On a GPU; study_rows.py writes the text.
    python benchmarks/kl_curves.py configs/smollm2-135m.yaml --text rows.npz --align 160 --steps 200 --plot curves.png

A student with every fourth layer softmax is aligned once, for `--align` steps of the config's alignment, and distilled
from there, on the same batches, by each form of the step:

    before        remat: block, layers as a loop, softmax attention without the package's own kernels
    other order   `before`, with the rows of every batch in another order: what rounding alone changes
    kernels       `before`, with the kernels
    mlp           `kernels`, with remat: mlp
    unrolled      `mlp`, with each layer compiled by itself
    float8        `unrolled`, with the teacher's MLPs in float8: its KL is to that teacher

A form that changes more than rounding is much further from `before` than `other order` is, which takes a batch of more
than two rows. The kernels are those for Hopper; elsewhere `kernels` is `before` once more. The table has the loss
of the distill stage, which is the KL, as the mean of the 10 steps that end at a step (at step 1 of that one), and how
far a form's losses are from those of `before` in the same steps. --output (JSON) has all losses, and is whole after
each form. One device.
"""

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from students import ConfigText, FileText, Students, TrainingText, say

from jaxhybrid.model.config import Remat
from jaxhybrid.model.transformer import Model
from jaxhybrid.settings.read import load_config
from jaxhybrid.settings.stages import StageConfig
from jaxhybrid.weights.huggingface import load_teacher

SWITCH = "JAXHYBRID_ATTENTION_KERNELS"  # read when a program is traced
BEFORE = "before"
SMOOTHED = 10  # steps that a loss of the table is the mean of

Losses = dict[str, np.ndarray]


@dataclass(frozen=True)
class Form:
    kernels: bool
    remat: Remat
    unroll: bool = False
    float8_teacher: bool = False
    other_order: bool = False


FORMS = {
    BEFORE: Form(kernels=False, remat="block"),
    "other order": Form(kernels=False, remat="block", other_order=True),
    "kernels": Form(kernels=True, remat="block"),
    "mlp": Form(kernels=True, remat="mlp"),
    "unrolled": Form(kernels=True, remat="mlp", unroll=True),
    "float8": Form(kernels=True, remat="mlp", unroll=True, float8_teacher=True),
}


class OtherOrder:
    """The same batches, with their rows in another order, each time the same one."""

    def __init__(self, text: TrainingText):
        self.text = text

    def training(self, stage: StageConfig, seed: int) -> Iterator[dict[str, np.ndarray]]:
        rng = np.random.default_rng(seed)
        for batch in self.text.training(stage, seed):
            order = rng.permutation(len(batch["tokens"]))
            yield {name: array[order] for name, array in batch.items()}


@contextmanager
def attention_kernels(wanted: bool) -> Iterator[None]:
    """Programs are traced anew, with the kernels or without."""
    found = os.environ.get(SWITCH)
    os.environ[SWITCH] = "1" if wanted else "0"
    jax.clear_caches()
    try:
        yield
    finally:
        os.environ.pop(SWITCH)
        if found is not None:
            os.environ[SWITCH] = found
        jax.clear_caches()


def losses_of(form: Form, students: Students, student: Model, options: argparse.Namespace) -> np.ndarray:
    if form.other_order:
        students = copy(students)
        students.text = OtherOrder(students.text)
    changes = {"remat": form.remat, "unroll": form.unroll, "float8_teacher": form.float8_teacher}
    with attention_kernels(form.kernels):
        return students.trained("distill", student, options.steps, options.seed, **changes)[1].astype(np.float64)


def shown_steps(count: int) -> list[int]:
    return sorted({1, *(max(count * quarter // 4, 1) for quarter in range(1, 5))})


def row_of(name: str, losses: np.ndarray, before: np.ndarray) -> str:
    shown = [np.mean(losses[max(step - SMOOTHED, 0) : step]) for step in shown_steps(len(losses))]
    apart = np.abs(losses - before)
    figures = [*(f"{loss:.5f}" for loss in shown), f"{apart.max():.2g}", f"{np.sqrt(np.mean(apart**2)):.2g}"]
    return f"| {' | '.join([name, *figures])} |"


def table(losses: Losses) -> str:
    """A row for each form."""
    first, *others = shown_steps(len(losses[BEFORE]))
    head = [
        "form",
        f"KL, nats a token, at step {first}",
        *map(str, others),
        f"largest difference from `{BEFORE}`",
        "root mean square of the differences",
    ]
    rows = [row_of(name, found, losses[BEFORE]) for name, found in losses.items()]
    return "\n".join([f"| {' | '.join(head)} |", "|---" * len(head) + "|", *rows])


def write(path: Path, about: dict[str, Any], losses: Losses) -> None:
    beside = path.with_suffix(".part")
    beside.write_text(
        json.dumps({**about, "losses": {name: found.tolist() for name, found in losses.items()}}, indent=1)
    )
    beside.replace(path)


def plot(losses: Losses, title: str, path: Path) -> None:
    """The curves over each other, and how far they are from that of `before`."""
    from jaxhybrid.report.plots import COLOURS, plot_style

    with plot_style():
        figure = Figure(figsize=(9.0, 7.0), layout="constrained")
        curves, differences = figure.subplots(2, 1, sharex=True)
        for (name, found), colour in zip(losses.items(), COLOURS):
            steps = np.arange(1, len(found) + 1)
            curves.plot(steps, found, color=colour, label=name, linewidth=1)
            if name != BEFORE:
                differences.plot(steps, np.abs(found - losses[BEFORE]), color=colour, label=name, linewidth=1)
        curves.set(yscale="log", ylabel="KL, nats a token", title=title)
        differences.set(yscale="log", xlabel="step", ylabel=f"difference from {BEFORE}, nats")
        curves.legend()
        figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="whose teacher, text, mixer and stages are taken")
    parser.add_argument("settings", nargs="*", help="KEY=VALUE over the config")
    parser.add_argument("--text", type=Path, help="what study_rows.py wrote, in place of the config's data")
    parser.add_argument("--align", type=int, default=0, metavar="STEPS", help="before distillation")
    parser.add_argument("--steps", type=int, default=200, help="of distillation")
    parser.add_argument("--seed", type=int, default=0, help="of the order of text to distil on")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), help=f"beside `{BEFORE}`")
    parser.add_argument("--output", type=Path, default=Path("kl_curves.json"))
    parser.add_argument("--plot", type=Path, help="draw the curves, too")
    options = parser.parse_intermixed_args()
    config = load_config(options.config, options.settings)
    teacher = load_teacher(config.teacher, jnp.float32, ignore_config_keys=config.ignore_config_keys)
    text = FileText(options.text) if options.text else ConfigText(config, teacher)
    about = {"teacher": config.teacher, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
    say(", ".join([about["teacher"], about["device"], f"jax {about['jax']}"]))
    about |= {name: getattr(options, name) for name in ("config", "settings", "align", "steps", "seed")}
    students = Students(config, teacher, text)
    student = students.aligned(options.align)
    losses: Losses = {}
    for name, form in FORMS.items():
        if name not in (BEFORE, *options.forms):
            continue
        losses[name] = losses_of(form, students, student, options)
        write(options.output, about, losses)
        say(row_of(name, losses[name], losses[BEFORE]))
    print(table(losses))
    if options.plot:
        plot(losses, f"{about['teacher']}, {about['device']}", options.plot)


if __name__ == "__main__":
    main()
