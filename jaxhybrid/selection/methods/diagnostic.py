"""Diagnostic data: how the teacher's answers fall when one layer's attention is removed (arXiv 2512.20569).

The questions are those of its code (github.com/fla-org/hybrid-distillation), read in another way: there a model writes
200 tokens, in which the answer is looked for; here an answer is right when greedy decoding gives exactly it. So values
are asked for as the list has them, words in one order, and none that a tie would leave open; what never varied there
(a variable's letter, the most frequent word) is drawn.
"""

import random
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from string import ascii_lowercase, ascii_uppercase
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field
from scipy.special import zeta

from jaxhybrid import hosts
from jaxhybrid.data.packing import hash_seed
from jaxhybrid.errors import ConfigError
from jaxhybrid.evaluate.words import NAMES, between, pick, shuffled
from jaxhybrid.selection.ablated import ablated_states
from jaxhybrid.selection.choice import Choice, Given, Method, ranked
from jaxhybrid.selection.questions import answer, prompts_of
from jaxhybrid.selection.rounds import Round, by_layer, from_layers
from jaxhybrid.settings.select import MeasureConfig, MethodConfig
from jaxhybrid.settings.types import Count, about, free

TRIES = 10_000  # lists drawn until three words are ahead of each other and of the rest


class DiagnosticConfig(MethodConfig):
    """Questions on made-up data."""

    samples: Count = about(500, "questions")
    questions_seed: int = about(0, "seed of the questions")
    score: Literal["accuracy", "likelihood"] = about(
        "accuracy",
        "what falls: the share of right answers, as in the paper, ties by the other; or their log-likelihood",
    )
    batch_size: Count = free(16, "questions read at once")

    def questions(self) -> list[tuple[str, str]]:
        """Each with its answer."""
        name = type(self).__name__
        return [self.draw(random.Random(hash_seed(self.questions_seed, f"{name} {n}"))) for n in range(self.samples)]

    def draw(self, rng: random.Random) -> tuple[str, str]:
        """A question and its answer, from `rng.random()` alone: it is what Python promises never to change."""
        raise NotImplementedError


class AssociativeRecall(DiagnosticConfig):
    """Names with digits, and the digit of one asked for."""

    pairs: Annotated[int, Field(ge=2, le=len(NAMES))] = about(50, "names listed")
    asked: Annotated[int, Field(ge=1)] = about(
        1, "names asked for; of several the sum, which a model must add up in its head; the published code has 3"
    )

    def trouble(self, measure: MeasureConfig) -> str | None:
        return f"asked {self.asked} is more than the {self.pairs} of pairs" if self.asked > self.pairs else None

    def draw(self, rng: random.Random) -> tuple[str, str]:
        names = shuffled(rng, NAMES)[: self.pairs]
        values = {name: between(rng, 0, 10) for name in names}
        asked = shuffled(rng, names)[: self.asked]
        return _ask_values(values, asked, sum(values[name] for name in asked))


class MultihopRecall(AssociativeRecall):
    """As associative_recall, but a name may stand for another one's digit."""

    alias: Annotated[float, Field(ge=0, le=1)] = about(0.4, "share of names with another name in place of a digit")
    hops: Count = about(2, "most names between a name and its digit")

    def draw(self, rng: random.Random) -> tuple[str, str]:
        names = shuffled(rng, NAMES)[: self.pairs]
        listed, values, depths = dict[str, Any](), dict[str, int](), dict[str, int]()
        for name in names:
            # Of the names before it that are not too deep; deeper ones more often, as many times as they have hops.
            parents = [other for other, depth in depths.items() if depth < self.hops for _ in range(depth + 1)]
            if parents and rng.random() < self.alias:
                parent = pick(rng, parents)
                listed[name], values[name], depths[name] = parent, values[parent], depths[parent] + 1
            else:
                listed[name] = values[name] = between(rng, 0, 10)
                depths[name] = 0
        # One that stands for another first, if there is any.
        asked = sorted(shuffled(rng, names), key=lambda name: not depths[name])[: self.asked]
        return _ask_values(listed, asked, sum(values[name] for name in asked))


class VariableTracking(DiagnosticConfig):
    """Variables set to a number or to each other, and all that hold one number asked for."""

    chains: Annotated[int, Field(ge=1, le=8)] = about(2, "numbers, each with variables that hold it")
    hops: Count = about(2, "variables of a chain beyond the first")
    noise: Annotated[float, Field(ge=0)] = about(1.0, "other lines, as a multiple of those of the chains")

    def draw(self, rng: random.Random) -> tuple[str, str]:
        letters = shuffled(rng, ascii_uppercase)[: self.chains + 7]
        numbers: list[int] = []
        while len(numbers) < self.chains:
            if (number := between(rng, 10_000, 100_000)) not in numbers:
                numbers.append(number)
        lines = []
        for letter, number in zip(letters, numbers):
            lines += [f"{letter}1 = {number}", *(f"{letter}{i} = {letter}{i - 1}" for i in range(2, self.hops + 2))]
        others = letters[self.chains :]
        for _ in range(round(self.noise * len(lines))):
            name = f"{pick(rng, others)}{between(rng, 1, 10)}"
            number = between(rng, 10_000, 100_000)
            lines.append("..." if rng.random() < 0.5 or number in numbers else f"{name} = {number}")
        text = "\n".join(shuffled(rng, lines))
        held = " ".join(f"{letters[0]}{i}" for i in range(1, self.hops + 2))
        return f"Variables.\n\n{text}\n\nWhich variables hold the number {numbers[0]}?\nAnswer:", f" {held}"


class CommonWords(DiagnosticConfig):
    """A list of words, and those asked for that are in it more often than the others, in the list's order."""

    common: Count = about(10, "words that are common")
    uncommon: Count = about(100, "words that are not")
    common_times: Annotated[int, Field(ge=2)] = about(2, "times of a common word; of the others once")

    def draw(self, rng: random.Random) -> tuple[str, str]:
        words = shuffled(rng, _words(self.common + self.uncommon + 16))[: self.common + self.uncommon]
        common = words[: self.common]
        listed = shuffled(rng, common * self.common_times + words[self.common :])
        found = " ".join(sorted(common, key=listed.index))
        question = f"Which {self.common} words are in the list more than once?"
        return f"A list of words.\n\n{' '.join(listed)}\n\n{question}\nAnswer:", f" {found}"


class FrequentWords(DiagnosticConfig):
    """A list of words by a zeta law, and the three most frequent ones asked for, the first one first."""

    words: Annotated[int, Field(ge=10)] = about(50, "words of the list")
    vocabulary: Annotated[int, Field(ge=4)] = about(200, "different words there may be")
    alpha: Annotated[float, Field(gt=1)] = about(2.0, "exponent of the law; more makes frequent words more frequent")

    def draw(self, rng: random.Random) -> tuple[str, str]:
        kinds = shuffled(rng, _words(self.vocabulary))
        ranks = np.arange(1, self.vocabulary)
        weights = [*(ranks**-self.alpha), float(zeta(self.alpha, self.vocabulary))]  # the tail is the last word's
        ends = np.array(list(accumulate(weights)))
        for _ in range(TRIES):
            drawn = ends.searchsorted([rng.random() * ends[-1] for _ in range(self.words)])
            listed = [kinds[min(rank, self.vocabulary - 1)] for rank in drawn.tolist()]
            times = [*Counter(listed).most_common(4), ("", 0)]
            if len(times) > 3 and times[0][1] > times[1][1] > times[2][1] > times[3][1]:
                found = " ".join(word for word, _ in times[:3])
                question = "Which 3 words are in the list most often, the most frequent one first?"
                return f"A list of words.\n\n{' '.join(listed)}\n\n{question}\nAnswer:", f" {found}"
        raise ConfigError(
            f"select.frequent_words: {self.words} words by a law of exponent {self.alpha} have no three that are more "
            "frequent than the rest, each by itself. Ask for more words or a smaller alpha."
        )


def choose(given: Given, count: int) -> Choice:
    settings, name = given.own(DiagnosticConfig), given.settings.method

    def compute() -> Round:
        teacher = given.teacher()
        key, context = f"select.{name}", teacher.config.max_position_embeddings
        prompts = prompts_of(given.vocabulary(), settings.questions(), context, key)
        dtype = teacher.params["embed"]["embedding"].dtype
        whole, *without = (
            answer(teacher, prompts, softmax, rows=settings.batch_size, dtype=dtype, states=ablated_states)
            for softmax in (np.arange(given.depth) != layer for layer in range(-1, given.depth))
        )
        hosts.say(f"select: {name}: the teacher answers {whole.right:.1%} of {settings.samples} questions")
        falls = {
            "accuracy": [whole.right - found.right for found in without],
            "likelihood": [whole.likelihood - found.likelihood for found in without],
        }
        finer = "likelihood" if settings.score == "accuracy" else "accuracy"
        tokens = prompts.tokens.size
        return {
            "action": "rank",
            "scores": by_layer(falls[settings.score]),
            "finer": by_layer(falls[finer]),
            "answered": whole.to_json(),
            "tokens": tokens,
            "forward_tokens": (given.depth + 1) * tokens,
        }

    found = given.log.round(compute)
    return ranked(from_layers(found["scores"]), count, from_layers(found["finer"]), rounds=[found])


def _ask_values(listed: dict[str, Any], asked: Sequence[str], value: int) -> tuple[str, str]:
    lines = "\n".join(f"{name}: {held}" for name, held in listed.items())
    return f"Names and values.\n\n{lines}\n\nAsked for.\n\n{' + '.join(asked)}:", f" {value}"


def _words(number: int) -> list[str]:
    """aa bb ... zz aa1 bb1 ..."""
    return [f"{ascii_lowercase[n % 26] * 2}{n // 26 or ''}" for n in range(number)]


METHODS = {
    "associative_recall": Method(choose, "teacher", AssociativeRecall),
    "multihop_recall": Method(choose, "teacher", MultihopRecall),
    "variable_tracking": Method(choose, "teacher", VariableTracking),
    "common_words": Method(choose, "teacher", CommonWords),
    "frequent_words": Method(choose, "teacher", FrequentWords),
}
