"""The loop: one pair after another."""

import torch
from torch.nn.functional import gelu, layer_norm

from icl.memory.shared import (
    State,
    begun,
    bounded,
    check,
    check_rates,
    check_ridge,
    check_stable,
    check_step,
    one_of,
    one_or_more,
)
from icl.memory.solver import conjugate_gradients

LOSSES = ("inner", "squared", "separable")
PRECONDITIONERS = (None, "diagonal", "full")


def linear(weights, x):
    """``W x``, of weights ``(W,)``: ``(..., d_v, d_k)`` and ``(..., d_k)``."""
    return (weights[0] @ x[..., None])[..., 0]


def mlp(weights, x):
    """``W_2 gelu(W_1 x)``, of weights ``(..., n, d_k)`` and ``(..., d_v, n)``."""
    return linear(weights[1:], gelu(linear(weights, x)))


def residual(model):
    """``x + LayerNorm(f(x))``, what TTT learns with (Sun et al. 2024, section 2.7)."""
    return lambda weights, x: x + layer_norm(model(weights, x), x.shape[-1:])


def learn(
    query,
    key,
    value,
    beta=1.0,
    *,
    loss="squared",
    implicit=False,
    momentum=0.0,
    decay=1.0,
    decayed=True,
    precondition=None,
    ridge=1.0,
    iterations=64,
    minibatch=1,
    model=linear,
    state=None,
):
    r"""What an online learner answers, token by token.

    *Implicit.* :math:`\arg\min_W |W - \tilde W|^2 + \beta |W k - v|^2` leaves the error
    :math:`Wk - v = (\tilde W k - v)/(1 + \beta|k|^2)`, so it is the explicit step with
    :math:`\beta/(1 + \beta|k|^2)` (Liu et al. 2024). Longhorn then keeps the diagonal
    of :math:`k k^\top` alone. That is the gradient of a squared loss for every entry of
    W by itself, :math:`\tfrac12 \sum_{ij} (W_{ij} k_j - v_i)^2`, the separable loss.

    *Preconditioned.* With :math:`P_t = \lambda + \sum_s \beta_s k_s k_s^\top`, decayed
    but for λ, or its diagonal, the gradient goes through :math:`P_t^{-1}`, and so does
    what decay takes away, the gradient of :math:`\tfrac{1-\gamma}2 \lambda|W|^2`. In
    full this is Newton's method: with ``decayed=False`` it keeps :math:`W_t P_t =
    \gamma W_{t-1} P_{t-1} + \beta v k^\top`, so that W is the ridge regression on all
    tokens so far, the Mesa layer (von Oswald et al. 2025).

    Args:
        query, key: ``(B, H, T, d_k)``.
        value: ``(B, H, T, d_v)``.
        beta: the step; a number, or a tensor that broadcasts to ``(B, H, T)``. An
            explicit step on the squared loss multiplies a linear memory's error on the
            pair by ``1 - β|k|²``, which must lie in [-1, 1]: for unit keys β is in
            [0, 2]. On the separable loss it is ``1 - β k_j²``. With momentum a step is
            repeated, and by the time that its key comes again it may have added up to
            ``β/(1 - μ)``. That is not refused above 2, but without decay weights can
            then grow for ever. Models that are not linear are not checked.
        loss: ``"inner"``, ``"squared"`` or ``"separable"``.
        implicit: the implicit step instead, stable for all ``β >= 0``. Of the
            inner-product loss it is the explicit one.
        momentum, decay: μ in [0, 1) and γ in (0, 1], of the same shapes as ``beta``.
        decayed: whether the gradient is taken at the decayed weights (Yang et al. 2025,
            Gated DeltaNet) or at those before (Behrouz et al. 2025, Titans).
        precondition: None, ``"diagonal"`` or ``"full"``, of a linear model. In full it
            is solved by :func:`conjugate_gradients`.
        ridge: λ, positive.
        iterations: the most that conjugate gradients take.
        minibatch: the gradients of so many tokens are taken at the weights before the
            first of them (Sun et al. 2024). What is continued begins a new batch.
        model: ``f(weights, x)``. Autograd takes the gradient of all but :func:`linear`.
        state: to begin from; left out, zeros. Models other than linear need one.

    Returns:
        the outputs ``(B, H, T, d_v)`` and the :class:`State` after the last token.
        Several inner steps a token are that token several times.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite or not in their
            range, an option that there is not, or a learner that diverges.
    """
    plain, implicit = model is linear, implicit and loss != "inner"
    check(query, key, value, state, plain)
    one_of(loss=(loss, LOSSES), precondition=(precondition, PRECONDITIONERS))
    if not plain and (implicit or precondition or loss == "separable"):
        raise ValueError(
            "implicit, precondition and loss='separable' are for the linear model alone"
        )
    one_or_more(minibatch=minibatch, iterations=iterations)
    rates = check_rates(key, beta, momentum, decay)
    if plain:
        check_step(rates[0], key, loss, implicit or precondition)
    if precondition:
        check_ridge(ridge)
    rates = [rate.expand(key.shape[:3])[..., None, None] for rate in rates]
    weights, velocity, curvature = begun(state, key, value)
    gradient, at, outputs = _gradient(loss, model), weights, []
    for t in range(key.shape[2]):
        q, k, v, b, mu, gamma = (x[:, :, t] for x in (query, key, value, *rates))
        row, lost = k[..., None, :], 1 - gamma
        if precondition:
            column, lost = row if precondition == "diagonal" else row.mT, lost * ridge
            curvature = gamma * curvature + b * column * row
        solve = _inverse(precondition, curvature, ridge, iterations)
        if implicit:
            b = b / (1 + b * (row * solve(row)).sum(-1, keepdim=True))
        elif precondition == "diagonal" and loss == "squared":
            check_stable(
                b * (row * solve(row)).sum(-1, keepdim=True),
                "β kᵀP⁻¹k. Raise the ridge, or take implicit=True",
            )
        at = at if t % minibatch else weights
        at = [w - solve(lost * w) for w in at] if decayed else at
        steps = [solve(b * g) for g in gradient(at, k, v)]
        velocity = [mu * m - step for m, step in zip(velocity, steps, strict=True)]
        weights = [w - solve(lost * w) for w in weights]
        weights = [w + m for w, m in zip(weights, velocity, strict=True)]
        outputs.append(model(weights, q))
    outputs = bounded(torch.stack(outputs, 2))
    curvature = curvature if precondition else None
    return outputs, State(tuple(weights), tuple(velocity), curvature)


def _inverse(precondition, curvature, ridge, iterations):
    """``g P⁻¹`` of a gradient g, ``(B, H, d_v, d_k)``."""

    def apply(x):
        return x @ curvature + ridge * x

    if precondition == "full":
        return lambda g: conjugate_gradients(apply, g, None, iterations)[0]
    return lambda g: g / (curvature + ridge) if precondition else g


def _gradient(loss, model):
    """``∇ ℓ(weights, k, v)``, one of each of the weights."""

    def total(weights, k, v):
        found = model(weights, k)
        return -(found * v).sum() if loss == "inner" else (found - v).square().sum() / 2

    def closed(weights, k, v):
        (W,), row, column = weights, k[..., None, :], v[..., None]
        if loss == "inner":
            return [-column * row]
        return [((W * row if loss == "separable" else W @ row.mT) - column) * row]

    return closed if model is linear else torch.func.grad(total)
