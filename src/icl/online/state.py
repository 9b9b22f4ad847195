"""State of an online learner, and what it refuses."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

Keys = Float[Tensor, "B H T d_k"]
Values = Float[Tensor, "B H T d_v"]
Rate = float | int | Float[Tensor, "..."]


class State(NamedTuple):
    """What a learner continues from; None is zero."""

    #: of the model, each ``(B, H, ...)``; of a linear one W alone, ``(B, H, d_v, d_k)``
    weights: tuple[Tensor, ...]
    #: M, of the same shapes
    velocity: tuple[Tensor, ...] | None = None
    #: of a preconditioner: the decayed ``Σ β k kᵀ``, or its diagonal ``(B, H, 1, d_k)``
    curvature: Tensor | None = None


def init_state(state, key, value, is_linear=True):
    """Weights, velocity and curvature to begin with."""
    shape = (*key.shape[:2], value.shape[-1], key.shape[-1])
    if state is None:
        state = State((torch.zeros(shape, dtype=key.dtype, device=key.device),))
    for w in (*state.weights, *(state.velocity or ())) if is_linear else ():
        if w.shape != shape:
            raise ValueError(f"weight and velocity are {shape}, not {tuple(w.shape)}")
    velocity = [0.0] * len(state.weights) if state.velocity is None else state.velocity
    return state.weights, velocity, 0.0 if state.curvature is None else state.curvature


def check_inputs(query, key, value):
    fit = query.shape == key.shape and key.shape[:-1] == value.shape[:-1]
    if not fit or key.ndim != 4:
        shapes = [list(x.shape) for x in (query, key, value)]
        raise ValueError(
            f"queries and keys are (B, H, T, d_k), values (B, H, T, d_v), not {shapes}"
        )


def check_finite(outputs):
    if not torch.stack(outputs.aminmax()).isfinite().all():
        raise ValueError(
            "outputs are not finite: some query, key or value is not, or the learner "
            "diverges. Take a smaller beta, with momentum at most 2 (1 - momentum)/|k|²"
        )


def check_choice(name, given, allowed):
    if given not in allowed:
        raise ValueError(f"{name} is one of {allowed}, not {given!r}")


def check_positive(**numbers):
    for name, number in numbers.items():
        if not 0 < number < math.inf:
            raise ValueError(f"{name} must be positive and finite, not {number}")


def check_rates(key, beta, momentum, decay):
    """The three as tensors with the axes B, H and T, each of which may be 1."""
    found = []
    for name, rate, inside, allowed in (
        ("beta", beta, torch.isfinite, "finite"),
        ("momentum", momentum, lambda x: (x >= 0) & (x < 1), "in [0, 1)"),
        ("decay", decay, lambda x: (x > 0) & (x <= 1), "in (0, 1]"),
    ):
        rate = torch.as_tensor(rate, dtype=key.dtype, device=key.device)
        rate.expand(key.shape[:3])  # torch refuses another shape
        if not inside(rate).all():
            wrong = rate[~inside(rate)][0]
            raise ValueError(f"{name} must be {allowed}, not {wrong:.6g} for a token")
        found.append(rate[(None,) * (3 - rate.ndim)])
    return found


def check_step(beta, key, loss, safe):
    """Refuse unstable steps; safe ones, implicit or preconditioned, need β >= 0."""
    if safe:
        check_stable(beta, "beta", math.inf)
    elif loss != "inner":
        square = key.square()
        square = square.sum(-1) if loss == "squared" else square.amax(-1)
        check_stable(beta * square, "β|k|². Normalise the keys, or take implicit=True")


def check_stable(strength, what, highest=2.0):
    low, high = strength.aminmax()
    if low < 0 or high > highest * (1 + 100 * torch.finfo(strength.dtype).eps):
        wrong = low if low < 0 else high
        raise ValueError(f"stable are 0 to {highest:g}, not {wrong:.4g}, of {what}")
