"""What is refused, and what all learners begin with."""

import math
from typing import NamedTuple

import torch


class State(NamedTuple):
    """What a learner has in mind, to go on from.

    Attributes:
        weights: of the model, each ``(B, H, ...)``; of a linear one W alone,
            ``(B, H, d_v, d_k)``.
        velocity: M, of the same shapes; None is zero.
        curvature: of a preconditioner, the decayed ``Σ β k kᵀ``, ``(B, H, d_k, d_k)``,
            or its diagonal, ``(B, H, 1, d_k)``; None is zero.
    """

    weights: tuple[torch.Tensor, ...]
    velocity: tuple[torch.Tensor, ...] | None = None
    curvature: torch.Tensor | None = None


def begun(state, key, value):
    if state is None:
        shape = (*key.shape[:2], value.shape[-1], key.shape[-1])
        state = State((torch.zeros(shape, dtype=key.dtype, device=key.device),))
    velocity = [0.0] * len(state.weights) if state.velocity is None else state.velocity
    return state.weights, velocity, 0.0 if state.curvature is None else state.curvature


def check(query, key, value, state, plain):
    shapes = [tuple(x.shape) for x in (query, key, value)]
    fits = len(shapes[1]) == len(shapes[2]) == 4 and shapes[0] == shapes[1]
    if not fits or shapes[1][:3] != shapes[2][:3] or 0 in (*shapes[1], *shapes[2]):
        raise ValueError(
            "queries and keys must be (B, H, T, d_k) and values (B, H, T, d_v), none "
            f"of them empty, not {shapes[0]}, {shapes[1]} and {shapes[2]}"
        )
    if not query.dtype == key.dtype == value.dtype in (torch.float32, torch.float64):
        raise ValueError(
            "queries, keys and values must all be float32 or all float64, not "
            f"{query.dtype}, {key.dtype} and {value.dtype}"
        )
    for name, x in {"query": query, "key": key, "value": value}.items():
        if not _finite(x):
            raise ValueError(f"some {name} is not finite")
    if state is None and not plain:
        raise ValueError("a model that is not linear needs a state with its weights")
    if state is not None and plain:
        expected = (*shapes[1][:2], shapes[2][-1], shapes[1][-1])
        found = [tuple(w.shape) for w in (*state.weights, *(state.velocity or ()))]
        if len(state.weights) != 1 or {*found} != {expected}:
            raise ValueError(
                f"for these keys and values the state is one weight {expected}, and "
                f"a velocity like it, not {', '.join(map(str, found))}"
            )


def bounded(outputs):
    if not _finite(outputs):
        raise ValueError(
            "the learner diverges: take a smaller beta, with momentum at most "
            "2 (1 - momentum)/|k|²"
        )
    return outputs


def _finite(x):
    return torch.stack(x.aminmax()).isfinite().all()


def one_of(**options):
    for name, (given, allowed) in options.items():
        if given not in allowed:
            listed = ", ".join(map(repr, allowed))
            raise ValueError(f"{name} is one of {listed}, not {given!r}")


def one_or_more(**numbers):
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} is 1 or more, not {number}")


def check_ridge(ridge):
    if not 0 < ridge < math.inf:
        raise ValueError(f"ridge must be positive and finite, not {ridge}")


def check_rates(key, beta, momentum, decay):
    """The three as tensors with the axes B, H and T, each of which may be 1."""
    found, shape = [], tuple(key.shape[:3])
    for name, rate, inside, allowed in (
        ("beta", beta, torch.isfinite, "finite"),
        ("momentum", momentum, lambda x: (x >= 0) & (x < 1), "in [0, 1)"),
        ("decay", decay, lambda x: (x > 0) & (x <= 1), "in (0, 1]"),
    ):
        rate = torch.as_tensor(rate, dtype=key.dtype, device=key.device)
        rate = rate[(None,) * (3 - rate.ndim)]
        sizes = zip(rate.shape, shape, strict=False)
        if rate.ndim > 3 or any(m not in (1, n) for m, n in sizes):
            raise ValueError(
                f"{name} must be a number or broadcast to (B, H, T), here {shape}; its "
                f"shape is {tuple(rate.shape)}"
            )
        if not inside(rate).all():
            wrong = rate[~inside(rate)][0]
            raise ValueError(
                f"{name} must be {allowed} for every token, not {wrong:.6g}"
            )
        found.append(rate)
    return found


def check_step(beta, key, loss, safe):
    if safe and not (beta >= 0).all():
        raise ValueError(f"beta must be 0 or more, not {beta.min():.6g}")
    if not safe and loss != "inner":
        square = key.square()
        square = square.sum(-1) if loss == "squared" else square.amax(-1)
        check_stable(
            beta * square,
            f"β|k|², where |k|² is up to {square.max():.4g}. Normalise the keys and "
            "keep β in [0, 2], or take implicit=True",
        )


def check_stable(strength, what):
    low, high = strength.aminmax()
    if low < 0 or high > 2 + 200 * torch.finfo(strength.dtype).eps:
        wrong = low if low < 0 else high
        raise ValueError(
            f"an explicit step is stable in [0, 2], not at {wrong:.4g}, of {what}"
        )
