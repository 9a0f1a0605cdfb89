"""Methods that ask questions, on a teacher in which two layers alone carry recall: those they must keep."""

import re
from collections import Counter
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from jaxhybrid.errors import ConfigError
from jaxhybrid.evaluate.recall_prompts import recall_task
from jaxhybrid.model.blueprint import bind
from jaxhybrid.model.layers import Block
from jaxhybrid.model.mixers import MIXERS
from jaxhybrid.model.transformer import embed, final_norm, token_context
from jaxhybrid.selection.ablated import ablated_states
from jaxhybrid.selection.choice import Given
from jaxhybrid.selection.methods import METHODS, choose
from jaxhybrid.selection.methods.diagnostic import CommonWords, FrequentWords, MultihopRecall, VariableTracking
from jaxhybrid.selection.methods.halo_ratio import ratios
from jaxhybrid.selection.questions import answer, prompts_of
from jaxhybrid.settings.select import select_config
from tests.oracles import row
from tests.selection import planted

DIAGNOSTIC = ("associative_recall", "multihop_recall", "variable_tracking", "common_words", "frequent_words")
MEASURE = {"tokens": 128, "sequence_length": 16, "batch_size": 4}
pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    return planted.vocabulary(tmp_path_factory.mktemp("planted"), 9000)


@pytest.fixture(scope="module")
def teacher(vocabulary, one_device):
    return planted.teacher(vocabulary[1])


@pytest.fixture
def select(vocabulary, teacher):
    student = cache(lambda: planted.student(teacher, [(1.0, planted.text())]))

    def run(method, budget=2, measure=MEASURE, **own):
        settings = select_config(method=method, budget=budget, measure=measure, **{method: own} if own else {})
        return choose(Given(4, settings, student=student, teacher=lambda: teacher, vocabulary=lambda: vocabulary[0]))

    return run


def test_associative_recall_finds_the_layers_that_carry_it(select):
    for own in ({}, {"score": "likelihood"}):
        found = select("associative_recall", samples=8, pairs=6, **own)
        assert found.layers == planted.RECALLS
        assert found.rounds[0]["answered"]["accuracy"] == 1
    accuracy = select("associative_recall", samples=8, pairs=6)
    assert [accuracy.importance[layer] for layer in (0, 3)] == [0, 0]
    assert min(accuracy.importance[layer] for layer in planted.RECALLS) > 0.5
    finer = accuracy.rounds[0]["finer"]
    assert accuracy.order[2:] == tuple(sorted((0, 3), key=lambda layer: -finer[str(layer)]))
    assert accuracy.forward_tokens == 5 * 8 * 32


def test_ablation_is_the_walk_without_a_mixer(vocabulary, teacher):
    """Layer by layer in a Python loop, one layer's mixer left out, answers by whole logits."""
    task = recall_task(vocabulary[0], 3, prompts=4, seed=5)
    seen = (np.arange(task.tokens.shape[1]) < task.lengths[:, None]).astype(np.int32)

    @jax.jit
    def block_of(params, mixer, x, factor):
        context = token_context(teacher.config, task.tokens, seen, None)
        block = bind(Block, teacher.config, params)
        mixed = bind(MIXERS["full_attention"], teacher.config, mixer)(block.mixer_input(x), context)[0]
        return block.add_mlp(x + factor * mixed)

    for removed in (-1, 0, 2):
        x = embed(teacher, task.tokens)
        for layer in range(4):
            own = (
                row(stack, layer) for stack in (teacher.params["blocks"], teacher.params["mixers"]["full_attention"])
            )
            x = block_of(*own, x, float(layer != removed))
        logits = np.asarray(final_norm(teacher, x) @ teacher.head.kernel, np.float64)
        log_p = logits - logsumexp(logits, axis=-1, keepdims=True)
        p = np.arange(len(task.places))[:, None]
        expected = log_p[p, task.places, task.answers[..., 0]].mean()
        right = (log_p[p, task.places].argmax(-1) == task.answers[..., 0]).mean()
        found = answer(teacher, task, np.arange(4) != removed, rows=4, dtype=jnp.float32, states=ablated_states)
        assert found.likelihood == pytest.approx(expected, rel=1e-3, abs=1e-3)
        assert found.right == right


def test_replacement_methods_find_the_layers_that_carry_recall(select):
    likely = select("answer_likelihood", pairs=3, samples=8)
    assert likely.layers == planted.RECALLS
    assert likely.rounds[0]["answered"]["accuracy"] == 1
    found = select("halo_ratio", pairs=3, samples=8)
    assert found.layers == planted.RECALLS
    measured = found.rounds[0]
    assert measured["recall"]["1"] < 0.5 < measured["recall"]["0"]
    assert all(0 < value < 1 for value in measured["text_likelihood"].values())
    # What is said of text without repetitions rests on the other two.
    assert select("perplexity").layers != planted.RECALLS


def test_the_two_forms_of_halos_ratio():
    """By hand: the paper from the teacher's figures, the code from the best of the others and with a cap."""
    recall, text, whole = [0.9, 0.5, 0.8], [0.4, 0.3, 0.5], (1.0, 0.45)
    assert ratios(recall, text, whole, "paper")[:2] == pytest.approx([0.1 / 0.05, 0.5 / 0.15])
    assert ratios(recall, text, whole, "paper")[2] > 1e9  # it costs no likelihood at all
    assert ratios(recall, text, whole, "code") == pytest.approx([0.0, 0.4 / 0.2, 50.0])


def test_questions_are_seeded_and_differ():
    for name in DIAGNOSTIC:
        kind = METHODS[name].settings
        assert kind(samples=5).questions() == kind(samples=9).questions()[:5]
        assert len({text for text, _ in kind(samples=9).questions()}) == 9
        assert kind(samples=5).questions() != kind(samples=5, questions_seed=1).questions()


def test_answers_follow_from_the_questions():
    """Each solved again from its text alone."""
    hops = Counter()
    for asked in (1, 3):
        for text, said in MultihopRecall(samples=40, asked=asked, pairs=20).questions():
            listed = dict(line.split(": ") for line in text.split("\n") if ": " in line)
            total, names = 0, text.rsplit("\n", 1)[1].removesuffix(":").split(" + ")
            assert len(set(names)) == asked
            for number, name in enumerate(names):
                steps = 0
                while not listed[name].isdigit():
                    name, steps = listed[name], steps + 1
                total += int(listed[name])
                if number == 0:
                    hops[steps] += 1
            assert said == f" {total}"
    assert hops.keys() == {1, 2}  # the first one asked for stands for another
    for text, said in VariableTracking(samples=20, chains=3, hops=3).questions():
        values = dict(line.split(" = ") for line in text.split("\n") if " = " in line)
        number = re.search(r"the number (\d+)\?", text)[1]

        def value(name, values=values):
            while name in values:
                name = values[name]
            return name

        assert [name for name in sorted(values) if value(name) == number] == said.split()
        assert len(said.split()) == 4
    for text, said in CommonWords(samples=20).questions():
        words = text.split("\n")[2].split()
        times = Counter(words)
        assert len(words) == 10 * 2 + 100
        assert said.split() == [word for word in times if times[word] == 2]
    for text, said in FrequentWords(samples=20).questions():
        first = Counter(text.split("\n")[2].split()).most_common(4)
        assert [word for word, _ in first[:3]] == said.split()
        assert len({times for _, times in first}) == 4


def test_prompts_are_begun_as_texts_and_hold_their_answers(vocabulary):
    pairs = [("amber: 3\nwolf: 5\n\nwolf:", " 5"), ("amber:", " 7 8")]
    prompts = prompts_of(vocabulary[0], pairs, 64, "key")
    decode = vocabulary[0].encoder.decode
    assert prompts.tokens.shape == (2, 32)
    assert prompts.tokens[0, :6].tolist() == vocabulary[0].encoder.encode("amber: 3 wolf: 5 wolf:").ids
    assert [decode(a[0][a[0] >= 0].tolist()) for a in prompts.answers] == ["5", "7 8"]
    assert prompts.places.tolist() == [[5], [1]]
    with pytest.raises(ConfigError, match="key: prompts take 7 tokens, the teacher has a context of 6"):
        prompts_of(vocabulary[0], pairs, 6, "key")


def test_settings_that_ask_for_what_cannot_be_are_refused(select):
    with pytest.raises(ConfigError, match=r"associative_recall\.asked 3 is more than the 2 of pairs"):
        select("associative_recall", pairs=2, asked=3)
    with pytest.raises(ConfigError, match="no three that are more frequent"):
        FrequentWords(alpha=60.0).questions()
