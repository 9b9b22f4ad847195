"""What is measured: on predictions, attention outputs, and attention maps.

The measures are those of Dai et al. (2023, sections 4.3 to 4.6), with the
corrections of Deutch et al. (2024) beside them.
"""

import math
from collections import namedtuple
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num
from numpy.typing import ArrayLike
from scipy.special import ndtri, softmax, stdtrit  # scipy.stats takes 0.7 s to import

Outputs = Num[np.ndarray, "N L d"]  # of N examples in L layers
Maps = Sequence[Num[np.ndarray, "L H _"]]  # for each example, heads over its tokens
TokenMaps = Num[np.ndarray, "N L n"]  # over n tokens of the demonstrations


#: Units of an interval, drawn anew and each independently of the others. Draws are of
#: demonstrations, problems those of a regression.
UNITS = ("task", "draw", "query", "draw × query", "draw, within tasks", "seed")
UNITS += ("problem",)


class Interval(namedtuple("Interval", "mean low high")):
    """A mean with its 95 % interval: three numbers, and what they are over.

    Made by :func:`mean_interval`, :func:`bootstrap_interval`, :func:`crossed_interval`
    or :func:`within_tasks_interval`. It formats as ``+0.084 [-0.010, +0.178]``, or with
    a format for each number.

    Attributes:
        unit: one of :data:`UNITS`.
        count: how many of them.
        error: standard error of the mean.
        freedom: degrees of freedom of Student's t; infinite for a bootstrap.
    """

    unit, count, error, freedom = "", 0, math.nan, math.inf

    @classmethod
    def of(cls, mean, error, freedom, unit, count) -> "Interval":
        """The interval by Student's t."""
        half = _t_quantile(0.975, freedom) * error
        self = cls(float(mean), float(mean - half), float(mean + half))
        return self.over(unit, count, error, freedom)

    def over(self, unit, count, error=math.nan, freedom=math.inf) -> "Interval":
        """This interval, said to be over so many units."""
        if unit not in UNITS:
            raise ValueError(f"an interval over {unit!r}; units are {', '.join(UNITS)}")
        self.unit, self.count = unit, int(count)
        self.error, self.freedom = float(error), float(freedom)
        return self

    def versus(self, bar: float | int) -> str:
        """``"above"`` or ``"below"`` the bar as a whole, else ``"reaches across"``."""
        if self.low > bar:
            return "above"
        return "below" if self.high < bar else "reaches across"

    @property
    def detectable(self) -> float:
        """The least distance from a bar that four of five such samples would detect."""
        apart = _t_quantile(0.975, self.freedom) + _t_quantile(0.8, self.freedom)
        return float(apart * self.error)

    def __format__(self, form: str) -> str:
        mean, low, high = (format(number, form or "+.3f") for number in self)
        return f"{mean} [{low}, {high}]"

    def __str__(self) -> str:
        return format(self)


def _t_quantile(p, freedom):
    return ndtri(p) if math.isinf(freedom) else stdtrit(freedom, p)


class Proportion(NamedTuple):
    """A count of successes among trials."""

    successes: int
    trials: int

    @property
    def value(self) -> float:
        """The fraction, NaN where there were no trials."""
        return self.successes / self.trials if self.trials else math.nan

    def interval(self) -> Interval:
        """Wilson's score interval (Wilson 1927), NaN where there were no trials.

        Unlike the normal interval it stays inside 0..1 and has width where
        every trial succeeded.
        """
        low = high = math.nan
        if self.trials:
            from scipy.stats import binomtest

            test = binomtest(self.successes, self.trials)
            low, high = test.proportion_ci(method="wilson")
        return Interval(self.value, low, high).over("query", self.trials)

    def __str__(self) -> str:
        if not self.trials:
            return "not defined (0 of 0)"
        return f"{self.interval():.3f} ({self.successes}/{self.trials})"


def accuracy(correct: ArrayLike) -> Proportion:
    """Accuracy from one boolean per example."""
    correct = _booleans(correct)
    return Proportion(int(correct.sum()), len(correct))


def mean_interval(values, over: str) -> Interval:
    """Mean of a sample with Student's t interval.

    Args:
        values: one number per unit, at least two. A pandas Series with a named index is
            first averaged within each ``over``, which must be a level of the index
            (the level ``seed`` for ``"draw"``). For the difference of two methods on
            the same seeds, give the differences.
        over: one of :data:`UNITS`.
    """
    names = [n for n in getattr(getattr(values, "index", None), "names", ()) if n]
    if names:
        level = "seed" if over == "draw" else over  # as the tables call a draw
        if level not in names:
            raise ValueError(f"an interval over {over!r} of values by {names}")
        values = values.groupby(level).mean()
    values = np.asarray(values, dtype=float)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"an interval needs two values or more, not {values.shape}")
    error = values.std(ddof=1) / math.sqrt(len(values))
    return Interval.of(values.mean(), error, len(values) - 1, over, len(values))


def bootstrap_interval(values: ArrayLike, draws: int = 2000) -> Interval:
    """Mean over queries with its percentile bootstrap interval, for fifty or more.

    Args:
        values: one number per query, not infinite. NaN are left out; of NaN alone the
            interval is NaN.
        draws: how many samples of the same size are drawn, with replacement.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1:
        raise ValueError(f"values must be one number per query, not {values.shape}")
    if np.isinf(values).any():
        raise ValueError(f"{np.isinf(values).sum()} values are infinite: no mean")
    values = values[np.isfinite(values)]
    if not len(values):
        return Interval(math.nan, math.nan, math.nan).over("query", 0)
    size = draws, len(values)
    chosen = np.random.default_rng(0).integers(len(values), size=size)
    means, tail = values[chosen].mean(1), (1 - 0.95) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(values.mean(), low, high).over("query", len(values), means.std())


def crossed_interval(values: Num[np.ndarray, "D N"]) -> Interval:
    """Mean over D draws that were all judged on the same N queries.

    Draws and queries are random and crossed: the variance of the mean is that of a
    two-way layout with random effects, (MS_draw + MS_query - MS_rest)/DN, but at least
    MS_draw/DN and MS_query/DN, with Satterthwaite's (1946) degrees of freedom. An
    interval over draws alone holds for these queries only; one over the DN answers
    treats them as independent.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 2 or min(values.shape) < 2:
        raise ValueError(f"two draws and two queries or more, not {values.shape}")
    draws, queries = values.shape
    mean = values.mean()
    rows, columns = values.mean(1) - mean, values.mean(0) - mean
    rest = values - mean - rows[:, None] - columns
    free = np.array([draws - 1, queries - 1, (draws - 1) * (queries - 1)])
    sums = [np.sum(part**2) for part in (rows, columns, rest)]
    squares = np.array([queries, draws, 1]) * sums / free
    # never below what one way alone gives
    total = max(squares[0] + squares[1] - squares[2], squares[0], squares[1])
    freedom = total**2 / np.sum(squares[:2] ** 2 / free[:2]) if total else math.inf
    error = math.sqrt(total / values.size)
    return Interval.of(mean, error, max(freedom, min(free[:2])), "draw × query", draws)


def within_tasks_interval(values) -> Interval:
    """Mean over these tasks, each averaged over its draws, as if drawn anew.

    It says nothing of other tasks; ``mean_interval(values, "task")`` does.

    Args:
        values: a pandas Series by task and draw, or a list with the draws of each task.
            Tasks with one draw have no spread, and are refused.
    """
    if hasattr(values, "groupby"):
        values = [own.to_numpy() for _, own in values.groupby("task")]
    values = [np.asarray(own, dtype=float) for own in values]
    if not values or min(map(len, values)) < 2:
        raise ValueError(f"two draws of each task, not {[len(own) for own in values]}")
    squares = np.array([own.var(ddof=1) / len(own) for own in values])
    free = np.array([len(own) - 1 for own in values])
    total = squares.sum()
    freedom = total**2 / np.sum(squares**2 / free) if total else math.inf
    mean = np.mean([own.mean() for own in values])
    error, count = math.sqrt(total) / len(values), sum(map(len, values))
    return Interval.of(mean, error, freedom, "draw, within tasks", count)


def calibrated(scores: ArrayLike) -> Float[np.ndarray, "N C"]:
    """Batch calibration (Zhou et al. 2024): each label's mean score taken out.

    Args:
        scores: log-probabilities of C labels for N examples, judged together.
    """
    scores = np.asarray(scores, dtype=float)
    return scores - scores.mean(axis=0)


def rec2ftp(zsl: ArrayLike, ft: ArrayLike, icl: ArrayLike) -> Proportion:
    """Recall to finetuning predictions (Dai et al. 2023, section 4.3).

    Of the examples that finetuning gets right and zero-shot gets wrong, the
    part that ICL gets right too; one boolean per example.
    """
    zsl, ft, icl = _booleans(zsl), _booleans(ft), _booleans(icl)
    if not zsl.shape == ft.shape == icl.shape:
        raise ValueError(
            f"zsl, ft and icl must be of the same examples; their shapes are "
            f"{zsl.shape}, {ft.shape} and {icl.shape}"
        )
    mended = ft & ~zsl
    return Proportion(int((mended & icl).sum()), int(mended.sum()))


class Similarity(NamedTuple):
    """A similarity of each of N examples in each of L layers.

    Attributes:
        values: in -1..1; NaN where it is not defined, because one of the two
            things compared is zero or has no spread.
    """

    values: Float[np.ndarray, "N L"]

    @property
    def mean(self) -> float:
        """Over examples, then layers, of what is defined (NaN if nothing is)."""
        return _mean(self.per_layer)

    @property
    def per_example(self) -> Float[np.ndarray, " N"]:
        """Mean over the layers, for intervals over examples."""
        return np.array([_mean(row) for row in self.values])

    @property
    def per_layer(self) -> Float[np.ndarray, " L"]:
        """Mean over the examples."""
        return np.array([_mean(row) for row in self.values.T])

    @property
    def undefined(self) -> int:
        """How many of the values are NaN."""
        return int(np.isnan(self.values).sum())


def simaou(h_zsl: Outputs, h_ft: Outputs, h_icl: Outputs, normalise=True) -> Similarity:
    """Similarity of attention output updates (Dai et al. 2023, section 4.4).

    ``cos(h_ICL - h_ZSL, h_FT - h_ZSL)`` of outputs of the attention modules. The paper
    scales every ``h`` to length 1 first; without that it is Deutch et al.'s (2024).
    """
    outputs = _alike(h_zsl, h_ft, h_icl)
    if normalise:
        with np.errstate(invalid="ignore", divide="ignore"):
            outputs = [h / np.linalg.norm(h, axis=-1, keepdims=True) for h in outputs]
    zsl, ft, icl = outputs
    return Similarity(_cosine(icl - zsl, ft - zsl))


def simam(m_a: Maps, m_b: Maps) -> Similarity:
    """Similarity of attention maps (Dai et al. 2023, section 4.5).

    The cosine of two settings' scores before the softmax, of the last token over the
    query's tokens, head by head, averaged over heads.
    """
    return _over_heads(_cosine, m_a, m_b)


def simam_delta(m_zsl: Maps, m_ft: Maps, m_icl: Maps) -> Similarity:
    """Similarity of changes of attention maps (Deutch et al. 2024).

    ``cos(m_ICL - m_ZSL, m_FT - m_ZSL)``, otherwise as :func:`simam`, which is
    dominated by what the maps share from the start; this is not.
    """
    return _over_heads(lambda z, f, i: _cosine(i - z, f - z), m_zsl, m_ft, m_icl)


def training_attention(
    queries: Num[np.ndarray, "N L H d_h"],
    training_queries: Num[np.ndarray, "n L H d_h"],
) -> TokenMaps:
    """A finetuned model's "attention" to its training tokens.

    ``Σ_h Q'ᵀ q`` (Dai et al. 2023, section 4.6): the inner product, over all
    heads, of the last test token's attention query with that of each training token
    at the step in which it was trained on.
    """
    test, train = np.asarray(queries), np.asarray(training_queries)
    if train.shape[1:] != test.shape[1:]:
        raise ValueError(f"queries of {test.shape[1:]} and {train.shape[1:]} per token")
    test, train = (t.reshape(*t.shape[:2], -1).swapaxes(0, 1) for t in (test, train))
    return (test @ train.swapaxes(1, 2)).swapaxes(0, 1)


def kendall(m_icl: TokenMaps, m_ft: TokenMaps) -> Similarity:
    """Kendall's tau-b of attention to the training tokens (Dai et al. 2023, 4.6).

    A rank correlation, so it is the same before and after the softmax that the
    original code applies (but for ties that rounding makes). ``m_icl`` are ICL's scores
    over the demonstrations' tokens (without separators), summed over heads; ``m_ft`` is
    :func:`training_attention` over the same tokens.
    """
    return _pairwise(_tau, *_alike(m_icl, m_ft))


def kendall_of_examples(m_icl: TokenMaps, m_ft: TokenMaps, example) -> Similarity:
    """:func:`kendall` of whole demonstrations (in the original code, not the paper).

    The score of a demonstration is the softmax mass of its tokens; ``example`` is the
    index, from 0, of the demonstration that each token belongs to.
    """
    member = np.asarray(example)[:, None] == np.unique(example)
    maps = _alike(m_icl, m_ft)
    return _pairwise(_tau, *(softmax(m, axis=-1) @ member for m in maps))


def top_recall(m_icl: TokenMaps, m_ft: TokenMaps, k) -> Similarity:
    """Of the k tokens that ICL attends to most, the part that FT does too.

    By chance it is k over the number of tokens. Maps are as for :func:`kendall`.
    """
    m_icl, m_ft = _alike(m_icl, m_ft)
    if not 1 <= k <= m_icl.shape[-1]:
        raise ValueError(f"k must be 1 to {m_icl.shape[-1]}, not {k}")

    def recall(a, b):
        a, b = (set(np.argsort(-m, kind="stable")[:k]) for m in (a, b))
        return len(a & b) / k

    return _pairwise(recall, m_icl, m_ft)


def _tau(a, b):
    from scipy.stats import kendalltau

    return kendalltau(a, b).statistic


def _pairwise(compare, a, b):
    rows = [
        [compare(*row) for row in zip(*both, strict=True)]
        for both in zip(a, b, strict=True)
    ]
    return Similarity(np.array(rows, dtype=float))


def _over_heads(compare, *settings):
    """Mean over the defined heads, of maps ``(L, H, n)`` of each example."""
    rows = [
        [_mean(heads) for heads in compare(*_alike(*example))]
        for example in zip(*settings, strict=True)
    ]
    return Similarity(np.array(rows, dtype=float))


def _alike(*arrays):
    """The arrays as float64, of one shape and finite."""
    found = [np.asarray(array, dtype=float) for array in arrays]
    if len({array.shape for array in found}) > 1:
        shapes = ", ".join(str(array.shape) for array in found)
        raise ValueError(f"arrays must be of one shape, not {shapes}")
    if not all(np.isfinite(array).all() for array in found):
        raise ValueError("an array has entries that are not finite")
    return found


def _cosine(a, b):
    """Along the last axis; NaN where one of the two is zero."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(lengths > 0, (a * b).sum(-1) / lengths, np.nan)


def _mean(values):
    """Of what is defined."""
    values = values[np.isfinite(values)]
    return float(np.mean(values)) if len(values) else math.nan


def _booleans(values):
    values = np.asarray(values)
    if values.dtype != bool or values.ndim != 1:
        raise ValueError(f"one boolean per example, not {values.dtype} {values.shape}")
    return values
