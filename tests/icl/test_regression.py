"""Tasks and classical answers against NumPy loops; networks against algorithms."""

import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icl import regression

F64 = torch.float64
TASK = dict(
    seed=st.integers(0, 2**31),
    N=st.integers(1, 9),
    d=st.integers(1, 6),
    size=st.sampled_from([1e-3, 1.0, 1e3]),
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def problem(seed, N, d, size=1.0, B=3):
    g = generator(seed)
    X, x = (torch.randn(s, generator=g, dtype=F64) for s in [(B, N, d), (B, d)])
    return size * X, torch.randn(B, N, generator=g, dtype=F64), size * x


def each(function, X, y, x):
    """Apply a NumPy function to the tasks one by one."""
    rows = zip(X.numpy(), y.numpy(), x.numpy(), strict=True)
    return np.array([function(*row) for row in rows])


def spd(seed, d):
    A = torch.randn(d, d, generator=generator(seed), dtype=F64)
    return A @ A.mT + 0.1 * torch.eye(d, dtype=F64)


# --- sampling ----------------------------------------------------------------


@pytest.mark.parametrize("distribution", ["normal", "uniform", "sphere"])
def test_inputs_have_the_covariance_asked_for(distribution):
    sigma = spd(1, 3)
    X = regression.sample_inputs(generator(), 400, 500, 3, sigma, distribution, F64)
    assert X.shape == (400, 500, 3)
    flat = X.reshape(-1, 3)
    assert flat.mean(0).abs().max() < 0.03
    torch.testing.assert_close(flat.mT @ flat / len(flat), sigma, atol=0.05, rtol=0.02)


def test_distributions_are_what_they_are_called():
    uniform = regression.sample_inputs(generator(), 9, 9, 4, distribution="uniform")
    assert uniform.abs().max() < 3**0.5
    sphere = regression.sample_inputs(generator(), 9, 9, 4, distribution="sphere")
    torch.testing.assert_close(sphere.norm(dim=-1), torch.full((9, 9), 2.0))


def test_von_oswald_draws_from_minus_half_to_half():
    X = regression.sample_inputs(
        generator(), 200, 100, 2, torch.eye(2) / 12, "uniform"
    ).flatten()
    assert 0.49 < X.max() <= 0.5
    assert X.var().item() == pytest.approx(1 / 12, rel=0.02)
    assert X.pow(4).mean().item() == pytest.approx(1 / 80, rel=0.03)


def test_linear_labels():
    X = regression.sample_inputs(generator(), 5, 7, 3, dtype=F64)
    y = regression.linear_labels(generator(1), X)
    w = np.stack([np.linalg.lstsq(a, b)[0] for a, b in zip(X, y, strict=True)])
    np.testing.assert_allclose(np.einsum("bnd,bd->bn", X, w), y, atol=1e-12)
    many = regression.sample_inputs(generator(), 20_000, 1, 3, dtype=F64)
    y = regression.linear_labels(generator(1), many, 4 * torch.eye(3, dtype=F64), 2.0)
    assert y.var().item() == pytest.approx(4 * 3 + 2**2, rel=0.05)


@pytest.mark.parametrize("name", ["linear", "sine", "exponential"])
def test_function_labels(name):
    X = regression.sample_inputs(generator(), 40_000, 2, 3, dtype=F64)
    y = regression.function_labels(generator(1), X, name)
    assert y.mean().item() == pytest.approx(0, abs=0.02)
    assert y.var().item() == pytest.approx(1, rel=0.03)
    noisy = regression.function_labels(generator(1), X, name, noise=0.5)
    assert (noisy - y).std().item() == pytest.approx(0.5, rel=0.02)
    # a task in one dimension shows its function: w is 1 or -1
    X = regression.sample_inputs(generator(), 3, 9, 1, dtype=F64)
    y = regression.function_labels(generator(1), X, name).numpy()
    raw = {"linear": np.positive, "sine": lambda u: np.sin(2 * u)}
    raw = raw.get(name, lambda u: np.exp(u / 2))
    for x, labels in zip(X[:, :, 0].numpy(), y, strict=True):
        fits = [np.corrcoef(raw(sign * x), labels)[0, 1] for sign in (1, -1)]
        assert max(fits) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("own", [True, False])
def test_keys_of_a_sequence_have_the_cosine_asked_for(own):
    g = generator()
    common = None if own else torch.eye(400)[3]
    keys = regression.correlated_keys(g, 300, 6, 400, 0.6, common)
    torch.testing.assert_close(keys.norm(dim=-1), torch.ones(300, 6))
    within = (keys[:, 0] * keys[:, 1]).sum(-1).mean()
    between = (keys[:-1, 0] * keys[1:, 1]).sum(-1).mean()
    assert within.item() == pytest.approx(0.6, abs=0.02)
    assert between.item() == pytest.approx(0.0 if own else 0.6, abs=0.02)


# --- predictors --------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(**TASK)
def test_predictors_against_numpy(seed, N, d, size):
    X, y, x = problem(seed, N, d, size)

    def close(got, want):
        scale = 1 + np.abs(want).max()
        np.testing.assert_allclose(got / scale, want / scale, atol=1e-9)

    close(
        regression.least_squares(X, y, x),
        each(lambda X, y, x: np.linalg.lstsq(X, y)[0] @ x, X, y, x),
    )

    def augmented(X, y, x):  # ridge as least squares with d more rows
        rows = np.vstack([X, 0.3**0.5 * np.eye(d)])
        return np.linalg.lstsq(rows, np.append(y, np.zeros(d)))[0] @ x

    close(regression.ridge(X, y, x, 0.3), each(augmented, X, y, x))
    close(
        regression.nearest_neighbours(X, y, x, 3),
        each(lambda X, y, x: y[np.argsort(((X - x) ** 2).sum(1))[:3]].mean(), X, y, x),
    )


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    N=st.integers(1, 9),
    d=st.integers(1, 6),
    steps=st.integers(1, 5),
    plus=st.booleans(),
)
def test_gradient_descent_against_a_loop(seed, N, d, steps, plus):
    X, y, x = problem(seed, N, d)
    rates = torch.rand(2, steps, generator=generator(seed), dtype=F64)
    eta, gamma = rates[0], 0.1 * rates[1] if plus else None

    def loop(X, y, x):
        f = 0.0
        for t in range(steps):
            w = sum(r * z for r, z in zip(y, X, strict=True)) * float(eta[t]) / N
            f, y = f + w @ x, np.array([r - w @ z for r, z in zip(y, X, strict=True)])
            if plus:
                C = sum(np.outer(z, z) for z in X) * float(gamma[t]) / N
                X, x = np.array([z - C @ z for z in X]), x - C @ x
        return f

    want = each(loop, X, y, x)
    got = regression.gradient_descent(X, y, x, eta, gamma)
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


def test_noise_free_limits():
    X, _, x = problem(5, 8, 4)
    w = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=F64)
    truth = x @ w
    torch.testing.assert_close(regression.least_squares(X, X @ w, x), truth)
    eta = torch.full((5000,), 0.3, dtype=F64)
    torch.testing.assert_close(regression.gradient_descent(X, X @ w, x, eta), truth)


def test_prefixes_see_only_what_came_before():
    X, y, _ = problem(6, 7, 3)
    got = regression.at_every_prefix(regression.least_squares, X, y)
    assert got.shape == y.shape
    assert (got[:, 0] == 0).all()
    for i in range(1, 7):
        want = each(
            lambda X, y, x: np.linalg.lstsq(X, y)[0] @ x, X[:, :i], y[:, :i], X[:, i]
        )
        np.testing.assert_allclose(got[:, i], want, atol=1e-9)


# --- attention that learns in context ----------------------------------------


def tokens(X, y, x):
    """Rows ``(x_i, y_i)`` and, last, ``(x, 0)``."""
    inputs = np.concatenate([X, x[:, None]], 1)
    labels = np.concatenate([y, np.zeros((len(y), 1))], 1)
    return np.concatenate([inputs, labels[..., None]], 2)


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**31),
    N=st.integers(1, 6),
    d=st.integers(1, 4),
    layers=st.integers(1, 3),
)
def test_linear_transformer_against_loops(seed, N, d, layers):
    """Z ← Z + (1/N) P Z M (Zᵀ Q Z), tokens as columns, any P and Q."""
    (X, y, x), g = problem(seed, N, d), generator(seed + 1)
    P, Q = (w.double() for w in regression.random_weights(g, layers, d, 0.3))
    got = regression.LinearTransformer(P, Q)(X, y, x)
    M = np.diag([1.0] * N + [0.0])
    for b, rows in enumerate(tokens(X, y, x)):
        Z = rows.T
        for p, q in zip(P.numpy(), Q.numpy(), strict=True):
            Z = Z + p @ Z @ M @ (Z.T @ q @ Z) / N
        assert got[b].item() == pytest.approx(-Z[-1, -1], rel=1e-9, abs=1e-9)


@pytest.fixture(scope="module")
def regressor():
    return regression.InContextRegressor(3, 5, width=16, layers=2, heads=2, seed=4)


def test_regressor_is_causal_and_does_not_see_the_label(regressor):
    (X, y, _), g = problem(0, 5, 3), generator(1)
    X, y = X.float(), y.float()
    with torch.no_grad():
        before = regressor(X, y)
        for i in range(5):
            other_X, other_y = X.clone(), y.clone()
            other_y[:, i:] = torch.randn(3, 5 - i, generator=g)
            other_X[:, i + 1 :] = torch.randn(3, 4 - i, 3, generator=g)
            after = regressor(other_X, other_y)
            torch.testing.assert_close(after[:, : i + 1], before[:, : i + 1])
            if i < 4:
                assert ((after - before)[:, i + 1 :].abs() > 1e-6).any()


def test_regressor_reads_shorter_sequences_alike(regressor):
    X, y, _ = problem(0, 5, 3)
    X, y = X.float(), y.float()
    with torch.no_grad():
        torch.testing.assert_close(
            regressor(X[:, :3], y[:, :3]), regressor(X, y)[:, :3]
        )


def test_a_paired_regressor_reads_rows_and_not_the_last_label():
    model = regression.PairedRegressor(2, 4, 8, 1, 2, seed=3)
    g = torch.Generator().manual_seed(0)
    X, y = torch.randn(3, 4, 2, generator=g), torch.randn(3, 4, generator=g)
    rows = torch.tensor(
        [
            [[*x.tolist(), label if i < 3 else 0.0] for i, (x, label) in enumerate(own)]
            for own in (zip(X[b], y[b].tolist(), strict=True) for b in range(3))
        ]
    )
    with torch.no_grad():
        states = model.body(inputs_embeds=model.read_in(rows)).last_hidden_state
        want = model.read_out(states[:, 3])
        torch.testing.assert_close(model(X, y), want)
        y[:, 3] = 100.0
        torch.testing.assert_close(model(X, y), want)
        y[0, 0] = 100.0
        assert (model(X, y) != want)[0].item()


def test_regressor_is_seeded():
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    a, b, other = (
        torch.cat([p.flatten() for p in model.parameters()])
        for model in (
            regression.InContextRegressor(2, 3, 8, 1, 1, seed=seed)
            for seed in (1, 1, 2)
        )
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_training_finds_the_closed_form():
    """One linear layer on N(0, I): its loss is that of the best step."""
    g, d, N = torch.Generator().manual_seed(0), 3, 6
    P, Q = regression.random_weights(g, 1, d, 0.1)
    model = regression.LinearTransformer(P.double(), Q.double())

    def loss():
        X = regression.sample_inputs(g, 1000, N + 1, d, dtype=F64)
        y = regression.linear_labels(g, X)
        return 0.5 * (model(X[:, :-1], y[:, :-1], X[:, -1]) - y[:, -1]).square().mean()

    losses = regression.fit_adam(
        loss, model.parameters(), 200, 0.05, schedule=regression.warm_up_cosine
    )
    assert len(losses) == 200
    eta, best = N / (N + d + 1), d * (d + 1) / (N + d + 1) / 2
    with torch.no_grad():
        assert np.mean([loss().item() for _ in range(80)]) == pytest.approx(best, 0.02)
    effective = -(model.P[0, -1, -1] * model.Q[0, :d, :d]).detach()
    torch.testing.assert_close(
        effective, eta * torch.eye(d, dtype=F64), atol=0.05, rtol=0
    )


def test_train_is_adam():
    """Three steps, written out."""
    w = torch.tensor([1.0, -2.0], dtype=F64, requires_grad=True)
    target = torch.tensor([0.5, 3.0], dtype=F64)
    losses = regression.fit_adam(
        lambda: (w - target).square().sum(), [w], 3, 0.1, (0.8, 0.9)
    )
    v, m, s, want = np.array([1.0, -2.0]), 0.0, 0.0, []
    for t in range(1, 4):
        want.append(((v - target.numpy()) ** 2).sum())
        gradient = 2 * (v - target.numpy())
        m, s = 0.8 * m + 0.2 * gradient, 0.9 * s + 0.1 * gradient**2
        v = v - 0.1 * m / (1 - 0.8**t) / (np.sqrt(s / (1 - 0.9**t)) + 1e-8)
    np.testing.assert_allclose(losses, want, rtol=1e-12)
    np.testing.assert_allclose(w.detach(), v, rtol=1e-12)


def test_schedule():
    assert regression.warm_up_cosine(0.05) == pytest.approx(
        0.5 * 0.5 * (1 + math.cos(0.05 * math.pi))
    )
    assert regression.warm_up_cosine(0.5) == pytest.approx(0.5)
    assert regression.warm_up_cosine(1.0) == pytest.approx(0.0)


def test_minimise_a_quadratic_in_any_basis():
    g = torch.Generator().manual_seed(0)
    A = torch.randn(6, 6, generator=g, dtype=F64)
    A, b = A @ A.mT + 0.1 * torch.eye(6), torch.randn(6, generator=g, dtype=F64)
    w = torch.zeros(6, dtype=F64, requires_grad=True)
    loss = regression.fit_lbfgs(lambda: 0.5 * w @ A @ w - b @ w, [w], 100)
    want = torch.linalg.solve(A, b)
    torch.testing.assert_close(w.detach(), want, atol=1e-5, rtol=1e-5)
    assert loss == pytest.approx((-0.5 * b @ want).item(), rel=1e-9)


def test_minimise_keeps_the_best_point():
    """A cliff beyond 1.2: the first step of L-BFGS falls off it."""
    w = torch.zeros((), dtype=F64, requires_grad=True)

    def cliff():
        return (w - 3).square() if w < 1.2 else w * math.nan

    loss = regression.fit_lbfgs(cliff, [w], 20)
    assert math.isfinite(w.item())
    assert loss == pytest.approx((w.item() - 3) ** 2)
    assert loss <= 9


# --- bad input ---------------------------------------------------------------


def bare(function):
    """What a reader calls: without the checks of annotations that tests add."""
    return inspect.unwrap(function)


PREDICTORS = {
    regression.least_squares: {},
    regression.nearest_neighbours: {},
    regression.ridge: dict(penalty=1.0),
    regression.gradient_descent: dict(eta=[0.1]),
}


@pytest.mark.parametrize("predict", PREDICTORS)
def test_bad_tasks(predict):
    (X, y, x), options = problem(0, 5, 3), PREDICTORS[predict]
    wrong = [(X, y[:, :4], x), (X, y, x[:, :2]), (X[:, :0], y[:, :0], x)]
    wrong += [(X, y[:1], x), (X, y, x[:1]), (X, y[:, :1], x)]  # these would broadcast
    for bad in wrong:
        with pytest.raises(ValueError, match=r"B, N, d"):
            bare(predict)(*bad, **options)
    with pytest.raises(ValueError, match="not finite"):
        predict(X, y / 0, x, **options)


def test_bad_covariances():
    g, X = generator(), torch.ones(2, 4, 3)
    skew = torch.eye(3) + torch.ones(3, 3).triu(1)
    nan, inf = (torch.full((3, 3), value) for value in (math.nan, math.inf))
    for bad in (-torch.eye(3), skew, nan, inf, torch.eye(3) / 0):
        with pytest.raises(ValueError, match="positive definite"):
            regression.sample_inputs(g, 2, 2, 3, bad)
        with pytest.raises(ValueError, match="positive definite"):
            regression.linear_labels(g, X, bad)
    with pytest.raises((RuntimeError, TypeError)):
        regression.linear_labels(g, X, torch.eye(2))


def test_bad_options():
    X, y, x = problem(0, 5, 3)
    g = generator()
    with pytest.raises(ValueError, match="cauchy"):
        regression.sample_inputs(g, 2, 2, 3, distribution="cauchy")
    with pytest.raises(ValueError, match="cosine"):
        regression.function_labels(g, X, "cosine")
    for correlation in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=f"correlation .* {correlation}"):
            regression.correlated_keys(g, 2, 3, 4, correlation)
    for penalty in (0, -1, math.nan):
        with pytest.raises(ValueError, match=f"penalty .* {penalty}"):
            regression.ridge(X, y, x, penalty)
    with pytest.raises(ValueError, match="k .* 0"):
        regression.nearest_neighbours(X, y, x, 0)
    for gamma in ([0.1], [0.1] * 3):
        with pytest.raises(ValueError, match="shorter|longer"):
            regression.gradient_descent(X, y, x, [0.1, 0.1], gamma)


def test_networks_refuse_what_does_not_fit():
    X, y, x = problem(0, 4, 3)
    P, Q = regression.random_weights(generator(), 1, 2, 0.1)  # of d = 2, not 3
    with pytest.raises(RuntimeError):
        regression.LinearTransformer(P.double(), Q.double())(X, y, x)
    model = regression.InContextRegressor(3, 3, 8, 1, 1)
    X, y, forward = X.float(), y.float(), bare(type(model).forward)
    with pytest.raises(ValueError, match="N ≤ 3"):
        forward(model, X, y)
    for short in (y[:, :1], y[:, :2]):
        with pytest.raises(ValueError, match=r"y \(B, N\)"):
            forward(model, X[:, :3], short)
    with pytest.raises(RuntimeError):
        model(X[:, :3, :2], y[:, :3])


def test_a_loss_that_is_not_finite_stops_a_fit():
    w = torch.ones(1, requires_grad=True)
    for fit in (
        lambda loss: regression.fit_adam(loss, [w], 2, 0.1),
        lambda loss: regression.fit_lbfgs(loss, [w], 2),
    ):
        with pytest.raises(ValueError, match="inf at step 0"):
            fit(lambda: w.sum() / 0)
