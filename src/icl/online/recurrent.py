"""The loop: one pair after another."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from icl.online import state as states
from icl.online.mesa import conjugate_gradients
from icl.online.state import Keys, Rate, State, Values


def linear(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """``W x``, of weights ``(W,)``: ``(..., d_v, d_k)`` and ``(..., d_k)``."""
    return (weights[0] @ x[..., None])[..., 0]


def mlp(weights: Sequence[Tensor], x: Tensor) -> Tensor:
    """``W_2 gelu(W_1 x)``, of weights ``(..., n, d_k)`` and ``(..., d_v, n)``."""
    return linear(weights[1:], gelu(linear(weights, x)))


def residual(model: Callable) -> Callable:
    """``x + LayerNorm(f(x))``, what TTT learns with (Sun et al. 2024, section 2.7)."""
    return lambda weights, x: x + layer_norm(model(weights, x), x.shape[-1:])


def recurrent(
    query: Keys,
    key: Keys,
    value: Values,
    beta: Rate = 1.0,
    *,
    loss="squared",
    implicit=False,
    momentum: Rate = 0.0,
    decay: Rate = 1.0,
    decayed=True,
    precondition=None,
    ridge: Rate = 1.0,
    iterations: int = 64,
    minibatch: int = 1,
    model: Callable = linear,
    state: State | None = None,
) -> tuple[Values, State]:
    r"""Answers of an online learner, token by token, and its last :class:`State`.

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
        beta: step; a number, or a tensor that broadcasts to ``(B, H, T)``. Explicit
            steps of a linear memory multiply its error on the pair by ``1 - β|k|²``,
            with the separable loss ``1 - β k_j²``, which must lie in [-1, 1]: for unit
            keys β is in [0, 2]. With momentum a step adds up to ``β/(1 - μ)``; above
            2 the weights can grow without bound, unless there is decay.
        loss: ``"inner"``, ``"squared"`` or ``"separable"``.
        implicit: the implicit step, stable for all ``β >= 0``; of the inner-product
            loss it is the explicit one.
        momentum, decay: μ in [0, 1) and γ in (0, 1], of the same shapes as ``beta``.
        decayed: whether the gradient is taken at the decayed weights (Yang et al. 2025,
            Gated DeltaNet) or at those before (Behrouz et al. 2025, Titans).
        precondition: None, ``"diagonal"`` or ``"full"``, of a linear model.
        ridge, iterations: λ; if ``"full"``, most steps of :func:`conjugate_gradients`.
        minibatch: tokens whose gradients are taken at the weights before the first of
            them (Sun et al. 2024). A state continues with a new batch.
        model: ``f(weights, x)``. Autograd takes the gradient of all but :func:`linear`.
        state: to begin from; default zeros, for the linear model alone.

    Raises:
        ValueError: shapes that do not fit, numbers outside their range, an unknown
            option, or outputs that are not finite.
    """
    is_linear, implicit = model is linear, implicit and loss != "inner"
    states.check_inputs(query, key, value)
    states.check_choice("loss", loss, ("inner", "squared", "separable"))
    states.check_choice("precondition", precondition, (None, "diagonal", "full"))
    if not is_linear and (implicit or precondition or loss == "separable"):
        raise ValueError("implicit, precondition and separable need the linear model")
    if not is_linear and state is None:
        raise ValueError("another model needs a state with its weights")
    states.check_positive(ridge=ridge, minibatch=minibatch)
    rates = states.check_rates(key, beta, momentum, decay)
    if is_linear:
        states.check_step(rates[0], key, loss, implicit or precondition)
    rates = [rate.expand(key.shape[:3])[..., None, None] for rate in rates]
    weights, velocity, curvature = states.init_state(state, key, value, is_linear)
    gradient, at, outputs = _gradient(loss, model), weights, []
    for t in range(key.shape[2]):
        q, k, v, b, mu, gamma = (x[:, :, t] for x in (query, key, value, *rates))
        row, lost = k[..., None, :], 1 - gamma
        if precondition:
            column, lost = row if precondition == "diagonal" else row.mT, lost * ridge
            curvature = gamma * curvature + b * column * row
        solve = partial(_solve, precondition, curvature, ridge, iterations)
        if implicit:
            b = b / (1 + b * (row * solve(row)).sum(-1, keepdim=True))
        elif precondition == "diagonal" and loss == "squared":
            states.check_stable(
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
    outputs = torch.stack(outputs, 2)
    states.check_finite(outputs)
    curvature = curvature if precondition else None
    return outputs, State(tuple(weights), tuple(velocity), curvature)


def _solve(precondition, curvature, ridge, iterations, g):
    """``g P⁻¹`` of a gradient g, ``(B, H, d_v, d_k)``."""
    if precondition == "full":
        return conjugate_gradients(
            lambda x: x @ curvature + ridge * x, g, None, iterations
        )[0]
    return g / (curvature + ridge) if precondition else g


def _gradient(loss, model):
    """``∇ ℓ(weights, k, v)``, one for each of the weights."""

    def total(weights, k, v):
        found = model(weights, k)
        return -(found * v).sum() if loss == "inner" else (found - v).square().sum() / 2

    def closed(weights, k, v):
        (W,), row, column = weights, k[..., None, :], v[..., None]
        if loss == "inner":
            return [-column * row]
        return [((W * row if loss == "separable" else W @ row.mT) - column) * row]

    return closed if model is linear else torch.func.grad(total)
