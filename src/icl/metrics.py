"""What is measured on predictions: proportions with their intervals, Rec2FTP."""

import math
from typing import NamedTuple

import numpy as np
import scipy.stats


class Proportion(NamedTuple):
    """A count of successes among trials."""

    successes: int
    trials: int

    @property
    def value(self) -> float:
        """The fraction, NaN where there were no trials."""
        return self.successes / self.trials if self.trials else math.nan

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """Wilson's score interval (Wilson 1927) at a level of confidence.

        Unlike the normal interval it stays inside 0..1 and has width where
        every trial succeeded. ``(nan, nan)`` without trials.
        """
        if not self.trials:
            return math.nan, math.nan
        test = scipy.stats.binomtest(self.successes, self.trials)
        return tuple(test.proportion_ci(confidence, method="wilson"))

    def __str__(self):
        if not self.trials:
            return "not defined (0 of 0)"
        low, high = self.interval()
        return f"{self.value:.3f} [{low:.3f}, {high:.3f}] ({self[0]}/{self[1]})"


def accuracy(correct) -> Proportion:
    """Accuracy from booleans ``(N,)``, one an example."""
    correct = _booleans(correct)
    return Proportion(int(correct.sum()), len(correct))


def mean_interval(values, confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean of a sample with Student's t interval: ``(mean, low, high)``.

    Args:
        values: ``(n,)``, ``n`` at least 2; one number a seed, say. For the
            difference of two methods on the same seeds, give the differences.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"an interval needs two values or more, not {values.shape}")
    mean = values.mean()
    spread = values.std(ddof=1) / math.sqrt(len(values))
    half = scipy.stats.t.ppf((1 + confidence) / 2, len(values) - 1) * spread
    return float(mean), float(mean - half), float(mean + half)


def rec2ftp(zsl, ft, icl) -> Proportion:
    """Recall to finetuning predictions (Dai et al. 2023, section 4.3).

    Of the examples that finetuning gets right and zero-shot gets wrong, the
    part that ICL gets right too.

    Args:
        zsl, ft, icl: booleans ``(N,)``: was the example predicted correctly
            zero-shot, after finetuning, in context?

    Returns:
        the proportion with both counts; its value is NaN where finetuning
        mends no example.

    Raises:
        ValueError: the three differ in length or are not boolean.
    """
    zsl, ft, icl = _booleans(zsl), _booleans(ft), _booleans(icl)
    if not zsl.shape == ft.shape == icl.shape:
        raise ValueError(
            f"zsl, ft and icl must speak of the same examples; their shapes are "
            f"{zsl.shape}, {ft.shape} and {icl.shape}"
        )
    mended = ft & ~zsl
    return Proportion(int((mended & icl).sum()), int(mended.sum()))


def _booleans(values) -> np.ndarray:
    values = np.asarray(values)
    if values.dtype != bool or values.ndim != 1:
        raise ValueError(
            f"correctness must be a boolean array (N,), not {values.dtype} of shape "
            f"{values.shape}"
        )
    return values
