"""The text of the recall probe: a list of names and numbers, then the same names in another order, each number asked.

    Names and numbers.

    amber: 5123
    wolf: 8416

    wolf: 8416
    amber: 5123

Every number of the second list is asked for: a prompt gives as many answers as it has pairs, each pair is asked once,
and from the second question on the prompt itself shows what is wanted. Prose may stand between list and questions.
"""

import random
from dataclasses import dataclass
from itertools import product

import numpy as np

from jaxhybrid.data.packing import hash_seed
from jaxhybrid.data.vocabulary import Vocabulary
from jaxhybrid.errors import ConfigError, DataError
from jaxhybrid.evaluate.words import NAMES, distinct, number, sentence, shuffled
from jaxhybrid.settings.evaluate import RecallConfig

ROUND_TO = 32  # tokens: kernels like round lengths
HEADER = "Names and numbers.\n\n"  # without one, the list's first pair would also be where attention rests


@dataclass(frozen=True)
class RecallTask:
    """Prompts with equally many pairs and equally much prose, as arrays: P prompts of T tokens, Q questions in each,
    answers of up to A tokens."""

    pairs: int
    filler_tokens: int  # asked for; whole sentences that fit
    tokens: np.ndarray  # [P,T] int32; 0 after a prompt's end, at least A of them
    places: np.ndarray  # [P,Q] the last token before each answer
    answers: np.ndarray  # [P,Q,A] the answer's tokens, -1 after its end
    listed: np.ndarray  # [P,Q] where in the list the asked pair stands, from 0
    lengths: np.ndarray  # [P] tokens of each prompt


def recall_tasks(vocabulary: Vocabulary, settings: RecallConfig, context: int) -> list[RecallTask]:
    """Every length of the list with every amount of prose.

    Raises:
        ConfigError: a prompt would be longer than `context`; or as `recall_task`.
        DataError: as `recall_task`.
    """
    tasks = []
    for pairs, filler in product(settings.pairs, settings.filler):
        task = recall_task(vocabulary, pairs, filler, settings.samples)
        if (longest := task.tokens.shape[1]) > context:
            raise ConfigError(
                f"evaluate.recall: prompts of {pairs} pairs and {filler} tokens of filler take {longest} tokens, the "
                f"teacher has a context of {context}. Ask for fewer in evaluate.recall.pairs or evaluate.recall.filler."
            )
        tasks.append(task)
    return tasks


def recall_task(
    vocabulary: Vocabulary, pairs: int, filler_tokens: int = 0, prompts: int = 500, seed: int = 0
) -> RecallTask:
    """`prompts` seeded prompts, begun as every text is. Names, numbers and orders are those of any `filler_tokens`.

    Raises:
        ConfigError: fewer than two pairs or more than there are names.
        DataError: the tokenizer joins a number with a name, so that it cannot be asked for.
    """
    if not 2 <= pairs <= len(NAMES):
        raise ConfigError(f"evaluate.recall.pairs has {pairs}; give numbers from 2 to {len(NAMES)}.")
    drawn = [_draw(random.Random(hash_seed(seed, f"recall {pairs} {number}")), pairs) for number in range(prompts)]
    prose = _prose(vocabulary, filler_tokens, prompts, seed)
    texts, spans = zip(*(_write(*lists, sentences) for lists, sentences in zip(drawn, prose)))
    encoded = vocabulary.encoder.encode_batch(list(texts), add_special_tokens=False)
    asked = [
        [_tokens_of(span, np.array(encoding.offsets)) for span in numbers] for numbers, encoding in zip(spans, encoded)
    ]
    head = vocabulary.begin_ids
    lengths = np.array([len(head) + len(encoding.ids) for encoding in encoded])
    longest_answer = max(stop - start for numbers in asked for start, stop in numbers)
    width = -(-(lengths.max() + longest_answer) // ROUND_TO) * ROUND_TO
    tokens = np.zeros((prompts, width), np.int32)
    answers = np.full((prompts, pairs, longest_answer), -1, np.int32)
    places = np.zeros((prompts, pairs), np.int32)
    for prompt, (encoding, numbers) in enumerate(zip(encoded, asked)):
        tokens[prompt, : lengths[prompt]] = [*head, *encoding.ids]
        for question, (start, stop) in enumerate(numbers):
            answers[prompt, question, : stop - start] = encoding.ids[start:stop]
            places[prompt, question] = len(head) + start - 1
    return RecallTask(
        pairs, filler_tokens, tokens, places, answers, np.array([order for _, _, order in drawn]), lengths
    )


def answer_batches(task: RecallTask, batch_size: int, part: int = 0, parts: int = 1) -> list[dict[str, np.ndarray]]:
    """Batches of whole prompts, `tokens`, `segment_ids` and `counted`: 1 where a token of an answer comes next.

    Of each batch's rows, those of part `part` of `parts`.
    """
    counted = np.zeros(task.tokens.shape, np.float32)
    prompt, question, token = np.nonzero(task.answers != -1)
    counted[prompt, task.places[prompt, question] + token] = 1
    seen = (np.arange(task.tokens.shape[1]) < task.lengths[:, None]).astype(np.int32)
    arrays, share = {"tokens": task.tokens, "segment_ids": seen, "counted": counted}, batch_size // parts
    return [
        {name: array[first : first + share] for name, array in arrays.items()}
        for first in range(part * share, len(task.tokens), batch_size)
    ]


def _draw(rng: random.Random, pairs: int) -> tuple[list[str], list[str], list[int]]:
    """Names and numbers in the order of the list, and the order in which they are asked."""
    names = shuffled(rng, NAMES)[:pairs]
    numbers = distinct(rng, pairs, lambda rng: number(rng, 4))
    return names, numbers, shuffled(rng, range(pairs))


def _write(names: list[str], numbers: list[str], order: list[int], prose: str) -> tuple[str, list[tuple[int, int]]]:
    """A prompt, and the characters of every number that is asked for."""
    text = HEADER + "".join(f"{name}: {number}\n" for name, number in zip(names, numbers)) + "\n"
    if prose:
        text += f"{prose}\n\n{HEADER}"
    spans = []
    for pair in order:
        text += f"{names[pair]}: "
        spans.append((len(text), len(text) + len(numbers[pair])))
        text += f"{numbers[pair]}\n"
    return text, spans


def _tokens_of(span: tuple[int, int], offsets: np.ndarray) -> tuple[int, int]:
    """The tokens [start, stop) that hold the characters `span` of a text. `offsets` [n,2]: each token's characters."""
    begin, end = span
    held = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > begin) & (offsets[:, 0] < offsets[:, 1]))
    if not len(held) or offsets[held[0], 0] < begin - len(": ") or offsets[held[-1], 1] > end + len("\n"):
        raise DataError(
            "This tokenizer joins the numbers of the recall probe with the names beside them, so the probe does not "
            "apply. Leave it out with evaluate.recall.pairs=[]."
        )
    return int(held[0]), int(held[-1]) + 1


def _prose(vocabulary: Vocabulary, tokens: int, prompts: int, seed: int) -> list[str]:
    """Made-up sentences for each prompt, as many as fit into `tokens` tokens."""
    if not tokens:
        return [""] * prompts
    texts, ends = [], []
    for prompt in range(prompts):
        rng = random.Random(hash_seed(seed, f"recall filler {prompt}"))
        sentences = [sentence(rng) for _ in range(tokens // 6 + 1)]  # none has fewer than six words
        texts.append(" ".join(sentences))
        ends.append(np.cumsum([len(each) + 1 for each in sentences]) - 1)
    encoded = vocabulary.encoder.encode_batch(texts, add_special_tokens=False)
    limits = (np.array(encoding.offsets)[:tokens, 1].max() for encoding in encoded)
    return [text[: int(stops[stops <= limit].max(initial=0))] for text, stops, limit in zip(texts, ends, limits)]
