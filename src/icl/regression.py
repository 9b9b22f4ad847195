r"""In-context regression: random tasks, classical answers, networks that learn them.

A task has examples ``X, y`` and one more input ``x``, whose label is to be predicted.
A predictor is a function ``predict(X, y, x)`` of a batch of tasks; gradient
descent starts from the zero function. ``generator`` draws all random numbers. Tasks
that do not fit together or are not finite, covariances that are not symmetric and
positive definite, options outside what is documented and infinite losses raise
``ValueError``.

Networks read tokens ``(x_i, y_i)`` and, last, the query ``(x, 0)``. A layer of linear
self-attention in the form of Ahn et al. (2023), with the tokens as rows,

.. math:: Z \leftarrow Z + \tfrac1N\, Z Q^\top (Z^\top M Z) P^\top,

attends to the N examples and not to the query (M has a zero there). In usual
terms :math:`Q = W_K^\top W_Q`, and P is the projection times :math:`W_V`. The
prediction is *minus* the last entry of the query's row.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import GPT2Model

from icl.training import gpt2_config

_Inputs = Float[Tensor, "B N d"]
_Labels = Float[Tensor, "B N"]
_Query = Float[Tensor, "B d"]
_Answers = Float[Tensor, " B"]
_Matrix = Float[Tensor, "d d"]
_Layers = Float[Tensor, "L D D"]  # D = d + 1


def sample_inputs(
    generator: torch.Generator,
    batch: int,
    examples: int,
    dim: int,
    covariance: _Matrix | None = None,
    distribution: str = "normal",
    dtype: torch.dtype | None = None,
) -> _Inputs:
    """Independent inputs with mean zero and a given covariance.

    Args:
        batch, examples, dim: B, N and d.
        covariance: Σ; default the identity.
        distribution: before the covariance is applied, each entry is standard
            ``"normal"`` or ``"uniform"`` on ±√3, or the input is uniform on the
            ``"sphere"`` of radius √d. Each has covariance I.
    """
    shape = batch, examples, dim
    if distribution == "uniform":
        X = torch.rand(shape, generator=generator, dtype=dtype)
        X = (2 * X - 1) * math.sqrt(3)
    elif distribution in ("normal", "sphere"):
        X = torch.randn(shape, generator=generator, dtype=dtype)
        if distribution == "sphere":
            X = X * (math.sqrt(dim) / X.norm(dim=-1, keepdim=True))
    else:
        raise ValueError(f"distribution {distribution!r}: normal, uniform or sphere")
    return X if covariance is None else X @ _cholesky(covariance).to(X.dtype).mT


def linear_labels(generator, X: _Inputs, weight_covariance=None, noise=0.0) -> _Labels:
    r"""Labels of linear tasks, :math:`y_i = w^\top x_i + \varepsilon_i`.

    Args:
        weight_covariance: of ``w``, one per task; default the identity.
        noise: standard deviation of ε.
    """
    B, _, d = X.shape
    w = sample_inputs(generator, B, 1, d, weight_covariance, dtype=X.dtype)
    f = (X @ w.mT).squeeze(-1)
    return f + noise * torch.randn(f.shape, generator=generator, dtype=X.dtype)


_FUNCTIONS = {
    "linear": lambda u: u,
    # E sin²(2u) = (1 - e^-8)/2 for a standard normal u
    "sine": lambda u: torch.sin(2 * u) / math.sqrt((1 - math.exp(-8)) / 2),
    # e^(u/2) is log-normal
    "exponential": lambda u: (
        ((u / 2).exp() - math.exp(1 / 8))
        / math.sqrt(math.exp(1 / 4) * (math.exp(1 / 4) - 1))
    ),
}


def function_labels(generator, X: _Inputs, function, noise=0.0) -> _Labels:
    r"""Labels of tasks :math:`y_i = f(w^\top x_i) + \varepsilon_i`, w of length 1.

    Args:
        X: inputs with covariance I.
        function: f, ``"linear"``, ``"sine"`` (of twice its argument) or
            ``"exponential"`` (of half of it), shifted and scaled such that labels
            without noise have mean 0 and variance 1 if the inputs are normal.
        noise: standard deviation of ε.
    """
    if function not in _FUNCTIONS:
        raise ValueError(f"function {function!r} is not one of {', '.join(_FUNCTIONS)}")
    w = sample_inputs(generator, len(X), 1, X.shape[2], dtype=X.dtype)
    u = (X @ (w / w.norm(dim=-1, keepdim=True)).mT).squeeze(-1)
    f = _FUNCTIONS[function](u)
    return f + noise * torch.randn(f.shape, generator=generator, dtype=X.dtype)


def correlated_keys(generator, batch, pairs, dim, correlation, common=None) -> _Inputs:
    r"""Unit keys of sequences, all correlated with one direction.

    Before normalisation they are :math:`\sqrt{\rho}\,c + \sqrt{1-\rho}\,z_i/\sqrt d`
    with :math:`z_i \sim N(0, I)`, so that the cosine of two of them is about ρ.

    Args:
        batch, pairs, dim: B, N and d.
        correlation: ρ, in [0, 1).
        common: c, a unit vector for all sequences; default one per sequence, random.
    """
    if not 0 <= correlation < 1:
        raise ValueError(f"correlation must lie in [0, 1), not {correlation}")
    z = sample_inputs(generator, batch, pairs, dim) / math.sqrt(dim)
    if common is None:
        common = sample_inputs(generator, batch, 1, dim, distribution="sphere")
        common = common / math.sqrt(dim)
    k = math.sqrt(correlation) * common + math.sqrt(1 - correlation) * z
    return k / k.norm(dim=-1, keepdim=True)


def _cholesky(covariance):
    L, failed = torch.linalg.cholesky_ex(covariance)
    symmetric = torch.allclose(covariance, covariance.mT)
    if failed or not (symmetric and L.isfinite().all()):
        raise ValueError("a covariance must be symmetric and positive definite")
    return L


# --- classical answers ----------------------------------------------------------------


def least_squares(X: _Inputs, y: _Labels, x: _Query) -> _Answers:
    """Predictions of the least-squares weight of least norm."""
    _check_task(X, y, x)
    w = torch.linalg.pinv(X) @ y[..., None]
    return (w.squeeze(-1) * x).sum(-1)


def ridge(X: _Inputs, y: _Labels, x: _Query, penalty) -> _Answers:
    """Predictions of ridge regression, least ``‖y − Xw‖² + penalty ‖w‖²``.

    The Bayes answer if ``w ~ N(0, I)`` and ``penalty`` is the noise variance.
    """
    _check_task(X, y, x, penalty=penalty)
    # singular values rather than XᵀX, whose condition number is their square
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    shrunk = (S / (S.square() + penalty))[..., None] * (U.mT @ y[..., None])
    return ((Vh.mT @ shrunk).squeeze(-1) * x).sum(-1)


def gradient_descent(X: _Inputs, y: _Labels, x: _Query, eta, gamma=None) -> _Answers:
    r"""Predictions after steps of gradient descent on the mean squared error.

    Step l: :math:`w \leftarrow w + \frac{\eta_l}{N}\sum_i (y_i - w^\top x_i) x_i`.
    With ``gamma`` every input, the query's too, is then moved by :math:`x
    \leftarrow (I - \frac{\gamma_l}{N} \sum_i x_i x_i^\top) x`: the GD++ of von
    Oswald et al. (2023). Residuals stay as they are; the next step works on the
    moved inputs. Differentiable in ``eta`` and ``gamma``, a number per step.
    """
    _check_task(X, y, x)
    residual, prediction = y, torch.zeros_like(y[:, 0])
    gamma = [None] * len(eta) if gamma is None else gamma
    for rate, shrink in zip(eta, gamma, strict=True):
        change = rate * (residual[:, None] @ X).squeeze(1) / X.shape[1]
        prediction = prediction + (change * x).sum(-1)
        residual = residual - (X @ change[..., None]).squeeze(-1)
        if shrink is not None:
            C = shrink * X.mT @ X / X.shape[1]
            X, x = X - X @ C, x - (x[:, None] @ C).squeeze(1)
    return prediction


def nearest_neighbours(X: _Inputs, y: _Labels, x: _Query, k=3) -> _Answers:
    """Mean label of the ``k`` examples nearest to ``x`` (of all, if fewer)."""
    _check_task(X, y, x, k=k)
    distance = (X - x[:, None]).square().sum(-1)
    nearest = distance.topk(min(k, X.shape[1]), largest=False).indices
    return y.gather(1, nearest).mean(1)


def at_every_prefix(predict, X: _Inputs, y: _Labels, **options) -> _Labels:
    """Predictions of every label from the examples before it; zero for the first."""
    columns = [torch.zeros_like(y[:, 0])]
    for i in range(1, X.shape[1]):
        columns.append(predict(X[:, :i], y[:, :i], X[:, i], **options))
    return torch.stack(columns, 1)


def _check_task(X, y, x, **positive):
    """Refuse shapes that could broadcast, and entries not finite or not positive."""
    shapes = tuple(X.shape), tuple(y.shape), tuple(x.shape)
    if X.ndim != 3 or not X.shape[1] or shapes[1:] != (shapes[0][:2], shapes[0][::2]):
        raise ValueError(f"X (B, N, d), y (B, N), x (B, d) with N > 0, not {shapes}")
    if not all(torch.isfinite(t).all() for t in (X, y, x)):
        raise ValueError("the task has entries that are not finite")
    for name, value in positive.items():
        if not value > 0:
            raise ValueError(f"{name} must be positive, not {value}")


# --- attention that learns in context -------------------------------------------------


def random_weights(generator, layers, dim, std) -> tuple[_Layers, _Layers]:
    """Random P and Q, normal with a standard deviation."""
    shape = 2, layers, dim + 1, dim + 1
    return tuple(std * torch.randn(shape, generator=generator))


class LinearTransformer(nn.Module):
    """Layers of linear self-attention in the form of Ahn et al. (2023)."""

    def __init__(self, P: _Layers, Q: _Layers):
        super().__init__()
        self.P, self.Q = nn.Parameter(P), nn.Parameter(Q)

    def forward(self, X: _Inputs, y: _Labels, x: _Query) -> _Answers:
        """Predictions for tasks."""
        Z, N = _tokens(X, y, x), X.shape[1]
        for P, Q in zip(self.P, self.Q, strict=True):
            examples = Z[:, :-1]
            Z = Z + Z @ (Q.mT @ (examples.mT @ examples) @ P.mT) / N
        return -Z[:, -1, -1]


def _tokens(X, y, x):
    """Rows ``(x_i, y_i)`` and, last, ``(x, 0)``: ``(B, N + 1, d + 1)``."""
    _check_task(X, y, x)
    inputs = torch.cat([X, x[:, None]], 1)
    labels = torch.cat([y, torch.zeros_like(y[:, :1])], 1)
    return torch.cat([inputs, labels[..., None]], 2)


class InContextRegressor(nn.Module):
    """A causal transformer that reads ``x_1, y_1, x_2, y_2, ...`` (Garg et al. 2022).

    The body is GPT-2 without dropout; linear maps read tokens in and predictions
    out. An input is a token ``(x_i, 0)`` and a label a token ``(0, y_i)``, so that
    the label has an entry of its own (Garg et al. put it into the first of x's).
    There are at most as many ``examples``, the query included; ``inner`` is the width
    of the MLPs' hidden layers, by default four times the model's.
    """

    def __init__(self, dim, examples, width=64, layers=3, heads=4, seed=0, inner=None):
        super().__init__()
        sizes = layers, width, heads, inner
        config = gpt2_config(1, 2 * examples, *sizes, activation_function="gelu_new")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.read_in = nn.Linear(dim + 1, width)
            self.body = GPT2Model(config)
            self.read_out = nn.Linear(width, 1)

    def forward(self, X: _Inputs, y: _Labels) -> _Labels:
        """Predictions of each label from the examples before it."""
        (B, N, d), most = X.shape, self.body.config.n_positions // 2
        if y.shape != (B, N) or most < N:
            raise ValueError(
                f"X {X.shape}, y {y.shape}: X (B, N, d), y (B, N), N ≤ {most}"
            )
        sequence = X.new_zeros(B, 2 * N, d + 1)
        sequence[:, ::2, :-1] = X
        sequence[:, 1::2, -1] = y
        states = self.body(inputs_embeds=self.read_in(sequence)).last_hidden_state
        return self.read_out(states[:, ::2]).squeeze(-1)


class PairedRegressor(InContextRegressor):
    """The same network reading rows ``(x_i, y_i)``, and the query's ``(x, 0)``.

    A row is a demonstration with its label, so that one layer of attention can
    compare the query with all of them (the form of von Oswald et al. 2023).
    """

    def forward(self, X: _Inputs, y: _Labels) -> Float[Tensor, "B 1"]:
        """Predictions of the last label, which is not read."""
        rows = _tokens(X[:, :-1], y[:, :-1], X[:, -1])
        states = self.body(inputs_embeds=self.read_in(rows)).last_hidden_state
        return self.read_out(states[:, -1])


# --- fitting --------------------------------------------------------------------------


def warm_up_cosine(done: float) -> float:
    """Learning-rate factor: a cosine, times a linear warm-up over the first tenth."""
    return min(done / 0.1, 1.0) * 0.5 * (1 + math.cos(math.pi * done))


def fit_adam(
    loss, parameters, steps, learning_rate, betas=(0.9, 0.999), clip=None, schedule=None
) -> list[float]:
    """Fit parameters by Adam to fresh batches; the loss at every step.

    Args:
        loss: ``loss() -> scalar``; draws a batch, from a generator of its own.
        parameters: tensors that the loss depends on.
        steps, learning_rate, betas: of Adam.
        clip: maximal norm of the gradient; default none.
        schedule: factor of the learning rate by the completed fraction of the steps,
            in (0, 1], such as :func:`warm_up_cosine`; default constant.
    """
    parameters = list(parameters)
    adam = torch.optim.Adam(parameters, learning_rate, betas)
    losses = []
    for step in range(steps):
        if schedule is not None:
            adam.param_groups[0]["lr"] = learning_rate * schedule((step + 1) / steps)
        value = loss()
        losses.append(_finite(value, step))
        adam.zero_grad()
        value.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(parameters, clip)
        adam.step()
    return losses


def fit_lbfgs(loss, parameters, steps) -> float:
    """Fit parameters by L-BFGS to a loss without randomness; the least loss.

    Unlike Adam, L-BFGS is invariant to a rotation of the parameters. It may
    jump too far on a polynomial of high degree, so the parameters are left at the
    best point that it evaluated in at most ``steps`` iterations.
    """
    parameters = list(parameters)
    with torch.no_grad():
        best = _finite(loss(), 0), [p.clone() for p in parameters]
    options = dict(history_size=50, tolerance_grad=1e-9, tolerance_change=1e-12)
    options |= dict(max_iter=steps, line_search_fn="strong_wolfe")
    lbfgs = torch.optim.LBFGS(parameters, **options)

    def closure():
        nonlocal best
        lbfgs.zero_grad()
        value = loss()
        value.backward()
        if value.item() < best[0]:
            best = value.item(), [p.detach().clone() for p in parameters]
        return value

    lbfgs.step(closure)
    with torch.no_grad():
        for parameter, kept in zip(parameters, best[1], strict=True):
            parameter.copy_(kept)
    return best[0]


def _finite(value, step):
    if not torch.isfinite(value):
        hint = "lower the learning rate or the initial weights, or clip the gradient"
        raise ValueError(f"the loss is {value.item()} at step {step}: {hint}")
    return value.item()
