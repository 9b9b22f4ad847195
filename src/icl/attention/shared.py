"""What all attentions of this package need: shapes, masks, distances."""

import torch
from torch.nn.functional import scaled_dot_product_attention


def fine(rate, device):
    """In float64 where there is one: float32 is too coarse for powers of 0.9999."""
    exact = torch.float32 if device.type == "mps" else torch.float64
    return torch.as_tensor(rate, dtype=exact, device=device)


def summable(value):
    return value if value.dtype == torch.float64 else value.float()


def check_heads(query, key, value, mask):
    (_, heads, tokens, _), (_, kv_heads, length, _) = query.shape, key.shape
    if value.shape[1:3] != key.shape[1:3] or heads % kv_heads or tokens > length:
        raise ValueError(
            f"queries {tuple(query.shape)}, keys {tuple(key.shape)} and values "
            f"{tuple(value.shape)} do not fit: keys and values need the same heads, "
            "a divisor of the queries', and at least as many tokens"
        )
    if mask is not None and (mask.ndim != 4 or mask.shape[1:] != (1, tokens, length)):
        raise ValueError(
            f"the mask must be (batch, 1, {tokens}, {length}), the same for all "
            f"heads, not {tuple(mask.shape)}"
        )


def softmax_attention(query, key, value, mask, scaling):
    tokens, length = query.shape[2], key.shape[2]
    if mask is None and 1 < tokens < length:
        mask = distances(None, tokens, length, query.device) >= 0
    return scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None and tokens > 1,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def visible(mask):
    """A mask as booleans, True where a query may look."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def distances(mask, tokens, length, device):
    """How many tokens that a query sees come after each; -1 for what it does not.

    ``(B, 1, T, P + T)``, 0 at the query's own token.
    """
    if mask is None:
        place = torch.arange(length, device=device)
        return (place[length - tokens :, None] - place).clamp(min=-1)[None, None]
    mask = visible(mask)
    after = mask.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1) - 1
    row, column = (torch.arange(n, device=mask.device) for n in (tokens, length))
    last = torch.where(mask, column, -1).amax(-1)  # (B, 1, T)
    own = last - row
    if not (own.amax(-1, keepdim=True) == own)[last >= 0].all():
        raise ValueError(
            "the last token that a query sees must be its own: this mask is not "
            "causal, or pads on the right; pad on the left"
        )
    return after.long().masked_fill(~mask, -1)


def repeated(x, heads):
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)
