"""The plots of a run, each a matplotlib Figure. Colours are told apart by the colour-blind (Okabe and Ito 2008)."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle, islice, product
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from jaxhybrid.report.results import Points
from jaxhybrid.report.table import FIFTHS, recall_label, task_label
from jaxhybrid.selection.ranking import Scores
from jaxhybrid.settings.types import RankBy

BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
COLOURS = (VERMILLION, BLUE, GREEN, PURPLE, ORANGE, SKY, "#222222")
LINES = ("-", "--", ":")
SOFTMAX, LINEAR = VERMILLION, "#A9B4C0"
INK, GRID = "#24292f", "#e3e6ea"
WIDTH = 9.0  # inches; at this width a text of 11 points reads like the page's own
LABEL_HEIGHT = 0.2  # inches of the axis that one label at the end of a line takes

STYLE = {
    "figure.dpi": 160,
    "savefig.dpi": 160,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8c959f",
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 2,
}


@contextmanager
def plot_style() -> Iterator[None]:
    """The look of every plot, whatever the user's own matplotlib settings; figures are made and saved inside it."""
    with style.context(["default", STYLE]):
        yield


def recall(tasks: Sequence[dict[str, Any]]) -> Figure:
    """Share of right answers of every model in each recall task, with its 95 % interval and what chance gives."""
    figure, axes = _figure(3.6)
    models = list(tasks[0]["models"])
    width = 0.8 / len(models)
    for number, (model, colour) in enumerate(zip(models, COLOURS)):
        right = [task["models"][model]["right"] for task in tasks]
        axes.bar(
            [group - 0.4 + (number + 0.5) * width for group in range(len(tasks))],
            [100 * figures["share"] for figures in right],
            yerr=[
                [100 * (figures["share"] - figures["low"]) for figures in right],
                [100 * (figures["high"] - figures["share"]) for figures in right],
            ],
            width=0.9 * width,
            color=colour,
            ecolor=INK,
            capsize=4,
            label=model,
        )
    chances = [100 * task["chance"]["right"] for task in tasks]
    starts, ends = ([group + side for group in range(len(tasks))] for side in (-0.45, 0.45))
    axes.hlines(chances, starts, ends, color=INK, linestyle=":", label="chance")
    axes.set_xticks(range(len(tasks)), [recall_label(task) for task in tasks])
    axes.grid(visible=False, axis="x")
    axes.set_ylim(0, 105)
    axes.set_ylabel("right answers (%)")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(models) + 1, borderaxespad=0.2)
    return figure


def positions(quality: Sequence[dict[str, Any]]) -> Figure:
    """Perplexity and KL of every model by position in the document, one line style for each length of rows."""
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("perplexity", "kl")):
        drawn: list[float] = []
        for measured, line in zip(quality, cycle(LINES)):
            for (name, figures), colour in zip(measured["models"].items(), cycle(COLOURS)):
                if key == "kl" and name == "teacher":
                    continue
                ends, values = zip(*((bucket["end"], bucket[key]) for bucket in figures["positions"]))
                drawn += values
                label = name if measured is quality[0] and key == "perplexity" else None
                axes.plot(ends, values, line, color=colour, marker="o", markersize=3.5, label=label)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("tokens of the document up to here")
        axes.set_ylabel("perplexity" if key == "perplexity" else "KL to the teacher\n(nats per token)")
        if drawn:
            _log_if_positive(axes, drawn)
    figure.legend(loc="outside upper right", ncols=4)
    return figure


def tasks(found: Sequence[dict[str, Any]]) -> Figure:
    """Score of every model in each task with written answers, with its 95 % interval."""
    figure, axes = _figure(max(2.4, 1 + 0.3 * sum(len(task["models"]) for task in found)))
    names = list(dict.fromkeys(name for task in found for name in task["models"]))
    colours, place, centres = dict(zip(names, cycle(COLOURS))), 0.0, []
    for task in found:
        centres.append(place + (len(task["models"]) - 1) / 2)
        for name, figures in task["models"].items():
            score = figures["score"]
            ends = [[100 * (score["share"] - score["low"])], [100 * (score["high"] - score["share"])]]
            style = {"height": 0.8, "color": colours[name], "ecolor": INK, "capsize": 3}
            axes.barh(place, 100 * score["share"], xerr=ends, label=name if task is found[0] else None, **style)
            place += 1
        place += 0.8
    axes.set_yticks(centres, [task_label(task) for task in found])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 100)
    axes.set_xlabel("score (%)")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=len(names), borderaxespad=0.2)
    return figure


def depths(found: Sequence[dict[str, Any]]) -> Figure:
    """Share of answers that are found, by depth in the haystack: a panel for each model, a row for each task."""
    names = list(dict.fromkeys(name for task in found for name in task["models"]))
    figure = Figure(figsize=(WIDTH, 1.3 + 0.3 * len(found)), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names):
        grid = [[math.nan] * len(FIFTHS) for _ in found]
        for row, task in zip(grid, found):
            for part in task["models"].get(name, {}).get("depths", []):
                row[round(len(FIFTHS) * part["first"])] = 100 * part["share"]
        image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        axes.grid(visible=False)
        axes.set_title(name)
        axes.set_xticks([-0.5, len(FIFTHS) - 0.5], ["0 %", "100 %"])
        axes.set_yticks(
            range(len(found)), [task_label(task) for task in found] if name == names[0] else [""] * len(found)
        )
        axes.set_xlabel("depth")
    figure.colorbar(image, ax=panels, label="found (%)")
    return figure


CURVES: dict[RankBy, str] = {"heldout": "held-out", "train": "training"}  # what KL a ranking goes by


def importance(scores: Scores, kept: Sequence[int], by: RankBy) -> Figure:
    """Minus the final KL of each layer's candidate, the kept layers highlighted."""
    values = scores.importance(by)
    low, high = min(values.values()), max(values.values())
    span = (high - low) or abs(high) or 1.0
    floor = low - 0.08 * span
    figure, axes = _figure(3.6)
    bars = axes.bar(
        list(values),
        [value - floor for value in values.values()],
        bottom=floor,
        color=[SOFTMAX if layer in kept else LINEAR for layer in values],
        width=0.75,
    )
    rank = {layer: place for place, layer in enumerate(scores.ranking(by), 1)}
    small = 10 if len(values) <= 40 else 8
    for layer, bar in zip(values, bars):
        if layer in kept:
            top = (bar.get_x() + bar.get_width() / 2, bar.get_y() + bar.get_height())
            axes.annotate(f"{rank[layer]}", top, (0, 2), textcoords="offset points", ha="center", fontsize=small)
    axes.set_ylim(floor, high + 0.1 * span)
    axes.set_xlim(-0.7, max(values) + 0.7)
    _layer_axis(axes)
    axes.set_ylabel(f"minus {CURVES[by]} KL\n(nats per token)")
    if kept:
        names = [Patch(color=SOFTMAX, label="kept softmax (number: rank)"), Patch(color=LINEAR, label="made linear")]
        _legend_above(axes, handles=names)
    return figure


def candidate_curves(scores: Scores, kept: Sequence[int], by: RankBy) -> Figure:
    """KL of every candidate over its training tokens; kept layers coloured and named at their end."""
    chosen = [c for c in sorted(scores.candidates, key=lambda c: c.kl(by)) if c.layer in kept]
    height = max(3.8, LABEL_HEIGHT * len(chosen) + 1.2)
    figure, axes = _figure(height)
    for candidate in scores.candidates:
        if candidate.layer not in kept:
            tokens, kl = zip(*getattr(candidate, by))
            axes.plot(tokens, kl, color=LINEAR, linewidth=1, alpha=0.8, zorder=2)
    looks = {c.layer: look for c, look in zip(chosen, _looks(len(chosen)))}
    for candidate in reversed(chosen):
        colour, line = looks[candidate.layer]
        tokens, kl = zip(*getattr(candidate, by))
        axes.plot(tokens, kl, line, color=colour, marker="o", markersize=3.5, zorder=3)
    _log_if_positive(axes, [kl for c in scores.candidates for _, kl in getattr(c, by)])
    _token_axis(axes, "training tokens of a candidate")
    axes.set_ylabel(f"{CURVES[by]} KL (nats per token)")
    ends = [axes.transScale.transform((0, c.kl(by)))[1] for c in chosen]
    bottom, top = (axes.transScale.transform((0, y))[1] for y in axes.get_ylim())
    last = max(getattr(c, by)[-1][0] for c in scores.candidates)
    places = _spread([(end - bottom) / (top - bottom) for end in ends], LABEL_HEIGHT / (height - 0.8))
    for candidate, place in zip(chosen, places):
        axes.annotate(
            f" layer {candidate.layer}",
            xy=getattr(candidate, by)[-1],
            xytext=(1.06, place),
            textcoords="axes fraction",
            va="center",
            fontsize=10,
            arrowprops={
                "arrowstyle": "-",
                "color": looks[candidate.layer][0],
                "linewidth": 1.2,
                "relpos": (0, 0.5),
                "patchA": None,  # else the line is cut where it crosses the text's padding
                "shrinkA": 2,
                "shrinkB": 2,
            },
        )
    axes.set_xlim(0, last * 1.005 or 1)
    if len(chosen) < len(scores.candidates):
        others = "the other layers" if chosen else "all layers"
        _legend_above(axes, handles=[Patch(color=LINEAR, label=others)])
    return figure


def stability(budgets: dict[str, list[dict[str, float]]]) -> Figure:
    """Jaccard overlap of each budget's chosen set with the one before it and with the final one, over tokens."""
    figure = Figure(figsize=(WIDTH, 3.5), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, key, title in zip(panels, ("with_previous", "with_final"), ("with the set before", "with the final set")):
        looks = zip(_looks(len(budgets)), cycle("osD^vPX"))
        for place, ((name, rows), ((colour, line), marker)) in enumerate(zip(budgets.items(), looks)):
            measured = [row for row in rows if key in row]
            tokens, overlap = [row["tokens"] for row in measured], [row[key] for row in measured]
            thickness = max(1.2, 3.6 - 1.2 * place)  # equal lines lie on each other: the ones below stay visible
            size = {"linewidth": thickness, "markersize": thickness + 4}
            axes.plot(tokens, overlap, line, color=colour, marker=marker, label=name, **size)
        axes.set_title(f"Overlap {title}")
        axes.set_ylim(0, 1.05)
        _token_axis(axes, "training tokens of a candidate")
        axes.set_xlim(left=0)
    panels[0].set_ylabel("Jaccard (1: the same layers)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), fontsize=10)
    return figure


def training_curve(points: Points, loss: str) -> Figure:
    """A stage's training loss over tokens, with its running mean when there are many points."""
    figure, axes = _figure(3.3)
    tokens, values = (list(column) for column in zip(*points))
    window = len(points) // 20
    if window >= 2:
        axes.plot(tokens, values, color=BLUE, alpha=0.3, linewidth=1, label="as recorded")
        windows = [slice(i, i + window) for i in range(len(values) - window + 1)]
        centres, means = ([sum(column[w]) / window for w in windows] for column in (tokens, values))
        axes.plot(centres, means, color=BLUE, label=f"mean of {window} records")
        _legend_above(axes)
    else:
        axes.plot(tokens, values, color=BLUE, marker="o", markersize=3.5)
    _log_if_positive(axes, values)
    _token_axis(axes, "tokens")
    axes.set_xlim(left=0)
    axes.set_ylabel(loss.replace(" (", "\n("))
    return figure


def layer_importance(importance: dict[str, float], kept: Sequence[int]) -> Figure:
    """What a method measured for each layer; higher: more worth keeping."""
    figure, axes = _figure(3.3)
    layers = [int(layer) for layer in importance]
    colours = [SOFTMAX if layer in kept else LINEAR for layer in layers]
    axes.bar(layers, list(importance.values()), width=0.75, color=colours)
    axes.set_xlim(-0.7, max(layers) + 0.7)
    _layer_axis(axes)
    axes.set_ylabel("importance")
    _legend_above(axes, [Patch(color=SOFTMAX, label="kept softmax"), Patch(color=LINEAR, label="made linear")])
    return figure


def kept_curve(rounds: Sequence[dict[str, Any]]) -> Figure:
    """KL by the number of softmax layers over the rounds of a greedy search, each with the layer it kept or dropped."""
    figure, axes = _figure(3.6)
    steps = [found for found in rounds if found["action"] in ("start", "keep", "drop", "beam")]
    counts, kls = [len(found["kept"]) for found in steps], [found["kl"] for found in steps]
    axes.plot(counts, kls, color=BLUE, marker="o", markersize=5)
    for found, count, kl in zip(steps[1:], counts[1:], kls[1:]):
        if found["layer"] is None:  # of a beam: the set may have nothing in common with the one before
            continue
        axes.annotate(f"{found['layer']}", (count, kl), (0, 6), textcoords="offset points", ha="center", fontsize=10)
    swapped = [found for found in rounds if found["action"] == "swap"]
    if swapped:
        last = swapped[-1]
        axes.plot([len(last["kept"])], [last["kl"]], "D", color=VERMILLION, label="after swaps")
        _legend_above(axes)
    _log_if_positive(axes, kls)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    done = "made linear" if counts[0] > counts[-1] else "kept"
    axes.set_xlabel(f"softmax layers (number at a point: the layer {done})")
    axes.set_ylabel("KL without training\n(nats per token)")
    return figure


def layer_losses(before: Sequence[float], after: Sequence[float]) -> Figure:
    """Held-out alignment loss of each layer before and after training."""
    figure, axes = _figure(3.3)
    layers = range(len(before))
    axes.bar([i - 0.2 for i in layers], before, width=0.4, color=LINEAR, label="before")
    axes.bar([i + 0.2 for i in layers], after, width=0.4, color=BLUE, label="after")
    axes.set_xlim(-0.7, len(before) - 0.3)
    _layer_axis(axes)
    axes.set_ylabel("held-out alignment loss")
    _legend_above(axes)
    return figure


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _looks(count: int) -> list[tuple[str, str]]:
    """(colour, line style) of `count` lines: colours first, then the next line style."""
    return [(colour, line) for line, colour in islice(cycle(product(LINES, COLOURS)), count)]


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places in 0..1 moved as little as needed to lie `gap` apart and `gap / 2` from either end.

    Neighbours that come too close form a group centred on the mean of its places; groups that meet become one.
    """
    groups: list[tuple[float, int]] = []  # (centre, members)
    for place in places:
        centre, count = place, 1
        while True:
            half = count * gap / 2
            shown = min(max(centre, half), max(1 - half, half))
            if not groups or shown - half >= groups[-1][0] + groups[-1][1] * gap / 2 - 1e-9:
                break
            before, members = groups.pop()
            centre, count = (centre * count + before * members) / (count + members), count + members
        groups.append((shown, count))
    return [centre + (i - (count - 1) / 2) * gap for centre, count in groups for i in range(count)]


def _layer_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, steps=[1, 2, 4, 5, 10]))
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("layer")


def _token_axis(axes: Axes, label: str) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.set_xlabel(label)


def _log_if_positive(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis where the values span more than a factor of three, with plain numbers as ticks."""
    if min(values) <= 0 or max(values) < 3 * min(values):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend_above(axes: Axes, handles: list[Patch] | None = None) -> None:
    axes.legend(handles=handles, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0.2)
