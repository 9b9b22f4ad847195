"""What is measured: on predictions, attention outputs, and attention maps.

The measures are those of Dai et al. (2023, sections 4.3 to 4.6), with the
corrections of Deutch et al. (2024) beside them.
"""

import math
from typing import NamedTuple

import numpy as np
import scipy.special
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


def bootstrap_interval(
    values, confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of a sample with its percentile bootstrap interval: ``(mean, low, high)``.

    Args:
        values: ``(N,)``, one number an example; NaN are left out.
        confidence: level of the interval.
        draws: how many samples of N are drawn, with replacement, by ``seed``.

    Returns:
        three NaN if no value is defined.
    """
    values = np.asarray(values, dtype=float)
    if values.ndim != 1:
        raise ValueError(f"values must be (N,), not {values.shape}")
    values = values[np.isfinite(values)]
    if not len(values):
        return math.nan, math.nan, math.nan
    size = draws, len(values)
    chosen = np.random.default_rng(seed).integers(len(values), size=size)
    tail = (1 - confidence) / 2
    low, high = np.quantile(values[chosen].mean(1), [tail, 1 - tail])
    return float(values.mean()), float(low), float(high)


def calibrated(scores) -> np.ndarray:
    """Batch calibration (Zhou et al. 2024): each label's mean score taken out.

    Args:
        scores: log-probabilities ``(N, C)`` of N examples that are judged
            together.

    Returns:
        ``(N, C)``, every column of mean 0.
    """
    scores = np.asarray(scores, dtype=float)
    return scores - scores.mean(axis=0)


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


class Similarity(NamedTuple):
    """A similarity of every example in every layer.

    Attributes:
        values: ``(N, L)``, in -1..1; NaN where it is not defined, because one of
            the two things compared is zero or has no spread.
    """

    values: np.ndarray

    @property
    def mean(self) -> float:
        """Over examples, then layers, of what is defined (NaN if nothing is)."""
        layers = self.per_layer
        return _mean(layers[np.isfinite(layers)])

    @property
    def per_example(self) -> np.ndarray:
        """``(N,)``: mean over the layers, for intervals over examples."""
        return np.array([_mean(row[np.isfinite(row)]) for row in self.values])

    @property
    def per_layer(self) -> np.ndarray:
        """``(L,)``: mean over the examples."""
        return np.array([_mean(row[np.isfinite(row)]) for row in self.values.T])

    @property
    def undefined(self) -> int:
        """How many of the values are NaN."""
        return int(np.isnan(self.values).sum())


def simaou(h_zsl, h_ft, h_icl, normalise=True) -> Similarity:
    """Similarity of attention output updates (Dai et al. 2023, section 4.4).

    ``cos(h_ICL - h_ZSL, h_FT - h_ZSL)``. The paper scales every ``h`` to length 1
    first; without that the measure is Deutch et al.'s (2024).

    Args:
        h_zsl, h_ft, h_icl: outputs of the attention modules, ``(N, L, d)``.
        normalise: scale each to length 1 before the differences are taken.

    Raises:
        ValueError: the shapes differ, or an entry is not finite.
    """
    h_zsl, h_ft, h_icl = _alike("(N, L, d)", h_zsl=h_zsl, h_ft=h_ft, h_icl=h_icl)
    if normalise:
        with np.errstate(invalid="ignore", divide="ignore"):
            h_zsl, h_ft, h_icl = (
                h / np.linalg.norm(h, axis=-1, keepdims=True)
                for h in (h_zsl, h_ft, h_icl)
            )
    return Similarity(_cosine(h_icl - h_zsl, h_ft - h_zsl))


def simam(m_a, m_b) -> Similarity:
    """Similarity of attention maps (Dai et al. 2023, section 4.5).

    The cosine of two settings' scores before the softmax, a head at a time,
    averaged over heads.

    Args:
        m_a, m_b: N arrays ``(L, H, n)`` each: scores of the last token over the
            query's tokens, whose number ``n`` may differ from example to example.

    Raises:
        ValueError: the two speak of different examples, or a score is not finite.
    """
    return Similarity(_over_heads(_maps(m_a=m_a, m_b=m_b), _cosine))


def simam_delta(m_zsl, m_ft, m_icl) -> Similarity:
    """Similarity of changes of attention maps (Deutch et al. 2024).

    ``cos(m_ICL - m_ZSL, m_FT - m_ZSL)``, a head at a time. :func:`simam` is
    dominated by what the maps share from the start; this is not.

    Args:
        m_zsl, m_ft, m_icl: as for :func:`simam`.
    """
    maps = _maps(m_zsl=m_zsl, m_ft=m_ft, m_icl=m_icl)
    return Similarity(_over_heads(maps, lambda z, f, i: _cosine(i - z, f - z)))


def training_attention(queries, training_queries) -> np.ndarray:
    """A finetuned model's "attention" to its training tokens.

    ``Σ_h Q'ᵀ q`` (Dai et al. 2023, section 4.6): the inner product, over all
    heads, of the test token's attention query with that of each training token
    at the step in which it was trained on.

    Args:
        queries: of the last tokens of the test examples, ``(N, L, H, d_h)``.
        training_queries: ``(n, L, H, d_h)``.

    Returns:
        ``(N, L, n)``.
    """
    test, train = np.asarray(queries), np.asarray(training_queries)
    if test.ndim != 4 or train.shape[1:] != test.shape[1:] or not len(train):
        raise ValueError(
            "needed are queries (N, L, H, d_h) and training queries (n, L, H, d_h); "
            f"given were {test.shape} and {train.shape}"
        )
    test, train = (t.reshape(*t.shape[:2], -1).swapaxes(0, 1) for t in (test, train))
    return (test @ train.swapaxes(1, 2)).swapaxes(0, 1)


def kendall(m_icl, m_ft) -> Similarity:
    """Kendall's tau-b of attention to the training tokens, (Dai et al. 2023, 4.6).

    A rank correlation, so it is the same before and after the softmax that the
    original code applies (but for ties that rounding makes).

    Args:
        m_icl: attention scores over the demonstrations' tokens, summed over
            heads, separators left out, ``(N, L, n)``.
        m_ft: :func:`training_attention` over the same tokens.
    """
    m_icl, m_ft = _alike("(N, L, n)", m_icl=m_icl, m_ft=m_ft)
    return Similarity(_pairwise(m_icl, m_ft, _tau))


def kendall_of_examples(m_icl, m_ft, example) -> Similarity:
    """:func:`kendall` of whole demonstrations.

    Each weighs what the softmax over all tokens gives to its own. (In the
    original code, not in the paper.)

    Args:
        m_icl, m_ft: as for :func:`kendall`.
        example: which demonstration each token is of, ``(n,)``, counted from 0.
    """
    m_icl, m_ft = _alike("(N, L, n)", m_icl=m_icl, m_ft=m_ft)
    example = np.asarray(example)
    if example.shape != m_icl.shape[-1:]:
        raise ValueError(
            f"{m_icl.shape[-1]} tokens need as many numbers of examples, not "
            f"{example.shape}"
        )
    member = example[:, None] == np.unique(example)
    masses = [scipy.special.softmax(m, axis=-1) @ member for m in (m_icl, m_ft)]
    return Similarity(_pairwise(*masses, _tau))


def top_recall(m_icl, m_ft, k) -> Similarity:
    """Of the ``k`` tokens that ICL attends to most, the part that FT does too.

    Args:
        m_icl, m_ft: as for :func:`kendall`.
        k: 1 to the number of tokens; by chance the recall is ``k / n``.
    """
    m_icl, m_ft = _alike("(N, L, n)", m_icl=m_icl, m_ft=m_ft)
    if not 1 <= k <= m_icl.shape[-1]:
        raise ValueError(f"k must be 1 to {m_icl.shape[-1]}, not {k}")

    def recall(a, b):
        a, b = (set(np.argsort(-m, kind="stable")[:k]) for m in (a, b))
        return len(a & b) / k

    return Similarity(_pairwise(m_icl, m_ft, recall))


def token_overlap(tokens_a, tokens_b) -> np.ndarray:
    """Part of the likeliest next tokens that two settings share (Shen et al. 2024).

    Args:
        tokens_a, tokens_b: ids of each example's K likeliest tokens, ``(N, K)``.

    Returns:
        ``(N,)``, 0 to 1.
    """
    a, b = _token_lists(tokens_a, tokens_b)
    return (a[:, :, None] == b[:, None]).sum((1, 2)) / a.shape[1]


def overlap_cosine(tokens_a, p_a, tokens_b, p_b) -> np.ndarray:
    """Cosine of two next-token distributions, each cut to its K likeliest tokens.

    After the overlap cosine similarity of Shen et al. (2024): tokens that only
    one of the two holds count as 0 for the other.

    Args:
        tokens_a, tokens_b: as for :func:`token_overlap`.
        p_a, p_b: probabilities of these tokens, ``(N, K)``, not all 0.

    Returns:
        ``(N,)``, 0 to 1.
    """
    a, b = _token_lists(tokens_a, tokens_b)
    p_a, p_b = np.asarray(p_a, dtype=float), np.asarray(p_b, dtype=float)
    same = a[:, :, None] == b[:, None]
    both = (same * p_a[:, :, None] * p_b[:, None]).sum((1, 2))
    return both / np.sqrt((p_a**2).sum(1) * (p_b**2).sum(1))


def _token_lists(tokens_a, tokens_b):
    a, b = np.asarray(tokens_a), np.asarray(tokens_b)
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(
            f"needed are two lists (N, K) of tokens; given were {a.shape}, {b.shape}"
        )
    return a, b


def _tau(a, b):
    return scipy.stats.kendalltau(a, b).statistic


def _pairwise(a, b, compare):
    rows = [
        [compare(x, y) for x, y in zip(*layers, strict=True)]
        for layers in zip(a, b, strict=True)
    ]
    return np.array(rows, dtype=float)


def _over_heads(maps, compare):
    """``(N, L)`` from N tuples of ``(L, H, n)``: mean over the defined heads."""
    rows = []
    for example in maps:
        heads = compare(*example)
        rows.append([_mean(row[np.isfinite(row)]) for row in heads])
    return np.array(rows, dtype=float)


def _maps(**settings):
    names, lists = list(settings), list(settings.values())
    if not len(lists[0]) or len({len(maps) for maps in lists}) > 1:
        counts = ", ".join(f"{n}: {len(m)}" for n, m in settings.items())
        raise ValueError(f"needed are maps of the same examples; given were {counts}")
    return [
        _alike("(L, H, n)", **dict(zip(names, example, strict=True)))
        for example in zip(*lists, strict=True)
    ]


def _alike(shape, **arrays):
    """The arrays as float64, of one shape and finite."""
    found = {n: np.asarray(a, dtype=float) for n, a in arrays.items()}
    shapes = {a.shape for a in found.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) != 3:
        given = ", ".join(f"{n} {a.shape}" for n, a in found.items())
        raise ValueError(f"needed are arrays of one shape {shape}; given were {given}")
    for name, array in found.items():
        if not np.isfinite(array).all():
            raise ValueError(f"{name} has entries that are not finite")
    return list(found.values())


def _cosine(a, b):
    """Along the last axis; NaN where one of the two is zero."""
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(lengths > 0, (a * b).sum(-1) / lengths, np.nan)


def _mean(values):
    return float(np.mean(values)) if len(values) else math.nan


def _booleans(values) -> np.ndarray:
    values = np.asarray(values)
    if values.dtype != bool or values.ndim != 1:
        raise ValueError(
            f"correctness must be a boolean array (N,), not {values.dtype} of shape "
            f"{values.shape}"
        )
    return values
