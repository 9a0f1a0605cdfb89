"""The recall probe: what its prompts ask, what counts as an answer, and models whose answers are known beforehand."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jaxhybrid.data.vocabulary import Vocabulary
from jaxhybrid.errors import ConfigError, DataError
from jaxhybrid.evaluate import recall as probe
from jaxhybrid.evaluate.recall import compare_recall, recall
from jaxhybrid.evaluate.recall_figures import THIRDS, chance, interval, recall_figures
from jaxhybrid.evaluate.recall_prompts import NAMES, RecallTask, answer_batches, recall_task, recall_tasks
from jaxhybrid.model.partition import make_mesh, param_shardings
from jaxhybrid.model.transformer import Model, forward, model_variables
from jaxhybrid.settings.evaluate import RecallConfig

BOS = "<s>"
PAIR = re.compile(r"(\w+): (\d{4})\n")
FIRST_PROMPT = """\
Names and numbers.

thistle: 9101
blanket: 4006
ember: 1531

The judge forgot the library in the rain.

Names and numbers.

thistle: 9101
ember: 1531
blanket: 4006
"""


def letters(begin=False, merges=()):
    """A vocabulary with a token for every character and for each pair of `merges`; a BOS begins its texts where it is
    to `begin` them."""
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges), BOS]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    last = len(words) - 1
    return Vocabulary(None, tokenizer, "letters", last, end_id=last, begin_ids=(last,) * begin)


def texts(task, vocabulary):
    return [vocabulary.encoder.decode(row[:length]) for row, length in zip(task.tokens, task.lengths)]


# --- prompts


def test_a_prompt_lists_names_and_asks_all_of_them_in_another_order():
    task = recall_task(letters(), 5, prompts=30)
    orders = set()
    for prompt, text in enumerate(texts(task, letters())):
        header, listed, asked = text.split("\n\n")
        assert header == "Names and numbers."
        listed, asked = PAIR.findall(f"{listed}\n"), PAIR.findall(asked)
        assert sorted(asked) == sorted(listed)
        assert len({name for name, _ in listed}) == len({number for _, number in listed}) == 5
        assert [listed.index(pair) for pair in asked] == task.listed[prompt].tolist()
        orders.add(tuple(task.listed[prompt]))
    assert len(orders) > 20


@pytest.mark.parametrize("filler", [0, 60])
def test_every_answer_is_found_among_the_tokens(filler):
    merging = letters(merges=[("Ġ", "1"), ("2", "3"), ("4", "5"), ("Ġ1", "7"), ("w", "o")])  # Ġ is a space
    task = recall_task(merging, 4, filler, prompts=20)
    assert len({tuple(answer[answer >= 0]) for answer in task.answers.reshape(-1, task.answers.shape[2])}) > 70
    assert len(set((task.answers >= 0).sum(-1).ravel())) > 1  # answers of several lengths
    for prompt, text in enumerate(texts(task, merging)):
        asked = PAIR.findall(text)[-4:]
        for question, (name, number) in enumerate(asked):
            place, answer = task.places[prompt, question], task.answers[prompt, question]
            answer = answer[answer >= 0]
            np.testing.assert_array_equal(task.tokens[prompt, place + 1 : place + 1 + len(answer)], answer)
            before, said = (merging.encoder.decode(ids) for ids in (task.tokens[prompt, : place + 1], answer))
            assert (before + said).endswith(f"\n{name}: {number}")
            assert said.strip() == number
            assert name in before
    assert task.tokens.shape[1] >= task.places.max() + 1 + task.answers.shape[2]


def test_prose_is_as_long_as_asked_for_and_changes_nothing_else():
    plain, longer = (recall_task(letters(), 3, filler, prompts=10) for filler in (0, 400))
    again = len("Names and numbers.\n\n" + "\n\n")  # the header once more, and a blank line
    for before, after in zip(texts(plain, letters()), texts(longer, letters())):
        header, listed, prose, header_again, asked = after.split("\n\n")
        assert before == f"{header}\n\n{listed}\n\n{asked}"
        assert header == header_again
        sentences = re.findall(r"The [a-z ]+\.", prose)
        assert " ".join(sentences) == prose
        assert 400 - 80 < len(prose) <= 400
        assert not set(re.findall(r"\w+", prose)) & set(NAMES)
    added = longer.lengths - plain.lengths - again
    assert ((added > 320) & (added <= 400)).all()
    assert len({text.split("\n\n")[2] for text in texts(longer, letters())}) == 10


def test_batches_of_prompts_count_where_an_answer_comes_next():
    task = recall_task(letters(), 3, prompts=8)
    halves = [answer_batches(task, 4, part, 2) for part in range(2)]
    assert [[len(batch["tokens"]) for batch in half] for half in halves] == [[2, 2], [2, 2]]
    rows = [0, 1, 4, 5, 2, 3, 6, 7]  # of the first half's batches, then of the second's
    arrays = {name: np.concatenate([batch[name] for half in halves for batch in half]) for name in halves[0][0]}
    np.testing.assert_array_equal(arrays["tokens"], task.tokens[rows])
    np.testing.assert_array_equal(arrays["segment_ids"].sum(1), task.lengths[rows])
    for tokens, counted, row in zip(arrays["tokens"], arrays["counted"], rows):
        answers = task.answers[row]
        np.testing.assert_array_equal(tokens[np.flatnonzero(counted) + 1], answers[answers != -1])


def test_prompts_never_change():
    (text,) = texts(recall_task(letters(), 3, 90, prompts=1), letters())
    assert text == FIRST_PROMPT


def test_prompts_begin_as_every_text_begins():
    plain, marked = recall_task(letters(), 3, prompts=2), recall_task(letters(begin=True), 3, prompts=2)
    np.testing.assert_array_equal(marked.tokens[:, 0], letters(begin=True).begin_ids[0])
    np.testing.assert_array_equal(marked.tokens[:, 1:60], plain.tokens[:, :59])
    np.testing.assert_array_equal(marked.places, plain.places + 1)
    np.testing.assert_array_equal(marked.answers, plain.answers)


def test_what_cannot_be_asked_is_refused():
    with pytest.raises(ConfigError, match=r"evaluate.recall.pairs has 1; give numbers from 2 to \d+"):
        recall_task(letters(), 1)
    with pytest.raises(ConfigError, match=r"4 pairs and 90 tokens of filler take \d+ tokens, .* context of 200"):
        recall_tasks(letters(), RecallConfig(pairs=(2, 4), filler=(0, 90), samples=2), 200)
    lines = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    lines.pre_tokenizer = pre_tokenizers.Split("\n", "merged_with_next")  # "\namber: 5123" is one token
    with pytest.raises(DataError, match=r"joins the numbers .* evaluate\.recall\.pairs=\[\]"):
        recall_task(Vocabulary(None, lines, "lines", 0, end_id=0, begin_ids=()), 3, prompts=1)


# --- models whose answers are known


def asked_models():
    """name -> (listed pairs, name asked for, digits said so far) -> the digit that this model says next"""

    def listed_number(listed, name, said):
        return dict(listed)[name]

    def next_number(listed, name, said):  # of the pair that follows in the list
        names = [other for other, _ in listed]
        return listed[(names.index(name) + 1) % len(listed)][1]

    def last_number(listed, name, said):
        return listed[-1][1]

    def another_beginning(listed, name, said):  # one digit of another number, then no listed number
        return next_number(listed, name, said)[0] + "###"

    return {f.__name__: f for f in (listed_number, next_number, last_number, another_beginning)}


@pytest.fixture
def answers_of(monkeypatch):
    """answers_of(model of asked_models, task) -> figures, the model's greedy choice put in place of a network's."""
    tokenizer = letters().encoder

    def run(says, task):
        def read_answers(model, tokens, places, answers, **_):
            chosen = np.zeros_like(answers)
            for row, question, number in np.ndindex(chosen.shape):
                listed = PAIR.findall(tokenizer.decode(tokens[row]).split("\n\n")[1] + "\n")
                line = tokenizer.decode(tokens[row, : places[row, question] + number + 1]).rpartition("\n")[2]
                name, _, said = line.partition(": ")
                digits = says(listed, name, said) if ": " in line else ""
                (chosen[row, question, number],) = tokenizer.encode(digits[len(said) : len(said) + 1] or "\n").ids
            return None, chosen

        monkeypatch.setattr(probe, "read_answers", read_answers)
        return recall(Model({}, None), task, batch_tokens=task.tokens.shape[1] * 7)

    return run


@pytest.fixture(scope="module")
def task():
    return recall_task(letters(), 6, 60, prompts=40)


def shares(figures):
    return {name: figure["share"] for name, figure in figures.items()}


def test_a_model_that_copies_is_always_right(answers_of, task):
    figures = answers_of(asked_models()["listed_number"], task)
    assert {name: share for name, share in shares(figures).items() if share != 1.0} == {"another_name": 0.0}
    assert figures["right"]["low"] == pytest.approx(1 / (1 + 1.959964**2 / 40))  # Wilson, each prompt one answer


def test_a_model_that_says_another_names_number_is_found_out(answers_of, task):
    figures = shares(answers_of(asked_models()["next_number"], task))
    assert figures["right"] == 0.0
    assert figures["another_name"] == 1.0


def test_a_number_that_only_begins_like_another_is_not_another_names(answers_of, task):
    figures = shares(answers_of(asked_models()["another_beginning"], task))
    assert figures["right"] == 0.0
    assert figures["another_name"] == 0.0


def test_a_habit_of_place_shows(answers_of, task):
    figures = shares(answers_of(asked_models()["last_number"], task))
    assert figures["right"] == pytest.approx(chance(task)["right"]) == pytest.approx(1 / 6)
    assert [figures[f"{name}_third"] for name in THIRDS] == [0.0, 0.0, 0.5]
    assert figures["another_name"] == pytest.approx(5 / 6)


def test_a_task_that_the_teacher_cannot_do_measures_no_student(answers_of, task, monkeypatch):
    says = asked_models()
    figures = {name: answers_of(says[name], task) for name in ("listed_number", "last_number")}
    monkeypatch.setattr(probe, "recall", lambda model, *_, **__: figures[model])
    (able,) = compare_recall({"teacher": "listed_number", "distill": "last_number"}, [task], batch_tokens=0)
    assert able["applies"]
    assert able["models"] == {"teacher": figures["listed_number"], "distill": figures["last_number"]}
    (unable,) = compare_recall({"teacher": "last_number", "distill": "listed_number"}, [task], batch_tokens=0)
    assert not unable["applies"]
    assert unable["models"] == {"teacher": figures["last_number"]}
    assert (unable["pairs"], unable["filler_tokens"], unable["prompts"]) == (6, 60, 40)
    assert unable["chance"] == chance(task)


def test_answers_are_those_of_greedy_decoding(teacher, monkeypatch):
    """A random model on random text. What it says is found token by token; the right answers are then chosen so that
    the first question of each prompt is answered rightly, with the number of the second one, with one that only begins
    like it, or with no listed number; the last question is always answered rightly."""
    mesh = make_mesh(1, 2, devices=jax.devices()[:2])
    step = jax.jit(lambda tokens: jnp.argmax(forward(teacher, tokens), -1))

    def say(row):
        for _ in range(2):
            padded = np.zeros((1, 32), np.int32)
            padded[0, : len(row)] = row
            row = [*row, int(step(padded)[0, len(row) - 1])]
        return row[-2:]

    def differs(number, token):  # in its token 0 or 1
        return [(number[i] + (i == token)) % 61 for i in range(2)]

    class First:  # the first wrong answer of a prompt is the one that is followed
        def __init__(self, seed):
            self.next = 1.0

        def random(self):
            self.next -= 0.01
            return self.next

    monkeypatch.setattr(probe.random, "Random", First)
    rng = np.random.default_rng(0)
    cases = [  # first and second right answer, from what is said to the first question
        lambda said: (said, None),
        lambda said: (differs(said, 0), said),
        lambda said: (differs(said, 1), said),
        lambda said: (differs(said, 0), differs(said, 1)),
        lambda said: (differs(said, 0), None),
    ]
    tokens, places = np.zeros((5, 32), np.int32), np.zeros((5, 3), np.int32)
    answers, all_said = np.zeros((5, 3, 2), np.int32), np.zeros((5, 3, 2), np.int32)
    for prompt, case in enumerate(cases):
        row = rng.integers(0, 61, 4 + prompt).tolist()
        numbers: list[list[int]] = []
        for question in range(3):
            said = numbers[0] if numbers else None
            while said in [*numbers, None]:  # until the model says something new
                asked = [*row, *rng.integers(0, 61, 3).tolist()]
                said = say(asked)
            numbers.append(said)
            meant = said
            if question == 0:
                meant, second = case(said)
            elif question == 1:
                meant = second or said
            places[prompt, question], answers[prompt, question], all_said[prompt, question] = (
                len(asked) - 1,
                meant,
                said,
            )
            row = [*asked, *meant]
        tokens[prompt, : len(row)] = row
    task = RecallTask(3, 0, tokens, places, answers, np.tile(np.arange(3), (5, 1)), np.full(5, 23))
    with jax.set_mesh(mesh):
        params = jax.device_put(teacher.params, param_shardings(model_variables(teacher.config), mesh))
        figures = recall(Model(params, teacher.config), task, batch_tokens=64, dtype=jnp.float32)
    right = (all_said == answers).all(-1)
    assert right[:, [0, 2]].tolist() == [[prompt == 0, True] for prompt in range(5)]
    assert figures["right"] == interval(right)
    assert figures["another_name"] == interval(~right * np.array([[False], [True], [True], [False], [False]]))


# --- figures


def test_figures_are_plain_counts():
    rng = np.random.default_rng(0)
    task = recall_task(letters(), 7, prompts=25)
    chosen = np.where(rng.random(task.answers.shape) < 0.15, 0, task.answers)
    another = rng.random(25) < 0.5
    counts = {name: [] for name in recall_figures(task, chosen, another)}
    for prompt in range(25):
        order = task.listed[prompt].tolist()
        for question, place in enumerate(order):
            right = all(said == meant for said, meant in zip(chosen[prompt, question], task.answers[prompt, question]))
            counts["right"].append(right)
            counts["first_query" if question == 0 else "later_queries"].append(right)
            third = "first" if place <= 2 else "middle" if place <= 4 else "last"
            counts[f"{third}_third"].append(right)
            counts["first_token"].append(chosen[prompt, question, 0] == task.answers[prompt, question, 0])
            counts["another_name"].append(not right and another[prompt])
    figures = recall_figures(task, chosen, another)
    for name, values in counts.items():
        assert figures[name]["share"] == pytest.approx(np.mean(values)), name
        assert figures[name]["low"] < figures[name]["share"] < figures[name]["high"]
    assert len(counts["first_third"]) == 75


def test_chance_is_that_of_saying_a_listed_number():
    task = recall_task(letters(), 5, prompts=50)
    draws = np.random.default_rng(0).integers(0, 5, (400, 50))
    said = task.answers[np.arange(50), draws]  # [400,50,A]
    right = (said[:, :, None] == task.answers).all(-1).mean()
    first = (said[:, :, None, 0] == task.answers[..., 0]).mean()
    assert chance(task)["right"] == pytest.approx(right, abs=0.01)
    assert chance(task)["first_token"] == pytest.approx(first, abs=0.01)
    assert chance(task)["another_name"] == 1 - chance(task)["right"]


def test_a_list_of_two_has_no_thirds():
    task = recall_task(letters(), 2, prompts=3)
    assert not any(name.endswith("third") for name in recall_figures(task, task.answers, np.zeros(3, bool)))


def test_intervals_of_single_answers_are_wilsons():
    answers = np.array([[True]] * 8 + [[False]] * 2)
    assert interval(answers) == pytest.approx({"share": 0.8, "low": 0.4902, "high": 0.9433}, abs=1e-4)


@pytest.mark.parametrize(("spread", "prompts", "each"), [(0.0, 60, 8), (2.0, 60, 8), (0.0, 200, 1), (math.inf, 60, 8)])
def test_intervals_hold_the_true_share_nineteen_times_in_twenty(spread, prompts, each):
    """Answers of a prompt depend on each other as much as `spread` says; at infinity they are all alike."""
    rng, share, inside, widths = np.random.default_rng(0), 0.85, 0, []
    for _ in range(400):
        if math.isinf(spread):
            chances = rng.random((prompts, 1)) < share
        elif spread:
            chances = rng.beta(share / spread, (1 - share) / spread, (prompts, 1))
        else:
            chances = np.full((prompts, 1), share)
        found = interval(rng.random((prompts, each)) < chances)
        inside += found["low"] <= share <= found["high"]
        widths.append(found["high"] - found["low"])
    assert 0.92 <= inside / 400 <= 0.99
    if math.isinf(spread):  # as wide as if each prompt gave one answer
        assert np.mean(widths) == pytest.approx(2 * 1.96 * math.sqrt(share * (1 - share) / prompts), rel=0.1)
