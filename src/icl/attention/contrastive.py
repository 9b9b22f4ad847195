"""Attention as a step on a contrastive loss, and that loss changed (Ren & Liu 2023)."""

import math

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from icl.attention.shared import (
    check_heads,
    distances,
    repeated,
    softmax_attention,
    visible,
)

BLOCK = 64  # rows of scores that are held at a time


def regularised_attention(
    query,
    key,
    value,
    alpha,
    demonstrations=None,
    mask=None,
    scaling=None,
    matched=False,
):
    """Attention as a step on the contrastive loss with weight decay (Ren & Liu 2023).

    The decay ``(α/2η)|W|²`` shrinks the weight that the step starts from, and that is
    the query part's: its values are scaled by ``1 - α``. The normaliser stays.

    Args:
        query, key, value, mask, scaling: as of :func:`momentum_attention`.
        alpha: finite.
        demonstrations: which tokens are demonstrations, boolean ``(P + T,)`` or
            ``(B, P + T)``; the others are the query part. Left out, the query part of
            a token is the token itself, and the demonstrations all before it.
        matched: the control instead, softmax attention times the sum of the weights
            that regularised attention gives: as much is lost, but not from one part.

    Returns:
        ``(B, H, T, d_h)``.

    Raises:
        ValueError: ``alpha`` not finite, marks that do not fit or mark nothing; and
            see :func:`momentum_attention`.
    """
    check_heads(query, key, value, mask)
    _check_finite(alpha=alpha)
    own = value if matched else (1 - alpha) * value
    if demonstrations is None:
        out, share = _in_two_parts(query, key, value, key, own, mask, scaling)
        return out * (1 - alpha * share) if matched else out
    shown = _marks(demonstrations, key)
    out = softmax_attention(query, key, torch.where(shown, value, own), mask, scaling)
    if not matched:
        return out
    rest = (~shown).to(value.dtype).expand_as(value)
    return out * (1 - alpha * softmax_attention(query, key, rest, mask, scaling))


def augmented_attention(
    query,
    key,
    value,
    of_value,
    of_key,
    demonstrations=None,
    mask=None,
    scaling=None,
):
    """Attention whose demonstrations are augmented before they are paired.

    ``[g_1(V_D), V_T] softmax([g_2(K_D), K_T]ᵀ q)``: the two views of a demonstration
    that the contrastive loss draws together, each changed by a map (Ren & Liu 2023).

    Args:
        of_value, of_key: ``g_1`` and ``g_2``, functions from ``(B, H_kv, P + T, d_h)``
            to the same shape that act on every token by itself.

    The other arguments, value and errors as :func:`regularised_attention`.
    """
    check_heads(query, key, value, mask)
    views = of_key(key), of_value(value)
    for name, view, like in zip(
        ("of_key", "of_value"), views, (key, value), strict=True
    ):
        if view.shape != like.shape:
            raise ValueError(
                f"{name} must keep the shape {tuple(like.shape)}, but returned "
                f"{tuple(view.shape)}"
            )
    if demonstrations is None:
        return _in_two_parts(query, *views, key, value, mask, scaling)[0]
    shown = _marks(demonstrations, key)
    views = (torch.where(shown, a, b) for a, b in zip(views, (key, value), strict=True))
    return softmax_attention(query, *views, mask, scaling)


def negative_attention(
    query,
    key,
    value,
    beta,
    k,
    demonstrations=None,
    by="keys",
    mask=None,
    scaling=None,
    matched=False,
):
    """Attention as a step on the contrastive loss with negatives (Ren & Liu 2023).

    A demonstration is also pushed away from the ``k`` that are least like it, so its
    value becomes ``v_i - (β/k) Σ_{j in N(i)} v_j``. The paper leaves open what "like"
    is.

    Args:
        beta: finite.
        k: 1 or more. A token with fewer candidates takes those there are.
        demonstrations: as of :func:`regularised_attention`. Marked demonstrations
            choose among each other. Left out, all tokens choose among those before
            them, so that no token learns of a later one.
        by: ``"keys"``, the inner product of two keys, or ``"scores"``, of a token's
            query with the other's key (then ``query`` must hold all tokens).
        matched: the control instead, demonstrations' values times ``1 - β``: the sum
            of the weights is the same, but nothing is pushed away.

    The other arguments, value and errors as :func:`regularised_attention`; besides,
    ``k`` larger than the number of other demonstrations, or another ``by``.
    """
    check_heads(query, key, value, mask)
    _check_finite(beta=beta)
    length = key.shape[2]
    if by not in ("keys", "scores"):
        raise ValueError(f"by must be 'keys' or 'scores', not {by!r}")
    if by == "scores" and query.shape[2] != length:
        raise ValueError("by='scores' needs the queries of all tokens")
    shown = None if demonstrations is None else _marks(demonstrations, key)
    others = length if shown is None else int(shown.sum(2).min())
    if not 1 <= k < others:
        raise ValueError(f"k must be 1 to {others - 1}, the other tokens; not {k}")
    if by == "scores":
        key, value = (repeated(x, query.shape[1]) for x in (key, value))
    index, valid = _least_like(query if by == "scores" else key, key, k, shown, mask)
    if matched:
        pushed = value * (1 - beta * valid.any(-1, keepdim=True))
    else:
        share = valid.to(value.dtype) / valid.sum(-1, keepdim=True).clamp(min=1)
        pushed = value - beta * _MeanOf.apply(value, index, share)
    if shown is None:
        return _in_two_parts(query, key, pushed, key, value, mask, scaling)[0]
    return softmax_attention(
        query, key, torch.where(shown, pushed, value), mask, scaling
    )


def differential_attention(query, key, value, lam, mask=None, scaling=None):
    """``(softmax_1 - λ softmax_2) V``, differential attention (Ye et al. 2024).

    Queries and keys are cut in two, a half for each. What the second attends to is
    pushed away like a negative, but the model learns what that is. The norm that the
    authors put behind each head is left out here.

    Args:
        lam: λ, finite.
        scaling: of the scores; left out, ``1/√(d_h/2)``.

    The other arguments, value and errors as :func:`momentum_attention`.

    Raises:
        ValueError: also if the width of the heads is odd.
    """
    check_heads(query, key, value, mask)
    _check_finite(lam=lam)
    if query.shape[-1] % 2:
        raise ValueError(f"heads of width {query.shape[-1]} cannot be cut in two")
    pairs = zip(query.chunk(2, -1), key.chunk(2, -1), strict=True)
    first, second = (softmax_attention(q, k, value, mask, scaling) for q, k in pairs)
    return first - lam * second


class View(torch.nn.Module):
    """The map ``g`` that augments one side of the pairs; it begins as the identity.

    Every layer is a network with one hidden layer, in parallel ``z + W_2 σ(W_1 z)``
    with ``W_2 = 0`` at first, or in series ``W_2 σ(W_1 z)`` with
    ``W_1 = [1; -1; ...]`` and ``W_2 = [1, -1, 0]``, for ``σ(z) - σ(-z) = z`` of the
    GELU. Which form Ren & Liu (2023) used is not known to us.

    Args:
        width: of the heads, d_h.
        hidden: width of the hidden layers; in series at least ``2 d_h``.
        depth: how many layers.
        residual: in parallel or, if False, in series.
        seed: draws ``W_1``.

    Raises:
        ValueError: ``depth`` or ``hidden`` too small.
    """

    def __init__(self, width, hidden, depth=1, residual=True, seed=0):
        super().__init__()
        if depth < 1 or hidden < (1 if residual else 2 * width):
            raise ValueError(
                f"a view of depth {depth} with {hidden} hidden units: depth is 1 or "
                f"more, and heads of width {width} need a hidden width of "
                f"{1 if residual else 2 * width} or more"
            )
        self.residual = residual
        generator = torch.Generator().manual_seed(seed)
        into = torch.randn(depth, hidden, width, generator=generator) / width**0.5
        out = torch.zeros(depth, width, hidden)
        if not residual:
            pair = torch.cat([torch.eye(width), -torch.eye(width)])
            into[:, : 2 * width], out[:, :, : 2 * width] = pair, pair.T
        self.into, self.out = torch.nn.Parameter(into), torch.nn.Parameter(out)

    def forward(self, z):
        for into, out in zip(self.into, self.out, strict=True):
            step = torch.nn.functional.gelu(z @ into.T) @ out.T
            z = z + step if self.residual else step
        return z


class Scale(torch.nn.Module):
    """One learned number a head, 1 at first: the control for :class:`View`."""

    def __init__(self, heads):
        super().__init__()
        self.by = torch.nn.Parameter(torch.ones(heads))

    def forward(self, z):
        return z * self.by[:, None, None]


def _check_finite(**numbers):
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise ValueError(f"{name} must be finite, not {number}")


def _marks(demonstrations, key):
    """``(B or 1, 1, P + T, 1)`` from marks ``(P + T,)`` or ``(B, P + T)``."""
    marks = torch.as_tensor(demonstrations, device=key.device)
    batch, _, length, _ = key.shape
    if marks.dtype != torch.bool or marks.shape not in ((length,), (batch, length)):
        raise ValueError(
            f"demonstrations must be booleans ({length},) or ({batch}, {length}), not "
            f"{marks.dtype} {tuple(marks.shape)}"
        )
    marks = marks.reshape(-1, length)
    if not marks.any(1).all():
        raise ValueError("demonstrations marks no token of some sequence")
    return marks[:, None, :, None]


def _in_two_parts(query, key, value, own_key, own_value, mask, scaling):
    """Causal attention in which a query's own token has a key and value of its own.

    What came before is summed up by its normaliser, so that the own token joins by
    the logistic function of how far its score is above.

    Returns:
        the output ``(B, H, T, d_h)``, and the own tokens' weights ``(B, H, T, 1)``.
    """
    tokens, length = query.shape[2], key.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    heads = query.shape[1]
    own_key, own_value = (
        repeated(x[:, :, length - tokens :], heads) for x in (own_key, own_value)
    )
    score = (query * own_key).sum(-1) * scale
    if mask is None and tokens == length > 1:
        before = scaled_dot_product_attention(
            query[:, :, 1:],
            key[:, :, :-1],
            value[:, :, :-1],
            is_causal=True,
            scale=scale,
            enable_gqa=heads != key.shape[1],
        )
        before = pad(before, (0, 0, 1, 0))
        total = _LogNormaliser.apply(query, repeated(key, heads), scale)
    else:
        seen = distances(mask, tokens, length, query.device) > 0
        scores = query @ repeated(key, heads).mT * scale
        scores = scores.masked_fill(~seen, -torch.inf)
        total = scores.logsumexp(-1)
        weights = scores - total.clamp(min=torch.finfo(scores.dtype).min)[..., None]
        before = weights.exp() @ repeated(value, heads)
    own = torch.sigmoid(score - total)[..., None]
    return before + own * (own_value - before), own


class _LogNormaliser(torch.autograd.Function):
    """``log Σ_{i<t} exp(q_t·k_i scale)`` for all t at once, ``(B, H, T)``, by blocks.

    No more than a block of the scores is held at a time; backward makes them again.
    """

    @staticmethod
    def forward(ctx, query, key, scale):
        ctx.scale, query = scale, query * scale
        total = torch.empty_like(query[..., 0])
        for start in range(0, query.shape[2], BLOCK):
            scores = _earlier(query, key, start)
            total[:, :, start : start + BLOCK] = scores.logsumexp(-1)
        ctx.save_for_backward(query, key, total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        query, key, total = ctx.saved_tensors
        of_query, of_key = torch.empty_like(query), torch.zeros_like(key)
        total = total.clamp(min=torch.finfo(total.dtype).min)  # nothing came before
        less = torch.cat([query, -total[..., None]], -1), pad(key, (0, 1), value=1)
        due = query * gradient[..., None]
        for start in range(0, query.shape[2], BLOCK):
            rows = slice(start, start + BLOCK)
            weights = _earlier(*less, start).exp_()
            end = weights.shape[-1]
            of_query[:, :, rows] = weights @ key[:, :, :end]
            of_key[:, :, :end] += weights.mT @ due[:, :, rows]
        return of_query * (gradient * ctx.scale)[..., None], of_key, None


def _earlier(left, right, start):
    """Scores of a block of tokens with those before them, the rest at -inf."""
    end = min(start + BLOCK, left.shape[2])
    scores = left[:, :, start:end] @ right[:, :, :end].mT
    later = torch.ones_like(scores[0, 0, :, start:], dtype=torch.bool).triu()
    scores[..., start:].masked_fill_(later, -torch.inf)
    return scores


@torch.no_grad()
def _least_like(left, key, k, shown, mask):
    """The k tokens with the least ``left_i·k_j`` for every i, and which of them count.

    Returns:
        indices and booleans ``(B, H, P + T, k)``.
    """
    length = left.shape[2]
    indices, valid = [], []
    seen = None if mask is None else _seen_by_all(mask, length)
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        like = left[:, :, start:end] @ key.mT
        place = torch.arange(length, device=key.device)
        if shown is None:
            out = place >= place[start:end, None]
        else:
            out = (place == place[start:end, None]) | ~shown[..., 0][:, :, None]
        if seen is not None:
            who = seen[:, :, start:end] if shown is None else seen.any(2, keepdim=True)
            out = out | ~who
        like, index = like.masked_fill_(out, torch.inf).topk(k, largest=False)
        indices.append(index)
        valid.append(like < torch.inf)
    return torch.cat(indices, 2), torch.cat(valid, 2)


def _seen_by_all(mask, length):
    """What every token may look at, ``(B, 1, P + T, P + T)``: a mask has rows for the
    last T tokens, and those before them stood in causal rows."""
    seen = visible(mask)
    start = length - mask.shape[2]
    rows = seen.any(2, keepdim=True).expand(-1, -1, start, -1)
    return torch.cat([rows, seen], 2)


class _MeanOf(torch.autograd.Function):
    """Sums of values with shares of the chosen ones, by blocks of rows."""

    @staticmethod
    def forward(ctx, value, index, share):
        ctx.save_for_backward(index, share)
        means = torch.empty_like(value)
        for rows, weights in _blocks(index, share):
            means[:, :, rows] = weights @ value
        return means

    @staticmethod
    def backward(ctx, gradient):
        of_value = torch.zeros_like(gradient)
        for rows, weights in _blocks(*ctx.saved_tensors):
            of_value += weights.mT @ gradient[:, :, rows]
        return of_value, None, None


def _blocks(index, share):
    """Blocks of rows, and their matrices of shares ``(B, H, block, P + T)``."""
    length = index.shape[2]
    for start in range(0, length, BLOCK):
        rows = slice(start, start + BLOCK)
        weights = share.new_zeros(*share[:, :, rows].shape[:3], length)
        yield rows, weights.scatter_(-1, index[:, :, rows], share[:, :, rows])
