"""Scores of the layers, the ranking they give, and how soon that ranking stopped moving."""

from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from jaxhybrid.checksums import read_result, write_result
from jaxhybrid.errors import RunError
from jaxhybrid.settings.stages import StabilityConfig
from jaxhybrid.settings.types import RankBy

Curve = list[tuple[int, float]]  # (tokens trained on, KL in nats per token)
SCORE_AGAIN = "Delete it and run `jaxhybrid score` again to train that candidate anew."


@dataclass(frozen=True)
class CandidateScore:
    """What training one candidate gave. Its score is minus the KL at the end of a curve."""

    layer: int
    train: Curve  # means over the steps up to each point
    heldout: Curve  # starts at 0 tokens, before any training

    def kl(self, by: RankBy) -> float:
        return getattr(self, by)[-1][1]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(value: dict[str, Any]) -> "CandidateScore":
        curves = {name: [(int(t), float(kl)) for t, kl in value[name]] for name in ("train", "heldout")}
        return CandidateScore(int(value["layer"]), **curves)


@dataclass(frozen=True)
class Scores:
    """Every candidate's score, by layer index."""

    candidates: tuple[CandidateScore, ...]

    def ranking(self, by: RankBy = "heldout") -> list[int]:
        """Layers from the most to the least worth keeping; ties go to the lower index."""
        return [c.layer for c in sorted(self.candidates, key=lambda c: (c.kl(by), c.layer))]

    def importance(self, by: RankBy = "heldout") -> dict[int, float]:
        """Minus the final KL of each layer's candidate."""
        return {c.layer: -c.kl(by) for c in self.candidates}

    def top_sets(self, k: int, by: RankBy = "heldout") -> list[tuple[int, frozenset[int]]]:
        """(tokens, top-k set) at every token count that all candidates have measured."""
        curves = {c.layer: dict(getattr(c, by)) for c in self.candidates}
        shared = sorted(set.intersection(*(set(curve) for curve in curves.values())))
        return [
            (tokens, frozenset(sorted(curves, key=lambda layer: (curves[layer][tokens], layer))[:k]))
            for tokens in shared
            if tokens > 0
        ]

    def stability(self, k: int, by: RankBy = "heldout") -> list[dict[str, float]]:
        """At each token count: Jaccard of the top-k set with the one before it, and with the last one."""
        sets = self.top_sets(k, by)
        if not sets:
            return []
        rows = [{"tokens": sets[0][0], "with_final": jaccard(sets[0][1], sets[-1][1])}]
        rows += [
            {"tokens": now[0], "with_previous": jaccard(now[1], before[1]), "with_final": jaccard(now[1], sets[-1][1])}
            for before, now in pairwise(sets)
        ]
        return rows

    def is_stable(self, rule: StabilityConfig, best: int, by: RankBy = "heldout") -> bool:
        """Whether the `best` layers have not changed for as long as `rule` asks, up to the last measurement."""
        rows = self.stability(best, by)
        overlaps = [row["with_previous"] for row in rows if "with_previous" in row]
        window = rule.window
        if rule.window_tokens is not None:  # the sets measured over so many; the first agrees with the one before
            window = sum(row["tokens"] > rows[-1]["tokens"] - rule.window_tokens for row in rows)
        assert window is not None
        return 0 < window <= len(overlaps) and min(overlaps[-window:]) >= rule.jaccard


def jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    """|a and b| / |a or b|; 1 for two empty sets."""
    return len(a & b) / len(a | b) if a | b else 1.0


def write_score(folder: Path, score: CandidateScore) -> None:
    """`folder/LLL.json`."""
    write_result(folder / f"{score.layer:03d}.json", score.to_json())


def read_scores(folder: Path, depth: int) -> Scores:
    """The scores in `folder`, one file per candidate, whichever processes wrote them.

    Raises:
        RunError: some layers have not been scored; names them and the command that scores them.
    """
    files = {layer: folder / f"{layer:03d}.json" for layer in range(depth)}
    missing = [layer for layer, file in files.items() if not file.exists()]
    if missing:
        first, last = missing[0], missing[-1] + 1
        raise RunError(
            f"{len(missing)} of {depth} layers have no score in {folder}: {missing}. Score them with "
            f"`jaxhybrid score CONFIG --candidates {first}:{last}`, or bring another run's in with `--merge RUN`."
        )
    return Scores(tuple(CandidateScore.from_json(read_result(file, SCORE_AGAIN)) for file in files.values()))
