"""Attention as a step on a contrastive loss, and that loss changed (Ren & Liu 2023)."""

import math

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag, gelu, pad

from icl.attention.masks import (
    causal_sdpa,
    relative_positions,
    repeat_kv,
    to_bool_mask,
    upcast,
)
from icl.attention.momentum import WithRates
from icl.attention.replace import AttentionKind, option

_BLOCK = 64  # rows of scores that are held at a time


class _Contrastive(AttentionKind):
    """A kind that treats the demonstrations and the query part of a prompt differently.

    ``parts`` returns keys and values of the demonstrations and of the query part, and
    α or None: the output is scaled by 1 - α w, w the query part's attention weight. The
    first ``demonstrations`` tokens attend to each other by softmax attention. If 0,
    each token is its own query part and its demonstrations are all earlier tokens; in
    an encoder all others, without special tokens if these are given.
    """

    demonstrations: int = option("number at the front, or 0", lambda n: n >= 0, 0)
    matched: bool = option("the control with the same sum of weights", default=False)

    @property
    def needs_all_keys(self):
        return self.demonstrations > 0 or self.kind == "negative"

    def forward(self, query, key, value, mask, scaling=None, module=None, **options):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        if getattr(self, "learned", False):
            key, value = (repeat_kv(x, query.shape[1]) for x in (key, value))
        shown, early = self._in_front(query, key, mask)
        if not options.get("is_causal", getattr(module, "is_causal", True)):
            special = options.get("special_tokens_mask", key.new_zeros(1, key.shape[2]))
            shown = (special == 0)[:, None, :, None]
        if early.all():
            return causal_sdpa(query, key, value, mask, scaling)
        *parts, shrink = self.parts(query, key, value, shown, mask, module, **options)
        if self.demonstrations:
            keys, values = (torch.where(shown, *p) for p in (parts[::2], parts[1::2]))
            out = causal_sdpa(query, keys, values, mask, scaling)
            if shrink is not None:
                rest = (~shown).to(values.dtype).expand_as(values)
                share = causal_sdpa(query, keys, rest, mask, scaling)
        else:
            out, share = _in_two_parts(query, *parts, mask, scaling, shown)
        out = out if shrink is None else out * (1 - shrink * share)
        if early.any():
            own = causal_sdpa(query, key, value, mask, scaling)
            out = torch.where(early[:, None, :, None], own, out)
        return out

    def _in_front(self, query, key, mask):
        """Which keys are demonstrations, and which queries are not behind them."""
        if not self.demonstrations:
            return None, torch.zeros(1, 1, dtype=torch.bool)
        place = torch.arange(key.shape[2], device=key.device).expand(len(key), -1)
        begin = 0
        if mask is not None:  # padding stands before a sequence
            seen = to_bool_mask(mask)[:, 0]
            begin = seen.any(1).int().argmax(-1, keepdim=True)
            first = seen.int().argmax(-1)
            if (first != begin)[seen.any(-1)].any():
                raise ValueError("demonstrations of several texts, or a window")
        early = place < begin + self.demonstrations
        shown = (early & (place >= begin))[:, None, :, None]
        return shown, early[:, key.shape[2] - query.shape[2] :]


class _WithStrength(_Contrastive, WithRates):
    """A kind with a strength, any number, of which heads may learn their own."""

    part, encode, decode = "strengths", torch.positive, torch.positive

    def strength_of(self, module, value):
        return self.rates(value.device, module).to(value.dtype)[:, None, None]


class RegularisedAttention(_WithStrength, kind="regularised"):
    """Attention as a step on the contrastive loss with weight decay (Ren & Liu 2023).

    The decay ``(α/2η)|W|²`` shrinks the weight that the step starts from, and that is
    the query part's: its values are scaled by ``1 - α``. The control scales
    the whole output by ``1 - α w``, w the query part's attention weight.
    """

    given = "alpha"
    alpha: float | int = option("strength of the decay, finite", math.isfinite)

    def parts(self, query, key, value, shown, mask, module, **options):
        alpha = self.strength_of(module, value)
        if self.matched:
            return key, value, key, value, alpha
        return key, value, key, (1 - alpha) * value, None


class AugmentedAttention(_Contrastive, kind="augmented"):
    """Attention whose demonstrations are augmented before they are paired.

    ``[g_1(V_D), V_T] softmax([g_2(K_D), K_T]ᵀ q)``: the two views of a demonstration
    that the contrastive loss draws together, each changed by a map (Ren & Liu 2023). In
    a model ``g_1`` (``of_value``) and ``g_2`` (``of_key``) are a ``_View`` each, shared
    by all heads of a layer, or in the control a ``_Scale`` with one number per head.
    """

    hidden: int = option("width of the views' hidden layers", default=0)
    depth: int = option("layers of a view, 1 or more", lambda n: n >= 1, default=1)
    residual: bool = option("views in parallel; if False in series", default=True)

    def init_learned(self, model, layer):
        return {
            name: self._view(model.config, 2 * layer + n).to(model.device, model.dtype)
            for n, name in enumerate(("of_key", "of_value"))
        }

    def _view(self, config, seed):
        heads = config.num_attention_heads
        if self.matched:
            return _Scale(getattr(config, "num_key_value_heads", None) or heads)
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return _View(width, self.hidden, self.depth, self.residual, seed)

    def parts(self, query, key, value, shown, mask, module, **options):
        of_key, of_value = (
            options.get(name) or self.get_learned(module, name)
            for name in ("of_key", "of_value")
        )
        return of_key(key), of_value(value), key, value, None


class NegativeAttention(_WithStrength, kind="negative"):
    """Attention as a step on the contrastive loss with negatives (Ren & Liu 2023).

    A demonstration is also pushed away from the ``k`` least similar ones (all if there
    are fewer): its value becomes ``v_i - (β/k) Σ_{j in N(i)} v_j``. The paper leaves
    the similarity open; here it is the inner product of two keys or of a query and a
    key. In an encoder a token has the same negatives for all queries, and the query
    itself may be one of them.
    The control scales values by ``1 - β``: nothing is pushed away.
    """

    given = "beta"
    beta: float | int = option("weight of the negatives, finite", math.isfinite)
    k: int = option("negatives of a token, 1 or more", lambda k: k >= 1)
    by: str = option("'keys' or 'scores'", ("keys", "scores").__contains__, "keys")

    def __post_init__(self):
        super().__post_init__()
        if 0 < self.demonstrations <= self.k:
            raise ValueError(f"k = {self.k} is not below {self.demonstrations=}")

    def parts(self, query, key, value, shown, mask, module, **options):
        beta, left = self.strength_of(module, value), key
        if self.by == "scores":
            if query.shape[2] != key.shape[2]:
                raise ValueError("by='scores' needs the queries of all tokens")
            key, value = (repeat_kv(x, query.shape[1]) for x in (key, value))
            left = query
        index, valid = _least_like(left, key, min(self.k, key.shape[2]), shown, mask)
        if self.matched:
            less = value * valid.any(-1, keepdim=True)
        else:
            share = valid.to(value.dtype) / valid.sum(-1, keepdim=True).clamp(min=1)
            less = _sums_of(value, index, share)
        return key, value - beta * less, key, value, None


class DifferentialAttention(AttentionKind, kind="differential"):
    """``(softmax_1 - λ softmax_2) V``, differential attention (Ye et al. 2024).

    Queries and keys are cut in two, a half for each, with scores scaled by ``√2`` more.
    What the second attends to is pushed away like a negative, but the model learns what
    that is. The norm that the authors put behind each head is left out here.
    """

    lam: float | int = option("weight λ of the second softmax, finite", math.isfinite)

    def forward(self, query, key, value, mask, scaling=None, **options):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        halves = (x.unflatten(-1, (2, -1)).unbind(-2) for x in (query, key))
        first, second = (
            causal_sdpa(q, k, value, mask, scaling * 2**0.5)
            for q, k in zip(*halves, strict=True)
        )
        return first - self.lam * second


class _View(torch.nn.Module):
    """The map ``g`` that augments one side of the pairs; it begins as the identity.

    Every layer is a network with one hidden layer, in parallel ``z + W_2 σ(W_1 z)``
    with ``W_2 = 0`` at first, or in series ``W_2 σ(W_1 z)`` with
    ``W_1 = [1; -1; ...]`` and ``W_2 = [1, -1, 0]``, for ``σ(z) - σ(-z) = z`` of the
    GELU. Which form Ren & Liu (2023) used is not known to us.
    """

    def __init__(self, width, hidden, depth=1, residual=True, seed=0):
        super().__init__()
        least = 1 if residual else 2 * width
        if hidden < least:
            raise ValueError(f"hidden must be {least} or more, not {hidden}")
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
            step = gelu(z @ into.T) @ out.T
            z = z + step if self.residual else step
        return z


class _Scale(torch.nn.Module):
    """One learned number per head, 1 at first: the control for ``_View``."""

    def __init__(self, heads):
        super().__init__()
        self.by = torch.nn.Parameter(torch.ones(heads))

    def forward(self, z):
        return z * self.by[:, None, None]


def _in_two_parts(query, key, value, own_key, own_value, mask, scale, shown):
    """Attention in which a query's own part has keys and values of its own; its weight.

    If nothing is masked, what came before is summed up by its normaliser, and the own
    token's weight is the logistic function of how far its score is above.
    """
    (heads, tokens), length = query.shape[1:3], key.shape[2]
    if shown is mask is None and tokens == length > 1:
        own_key, own_value = (repeat_kv(x, heads) for x in (own_key, own_value))
        last = key[:, :, :-1], value[:, :, :-1]
        before = pad(causal_sdpa(query[:, :, 1:], *last, None, scale), (0, 0, 1, 0))
        total = _LogNormaliser.apply(query, repeat_kv(key, heads), scale)
        own = torch.sigmoid((query * own_key).sum(-1) * scale - total)[..., None]
        return before + own * (own_value - before), own
    if shown is None:
        distance = relative_positions(mask, tokens, length, query.device)
        theirs, seen = distance > 0, distance >= 0
    else:
        place = torch.arange(length, device=query.device)
        theirs = shown.mT & (place != place[:, None])
        seen = theirs | ~theirs if mask is None else to_bool_mask(mask)
    scores, own_scores = (query @ repeat_kv(k, heads).mT for k in (key, own_key))
    scores = torch.where(theirs, scores, own_scores) * scale
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    of_others = weights * theirs
    value, own_value = (repeat_kv(x, heads) for x in (value, own_value))
    out = weights @ own_value + of_others @ (value - own_value)
    return out, 1 - of_others.sum(-1, keepdim=True)


class _LogNormaliser(torch.autograd.Function):
    """``log Σ_{i<t} exp(q_t·k_i scale)`` for all t at once, ``(B, H, T)``, by blocks.

    No more than a block of the scores is held at a time; backward recomputes them.
    """

    @staticmethod
    def forward(ctx, query, key, scale):
        ctx.scale, query = scale, query * scale
        total = torch.empty_like(query[..., 0])
        for start in range(0, query.shape[2], _BLOCK):
            scores = _earlier(query, key, start)
            total[:, :, start : start + _BLOCK] = scores.logsumexp(-1)
        ctx.save_for_backward(query, key, total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        query, key, total = ctx.saved_tensors
        of_query, of_key = torch.empty_like(query), torch.zeros_like(key)
        total = total.clamp(min=torch.finfo(total.dtype).min)  # nothing came before
        less = torch.cat([query, -total[..., None]], -1), pad(key, (0, 1), value=1)
        due = query * gradient[..., None]
        for start in range(0, query.shape[2], _BLOCK):
            rows = slice(start, start + _BLOCK)
            weights = _earlier(*less, start).exp_()
            end = weights.shape[-1]
            of_query[:, :, rows] = weights @ key[:, :, :end]
            of_key[:, :, :end] += weights.mT @ due[:, :, rows]
        return of_query * (gradient * ctx.scale)[..., None], of_key, None


def _earlier(left, right, start):
    """Scores of a block of tokens with those before them, the rest at -inf."""
    end = min(start + _BLOCK, left.shape[2])
    scores = left[:, :, start:end] @ right[:, :, :end].mT
    later = torch.ones_like(scores[0, 0, :, start:], dtype=torch.bool).triu()
    scores[..., start:].masked_fill_(later, -torch.inf)
    return scores


@torch.no_grad()
def _least_like(left, key, k, shown, mask):
    """The k tokens with the least ``left_i·k_j`` for each i, and whether they count."""
    length = left.shape[2]
    place = torch.arange(length, device=key.device)
    allowed = place.new_ones(1, 1, 1, 1, dtype=torch.bool)
    if mask is not None:  # its rows are the last tokens'; before them stood causal ones
        seen = to_bool_mask(mask)
        rows = seen.any(2, keepdim=True).expand(-1, -1, length - mask.shape[2], -1)
        allowed = torch.cat([rows, seen], 2)
    if shown is not None:
        allowed = allowed.any(2, keepdim=True) & shown.mT
    allowed = allowed.expand(-1, -1, length, length)
    excluded = torch.ge if shown is None else torch.eq
    indices, valid = [], []
    for start in range(0, length, _BLOCK):
        rows = slice(start, start + _BLOCK)
        like = upcast(left[:, :, rows]) @ upcast(key).mT
        out = excluded(place, place[rows, None]) | ~allowed[:, :, rows]
        like, index = like.masked_fill_(out, torch.inf).topk(k, largest=False)
        indices.append(index)
        valid.append(like < torch.inf)
    return torch.cat(indices, 2), torch.cat(valid, 2)


def _sums_of(value, index, share):
    """Sums of the chosen values ``(B, H, S, k)`` with their shares."""
    first = torch.arange(0, value[..., 0].numel(), value.shape[2], device=value.device)
    rows = index + first.reshape(*value.shape[:2], 1, 1)
    rows, values, weights = (x.flatten(0, 2) for x in (rows, value, share))
    found = embedding_bag(rows, values, mode="sum", per_sample_weights=weights)
    return found.view_as(value)
