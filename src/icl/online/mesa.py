"""The Mesa layer, and conjugate gradients for many systems at once."""

import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from icl.online.chunkwise import chunkwise
from icl.online.state import Keys, Rate, State, Values, check_positive, init_state

Vectors = Float[Tensor, "*batch d"]


def mesa(
    query: Keys,
    key: Keys,
    value: Values,
    beta: Rate = 1.0,
    *,
    decay: Rate = 1.0,
    ridge: Rate = 1.0,
    iterations: int = 64,
    state: State | None = None,
    chunk: int = 64,
) -> tuple[Values, State, Float[Tensor, "B H T"]]:
    r""":func:`recurrent` with the full preconditioner, for all tokens at once.

    ``o_t = G_t (H_t + λ)⁻¹ q_t`` with the decayed sums ``G = Σ β v kᵀ`` and ``H = Σ β k
    kᵀ`` (von Oswald et al. 2025, MesaNet). ``G x`` and ``H x`` are linear attention, of
    values or keys; conjugate gradients start from ``q/(diag H + λ)``.

    It has ``decayed=False`` and needs β >= 0. Returns outputs, the :class:`State` and
    the relative residual of each query, as :func:`conjugate_gradients` does. Arguments
    and errors are those of :func:`recurrent` and :func:`chunkwise`.
    """
    check_positive(ridge=ridge)
    (W,), _, H = init_state(state, key, value)
    eye = torch.eye(key.shape[-1], dtype=key.dtype, device=key.device)
    H = (H + 0 * eye).expand(*W.shape[:2], -1, -1)
    G = W @ (H + ridge * eye)

    def attend(q, k, v, start):  # implicit is the same for this loss, and needs β >= 0
        options = {"loss": "inner", "implicit": True, "decay": decay, "chunk": chunk}
        out, after = chunkwise(q, k, v, beta, state=State((start,)), **options)
        return out, after.weights[0]

    one, start = torch.ones_like(key[..., :1]), H.diagonal(0, -2, -1)[..., None]
    diagonal, _ = attend(one, one, key.square(), start)
    x, residual = conjugate_gradients(
        lambda x: attend(x, key, key, H)[0] + ridge * x,
        query,
        query / (diagonal + ridge),
        iterations,
    )
    out, G = attend(x, key, value, G)
    _, last = attend(x, key, key, H)
    W = torch.linalg.solve(last + ridge * eye, G, left=False)
    return out, State((W,), None, last), residual


def conjugate_gradients(
    apply: Callable, b: Vectors, start: Vectors | None = None, iterations: int = 64
) -> tuple[Vectors, Float[Tensor, "*batch"]]:
    """Solution x of ``A x = b`` for many vectors b (Hestenes & Stiefel 1952).

    Its gradient is that of the exact solution, by a second solve. A warning gives the
    relative residual if it stays above 50 times the dtype's epsilon.

    Args:
        apply: ``A x`` of x; symmetric and positive definite.
        start: first x; default zero.
        iterations: largest number, positive (else ``ValueError``); default 64.

    Returns:
        x, and the norm of the residual over that of b.
    """
    check_positive(iterations=iterations)
    with torch.no_grad():
        x, residual = _descend(apply, b, start, iterations)
    if torch.is_grad_enabled():
        off = b - apply(x)  # changes with A and b by A times what the solution does
        if off.requires_grad:
            off.register_hook(lambda g: _descend(apply, g, None, iterations)[0])
            x = x + (off - off.detach())
    return x, residual


def _descend(apply, b, x, iterations):
    x = torch.zeros_like(b) if x is None else x
    r = b - apply(x)
    size, d, square = b.square().sum(-1, True), r, r.square().sum(-1, True)
    allowed = 50 * torch.finfo(b.dtype).eps
    for _ in range(iterations):
        unsolved = square > allowed**2 * size
        if not unsolved.any():
            break
        Ad = apply(d)
        rate = torch.where(unsolved, square / (d * Ad).sum(-1, True), 0.0)
        x, r = x + rate * d, r - rate * Ad
        square, last = r.square().sum(-1, True), square
        d = r + torch.where(unsolved, square / last, 0.0) * d
    residual = torch.where(size > 0, (square / size).sqrt(), 0.0)[..., 0]
    if not (residual <= allowed).all():
        left = f"a residual of {residual.max():.2g} after {iterations} iterations"
        text = f"conjugate gradients left {left}; allow more, or a larger ridge"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    return x, residual
