"""What the answers of a recall task say: shares with 95 % intervals, and what chance would give."""

import numpy as np

from jaxhybrid.evaluate.answers import is_answer
from jaxhybrid.evaluate.bootstrap import Share, wilson
from jaxhybrid.evaluate.recall_prompts import RecallTask

THIRDS = ("first", "middle", "last")


def recall_figures(task: RecallTask, chosen: np.ndarray, another_name: np.ndarray) -> dict[str, Share]:
    """The shares of one model.

    Args:
        chosen: [P,Q,A] the model's greedy token at each token of the answers.
        another_name: [P] whether one of the prompt's wrong answers, drawn at random, is the number of another name.

    Returns:
        `right`: of all answers; `first_query`, `later_queries`: of each prompt's first answer, and of the others;
        `first_third`, `middle_third`, `last_third`: of the pairs in that part of the list (three pairs and more);
        `first_token`: answers that begin right; `another_name`: answers that are the number of another name.
    """
    prompts = len(chosen)
    right = is_answer(chosen, task.answers)
    third = 3 * task.listed // task.pairs
    places = {  # every pair is asked once, so that each prompt has equally many answers of a third
        f"{name}_third": interval(right[third == number].reshape(prompts, -1))
        for number, name in enumerate(THIRDS)
        if task.pairs >= len(THIRDS)
    }
    # Of each prompt one wrong answer is known to its end; it stands for all of them.
    wrong = ~right
    return {
        "right": interval(right),
        "first_query": interval(right[:, :1]),
        "later_queries": interval(right[:, 1:]),
        **places,
        "first_token": interval(chosen[..., 0] == task.answers[..., 0]),
        "another_name": interval(wrong * another_name[:, None]),
    }


def chance(task: RecallTask) -> dict[str, float]:
    """What saying one of the listed numbers at random gives: figures of `recall_figures`."""
    first = task.answers[..., 0]
    return {
        "right": 1 / task.pairs,
        "first_token": float((first[:, :, None] == first[:, None, :]).mean()),
        "another_name": 1 - 1 / task.pairs,
    }


def interval(answers: np.ndarray) -> Share:
    """The share of true ones among `answers` [P,n] and its 95 % interval: Wilson's, over prompts.

    Answers of one prompt are alike, so they count as the number of independent answers that would vary as much as
    the prompts' means do. Where these do not vary, each prompt counts as one answer.
    """
    prompts, each = answers.shape
    means = answers.mean(1)
    share, variance = float(means.mean()), float(means.var()) / prompts
    count = min(share * (1 - share) / variance, prompts * each) if variance > 0 else prompts
    low, high = wilson(share, count)
    return {"share": share, "low": low, "high": high}
