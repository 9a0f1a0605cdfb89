"""What selection_study.py measured, as tables and plots: what docs/study.md shows.

    python benchmarks/study_tables.py docs/study/smollm2-135m.jsonl --plot docs/images/study-smollm2.png
    python benchmarks/study_tables.py --mixers docs/study/smollm2-135m-mixers.jsonl

Of three or more orders of the training rows: mean and Student's interval of 95 %. "before distillation" tells how well
a figure of the untrained set orders all distilled sets of a budget (Spearman's rank correlation), and what is lost by
taking the set that looks best by it.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from jaxhybrid.evaluate.bootstrap import over_runs
from jaxhybrid.evaluate.recall import LEAST_TEACHER
from jaxhybrid.selection.ranking import jaccard

Record = dict[str, Any]
# What records of a kind must agree in, to be of one study.
SAME = {
    "any": ("teacher", "settings", "text", "align_tokens", "align_seed", "chosen_on", "compared_on", "hardware"),
    "distilled": ("tokens", "batch"),
}
Layers = tuple[int, ...]


class Measured:
    """The records of one teacher."""

    def __init__(self, path: Path):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        self.common = records[0]
        for kind, keys in SAME.items():
            designs = {tuple(r.get(key) for key in keys) for r in records if r["kind"] == kind or kind == "any"}
            if len(designs) > 1:
                raise SystemExit(f"error: {path} holds several studies, which differ in {keys}: {sorted(designs)}")
        self.reference = {r["name"]: r for r in records if r["kind"] == "reference"}
        self.choices = [r for r in records if r["kind"] == "choice"]
        self.untrained = {tuple(r["layers"]): r for r in records if r["kind"] == "untrained"}
        self.distilled: dict[Layers, list[Record]] = defaultdict(list)
        for record in records:
            if record["kind"] == "distilled":
                self.distilled[tuple(record["layers"])].append(record)
        self.finetuned = {tuple(r["layers"]): r for r in records if r["kind"] == "finetuned"}
        # Prompts by name; where the teacher answers few, they say nothing of a student.
        given = self.reference["teacher"]["recall"]
        self.asked = [name for name in given if share(self.reference["teacher"], name) >= LEAST_TEACHER]
        self.not_asked = [name for name in given if name not in self.asked]

    def budgets(self) -> list[int]:
        return sorted({choice["budget"] for choice in self.choices}, reverse=True)

    def sets(self, budget: int) -> dict[Layers, list[Record]]:
        """The choices of each set, best distilled KL first."""
        found: dict[Layers, list[Record]] = defaultdict(list)
        for choice in self.choices:
            if choice["budget"] == budget:
                found[tuple(choice["layers"])].append(choice)
        worst = float("inf")
        return dict(sorted(found.items(), key=lambda item: self.kl(item[0]) if self.distilled[item[0]] else worst))

    def kl(self, layers: Layers) -> float:
        return float(np.mean([record["kl"] for record in self.distilled[layers]]))

    def right(self, layers: Layers, asked: str) -> float | None:
        """Share of answers, mean over those orders of the training rows for which they were asked."""
        shares = [share(record, asked) for record in self.distilled[layers] if asked in record["recall"]]
        return float(np.mean(shares)) if shares else None


def share(record: Record, asked: str) -> float:
    """Of the answers, those that are right."""
    right, answers = record["recall"][asked]
    return right / answers


def table_of(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown, as docs/study.md has it: cells as they are, without padding."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def table(found: Measured, budget: int) -> str:
    head = ["chosen by", "layers", "KL, untrained", "KL, distilled", "on long rows", *map(_title, found.asked)]
    head += ["forward tokens", "trained tokens", "s"]
    rows = []
    for layers, choices in found.sets(budget).items():
        runs, first = found.distilled[layers], found.untrained.get(layers)
        names = ", ".join(f"`{choice['method']}`" for choice in choices)
        cost = (
            "random"
            if all(choice["method"].startswith("random") for choice in choices)
            else ", ".join(_count(choice["forward_tokens"]) for choice in choices)
        )
        cells = [
            names,
            " ".join(map(str, layers)),
            f"{first['kl']:.3f}" if first else "",
            _mean([run["kl"] for run in runs]),
            _mean([run["kl_long"] for run in runs]),
            *(_share(found.right(layers, asked)) for asked in found.asked),
            "" if cost == "random" else cost,
            ", ".join(_count(choice["trained_tokens"]) for choice in choices if choice["trained_tokens"]),
            "" if cost == "random" else ", ".join(f"{c['seconds']:.0f}" for c in choices if c["seconds"] is not None),
        ]
        rows.append(cells)
    return table_of(head, rows)


def prediction(found: Measured, budget: int) -> str:
    """How well what is known before distillation orders the sets after it."""
    sets = [layers for layers in found.sets(budget) if found.distilled[layers] and layers in found.untrained]
    if len(sets) < 3:
        return f"{len(sets)} sets distilled: too few to rank."
    after = [found.kl(layers) for layers in sets]
    rows = []
    signals = {
        "KL of the set": [found.untrained[layers]["kl"] for layers in sets],
        "KL on long rows": [found.untrained[layers]["kl_long"] for layers in sets],
    }
    for name, before in signals.items():
        rho = stats.spearmanr(before, after).statistic
        lost = after[int(np.argmin(before))] - min(after)
        rows.append([name, "KL", f"{rho:.2f} ({len(sets)} sets)", f"+{lost:.3f}"])
        for asked in found.asked:
            rights = {place: found.right(layers, asked) for place, layers in enumerate(sets)}
            known = [place for place, right in rights.items() if right is not None]
            if len(known) < 3:
                continue
            right, first = [rights[place] for place in known], [before[place] for place in known]
            rho = stats.spearmanr(-np.array(first), right).statistic
            lost = max(right) - right[int(np.argmin(first))]
            rows.append([name, _title(asked), f"{rho:.2f} ({len(known)} sets)", f"-{lost:.1%}"])
    return table_of(["before distillation", "after", "Spearman", "best by it, against the best"], rows)


def overlap(found: Measured, budget: int) -> str:
    """Jaccard of the methods' sets."""
    choices = [c for c in found.choices if c["budget"] == budget and not c["method"].startswith("random")]
    rows = []
    for own in choices:
        shares = [jaccard(frozenset(own["layers"]), frozenset(choice["layers"])) for choice in choices]
        rows.append([own["method"], *(f"{share:.2f}" for share in shares)])
    return table_of(["", *(choice["method"] for choice in choices)], rows)


def finetuned(found: Measured) -> str:
    """What training on the text itself gives, with and without linear layers."""
    head = ["model", "KL to the teacher", "perplexity", *map(_title, found.asked)]
    rows = []

    def row(name: str, record: Record) -> None:
        shares = (_share(share(record, asked) if asked in record["recall"] else None) for asked in found.asked)
        figures = [f"{record['kl']:.3f}", f"{np.exp(record['cross_entropy']):.2f}", *shares]
        rows.append([name, *figures])

    row("teacher", found.reference["teacher"])
    for layers, record in found.finetuned.items():
        before = [run for run in found.distilled[layers] if "cross_entropy" in run]
        name = " ".join(map(str, layers)) if before else "teacher"
        if before:
            row(f"{name}, distilled", before[-1])
        row(f"{name}, finetuned", record)
    return table_of(head, rows)


def mixers(path: Path, asked: list[str] | None) -> str:
    """The variants that mixer_study.py measured, with the prompts `asked`; None: with all."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    aligned = {r["variant"]: r for r in records if r["kind"] == "untrained"}
    distilled: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record["kind"] == "distilled":
            distilled[record["variant"]].append(record)
    names = asked or list(next(iter(distilled.values()))[0]["recall"])
    head = ["variant", "alignment loss", "KL all linear", "KL of the set, untrained", "distilled", "on long rows"]
    rows = []
    for variant, first in aligned.items():
        runs = distilled[variant]
        cells = [
            variant,
            *(f"{first[key]:.3f}" for key in ("alignment", "kl_linear", "kl")),
            _mean([run["kl"] for run in runs]),
            _mean([run["kl_long"] for run in runs]),
            *(_share(float(np.mean([share(run, name) for run in runs])) if runs else None) for name in names),
        ]
        rows.append(cells)
    return table_of([*head, *map(_title, names)], rows)


def plot(found: Measured, path: Path) -> None:
    """KL before and after, and KL and recall, if the teacher answers any short prompts."""
    import matplotlib.pyplot as plt

    short = [asked for asked in found.asked if "@" not in asked]
    middle = short[len(short) // 2] if short else None
    figure, (axes,) = plt.subplots(1, 2 if middle else 1, figsize=(11 if middle else 5.5, 4.5), squeeze=False)
    for budget, colour in zip(found.budgets(), ("tab:blue", "tab:orange", "tab:green")):
        sets = [layers for layers in found.sets(budget) if found.distilled[layers]]
        kl = [found.kl(layers) for layers in sets]
        label = f"{budget} layers softmax"
        axes[0].scatter([found.untrained[layers]["kl"] for layers in sets], kl, c=colour, label=label)
        if middle is None:
            continue
        axes[1].scatter(kl, [100 * found.right(layers, middle) for layers in sets], c=colour, label=label)
        for layers, choices in found.sets(budget).items():
            names = [c["method"] for c in choices if not c["method"].startswith("random")]
            if names and found.distilled[layers]:
                at = found.kl(layers), 100 * found.right(layers, middle)
                axes[1].annotate(names[0], at, fontsize=6, xytext=(3, 2), textcoords="offset points")
    axes[0].set(xlabel="KL before distillation (nats)", ylabel="KL after (nats)", title="what the untrained set tells")
    axes[0].legend()
    if middle:
        labels = {"xlabel": "KL after distillation (nats)", "ylabel": f"recall of {middle} pairs (%)"}
        axes[1].set(title="KL and recall", **labels)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _mean(values: list[float]) -> str:
    if not values:
        return ""
    if len(values) < 3:
        return ", ".join(f"{value:.3f}" for value in values)
    found = over_runs(values)
    return f"{found['mean']:.3f} ± {found['high'] - found['mean']:.3f} ({len(values)})"


def _share(right: float | None) -> str:
    return "" if right is None else f"{right:.1%}"


def _title(asked: str) -> str:
    """Of a set of prompts: 16@4096 is recall of 16 pairs in 4,096 tokens."""
    name, _, length = asked.partition("@")
    return (f"recall {name}" if name.isdigit() else f"`{name}`") + (f", {int(length):,} tokens" if length else "")


def _count(tokens: int) -> str:
    return f"{tokens / 1e6:.1f}M" if tokens else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path, nargs="?")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--mixers", type=Path, help="what mixer_study.py measured")
    options = parser.parse_args()
    if not options.records and not options.mixers:
        parser.error("name a file of records, or one with --mixers")
    found = Measured(options.records) if options.records else None
    if options.mixers:
        print(f"## Mixers\n\n{mixers(options.mixers, found and found.asked)}\n")
    if not found:
        return
    teacher, linear = found.reference["teacher"], found.reference["all linear"]
    print(f"{found.common['teacher']}, {found.common['hardware']}, aligned on {found.common['align_tokens']:,} tokens.")
    shares = {asked: f"{_title(asked)} {share(teacher, asked):.1%}" for asked in teacher["recall"]}
    print("The teacher's answers: " + ", ".join(shares[asked] for asked in found.asked))
    if found.not_asked:
        print("Too few to compare students by: " + ", ".join(shares[asked] for asked in found.not_asked))
    print(f"All linear, untrained: KL {linear['kl']:.3f}\n")
    for budget in found.budgets():
        print(
            f"## {budget} layers\n\n{table(found, budget)}\n\n{prediction(found, budget)}\n\n{overlap(found, budget)}\n"
        )
    if found.finetuned:
        print(f"## Trained on the text itself\n\n{finetuned(found)}\n")
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
