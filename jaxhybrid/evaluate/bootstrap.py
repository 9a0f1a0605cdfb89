"""95 % intervals: over prompts or rows by resampling them (Efron 1979), over runs by Student's t."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

RESAMPLES = 2000
Z95 = 1.959964  # half a 95 % interval of the normal distribution, in standard deviations

Share = dict[str, float]  # share, low, high: a figure and its 95 % interval


def mean_interval(scores: np.ndarray) -> Share:
    """The mean of `scores` [P], each from 0 to 1, with its interval over prompts."""
    return ratio_interval(scores, np.ones(len(scores)))


def ratio_interval(tops: np.ndarray, bottoms: np.ndarray) -> Share:
    """sum(tops) / sum(bottoms) of [P] prompts, a share of what each of them counts, with its interval over prompts.

    Where all prompts have the same share, resampling cannot tell how sure that is: then Wilson's interval, each prompt
    one answer.
    """
    counted = bottoms > 0
    tops, bottoms = tops[counted], bottoms[counted]
    share = float(tops.sum() / bottoms.sum())
    if np.ptp(tops / bottoms) == 0:
        low, high = wilson(share, len(tops))
    else:
        low, high = resampled(tops, bottoms)
    return {"share": share, "low": low, "high": high}


def resampled(tops: np.ndarray, bottoms: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """The interval of sum(tops) / sum(bottoms) when prompts (or rows of text) are drawn again, with replacement."""
    rng, count = np.random.default_rng(seed), len(tops)
    draws = rng.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    ratios = (draws @ tops) / np.maximum(draws @ bottoms, 1e-12)
    low, high = np.quantile(ratios[(draws @ bottoms) > 0], [0.025, 0.975])
    return float(low), float(high)


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's interval of a share among `count` independent answers."""
    centre = (share + Z95**2 / (2 * count)) / (1 + Z95**2 / count)
    half = Z95 / (1 + Z95**2 / count) * math.sqrt(share * (1 - share) / count + Z95**2 / (4 * count**2))
    return max(min(centre - half, share), 0.0), min(max(centre + half, share), 1.0)  # rounding aside, as they are


def over_runs(values: Sequence[float]) -> dict[str, Any]:
    """`mean` of the same figure of several runs, and its interval `low` to `high`; of one run there is none.

    By Student's t: resampling the three or five runs that one can afford gives intervals far too narrow.
    """
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return {"mean": mean, "low": None, "high": None}
    half = float(stdtrit(count - 1, 0.975)) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return {"mean": mean, "low": mean - half, "high": mean + half}
