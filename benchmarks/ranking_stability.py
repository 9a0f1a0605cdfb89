"""How early a method's choice is stable: what it chooses on few tokens against what it chooses on many, side by side.

    python benchmarks/study_rows.py CONFIG.yaml rows.npz
    python benchmarks/ranking_stability.py CONFIG.yaml --rows rows.npz --records stability.jsonl --batch-size 4
    python benchmarks/ranking_stability.py --table stability.jsonl

Models, text and methods are those of selection_study.py. A method of `--methods` chooses on each of `--amounts` of
held-out tokens, on as many disjoint pieces of them as there are, up to `--pieces`; one of `--asking` with each of
`--samples` of questions of its own; and `kl_guided` from candidates that each trained on `--score-amounts` of tokens.
A choice is compared with the same method's choice on most: layers in common, and KL of the untrained set on rows that
no choice saw. A finished choice is a line of `--records` and is not made again.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from selection_study import BEGAN, Records, Study, number_of, opened, parser_of, records_of, say
from study_tables import table_of

METHODS = ("greedy_kl", "single_kl", "replacement_kl", "perplexity", "cosine", "activation_mse")
ASKING = ("answer_likelihood", "associative_recall")
UNITS = {"text": "held-out tokens", "questions": "questions", "training": "trained tokens a candidate"}


def measure(study: Study, options: argparse.Namespace, records: Records) -> None:
    texts, asked = study.texts["short"], study.asked
    size = texts[0]["tokens"].size

    def chosen(method: str, by: str, amount: int, piece: int, given: str = "") -> None:
        if options.minutes is not None and time.perf_counter() - BEGAN > 60 * options.minutes:
            sys.exit("out of time; call again to go on")

        def make() -> dict[str, Any]:
            choice = study.choose(method + given, options.budget)
            forward, trained = choice.cost
            kl = study.compared_on.kl(choice.layers)
            return {"layers": list(choice.layers), "kl": kl, "forward_tokens": forward, "trained_tokens": trained}

        name = {"method": method, "budget": options.budget, "by": by, "amount": amount, "piece": piece}
        found = records.get(name, make)
        say(f"{method} on {amount:,} {UNITS[by]}, piece {piece}: {found['layers']}, KL {found['kl']:.4f}")

    for method in options.methods:
        for amount in options.amounts:
            count = amount // size
            for piece in range(min(options.pieces, len(texts) // count)):
                part = slice(piece * count, (piece + 1) * count)
                study.texts["short"], study.asked = texts[part], asked[part]
                chosen(method, "text", amount, piece)
    study.texts["short"], study.asked = texts, asked
    for method in options.asking:
        for samples in options.samples:
            chosen(method, "questions", samples, 0, f":samples={samples}")
    for tokens in options.score_amounts:
        options.score_tokens = tokens
        chosen("kl_guided", "training", tokens, 0)


def table(records: list[dict[str, Any]]) -> str:
    """A row for each method and amount; of several pieces their figures side by side."""
    by_amount: dict[tuple[str, str], dict[int, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        by_amount[record["method"], record["by"]][record["amount"]].append(record)
    budget = records[0]["budget"]
    head = [
        "method",
        "chooses on",
        "forward tokens",
        "trained tokens",
        f"layers as on most, of {budget}",
        "KL of the set",
    ]
    rows = []
    for (method, by), amounts in by_amount.items():
        most = {*amounts[max(amounts)][0]["layers"]}
        for amount, found in sorted(amounts.items()):
            cells = [
                f"`{method}`",
                f"{amount:,} {UNITS[by]}",
                _millions(found[0]["forward_tokens"]),
                _millions(found[0]["trained_tokens"]),
                ", ".join(str(len(most & {*record["layers"]})) for record in found),
                ", ".join(f"{record['kl']:.3f}" for record in found),
            ]
            rows.append(cells)
    return table_of(head, rows)


def _millions(tokens: int) -> str:
    return f"{tokens / 1e6:.2f}M" if tokens else ""


def main() -> None:
    if sys.argv[1:2] == ["--table"]:
        (path,) = sys.argv[2:]
        print(table([json.loads(line) for line in Path(path).read_text().splitlines()]))
        return
    parser = parser_of(__doc__)
    parser.add_argument("--budget", type=int, default=8, help="layers kept")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--amounts", type=number_of, nargs="*", default=[2048, 8192, 32_768, 65_536], help="of tokens")
    parser.add_argument("--pieces", type=int, default=4, help="disjoint ones of the held-out text, for each amount")
    parser.add_argument("--asking", nargs="*", default=list(ASKING), help="methods with questions of their own")
    parser.add_argument("--samples", type=int, nargs="*", default=[16, 62, 250, 500])
    parser.add_argument("--score-amounts", type=number_of, nargs="*", default=[16_384, 65_536, 262_144])
    parser.set_defaults(mixers=None)
    options = parser.parse_args()
    options.tokens = max(options.amounts)
    with opened(options) as study:
        measure(study, options, records_of(study))


if __name__ == "__main__":
    main()
