"""Conjugate gradients for many systems at once."""

import warnings

import torch

from icl.memory.shared import one_or_more


def conjugate_gradients(apply, b, start=None, iterations=64, tolerance=None):
    """Solve ``A x = b`` for every vector on the last axis of ``b`` (Hestenes & Stiefel
    1952). The gradient is that of the solution, by another such solve.

    Args:
        apply: ``A x`` of ``x`` ``(..., d)``; symmetric and positive definite.
        b: ``(..., d)``.
        start: to begin from; left out, zero.
        iterations: at most so many.
        tolerance: of the residual; left out, 50 times the dtype's rounding.

    Returns:
        x, and the norm of the residual over that of b, ``(...)``.

    Raises:
        ValueError: ``iterations`` below 1.

    Warns:
        RuntimeWarning: the tolerance was not reached; says how far the worst is.
    """
    one_or_more(iterations=iterations)
    with torch.no_grad():
        x, residual = _descend(apply, b, start, iterations, tolerance)
    if torch.is_grad_enabled():
        off = b - apply(x)  # changes with A and b by A times what the solution does
        if off.requires_grad:
            off.register_hook(
                lambda g: _descend(apply, g, None, iterations, tolerance)[0]
            )
            x = x + (off - off.detach())
    return x, residual


def _descend(apply, b, x, iterations, tolerance):
    x = torch.zeros_like(b) if x is None else x
    r = b - apply(x)
    size, d, square = b.square().sum(-1, True), r, r.square().sum(-1, True)
    allowed = 50 * torch.finfo(b.dtype).eps if tolerance is None else tolerance
    for _ in range(iterations):
        open_ = square > allowed**2 * size
        if not open_.any():
            break
        Ad = apply(d)
        rate = torch.where(open_, square / (d * Ad).sum(-1, True), 0.0)
        x, r = x + rate * d, r - rate * Ad
        square, last = r.square().sum(-1, True), square
        d = r + torch.where(open_, square / last, 0.0) * d
    residual = torch.where(size > 0, (square / size).sqrt(), 0.0)[..., 0]
    if not (residual <= allowed).all():
        warnings.warn(
            f"conjugate gradients did not converge in {iterations} iterations: the "
            f"residual is up to {residual.max():.2g} of the right side, where "
            f"{allowed:.2g} is asked for; allow more iterations or a larger ridge",
            RuntimeWarning,
            stacklevel=3,
        )
    return x, residual
