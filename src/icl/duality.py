r"""Linear layers trained by gradient descent, seen as linear attention.

A linear layer :math:`F(x) = W x` trained by gradient descent ends at
:math:`W_T = a\,W_0 + \sum_i c_i\, e_i \otimes x'_i`: its training inputs
:math:`x'_i` are keys, its error signals :math:`e_i = -\gamma\,
\partial L_i/\partial F(x'_i)` are values, and the test input is the query
(Aizerman et al. 1964; Irie et al. 2022; Dai et al. 2023, eq. 7-9).
"""

from typing import NamedTuple

import torch


def linear_attention(values, keys, query):
    """Unnormalised linear attention, ``Σ_i v_i (k_iᵀ q)``.

    Args:
        values: ``(N, d_o)``.
        keys: ``(N, d_i)``.
        query: ``(..., d_i)``.

    Returns:
        ``(..., d_o)``. (Dai et al. 2023, eq. 9: LinearAttn(E, X', x).)
    """
    _same_length(values, keys)
    if query.shape[-1] != keys.shape[-1]:
        raise ValueError(
            f"query and keys differ in width: {query.shape[-1]} and {keys.shape[-1]}"
        )
    return (query @ keys.mT) @ values


class Training(NamedTuple):
    """A trained linear layer with the record of its training.

    Attributes:
        weight: the trained ``W_T``, ``(d_o, d_i)``.
        keys: the input of every example at every visit, ``(M, d_i)``.
        values: its error signal ``e`` at that visit, ``(M, d_o)``.
        step: the step of each visit, ``(M,)``.
        example: which training example it was, ``(M,)``.
    """

    weight: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    step: torch.Tensor
    example: torch.Tensor


def train_linear(
    W_0, X, Y, loss, batches, learning_rate, momentum=0.0, weight_decay=0.0
):
    """Train ``F(x) = W x`` by gradient descent and keep the error signals.

    The update is that of ``torch.optim.SGD``: ``g ← ∇L + λ W``,
    ``m ← μ m + g``, ``W ← W − γ m``. The record needs the gradient at the
    layer's *output* alone, so ``loss`` may be any differentiable function.

    Args:
        W_0: ``(d_o, d_i)``.
        X: training inputs ``(N, d_i)``.
        Y: their targets, ``(N, ...)``.
        loss: ``loss(outputs (B, d_o), targets (B, ...)) -> scalar``.
        batches: the index tensors of the steps, in order.
        learning_rate, momentum, weight_decay: γ, μ, λ.
    """
    _same_length(X, Y)
    W, velocity = W_0.clone(), torch.zeros_like(W_0)
    record = {"keys": [], "values": [], "step": [], "example": []}
    for t, batch in enumerate(batches):
        outputs = (X[batch] @ W.mT).requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(outputs, Y[batch]), outputs)
        record["keys"].append(X[batch])
        record["values"].append(-learning_rate * gradient)
        record["step"].append(torch.full_like(batch, t))
        record["example"].append(batch)
        velocity = momentum * velocity + gradient.mT @ X[batch] + weight_decay * W
        W = W - learning_rate * velocity
    return Training(W, **{name: torch.cat(part) for name, part in record.items()})


def step_weights(steps, learning_rate, momentum=0.0, weight_decay=0.0, dtype=None):
    r"""How much of the start and of every step is left in the trained weight.

    ``W_t`` and the velocity follow a linear recurrence, so the trained weight
    is :math:`W_T = a W_0 + \sum_t c_t \sum_{i \in B_t} e_i \otimes x_i`. Without
    weight decay :math:`a = 1` and :math:`c_t = (1-\mu^{T-t})/(1-\mu)`: older
    steps count more. Without momentum
    :math:`a = (1-\gamma\lambda)^T`, :math:`c_t = (1-\gamma\lambda)^{T-1-t}`:
    older steps count less.

    Returns:
        ``(a, c)``: a scalar and a tensor ``(steps,)``.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    # W = a W_0 + Σ c_t (−γ G_t) and velocity = v W_0 + Σ p_t G_t at every step
    a = torch.ones((), dtype=dtype or torch.get_default_dtype())
    v = torch.zeros_like(a)
    c, p = torch.zeros(2, steps, dtype=a.dtype)
    for t in range(steps):
        v = momentum * v + weight_decay * a
        p = momentum * p - learning_rate * weight_decay * c
        p[t] = 1.0
        a = a - learning_rate * v
        c = c + p
    return a, c


def dual_prediction(W_0, training, query, a=1.0, c=None):
    """The trained layer's output without its trained weight.

    ``a W_0 q + LinearAttn(c e, X', q)``, the dual form of ``W_T q``.

    Args:
        W_0: the weight before training, ``(d_o, d_i)``.
        training: a :class:`Training`.
        query: ``(..., d_i)``.
        a, c: from :func:`step_weights`; left out, those of plain SGD (ones).
    """
    values = training.values
    if c is not None:
        values = values * c[training.step, None]
    return a * (query @ W_0.mT) + linear_attention(values, training.keys, query)


def _same_length(values, keys):
    if len(values) != len(keys):
        raise ValueError(f"{len(keys)} keys need as many values, not {len(values)}")
    if not len(keys):
        raise ValueError("there are no training examples to attend to")
