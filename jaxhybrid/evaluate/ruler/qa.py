"""Questions whose answer stands in one of many documents (SQuAD 2.0, arXiv 1806.03822) or in two (HotpotQA,
arXiv 1809.09600), the others about something else."""

from functools import partial
from typing import Any, NamedTuple

from jaxhybrid.errors import DataError
from jaxhybrid.evaluate.prompts import Prompt
from jaxhybrid.evaluate.ruler.task import Given, Materials, Task
from jaxhybrid.evaluate.words import shuffled


class Question(NamedTuple):
    text: str
    answers: tuple[str, ...]
    needed: list[int]  # documents that must be there
    related: list[int]  # documents of the same article, taken before others


class Quiz(NamedTuple):
    documents: list[str]
    questions: list[Question]


def _squad(data: Any) -> Quiz:
    articles = [[p["context"] for p in article["paragraphs"]] for article in data["data"]]
    documents = sorted({context for article in articles for context in article})
    places = {document: place for place, document in enumerate(documents)}
    questions = []
    for article, contexts in zip(data["data"], articles):
        for paragraph in article["paragraphs"]:
            own = places[paragraph["context"]]
            related = [places[context] for context in contexts if places[context] != own]
            questions += [
                Question(asked["question"], tuple(a["text"] for a in asked["answers"]), [own], related)
                for asked in paragraph["qas"]
                if not asked["is_impossible"]
            ]
    return Quiz(documents, questions)


def _hotpotqa(data: Any) -> Quiz:
    texts = [[f"{title}\n{''.join(lines)}" for title, lines in row["context"]] for row in data]
    documents = sorted({text for row in texts for text in row})
    places = {document: place for place, document in enumerate(documents)}
    return Quiz(
        documents,
        [
            Question(row["question"], (row["answer"],), [places[text] for text in own], [])
            for row, own in zip(data, texts)
        ],
    )


def _quiz(materials: Materials, task: str) -> Quiz:
    setting, read = {"qa_1": ("squad", _squad), "qa_2": ("hotpotqa", _hotpotqa)}[task]

    def parse() -> Quiz:
        try:
            return read(materials.json(setting))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"evaluate.ruler.{setting}: {getattr(materials.settings, setting)} has not the form of that data set "
                f"({error!r})."
            ) from error

    return materials.once(setting, parse)


def _documents(materials: Materials, task: str) -> int:
    return len(_quiz(materials, task).documents)


def _write(given: Given, size: int) -> Prompt:
    """`size`: documents."""
    documents, questions = _quiz(given.materials, given.task)
    if given.number >= len(questions):
        raise DataError(
            f"evaluate.ruler.samples {given.materials.settings.samples}: the file of {given.task} has {len(questions)} "
            "questions with an answer. Ask for fewer."
        )
    asked, rng = questions[given.number], given.rng("documents")
    # One order of all other documents, so that a larger haystack holds a smaller one.
    related = shuffled(rng, asked.related)
    known = {*asked.needed, *asked.related}
    rest = shuffled(rng, [place for place in range(len(documents)) if place not in known])
    count = max(size, len(asked.needed))
    chosen = shuffled(given.rng("order"), [*asked.needed, *related, *rest][:count])
    context = "\n\n".join(f"Document {number}:\n{documents[place]}" for number, place in enumerate(chosen, 1))
    # The wording is RULER's (Apache-2.0): figures depend on it.
    order = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    text = f"{order}\n\nThe following are given documents.\n\n{context}\n\n{order}\n\nQuestion: {asked.text}"
    depth = chosen.index(asked.needed[0]) / len(chosen)
    depths = (depth,) * len(asked.answers) if len(asked.needed) == 1 else ()
    return Prompt(text, " Answer:", asked.answers, depths=depths)


TASKS = tuple(
    Task(name, _write, new_tokens=32, scoring="part", most=partial(_documents, task=name)) for name in ("qa_1", "qa_2")
)
