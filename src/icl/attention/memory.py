"""A memory that learns online in the place of softmax attention."""

import torch
from torch.nn.functional import normalize, rms_norm

from icl.attention.shared import check_heads, distances, repeated, summable, visible
from icl.memory import chunkwise


def memory_attention(
    query, key, value, beta=1.0, decay=1.0, momentum=0.0, loss="squared", mask=None
):
    """What a linear memory answers that has learned the pairs of key and value so far.

    Of :func:`icl.memory.chunkwise`, with queries and keys made unit vectors, so that
    every step β in [0, 2] is stable, and outputs divided by their root mean square, as
    those of DeltaNet are normalised (Yang et al. 2024).

    Args:
        query: ``(B, H, T, d_h)``.
        key, value: ``(B, H_kv, P + T, d_h)``; ``H_kv`` divides ``H``. The queries are
            those of the last T tokens. The memory learns all ``P + T`` anew.
        beta, decay, momentum: numbers, or tensors that broadcast to ``(B, H, P + T)``.
        loss: ``"squared"``, the delta rule, or ``"inner"``, linear attention.
        mask: ``(B or 1, 1, T, P + T)``, boolean or additive, causal, over tokens in one
            piece with padding before or behind, which writes nothing. Left out, there
            is none.

    Returns:
        ``(B, H, T, d_h)``, of the dtype of ``value``.

    Raises:
        ValueError: heads or tokens that do not fit, another mask, and see
            :func:`icl.memory.chunkwise`.
    """
    check_heads(query, key, value, mask)
    heads, tokens, length = query.shape[1], query.shape[2], key.shape[2]
    q, k, v = (summable(repeated(x, heads)) for x in (query, key, value))
    q, k = normalize(q, dim=-1), normalize(k, dim=-1)
    q = torch.cat([torch.zeros_like(k[:, :, : length - tokens]), q], 2)
    if mask is not None:
        beta = beta * _written(mask, tokens, length).to(k.dtype)
    with torch.autocast(query.device.type, enabled=False):  # sums need all digits
        out, _ = chunkwise(q, k, v, beta, loss=loss, decay=decay, momentum=momentum)
    return rms_norm(out[:, :, length - tokens :], out.shape[-1:]).to(value.dtype)


def _written(mask, tokens, length):
    """Which tokens are no padding, ``(B or 1, 1, P + T)``."""
    seen = visible(mask)
    real = seen.any(2)
    causal = distances(None, tokens, length, mask.device) >= 0
    asks = real[..., length - tokens :]
    pieces = real[..., :1] + (real[..., 1:] & ~real[..., :-1]).sum(-1, keepdim=True)
    if not (seen == (causal & real[:, :, None]))[asks].all() or (pieces > 1).any():
        raise ValueError(
            "a memory learns one token after another: its mask must be causal, over "
            "one piece of tokens with padding before or behind, not packed texts or a "
            "window"
        )
    return real
