"""The measures against published numbers, cases by hand and loops."""

import math
import pickle

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from icl.metrics import (
    Interval,
    Proportion,
    accuracy,
    bootstrap_interval,
    calibrated,
    crossed_interval,
    kendall,
    kendall_of_examples,
    mean_interval,
    rec2ftp,
    simam,
    simam_delta,
    simaou,
    top_recall,
    training_attention,
    within_tasks_interval,
)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # Newcombe 1998, Statistics in Medicine 17:857-872, Table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval(successes, trials, low, high):
    got = Proportion(successes, trials).interval()
    assert got == pytest.approx((successes / trials, low, high), abs=5e-5)


def test_mean_interval():
    # t with 6 degrees of freedom has its 97.5 % point at 2.446912 (any table)
    half = 2.446912 * math.sqrt(14 / 3) / math.sqrt(7)
    got = mean_interval([1, 2, 3, 4, 5, 6, 7], "seed")
    assert got == pytest.approx((4, 4 - half, 4 + half), abs=1e-6)
    assert (got.unit, got.count, got.freedom) == ("seed", 7, 6)
    for wrong in ([1.0], [], [[1.0, 2.0], [3.0, 4.0]]):
        with pytest.raises(ValueError, match="interval"):
            mean_interval(wrong, "seed")
    with pytest.raises(ValueError, match="over 'tasks'; units are task, draw,"):
        mean_interval([1, 2], "tasks")


def test_the_unit_of_a_table_is_a_level_of_its_index():
    """Two tasks of three draws: over tasks, draws are averaged first."""
    index = pd.MultiIndex.from_product([["a", "b"], [1, 2, 3]], names=["task", "seed"])
    table = pd.Series([1.0, 2, 3, 5, 6, 7], index)
    assert mean_interval(table, "task") == mean_interval([2, 6], "task")
    assert mean_interval(table, "draw") == mean_interval([3, 4, 5], "draw")
    with pytest.raises(ValueError, match="over 'query' of values by .*task.*seed"):
        mean_interval(table, "query")
    within = within_tasks_interval(table)
    assert within == within_tasks_interval([[1, 2, 3], [5, 6, 7]])
    # variance of the mean: (1/3 + 1/3) / 4, with 4 degrees of freedom
    half = scipy.stats.t.ppf(0.975, 4) * math.sqrt(1 / 6)
    assert within == pytest.approx((4, 4 - half, 4 + half))
    with pytest.raises(ValueError, match="two draws of each task"):
        within_tasks_interval([[1, 2], [3]])


def covered(draw, interval, truth, times=1500):
    """How often an interval of what is drawn holds the truth."""
    generator = np.random.default_rng(0)
    ends = np.array([interval(draw(generator)) for _ in range(times)])
    return np.mean((ends[:, 1] <= truth) & (truth <= ends[:, 2]))


@pytest.mark.parametrize(
    "draw_query_rest", [(1, 1, 1), (0.2, 1, 1), (1, 0.1, 0.5), (0.3, 0.3, 1)]
)
def test_coverage_of_draws_that_share_queries(draw_query_rest):
    own, shared, rest = draw_query_rest

    def answers(g):
        noise = own * g.normal(size=(7, 1)) + shared * g.normal(size=(1, 60))
        return 0.3 + noise + rest * g.normal(size=(7, 60))

    assert 0.93 <= covered(answers, crossed_interval, 0.3) <= 0.97
    if own < shared:  # over draws alone the interval is of these queries only
        over_draws = covered(lambda g: answers(g).mean(1), by("draw"), 0.3)
        assert over_draws < 0.93


def by(unit):
    return lambda values: mean_interval(values, unit)


def test_coverage_of_the_other_intervals():
    centres, spreads = np.array([[0, 1, 2, 0.5, 0.2, 0.1], [1, 0.5, 2, 0.1, 1, 1]])

    def tasks(g):
        return centres[:, None] + spreads[:, None] * g.normal(size=(6, 7))

    truth = centres.mean()
    assert 0.93 <= covered(tasks, within_tasks_interval, truth) <= 0.97
    assert 0.93 <= covered(lambda g: g.normal(size=6), by("task"), 0) <= 0.97

    def answers(g):
        return g.random(60) < 0.85

    def wilson(right):
        return accuracy(right).interval()

    assert 0.93 <= covered(answers, wilson, 0.85) <= 0.97
    skewed = covered(lambda g: g.exponential(size=100), bootstrap_interval, 1, 600)
    assert 0.92 <= skewed <= 0.97


def test_the_least_effect_that_would_be_detected():
    """By simulation: four of five samples exclude zero."""
    found = mean_interval([-1.0, 1.0] * 10, "seed")
    generator = np.random.default_rng(0)
    spread = found.error * math.sqrt(20)
    samples = generator.normal(found.detectable, spread, size=(2000, 20))
    seen = [mean_interval(sample, "seed").low > 0 for sample in samples]
    assert np.mean(seen) == pytest.approx(0.8, abs=0.04)


def test_an_interval_says_what_it_says():
    interval = Interval(0.084, -0.0104, 0.1784).over("task", 6, 0.04, 5)
    mean, low, high = interval  # it unpacks, and arrays are made of it
    assert (mean, low, high) == (interval.mean, interval.low, interval.high)
    assert np.array([interval, interval]).shape == (2, 3)
    assert str(interval) == f"{interval}" == "+0.084 [-0.010, +0.178]"
    assert f"{interval:.2g}" == "0.084 [-0.01, 0.18]"
    assert vars(pickle.loads(pickle.dumps(interval))) == vars(interval)
    bars = {
        -0.02: "above",
        -0.0104: "reaches across",
        0: "reaches across",
        0.2: "below",
    }
    assert {bar: interval.versus(bar) for bar in bars} == bars
    nothing = bootstrap_interval([np.nan])
    assert nothing.versus(0) == "reaches across"
    assert str(nothing) == "+nan [+nan, +nan]"


def test_bootstrap_interval_of_a_proportion():
    """The bootstrap of n booleans is binomial: its quantiles are known."""
    right = np.arange(400) < 300
    mean, low, high = bootstrap_interval(right, draws=20000)
    assert mean == 0.75
    # 2.5 % and 97.5 % points of Binomial(400, 3/4) are 283 and 317
    assert (low, high) == pytest.approx((283 / 400, 317 / 400), abs=0.002)
    assert bootstrap_interval([np.nan, 1.0, 2.0, np.nan])[0] == 1.5
    assert bootstrap_interval([np.nan, 1.0]).count == 1
    assert np.isnan(bootstrap_interval([np.nan])).all()
    assert bootstrap_interval([0.25] * 9) == (0.25, 0.25, 0.25)
    with pytest.raises(ValueError, match="1, 1"):
        bootstrap_interval([[1.0]])
    for infinite in (np.inf, -np.inf):
        with pytest.raises(ValueError, match="infinite"):
            bootstrap_interval([0.5, np.nan, infinite])


def test_calibration_takes_out_a_bias_for_a_word():
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(30, 3))
    bias = np.array([5.0, -2.0, 0.3])
    np.testing.assert_allclose(calibrated(scores + bias), calibrated(scores))
    np.testing.assert_allclose(calibrated(scores).mean(0), 0, atol=1e-12)


def test_rec2ftp_by_hand():
    zsl = np.array([0, 0, 0, 0, 1, 1, 0, 1], bool)
    ft = np.array([1, 1, 1, 0, 1, 0, 0, 1], bool)
    icl = np.array([1, 0, 1, 1, 0, 1, 0, 1], bool)
    # FT mends 0, 1, 2; of these ICL is right on 0 and 2. Dividing by the examples
    # on which FT and ICL differ, as one port does, would give another number.
    assert rec2ftp(zsl, ft, icl) == (2, 3)


triples = st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1)


@given(triples)
def test_rec2ftp_by_counting(rows):
    both = sum(f and i and not z for z, f, i in rows)
    mended = sum(f and not z for z, f, _ in rows)
    assert rec2ftp(*np.array(rows, bool).T) == (both, mended)


def test_nothing_mended_is_not_defined():
    right = np.ones(4, bool)
    recall = rec2ftp(right, right, right)
    assert math.isnan(recall.value)
    assert all(map(math.isnan, recall.interval()))
    assert str(recall) == "not defined (0 of 0)"
    assert str(Proportion(3, 4)) == "0.750 [0.301, 0.954] (3/4)"


def test_bad_input():
    for wrong in ([1, 0, 1], [0.9, 0.1], [[True]]):
        with pytest.raises(ValueError, match="boolean"):
            accuracy(wrong)
    with pytest.raises(ValueError, match="2,.*3,.*2,"):
        rec2ftp([True] * 2, [True] * 3, [True] * 2)


def cosine(a, b):
    """One number at a time."""
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    sizes = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return dot / sizes if sizes else math.nan


def scaled(h):
    return h / math.sqrt(sum(x * x for x in h))


@pytest.mark.parametrize("normalise", [True, False])
def test_simaou_against_a_loop(normalise):
    z, f, i = np.random.default_rng(0).normal(size=(3, 4, 3, 7))
    got = simaou(z, f, i, normalise)
    want = np.empty((4, 3))
    for n in range(4):
        for l in range(3):  # noqa: E741
            a, b, c = z[n, l], f[n, l], i[n, l]
            if normalise:
                a, b, c = map(scaled, (a, b, c))
            want[n, l] = cosine(c - a, b - a)
    np.testing.assert_allclose(got.values, want, atol=1e-12)
    assert got.mean == pytest.approx(np.mean(want))
    np.testing.assert_allclose(got.per_example, want.mean(1))
    np.testing.assert_allclose(got.per_layer, want.mean(0))
    assert got.undefined == 0


@pytest.mark.parametrize(
    ("ratio", "artefact"),  # noise to signal; two decimals of a simulation by others
    [(0.1, 0.0025), (0.5, 0.0528), (1.0, 0.1464), (math.sqrt(3), 0.25), (3.0, 0.3419)],
)
def test_normalised_noise_looks_similar(ratio, artefact):
    """Two unrelated updates of one vector: the normalisation aligns them."""
    z = np.eye(5)[0].reshape(1, 1, 5) * 2
    r, other = (ratio * 2 * np.eye(5)[j].reshape(1, 1, 5) for j in (1, 2))
    a = 1 / math.sqrt(1 + ratio**2)
    exact = (1 - a) ** 2 / ((1 - a) ** 2 + (ratio * a) ** 2)
    assert exact == pytest.approx(artefact, abs=5e-5)
    assert simaou(z, z + r, z + other).mean == pytest.approx(exact, abs=1e-12)
    assert simaou(z, z + r, z + other, normalise=False).mean == pytest.approx(0)


def test_no_update_is_not_defined():
    z, f, i = np.random.default_rng(1).normal(size=(3, 3, 2, 5))
    i[1, 0] = z[1, 0]  # this example's first layer did not move
    i[2] = z[2]
    got = simaou(z, f, i, normalise=False)
    assert got.undefined == 3
    assert np.isnan(got.per_example[2])
    assert got.per_example[1] == pytest.approx(got.values[1, 1])
    assert got.per_layer[0] == pytest.approx(got.values[0, 0])
    assert got.mean == pytest.approx(
        np.mean([got.values[0, 0], got.values[:2, 1].mean()])
    )
    assert math.isnan(simaou(z, z, z).mean)


def maps(seed, lengths=(3, 8, 5), L=2, H=3):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(L, H, n)) for n in lengths]


def test_simam_against_a_loop():
    a, b, c = maps(0), maps(1), maps(2)
    got, delta = simam(a, b), simam_delta(a, b, c)
    for n in range(3):
        for l in range(2):  # noqa: E741
            heads = [cosine(a[n][l, h], b[n][l, h]) for h in range(3)]
            assert got.values[n, l] == pytest.approx(np.mean(heads))
            heads = [
                cosine(c[n][l, h] - a[n][l, h], b[n][l, h] - a[n][l, h])
                for h in range(3)
            ]
            assert delta.values[n, l] == pytest.approx(np.mean(heads))


def test_a_head_without_scores_is_left_out():
    a, b = maps(0), maps(1)
    a[1][0, 2] = 0
    got = simam(a, b)
    heads = [cosine(a[1][0, h], b[1][0, h]) for h in (0, 1)]
    assert got.values[1, 0] == pytest.approx(np.mean(heads))
    a[1][0] = 0
    assert np.isnan(simam(a, b).values[1, 0])


def tau_b(a, b):
    """Concordant less discordant pairs, over the pairs without ties in either."""
    pairs = [(i, j) for j in range(len(a)) for i in range(j)]
    s = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in pairs]
    loose = [sum(x[k] != 0 for x in s) for k in (0, 1)]
    agree = sum(x * y for x, y in s)
    return agree / math.sqrt(loose[0] * loose[1]) if all(loose) else math.nan


@given(st.integers(0, 10**6), st.integers(2, 12), st.booleans())
def test_kendall_against_pairs(seed, n, ties):
    a, b = np.random.default_rng(seed).normal(size=(2, 2, 3, n))
    if ties:
        a, b = a.round(), b.round()
    got = kendall(a, b).values
    for place in np.ndindex(2, 3):
        want = tau_b(a[place], b[place])
        np.testing.assert_allclose(got[place], want, atol=1e-12)
    soft = np.exp(b) / np.exp(b).sum(-1, keepdims=True)
    np.testing.assert_allclose(kendall(a, soft).values, got, atol=1e-12)


def test_kendall_of_examples_and_recall():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 1, 1, 7))
    example = [0, 0, 1, 2, 2, 2, 1]

    def mass(m, e):
        weights = [math.exp(x) for x in m]
        mine = [w for w, x in zip(weights, example, strict=True) if x == e]
        return sum(mine) / sum(weights)

    masses = [[mass(m[0, 0], e) for e in range(3)] for m in (a, b)]
    got = kendall_of_examples(a, b, example)
    assert got.values[0, 0] == pytest.approx(tau_b(*masses))
    both = set(np.argsort(a[0, 0])[-3:]) & set(np.argsort(b[0, 0])[-3:])
    assert top_recall(a, b, 3).values[0, 0] == pytest.approx(len(both) / 3)
    assert top_recall(a, b, 7).mean == 1
    a, b = np.array([[[5.0, 1, 2, 0]]]), np.array([[[4.0, 0, 1, 3]]])
    assert top_recall(a, b, 1).mean == 1  # the first token leads in both
    assert top_recall(a, b, 2).mean == 0.5


def test_training_attention_against_a_loop():
    rng = np.random.default_rng(0)
    q, train = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(6, 3, 4, 5))
    got = training_attention(q, train)
    assert got.shape == (2, 3, 6)
    for n, l, i in np.ndindex(2, 3, 6):  # noqa: E741
        want = sum(train[i, l, h] @ q[n, l, h] for h in range(4))
        assert got[n, l, i] == pytest.approx(want)


#: By the function, or before it by the annotations that tests check.
REFUSED = (ValueError, TypeCheckError)


def test_similarities_refuse_what_does_not_fit():
    h = np.ones((2, 3, 4))
    with pytest.raises(REFUSED):
        simaou(h, h, np.ones((2, 3, 5)))
    with pytest.raises(REFUSED):  # numpy would repeat it
        simaou(h, h, np.ones((1, 3, 4)))
    with pytest.raises(ValueError, match="finite"):
        simaou(h, h * np.nan, h)
    with pytest.raises(ValueError, match="finite"):
        simam(maps(0), [m * np.inf for m in maps(1)])
    with pytest.raises(ValueError, match="argument 2"):
        simam(maps(0), maps(1)[:2])
    with pytest.raises(ValueError, match="2, 3, 8"):
        simam(maps(0), maps(0, (8, 8, 5)))
    with pytest.raises(ValueError, match="size 2"):
        kendall_of_examples(np.ones((1, 1, 7)), np.ones((1, 1, 7)), [0, 1])
    for k in (0, 5):
        with pytest.raises(ValueError, match=str(k)):
            top_recall(h, h, k)
    with pytest.raises(REFUSED):
        training_attention(np.ones((2, 3, 4, 5)), np.ones((6, 3, 5, 4)))
